"""A loss that somebody names is a claim: it is compared with the loss that is trained with. Needs torch alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_relflat.functional._called_batch import Target, read_batch
from lightning_relflat.functional._checks import full_precision, ordinary
from lightning_relflat.functional._graph import nodes_between
from lightning_relflat.functional._recognised import is_cross_entropy, recognise
from lightning_relflat.functional.criteria import criterion_loss, has_closed_form
from lightning_relflat.functional.large_head import is_large
from lightning_relflat.functional.output_hessian import output_hessian

Criterion: TypeAlias = "nn.Module | Callable[[Tensor, Any], Tensor]"

# How many steps may pass without a comparison, which reads the device.
_EVERY = 1000
# How many changes of constants alone may have been no matter, until they are let be.
_CHANGES = 8
# Relative differences: right claims come to 1e-8 in double precision, wrong ones to 0.028 and more.
_TOLERANCE = 0.01
_TOLERANCE_OF_HALF_PRECISION = 0.05  # right ones 2e-3 under bf16 autocast
# Below this share of the largest curvature that a row's weight allows, nothing can be told from rounding.
_FLAT = 1e-4

_CROSS_ENTROPY: list[tuple[str, object]] = [("LogSoftmaxBackward0", None), ("NllLossBackward0", None)]


@dataclass(frozen=True)
class Verdict:
    """What came of checking a claim.

    Attributes:
        holds: whether the claim holds; ``None`` where it cannot be told: the curvature is too small to see, or the
            loss gives neither second derivatives nor a gradient before its backward pass.
        reason: what differs, for a message.
    """

    holds: bool | None
    reason: str = ""


_NO_GRADIENT = Verdict(None, "its gradient cannot be taken before the backward pass")


class Claim:
    """A criterion or callable of a layer's outputs and a target, said to be the loss that is trained with.

    It is compared with the loss when an epoch begins, when other operations or other constants lie between the outputs
    and the loss than before, and every 1,000 steps: a comparison reads the device, and costs a second derivative of
    what lies between. Constants that change and do not matter, as those of mixup, are let be after some comparisons.

    Args:
        criterion: a criterion of ``torch.nn`` with a closed form, or a callable ``loss(outputs, target)``.

    Attributes:
        verified: whether a comparison has found that it holds, since :meth:`look_again`.
    """

    def __init__(self, criterion: Criterion) -> None:
        self.criterion = criterion
        self.look_again()

    def look_again(self) -> None:
        """Compare with the next loss, whatever it is."""
        self.verified = False
        self._seen: list[tuple[str, object]] = []
        self._steps = self._changes = 0

    def check(self, loss: Tensor, outputs: Sequence[Tensor], target: Target) -> Verdict:
        """Compare with a loss, if it is time.

        Args:
            loss: as for :func:`check_claim`.
            outputs: as there.
            target: as there.

        Returns:
            The verdict; of the last comparison, if there was none now.
        """
        if len(outputs) == 1 and is_cross_entropy(loss, outputs[0]):
            seen = _CROSS_ENTROPY  # what is found below, without the walk
        else:
            # Copies are ours: what a layer hands on is one as long as it is not known if it is changed in place.
            nodes = [node for node in nodes_between(loss, outputs) if node.name() != "CloneBackward0"]
            seen = sorted(((node.name(), _constant(node)) for node in nodes), key=repr)
        if self._changes >= _CHANGES:
            seen = [(name, None) for name, _ in seen]
        self._steps += 1
        if self.verified and seen == self._seen and self._steps < _EVERY:
            return Verdict(True)
        if self.verified and [name for name, _ in seen] == [name for name, _ in self._seen]:
            self._changes += 1
        verdict = check_claim(loss, outputs, target, self.criterion)
        self.verified = verdict.holds is True
        self._seen, self._steps = seen, 0
        return verdict


def _constant(node: Any) -> object:
    """Return the number that an operation multiplies with or divides by, if it is at hand without a wait."""
    if not node.name().startswith(("Mul", "Div")):
        return None
    value = getattr(node, "_saved_other", None)
    if isinstance(value, Tensor):
        return float(value.detach()) if value.ndim == 0 and value.device.type == "cpu" else None
    return value


@ordinary()
def check_claim(loss: Tensor, outputs: Sequence[Tensor], target: Target, criterion: Criterion) -> Verdict:
    r"""Compare the curvature of a loss at some outputs with that of a criterion of each of them and a target.

    Along one random probe: Hu by differentiating the loss twice, beside Au with A = ∇²_z of the criterion in closed
    form, or by differentiating a callable twice. What does not change κ passes: undeclared label smoothing, mixup,
    auxiliary terms, weight decay. A factor, scaled outputs, class weights, masked or shifted positions, a layer further
    back do not. Where the loss cannot be differentiated twice, its gradient is compared with the criterion's. So it is
    with 2²¹ outputs of a cross-entropy and more, beside which second derivatives would not fit; but where the loss's
    graph says what its curvature is, what every row weighs is compared. Reads the device.

    Source: the chain rule; the thresholds are from 20 claims about real models.

    Args:
        loss: the loss that is trained with, a scalar.
        outputs: what left the layer in each pass on which the loss depends, of shape (..., d).
        target: what the criterion takes as its target.
        criterion: the criterion claimed, or a callable ``loss(outputs, target)``.

    Returns:
        The verdict.

    Raises:
        TypeError: as :func:`~lightning_relflat.functional.output_hessian` does.
        ValueError: as :func:`~lightning_relflat.functional.output_hessian` does.

    Examples:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from lightning_relflat.claims import check_claim
        >>> outputs, target = torch.tensor([[1.0, 0.0], [0.5, 2.0]], requires_grad=True), torch.tensor([0, 1])
        >>> cross_entropy = torch.nn.CrossEntropyLoss()
        >>> check_claim(F.cross_entropy(outputs, target), [outputs], target, cross_entropy).holds
        True
        >>> check_claim(0.3 * F.cross_entropy(outputs, target), [outputs], target, cross_entropy).reason
        'its curvature there is 0.3 times that of the named loss'
    """
    half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in outputs)
    tolerance = _TOLERANCE_OF_HALF_PRECISION if half else _TOLERANCE
    if isinstance(criterion, nn.CrossEntropyLoss) and any(map(is_large, outputs)):
        return _judge_large(loss, outputs, target, criterion, tolerance)
    with full_precision(loss), torch.enable_grad():
        try:
            gradients = torch.autograd.grad(loss, outputs, create_graph=True, materialize_grads=True)
        except RuntimeError:  # compiled with buffers that a backward pass gives away
            return _NO_GRADIENT
        probes = [_signs(tensor) for tensor in outputs]
        products = _products(gradients, outputs, probes)
    if products is None or not any(bool(product.any()) for product in products):
        return _judge_gradients(gradients, outputs, target, criterion, tolerance)
    claimed = [_expected(tensor, target, criterion, probe) for tensor, probe in zip(outputs, probes, strict=True)]
    expected = torch.cat([product for product, _ in claimed])
    found = torch.cat([product.detach().reshape(-1, product.shape[-1]).to(expected) for product in products])
    size = None if claimed[0][1] is None else torch.stack([size for _, size in claimed if size is not None]).norm()
    return _judge(found, expected, size, tolerance)


def _expected(outputs: Tensor, target: Target, criterion: Criterion, probe: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the product of a criterion's Hessian, of shape (rows, d), and the largest that it could be if known."""
    with full_precision(outputs):
        if has_closed_form(criterion):
            assert isinstance(criterion, nn.Module)
            with torch.no_grad():
                hessian = output_hessian(outputs, target, loss=criterion, class_dim=-1)
                u = probe.reshape(-1, probe.shape[-1]).to(hessian.diagonal)
                scale = hessian.weight[:, None]
                if getattr(criterion, "reduction", "mean") != "sum":
                    scale = scale / hessian.total_weight
                product = hessian.diagonal * u
                if hessian.root is not None:
                    product = product - hessian.root * (hessian.root * u).sum(dim=1, keepdim=True)
                return product * scale, (scale * u).norm()
        [copy], value = _own_loss(criterion, [outputs], target)
        [gradient] = torch.autograd.grad(value, [copy], create_graph=True)
        product = torch.zeros_like(copy)
        if gradient.requires_grad:
            [product] = torch.autograd.grad(gradient, [copy], probe.to(gradient.dtype), materialize_grads=True)
        return product.detach().reshape(-1, product.shape[-1]), None


