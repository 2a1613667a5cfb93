"""The curvature of the loss that is trained with, at a layer's outputs: a named criterion is a claim, checked here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_relflat.functional._called_batch import Target
from lightning_relflat.functional._checks import full_precision, ordinary
from lightning_relflat.functional.criteria import criterion_loss
from lightning_relflat.functional.output_hessian import output_hessian

# Relative differences: right claims come to 1e-8 in double precision, wrong ones to 0.028 and more.
_TOLERANCE = 0.01
_TOLERANCE_OF_HALF_PRECISION = 0.05  # right ones 2e-3 under bf16 autocast
# Below this share of the largest curvature that a row's weight allows, nothing can be told from rounding.
_FLAT = 1e-4


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


def check_claim(loss: Tensor, outputs: Sequence[Tensor], target: Target, criterion: nn.Module) -> Verdict:
    r"""Compare the curvature of a loss at some outputs with that of a criterion of each of them and a target.

    Along one random probe: Hu by differentiating the loss twice, beside Au with A = ∇²_z of the criterion in closed
    form. What does not change κ passes: undeclared label smoothing, mixup, auxiliary terms, weight decay. A factor,
    scaled outputs, class weights, masked or shifted positions, a layer further back do not. Where the loss cannot be
    differentiated twice, its gradient is compared with the criterion's. Reads the device.

    Source: the chain rule; the thresholds are from 20 claims about real models.

    Args:
        loss: the loss that is trained with, a scalar.
        outputs: what left the layer in each pass on which the loss depends, of shape (..., d).
        target: what the criterion takes as its target.
        criterion: the criterion claimed.

    Returns:
        The verdict.

    Raises:
        TypeError: as :func:`~lightning_relflat.functional.output_hessian` does.
        ValueError: as :func:`~lightning_relflat.functional.output_hessian` does.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from lightning_relflat.curvature import check_claim
        >>> outputs, target = torch.tensor([[1.0, 0.0], [0.5, 2.0]], requires_grad=True), torch.tensor([0, 1])
        >>> cross_entropy = torch.nn.CrossEntropyLoss()
        >>> check_claim(F.cross_entropy(outputs, target), [outputs], target, cross_entropy).holds
        True
        >>> check_claim(0.3 * F.cross_entropy(outputs, target), [outputs], target, cross_entropy).reason
        'its curvature there is 0.3 times that of the named loss'
    """
    with full_precision(loss), torch.enable_grad(), ordinary():
        try:
            gradients = torch.autograd.grad(loss, outputs, create_graph=True, materialize_grads=True)
        except RuntimeError:  # compiled with buffers that a backward pass gives away
            return Verdict(None, "its gradient cannot be taken before the backward pass")
        probes = [_signs(tensor) for tensor in outputs]
        products = _products(gradients, outputs, probes)
    with torch.no_grad(), full_precision(loss), ordinary():
        found, expected, sizes = [], [], []
        for tensor, probe, product in zip(outputs, probes, products or gradients, strict=True):
            hessian = output_hessian(tensor, target, loss=criterion, class_dim=-1)
            u = probe.reshape(-1, probe.shape[-1]).to(hessian.diagonal)
            scale = hessian.weight[:, None]
            if getattr(criterion, "reduction", "mean") != "sum":
                scale = scale / hessian.total_weight
            au = hessian.diagonal * u
            if hessian.root is not None:
                au = au - hessian.root * (hessian.root * u).sum(dim=1, keepdim=True)
            found.append(product.detach().reshape(u.shape).to(u))
            expected.append(au * scale)
            sizes.append((scale * u).norm())
        half = any(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in outputs)
        tolerance = _TOLERANCE_OF_HALF_PRECISION if half else _TOLERANCE
        if products is None or not torch.cat(found).any():
            return _judge_gradients(gradients, outputs, target, criterion, tolerance)
        return _judge(torch.cat(found), torch.cat(expected), torch.stack(sizes).norm(), tolerance)


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


def _judge(found: Tensor, expected: Tensor, size: Tensor, tolerance: float) -> Verdict:
    """Compare what was found with what was claimed, and say what differs."""
    norms = torch.stack([found.norm(), expected.norm(), (found - expected).norm(), size])
    has, claimed, difference, largest = norms.tolist()
    if max(has, claimed) < _FLAT * largest:
        return Verdict(None, "its curvature is too small to be told from rounding")
    if difference <= tolerance * max(has, claimed):
        return Verdict(True)
    if has == 0:
        return Verdict(False, "it is piecewise linear in them")
    factor = float((found * expected).sum() / expected.square().sum().clamp(min=torch.finfo(found.dtype).tiny))
    if float((found - factor * expected).norm()) <= tolerance * has:
        return Verdict(False, f"its curvature there is {factor:.4g} times that of the named loss")
    silent = (found.abs().amax(dim=1) == 0) & (expected.abs().amax(dim=1) > 0)
    if bool(silent.any()):
        count = f"{int(silent.sum())} of {len(silent)}"
        return Verdict(False, f"{count} rows have no share in it (masked, shifted or left out)")
    return Verdict(
        False,
        f"its curvature there differs by {difference / max(has, claimed):.0%} (another criterion, weights or scale of "
        "the outputs, or another layer between them and the loss)",
    )


def _judge_gradients(
    gradients: Sequence[Tensor], outputs: Sequence[Tensor], target: Target, criterion: nn.Module, tolerance: float
) -> Verdict:
    """Compare the loss's gradient at the outputs with the criterion's own."""
    copies = [tensor.detach().clone().requires_grad_() for tensor in outputs]
    with torch.enable_grad():
        own = torch.stack([criterion_loss(criterion, copy, target)[0] for copy in copies]).sum()
        claimed = torch.autograd.grad(own, copies)
    found = torch.cat([gradient.detach().flatten().float() for gradient in gradients])
    expected = torch.cat([gradient.flatten().float() for gradient in claimed])
    difference, size = torch.stack([(found - expected).norm(), torch.maximum(found.norm(), expected.norm())]).tolist()
    if size == 0:
        return Verdict(None, "its gradient is 0")
    if difference <= tolerance * size:
        return Verdict(True)
    return Verdict(False, f"its gradient there differs by {difference / size:.0%}, and it has no second derivatives")
