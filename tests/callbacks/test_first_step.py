"""What a later step would refuse is refused in the first, also where no penalty is due in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat import FAM
from lightning_relflat.functional.large_head import _from_outputs
from lightning_relflat.layer_tap import LayerTap
from tests.by_hand import assert_same_weights, assert_untouched, definition, train_by_hand
from tests.models import (
    SIZES,
    Batch,
    Conv,
    Detached,
    ManualNet,
    Net,
    NoGrad,
    Unused,
    make_batches,
    make_loader,
    make_trainer,
    train,
    twins,
)
from tests.shares import Share


class Scaled(Net):
    def loss(self, batch: Batch) -> Tensor:
        return 0.3 * super().loss(batch)


class ManualScaled(Scaled, ManualNet):
    pass


REFUSED: dict[str, tuple[type[Net], dict[str, Any], type[Exception], str]] = {
    "did not run": (Unused, {"layer": "unused"}, RuntimeError, "layer 'unused' did not run with gradients"),
    "ran without gradients": (NoGrad, {}, RuntimeError, "layer 'head' did not run with gradients"),
    "loss does not depend": (Detached, {}, RuntimeError, "does not depend on the outputs of layer 'head', so that"),
    "no layer": (
        Detached,
        {"layer": "head", "loss": "cross_entropy"},
        RuntimeError,
        "does not depend on the outputs of layer 'head', so that",
    ),
    "not the loss": (Scaled, {"loss": "cross_entropy"}, RuntimeError, "is 0.3 times that of the named loss"),
    "not the loss, in manual optimization": (
        ManualScaled,
        {"loss": "cross_entropy"},
        RuntimeError,
        "is 0.3 times that of the named loss",
    ),
    "target not there": (
        Net,
        {"loss": "cross_entropy", "target": "label"},
        ValueError,
        r"`target` to be an index or key of the batch, which is a list of 2, but got 'label'",
    ),
    "target not there, in manual optimization": (
        ManualNet,
        {"loss": "cross_entropy", "target": (1, "label")},
        ValueError,
        r"`target` to be an index or key of what \(1,\) leads to in the batch, which is a single tensor",
    ),
    "shapes do not fit": (Net, {"loss": "mse"}, ValueError, r"`target` to be of shape \(7, 3\)"),
    "not linear": (
        Conv,
        {"layer": "conv", "loss": "mse"},
        ValueError,
        "to name an nn.Linear where a criterion of its outputs",
    ),
}


OF_A_NAMED_LAYER = {case for case, (_, options, _, _) in REFUSED.items() if "layer" in options}
OF_A_NAMED_LAYER |= {"ran without gradients", "loss does not depend"}


@pytest.mark.parametrize("start_epoch", [0, 5])
@pytest.mark.parametrize(
    ("case", "layer"),
    [(case, "head") for case in REFUSED] + [(case, None) for case in REFUSED if case not in OF_A_NAMED_LAYER],
)
def test_refused_before_the_optimizer_moves(case: str, layer: str | None, start_epoch: int) -> None:
    kind, options, error, message = REFUSED[case]
    net = kind().double()
    before = copy.deepcopy(net.state_dict())
    fam = FAM(**{"layer": layer, "start_epoch": start_epoch} | options)
    with pytest.raises(error, match=message):
        make_trainer(precision="64-true", callbacks=[fam], max_epochs=6).fit(net, make_loader(SIZES))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert_untouched(net)


class Behind(Net):
    """With all that a tap may write out, copy or replace behind its layers."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(dropout=0.3, **kwargs)
        self.layer_norm = nn.LayerNorm(6)
        self.batch_norm = nn.BatchNorm1d(6)
        self.attention = nn.MultiheadAttention(6, 2, dropout=0.2, batch_first=True)

    def features(self, inputs: Tensor) -> Tensor:
        hidden = self.batch_norm(self.layer_norm(F.relu(self.body(inputs), inplace=True)))
        mixed, _ = self.attention(hidden[None], hidden[None], hidden[None], need_weights=False)
        features: Tensor = self.drop(torch.tanh(hidden + mixed[0]))
        return features


class ManualBehind(Behind, ManualNet):
    pass


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        *((layer, options) for layer in ("body", "head", None) for options in ({}, {"coefficient": "auto"})),
        *((layer, {"loss": "cross_entropy"}) for layer in ("head", None)),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Behind, ManualBehind])
def test_a_step_without_a_penalty_is_that_of_plain_training_bit_for_bit(
    kind: type[Net], layer: str | None, options: dict[str, Any]
) -> None:
    nets = []
    for fams in ([], [FAM(layer, start_epoch=1, **options)]):
        torch.manual_seed(0)
        net = kind(lr=0.1)
        trainer = make_trainer(callbacks=[*fams])
        trainer.fit(net, make_loader(SIZES, dtype=torch.float32))
        assert not trainer.callback_metrics
        nets.append(net)
    for (name, plain), found in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        assert torch.equal(plain, found), name


