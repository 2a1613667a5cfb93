"""How the rows that share a weight meet behind it: seen in the graph of the loss, not assumed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node

from lightning_relflat.functional._checks import is_open
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

    @property
    def any_rows(self) -> bool:
        """Whether rows stay apart along some dimension, so that the loss may be a sum over them."""
        return any(any(rows) for rows in self.rows)


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
    apart = [_apart_along(gradients, uses, position, _by_bits, chained=chained) for position in range(dims)]
    return Apart(passes, tuple(tuple(apart[: len(use.row_dims)]) for use in uses), chained=chained)


def still_holds(apart: Apart, gradients: Sequence[Tensor], uses: Sequence[Rows], halves: _Halves | None = None) -> bool:
    """Check with a few products what was seen before.

    Args:
        apart: what was seen.
        gradients: as for :func:`look`.
        uses: as for :func:`look`.
        halves: of how many indices, which to tell from the others; if left out, those with the lowest bit and those
            with the highest.

    Returns:
        Whether nothing speaks against it.
    """
    halves = halves or _by_ends
    if len(apart.rows) != len(uses) or apart.flat:
        return False
    if any(len(rows) != len(use.row_dims) for rows, use in zip(apart.rows, uses, strict=True)):
        return False
    positions = [k for k in range(max(map(len, apart.rows))) if all(rows[k] for rows in apart.rows if k < len(rows))]
    if apart.passes and len(uses) > 1 and halves is not _by_ends:
        for half in halves(len(uses)):
            if _spreads(gradients, uses, list(half)):
                return False
    return all(_apart_along(gradients, uses, position, halves, chained=apart.chained) for position in positions)


# Of how many indices, which to tell from the others, one product for each.
_Halves: TypeAlias = Callable[[int], list[Tensor]]


def _by_bits(size: int) -> list[Tensor]:
    """Return the indices that have each of the bits: they tell every pair apart."""
    return [(torch.arange(size) >> bit & 1).bool() for bit in range((size - 1).bit_length())]


def _by_ends(size: int) -> list[Tensor]:
    """Return those that have the lowest bit, and those that have the highest."""
    found = _by_bits(size)
    return found if len(found) < 2 else [found[0], found[-1]]


def _apart_along(
    gradients: Sequence[Tensor], uses: Sequence[Rows], position: int, halves: _Halves, *, chained: bool
) -> bool:
    """Return whether rows of different indices along a dimension of rows stay apart, in all uses that have it."""
    if chained and (position > 0 and any(isinstance(use, ConvolutionUse) for use in uses)):
        return False  # positions of a kernel that runs over its own outputs
    sizes = [use.outputs.shape[use.row_dims[position]] if position < len(use.row_dims) else 1 for use in uses]
    for half in halves(max(sizes)) if max(sizes) > 1 else []:
        marks = [_marked(use.outputs, use.row_dims[position : position + 1], half) for use in uses]
        if _spreads(gradients, uses, marks):
            return False
        if chained:
            marked = [_marked(use.features, use.row_dims[position : position + 1], half) for use in uses]
            if _spreads([use.features for use in uses], uses, marks, marked=marked):
                return False
    return True


def _marked(tensor: Tensor, dims: tuple[int, ...], half: Tensor) -> Tensor:
    """Mark some of the indices along a dimension; nothing where there is no such dimension."""
    shape = [1] * tensor.ndim
    for dim in dims:
        shape[dim] = tensor.shape[dim]
    return half[: max(shape, default=1)].reshape(shape) if dims else torch.tensor(False)


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


# What takes rows by numbers, which may be others in the next batch: mixup, say, whose rows may all stay in place once.
_TAKES = {
    *("IndexBackward0", "IndexSelectBackward0", "IndexPutBackward0", "IndexAddBackward0", "IndexCopyBackward0"),
    *("ScatterAddBackward0", "ScatterBackward0", "TakeBackward0", "RollBackward0"),
}
# What a tap puts there, in an epoch's first steps for example.
_PASSES_ON = {"CloneBackward0", "DoorBackward"}
_OFTEN = 16


class Looker:
    """Remembers how rows meet, so that it is looked for once, and again when operations, sizes or modes change.

    A new mode, other operations behind the layer or another number of dimensions are looked at with all products, new
    sizes alone with a few. Where operations take rows by number, and nobody has to wait for the answer, one product
    with a random half of the rows is looked at in the first batches, and ever more seldom after them. What was once
    seen to meet counts as meeting from then on, which is right at any time and only costs variance.
    """

    def __init__(self) -> None:
        self._seen: dict[object, Apart] = {}
        self._kinds: dict[object, Apart] = {}
        self._stale: set[object] = set()
        self._asked: dict[object, int] = {}  # how often, where operations take rows by number
        self._generator = torch.Generator().manual_seed(0)
        self.last: Apart | None = None  # what was last asked about

    def look_again(self) -> None:
        """Look anew, with all products, whenever next asked."""
        self._seen, self._asked = {}, {}
        self._stale = set(self._kinds)

    def apart(
        self, mode: object, gradients: Sequence[Tensor], uses: Sequence[Rows], between: Collection[Node] = ()
    ) -> Apart:
        """Return what stays apart.

        Args:
            mode: anything hashable that stands for how the model computes, as whether it trains.
            gradients: as for :func:`look`.
            uses: as for :func:`look`.
            between: the operations between the outputs and the loss.

        Returns:
            What stays apart.
        """
        # The loss of the next step, or the other one of this, may be another.
        names = sorted(name for node in between if (name := node.name()) not in _PASSES_ON)
        mode = (mode, hash(tuple(names)))
        sizes = (mode, *(use.outputs.shape for use in uses))
        known = self._seen.get(sizes)
        # That a loss is flat may be owed to a mask that is shut now: it is looked at each time, with one product.
        if (
            known is None
            or known.flat
            or not (_TAKES.isdisjoint(names) or self._still_holds(sizes, known, gradients, uses))
        ):
            kind = (mode, *(use.outputs.ndim for use in uses))
            new_sizes = known is None
            known = self._kinds.get(kind)
            if known is None or not new_sizes or kind in self._stale or not still_holds(known, gradients, uses):
                found = look(gradients, uses)
                known = self._kinds[kind] = found if known is None else _both(known, found)
                self._stale.discard(kind)
            self._seen[sizes] = known
        self.last = known
        return known

    def _still_holds(self, key: object, known: Apart, gradients: Sequence[Tensor], uses: Sequence[Rows]) -> bool:
        """Check with a random half of the rows, in most steps not at all: it is a product, and is read."""
        if not is_open(*gradients):
            return True
        count = self._asked[key] = self._asked.get(key, 0) + 1
        due = count <= _OFTEN or count & (count - 1) == 0
        return not due or still_holds(known, gradients, uses, self._at_random)

    def _at_random(self, size: int) -> list[Tensor]:
        """Return a random half of the indices."""
        return [torch.rand(size, generator=self._generator) < 0.5]


def _both(known: Apart, found: Apart) -> Apart:
    """Return what stays apart by two looks; flat is what the later one says."""
    rows = tuple(
        tuple(a and b for a, b in zip(one, other, strict=True))
        for one, other in zip(known.rows, found.rows, strict=True)
    )
    return Apart(known.passes and found.passes, rows, found.flat, known.chained or found.chained)
