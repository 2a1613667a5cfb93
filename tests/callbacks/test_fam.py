"""A Trainer with FAM does what a plain loop with the brute-force penalty does, and refuses loudly what it cannot do."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import pytorch_lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_relflat import FAM, FlatnessMonitor
from lightning_relflat.functional.layer_flatness import probe_seed
from tests.by_hand import (
    assert_same_weights,
    assert_untouched,
    definition,
    definition_with_constant_hessian,
    fixed_probe,
    tapped,
    train_by_hand,
)
from tests.models import (
    SIZES,
    Batch,
    Conv,
    Crash,
    Detached,
    ManualNet,
    Net,
    NoGrad,
    Unused,
    focal,
    make_batches,
    make_loader,
    make_trainer,
    train,
    twins,
)
from tests.oracles import kappa
from tests.watching import Reads, as_on_a_device

NAMED: list[Any] = [
    nn.CrossEntropyLoss(),
    nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), label_smoothing=0.1, ignore_index=2),
    nn.CrossEntropyLoss(reduction="sum"),
]


@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize("criterion", NAMED, ids=["plain", "options", "sum"])
def test_three_steps_with_a_named_loss_equal_the_definition(criterion: nn.Module, kind: type[Net]) -> None:
    net, twin = twins(kind, criterion=criterion, lr=0.1)
    train(net, FAM("head", 0.3, loss=criterion))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3))
    assert_untouched(net)


def test_the_penalty_moves_the_weights() -> None:
    # Without it the comparisons here would prove nothing.
    net, twin = twins()
    train(net, FAM("head", 0.3, loss="cross_entropy"))
    train_by_hand(twin, make_batches(SIZES), definition, [0.0] * 3)
    assert not torch.allclose(net.head.weight, twin.head.weight, rtol=1e-2)


@pytest.mark.filterwarnings("ignore:.*a negative coefficient")
@pytest.mark.parametrize("kind", [Net, ManualNet])
def test_three_steps_with_fixed_probes_equal_the_dense_hessian(kind: type[Net]) -> None:
    net, twin = twins(kind, criterion=focal)
    train(net, FAM("head", -0.05))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), fixed_probe, [-0.05] * 3))


@pytest.mark.parametrize("kind", [Net, ManualNet])
def test_three_steps_with_fixed_probes_equal_a_plain_loop_with_a_tap(kind: type[Net]) -> None:
    net, twin = twins(kind)
    train(net, FAM("body", 0.05, probes=2))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), tapped, [0.05] * 3))


@pytest.mark.parametrize("layer", ["head", None])
def test_exact_curvature_from_the_loss_itself(layer: str | None) -> None:
    def log_cosh(outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - F.one_hot(target, 3)).cosh().log().sum(dim=1).mean()

    net, twin = twins(criterion=log_cosh)
    train(net, FAM(layer, 0.2, probes=None))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), definition, [0.2] * 3))


@pytest.mark.parametrize("named", [{"loss": "cross_entropy"}, {"probes": None}], ids=["named", "exact"])
def test_a_constant_hessian_moves_the_layer_alone(named: dict[str, Any]) -> None:
    net, twin = twins()
    train(net, FAM("head", 0.2, through_hessian=False, **named))
    expected = train_by_hand(twin, make_batches(SIZES), definition_with_constant_hessian, [0.2] * 3)
    assert_same_weights(net, expected)


def test_a_layer_in_the_middle_is_penalised_through_what_follows() -> None:
    def of_body(net: Net, batch: Batch, step: int) -> Tensor:
        def loss(weight: Tensor) -> Tensor:
            return net.criterion(net.head(torch.tanh(F.linear(batch[0], weight, net.body.bias))), batch[1])

        return kappa(loss, net.body.weight, create_graph=True)

    net, twin = twins()
    train(net, FAM("body", 0.05, probes=None))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), of_body, [0.05] * 3))


def test_accumulation_averages_the_penalties_with_the_losses() -> None:
    net, twin = twins()
    train(net, FAM("head", 0.3, loss="cross_entropy"), [4, 4, 4, 4], accumulate_grad_batches=2)
    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    batches = make_batches([4, 4, 4, 4])
    for pair in (batches[:2], batches[2:]):
        optimizer.zero_grad()
        for batch in pair:
            ((twin.loss(batch) + 0.3 * definition(twin, batch, 0)) / 2).backward()
        optimizer.step()
    assert_same_weights(net, twin)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"warmup_steps": 4}, [0.1, 0.2, 0.3, 0.4, 0.4, 0.4]),
        ({"start_epoch": 1}, [0, 0, 0.4, 0.4, 0.4, 0.4]),
        ({"start_epoch": 1, "stop_epoch": 2, "warmup_steps": 2}, [0, 0, 0.2, 0.4, 0, 0]),
        ({"every_n_steps": 3}, [1.2, 0, 0, 1.2, 0, 0]),
        ({"every_n_steps": 2, "start_epoch": 1}, [0, 0, 0.8, 0, 0.8, 0]),
    ],
)
def test_the_coefficient_follows_its_schedule(options: dict[str, Any], expected: list[float]) -> None:
    net, twin = twins(lr=0.1)
    train(net, FAM("head", 0.4, loss="cross_entropy", **options), [5, 6], max_epochs=3)
    assert_same_weights(net, train_by_hand(twin, make_batches([5, 6]) * 3, definition, expected))


def test_a_policy_of_ones_own() -> None:
    class Alternating(FAM):
        def coefficient_at(self, *, epoch: int, step: int) -> float:
            return self.coefficient * (-1) ** step

    net, twin = twins()
    train(net, Alternating("head", 0.1, loss="cross_entropy"))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), definition, [0.1, -0.1, 0.1]))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("wrapped", ["dict", "none"])
def test_other_outputs_of_training_step(wrapped: str) -> None:
    class Other(Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            if wrapped == "none" and batch_idx == 1:
                return None
            return {"loss": self.loss(batch), "extra": batch_idx} if wrapped == "dict" else self.loss(batch)

    class Outputs(Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.seen.append(outputs)

    net, twin = twins(Other)
    seen = Outputs()
    loader = make_loader(SIZES)
    make_trainer(precision="64-true", callbacks=[FAM("head", 0.3, loss="cross_entropy"), seen]).fit(net, loader)
    batches = make_batches(SIZES)
    if wrapped == "none":
        del batches[1]
    assert_same_weights(net, train_by_hand(twin, batches, definition, [0.3] * len(batches)))
    assert len(seen.seen) == 3
    if wrapped == "dict":
        assert [output["extra"] for output in seen.seen] == [0, 1, 2]


def test_a_line_search_sees_the_penalised_loss() -> None:
    class WithLBFGS(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=1.0, max_iter=4, line_search_fn="strong_wolfe")

    net, twin = twins(WithLBFGS, criterion=focal)
    train(net, FAM("head", 0.05))
    optimizer = torch.optim.LBFGS(twin.parameters(), lr=1.0, max_iter=4, line_search_fn="strong_wolfe")
    for step, batch in enumerate(make_batches(SIZES)):

        def closure(step: int = step, batch: Batch = batch) -> Tensor:
            optimizer.zero_grad()
            loss = twin.loss(batch) + 0.05 * fixed_probe(twin, batch, step)
            loss.backward()
            return loss

        optimizer.step(closure)
    assert_same_weights(net, twin, 1e-7)


def test_manual_optimization_penalises_each_loss_that_depends_on_the_layer() -> None:
    class TwoLosses(ManualNet):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            optimizer.zero_grad()
            self.manual_backward(self.body(batch[0]).square().mean())  # not through the head
            outputs = self(batch[0])
            self.manual_backward(F.cross_entropy(outputs, batch[1]), retain_graph=True)
            self.manual_backward(outputs.square().mean())
            optimizer.step()

    net, twin = twins(TwoLosses)
    train(net, FAM("head", 0.1, probes=None))

    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    twin.criterion = lambda outputs, target: F.cross_entropy(outputs, target) + outputs.square().mean()
    for step, batch in enumerate(make_batches(SIZES)):
        optimizer.zero_grad()
        loss = twin.loss(batch) + twin.body(batch[0]).square().mean() + 0.1 * definition(twin, batch, step)
        loss.backward()
        optimizer.step()
    assert_same_weights(net, twin)


def test_a_named_loss_is_penalised_once_per_pass_in_manual_optimization() -> None:
    class Twice(ManualNet):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            optimizer = self.optimizers()
            assert not isinstance(optimizer, list)
            optimizer.zero_grad()
            outputs = self(batch[0])
            self.manual_backward(F.cross_entropy(outputs, batch[1]), retain_graph=True)
            self.manual_backward(0.0 * outputs.sum())
            optimizer.step()

    net, twin = twins(Twice)
    train(net, FAM("head", 0.1, loss="cross_entropy"))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), definition, [0.1] * 3))


def test_a_layer_that_runs_twice() -> None:
    def siamese(outputs: Tensor, target: Tensor) -> Tensor:
        half = len(outputs) // 2
        return F.cross_entropy(outputs[:half], target[:half]) + F.cross_entropy(outputs[half:], target[half:])

    class Siamese(Net):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            first, second = batch[0].chunk(2)
            left, right = batch[1].chunk(2)
            return F.cross_entropy(self(first), left) + F.cross_entropy(self(second), right)

    net, twin = twins(Siamese)
    train(net, FAM("head", 0.1, probes=None), [6, 8])
    twin.criterion = siamese
    assert_same_weights(net, train_by_hand(twin, make_batches([6, 8]), definition, [0.1] * 2))


def test_half_precision_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    module = type(Net()).log

    def log(self: Net, name: str, value: Any, **kwargs: Any) -> None:
        seen.append((name, value.dtype))
        module(self, name, value, **kwargs)

    monkeypatch.setattr(Net, "log", log)
    loader = make_loader(SIZES, dtype=torch.float32)
    make_trainer(precision="bf16-mixed", callbacks=[FAM("head", 0.1)]).fit(Net(), loader)
    assert {dtype for _, dtype in seen} == {torch.float32}
    assert [name for name, _ in seen] == ["fam/penalty", "fam/coefficient"] * 3


def test_penalty_and_coefficient_are_logged() -> None:
    class Recorder(FAM):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.logged: list[dict[str, float]] = []

        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            super().on_train_batch_end(trainer, *args)
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    net, twin = twins()
    fam = Recorder("head", 0.3, loss="cross_entropy", warmup_steps=3)
    expected = 0.1 * definition(twin, make_batches(SIZES)[0], 0)
    train(net, fam)
    assert fam.logged[0] == {"fam/penalty": pytest.approx(expected.item()), "fam/coefficient": pytest.approx(0.1)}
    assert [logged["fam/coefficient"] for logged in fam.logged] == pytest.approx([0.1, 0.2, 0.3])


def test_two_on_two_layers_in_any_order() -> None:
    results = []
    for order in (("head", "body"), ("body", "head")):
        torch.manual_seed(3)
        net = Net().double()
        trainer = make_trainer(
            precision="64-true", callbacks=[FAM(name, 0.1, probes=None, name=name) for name in order], max_epochs=2
        )
        trainer.fit(net, make_loader(SIZES))
        assert_untouched(net)
        assert {"fam/head/penalty", "fam/body/penalty", "fam/head/coefficient", "fam/body/coefficient"} <= set(
            trainer.callback_metrics
        )
        results.append(net)
    assert_same_weights(results[0], results[1])


def test_steps_are_counted_over_fits_and_kept_in_the_state() -> None:
    fam = FAM("head", 0.1, warmup_steps=100)
    net = Net()
    trainer = make_trainer(callbacks=[fam])
    trainer.fit(net, make_loader(SIZES, dtype=torch.float32))
    assert fam.state_dict() == {"steps": 3}
    other = FAM("head", 0.1, warmup_steps=100)
    other.load_state_dict(fam.state_dict())
    assert other.state_dict() == {"steps": 3}
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, make_loader(SIZES, dtype=torch.float32))
    assert fam.state_dict() == {"steps": 6}


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Any) -> None:
    def run(epochs: int, **kwargs: Any) -> tuple[Net, L.Trainer]:
        torch.manual_seed(3)
        net = Net().double()
        fam = FAM("head", 0.1, warmup_steps=5, every_n_steps=2)
        trainer = make_trainer(precision="64-true", callbacks=[fam], max_epochs=epochs)
        trainer.fit(net, make_loader(SIZES), **kwargs)
        return net, trainer

    whole, _ = run(3)
    _, trainer = run(1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, _ = run(3, ckpt_path=tmp_path / "one.ckpt")
    assert_same_weights(resumed, whole, 0)


def test_the_random_stream_is_left_alone() -> None:
    states = []
    for callbacks in ([], [FAM("head", 0.1, probes=3)]):
        torch.manual_seed(5)
        make_trainer(callbacks=callbacks).fit(Net(dropout=0.3), make_loader(SIZES, dtype=torch.float32))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_seeds_draw_different_probes() -> None:
    nets = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        nets.append(train(Net(focal).double(), FAM("head", 0.1, seed=seed)))
    assert torch.equal(nets[0].head.weight, nets[1].head.weight)
    assert not torch.equal(nets[0].head.weight, nets[2].head.weight)


def shared_probes(net: Net, batch: Batch, step: int, *, count: int = 3, seed: int = 0) -> Tensor:
    """Return Σ_i ‖φ_i‖² Σ_k u_kᵀ ∇² u_k / K with u_k = Wv_k of the probes that FAM draws, from the dense Hessian."""
    features = net.features(batch[0])
    generator = torch.Generator().manual_seed(probe_seed(seed, step, 0))
    probes = torch.randint(0, 2, (6, count), generator=generator).double() * 2 - 1
    hessian: Tensor = torch.autograd.functional.hessian(
        lambda value: net.criterion(value, batch[1]), net.head(features), create_graph=True
    )
    pushed = net.head.weight @ probes
    return torch.einsum("n,sk,nsnt,tk->", features.square().sum(dim=1), pushed, hessian, pushed) / count


@pytest.mark.parametrize("kind", [Net, ManualNet])
def test_shared_probes_are_drawn_anew_in_every_step(kind: type[Net], monkeypatch: pytest.MonkeyPatch) -> None:
    net, twin = twins(kind)
    before = copy.deepcopy(net)
    train(net, FAM("head", 0.3, loss="cross_entropy", shared_probes=3))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), shared_probes, [0.3] * 3))
    monkeypatch.setattr(L.Trainer, "global_rank", property(lambda _: 1))  # and on every process
    train(before, FAM("head", 0.3, loss="cross_entropy", shared_probes=3))
    assert not torch.allclose(before.head.weight, net.head.weight, rtol=1e-3)


def test_shared_probes_are_unbiased() -> None:
    logged: dict[int | None, list[float]] = {None: [], 2: []}

    class Listening(Net):
        probes: int | None = None

        def log(self, name: str, value: Any, **_: Any) -> None:  # type: ignore[override]
            if name == "fam/penalty":
                logged[self.probes].append(float(value))

    net = Listening(lr=0.0).double()
    loader: DataLoader[Any] = DataLoader(make_batches([7]) * 400, batch_size=None)  # type: ignore[arg-type]
    for net.probes, steps in ((None, 1), (2, 400)):
        fam = FAM("head", 1.0, loss="cross_entropy", shared_probes=net.probes)
        make_trainer(precision="64-true", callbacks=[fam], limit_train_batches=steps).fit(net, loader)
    [exact], drawn = logged[None], torch.tensor(logged[2])
    assert len(drawn) == 400
    assert drawn.std() > 0.01 * exact
    assert abs(drawn.mean() - exact) < 4 * drawn.std() / 20


def test_an_exact_penalty_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(*_: Any) -> int:
        raise AssertionError

    monkeypatch.setattr("lightning_relflat.callbacks._penalty.probe_seed", draw)
    train(Net().double(), FAM("head", 0.3, loss="cross_entropy"))
    train(Net().double(), FAM("head", 0.3))  # which is recognised
    with pytest.raises(AssertionError):
        train(Net().double(), FAM("head", 0.3, loss="cross_entropy", shared_probes=1))


def test_copies_of_the_module_are_free_of_the_callback() -> None:
    class Copier(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            for duplicate in (copy.deepcopy(pl_module), pickle.loads(pickle.dumps(pl_module))):
                assert duplicate.training_step.__self__ is duplicate
                inputs, target = batch
                before = pl_module.head.weight.clone()
                loss = duplicate.training_step((inputs, target), 0)
                assert torch.equal(loss, pl_module.loss((inputs, target)))
                loss.backward()
                assert torch.equal(before, pl_module.head.weight)
                assert duplicate.head.weight.grad is not None
                self.count = getattr(self, "count", 0) + 1

    copier = Copier()
    make_trainer(callbacks=[FAM("head"), FlatnessMonitor("head"), copier], precision="64-true").fit(
        Net().double(), make_loader(SIZES)
    )
    assert copier.count == 6


@pytest.mark.parametrize("namespace", ["lightning", "pytorch_lightning"])
@pytest.mark.parametrize("alone", [True, False])
def test_both_trainers(namespace: str, alone: bool) -> None:
    package: Any = pytorch_lightning if namespace == "pytorch_lightning" else L

    class Either(package.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(5, 3)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0].float()), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    fam = FAM(coefficient=0.2)
    trainer = package.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=fam if alone else [fam, FlatnessMonitor()],
    )
    trainer.fit(Either(), make_loader(SIZES))
    assert "fam/penalty" in trainer.callback_metrics
    assert alone or "train/relative_flatness" in trainer.callback_metrics


def test_says_once_which_layer(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(callbacks=[FAM(), FlatnessMonitor()], max_epochs=3).fit(
            Net(), make_loader(SIZES, dtype=torch.float32), make_loader([4], dtype=torch.float32)
        )
    said = [message for message in caplog.messages if "at layer" in message]
    layer = "layer 'head', a Linear(in_features=6, out_features=3, bias=True)."
    assert said == [f"FAM(): relative flatness is penalised at {layer}", f"FlatnessMonitor(): measured at {layer}"]


class InPlace(Net):
    def forward(self, inputs: Tensor) -> Tensor:
        return F.relu(super().forward(inputs), inplace=True)


class InPlaceLater(Net):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.criterion(F.relu(self(batch[0]), inplace=batch_idx == 1), batch[1])


class NaNLoss(Net):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch) * (math.nan if batch_idx == 1 else 1)


class InfiniteLoss(Net):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.loss(batch) + math.inf


class MultiMargin(Net):
    def __init__(self) -> None:
        super().__init__(criterion=F.multi_margin_loss)


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.head.requires_grad_(False)


class FrozenBelow(Net):
    def __init__(self) -> None:
        super().__init__()
        self.requires_grad_(False)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = super().forward(inputs) * self.scale
        return outputs


class Interrupt(Net):
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == 1:
            raise KeyboardInterrupt
        return self.loss(batch)


class DirectBackward(ManualNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        self.loss(batch).backward()


REFUSED: dict[str, tuple[type[Net], Callable[[], FAM], type[BaseException], str | None]] = {
    "no such layer": (
        Net,
        lambda: FAM("hed"),
        ValueError,
        r"Expected argument `layer` to name a linear or convolution layer of tests\.models\.Net, one of 'body', "
        r"'head', but got 'hed'\.",
    ),
    "not linear": (
        Net,
        lambda: FAM("drop"),
        ValueError,
        r"one of 'body', 'head', but got 'drop', a torch\.nn\.modules\.dropout\.Dropout\.",
    ),
    "named loss on a convolution": (
        Conv,
        lambda: FAM("conv", loss="mse"),
        ValueError,
        r"to name an nn\.Linear where a criterion .* but got 'conv', a Conv1d\(1, 2, .*Leave out `loss`",
    ),
    "did not run": (Unused, lambda: FAM("unused"), RuntimeError, r"layer 'unused' did not run with gradients"),
    "ran without gradients": (NoGrad, lambda: FAM("head"), RuntimeError, r"layer 'head' did not run with gradients"),
    "loss does not depend": (
        Detached,
        lambda: FAM("head"),
        RuntimeError,
        r"does not depend on the outputs of layer 'head', so that there is nothing to penalise",
    ),
    "changed in place in a later step alone": (
        InPlaceLater,
        lambda: FAM("head"),
        RuntimeError,
        r"'head' were changed in place after they left it, which they were not in the first step, .*inplace=False",
    ),
    "nan loss": (NaNLoss, lambda: FAM("head"), RuntimeError, r"the loss of training step 1 is nan"),
    "infinite loss": (InfiniteLoss, lambda: FAM("head"), RuntimeError, r"the loss of training step 0 is inf"),
    "infinite penalty": (
        Net,
        lambda: FAM("head", 1e308, every_n_steps=100),
        RuntimeError,
        r"the penalty of training step 0 is -?inf",
    ),
    "target missing": (
        Net,
        lambda: FAM("head", loss=nn.CrossEntropyLoss(weight=torch.ones(3)), target=None),
        ValueError,
        r"Expected argument `target` to be a tensor, because the class weights .* but got None",
    ),
    "target not in the batch": (
        Net,
        lambda: FAM("head", loss="cross_entropy", target="label"),
        ValueError,
        r"Expected argument `target` to be an index or key of the batch, which is a list of 2, but got 'label'",
    ),
    "shapes do not fit": (
        Net,
        lambda: FAM("head", loss="mse"),
        ValueError,
        r"Expected argument `target` to be of shape \(7, 3\), .* but got torch.int64 of shape \(7,\)",
    ),
    "no second derivative": (
        MultiMargin,
        lambda: FAM("head"),
        RuntimeError,
        r"cannot be differentiated twice, .*multi_margin_loss_backward.* name it: `loss=`",
    ),
    "frozen head, constant Hessian": (
        Frozen,
        lambda: FAM("head", through_hessian=False),
        RuntimeError,
        r"nothing to penalise, because the weight of layer 'head' is frozen and through_hessian=False",
    ),
    "all frozen": (
        FrozenBelow,
        lambda: FAM("head"),
        RuntimeError,
        r"nothing to penalise, because the weight of layer 'head' is frozen and so is all before it",
    ),
    "crash": (Crash, lambda: FAM("head"), ZeroDivisionError, "in the middle"),
    "interrupt": (Interrupt, lambda: FAM("head"), SystemExit, None),
    "loss.backward() in manual optimization": (
        DirectBackward,
        lambda: FAM("head"),
        RuntimeError,
        r"added no penalty in epoch 0, because no loss .* went through `self.manual_backward`",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("monitored", [False, True])
def test_refused_with_nothing_left_behind(case: str, monitored: bool) -> None:
    kind, make, error, message = REFUSED[case]
    net = kind().double()
    callbacks: list[Any] = [make(), *([FlatnessMonitor("body", stages=("val", "test"))] * monitored)]
    with pytest.raises(error, match=message):
        make_trainer(precision="64-true", callbacks=callbacks).fit(net, make_loader(SIZES))
    assert_untouched(net)


def test_a_frozen_head_is_said_and_what_comes_before_is_penalised() -> None:
    net, twin = twins(Frozen)
    twin.head.requires_grad_(False)
    with pytest.warns(UserWarning, match="layer 'head' has a frozen weight. The penalty reaches only what"):
        train(net, FAM("head", 0.3, loss="cross_entropy"))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coefficient": math.nan}, "`coefficient` to be a finite number or 'auto', but got nan"),
        ({"coefficient": -math.inf}, "`coefficient` to be a finite number or 'auto', but got -inf"),
        ({"coefficient": "0.1"}, "`coefficient` to be a finite number or 'auto', but got '0.1'"),
        ({"coefficient": "Auto"}, "`coefficient` to be a finite number or 'auto', but got 'Auto'"),
        ({"coefficient": True}, "`coefficient` to be a finite number or 'auto', but got True"),
        ({"probes": 0}, "`probes` to be an integer of at least 1, or None, but got 0"),
        ({"every_n_steps": 0}, "`every_n_steps` to be an integer of at least 1, but got 0"),
        ({"warmup_steps": -1}, "`warmup_steps` to be an integer of at least 0, but got -1"),
        ({"start_epoch": 1.5}, "`start_epoch` to be an integer of at least 0, but got 1.5"),
        ({"start_epoch": 3, "stop_epoch": 3}, "`stop_epoch` to be an integer of at least 4, but got 3"),
        ({"target": 1.0}, "`target` to be an index or key of the batch, a path .*, or None, but got 1.0"),
        ({"loss": "hinge"}, "`loss` to be one of 'cross_entropy', .* but got 'hinge'"),
        (
            {"loss": nn.MSELoss(reduction="none")},
            "`loss` to reduce to a mean or a sum, .* MSELoss with reduction='none'",
        ),
        ({"seed": -1}, "`seed` to be an integer of at least 0, but got -1"),
        ({"through_hessian": "no"}, "`through_hessian` to be True or False, but got 'no'"),
        ({"layer": ["head"]}, r"`layer` to be the dotted name of a layer, or None, but got \['head'\]"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {message}"):
        FAM(**options)


def test_a_policy_that_is_not_finite() -> None:
    class Bad(FAM):
        def coefficient_at(self, *, epoch: int, step: int) -> float:
            return math.nan

    with pytest.raises(ValueError, match="`coefficient_at` to be a finite number, but got nan"):
        train(Net().double(), Bad("head"))


def test_outside_of_fit_it_does_nothing() -> None:
    trainer = make_trainer(callbacks=[FAM("no such layer")])
    trainer.validate(Net(), make_loader([4], dtype=torch.float32), verbose=False)
    assert "fam/penalty" not in trainer.callback_metrics


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("named", [{"loss": "cross_entropy"}, {"probes": None}], ids=["named", "exact"])
def test_outputs_may_be_changed_in_place(named: dict[str, Any], inplace: bool) -> None:
    class Doubled(Net):
        def forward(self, inputs: Tensor) -> Tensor:
            outputs = super().forward(inputs)
            return outputs.mul_(1.0) if inplace else outputs

    net, twin = twins(Doubled)
    train(net, FAM("head", 0.3, **named), max_epochs=2)
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES) * 2, definition, [0.3] * 6))


class Watch(Callback):
    def __init__(self) -> None:
        self.reads: list[int] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.count = Reads()
        self.count.__enter__()

    def on_before_backward(self, *_: Any) -> None:
        self.count.__exit__(None, None, None)
        self.reads.append(self.count.count)


UNNAMED: list[dict[str, Any]] = [{}, {"through_hessian": False}, {"probes": None}, {"coefficient": "auto"}]


@pytest.mark.parametrize(
    ("layer", "form"),
    [("head", {"loss": "cross_entropy"}), *((layer, form) for form in UNNAMED for layer in ("head", "body"))],
    ids=str,
)
def test_only_the_first_step_of_an_epoch_reads_a_device(form: dict[str, Any], layer: str) -> None:
    # Every such reading makes the host wait; whether values are finite is read when the epoch ends, and targets never.
    # The first step looks at how rows meet.
    named = "loss" in form
    reads = []
    for fams in ([], [FAM(layer, **form)]):
        watch = Watch()
        loader = make_loader([5, 5, 5], dtype=torch.float32)
        with as_on_a_device():
            make_trainer(callbacks=[*fams, watch], max_epochs=2).fit(Net() if named else Net(focal), loader)
        reads.append(watch.reads)
    assert len(reads[0]) == 6
    more = [read - plain for plain, read in zip(*reads, strict=True)]
    assert more[1:3] + more[4:] == [0] * 4
    assert more[0] > 0  # which shows that readings are seen


def test_a_loss_that_is_recognised_is_never_read_from_a_device() -> None:
    net, twin = twins()
    fam = FAM("head", 0.3)
    train(net, fam)
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), definition, [0.3] * 3))
    reads = []
    for fams in ([], [FAM("head")]):
        watch = Watch()
        loader = make_loader([5, 5], dtype=torch.float32)
        with as_on_a_device():
            make_trainer(callbacks=[*fams, watch], max_epochs=2).fit(Net(), loader)
        reads.append(watch.reads)
    assert [read - plain for plain, read in zip(*reads, strict=True)] == [0] * 4
