"""Which curvature it is: of a loss in its graph, or of a criterion or callable of a layer's outputs and a target.

A loss in its graph gives the curvature in closed form where that graph is one of a known criterion, and random probes
through whatever follows the layer elsewhere. Needs torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_relflat._head_calls import parts_of_call, shares_of_calls
from lightning_relflat._layer_hook import LayerRecord
from lightning_relflat.claims import Criterion
from lightning_relflat.functional._checks import (
    compute_dtype,
    plain,
)
from lightning_relflat.functional._probes import Measure
from lightning_relflat.functional._recognised import Recognised, recognise, recognise_cross_entropy
from lightning_relflat.functional._weights import has_matrix
from lightning_relflat.functional.criteria import has_closed_form, owned_criterion
from lightning_relflat.functional.output_hessian import OutputHessian
from lightning_relflat.functional.relative_flatness import (
    flatness_through,
    softmax_parts,
)

Loss: TypeAlias = "str | Criterion"


def read_loss(loss: object) -> Criterion:
    """Return what an argument ``loss`` means.

    Args:
        loss: the name of a criterion, a criterion of ``torch.nn``, or a callable ``loss(outputs, target)``.

    Returns:
        A copy of the criterion, for those who move it to a device, or the callable.

    Raises:
        ValueError: if it is neither known nor callable, or reduces to neither a mean nor a sum.
    """
    if callable(loss) and not isinstance(loss, type) and not has_closed_form(loss):
        return loss
    return owned_criterion(loss)


def recognise_passes(loss: Tensor, records: Sequence[LayerRecord]) -> Recognised | None:
    """Return the curvature of a loss at a linear layer's outputs in closed form, where its graph says what it is.

    Args:
        loss: a loss.
        records: the passes through the layer that it depends on, in their graph.

    Returns:
        The curvature; ``None`` where it is not recognised, and for a convolution.
    """
    if not records or not has_matrix(records[0].layer):
        return None
    called = [record for record in records if record.call is not None]
    passed = [record for record in records if record.call is None]
    outputs, features = [record.outputs for record in passed], [record.features for record in passed]
    if not called:
        return recognise(loss, outputs, features)
    shares, total = shares_of_calls(loss, called)
    if not passed:
        return Recognised("softmax", tuple(shares), total)
    others = recognise(loss, outputs, features)
    if others is None or others.kind != "softmax":
        raise RuntimeError(
            "The layer's weight went into `linear_cross_entropy`, and the loss depends on its outputs too, in a way "
            "that is not recognised as a cross-entropy. Then its curvature cannot be had."
        )
    own, other = iter(shares), iter(others.factors)
    factors = tuple(next(own if record.call is not None else other) for record in records)
    return Recognised("softmax", factors, total + others.total)


def exact_parts(
    recognised: Recognised,
    records: Sequence[LayerRecord],
    *,
    through_hessian: bool = True,
    measure: Measure = "relative_flatness",
    normalize_features: bool = False,
    probes: int | None = None,
    generator: torch.Generator | None = None,
) -> list[Tensor]:
    r"""Return the part of every row in κ of a linear layer, exactly unless probes are given, differentiable.

    .. math:: κ = \sum_p ‖φ_p‖^2 \operatorname{Tr}(W^⊤ A_p W)

    with A_p the Hessian at row p of the outputs.

    Args:
        recognised: that Hessian.
        records: the passes that it was recognised at.
        through_hessian: as for :func:`~lightning_relflat.functional.layer_flatness`.
        measure: as for :func:`~lightning_relflat.functional.relative_flatness`.
        normalize_features: as there.
        probes: as there; for a softmax.
        generator: as there.

    Returns:
        For each pass the parts, of shape (rows,); of one that went into ``linear_cross_entropy`` and is differentiated
        their sum, of shape (1,).

    Raises:
        RuntimeError: if another measure is asked for of a pass that went into ``linear_cross_entropy``.
    """
    parts = []
    for record, factor in zip(records, recognised.factors, strict=True):
        if record.call is not None:
            if measure != "relative_flatness":
                raise RuntimeError(
                    "Expected argument `measure` to be 'relative_flatness' where the layer's weight goes into "
                    f"`linear_cross_entropy`, which never makes its outputs, but got {measure!r}."
                )
            shared: Any = {"probes": probes, "generator": generator, "normalize_features": normalize_features}
            parts.append(parts_of_call(record, factor, through_hessian=through_hessian, **shared))
            continue
        features, outputs, factor = (
            value if through_hessian else value.detach() for value in (record.features, record.outputs, factor)
        )
        dtype = compute_dtype(features, record.weight, outputs)
        rows = plain(outputs).reshape(-1, outputs.shape[-1])
        if recognised.kind == "softmax":
            shares = factor.flatten().to(dtype)
            counted = None if recognised.all_count else shares != 0
            if measure == "relative_flatness":
                parts.append(
                    softmax_parts(
                        features,
                        record.weight,
                        rows,
                        shares,
                        counted,
                        recognised.log_p,
                        normalize_features=normalize_features,
                        probes=probes,
                        generator=generator,
                    )
                )
                continue
            p = rows.to(dtype).softmax(dim=1)
            hessian = OutputHessian(p, p, shares, shares.sum(), annihilates_constants=True, counted=counted)
        else:
            rows = rows.to(dtype)
            diagonal = factor.reshape(rows.shape).to(dtype)
            if recognised.kind == "sigmoid":
                diagonal = diagonal * rows.sigmoid() * (-rows).sigmoid()
            ones = diagonal.new_ones(len(rows))
            hessian = OutputHessian(diagonal, None, ones, ones.sum())
        flat = features.reshape(len(rows), -1).to(dtype)
        parts.append(
            flatness_through(
                hessian, flat, record.weight.to(dtype), measure=measure, normalize_features=normalize_features
            )
        )
    return parts


def plainly_exact(
    loss: Tensor,
    records: Sequence[LayerRecord],
    *,
    through_hessian: bool = True,
    measure: Measure = "relative_flatness",
    normalize_features: bool = False,
) -> Tensor | None:
    """Return κ of a linear layer where the loss is PyTorch's own cross-entropy of its outputs and nothing else.

    The most frequent case, and the cheapest to tell.

    Args:
        loss: a loss.
        records: passes through the layer, in their graph.
        through_hessian: as for :func:`exact_parts`.
        measure: as there.
        normalize_features: as there.

    Returns:
        κ, differentiable; ``None`` if the loss is another.
    """
    if len(records) != 1 or records[0].call is not None or not has_matrix(records[0].layer):
        return None
    recognised = recognise_cross_entropy(loss, records[0].outputs)
    if recognised is None:
        return None
    options: Any = {"measure": measure, "normalize_features": normalize_features}
    [parts] = exact_parts(recognised, records, through_hessian=through_hessian, **options)
    return parts.sum()


class Trying:
    """Whether it is worth while to look if a loss is recognised: walking its graph takes time.

    As long as a loss was recognised before, or few were not.
    """

    def __init__(self) -> None:
        self._found = False
        self._misses = 0

    def recognise(self, loss: Tensor, records: Sequence[LayerRecord]) -> Recognised | None:
        """Return :func:`recognise_passes`, or ``None`` if it is not worth while.

        Args:
            loss: as there.
            records: as there.

        Returns:
            What it returns.
        """
        called = any(record.call is not None for record in records)
        if not self._found and self._misses >= _MISSES and not called:
            return None
        recognised = recognise_passes(loss, records)
        self._found |= recognised is not None
        self._misses += recognised is None
        return recognised


_MISSES = 3
