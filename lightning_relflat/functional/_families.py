"""The passes through each of several layers, and their joint Hessian products."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lightning_relflat.functional._linear_map import LayerUse
from lightning_relflat.functional._meeting import Apart
from lightning_relflat.functional._probes import Measure, Push, all_directions, draw
from lightning_relflat.functional._products import hessian_products

_MOST_PRODUCTS = 10_000


@dataclasses.dataclass
class Family:
    """The passes through one layer on which the loss depends."""

    live: list[LayerUse]
    gradients: list[Tensor]
    apart: Apart
    measure: Measure
    normalize_features: bool
    through_hessian: bool

    @cached_property
    def uses(self) -> list[LayerUse]:
        """The passes as the value depends on them: with features that count as constants if the Hessian does."""
        if self.through_hessian:
            return self.live
        return [dataclasses.replace(use, features=use.features.detach()) for use in self.live]

    @property
    def probed(self) -> list[LayerUse]:
        """The passes whose directions are differentiated, where the features of one come from another's outputs."""
        return self.live if self.apart.chained else self.uses

    def _alone(self, k: int) -> bool:
        return self.apart.passes and all(self.apart.rows[k])

    def draw(self, generator: torch.Generator | None) -> list[tuple[Push, Push]]:
        """Draw an A for every pass, the same where passes meet."""
        pushes: list[Push] = []
        for k, use in enumerate(self.uses):
            if pushes and not self.apart.passes:
                pushes.append(pushes[0])
            else:
                pushes.append(
                    draw(use, self.apart.rows[k], alone=self.apart.passes, measure=self.measure, generator=generator)
                )
        return [(push, push) for push in pushes]

    def all_directions(self) -> tuple[int, Iterator[list[tuple[Push, Push] | None]]]:
        """Return the number of products of the exact form, and for each the directions of every pass."""
        kinds = list(range(len(self.uses))) if self.apart.passes else [0]
        if self.apart.passes and all(map(self._alone, kinds)):
            kinds = [0]  # nothing meets: one product serves all passes
        joint = len(kinds) == 1
        each = [
            all_directions(self.uses[k], self.apart.rows[k], alone=self.apart.passes, measure=self.measure)
            for k in kinds
        ]

        def directions() -> Iterator[list[tuple[Push, Push] | None]]:
            for k, (_, pairs) in zip(kinds, each, strict=True):
                for pair in pairs:
                    yield [pair if joint or other == k else None for other in range(len(self.uses))]

        return sum(count for count, _ in each), directions()

    def directions(self, k: int, pair: tuple[Push, Push] | None) -> tuple[Tensor, Tensor]:
        """Return what of a pass is multiplied by the Hessian, and what with the product."""
        use, probed = self.uses[k], self.probed[k]
        if pair is None:
            zeros = torch.zeros_like(use.outputs, dtype=use.weight.dtype)
            return zeros, zeros
        # What one pass's features owe to another's outputs is differentiated even where the value is not.
        with torch.set_grad_enabled(torch.is_grad_enabled() or self.apart.chained):
            probe = self.direction(k, pair[0], probed)
        same = pair[0] is pair[1]
        along = probe if same and probed is use else self.direction(k, pair[1], use)
        # The gradient of uᵀHu with H held constant is 2Hu; that of ⟨WWᵀe_s, He_s⟩ is whole as it is.
        return probe, 2 * along - along.detach() if same and not self.through_hessian else along

    def direction(self, k: int, push: Push, use: LayerUse) -> Tensor:
        """Return a pass's direction; with unit rows where features are normalised and rows meet."""
        values = push(use)
        if not self.normalize_features or self._alone(k):
            return values
        squares = use.squared_norms()
        present = squares > 0
        scale = torch.where(present, squares, 1).rsqrt() * present
        return use.like_outputs(use.by_group(values) * scale[..., None])

    def parts(self, k: int, products: Tensor) -> Tensor:
        """Return the samples' parts from the products of directions and curvatures."""
        use = self.uses[k]
        values = use.by_group(products).sum(dim=-1)
        if self._alone(k) and not self.normalize_features:
            values = values * use.squared_norms()
        if self.measure == "trace":
            values = use.times_group(values, use.matrices.square().sum(dim=(1, 2)))
        return use.per_sample(values)


def joint_parts(
    families: Sequence[Family], probes: int | None, generator: torch.Generator | None, through_hessian: bool
) -> list[Tensor]:
    """Return for every pass of every family its parts, stacked over the products.

    Args:
        families: the layers.
        probes: how many random probes, or ``None`` for all products.
        generator: where the probes come from.
        through_hessian: whether gradients flow through the Hessian.

    Returns:
        A tensor of shape (products, samples...) for every pass, in order.

    Raises:
        ValueError: if all products would be too many.
    """
    if not families:
        return []
    differentiable = through_hessian and torch.is_grad_enabled()
    collected: list[list[Tensor]] = [[] for family in families for _ in family.uses]
    for pairs in _directions(families, probes, generator):
        probed, alongs, roots, weights = [], [], [], []
        for family, own in zip(families, pairs, strict=True):
            for k, pair in enumerate(own):
                probe, along = family.directions(k, pair)
                probed.append(probe)
                alongs.append(along)
        rest = iter(probed)
        for family in families:
            mine = [next(rest) for _ in family.uses]
            roots += family.gradients
            weights += mine
            if family.apart.chained:
                # Once for the features' change with the outputs before, once for that of ∂L/∂Z with the weight.
                roots += mine
                weights += [
                    2 * gradient.to(probe.dtype) for gradient, probe in zip(family.gradients, mine, strict=True)
                ]
        outputs = [use.outputs for family in families for use in family.uses]
        curvatures = hessian_products(roots, outputs, weights, differentiable=differentiable)
        places = [(family, k) for family in families for k in range(len(family.uses))]
        for into, (family, k), along, curvature in zip(collected, places, alongs, curvatures, strict=True):
            into.append(family.parts(k, along * curvature.to(along.dtype)))
    return [torch.stack(values) for values in collected]


def _directions(
    families: Sequence[Family], probes: int | None, generator: torch.Generator | None
) -> Iterator[list[list[tuple[Push, Push] | None]]]:
    """Yield for every product what each pass of each family is probed with."""
    if probes is not None:
        for _ in range(probes):
            yield [list(family.draw(generator)) for family in families]
        return
    exact = [family.all_directions() for family in families]
    total = sum(count for count, _ in exact)
    if total > _MOST_PRODUCTS:
        raise ValueError(
            f"Expected argument `probes` to be an integer where the exact form takes {total:,} Hessian products, more "
            f"than {_MOST_PRODUCTS:,}, but got None."
        )
    for number, (_, directions) in enumerate(exact):
        for own in directions:
            yield [own if other == number else [None] * len(family.uses) for other, family in enumerate(families)]
