"""No message prints the numbers of a tensor: that takes pages, and on a GPU a wait."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lightning_relflat import functional, metrics
from lightning_relflat.functional import spectrum
from lightning_relflat.functional._checks import said
from lightning_relflat.functional.criteria import as_criterion, check_reduction, check_temperature
from lightning_relflat.functional.neural_collapse import neural_collapse

BIG = torch.full((40, 30), 0.123456)
X, W, Z, Y = torch.ones(2, 3), torch.ones(4, 3), torch.ones(2, 4), torch.tensor([0, 1])
ROOT = Path(functional.__file__).parents[1]


class Listed(list):  # type: ignore[type-arg]
    """Many tensors."""


def closed(name: str, *arguments: Any, **options: Any) -> Callable[[], object]:
    return lambda: getattr(functional, name)(*arguments, **{"loss": "cross_entropy"} | options)


CALLS: dict[str, Callable[[], object]] = {
    "loss": closed("relative_flatness", X, W, Z, Y, loss=BIG),
    "loss with a weight": closed("relative_flatness", X, W, Z, Y, loss=nn.NLLLoss(torch.full((4000,), 0.123456))),
    "criterion": lambda: as_criterion([BIG]),
    "features": closed("relative_flatness", [BIG], W, Z, Y),
    "features in an array": closed("relative_flatness", BIG.numpy(), W, Z, Y),
    "weight": closed("hessian_trace", X, {"weight": BIG}, Z, Y),
    "outputs": closed("column_flatness", X, W, (BIG, BIG), Y),
    "target": closed("relative_flatness", X, W, Z, [BIG]),
    "target in a tuple": closed("relative_flatness", X, W, Z, (BIG, [BIG]), loss="gaussian_nll"),
    "reduction": lambda: check_reduction(BIG, nn.MSELoss()),  # type: ignore[arg-type]
    "temperature": lambda: check_temperature(BIG, nn.CrossEntropyLoss()),
    "scale": closed("hessian_trace", X, W, Z, Y, scale=[BIG]),
    "tolerance": lambda: spectrum.largest_eigenvalue([(X, W, Z)], loss="mse", tolerance=BIG),  # type: ignore[arg-type]
    "batches": lambda: spectrum.largest_eigenvalue(iter([BIG]), loss="mse"),
    "columns": closed("largest_eigenvalue_bounds", X, W, Z, Y, columns=BIG),
    "seed": closed("largest_eigenvalue_bounds", X, W, Z, Y, columns=1, seed=BIG),
    "labels": lambda: neural_collapse(X, [BIG], num_classes=2),  # type: ignore[arg-type]
    "number of classes": lambda: neural_collapse(X, Y, num_classes=BIG),  # type: ignore[arg-type]
    "probes": lambda: functional.feature_laplacian(Z.sum().requires_grad_(), X, probes=BIG),  # type: ignore[arg-type]
    "delta": lambda: functional.expected_robustness(1.0, delta=BIG, num_features=3),  # type: ignore[arg-type]
    "flag": closed("flatness_report", X, W, Z, Y, eigenvalues=BIG),
    "losses": lambda: functional.fisher_rao_norm(
        nn.Linear(3, 4), lambda outputs, target: 0.123456 * (outputs.sum() * 0 + 1), [(X, Y)]
    ),
    "sigmas": lambda: metrics.PACBayesFlatness(sigmas=[BIG]),  # type: ignore[list-item]
    "summary": lambda: metrics.ColumnFlatness("mse", in_features=3, summary=BIG),  # type: ignore[arg-type]
    "k": lambda: metrics.SharpestSamples(BIG, loss="mse"),  # type: ignore[arg-type]
    "class means": lambda: metrics.NeuralCollapse(2, 3, class_means=[BIG]),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("call", CALLS)
def test_a_message_says_the_shape(call: str) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        CALLS[call]()
    message = str(raised.value)
    assert message.startswith("Expected ")
    assert "0.1235" not in message
    assert "0.123456" not in message
    assert len(message) < 600


def test_what_is_said_of_a_value() -> None:
    assert said(BIG) == "a tensor of torch.float32 of shape (40, 30)"
    assert said(nn.Parameter(torch.ones(()))) == "a tensor of torch.float32 of shape ()"
    assert said(np.ones(3, dtype="float32")) == "a ndarray of float32 of shape (3,)"
    assert said([1, "a", None]) == "[1, 'a', None]"
    assert said((BIG, 1)) == "(a tensor of torch.float32 of shape (40, 30), 1)"
    assert said({"a": BIG}) == "a dict of 1"
    assert said(Listed(range(9))) == "a Listed of 9"
    assert said([[[1]]]) == "[[a list of 1]]"
    assert said("x" * 500) == "'" + "x" * 199 + "…"
    assert said(nn.MSELoss()) == "MSELoss()"
    assert said(object()) == "a object"


def test_no_message_has_a_value_that_may_be_a_tensor() -> None:
    """Names and texts are said as they are; whatever else an argument may be goes through `said`."""
    plain = {"name", "measure", "found", "function", "layer", "probes", "temperature"}
    for path in [*(ROOT / "functional").rglob("*.py"), *(ROOT / "metrics").glob("*.py")]:
        if path.name in ("layer_flatness.py", "_graph.py", "relative_flatness.py", "output_hessian.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FormattedValue) and node.conversion == ord("r"):
                attribute = isinstance(node.value, ast.Attribute)
                name = node.value.id if isinstance(node.value, ast.Name) else None
                assert attribute or name in plain, f"{path.name}:{node.lineno}"
