"""Networks, losses and data of MONAI, whose batches are `MetaTensor`s, a subclass of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

from tests.clients.agreement import Case
from tests.clients.modules import fitting

data: Any = pytest.importorskip("monai.data")
losses: Any = pytest.importorskip("monai.losses")
nets: Any = pytest.importorskip("monai.networks.nets")


class Lit(L.LightningModule):
    """As in MONAI's tutorials: batches are dictionaries of images and labels."""

    def __init__(self, model: Any, criterion: Any) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.criterion(self.model(batch["image"]), batch["label"])
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.criterion(self.model(batch["image"]), batch["label"])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def scans(label: Callable[[torch.Generator], Tensor], size: int = 8) -> Callable[[torch.dtype], Any]:
    def loader(dtype: torch.dtype) -> Any:
        generator = torch.Generator().manual_seed(1)
        samples = []
        for _ in range(8):
            image = torch.randn(1, size, size, generator=generator).to(dtype)
            samples.append(
                {"image": data.MetaTensor(image, meta={"filename_or_obj": "scan"}), "label": label(generator)}
            )
        return data.DataLoader(data.Dataset(samples), batch_size=4)

    return loader


def classes(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 3, (), generator=generator)


def masks(generator: torch.Generator) -> Tensor:
    labels: Tensor = data.MetaTensor(torch.randint(0, 2, (1, 8, 8), generator=generator))
    return labels


def test_fully_connected(case: Case) -> None:
    """`FullyConnectedNet` with PReLU and dropout"""

    def make() -> Lit:
        net = torch.nn.Sequential(torch.nn.Flatten(), nets.FullyConnectedNet(64, 3, [6], dropout=0.1))
        return Lit(net, torch.nn.CrossEntropyLoss())

    case.agrees(fitting(make, scans(classes)), "model.1.output")


def test_named_loss(case: Case) -> None:
    """`FullyConnectedNet`, the loss named: `FAM(loss="cross_entropy", target="label")`"""

    def make() -> Lit:
        net = torch.nn.Sequential(torch.nn.Flatten(), nets.FullyConnectedNet(64, 3, [6]))
        return Lit(net, torch.nn.CrossEntropyLoss())

    case.agrees(fitting(make, scans(classes)), "model.1.output", claim={"loss": "cross_entropy", "target": "label"})


def test_densenet(case: Case) -> None:
    """`DenseNet`"""

    def make() -> Lit:
        net = nets.DenseNet(2, 1, 3, init_features=4, growth_rate=2, block_config=(1, 1), bn_size=1)
        return Lit(net, torch.nn.CrossEntropyLoss())

    case.agrees(fitting(make, scans(classes)), "model.class_layers.out")


def test_vit(case: Case) -> None:
    """`ViT`"""

    def make() -> Lit:
        net = nets.ViT(1, (8, 8), 4, 6, 7, 1, 2, classification=True, num_classes=3, spatial_dims=2)
        return Lit(net, lambda outputs, target: torch.nn.functional.cross_entropy(outputs[0], target))

    case.agrees(fitting(make, scans(classes)), "model.classification_head.0")


def unet() -> Lit:
    net = nets.UNet(2, 1, 2, channels=(4, 6), strides=(2,), num_res_units=1)
    return Lit(net, losses.DiceCELoss(to_onehot_y=True, softmax=True))


def test_unet_without_a_linear_layer(case: Case) -> None:
    """`UNet`, which has convolutions alone"""
    case.refused(fitting(unet, scans(masks)), "Layers that can be named: ")


def test_unet(case: Case) -> None:
    """`UNet` with residual units and `DiceCELoss`; the last convolution, named"""
    case.agrees(fitting(unet, scans(masks)), "model.model.2.1.conv.unit0.conv", named=True, steps=10)


def test_a_hidden_layer_of_a_unet(case: Case) -> None:
    """`UNet` with residual units and `DiceCELoss`; a convolution within, with instance normalisation behind, named"""
    case.agrees(fitting(unet, scans(masks)), "model.model.0.conv.unit0.conv", named=True, steps=10)
