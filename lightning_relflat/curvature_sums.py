"""κ of a batch as sums that add up over batches and processes. Needs torch alone.

All of them are float64 vectors (Σ_b t_b κ_b, Σ_b t_b, variance of the first, squares of the variance's terms), where t
is what a batch weighs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat._batch import copied
from lightning_relflat._behind import Behind
from lightning_relflat._layer_hook import LayerRecord
from lightning_relflat.claims import Criterion, value_of_callable
from lightning_relflat.curvature import Trying, exact_parts
from lightning_relflat.functional._checks import (
    check_count,
    check_floating,
    check_probes,
    ordinary,
    shape_of,
    sum_of,
)
from lightning_relflat.functional._divisor import mean_divisor
from lightning_relflat.functional._errors import independent, missing, moments
from lightning_relflat.functional._linear_map import LayerUse, as_use
from lightning_relflat.functional._meeting import Looker
from lightning_relflat.functional.layer_flatness import flatness_of_layers, own_probe_seed
from lightning_relflat.functional.relative_flatness import relative_flatness_sums


class Probes:
    """Random probes for the κ of one layer, numbered so that a run draws the same ones again.

    Args:
        probes: how many for a batch; ``None`` takes all products that there are.
        seed: where they start; processes draw different ones.

    Attributes:
        batches: numbers the probes.
        before: how many batches there were since sums began.
        parts: the parts of the rows in the last loss's κ, for each pass, where that was recognised.
        total: how many rows there were then.

    Raises:
        ValueError: if ``probes`` is no integer of at least 2 nor ``None``, or ``seed`` none of at least 0.
    """

    def __init__(self, probes: int | None, seed: int) -> None:
        check_probes(probes)
        if probes == 1:
            raise ValueError("Expected argument `probes` to be an integer of at least 2, or None, but got 1.")
        self.probes = probes
        self.seed = check_count("seed", seed, at_least=0)
        self.batches = self.before = 0
        self.looker = Looker()
        self.parts: list[Tensor] | None = None
        self.total: Tensor | None = None
        self.trying = Trying()

    @property
    def exact(self) -> bool:
        """Whether the last loss was recognised."""
        return self.parts is not None

    @property
    def flat(self) -> bool:
        """Whether the loss last measured is piecewise linear in the outputs, so that its κ is 0."""
        return self.looker.last is not None and self.looker.last.flat

    @property
    def are_apart(self) -> bool:
        """Whether rows stayed apart in the loss last measured."""
        return self.looker.last is not None and self.looker.last.any_rows

    def begin(self) -> None:
        """Begin new sums; how rows meet is looked for anew."""
        self.before = 0
        self.trying = Trying()
        self.looker.look_again()

    def sums(self, loss: Tensor, uses: Sequence[LayerUse], mode: object = None) -> Tensor | None:
        """Return κ of a loss, its variance over the probes, and the squares of the variance's terms.

        Args:
            loss: the loss.
            uses: the passes through the layer.
            mode: as for :func:`~lightning_relflat.functional.layer_flatness.flatness_of_layers`.

        Returns:
            Three numbers, as :func:`~lightning_relflat.functional._errors.moments` has them; ``None`` if the loss does
            not depend on the layer.
        """
        generator = torch.Generator(loss.device).manual_seed(own_probe_seed(self.seed, self.batches))

        def draw(probes: int | None) -> Tensor | None:
            parts = flatness_of_layers(
                loss, [list(uses)], lookers=[self.looker], mode=mode, probes=probes, generator=generator
            )
            [estimates] = independent(parts, [self.looker.last if any(p is not None for p in parts[0]) else None])
            return estimates

        with torch.no_grad():
            estimates = draw(self.probes)
            if estimates is None:
                return None
            if self.probes is None:
                return torch.stack([estimates.sum(), *estimates.new_zeros(2)])
            more = missing(estimates, self.before)
            if more:
                others = draw(more)
                estimates = estimates if others is None else torch.cat([estimates, others])
        self.before += 1
        return moments(estimates)


@ordinary()
def sums_of_loss(
    loss: Tensor,
    records: Sequence[LayerRecord],
    probes: Probes,
    *,
    behind: Behind | None = None,
    mode: object = None,
) -> Tensor | None:
    """Return the sums of a batch, from its loss.

    A batch weighs what its loss divides by, where that is seen and its rows do not meet; else as much as its number of
    samples.

    Args:
        loss: the loss, in its graph.
        records: the passes through the layer that it depends on, in their graph.
        probes: for a loss that is not recognised.
        behind: the function mode that has seen what lies between.
        mode: as for :func:`~lightning_relflat.functional.layer_flatness.flatness_of_layers`.

    Returns:
        The sums; ``None`` if the loss does not depend on the passes.
    """
    probes.batches += 1
    if not any(record.outputs.numel() for record in records):  # a process may have a batch of no samples
        return loss.new_zeros(4, dtype=torch.float64)
    recognised = probes.trying.recognise(loss, records)
    if recognised is not None:
        with torch.no_grad():
            probes.parts = exact_parts(recognised, records)
            kappa = sum_of([part.sum(dtype=torch.float64) for part in probes.parts])
            probes.total = recognised.total
        return exactly(kappa * recognised.weight, recognised.weight)
    probes.parts = None
    features = records[0].features
    uses = [as_use(record.layer, record.features, record.outputs, record.weight) for record in records]
    with (behind or Behind()).curvature():
        found = probes.sums(loss, uses, mode)
    if found is None:
        return None
    divisor = mean_divisor(loss, [record.outputs for record in records], apart=probes.are_apart)
    samples = 1 if features.ndim == 1 else len(features)
    return weighted(found, found.new_full((), float(samples)) if divisor is None else divisor)


def sums_of_criterion(
    features: Tensor, weight: Tensor, outputs: Tensor, target: Any, criterion: nn.Module, *, class_dim: int | None = -1
) -> Tensor:
    """Return the sums of a batch, exactly, from a criterion with a closed form.

    Args:
        features: as for :func:`~lightning_relflat.functional.relative_flatness`.
        weight: as there.
        outputs: as there.
        target: as there.
        criterion: the criterion.
        class_dim: as there.

    Returns:
        The sums. A batch weighs what the criterion's mean divides by.
    """
    with torch.no_grad():
        value, total = relative_flatness_sums(features, weight, outputs, target, loss=criterion, class_dim=class_dim)
    return exactly(value, total)


def sums_of_callable(
    features: Tensor, weight: Tensor, outputs: Tensor, target: Any, loss: Criterion, probes: Probes
) -> Tensor:
    """Return the sums of a batch, by random probes, from a callable of outputs and target.

    Args:
        features: what entered the layer, of shape (..., m).
        weight: its weight, of shape (d, m).
        outputs: what left it, of shape (..., d).
        target: the callable's second argument.
        loss: the callable, as for :func:`~lightning_relflat.claims.value_of_callable`.
        probes: the probes.

    Returns:
        The sums. A batch weighs what its loss divides by, as for :func:`sums_of_loss`; else as much as it has rows.

    Raises:
        TypeError: if features, weight or outputs are no floating point numbers.
        ValueError: if shapes do not fit.
    """
    for name, value in (("features", features), ("weight", weight), ("outputs", outputs)):
        check_floating(name, value)
    if outputs.shape != (*features.shape[:-1], len(weight)) or features.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            "Expected arguments `features`, `weight` and `outputs` to be of shapes (..., m), (d, m) and (..., d), "
            f"but got {shape_of(features)}, {shape_of(weight)} and {shape_of(outputs)}."
        )
    # Lightning validates under inference mode, whose tensors no graph may hold: leave it, and copy.
    with torch.inference_mode(False), torch.enable_grad():
        features, weight, target = copied(features), copied(weight), copied(target)
        with Behind() as behind:
            outputs = behind.begin(copied(outputs).requires_grad_())
            value = value_of_callable(loss, outputs, target)
        with behind.curvature():
            found = probes.sums(value, [as_use(None, features, outputs, weight)])
        if found is None:
            raise ValueError("Expected argument `loss` to depend on the outputs, but got one that does not.")
        divisor = mean_divisor(value, [outputs], apart=probes.are_apart)
    probes.batches += 1
    samples = found.new_full((), float(features.shape[:-1].numel())) if divisor is None else divisor.to(found)
    if getattr(loss, "reduction", "mean") == "sum":
        return torch.stack([found[0], samples, *found[1:]])
    return weighted(found, samples)


def exactly(value: Tensor, weight: Tensor) -> Tensor:
    """Return the sums of a batch whose κ is exact.

    Args:
        value: κ times the batch's weight.
        weight: the weight.

    Returns:
        The sums.
    """
    return F.pad(torch.stack([value.double(), weight.double()]), (0, 2))


def weighted(found: Tensor, weight: Tensor) -> Tensor:
    """Return the sums of a batch from its κ and its weight.

    Args:
        found: κ, its variance and the squares of the variance's terms.
        weight: the weight.

    Returns:
        The sums.
    """
    kappa, variance, square = found.double()
    weight = weight.to(kappa)
    return torch.stack([kappa * weight, weight, variance * weight**2, square * weight**4])


def of_one_batch(sums: Sequence[Tensor]) -> Tensor:
    """Return the sums of a batch from those of its losses: their κ add up, and the batch has one weight.

    Args:
        sums: of the losses, each with the weight of the batch.

    Returns:
        The sums.
    """
    if len(sums) == 1:
        return sums[0]
    stacked = torch.stack(list(sums))
    scale = torch.where(stacked[:, 1] == 0, 1, stacked[0, 1] / stacked[:, 1])
    return (stacked * torch.stack([scale, scale / len(stacked), scale**2, scale**4], dim=1)).sum(dim=0)
