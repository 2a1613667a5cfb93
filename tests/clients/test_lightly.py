"""Self-supervised training with lightly's heads and losses, as its documentation writes the modules."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.clients.agreement import Case
from tests.clients.modules import fitting

losses: Any = pytest.importorskip("lightly.loss")
heads: Any = pytest.importorskip("lightly.models.modules.heads")
utils: Any = pytest.importorskip("lightly.models.utils")


def views(dtype: torch.dtype) -> DataLoader[Any]:
    """Two views of every image."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(16, 1, 4, 4, generator=generator)
    other = images + 0.3 * torch.randn(16, 1, 4, 4, generator=generator)
    return DataLoader(TensorDataset(images.to(dtype), other.to(dtype)), batch_size=8)


class Lit(L.LightningModule):
    """A backbone, and how its users call their parts."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(*batch)

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        raise NotImplementedError

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Contrastive(Lit):
    def __init__(self, head: Any, criterion: Any) -> None:
        super().__init__()
        self.projection_head, self.criterion = head, criterion

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        found: Tensor = self.criterion(
            self.projection_head(self.backbone(first)), self.projection_head(self.backbone(second))
        )
        return found


def test_simclr(case: Case) -> None:
    """SimCLR: `NTXentLoss`, where all samples of a batch meet"""
    fit = fitting(lambda: Contrastive(heads.SimCLRProjectionHead(5, 5, 4), losses.NTXentLoss()), views)
    case.agrees(fit, "projection_head.layers.3")


def test_barlow_twins(case: Case) -> None:
    """Barlow Twins: `BarlowTwinsLoss`, a correlation over the batch"""
    fit = fitting(lambda: Contrastive(heads.BarlowTwinsProjectionHead(5, 5, 4), losses.BarlowTwinsLoss()), views)
    case.agrees(fit, "projection_head.layers.6")


def test_vicreg(case: Case) -> None:
    """VICReg: `VICRegLoss`"""
    head = {"input_dim": 5, "hidden_dim": 5, "output_dim": 4, "num_layers": 2}
    fit = fitting(lambda: Contrastive(heads.VICRegProjectionHead(**head), losses.VICRegLoss()), views)
    case.agrees(fit, "projection_head.layers.3")


class SimSiam(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.projection_head = heads.SimSiamProjectionHead(5, 5, 4)
        self.prediction_head = heads.SimSiamPredictionHead(4, 3, 4)
        self.criterion = losses.NegativeCosineSimilarity()

    def both(self, image: Tensor) -> tuple[Tensor, Tensor]:
        projected = self.projection_head(self.backbone(image))
        return projected.detach(), self.prediction_head(projected)

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        (z0, p0), (z1, p1) = self.both(first), self.both(second)
        found: Tensor = 0.5 * (self.criterion(z0, p1) + self.criterion(z1, p0))
        return found


def test_simsiam(case: Case) -> None:
    """SimSiam: predictions beside detached projections"""
    case.agrees(fitting(SimSiam, views), "prediction_head.layers.3")


def test_simsiam_projection(case: Case) -> None:
    """SimSiam; the last layer of the projection, which runs twice with batch normalisation behind it, named"""
    case.agrees(fitting(SimSiam, views), "projection_head.layers.6", named=True)


class BYOL(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.projection_head = heads.BYOLProjectionHead(5, 5, 4)
        self.prediction_head = heads.BYOLPredictionHead(4, 3, 4)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        utils.deactivate_requires_grad(self.backbone_momentum)
        utils.deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = losses.NegativeCosineSimilarity()

    def momentum(self, image: Tensor) -> Tensor:
        projected: Tensor = self.projection_head_momentum(self.backbone_momentum(image))
        return projected.detach()

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        utils.update_momentum(self.backbone, self.backbone_momentum, m=0.99)
        utils.update_momentum(self.projection_head, self.projection_head_momentum, m=0.99)
        p0 = self.prediction_head(self.projection_head(self.backbone(first)))
        z0 = self.momentum(first)
        p1 = self.prediction_head(self.projection_head(self.backbone(second)))
        z1 = self.momentum(second)  # the layer that runs last, and that the loss does not depend on
        found: Tensor = 0.5 * (self.criterion(p0, z1) + self.criterion(p1, z0))
        return found


def test_byol(case: Case) -> None:
    """BYOL: a momentum encoder runs last, but the loss goes through the predictions"""
    case.agrees(fitting(BYOL, views), "prediction_head.layers.3")


class DINO(Lit):
    def __init__(self) -> None:
        super().__init__()
        self.teacher_backbone = copy.deepcopy(self.backbone)
        self.student_head = heads.DINOProjectionHead(5, 5, 4, 6, freeze_last_layer=1)
        self.teacher_head = heads.DINOProjectionHead(5, 5, 4, 6)
        utils.deactivate_requires_grad(self.teacher_backbone)
        utils.deactivate_requires_grad(self.teacher_head)
        self.criterion = losses.DINOLoss(output_dim=6, warmup_teacher_temp_epochs=2)

    def loss(self, first: Tensor, second: Tensor) -> Tensor:
        teacher = [self.teacher_head(self.teacher_backbone(image)) for image in (first, second)]
        student = [self.student_head(self.backbone(image)) for image in (first, second)]
        found: Tensor = self.criterion(teacher, student, epoch=0)
        return found


def test_dino(case: Case) -> None:
    """DINO: a weight-normalised last layer"""
    case.agrees(fitting(DINO, views), "student_head.last_layer")
