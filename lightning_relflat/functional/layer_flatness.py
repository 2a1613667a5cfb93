"""Relative flatness κ of any linear or convolution layer in any loss, by its definition."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from lightning_relflat.functional._checks import (
    check_floating,
    check_probes,
    check_scalar_in_graph,
    full_precision,
    ordinary,
    shape_of,
)
from lightning_relflat.functional._families import Family, joint_parts
from lightning_relflat.functional._linear_map import LayerUse, LinearUse, as_use
from lightning_relflat.functional._meeting import Looker, look
from lightning_relflat.functional._probes import Measure
from lightning_relflat.functional._second_derivatives import gradients_in_graph
from lightning_relflat.functional._weights import layer_weight


def layer_flatness(
    loss: Tensor,
    layer: nn.Module,
    features: Tensor,
    outputs: Tensor,
    *,
    weight: Tensor | None = None,
    probes: int | None = 1,
    generator: torch.Generator | None = None,
    through_hessian: bool = True,
) -> Tensor:
    r"""Return the part of every sample in κ of a layer, with only what comes after it differentiated twice.

    .. math::
        κ = \sum_{s,s'} ⟨w_s, w_{s'}⟩ \operatorname{Tr}(H_{s,s'})
          = \mathbb{E}_A \left. \tfrac{d^2}{dε^2} L(W (I + εA)) \right|_{ε=0}
          = \mathbb{E}_A ⟨u, ∇^2_Z L \, u⟩, \qquad u_p = W A φ_p,

    with random A whose entries have E[A_kj A_k'j'] = δ_kk' δ_jj'; Z are all outputs, p goes over the rows that share
    the weight: samples, tokens, positions of a convolution. A convolution's W is its kernel as a matrix, its rows the
    patches; each group is a layer of its own, and their κ add up.

    How rows meet behind the layer is seen in the graph of the loss, by about log₂ of the number of rows products more.
    Rows that stay apart have a v of their own each, ‖φ_p‖² ⟨Wv_p, A_pp Wv_p⟩; where they meet within a sample each
    sample has an A, and where samples meet (contrastive losses) there is one A for all.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939), definition of κ_Tr;
    Hutchinson's estimator, written for the Hessian's contraction with WᵀW.

    Args:
        loss: a scalar in whose graph ``outputs`` is. Its reduction is in the result: sum the parts for κ.
        layer: an ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``, or what computes x Wᵀ + b: an ``nn.Linear``, a layer
            around one as LoRA's, or another module with a matrix ``weight`` whose outputs say so.
        features: what entered the layer: (..., m), or (n, channels, ...) or (channels, ...) for a convolution.
        outputs: what left the layer.
        weight: the weight to use; the layer's own if left out.
        probes: how many random A to average, or ``None`` for all of them: min(d, m) products where rows stay apart,
            min(d, m)·m where they meet, in each group.
        generator: where the probes come from; PyTorch's global generator if left out.
        through_hessian: whether gradients flow through the Hessian and the features, as in the FAM paper. If not, both
            count as constants, and only ``weight`` gets a gradient.

    Returns:
        The parts, of shape (n,), n the first dimension of the features; a scalar for a single row or input. What
        samples that meet have in common is divided among them: only the sum has a meaning then. In float32 at least.

    Raises:
        TypeError: if ``features`` or ``outputs`` are no floating point numbers, or the layer has no such weight.
        ValueError: if ``loss`` is no scalar, carries no graph or does not depend on ``outputs``, if ``probes`` is not
            a positive integer or ``None``, or if ``None`` would take more than 10,000 products.
        RuntimeError: if an operation between the outputs and the loss cannot be differentiated twice, or hides its
            curvature.

    Examples:
        A head before mean pooling, so that the tokens of a sample meet:

        >>> import torch
        >>> from lightning_relflat.functional import layer_flatness
        >>> head, tokens = torch.nn.Linear(2, 1, bias=False), torch.tensor([[[1.0, 2.0], [0.0, 1.0]]])
        >>> outputs = head(tokens)
        >>> kappa = layer_flatness(outputs.mean().square(), head, tokens, outputs, probes=None).sum()
        >>> pooled = tokens.mean(dim=1)
        >>> torch.allclose(kappa, 2 * pooled.square().sum() * head.weight.square().sum())
        True
    """
    use = layer_use(layer, features, outputs, weight)
    [[parts]] = flatness_of_layers(
        loss, [[use]], probes=probes, generator=generator, through_hessian=through_hessian, allow_unused=False
    )
    assert parts is not None  # not unused
    return parts.sum(dim=0) if probes is None else parts.mean(dim=0)


def layer_use(layer: nn.Module, features: Tensor, outputs: Tensor, weight: Tensor | None = None) -> LayerUse:
    """Describe a pass of data through a layer, for :class:`~lightning_relflat.metrics.LayersFlatness`.

    Args:
        layer: as for :func:`layer_flatness`.
        features: what entered it.
        outputs: what left it, in the graph of a loss.
        weight: its weight at that time; the present one if left out.

    Returns:
        The use.

    Raises:
        TypeError: if tensors are no floating point numbers, or the layer has no such weight.
        ValueError: if a matrix does not fit the features and outputs.
    """
    check_floating("features", features)
    check_floating("outputs", outputs)
    use = as_use(layer, features, outputs, layer_weight(layer, features, outputs) if weight is None else weight)
    if isinstance(use, LinearUse) and outputs.shape != (*features.shape[:-1], len(use.weight)):
        raise ValueError(
            f"Expected arguments `features` and `outputs` to be of shapes (..., m) and (..., d) with a weight of shape "
            f"{shape_of(use.weight)}, but got {shape_of(features)} and {shape_of(outputs)}."
        )
    return use


def flatness_of_layers(
    loss: Tensor,
    layers: Sequence[Sequence[LayerUse]],
    *,
    lookers: Sequence[Looker] | None = None,
    mode: object = None,
    probes: int | None = 1,
    generator: torch.Generator | None = None,
    through_hessian: bool = True,
    measure: Measure = "relative_flatness",
    normalize_features: bool = False,
    allow_unused: bool = True,
) -> list[list[Tensor | None]]:
    """Return the samples' parts in κ of several layers, each with all its passes, by joint Hessian products.

    A of different layers are independent, so that what two layers share in the Hessian has mean zero. Passes through
    one layer that meet share their A. Where the features of one pass come from another's outputs (a recurrent layer),
    d²L/dε² = ⟨u, ∇²_Z L u⟩ + 2 Σ_k ⟨∂L/∂Z_k, WA dφ_k/dε⟩, and both are taken with the one product.

    Args:
        loss: the scalar loss.
        layers: for every layer its uses.
        lookers: for every layer what remembers how its rows meet; if left out, all are looked at now.
        mode: as for :meth:`~lightning_relflat.functional._meeting.Looker.apart`.
        probes: as for :func:`layer_flatness`.
        generator: as for :func:`layer_flatness`.
        through_hessian: as for :func:`layer_flatness`.
        measure: ``"relative_flatness"`` for κ, or ``"trace"`` for ‖W‖_F² Tr(H), with W a group's.
        normalize_features: whether every ‖φ_p‖ counts as 1.
        allow_unused: whether the loss may be independent of the outputs of a use.

    Returns:
        For each use parts of shape (probes, samples...), with ``probes=None`` (products, samples...) to be summed; or
        ``None`` if the loss does not depend on it.

    Raises:
        ValueError: as :func:`layer_flatness` does.
        RuntimeError: as :func:`layer_flatness` does.
    """
    check_probes(probes)
    check_scalar_in_graph(loss)
    flat = list(chain.from_iterable(layers))
    with full_precision(loss), ordinary():
        found, between = gradients_in_graph(loss, [use.outputs for use in flat], allow_unused=allow_unused)
        families, places = [], []
        remaining = iter(range(len(flat)))
        for number, uses in enumerate(layers):
            mine = [k for k in (next(remaining) for _ in uses) if found[k] is not None]
            if mine:
                gradients = [gradient for k in mine if (gradient := found[k]) is not None]
                used = [flat[k] for k in mine]
                apart = (
                    look(gradients, used) if lookers is None else lookers[number].apart(mode, gradients, used, between)
                )
                if apart.chained and not through_hessian:
                    raise ValueError(
                        "Expected argument `through_hessian` to be True where a layer's features come from its own "
                        "outputs in an earlier pass, but got False."
                    )
                families.append(Family(used, gradients, apart, measure, normalize_features, through_hessian))
                places.append(mine)
        parts: list[Tensor | None] = [None] * len(flat)
        for place, values in zip(
            chain.from_iterable(places), joint_parts(families, probes, generator, through_hessian), strict=True
        ):
            parts[place] = values
    rest = iter(parts)
    return [[next(rest) for _ in uses] for uses in layers]


def probe_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of a generator of probes, different for every seed, step and process.

    Args:
        seed: the user's seed.
        step: counts the batches.
        rank: the process's rank.

    Returns:
        A 64-bit seed.
    """
    # A hash, because PyTorch's generator on the CPU looks at the lower 32 bits alone.
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def own_probe_seed(seed: int, step: int) -> int:
    """Return :func:`probe_seed` for this process, of however many there are.

    Args:
        seed: the user's seed.
        step: counts the batches.

    Returns:
        A 64-bit seed.
    """
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return probe_seed(seed, step, torch.distributed.get_rank() if distributed else 0)
