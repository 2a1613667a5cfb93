"""Image models of timm, without their pretrained weights."""

from __future__ import annotations

from typing import Any

import pytest
from torch.nn import functional as F

from tests.clients.agreement import Case, Fit
from tests.clients.modules import Supervised, fitting, images

timm: Any = pytest.importorskip("timm")


def classifying(name: str, size: int, **config: Any) -> Fit:
    def make() -> Supervised:
        return Supervised(timm.create_model(name, num_classes=3, **config), F.cross_entropy)

    return fitting(make, images(size))


def test_resnet(case: Case) -> None:
    """`resnet10t`"""
    case.agrees(classifying("resnet10t", 16, channels=(4, 4, 4, 6)), "model.fc", steps=10)


def test_vision_transformer(case: Case) -> None:
    """`vit_tiny_patch16_224`, made smaller still"""
    fit = classifying("vit_tiny_patch16_224", 8, img_size=8, patch_size=4, embed_dim=6, depth=1, num_heads=2)
    case.agrees(fit, "model.head")


def test_mixup(case: Case) -> None:
    """`vit_tiny_patch16_224` with mixed labels and stochastic depth"""
    data: Any = pytest.importorskip("timm.data")
    loss: Any = pytest.importorskip("timm.loss")
    mixup = data.Mixup(mixup_alpha=0.8, cutmix_alpha=0.0, num_classes=3)

    class Mixed(Supervised):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step([*mixup(*batch)], batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            return F.cross_entropy(self.model(batch[0]), batch[1])

    def make() -> Supervised:
        model = timm.create_model(
            "vit_tiny_patch16_224",
            num_classes=3,
            img_size=8,
            patch_size=4,
            embed_dim=6,
            depth=2,
            num_heads=2,
            drop_path_rate=0.3,
        )
        return Mixed(model, loss.SoftTargetCrossEntropy())

    case.agrees(fitting(make, images(8)), "model.head")


def test_convnext(case: Case) -> None:
    """`convnext_atto` with its own layer normalisation, a hidden layer, named"""
    fit = classifying("convnext_atto", 32, depths=(1, 1, 1, 1), dims=(4, 4, 4, 6))
    case.agrees(fit, "model.stages.3.blocks.0.mlp.fc1", named=True, steps=10)
