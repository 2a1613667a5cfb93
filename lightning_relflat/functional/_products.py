"""Products with the Hessian of a loss, from its gradients in their graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_relflat.functional._second_derivatives import naming_the_cause


def hessian_products(
    roots: Sequence[Tensor], inputs: Sequence[Tensor], directions: Sequence[Tensor], *, differentiable: bool
) -> list[Tensor]:
    """Return the derivatives of Σ_k ⟨roots_k, directions_k⟩.

    Args:
        roots: gradients with respect to the inputs, or numbers made from them.
        inputs: what to differentiate with respect to.
        directions: like the roots, in the precision of the computation.
        differentiable: whether the result carries a graph.

    Returns:
        The derivatives, like the inputs, in the precision of the directions; zero where the roots are independent.
    """
    dtype = directions[0].dtype
    curved = [k for k, root in enumerate(roots) if root.requires_grad]
    if not curved:
        return [torch.zeros_like(tensor, dtype=dtype) for tensor in inputs]
    scale = _scale_for([*roots, *inputs], directions)
    with naming_the_cause():
        products = torch.autograd.grad(
            [roots[k] for k in curved],
            inputs,
            [(directions[k] * scale).to(roots[k].dtype) for k in curved],
            create_graph=differentiable,
            retain_graph=True,
            materialize_grads=True,
        )
    return [product.to(dtype) / scale for product in products]


def _scale_for(tensors: Sequence[Tensor], directions: Sequence[Tensor]) -> Tensor | float:
    """Return what to multiply probes by, so that their products with a mean's small Hessian are no zeros in float16.

    One factor for all, because the products are joint. 64 leaves room for curvatures of 1,000, and for means over
    10⁴ samples whose own curvature is 10⁻⁴.
    """
    if all(tensor.dtype != torch.float16 for tensor in tensors):
        return 1.0
    sizes = [direction.detach().abs().amax() for direction in directions if direction.numel()]
    if not sizes:
        return 1.0
    return 64 / torch.stack(sizes).amax().clamp(min=1e-30)