def count_starts(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return a list that grows with every step that is listened to, by whether κ may be taken from its loss."""
    seen: list[bool] = []
    start = LayerTap.start

    def counted(self: LayerTap) -> None:
        seen.append(self.behind is not None)
        start(self)

    monkeypatch.setattr(LayerTap, "start", counted)
    return seen


def test_only_the_first_step_is_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_starts(monkeypatch)
    train(Net().double(), FAM("head", start_epoch=2), max_epochs=3)
    assert seen == [False] + [True] * 3
    seen.clear()
    train(Net().double(), FAM("head", every_n_steps=2), max_epochs=1)
    assert seen == [True] * 2


@pytest.mark.parametrize("options", [{"coefficient": 0.0}, {"coefficient": 0.0, "start_epoch": 1}], ids=str)
def test_a_penalty_that_never_comes_is_not_looked_for(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = count_starts(monkeypatch)
    train(Unused().double(), FAM("unused", **options))
    assert seen == []


def test_a_penalty_that_is_over_is_not_looked_for(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(precision="64-true", callbacks=[FAM("head", stop_epoch=1)])
    trainer.fit(Net().double(), make_loader(SIZES))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    seen = count_starts(monkeypatch)
    trainer = make_trainer(precision="64-true", callbacks=[FAM("head", stop_epoch=1)], max_epochs=2)
    trainer.fit(Net().double(), make_loader(SIZES), ckpt_path=tmp_path / "one.ckpt")
    assert seen == []


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_first_batch_without_a_loss_leaves_it_to_the_next() -> None:
    class Late(Scaled):
        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            return None if batch_idx == 0 else self.loss(batch)

    net = Late().double()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(RuntimeError, match=r"is 0\.3 times that of the named loss"):
        train(net, FAM("head", loss="cross_entropy", start_epoch=1), max_epochs=2)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


class Unfreeze(Callback):
    """Trains the head from the second epoch on, as finetuning callbacks do."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.requires_grad_(False)
        pl_module.rest = nn.Parameter(torch.zeros(3).double())
        pl_module.criterion = lambda outputs, target: F.cross_entropy(outputs + pl_module.rest, target)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            pl_module.requires_grad_(True)


def test_a_layer_that_is_frozen_for_now_is_said_and_penalised_when_it_is_not() -> None:
    net, twin = twins()
    trainer = make_trainer(
        precision="64-true", callbacks=[Unfreeze(), FAM("head", 0.3, start_epoch=1, probes=None)], max_epochs=2
    )
    with pytest.warns(UserWarning, match="'head' is frozen and so is all before it. This is refused if it is still so"):
        trainer.fit(net, make_loader(SIZES))
    Unfreeze().setup(None, twin, "fit")
    for epoch in range(2):
        twin.requires_grad_(epoch == 1)
        twin.rest.requires_grad_(True)
        optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
        for batch in make_batches(SIZES):
            optimizer.zero_grad()
            loss = twin.loss(batch)
            (loss + 0.3 * definition(twin, batch, 0) if epoch == 1 else loss).backward()
            optimizer.step()
    assert_same_weights(net, twin)


class Direct(ManualNet):
    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


class ManualUnused(ManualNet):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)