def _own_loss(criterion: Criterion, outputs: Sequence[Tensor], target: Target) -> tuple[list[Tensor], Tensor]:
    """Return copies of outputs, and the sum of what is claimed to be their losses, in the graph of the copies."""
    with torch.enable_grad():
        copies = [tensor.detach().clone().requires_grad_() for tensor in outputs]
        if has_closed_form(criterion):
            assert isinstance(criterion, nn.Module)
            values = [criterion_loss(criterion, copy, target)[0] for copy in copies]
        else:
            values = [value_of_callable(criterion, copy, target) for copy in copies]
        return copies, torch.stack(values).sum()


def value_of_callable(loss: Criterion, outputs: Tensor, target: Any) -> Tensor:
    """Return the loss of a batch by a callable.

    Args:
        loss: the callable ``loss(outputs, target)``: it returns the mean over the batch's samples (or their sum, where
            it has an attribute ``reduction="sum"``), or a loss for every sample, which are averaged.
        outputs: what left the layer.
        target: the target.

    Returns:
        The loss, a scalar.
    """
    value: Tensor = loss(outputs, target)
    if value.ndim == 0:
        return value
    return value.sum() if getattr(loss, "reduction", "mean") == "sum" else value.mean()


def _signs(like: Tensor) -> Tensor:
    """Return random signs, always the same, without a number from the run's own generators."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.randint(0, 2, like.shape, generator=generator, device=like.device).float() * 2 - 1


def _products(
    gradients: Sequence[Tensor], outputs: Sequence[Tensor], probes: Sequence[Tensor]
) -> Sequence[Tensor] | None:
    """Return the Hessian's products, or ``None`` where the loss cannot be differentiated twice or hides it."""
    curved = [k for k, gradient in enumerate(gradients) if gradient.requires_grad]
    if not curved:
        return None
    try:
        return torch.autograd.grad(
            [gradients[k] for k in curved],
            outputs,
            [probes[k].to(gradients[k].dtype) for k in curved],
            retain_graph=True,
            materialize_grads=True,
        )
    except RuntimeError:
        return None


