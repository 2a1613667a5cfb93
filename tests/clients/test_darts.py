"""Forecasting models of darts, which make their own modules, data and Trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.clients.agreement import QUIET, Case, Fit, dtype_of

darts: Any = pytest.importorskip("darts")
models: Any = pytest.importorskip("darts.models")
likelihoods: Any = pytest.importorskip("darts.utils.likelihood_models.torch")


def fitting(kind: str, likelihood: Any = None, /, **config: Any) -> Fit:
    noise = np.random.default_rng(0).normal(size=40)
    values = np.sin(np.arange(40) / 3) + 0.3 * noise

    def fit(callbacks: list[Any], **settings: Any) -> None:
        shared: dict[str, Any] = {"input_chunk_length": 6, "batch_size": 8, "n_epochs": 1000, "random_state": 0}
        if kind != "RNNModel":
            shared["output_chunk_length"] = 2
        # The module takes its type from the series.
        series = darts.TimeSeries.from_values(values.astype(str(dtype_of(settings)).removeprefix("torch.")))
        trainer = QUIET | settings | {"callbacks": callbacks}
        made = getattr(models, kind)(pl_trainer_kwargs=trainer, likelihood=likelihood, **shared, **config)
        made.fit(series, verbose=False)

    return fit


BLOCKS = {"num_stacks": 2, "num_blocks": 1, "num_layers": 1, "layer_widths": 6}
ATTENTION = {"d_model": 4, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 5}
MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "NBEATSModel": ({"expansion_coefficient_dim": 3, **BLOCKS}, "stacks.1.blocks.0.forecast_g"),
    "NHiTSModel": (BLOCKS, "stacks.1.blocks.0.forecast_linear_layer"),
    "DLinearModel": ({"kernel_size": 3}, "linear_trend"),
    "TransformerModel": ({"dropout": 0.1, **ATTENTION}, "decoder"),
    "BlockRNNModel": ({"model": "LSTM", "hidden_dim": 4}, "fc.0"),
    "RNNModel": ({"model": "GRU", "training_length": 8, "hidden_dim": 4}, "V"),
    "TSMixerModel": ({"hidden_size": 4, "ff_size": 4, "num_blocks": 1}, "fc_out"),
}


@pytest.mark.parametrize("model", MODELS)
def test_forecasting(case: Case, model: str) -> None:
    """forecasts"""
    config, layer = MODELS[model]
    case.agrees(fitting(model, **config), layer)


def test_gaussian(case: Case) -> None:
    """a likelihood: `DLinearModel(likelihood=GaussianLikelihood())`"""
    fit = fitting("DLinearModel", likelihoods.GaussianLikelihood(), kernel_size=3)
    case.agrees(fit, "linear_trend")


def test_quantiles(case: Case) -> None:
    """`TFTModel`, whose quantile loss is piecewise linear"""
    fit = fitting("TFTModel", hidden_size=4, num_attention_heads=2, add_relative_index=True)
    case.is_flat(fit, "output_layer")


def test_without_a_linear_layer(case: Case) -> None:
    """`TCNModel`, which has convolutions alone"""
    case.refused(fitting("TCNModel", num_filters=2, kernel_size=2), "'res_blocks.1.conv3'")


def test_convolution(case: Case) -> None:
    """`TCNModel`; its last dilated convolution, named"""
    case.agrees(fitting("TCNModel", num_filters=2, kernel_size=2), "res_blocks.1.conv2", named=True)