class Alternating(ManualNet):
    """As in a GAN: one batch trains one network, the next another."""

    def __init__(self, direct: bool = False) -> None:
        super().__init__(lr=0.1)
        self.critic = nn.Linear(5, 3)
        self.direct = direct

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizers: Any = self.optimizers()
        optimizer = optimizers[batch_idx % 2]
        optimizer.zero_grad()
        loss = self.loss(batch) if batch_idx % 2 else F.cross_entropy(self.critic(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self) -> Any:
        generator = [*self.body.parameters(), *self.head.parameters()]
        return [torch.optim.SGD(parameters, lr=self.lr) for parameters in (self.critic.parameters(), generator)]


@pytest.mark.parametrize("start_epoch", [0, 5])
@pytest.mark.parametrize("layer", ["head", "body", None])
def test_a_loss_that_goes_backward_by_itself_is_refused_before_the_optimizer_moves(
    layer: str | None, start_epoch: int
) -> None:
    net = Direct().double()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(
        RuntimeError, match=r"none went through `self\.manual_backward`, so that no penalty can be added"
    ):
        train(net, FAM(layer, start_epoch=start_epoch), max_epochs=6)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert_untouched(net)


@pytest.mark.parametrize("start_epoch", [0, 1])
def test_networks_that_are_trained_in_turn(start_epoch: int) -> None:
    sizes = [4, 5, 6, 4]
    net = Alternating().double()
    twin = copy.deepcopy(net)
    train(net, FAM("head", 0.2, loss="cross_entropy", start_epoch=start_epoch), sizes, max_epochs=2)
    optimizers = twin.configure_optimizers()
    for step, batch in enumerate(make_batches(sizes) * 2):
        optimizer = optimizers[step % 2]
        optimizer.zero_grad()
        if step % 2 == 0:
            loss = F.cross_entropy(twin.critic(batch[0]), batch[1])
        else:
            loss = twin.loss(batch) + (0.2 * definition(twin, batch, 0) if step >= 4 * start_epoch else 0)
        loss.backward()
        optimizer.step()
    assert_same_weights(net, twin)


def test_in_manual_optimization_an_epoch_without_such_a_loss_is_said() -> None:
    message = "could not have added a penalty in epoch 0, because no loss that depends on the layer went through"
    with pytest.warns(UserWarning, match=message) as caught:
        train(ManualUnused().double(), FAM("unused", start_epoch=3), max_epochs=3)
    assert sum("could not have added" in str(one.message) for one in caught) == 1
    with pytest.raises(RuntimeError, match="added no penalty in epoch 0, because no loss that depends on the layer"):
        train(ManualUnused().double(), FAM("unused"))


def test_two_of_one_name_are_refused() -> None:
    class Own(FAM):
        pass

    net = Net().double()
    with pytest.raises(RuntimeError, match="Found more than one stateful callback of type `FAM`"):  # by Lightning
        make_trainer(callbacks=[FAM("head"), FAM("body")])
    trainer = make_trainer(precision="64-true", callbacks=[FAM("head"), Own("body")])
    with pytest.raises(ValueError, match="Expected argument `name` to tell several FAM callbacks apart"):
        trainer.fit(net, make_loader(SIZES))
    assert_untouched(net)


class Log(Callback):
    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class Several(ManualNet):
    """Two losses of two passes, and one that does not depend on the head."""

    def __init__(self) -> None:
        super().__init__(lr=0.1)
        self.calls: list[str] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.manual_backward(2 * self.loss([batch[0].flip(1), batch[1]]))
        self.manual_backward(self.body(batch[0]).square().mean())
        optimizer.step()

    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        self.calls.append(name)
        super().log(name, *args, **kwargs)


@pytest.mark.parametrize("name", [None, "x"])
def test_the_logged_penalty_is_that_of_all_losses_of_the_step(name: str | None) -> None:
    net = Several().double()
    twin = copy.deepcopy(net)
    log = Log()
    fam = FAM("head", 0.1, probes=None, warmup_steps=2, name=name)
    make_trainer(precision="64-true", callbacks=[fam, log]).fit(net, make_loader([5]))
    [batch] = make_batches([5])
    expected = definition(twin, batch, 0) + 2 * definition(twin, [batch[0].flip(1), batch[1]], 0)
    group = "fam" if name is None else f"fam/{name}"
    assert log.seen == [
        {f"{group}/penalty": pytest.approx(0.05 * expected.item(), rel=1e-10), f"{group}/coefficient": 0.05}
    ]
    assert net.calls == [f"{group}/penalty", f"{group}/coefficient"]


def test_an_automatic_coefficient_is_one_for_all_losses_of_the_step() -> None:
    net = Several().double()
    log = Log()
    make_trainer(precision="64-true", callbacks=[Share("head", 0.1), log], max_epochs=4).fit(net, make_loader([5, 5]))
    assert len({values["fam/coefficient"] for values in log.seen}) > 4
    assert net.calls == ["fam/penalty", "fam/coefficient"] * 8


MANY: Callable[[], list[Callback]] = lambda: [FAM("head", 0.1, name="a", start_epoch=1), FAM("body", 0.1, probes=None)]  # noqa: E731


def test_a_rehearsal_beside_a_penalty_changes_nothing_in_it() -> None:
    net, twin = twins()
    make_trainer(precision="64-true", callbacks=MANY()).fit(net, make_loader(SIZES))
    train(twin, FAM("body", 0.1, probes=None))
    assert_same_weights(net, twin, 0)


def test_the_penalty_comes_when_it_is_due() -> None:
    net, twin = twins(lr=0.1)
    train(net, FAM("head", 0.4, loss="cross_entropy", start_epoch=1), [5, 6], max_epochs=2)
    assert_same_weights(net, train_by_hand(twin, make_batches([5, 6]) * 2, definition, [0, 0, 0.4, 0.4]))


def test_a_claim_about_very_many_outputs_is_refused_as_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_from_outputs, "FEW", 0)
    with pytest.raises(RuntimeError, match="the loss that is trained with is not"):
        train(Scaled().double(), FAM("head", loss="cross_entropy", start_epoch=1))
    train(twins()[0], FAM("head", loss="cross_entropy", start_epoch=1))


@pytest.mark.parametrize("layer", ["head", None])
def test_a_loss_of_the_weights_alone_may_come_first(layer: str | None) -> None:
    class Regularised(ManualNet):
        def training_step(self, batch: Batch, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()
            self(batch[0])
            for loss in (lambda: 0.1 * self.head.weight.square().sum(), lambda: self.loss(batch)):
                optimizer.zero_grad()
                self.manual_backward(loss())
                optimizer.step()

    net, twin = twins(Regularised)
    train(net, FAM(layer, 0.1, probes=None))
    optimizer = torch.optim.SGD(twin.parameters(), lr=twin.lr)
    for batch in make_batches(SIZES):
        for second in (False, True):
            optimizer.zero_grad()
            loss = (
                twin.loss(batch) + 0.1 * definition(twin, batch, 0) if second else 0.1 * twin.head.weight.pow(2).sum()
            )
            loss.backward()
            optimizer.step()
    assert_same_weights(net, twin)
