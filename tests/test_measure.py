"""One call measures any model over any loader, and leaves it as it was."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_relflat import FlatnessMonitor, Report, measure
from lightning_relflat.callbacks._whole_report import WholeReport
from tests.models import make_trainer
from tests.oracles import kappa, kappa_of_layer, kappa_per_sample

SIZES = (7, 5, 1)  # uneven, and a last batch of one


def net(classes: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, classes)).double()


def data(*shape: int, classes: int = 3) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    count = sum(SIZES)
    return torch.randn(count, *(shape or (4,)), dtype=torch.float64), torch.randint(0, classes, (count, *shape[:-1]))


def batches(*values: Tensor) -> list[tuple[Tensor, ...]]:
    return list(zip(*(value.split(SIZES) for value in values), strict=True))


def number(value: Tensor) -> float:
    return float(value.detach())


class Tokens(nn.Module):
    """A model of tokens that returns its own loss, in one of the ways in which such models compute it."""

    def __init__(self, form: str, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.head, self.form = nn.Linear(4, 5), nn.Linear(5, width), form
        self.double()

    def forward(self, inputs: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.head(self.body(inputs).tanh())
        return SimpleNamespace(loss=FORMS[self.form](logits, labels), logits=logits)


FORMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "view": lambda z, y: F.cross_entropy(z.view(-1, z.shape[-1]), y.view(-1)),
    "flatten": lambda z, y: F.cross_entropy(z.float().double().flatten(0, 1), y.flatten()),
    "transpose": lambda z, y: F.cross_entropy(z.transpose(1, 2), y),
    "permute": lambda z, y: F.cross_entropy(z.permute(0, 2, 1), y),
    "movedim": lambda z, y: F.cross_entropy(z.movedim(-1, 1), y),
    "time first": lambda z, y: F.cross_entropy(z.transpose(0, 1).reshape(-1, z.shape[-1]), y.T.reshape(-1)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_head_of_tokens_reads_classes_along_the_right_dimension(form: str) -> None:
    """With as many tokens as classes, so that a wrong dimension would fit, too."""
    model = Tokens(form, width=4)
    inputs, labels = data(4, 4, classes=4)
    labels[0, 2:] = labels[5, 1] = -100
    loader = [{"inputs": one, "labels": two} for one, two in batches(inputs, labels)]
    report = measure(model, loader, sharpest=sum(SIZES))

    features = model.body(inputs).tanh().detach()
    weight, bias = model.head.weight.detach(), model.head.bias.detach()

    def per_token(w: Tensor) -> Tensor:
        return F.cross_entropy((features @ w.T + bias).reshape(-1, 4), labels.reshape(-1), reduction="none")

    counted = labels.reshape(-1) != -100
    torch.testing.assert_close(
        torch.tensor(report.relative_flatness).double(), kappa(lambda w: per_token(w).sum() / counted.sum(), weight)
    )
    assert report.error == 0
    assert report.made_of["relative_flatness"] == pytest.approx(report.relative_flatness, rel=1e-6)
    for place, own in enumerate(report.classes):
        mine = labels.reshape(-1) == place
        expected = kappa(lambda w, mine=mine: per_token(w)[mine].mean(), weight)  # type: ignore[misc]
        assert own.relative_flatness == pytest.approx(number(expected), rel=1e-6), own
        assert own.samples == int(mine.sum())
    right = (features @ weight.T + bias).argmax(-1) == labels
    assert report.accuracy == pytest.approx(float(right.reshape(-1)[counted].double().mean()))
    parts = kappa_per_sample(lambda w: per_token(w).reshape(len(inputs), -1).sum(dim=1), weight)
    assert [sample.index for sample in report.sharpest] == parts.argsort(descending=True).tolist()
    found = [sample.relative_flatness for sample in report.sharpest]
    torch.testing.assert_close(torch.tensor(found).double(), parts.sort(descending=True).values)


def test_a_loss_of_shifted_tokens_has_its_report() -> None:
    """As models of language have it: the last token has no next one."""
    FORMS["shift"] = lambda z, y: F.cross_entropy(z[:, :-1].reshape(-1, z.shape[-1]), y[:, 1:].reshape(-1))
    model = Tokens("shift")
    inputs, labels = data(4, 4, classes=4)
    report = measure(model, [{"inputs": inputs, "labels": labels}], layers=None)
    features, weight, bias = model.body(inputs).tanh().detach(), model.head.weight.detach(), model.head.bias
    assert bias is not None
    expected = kappa(lambda w: FORMS["shift"](features @ w.T + bias.detach(), labels), weight)
    assert report.relative_flatness == pytest.approx(number(expected))
    assert sum(one.samples for one in report.classes) == labels[:, 1:].numel()
    del FORMS["shift"]


def test_kappa_is_the_definition_over_the_whole_loader() -> None:
    model, (inputs, target) = net(), data()

    def loss() -> Tensor:
        return F.cross_entropy(model(inputs), target)

    report = measure(model, batches(inputs, target), probes=400)
    assert report.error == 0
    assert report.relative_flatness == pytest.approx(number(kappa_of_layer(model[2], loss)), rel=1e-10)
    assert report.mean_loss == pytest.approx(number(loss()))
    assert report.samples == sum(SIZES)
    assert report.batches == len(SIZES)
    assert report.accuracy == pytest.approx(float((model(inputs).argmax(1) == target).double().mean()))
    hidden, head = report.layers
    assert (hidden.name, head.name) == ("0", "2")
    assert head.relative_flatness == report.relative_flatness
    assert hidden.error is not None
    assert hidden.relative_flatness is not None
    assert hidden.error > 0
    assert abs(hidden.relative_flatness - number(kappa_of_layer(model[0], loss))) < 4 * hidden.error
    assert report.network == pytest.approx((hidden.relative_flatness + report.relative_flatness, hidden.error))
    assert "inferred" in report.sentences()[0]
    assert str(report).split("\n\n")[1].startswith("The loss is cross_entropy, inferred")
    whole = measure(model, [(inputs, target)])
    assert whole.relative_flatness == pytest.approx(report.relative_flatness, rel=1e-12)
    assert whole.made_of == pytest.approx(report.made_of, rel=1e-10)
    assert [sample.index for sample in whole.sharpest] == [sample.index for sample in report.sharpest]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_named_criterion_keeps_its_options(reduction: str) -> None:
    model, (inputs, target) = net(), data()
    target[3] = -100
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    criterion = nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1, reduction=reduction)
    report = measure(model, batches(inputs, target), loss=criterion, probes=300)

    def loss() -> Tensor:
        return criterion(model(inputs), target)

    assert report.relative_flatness == pytest.approx(number(kappa_of_layer(model[2], loss)), rel=1e-6)
    assert report.mean_loss == pytest.approx(number(loss()))
    hidden = report.layers[0]
    assert hidden.error is not None
    assert hidden.relative_flatness is not None
    assert abs(hidden.relative_flatness - number(kappa_of_layer(model[0], loss))) < 4 * hidden.error
    assert "as you named it" in report.sentences()[0]


def test_numbers_are_taken_for_a_mean_squared_error() -> None:
    model, (inputs, _) = net(1), data()
    target = torch.randn(len(inputs), dtype=torch.float64)  # without the outputs' last dimension
    report = measure(model, batches(inputs, target))
    features = model[1](model[0](inputs))
    expected = 2 * features.square().sum(dim=1).mean() * model.get_parameter("2.weight").square().sum()
    assert report.loss.name == "mse"
    assert report.relative_flatness == pytest.approx(number(expected), rel=1e-10)
    assert report.classes == ()
    assert report.accuracy is None


def test_any_callable_is_estimated_with_its_error() -> None:
    model, (inputs, target) = net(), data()

    report = measure(model, batches(inputs, target), loss=focal, probes=300)
    expected = number(kappa_of_layer(model[2], lambda: focal(model(inputs), target)))
    assert 0 < report.error < abs(expected)
    assert abs(report.relative_flatness - expected) < 4 * report.error
    assert report.made_of == {}
    assert report.sharpest == ()
    assert len(report.notes) == 2
    assert "estimated" in str(report)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda x, y: (x, y), {}),
        (lambda x, y: [x, y], {"target": -1}),
        (lambda x, y: (y, x), {"target": 0}),
        (lambda x, y: ((x,), y), {}),
        (lambda x, y: {"input": x, "label": y}, {}),
        (lambda x, y: {"input": x, "which": y}, {"target": "which"}),
        (lambda x, y: (x, {"which": y}), {"target": (1, "which")}),
        (lambda x, y: {"a": x, "b": y}, {"target": "b", "forward": lambda model, batch: model(batch["a"])}),
        (lambda x, y: (x, y, x), {"forward": lambda model, batch: model(batch[0])}),
        (lambda x, y: SimpleNamespace(x=x, y=y), {"target": "y", "forward": lambda model, batch: model(batch.x)}),
        (lambda x, y: (x, y), {"target": lambda batch: batch[1]}),
    ],
)
def test_batches_of_any_form(make: Callable[[Tensor, Tensor], Any], options: dict[str, Any]) -> None:
    model, (inputs, target) = net(), data()
    expected = measure(model, [(inputs, target)], layers=None).relative_flatness
    found = measure(model, [make(*batch) for batch in batches(inputs, target)], layers=None, **options)
    assert found.relative_flatness == pytest.approx(expected, rel=1e-12)
    assert found.samples in (sum(SIZES), len(SIZES))  # of an object of one's own only the head's rows are known


def test_several_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3).double()

        def forward(self, one: Tensor, two: Tensor) -> Tensor:
            return self.head(one * two)

    model, (inputs, target) = Two(), data()
    first = measure(model, [((inputs, inputs), target)])
    assert measure(model, [(inputs, inputs, target)], target=2).relative_flatness == first.relative_flatness
    named = [{"one": inputs, "two": inputs, "y": target}]
    assert measure(model, named).relative_flatness == first.relative_flatness
    with pytest.raises(ValueError, match=r"Expected argument `forward` to say how .*Two is called with a batch of 3"):
        measure(model, [(inputs, target, inputs)])


class Busy(nn.Module):
    """It has all that a measurement could leave traces in."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.drop = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.head = nn.Linear(5, 3)
        self.fails: type[BaseException] | None = None
        self.double()

    def forward(self, inputs: Tensor) -> Tensor:
        random.random()
        outputs = self.head(self.drop(F.relu(self.norm(self.body(inputs)), inplace=True)))
        if self.fails is not None:
            raise self.fails("now")
        return outputs


