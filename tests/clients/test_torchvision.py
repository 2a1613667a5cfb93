"""Image models of torchvision, without their pretrained weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.clients.agreement import Case, Fit
from tests.clients.modules import Supervised, fitting, images

models: Any = pytest.importorskip("torchvision.models")
tv_tensors: Any = pytest.importorskip("torchvision.tv_tensors")


def classifying(name: str, size: int, **config: Any) -> Fit:
    def make() -> Supervised:
        return Supervised(models.get_model(name, weights=None, num_classes=3, **config), F.cross_entropy)

    return fitting(make, images(size))


def test_resnet(case: Case) -> None:
    """`resnet18`"""
    case.agrees(classifying("resnet18", 16), "model.fc", exact_steps=1, steps=10)


def transformer() -> Any:
    model = models.VisionTransformer(8, 4, num_layers=1, num_heads=2, hidden_dim=6, mlp_dim=7, num_classes=3)
    torch.nn.init.normal_(model.heads.head.weight)  # it begins at 0, and so does κ
    return model


def test_vision_transformer(case: Case) -> None:
    """`VisionTransformer`"""
    case.agrees(fitting(lambda: Supervised(transformer(), F.cross_entropy), images(8)), "model.heads.head")


def test_wrapped_images(case: Case) -> None:
    """`VisionTransformer` on images that stay `tv_tensors.Image` through the whole model"""

    class Wrapped(Supervised):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            with tv_tensors.set_return_type("TVTensor"):
                loss = super().training_step([tv_tensors.Image(batch[0]), batch[1]], batch_idx)
            assert type(loss) is tv_tensors.Image
            return loss

    case.agrees(fitting(lambda: Wrapped(transformer(), F.cross_entropy), images(8)), "model.heads.head")


def test_segmentation(case: Case) -> None:
    """`lraspp_mobilenet_v3_large`, which has no linear layer, and its last convolution, named"""

    def make() -> Supervised:
        model = models.get_model("lraspp_mobilenet_v3_large", weights=None, weights_backbone=None, num_classes=2)
        return Supervised(model, lambda outputs, target: F.cross_entropy(outputs["out"], target))

    fit = fitting(make, images(32, classes=2, mask=True))
    case.refused(fit, "no nn.Linear")
    case.agrees(fit, "model.classifier.low_classifier", named=True, exact_steps=1, steps=15)
