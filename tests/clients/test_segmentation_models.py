"""Networks and losses of segmentation_models_pytorch."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from tests.clients.agreement import Case, Fit
from tests.clients.modules import Supervised, fitting, images

smp: Any = pytest.importorskip("segmentation_models_pytorch")

SETTINGS = {"encoder_name": "resnet18", "encoder_weights": None, "encoder_depth": 3, "classes": 2}


def segmenting(loss: Any, network: str = "Unet", **settings: Any) -> Fit:
    def make() -> Supervised:
        return Supervised(getattr(smp, network)(**SETTINGS, **settings), loss)

    return fitting(make, images(16, count=4, classes=2, mask=True))


def test_without_a_linear_layer(case: Case) -> None:
    """`Unet`, which has convolutions alone"""
    case.refused(segmenting(smp.losses.DiceLoss("multiclass"), decoder_channels=(8, 4, 2)), "model.segmentation_head.0")


def test_dice(case: Case) -> None:
    """`Unet` and `DiceLoss`, where all pixels of a batch meet; the last convolution, named"""
    fit = segmenting(smp.losses.DiceLoss("multiclass"), decoder_channels=(8, 4, 2))
    case.agrees(fit, "model.segmentation_head.0", named=True, steps=10)


def test_focal(case: Case) -> None:
    """`Unet` and `FocalLoss`; the last convolution, named"""
    fit = segmenting(smp.losses.FocalLoss("multiclass"), decoder_channels=(8, 4, 2))
    case.agrees(fit, "model.segmentation_head.0", named=True, steps=10)


def test_a_hidden_convolution(case: Case) -> None:
    """`Unet`, cross-entropy and Dice; a convolution with batch normalisation behind it, named"""
    soft, dice = smp.losses.SoftCrossEntropyLoss(smooth_factor=0.1), smp.losses.DiceLoss("multiclass")

    def loss(outputs: Tensor, target: Tensor) -> Any:
        return soft(outputs, target) + dice(outputs, target)

    fit = segmenting(loss, decoder_channels=(8, 4, 2))
    case.agrees(fit, "model.decoder.blocks.2.conv2.0", named=True, steps=10)
