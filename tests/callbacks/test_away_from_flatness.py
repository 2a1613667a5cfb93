"""The penalty's other forms do what a plain loop with the definitions does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat import FAM
from lightning_relflat.functional import relative_flatness
from lightning_relflat.functional.layer_flatness import probe_seed
from tests.by_hand import assert_same_weights, definition, train_by_hand
from tests.models import SIZES, Batch, ManualNet, Net, PlainNet, focal, make_batches, train, twins
from tests.oracles import block_traces, kappa

pytestmark = pytest.mark.filterwarnings("ignore:.*a negative coefficient")


def binary(outputs: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, F.one_hot(target, 3).to(outputs))


class BinaryNet(Net):
    """With targets of the outputs' shape."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**{"criterion": binary} | kwargs)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        return [batch[0], batch[1], F.one_hot(batch[1], 3).to(batch[0])]  # for FAM(target=2)


def defined(*, trace: bool = False, normalized: bool = False, temperature: float = 1.0) -> Any:
    """Return the penalty by its definition, from the dense Hessian over the weight."""

    def penalty(net: Net, batch: Batch, step: int) -> Tensor:
        features, weight, bias = net.features(batch[0]), net.head.weight, net.head.bias
        outputs = F.linear(features, weight, bias)

        def loss(value: Tensor) -> Tensor:
            if normalized:  # the features that multiply a change of the weight, at the outputs that are there
                unit = features / features.norm(dim=1, keepdim=True)
                return net.criterion((outputs + F.linear(unit, value - weight)) / temperature, batch[1])
            return net.criterion(F.linear(features, value, bias) / temperature, batch[1])

        if trace:
            return weight.square().sum() * block_traces(loss, weight, create_graph=True).trace()
        return kappa(loss, weight, create_graph=True)

    return penalty


WEIGHTED = nn.CrossEntropyLoss(
    weight=torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64), label_smoothing=0.1, ignore_index=2
)
NAMED: dict[str, Any] = {"loss": "cross_entropy"}
FORMS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"temperature": 2.0} | NAMED, {"temperature": 2.0}),
    ({"temperature": 0.5, "loss": WEIGHTED}, {"temperature": 0.5}),
    ({"normalize_features": True} | NAMED, {"normalized": True}),
    ({"normalize_features": True, "probes": None}, {"normalized": True}),
    ({"measure": "trace"} | NAMED, {"trace": True}),
    ({"measure": "trace", "loss": WEIGHTED}, {"trace": True}),
    ({"measure": "trace", "probes": None}, {"trace": True}),
    (
        {"measure": "trace", "normalize_features": True, "temperature": 2.0} | NAMED,
        {"trace": True, "normalized": True, "temperature": 2.0},
    ),
    ({"measure": "trace", "normalize_features": True, "probes": None}, {"trace": True, "normalized": True}),
]


@pytest.mark.parametrize("kind", [Net, ManualNet])
@pytest.mark.parametrize(("options", "oracle"), FORMS, ids=lambda value: "-".join(map(str, value)))
def test_forms_of_the_penalty_equal_their_definitions(
    options: dict[str, Any], oracle: dict[str, Any], kind: type[Net]
) -> None:
    criterion: Any = options.get("loss")
    criterion = criterion if isinstance(criterion, nn.Module) else F.cross_entropy
    net, twin = twins(kind, criterion=criterion, lr=0.1)
    other = copy.deepcopy(twin)
    train(net, FAM("head", -0.05, **options))
    train_by_hand(twin, make_batches(SIZES), defined(**oracle), [-0.05] * 3)
    assert_same_weights(net, twin)
    # The form matters: plain κ would have come elsewhere.
    train_by_hand(other, make_batches(SIZES), definition, [-0.05] * 3)
    assert not torch.allclose(net.head.weight, other.head.weight, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 3.0])
def test_temperature_of_a_binary_cross_entropy(temperature: float) -> None:
    net, twin = BinaryNet(lr=0.1).double(), BinaryNet(lr=0.1).double()
    twin.load_state_dict(net.state_dict())
    train(net, FAM("head", 0.5, loss="binary_cross_entropy", target=2, temperature=temperature))
    train_by_hand(twin, make_batches(SIZES), defined(temperature=temperature), [0.5] * 3)
    assert_same_weights(net, twin)


