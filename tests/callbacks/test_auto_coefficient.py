"""`coefficient="auto"` does what a plain loop does that measures loss and κ as it goes."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat import FAM, MaxNorm
from lightning_relflat.callbacks.coefficients import Automatic
from tests.by_hand import assert_same_weights, definition, fixed_probe
from tests.models import (
    SIZES,
    Batch,
    ManualNet,
    Net,
    Resumable,
    focal,
    make_batches,
    make_loader,
    make_trainer,
    train,
    twins,
)
from tests.shares import Share
from tests.watching import Reads


def unit(seen: list[tuple[float, float]]) -> float:
    """Return (max L - L) / max κ of the means over the first so many steps, the k-th but last of weight 0.9^k."""
    means = []
    for number in range(1, len(seen) + 1):
        weights = [0.9 ** (number - 1 - k) for k in range(number)]
        means.append([sum(w * pair[j] for w, pair in zip(weights, seen, strict=False)) / sum(weights) for j in (0, 1)])
    return (max(loss for loss, _ in means) - means[-1][0]) / max(abs(kappa) for _, kappa in means) if means else 0.0


def train_by_hand(
    net: Net,
    batches: list[Batch],
    factors: list[float],
    penalty: Any = definition,
    share: float = 1,
    most: float = math.inf,
) -> tuple[Net, list[float]]:
    """Descend along L + λκ, λ = c · (max L - L) / max κ, of means over the penalised steps before."""
    optimizer = torch.optim.SGD(net.parameters(), lr=net.lr)
    seen: list[tuple[float, float]] = []
    coefficients = []
    for step, (batch, factor) in enumerate(zip(batches, factors, strict=True)):
        optimizer.zero_grad()
        loss = net.loss(batch)
        if factor:
            kappa = penalty(net, batch, step)
            coefficients.append(factor * min(most, share * unit(seen)))
            seen.append((loss.item(), kappa.item()))
            loss = loss + coefficients[-1] * kappa
        loss.backward()
        optimizer.step()
    return net, coefficients


class Coefficients(Callback):
    """Keeps the coefficient of every step in which it was logged."""

    def __init__(self, fam: FAM) -> None:  # before it among the callbacks, or it has forgotten the step
        self.fam = fam
        self.seen: list[float] = []
        self.penalties: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        metrics = trainer.callback_metrics
        if self.fam._coefficients.now != 0:  # else an earlier step's value stands there
            self.seen.append(float(metrics["fam/coefficient"]))
            self.penalties.append(float(metrics["fam/penalty"]))


def fit(net: Net, fam: FAM, batches: list[Batch], *others: Callback, **options: Any) -> list[float]:
    diary = Coefficients(fam)
    loader: Any = Resumable(batches)
    make_trainer(precision="64-true", callbacks=[diary, fam, *others], **options).fit(net, loader)
    return diary.seen


@pytest.mark.parametrize("share", [0.05, -0.05])
@pytest.mark.parametrize("kind", [Net, ManualNet])
def test_eight_steps_equal_the_definition(kind: type[Net], share: float) -> None:
    net, twin = twins(kind, lr=1.0)
    batches = make_batches([7, 4, 6, 5])
    coefficients = fit(net, Share("head", share, loss="cross_entropy"), batches, max_epochs=2)
    _, expected = train_by_hand(twin, batches * 2, [share] * 8)
    assert coefficients == pytest.approx(expected, rel=1e-10)
    assert coefficients[:2] == [0, 0]  # a fall takes two
    assert all(coefficient * share >= 0 for coefficient in coefficients)
    assert len(set(coefficients)) >= 5
    assert_same_weights(net, twin)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("kind", [Net, ManualNet])
def test_the_numbers_of_auto(kind: type[Net], large: bool) -> None:
    net, twin = twins(kind, lr=0.001 if large else 0.1)
    for each in (net, twin) if large else ():
        each.head.weight.data *= 8
    batches = make_batches([7, 4, 6, 5])
    coefficients = fit(net, FAM("head", "auto", loss="cross_entropy"), batches, max_epochs=2)
    _, expected = train_by_hand(twin, batches * 2, [1] * 8, share=0.1, most=0.003)
    assert coefficients == pytest.approx(expected, rel=1e-10)
    held_back = [1e-5 < coefficient < 0.00299 for coefficient in coefficients]
    assert sum(held_back) >= 3 if large else max(coefficients) == pytest.approx(0.003)
    assert_same_weights(net, twin)


class Twofold(FAM):
    def coefficient_at(self, *, epoch: int, step: int) -> float:
        return 2 * super().coefficient_at(epoch=epoch, step=step) * (-1) ** epoch


def test_a_policy_is_a_factor() -> None:
    net, twin = twins(lr=0.1)
    batches = make_batches([7, 4, 6, 5])
    coefficients = fit(net, Twofold("head", "auto", warmup_steps=4), batches, max_epochs=3)
    factors = [0.5, 1, 1.5, 2, *[-2.0] * 4, *[2.0] * 4]
    _, expected = train_by_hand(twin, batches * 3, factors, share=0.1, most=0.003)
    assert coefficients == pytest.approx(expected, rel=1e-10)
    assert {-0.006, 0.006} < {round(value, 9) for value in coefficients}


class OfANumber(FAM):
    def coefficient_at(self, *, epoch: int, step: int) -> float:
        assert self.coefficient != 0
        return self.coefficient * (2 if epoch else 0.5)  # type: ignore[operator,return-value]


def test_a_policy_that_reckons_with_a_number_is_told_what_to_take() -> None:
    net, _ = twins(lr=0.1)
    before = net.head.weight.clone()
    with pytest.raises(ValueError, match=r"'auto'.*no number.*super\(\).coefficient_at"):
        fit(net, OfANumber("head", "auto"), make_batches([7]))
    assert torch.equal(net.head.weight, before)
    assert fit(net, OfANumber("head", 0.2), make_batches([7, 4]), max_epochs=2) == [0.1, 0.1, 0.4, 0.4]


def test_a_copy_with_another_coefficient_is_of_the_same_class_and_begins_anew() -> None:
    fam = Twofold("head", "auto", warmup_steps=4)
    fit(twins(lr=0.1)[0], fam, make_batches([7, 4]))
    state = fam.state_dict()
    other, third = fam.with_coefficient(0.5), fam.with_coefficient("auto")
    assert (type(other), other.coefficient, other.state_dict()) == (Twofold, 0.5, {"steps": 0})
    assert (third.coefficient, third.state_dict()) == ("auto", {"steps": 0, "sizes": []})
    assert (fam.coefficient, fam.state_dict()) == ("auto", state)
    with pytest.raises(ValueError, match="`coefficient` to be a finite number or 'auto', but got nan"):
        fam.with_coefficient(float("nan"))


def test_with_probes_it_is_the_same_rule() -> None:
    net, twin = twins(lr=0.1, criterion=focal)
    batches = make_batches(SIZES)
    fit(net, Share("head", 0.3), batches)
    train_by_hand(twin, batches, [0.3] * 3, fixed_probe)
    assert_same_weights(net, twin)


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({"warmup_steps": 4}, [0.1, 0.2, 0.3] + [0.4] * 9),
        ({"start_epoch": 1, "stop_epoch": 3}, [0] * 4 + [0.4] * 8),
        ({"every_n_steps": 2}, [0.4, 0] * 6),
    ],
    ids=str,
)
def test_schedules_act_on_the_factor(options: dict[str, Any], factors: list[float]) -> None:
    net, twin = twins(lr=0.1)
    batches = make_batches([5, 6, 7, 4])
    fam = Share("head", 0.4, loss="cross_entropy", **options)
    coefficients = fit(net, fam, batches, max_epochs=3)
    n = options.get("every_n_steps", 1)  # λ is logged, and n·λ·κ is added

    def repeated(net: Net, batch: Batch, step: int) -> Tensor:
        return n * definition(net, batch, step)

    _, expected = train_by_hand(twin, batches * 3, [n * factor for factor in factors], repeated)
    assert coefficients == pytest.approx(expected, rel=1e-10)
    assert len(set(coefficients)) > 2
    assert_same_weights(net, twin)


def test_accumulation_measures_each_batch() -> None:
    net, twin = twins(lr=0.1)
    batches = make_batches([4, 4, 4, 4, 4, 4])
    coefficients = fit(net, Share("head", 0.3, loss="cross_entropy"), batches, accumulate_grad_batches=2)
    assert len(set(coefficients)) >= 3
    seen: list[tuple[float, float]] = []
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step, batch in enumerate(batches):
        loss, kappa = twin.loss(batch), definition(twin, batch, step)
        coefficient = 0.3 * unit(seen)
        assert coefficients[step] == pytest.approx(coefficient, rel=1e-10)
        ((loss + coefficient * kappa) / 2).backward()
        seen.append((loss.item(), kappa.item()))
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(net, twin)


def test_a_line_search_keeps_one_coefficient() -> None:
    class WithLBFGS(Net):
        seen: dict[int, list[float]] = {}  # noqa: RUF012

        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=1.0, max_iter=4, line_search_fn="strong_wolfe")

        def log(self, name: str, value: Any, **kwargs: Any) -> None:  # type: ignore[override]
            if name == "fam/coefficient":
                self.seen.setdefault(self.trainer.fit_loop.total_batch_idx, []).append(float(value))
            super().log(name, value, **kwargs)

    torch.manual_seed(0)
    net = WithLBFGS().double()
    batches = make_batches(SIZES * 2)
    fit(net, Share("head", 0.1, loss="cross_entropy"), batches)
    assert list(net.seen) == list(range(len(batches)))
    assert all(len(set(values)) == 1 < len(values) for values in net.seen.values())
    assert len({values[0] for values in net.seen.values()}) > 2


def test_the_scale_of_kappa_does_not_matter() -> None:
    rules, effects = {scale: Automatic(0.2, math.inf) for scale in (1.0, 1000.0)}, []
    for loss, kappa in ((2.0, 0.3), (1.5, 0.9), (1.7, 0.2), (0.4, 0.5)):
        for scale, rule in rules.items():
            rule.measure(torch.tensor(loss).double(), torch.tensor(scale * kappa).double())
            rule.end(torch.device("cpu"), world=1)
        effects.append([scale * float(rule.coefficient(torch.zeros(1).double())) for scale, rule in rules.items()])
    assert effects[-1][0] > effects[1][0] > 0
    torch.testing.assert_close(*torch.tensor(effects).double().T, rtol=1e-12, atol=0)


class Dead(Net):
    """Its features, and with them κ, are 0 where a batch has four samples."""

    def features(self, inputs: Tensor) -> Tensor:
        features = super().features(inputs)
        return 0 * features if len(inputs) == 4 else features


@pytest.mark.parametrize("begins", ["alive", "dead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_kappa_of_zero_is_no_reason_to_raise_the_coefficient(dtype: torch.dtype, begins: str) -> None:
    net = Dead(lr=0.1).to(dtype)
    first, second, dead = make_batches([7, 5, 4])
    batches = ([first, second] * 10 if begins == "alive" else []) + [dead] * 60 + [first, second]
    loader: Any = Resumable([[inputs.to(dtype), target] for inputs, target in batches])
    precision: Any = "64-true" if dtype == torch.float64 else "32-true"
    fam = FAM("head", "auto", loss="cross_entropy")
    diary = Coefficients(fam)
    make_trainer(precision=precision, callbacks=[diary, fam]).fit(net, loader)
    assert 0 < max(diary.seen) <= 0.003 * (1 + 1e-6)
    assert diary.seen[:2] == [0, 0]
    assert begins == "alive" or set(diary.seen[:-1]) == {0.0}
    assert diary.seen[-1] > 0
    assert all(math.isfinite(value) for value in diary.seen + diary.penalties)
    assert all(parameter.isfinite().all() for parameter in net.parameters())


def ratios(steps: list[list[tuple[float, float]]], share: float = 1.0, most: float = math.inf) -> list[float]:
    rule = Automatic(share, most)
    found = []
    for measured in steps:
        for loss, kappa in measured:
            rule.measure(torch.tensor(loss), torch.tensor(kappa))
        rule.end(torch.device("cpu"), 1)
        found.append(rule.coefficient(torch.zeros((), dtype=torch.float64)).item())
    return found


@pytest.mark.parametrize(
    ("last", "expected"),
    [
        ((1.0, 2.0), 1.0),
        ((1.0, -2.0), 1.0),
        ((-1.0, 2.0), 2.0),
        ((3.0, 2.0), 0.0),
        ((5.0, 2.0), 0.0),
        ((1.0, 0.0), 0.0),
        ((1.0, 2e-6), 1e6),
    ],
)
def test_the_ratio_is_that_of_the_averages(last: tuple[float, float], expected: float) -> None:
    # After 300 steps alike the averages are the values, and the κ of 0 before them is not the largest.
    assert ratios([[(3.0, 0.0)]] + [[last]] * 300)[-1] == pytest.approx(expected, rel=1e-6)


def test_the_ratio_falls_with_a_larger_kappa_or_loss_and_does_not_rise_with_a_smaller_kappa() -> None:
    first = [(3.0, 2.0)]
    learned = ratios([first] + [[(1.0, 2.0)]] * 300)[-1]
    assert learned == pytest.approx(1)
    assert ratios([first] + [[(1.0, 2.0)]] * 300 + [[(1.0, 1e-3)]] * 300)[-1] == pytest.approx(learned)
    assert ratios([first] + [[(1.0, 2.0)]] * 300 + [[(1.0, 4.0)]] * 300 + [first] * 3)[-1] < learned / 2
    assert ratios([first] + [[(1.0, 2.0)]] * 300 + [[(3.0, 0.0)]] * 300)[-1] == pytest.approx(0, abs=1e-9)


def test_a_constant_in_the_loss_changes_nothing() -> None:
    steps = [(3.0, 2.0), (2.0, 5.0), (2.5, -9.0), (1.0, 4.0)]
    shifted = ratios([[(loss - 7, kappa)] for loss, kappa in steps])
    assert shifted == pytest.approx(ratios([[step] for step in steps]))
    assert len(set(shifted)) == 4


def test_steps_without_a_loss_and_steps_with_two() -> None:
    steps = [[(3.0, 2.0)], [(2.0, 5.0)], [(1.0, 4.0)]]
    plain = ratios(steps)
    assert plain[0] == 0 < plain[1] < plain[2]
    assert ratios([[], [], *steps[:2], *[[]] * 100, steps[2]]) == [0, 0, *plain[:2], *[plain[1]] * 100, plain[2]]
    assert ratios([step * 2 for step in steps]) == pytest.approx(plain)
    halves = [[(loss + 0.5, kappa - 1), (loss - 0.5, kappa + 1)] for [(loss, kappa)] in steps]
    assert ratios(halves) == pytest.approx(plain)
    assert ratios([]) == []
    assert Automatic().coefficient(torch.zeros((), dtype=torch.float32)).dtype == torch.float32


def test_of_many_networks_at_once() -> None:
    steps = torch.rand(6, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rule = Automatic(0.1, 0.05)
    for losses, kappas in steps:
        rule.measure(losses, kappas)
        rule.end(torch.device("cpu"), 1)
    found = rule.coefficient(torch.zeros(5, dtype=torch.float64)).tolist()
    alone = [ratios([[(float(a), float(b))] for a, b in steps[:, :, k]], 0.1, 0.05)[-1] for k in range(5)]
    assert found == pytest.approx(alone, rel=1e-6)  # which are told of numbers in float32
    assert len(set(found)) > 2


class Momentum(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Crash(Callback):
    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 6:
            raise ZeroDivisionError


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    def fam() -> FAM:
        return Share("head", -0.02)

    batches = make_batches([7, 4, 6, 5])
    start = Momentum().double()
    whole = copy.deepcopy(start)
    expected = fit(whole, fam(), batches, max_epochs=3)
    assert len(set(expected)) > 5
    assert expected[6] != 0
    assert len(set(expected[6:])) > 2
    saving = ModelCheckpoint(tmp_path, save_last=True, every_n_train_steps=2)
    with pytest.raises(ZeroDivisionError):
        fit(copy.deepcopy(start), fam(), batches, saving, Crash(), max_epochs=3, enable_checkpointing=True)
    path = tmp_path / "last.ckpt"
    kept = torch.load(path, weights_only=True)
    assert kept["global_step"] == 6
    state = kept["callbacks"]["Share[name=None]"]
    assert state["steps"] == 6
    assert len(state["sizes"]) == 5
    resumed = Momentum().double()
    new = fam()
    diary = Coefficients(new)
    loader: Any = Resumable(batches)
    trainer = make_trainer(precision="64-true", callbacks=[diary, new], max_epochs=3)
    trainer.fit(resumed, loader, ckpt_path=path)
    assert diary.seen == expected[6:]
    assert_same_weights(resumed, whole, 0)


def test_a_checkpoint_of_a_run_with_a_plain_coefficient() -> None:
    plain, auto = FAM("head", 0.1), FAM("head", "auto")
    assert plain.state_dict() == {"steps": 0}
    assert auto.state_dict() == {"steps": 0, "sizes": []}
    auto.load_state_dict({"steps": 3})
    plain.load_state_dict({"steps": 4, "sizes": [1.0, 2.0, 0.5, 3.0, 4.0]})
    assert auto.state_dict() == {"steps": 3, "sizes": []}
    assert plain.state_dict() == {"steps": 4}


def test_a_step_reads_no_value_but_to_check_that_it_is_finite() -> None:
    class Watch(Callback):
        def __init__(self) -> None:
            self.count = Reads()

        def on_train_batch_start(self, *_: Any) -> None:
            self.count.__enter__()

        def on_train_batch_end(self, *_: Any) -> None:
            self.count.__exit__(None, None, None)

    read = []
    caps = [[], [], [MaxNorm("head", 0.1, norm="spectral")]]
    coefficients: list[Any] = [0.1, "auto", "auto"]
    for coefficient, cap in zip(coefficients, caps, strict=True):
        watch = Watch()
        fam = FAM("head", coefficient, loss="cross_entropy")
        make_trainer(callbacks=[fam, *cap, watch]).fit(Net(), make_loader(SIZES, dtype=torch.float32))
        read.append(watch.count.count)
    assert read[0] == read[1] == read[2] > 0


def test_a_loss_in_lower_precision() -> None:
    loader = make_loader([7] * 12, dtype=torch.float32)
    fam = Share("head", 0.1)
    diary = Coefficients(fam)
    make_trainer(precision="bf16-mixed", callbacks=[diary, fam], max_epochs=2).fit(Net(lr=0.1), loader)
    assert diary.seen[0] == 0
    assert all(0 <= value < 1e3 for value in diary.seen)
    assert sum(value > 0 for value in diary.seen) > 12


def test_the_sizes_are_no_part_of_the_graph() -> None:
    # By hand λ is a number; a gradient through it would have moved the weights elsewhere in the tests above. Here they
    # do not move at all, and the third step's penalty is c · (L₀ - (0.9 L₀ + L₁) / 1.9) / max κ · κ₂.
    net, twin = twins(lr=0.0)
    batches = make_batches([6, 5, 7])
    loss, kappa = (
        [f.item() for f in values]
        for values in zip(
            *((twin.loss(batch), definition(twin, batch, step)) for step, batch in enumerate(batches)), strict=True
        )
    )
    order = [0, 1, 2] if loss[0] > loss[1] else [1, 0, 2]
    first, second, third = order
    loader: Any = Resumable([batches[k] for k in order])
    fam = Share("head", 0.5, loss="cross_entropy")
    diary = Coefficients(fam)
    make_trainer(precision="64-true", callbacks=[diary, fam]).fit(net, loader)
    largest = max(kappa[first], (0.9 * kappa[first] + kappa[second]) / 1.9)
    penalty = 0.5 * (loss[first] - loss[second]) / 1.9 / largest * kappa[third]
    assert penalty > 1e-3
    assert diary.penalties == [0.0, 0.0, pytest.approx(penalty, rel=1e-10)]


def test_a_criterion_with_a_sum_weighs_loss_and_kappa_alike() -> None:
    results = []
    for reduction in ("mean", "sum"):
        criterion = nn.CrossEntropyLoss(reduction=reduction)
        torch.manual_seed(0)
        net = Net(criterion=lambda z, y: F.cross_entropy(z, y, reduction=reduction), lr=0.0).double()  # noqa: B023
        results.append(fit(net, Share("head", 0.1, loss=criterion), make_batches([5, 5, 5])))
    assert results[0] == pytest.approx(results[1], rel=1e-12)


def test_trained_by_the_trainer_at_all() -> None:
    net, twin = twins(lr=0.1)
    train(net, Share("head", 0.3, loss="cross_entropy"))
    train(twin, FAM("head", 0.3, loss="cross_entropy"))
    assert not torch.allclose(net.head.weight, twin.head.weight, rtol=1e-3)