def _judge(found: Tensor, expected: Tensor, size: Tensor | None, tolerance: float) -> Verdict:
    """Compare what was found with what was claimed, and say what differs."""
    largest = expected.new_zeros(()) if size is None else size
    norms = torch.stack([found.norm(), expected.norm(), (found - expected).norm(), largest.to(expected)])
    has, claimed, difference, most = norms.tolist()
    if max(has, claimed) < _FLAT * most or max(has, claimed) == 0:
        return Verdict(None, "its curvature is too small to be told from rounding")
    if difference <= tolerance * max(has, claimed):
        return Verdict(True)
    if has == 0:
        return Verdict(False, "it is piecewise linear in them")
    factor = float((found * expected).sum() / expected.square().sum().clamp(min=torch.finfo(found.dtype).tiny))
    if float((found - factor * expected).norm()) <= tolerance * has:
        return Verdict(False, f"its curvature there is {factor:.4g} times that of the named loss")
    shares = expected.abs().amax(dim=1)
    silent = (found.abs().amax(dim=1) == 0) & (shares > _FLAT * shares.max())
    if bool(silent.any()):
        count = f"{int(silent.sum())} of {len(silent)}"
        return Verdict(False, f"{count} rows have no share in it (masked, shifted or left out)")
    return Verdict(
        False,
        f"its curvature there differs by {difference / max(has, claimed):.0%} (another criterion, weights or scale of "
        "the outputs, or another layer between them and the loss)",
    )


