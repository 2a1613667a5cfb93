"""Variational autoencoders of scvi-tools, which makes its own training plan and Trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.clients.agreement import QUIET, Case, Fit

scvi: Any = pytest.importorskip("scvi")
anndata: Any = pytest.importorskip("anndata")


def fitting(model: str, keys: dict[str, str], **config: Any) -> Fit:
    random = np.random.default_rng(0)
    cells = anndata.AnnData(random.poisson(2, size=(40, 5)).astype(np.float32))
    cells.obs["batch"] = random.choice(["a", "b"], 40)
    cells.obs["label"] = random.choice(["p", "q", "unknown"], 40)

    def fit(callbacks: list[Any], **settings: Any) -> None:
        scvi.settings.seed = 0
        kind = getattr(scvi.model, model)
        table = cells.copy()
        kind.setup_anndata(table, **keys)
        made = kind(table, n_hidden=4, n_latent=2, n_layers=1, **config)
        made.train(train_size=1.0, batch_size=20, callbacks=callbacks, **(QUIET | {"max_epochs": 100} | settings))

    return fit


def test_scvi(case: Case) -> None:
    """`SCVI`, a zero-inflated negative binomial likelihood"""
    case.agrees(fitting("SCVI", {"batch_key": "batch"}), "module.decoder.px_dropout_decoder")


def test_poisson(case: Case) -> None:
    """`SCVI(gene_likelihood="poisson")`"""
    fit = fitting("SCVI", {"batch_key": "batch"}, gene_likelihood="poisson")
    case.agrees(fit, "module.decoder.px_scale_decoder.0")


def test_latent(case: Case) -> None:
    """`SCVI`; the encoder's mean of the latent variable, named"""
    case.agrees(fitting("SCVI", {"batch_key": "batch"}), "module.z_encoder.mean_encoder", named=True)


def test_scanvi(case: Case) -> None:
    """`SCANVI`, labels for some of the cells"""
    keys = {"batch_key": "batch", "labels_key": "label", "unlabeled_category": "unknown"}
    case.agrees(fitting("SCANVI", keys), "module.classifier.classifier.1")
