"""Forecasting models of neuralforecast, which copies models and their callbacks before it trains them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.clients.agreement import QUIET, Case, Fit

neuralforecast: Any = pytest.importorskip("neuralforecast")
models: Any = pytest.importorskip("neuralforecast.models")
losses: Any = pytest.importorskip("neuralforecast.losses.pytorch")
pandas: Any = pytest.importorskip("pandas")


def fitting(model: str, loss: Any, **config: Any) -> Fit:
    noise = np.random.default_rng(0).normal(size=(2, 40))
    series = pandas.concat(
        pandas.DataFrame(
            {
                "unique_id": name,
                "ds": pandas.date_range("2020-01-01", periods=40),
                "y": np.sin(np.arange(40) / 3) + 0.3 * row,
            }
        )
        for name, row in zip("ab", noise, strict=True)
    )

    def fit(callbacks: list[Any], **settings: Any) -> Any:
        shared = {"h": 2, "input_size": 6, "batch_size": 2, "random_seed": 0, "loss": loss}
        if model != "iTransformer":
            shared["windows_batch_size"] = 8
        made = getattr(models, model)(**shared, **config, **(QUIET | settings), callbacks=callbacks)
        forecasts = neuralforecast.NeuralForecast([made], freq="D")
        forecasts.fit(series)
        return forecasts.models[0].trainer_kwargs["callbacks"][:2]

    return fit


BLOCK = {"stack_types": ["identity"], "n_blocks": [1], "mlp_units": [[6, 6]]}
ATTENTION = {"hidden_size": 4, "n_head": 2, "conv_hidden_size": 4, "encoder_layers": 1, "decoder_layers": 1}
PATCHES = {"encoder_layers": 1, "n_heads": 2, "hidden_size": 4, "linear_hidden_size": 5, "patch_len": 2, "stride": 2}
MODELS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "MLP": (losses.MSE(), {"num_layers": 1, "hidden_size": 6}, "out"),
    "NBEATS": (losses.MSE(), BLOCK, "blocks.0.layers.3"),
    "PatchTST": (losses.HuberLoss(), PATCHES, "model.head.linear"),
    "LSTM": (
        losses.DistributionLoss("Normal"),
        {"encoder_hidden_size": 4, "decoder_hidden_size": 4, "encoder_n_layers": 1},
        "mlp_decoder.layers.3",
    ),
    "TFT": (losses.MSE(), {"hidden_size": 4, "n_head": 2}, "output_adapter"),
    "VanillaTransformer": (losses.MSE(), ATTENTION, "decoder.projection"),
    "iTransformer": (
        losses.MSE(),
        {"n_series": 2, "hidden_size": 4, "n_heads": 2, "e_layers": 1, "d_ff": 4},
        "projector",
    ),
    "DeepAR": (losses.DistributionLoss("StudentT"), {"lstm_hidden_size": 4, "lstm_n_layers": 1}, "decoder.layers.0"),
}


@pytest.mark.parametrize("model", MODELS)
def test_forecasting(case: Case, model: str) -> None:
    """forecasts"""
    loss, config, layer = MODELS[model]
    case.agrees(fitting(model, loss, **config), layer)


def test_absolute_error(case: Case) -> None:
    """`MLP` and the mean absolute error, which is piecewise linear"""
    case.is_flat(fitting("MLP", losses.MAE(), num_layers=1, hidden_size=6), "out")