@pytest.mark.parametrize(
    "options", [{"normalize_features": True}, {"measure": "trace"}, {"measure": "trace", "normalize_features": True}]
)
@pytest.mark.parametrize("form", [NAMED, {"probes": None}], ids=["named", "exact"])
def test_with_a_constant_hessian(options: dict[str, Any], form: dict[str, Any]) -> None:
    def constant(net: Net, batch: Batch, step: int) -> Tensor:
        with torch.no_grad():
            features = net.features(batch[0])
            p = net.head(features).softmax(dim=1)
            hessians = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            factor = torch.ones(len(p)) if "normalize_features" in options else features.square().sum(dim=1)
        weight = net.head.weight
        if "measure" in options:
            traces = weight.square().sum() * hessians.diagonal(dim1=1, dim2=2).sum(dim=1)
        else:
            traces = torch.einsum("sm,nst,tm->n", weight, hessians, weight)
        return (factor * traces).mean()

    net, twin = twins(lr=0.2)
    train(net, FAM("head", 0.3, through_hessian=False, **options, **form))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), constant, [0.3] * 3))


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("trace", [False, True])
def test_probes_lie_in_the_space_of_the_outputs(trace: bool, normalized: bool) -> None:
    def probed(net: Net, batch: Batch, step: int) -> Tensor:
        features = net.features(batch[0])
        outputs = net.head(features)
        generator = torch.Generator().manual_seed(probe_seed(0, step, 0))
        probes = torch.randint(0, 2, outputs.shape, generator=generator).double() * 2 - 1
        # Those of κ lie in the span of W's rows, of which there are as many as outputs.
        basis = torch.linalg.qr(net.head.weight.detach().T)[0]
        weight = net.head.weight
        pushed = weight.square().sum().sqrt() * probes if trace else probes @ basis.T @ weight.T
        hessian: Tensor = torch.autograd.functional.hessian(
            lambda value: net.criterion(value, batch[1]), outputs, create_graph=True
        )
        factor = torch.ones(len(outputs)).double() if normalized else features.square().sum(dim=1)
        return torch.einsum("n,ns,nsnt,nt->", factor, pushed, hessian, pushed)

    net, twin = twins(lr=0.2, criterion=focal)
    train(net, FAM("head", -0.05, measure="trace" if trace else "relative_flatness", normalize_features=normalized))
    assert_same_weights(net, train_by_hand(twin, make_batches(SIZES), probed, [-0.05] * 3))


def test_the_trace_of_a_saturated_softmax_keeps_its_digits() -> None:
    outputs = torch.tensor([[20.0, 0.0, -1.0]])
    batch = torch.ones(1, 2), torch.eye(3, 2), outputs
    p = outputs.double().softmax(dim=1)[0]
    # ‖W‖² = 2 and ‖φ‖² = 2
    expected = 4 * ((p[1:] * (1 - p[1:])).sum() + p[0] * p[1:].sum())
    value = relative_flatness(*batch, loss="cross_entropy", measure="trace")
    assert value == pytest.approx(expected.item(), rel=1e-5)


def test_normalized_features_of_zero_length() -> None:
    head = nn.Linear(4, 3)
    features = torch.zeros(5, 4, requires_grad=True)
    value = relative_flatness(features, head.weight, head(features), loss="cross_entropy", normalize_features=True)
    value.backward()
    assert value > 0
    assert features.grad is not None
    assert features.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "kappa"}, "`measure` to be 'relative_flatness' or 'trace', but got 'kappa'"),
        ({"normalize_features": 1}, "`normalize_features` to be True or False, but got 1"),
        ({"temperature": 0.0} | NAMED, "`temperature` to be a finite number above 0, but got 0.0"),
        ({"temperature": float("nan")} | NAMED, "`temperature` to be a finite number above 0, but got nan"),
        ({"temperature": "2"} | NAMED, "`temperature` to be a finite number above 0, but got '2'"),
        (
            {"temperature": 2.0},
            "`temperature` to be 1 unless `loss` names a cross-entropy, .* but got 2.0 with loss None",
        ),
        ({"temperature": 2.0, "loss": "mse"}, "`temperature` to be 1 unless .* but got 2.0 with loss MSELoss"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected argument {message}"):
        FAM(**{"layer": "head"} | options)


@pytest.mark.filterwarnings("ignore")
def test_from_plain_values() -> None:
    from lightning.pytorch.cli import LightningCLI

    options = {
        "layer": "head",
        "coefficient": "-0.1",
        "loss": "cross_entropy",
        "measure": "trace",
        "temperature": "2",
        "normalize_features": "true",
    }
    args = ["--trainer.callbacks=lightning_relflat.FAM", "--trainer.logger=false", "--trainer.accelerator=cpu"]
    args += [f"--trainer.callbacks.{name}={value}" for name, value in options.items()]
    cli = LightningCLI(PlainNet, args=args, run=False, save_config_callback=None)
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    [fam] = [callback for callback in callbacks if isinstance(callback, FAM)]
    assert (fam.measure, fam.temperature, fam.normalize_features) == ("trace", 2.0, True)
    assert fam.coefficient == -0.1
