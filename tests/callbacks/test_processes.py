"""Several processes do what one does on the union of their data, or what a plain loop over their shares does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from lightning_relflat.functional import flatness_report
from tests.by_hand import train_on_shares
from tests.callbacks.fit_in_processes import TRAINING, VALIDATION, Sharded, fit, share_of
from tests.models import make_batches
from tests.oracles import kappa
from tests.processes import FSDP


def assert_same_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for other in ranks[1:]:
        for name, value in ranks[0]["weights"].items():
            assert torch.equal(value, other["weights"][name]), name
        for name in ("train/relative_flatness", "val/relative_flatness"):
            assert ranks[0]["values"][name] == other["values"][name]


def assert_same_weights(result: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected["weights"].items():
        torch.testing.assert_close(result["weights"][name], value, rtol=1e-10, atol=1e-10)


def fit_by_hand(world: int, *, share: str = "even", **options: Any) -> tuple[Sharded, float]:
    """Return the net, and κ over the last epoch."""
    torch.manual_seed(0)
    net = Sharded(**options).double()
    steps = [[share_of(batch, rank, world, share) for rank in range(world)] for batch in make_batches(TRAINING)]
    values = [train_on_shares(net, net.features, net.head, steps) for _ in range(2)]
    return net.eval(), values[-1]


def assert_equal_by_hand(result: dict[str, Any], net: Sharded, value: float) -> None:
    for name, expected in net.state_dict().items():
        torch.testing.assert_close(result["weights"][name], expected, rtol=1e-10, atol=1e-10, msg=f"{name} differs")
    assert result["values"]["train/relative_flatness"] == pytest.approx(value, rel=1e-10)


@pytest.mark.ddp
@pytest.mark.parametrize(
    "options",
    [
        {"world": 4},
        {"accumulate": 2},
        {"manual": True},
        {"unused": True},
        {"static_graph": True},
        pytest.param({"fsdp": "root"}, marks=FSDP),
        pytest.param({"fsdp": "unit"}, marks=FSDP),
    ],
    ids=lambda options: "-".join(f"{name}-{value}" for name, value in options.items()),
)
def test_processes_equal_one_on_the_union(tmp_path: Path, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"world": 2, "loss": "cross_entropy"} | options
    ranks = fit(tmp_path, **settings)
    [one] = fit(tmp_path, **settings | {"world": 1})
    assert_same_on_all_ranks(ranks)
    assert_same_weights(ranks[0], one)
    for name in ("train/relative_flatness", "val/relative_flatness"):
        assert ranks[0]["values"][name] == pytest.approx(one["values"][name])
    # A process's penalty is that of its own share.
    assert len({tuple(rank["penalties"]) for rank in ranks}) == len(ranks)


@pytest.mark.ddp
@pytest.mark.parametrize(
    "options", [{"unused": True}, {"static_graph": True}, pytest.param({"fsdp": "unit"}, marks=FSDP)]
)
def test_large_heads(tmp_path: Path, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"loss": "cross_entropy", "large": True} | options
    ranks = fit(tmp_path, 2, **settings)
    [one] = fit(tmp_path, 1, **settings)
    assert_same_on_all_ranks(ranks)
    assert_same_weights(ranks[0], one)


@pytest.mark.ddp
@pytest.mark.parametrize("options", [{}, {"static_graph": True}, pytest.param({"fsdp": "unit"}, marks=FSDP)])
def test_probes_keep_the_processes_together(tmp_path: Path, options: dict[str, Any]) -> None:
    # On the same data it is the probes alone by which the processes' penalties, and gradients, differ.
    options = options | {"share": "same", "epochs": 13, "any_loss": True}
    ranks = fit(tmp_path, 2, **options)
    assert_same_on_all_ranks(ranks)
    first, second = (rank["penalties"] for rank in ranks)
    assert len(first) == 52
    assert all(one != other for one, other in zip(first, second, strict=True))
    again = fit(tmp_path, 2, **options)
    for before, after in zip(ranks, again, strict=True):
        assert after["values"] == before["values"]
        assert after["penalties"] == before["penalties"]
    assert_same_on_all_ranks([ranks[0], again[0]])


@pytest.mark.ddp
@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"manual": True},
        pytest.param({"fsdp": "root"}, marks=FSDP),
        pytest.param({"fsdp": "unit"}, marks=FSDP),
        pytest.param({"fsdp": "root", "sanity": 2}, marks=FSDP),
    ],
    ids=str,
)
def test_a_cap_holds_for_the_whole_weight(tmp_path: Path, options: dict[str, Any], norm: str) -> None:
    cap = 0.3
    settings: dict[str, Any] = {"loss": "cross_entropy", "fam": {"coefficient": -0.5}} | options
    settings["cap"] = {"max_norm": cap, "norm": norm}
    ranks = fit(tmp_path, 2, **settings)
    [one] = fit(tmp_path, 1, **settings)
    assert_same_on_all_ranks(ranks)
    assert_same_weights(ranks[0], one)
    reached = [norms[norm == "spectral"] / cap for norms in ranks[0]["norms"]]
    assert 0.999 < max(reached) <= 1 + 1e-12


@pytest.mark.ddp
@pytest.mark.parametrize(
    "options",
    [{"accumulate": 2}, {"manual": True}, pytest.param({"fsdp": "unit"}, marks=FSDP), {"auto": -0.1}],
    ids=str,
)
def test_an_automatic_coefficient_is_that_of_the_union(tmp_path: Path, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"loss": "cross_entropy", "auto": 0.2} | options
    ranks = fit(tmp_path, 2, **settings)
    [one] = fit(tmp_path, 1, **settings)
    assert_same_on_all_ranks(ranks)
    assert ranks[0]["coefficients"] == ranks[1]["coefficients"]
    assert len(set(ranks[0]["coefficients"])) >= 3
    assert ranks[0]["coefficients"] == pytest.approx(one["coefficients"], rel=1e-10)
    assert_same_weights(ranks[0], one)
    assert ranks[0]["penalties"] != ranks[1]["penalties"]


@pytest.mark.ddp
def test_an_automatic_coefficient_resumes_on_all_ranks(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"share": "uneven", "auto": 0.1}
    whole = fit(tmp_path, 3, keep_all=True, **settings)
    resumed = fit(tmp_path, 3, ckpt_path=str(tmp_path / "step=3.ckpt"), **settings)
    for before, after in zip(whole, resumed, strict=True):
        assert before["coefficients"] == whole[0]["coefficients"]
        # Gradients of three processes are added up in another order after DDP's first step.
        assert after["coefficients"] == pytest.approx(before["coefficients"][3:], rel=1e-9)
        assert after["penalties"] == pytest.approx(before["penalties"][3:], rel=1e-9)
    # A run that begins has a λ of 0 in its first steps.
    assert whole[0]["coefficients"][0] == 0 < max(resumed[0]["coefficients"]), whole[0]["coefficients"]
    assert_same_on_all_ranks(resumed)


@pytest.mark.ddp
@pytest.mark.parametrize(
    "options", [{}, {"any_loss": True}, pytest.param({"fsdp": "unit", "momentum": 0.9}, marks=FSDP)], ids=str
)
def test_resumed_within_an_epoch(tmp_path: Path, options: dict[str, Any]) -> None:
    whole = fit(tmp_path, 2, keep_all=True, **options)
    resumed = fit(tmp_path, 2, ckpt_path=str(tmp_path / "step=6.ckpt"), **options)
    for before, after in zip(whole, resumed, strict=True):
        # What one process has taken over from all is added up in another order.
        assert after["values"] == pytest.approx(before["values"], rel=1e-6 if "fsdp" in options else 1e-12)
        assert after["penalties"] == before["penalties"][6:]
    assert_same_on_all_ranks(resumed)
    assert_same_weights(whole[0], resumed[0])


@pytest.mark.ddp
def test_batch_norm_takes_the_statistics_of_each_share(tmp_path: Path) -> None:
    ranks = fit(tmp_path, 2, loss="cross_entropy", norm=True)
    assert_same_on_all_ranks(ranks)
    assert_equal_by_hand(ranks[0], *fit_by_hand(2, norm=True))


@pytest.mark.ddp
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.nn.SyncBatchNorm trains on GPUs alone")
def test_synchronised_batch_norm_equals_one_process_on_the_union(tmp_path: Path) -> None:
    # Two nodes may share one GPU.
    ranks = fit(tmp_path, 2, nodes=2, loss="cross_entropy", norm=True, sync_norm=True)
    assert_same_on_all_ranks(ranks)
    assert_equal_by_hand(ranks[0], *fit_by_hand(1, norm=True))


@pytest.mark.ddp
def test_uneven_shares(tmp_path: Path) -> None:
    ranks = fit(tmp_path, 3, loss="cross_entropy", share="uneven", monitor={"report": True}, layers=True)
    assert_same_on_all_ranks(ranks)
    net, value = fit_by_hand(3, share="uneven")
    assert_equal_by_hand(ranks[0], net, value)

    net.load_state_dict(ranks[0]["weights"])
    inputs, target = (torch.cat(parts) for parts in zip(*make_batches(VALIDATION), strict=True))
    features, bias = net.features(inputs).detach(), net.head.bias
    union = kappa(lambda weight: F.cross_entropy(F.linear(features, weight, bias), target), net.head.weight)
    values = ranks[0]["values"]
    assert values["val/relative_flatness"] == pytest.approx(union.item(), rel=1e-12)

    report = flatness_report(features, net.head.weight, net.head(features), target, loss="cross_entropy")
    for name in set(report) - {"relative_flatness"}:
        assert values[f"val_flatness/{name}"] == pytest.approx(report[name].item(), rel=1e-12)
    # Of the criterion of its own outputs the head's κ is exact, here as there.
    assert values["val_layer_flatness/head"] == pytest.approx(union.item(), rel=1e-12)
    assert values["val_layer_flatness_error/head"] == 0 < values["val_layer_flatness_error/body"]
    for rank in ranks[1:]:
        assert rank["values"]["val_flatness/network"] == values["val_flatness/network"]