def _judge_gradients(
    gradients: Sequence[Tensor], outputs: Sequence[Tensor], target: Target, criterion: Criterion, tolerance: float
) -> Verdict:
    """Compare the loss's gradient at the outputs with the criterion's own."""
    copies, own = _own_loss(criterion, outputs, target)
    claimed = torch.autograd.grad(own, copies)
    found = torch.cat([gradient.detach().flatten().float() for gradient in gradients])
    expected = torch.cat([gradient.flatten().float() for gradient in claimed])
    difference, size = torch.stack([(found - expected).norm(), torch.maximum(found.norm(), expected.norm())]).tolist()
    return _judge_difference(difference, size, tolerance, "it has no second derivatives")


def _judge_difference(difference: float, size: float, tolerance: float, why: str) -> Verdict:
    """Say what a difference of gradients means beside their size, and why they were compared."""
    if size == 0:
        return Verdict(None, "its gradient is 0")
    if difference <= tolerance * size:
        return Verdict(True)
    return Verdict(False, f"its gradient there differs by {difference / size:.0%}, and {why}")


def _judge_large(
    loss: Tensor, outputs: Sequence[Tensor], target: Target, criterion: nn.CrossEntropyLoss, tolerance: float
) -> Verdict:
    """Compare what rows weigh, or else gradients, a block of rows at a time; no array is added to the loss's own."""
    batches = [read_batch(criterion, tensor.detach(), target) for tensor in outputs]
    means = criterion.reduction != "sum"
    try:
        recognised = recognise(loss, outputs, [])
        if recognised is not None:
            if recognised.kind != "softmax":
                return Verdict(False, "it is another criterion of them")
            found = torch.cat([factor.detach().flatten() for factor in recognised.factors])
            expected = torch.cat([batch.weight / batch.total_weight if means else batch.weight for batch in batches])
            return _judge(found.to(expected)[:, None], expected[:, None], None, tolerance)
        if not all(batch.targets for batch in batches):
            return Verdict(None, "its gradient tells nothing without a target")
        gradients = torch.autograd.grad(loss, outputs, retain_graph=True, materialize_grads=True)
    except RuntimeError:  # compiled with buffers that a backward pass gives away
        return _NO_GRADIENT
    sums: list[Tensor] = []
    for gradient, batch in zip(gradients, batches, strict=True):
        [whole], dtype = batch.targets, batch.weight.dtype
        options: Any = {"ignore_index": criterion.ignore_index, "label_smoothing": criterion.label_smoothing}
        options["weight"] = None if criterion.weight is None else criterion.weight.to(batch.weight)
        rows = max(1, BLOCK // max(1, batch.outputs.shape[1]))
        for start in range(0, len(batch.outputs), rows):
            part = slice(start, start + rows)
            with full_precision(loss), torch.enable_grad():
                copy = batch.outputs[part].to(dtype, copy=True).requires_grad_()
                labels = whole[part].to(dtype) if whole.is_floating_point() else whole[part]
                value = nn.functional.cross_entropy(copy, labels, reduction="sum", **options)
                [own] = torch.autograd.grad(value / batch.total_weight if means else value, copy)
            found = gradient.reshape(batch.outputs.shape)[part].to(own)
            sums.append(torch.stack([(found - own).square().sum(), found.square().sum(), own.square().sum()]))
    difference, has, claimed = torch.stack(sums).sum(dim=0).sqrt().tolist()
    why = "its outputs are too many for second derivatives"
    return _judge_difference(difference, max(has, claimed), tolerance, why)


# Outputs of a block whose gradients are compared.
BLOCK = 1 << 22
