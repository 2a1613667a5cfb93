"""How the rows that share a weight meet behind it: seen in the graph of the loss, not assumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lightning_relflat.functional._graph import reaches
from lightning_relflat.functional._linear_map import ConvolutionUse
from lightning_relflat.functional._second_derivatives import naming_the_cause


class Rows(Protocol):
    """What left a layer, or stands in for it, and which of its dimensions index rows."""

    @property
    def features(self) -> Tensor:
        """What entered."""

    @property
    def outputs(self) -> Tensor:
        """What left."""

    @property
    def row_dims(self) -> tuple[int, ...]:
        """The dimensions of the outputs that index rows."""


@dataclass(frozen=True)
class Apart:
    """What stays apart behind a layer: no product of the Hessian leads from one to the other.

    Attributes:
        passes: whether the passes through the layer do; ``True`` for a single one.
        rows: for each pass, whether rows that differ along a dimension do, for every dimension of rows.
        flat: whether the loss is piecewise linear in the outputs, so that there is no curvature at all.
        chained: whether features of one pass come from outputs of another.
    """

    passes: bool
    rows: tuple[tuple[bool, ...], ...]
    flat: bool = False
    chained: bool = False


def look(gradients: Sequence[Tensor], uses: Sequence[Rows]) -> Apart:
    """See what stays apart behind a layer.

    NaN is put on some of the rows, and the product of the Hessian with it looked at: where it is NaN, an operation
    leads there, even if the numbers that it multiplies by happen to be 0 now (a branch whose last weight begins at 0).
    So what counts as apart stays apart as long as the operations do; but what a mask shuts for every row that is
    looked at, as a ReLU that is dead for the whole batch, is not seen. One product for each bit of an index tells
    every pair of indices of a dimension apart. Reads the device once for each product.

    Args:
        gradients: of the loss with respect to the outputs of each use, in their graph.
        uses: the passes through the layer.

    Returns:
        What stays apart.
    """
    chained = len(uses) > 1 and reaches([use.features for use in uses], [use.outputs for use in uses])
    if not chained and not _spreads(gradients, uses, [torch.ones((), dtype=torch.bool)] * len(uses), within=True):
        return Apart(True, tuple((True,) * len(use.row_dims) for use in uses), flat=True)
    passes = len(uses) == 1 or not (
        chained
        or any(
            _spreads(gradients, uses, [torch.tensor(bool(k >> bit & 1)) for k in range(len(uses))])
            for bit in range((len(uses) - 1).bit_length())
        )
    )
    shapes = {tuple(use.outputs.shape[dim] for dim in use.row_dims) for use in uses}
    if not passes and len(shapes) > 1:
        return Apart(passes, tuple((False,) * len(use.row_dims) for use in uses), chained=chained)
    dims = max(len(use.row_dims) for use in uses)
    apart = [_apart_along(gradients, uses, position, chained=chained) for position in range(dims)]
    return Apart(passes, tuple(tuple(apart[: len(use.row_dims)]) for use in uses), chained=chained)


def still_holds(apart: Apart, gradients: Sequence[Tensor], uses: Sequence[Rows]) -> bool:
    """Check with a few products what was seen with other sizes: the lowest and the highest bit of every index.

    Args:
        apart: what was seen.
        gradients: as for :func:`look`.
        uses: as for :func:`look`.

    Returns:
        Whether nothing speaks against it.
    """
    if len(apart.rows) != len(uses) or apart.flat:
        return False
    if any(len(rows) != len(use.row_dims) for rows, use in zip(apart.rows, uses, strict=True)):
        return False
    positions = [k for k in range(max(map(len, apart.rows))) if all(rows[k] for rows in apart.rows if k < len(rows))]
    return all(_apart_along(gradients, uses, position, chained=apart.chained, ends_only=True) for position in positions)


def _apart_along(
    gradients: Sequence[Tensor], uses: Sequence[Rows], position: int, *, chained: bool, ends_only: bool = False
) -> bool:
    """Return whether rows of different indices along a dimension of rows stay apart, in all uses that have it."""
    if chained and (position > 0 and any(isinstance(use, ConvolutionUse) for use in uses)):
        return False  # positions of a kernel that runs over its own outputs
    sizes = [use.outputs.shape[use.row_dims[position]] if position < len(use.row_dims) else 1 for use in uses]
    bits = range((max(sizes) - 1).bit_length())
    for bit in sorted({*bits[:1], *bits[-1:]}) if ends_only else bits:
        marks = [_marked(use.outputs, use.row_dims[position : position + 1], bit) for use in uses]
        if _spreads(gradients, uses, marks):
            return False
        if chained:
            marked = [_marked(use.features, use.row_dims[position : position + 1], bit) for use in uses]
            if _spreads([use.features for use in uses], uses, marks, marked=marked):
                return False
    return True


def _marked(tensor: Tensor, dims: tuple[int, ...], bit: int) -> Tensor:
    """Mark the indices along a dimension in which a bit is set; nothing where there is no such dimension."""
    shape = [1] * tensor.ndim
    for dim in dims:
        shape[dim] = tensor.shape[dim]
    return (torch.arange(max(shape, default=1)) >> bit & 1).bool().reshape(shape) if dims else torch.tensor(False)


def _spreads(
    roots: Sequence[Tensor],
    uses: Sequence[Rows],
    marks: Sequence[Tensor],
    *,
    marked: Sequence[Tensor] | None = None,
    within: bool = False,
) -> bool:
    """Return whether NaN on the marked rows comes out on others, or ``within`` on any.

    ``marked`` are the marks on the roots where these are not like the outputs.
    """
    curved = [k for k, root in enumerate(roots) if root.requires_grad]
    if not curved:
        return False
    outputs = [use.outputs for use in uses]
    probes = [
        torch.zeros_like(roots[k]).masked_fill((marked or marks)[k].to(roots[k].device), float("nan")) for k in curved
    ]
    with naming_the_cause(), torch.autograd.set_detect_anomaly(False):
        products: Sequence[Tensor | None] = torch.autograd.grad(
            [roots[k] for k in curved], outputs, probes, retain_graph=True, allow_unused=True
        )
    found = [
        (product.isnan() if within else product.isnan() & ~mark.to(product.device)).any()
        for product, mark in zip(products, marks, strict=True)
        if product is not None
    ]
    return bool(found) and bool(torch.stack(found).any())


class Looker:
    """Remembers how rows meet, so that it is looked for once, and again when sizes or modes change.

    A new mode or number of dimensions is looked at with all products, new sizes alone with a few. What was once seen to
    meet counts as meeting from then on, which is right at any time and only costs variance.
    """

    def __init__(self) -> None:
        self._seen: dict[object, Apart] = {}
        self._kinds: dict[object, Apart] = {}
        self._stale: set[object] = set()
        self.last: Apart | None = None  # what was last asked about

    def look_again(self) -> None:
        """Look anew, with all products, whenever next asked."""
        self._seen = {}
        self._stale = set(self._kinds)

    def apart(self, mode: object, gradients: Sequence[Tensor], uses: Sequence[Rows]) -> Apart:
        """Return what stays apart.

        Args:
            mode: anything hashable that stands for how the model computes, as whether it trains.
            gradients: as for :func:`look`.
            uses: as for :func:`look`.

        Returns:
            What stays apart.
        """
        sizes = (mode, *(use.outputs.shape for use in uses))
        # That a loss is flat may be owed to a mask that is shut now: it is looked at each time, with one product.
        if sizes not in self._seen or self._seen[sizes].flat:
            kind = (mode, *(use.outputs.ndim for use in uses))
            known = self._kinds.get(kind)
            if known is None or kind in self._stale or not still_holds(known, gradients, uses):
                found = look(gradients, uses)
                known = self._kinds[kind] = found if known is None else _both(known, found)
                self._stale.discard(kind)
            self._seen[sizes] = known
        self.last = self._seen[sizes]
        return self.last


def _both(known: Apart, found: Apart) -> Apart:
    """Return what stays apart by two looks; flat is what the later one says."""
    rows = tuple(
        tuple(a and b for a, b in zip(one, other, strict=True))
        for one, other in zip(known.rows, found.rows, strict=True)
    )
    return Apart(known.passes and found.passes, rows, found.flat, known.chained or found.chained)
