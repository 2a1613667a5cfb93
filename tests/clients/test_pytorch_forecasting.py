"""Forecasting models of pytorch-forecasting, made from its data sets."""

from __future__ import annotations

from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from tests.clients.agreement import QUIET, Case, Fit

forecasting: Any = pytest.importorskip("pytorch_forecasting")
data: Any = pytest.importorskip("pytorch_forecasting.data")
metrics: Any = pytest.importorskip("pytorch_forecasting.metrics")
pandas: Any = pytest.importorskip("pandas")


def fitting(model: str, make_loss: Any = None, *, known: bool = False, **config: Any) -> Fit:
    noise = np.random.default_rng(0).normal(size=(2, 30))
    series = pandas.concat(
        pandas.DataFrame({"group": name, "time": np.arange(30), "y": 2 + np.sin(np.arange(30) / 3) + 0.3 * row})
        for name, row in zip("ab", noise, strict=True)
    ).reset_index(drop=True)
    series["season"] = np.cos(series.time / 3)

    def fit(callbacks: list[Any], **settings: Any) -> None:
        torch.manual_seed(0)
        dataset = data.TimeSeriesDataSet(
            series,
            time_idx="time",
            target="y",
            group_ids=["group"],
            max_encoder_length=6,
            max_prediction_length=2,
            time_varying_unknown_reals=["y"],
            time_varying_known_reals=["season"] if known else [],
            target_normalizer=data.GroupNormalizer(groups=["group"]),
        )
        loss = {} if make_loss is None else {"loss": make_loss()}  # it keeps what it has seen
        module = getattr(forecasting, model).from_dataset(dataset, **loss, **config)
        trainer = L.Trainer(callbacks=callbacks, **(QUIET | {"max_epochs": 100} | settings))
        trainer.fit(module, dataset.to_dataloader(train=True, batch_size=8))

    return fit


def test_deepar(case: Case) -> None:
    """`DeepAR` and `NormalDistributionLoss`"""
    fit = fitting("DeepAR", metrics.NormalDistributionLoss, hidden_size=4, rnn_layers=1)
    case.agrees(fit, "distribution_projector")


def test_temporal_fusion(case: Case) -> None:
    """`TemporalFusionTransformer` and `RMSE`, with known inputs and dropout"""
    sizes = {"hidden_size": 4, "attention_head_size": 2, "hidden_continuous_size": 4, "dropout": 0.1}
    fit = fitting("TemporalFusionTransformer", metrics.RMSE, known=True, output_size=1, **sizes)
    case.agrees(fit, "output_layer")


def test_quantiles(case: Case) -> None:
    """`TemporalFusionTransformer` and its quantile loss, which is piecewise linear"""
    fit = fitting("TemporalFusionTransformer", hidden_size=4, attention_head_size=2, hidden_continuous_size=4)
    case.is_flat(fit, "output_layer")


def test_nbeats(case: Case) -> None:
    """`NBeats` and `RMSE`"""
    sizes = {"num_blocks": [1], "num_block_layers": [1], "widths": [6], "expansion_coefficient_lengths": [3]}
    fit = fitting("NBeats", metrics.RMSE, stack_types=["generic"], **sizes)
    case.agrees(fit, "net_blocks.0.forecast_fc")


def test_multilayer_perceptron(case: Case) -> None:
    """`DecoderMLP` and `PoissonLoss`"""
    fit = fitting("DecoderMLP", metrics.PoissonLoss, known=True, hidden_size=5, n_hidden_layers=1)
    case.agrees(fit, "mlp.sequential.8")