@pytest.mark.parametrize("fails", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_and_the_random_numbers_are_left_as_they_were(
    fails: type[BaseException] | None, training: bool
) -> None:
    model, (inputs, target) = Busy(), data()
    model.drop.eval()  # one of another mode
    model.body.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    gradient = model.head.weight.grad
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    model.fails = fails
    state, other = torch.get_rng_state(), random.getstate()
    loader = DataLoader(TensorDataset(inputs, target), batch_size=5, shuffle=True)
    try:
        report = measure(model, loader, training=training)
        assert report.training is training
        assert "shuffles" in report.sentences()[-1]
    except (ValueError, KeyboardInterrupt) as error:
        assert type(error) is fails  # noqa: PT017
    assert modes == [part.training for part in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.head.weight.grad is gradient
    assert torch.equal(gradient, torch.ones_like(gradient))
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, *[True] * 5]
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == other
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_frozen_models_and_callers_without_gradients(context: Callable[[], Any]) -> None:
    model, (inputs, target) = net(), data()
    expected = measure(model, batches(inputs, target))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with context():
        found = measure(model, [(one.clone(), two.clone()) for one, two in batches(inputs, target)])
    assert found == expected
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_evaluation_mode_is_the_default_and_a_batch_s_statistics_are_constants_in_training() -> None:
    model, (inputs, target) = Busy(), data()
    model.drop.p = 0.0
    report = measure(model.train(), [(inputs, target)], probes=300)
    model.eval()
    expected = number(kappa_of_layer(model.body, lambda: F.cross_entropy(model(inputs), target)))
    hidden = report.layers[0]
    assert hidden.relative_flatness is not None
    assert hidden.error is not None
    assert abs(hidden.relative_flatness - expected) < 4 * hidden.error
    assert not report.training


def test_layers_without_a_value_are_named_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.unused, self.aside = (nn.Linear(4, 4) for _ in range(4))
            self.double()

        def forward(self, inputs: Tensor) -> Tensor:
            self.aside(inputs)
            return self.second(F.hardsigmoid(self.first(inputs)))  # PyTorch has no second derivative of it

    inputs, target = data(classes=4)
    report = measure(Odd(), batches(inputs, target))
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert reasons["second"] is None
    assert reasons["unused"] == "it did not run as a module"
    assert reasons["aside"] == "the loss does not depend on it"
    assert reasons["first"] is not None
    assert "cannot be differentiated twice" in reasons["first"]
    said = " ".join(report.sentences())
    assert all(repr(name) in said for name in ("first", "unused", "aside"))


@pytest.mark.parametrize(
    ("outputs", "target", "words"),
    [
        (torch.randn(6, 3), torch.rand(6, 2), "does not follow from outputs of shape"),
        (torch.randn(6, 3), torch.randint(0, 2, (6, 3)).float(), "'binary_cross_entropy' or 'mse'"),
        (torch.randn(6, 3), torch.rand(6, 3).softmax(1), "'cross_entropy' or 'mse'"),
        (torch.randn(6, 3).softmax(1), torch.randint(0, 3, (6,)), "look like probabilities"),
        (torch.randn(6, 3), torch.randint(0, 2, (6, 3)), "does not follow"),
        (torch.randn(6, 1), torch.randint(0, 2, (6,)), "does not follow"),
        (torch.randn(6, 3, 3), torch.randint(0, 3, (6, 3)), "dimension 1 or 2"),
        (torch.randn(6, 3), "text", "does not follow"),
        (torch.randn(0, 3), torch.randint(0, 3, (0,)), "does not follow"),
    ],
)
def test_where_there_is_doubt_no_loss_is_inferred(outputs: Tensor, target: Any, words: str) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(1, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            return outputs + 0 * self.head(torch.ones(1))

    with pytest.raises(ValueError, match=r"^Expected argument `loss`.*" + words):
        measure(Fixed(), [(torch.ones(6, 1), target)])


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"model": 3}, TypeError, "Expected argument `model` to be an nn.Module, but got 3"),
        ({"loader": []}, ValueError, "Expected argument `loader` to give at least one batch"),
        ({"loader": TensorDataset(torch.ones(2, 4))}, TypeError, "a data set. Put it into a DataLoader"),
        ({"loader": torch.ones(2)}, TypeError, "Expected argument `loader` to give batches"),
        ({"loader": 3}, TypeError, "Expected argument `loader` to give batches"),
        ({"layer": "no"}, ValueError, "Expected argument `layer` to name"),
        ({"layers": "no*"}, ValueError, r"Expected argument `layers` to match layers of .* but got 'no\*'"),
        ({"loss": "no"}, ValueError, "Expected argument `loss` to be one of"),
        ({"target": 7}, ValueError, "Expected argument `target`"),
        ({"target": 1.5}, ValueError, "Expected argument `target`"),
        ({"probes": 1}, ValueError, "Expected argument `probes`"),
        ({"sharpest": -1}, ValueError, "Expected argument `sharpest`"),
        ({"forward": 3}, ValueError, "Expected argument `forward`"),
        ({"training": 1}, ValueError, "Expected argument `training`"),
        ({"progress": "yes"}, ValueError, "Expected argument `progress`"),
        ({"loss": lambda outputs, target: outputs.detach().sum()}, RuntimeError, "Expected the loss to depend on"),
        (
            {"loss": lambda outputs, target: "text"},
            ValueError,
            "Expected argument `loss` to return a loss, .* got .text. from",
        ),
        ({"model": nn.Sequential(nn.ReLU())}, ValueError, "it has no nn.Linear"),
    ],
)
def test_what_is_wrong_is_said(change: dict[str, Any], kind: type[Exception], words: str) -> None:
    inputs, target = data()
    arguments: dict[str, Any] = {"model": net(), "loader": [(inputs, target)]} | change
    with pytest.raises(kind, match=words):
        measure(**arguments)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    inputs, target = data()
    inputs[8] = torch.nan
    with pytest.raises(FloatingPointError, match="finite number, but got nan for batch 1, counted from 0"):
        measure(net(), batches(inputs, target))


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("mean", [False, True])
def test_a_batch_of_no_samples_says_nothing(mean: bool, place: int) -> None:
    inputs, target = data()
    loss: Any = nn.CrossEntropyLoss(reduction="sum")
    if mean:

        def loss(z: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(z, y, reduction="sum") / max(1, len(y))

    given = batches(inputs, target)
    expected = measure(net(), given, loss=loss)
    given.insert(place, (inputs[:0], target[:0]))
    found = measure(net(), given, loss=loss)
    assert found.relative_flatness == pytest.approx(expected.relative_flatness, rel=1e-12)
    assert found.samples == expected.samples
    assert found.mean_loss == pytest.approx(expected.mean_loss, rel=1e-12)
    assert found.sharpest == expected.sharpest
    assert found.sharpest


def test_what_holds_for_some_batches_alone_is_not_told() -> None:
    """A report of a part of the data would look like one of the whole."""
    inputs, target = data()
    turn = iter([True, False, True])

    def changing(outputs: Tensor, target: Tensor) -> Tensor:
        loss = F.cross_entropy(outputs, target)
        return loss if next(turn) else loss + outputs.cosh().mean()

    report = measure(net(), batches(inputs, target), loss=changing)
    assert report.made_of == {}
    assert report.classes == ()
    assert report.sharpest == ()


def test_progress_is_told() -> None:
    told: list[tuple[int, int | None]] = []
    inputs, target = data()
    measure(net(), batches(inputs, target), progress=lambda done, total: told.append((done, total)))
    measure(net(), iter(batches(inputs, target)), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3), (1, None), (2, None), (3, None)]


