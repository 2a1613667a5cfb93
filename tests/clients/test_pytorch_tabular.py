"""Models of pytorch-tabular, which makes its own modules, data and Trainer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.clients.agreement import QUIET, Case, Fit

tabular: Any = pytest.importorskip("pytorch_tabular")
config: Any = pytest.importorskip("pytorch_tabular.config")
models: Any = pytest.importorskip("pytorch_tabular.models")
pandas: Any = pytest.importorskip("pandas")

MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "CategoryEmbeddingModelConfig": ({"layers": "6", "dropout": 0.1}, "head.layers.0"),
    "FTTransformerConfig": ({"input_embed_dim": 4, "num_heads": 2, "num_attn_blocks": 1}, "_head.layers.0"),
    "GANDALFConfig": ({"gflu_stages": 1}, "_head.0.layers.0"),
    "DANetConfig": ({"n_layers": 2, "abstlay_dim_1": 4, "k": 2}, "_head.layers.0"),
    "AutoIntConfig": (
        {"embedding_dim": 4, "attn_embed_dim": 4, "num_heads": 2, "num_attn_blocks": 1},
        "_head.layers.0",
    ),
    "NodeConfig": ({"num_layers": 1, "num_trees": 4, "depth": 2}, ""),
}


def fitting(model: str, task: str, **settings_of_model: Any) -> Fit:
    random = np.random.default_rng(0)
    table = pandas.DataFrame({"a": random.normal(size=40), "b": random.normal(size=40)})
    table["c"] = random.choice(list("xyz"), 40)
    table["classification"] = random.choice(["p", "q", "r"], 40)
    table["regression"] = table.a + random.normal(size=40)

    def fit(callbacks: list[Any], **settings: Any) -> None:
        # What the project hands to the Trainer itself.
        own = {name: settings.pop(name) for name in ("precision",) if name in settings}
        quiet = {name: value for name, value in QUIET.items() if name not in _OWN}
        made = tabular.TabularModel(
            data_config=config.DataConfig(
                target=[task], continuous_cols=["a", "b"], categorical_cols=["c"], num_workers=0
            ),
            model_config=getattr(models, model)(task=task, **settings_of_model),
            optimizer_config=config.OptimizerConfig(),
            trainer_config=config.TrainerConfig(
                batch_size=8,
                max_epochs=100,
                accelerator="cpu",
                checkpoints=None,
                early_stopping=None,
                load_best=False,
                progress_bar="none",
                trainer_kwargs=quiet | settings,
                **own,
            ),
            verbose=False,
        )
        made.fit(train=table, callbacks=callbacks)

    return fit


_OWN = {"accelerator", "devices", "logger", "enable_checkpointing", "enable_progress_bar"}


@pytest.mark.parametrize("task", ["classification", "regression"])
@pytest.mark.parametrize("model", [name for name, (_, layer) in MODELS.items() if layer])
def test_table(case: Case, model: str, task: str) -> None:
    """a table with numbers and categories"""
    settings, layer = MODELS[model]
    case.agrees(fitting(model, task, **settings), layer)


def test_without_a_linear_layer(case: Case) -> None:
    """`NodeConfig`, trees without a linear layer"""
    case.refused(fitting("NodeConfig", "regression", **MODELS["NodeConfig"][0]), "Layers that can be named: none")