def test_compiled_and_wrapped_models_are_measured_as_they_are_within() -> None:
    model, (inputs, target) = net(), data()
    expected = measure(model, [(inputs, target)])
    assert measure(nn.DataParallel(model), [(inputs, target)]) == expected
    compiled: Any = torch.compile(model, backend="eager")
    assert measure(compiled, [(inputs, target)]) == expected


def test_the_name_is_a_function_however_it_is_imported() -> None:
    import lightning_relflat
    from lightning_relflat import measure as again

    assert callable(lightning_relflat.measure)
    assert again is measure
    assert isinstance(measure(net(), [data()]), Report)


def focal(outputs: Tensor, target: Tensor) -> Tensor:
    misses = 1 - outputs.softmax(1).gather(1, target[:, None])[:, 0]
    return (misses**2 * F.cross_entropy(outputs, target, reduction="none")).mean()


class Module(L.LightningModule):
    """The same in a Trainer."""

    def __init__(self, criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.criterion = net(), criterion

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.criterion(self.net(batch[0]), batch[1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("criterion", [F.cross_entropy, focal])
def test_a_trainer_that_validates_gives_the_same(criterion: Callable[[Tensor, Tensor], Tensor]) -> None:
    """With the same probes, too, where κ is estimated."""
    values = data()
    monitor, whole = FlatnessMonitor(seed=3), WholeReport(seed=3, name="Sequential")
    trainer = L.Trainer(
        logger=False,
        callbacks=[monitor, whole],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader: Any = DataLoader(batches(*values), batch_size=None)  # type: ignore[arg-type]  # a list is a data set
    [logged] = trainer.validate(Module(criterion), loader, verbose=False)
    own = measure(net(), batches(*values), loss=criterion, seed=3)
    assert logged["val/relative_flatness"] == pytest.approx(own.relative_flatness, rel=1e-12)
    assert logged.get("val/relative_flatness_error", 0.0) == pytest.approx(own.error, rel=1e-12)
    found = whole.reports["val"]
    assert found.sentences()[0] == "The loss is that of the validation step."
    assert [one.name for one in found.layers] == ["net.0", "net.2"]
    assert [one.relative_flatness for one in found.layers] == [one.relative_flatness for one in own.layers]
    for name in ("relative_flatness", "error", "made_of", "mean_loss", "samples"):
        assert getattr(found, name) == pytest.approx(getattr(own, name), rel=1e-12), name
    assert found.accuracy == own.accuracy
    assert [(one.name, one.samples) for one in found.classes] == [(one.name, one.samples) for one in own.classes]
    for one, other in zip(found.sharpest, own.sharpest, strict=True):
        assert (one.index, one.label, one.prediction) == (other.index, other.label, other.prediction)
        assert one.relative_flatness == pytest.approx(other.relative_flatness, rel=1e-12)


def test_of_a_module_that_has_diverged_no_layer_is_said_not_to_count() -> None:
    module, whole = Module(F.cross_entropy), WholeReport(name="Sequential")
    with torch.no_grad():
        module.get_parameter("net.2.weight")[0, 0] = torch.nan
    loader: Any = DataLoader(batches(*data()), batch_size=None)  # type: ignore[arg-type]  # a list is a data set
    make_trainer(callbacks=[whole]).validate(module, loader, verbose=False)
    found = whole.reports["val"]
    assert [layer.reason for layer in found.layers] == ["κ is not a number", None]
    assert found.sentences()[1].startswith("κ of the head, layer 'net.2', is not a number, because the loss is not")


def test_a_named_loss_of_a_step_is_one_of_the_layer_s_outputs() -> None:
    values = data()
    whole = WholeReport(loss="cross_entropy", layers=None)
    trainer = L.Trainer(logger=False, callbacks=[whole], accelerator="cpu", enable_progress_bar=False)
    loader: Any = DataLoader(batches(*values), batch_size=None)  # type: ignore[arg-type]
    trainer.validate(Module(focal), loader, verbose=False)
    found = whole.reports["val"]
    assert found.relative_flatness == measure(net(), batches(*values), layers=None).relative_flatness
    assert "The validation step shows another loss." in found.sentences()[0]
