"""Keep the norm of a layer's weight below a cap, whatever steps an optimizer takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lightning_relflat.functional._weights import has_matrix, is_adapted
from lightning_relflat.linear_layers import describe

Norm: TypeAlias = Literal["frobenius", "spectral"]


class WeightCap:
    """Multiplies a weight W by min(1, cap / ‖W‖), now and after every step of an optimizer that holds it.

    An optimizer's own hook sees all steps that are taken, and no others: accumulated batches have none, and a gradient
    scaler that skips a step does not call the optimizer.

    Args:
        name: the layer's name, for messages.
        layer: the layer whose ``weight`` is capped.
        max_norm: the cap.
        norm: which norm.
        optimizers: those that train the model.

    Raises:
        ValueError: if the layer's map is not one tensor that can be rescaled.
    """

    def __init__(self, name: str, layer: nn.Module, max_norm: float, norm: Norm, optimizers: Sequence[Any]) -> None:
        weight = layer._parameters.get("weight")
        why = None
        if is_adapted(layer):
            why = "adapters are part of what it computes"
        elif is_parametrized(layer, "weight") or weight is None:
            why = "its weight is computed from other parameters (a parametrization, or a strategy that flattens)"
        elif weight.ndim < 2:
            why = "a strategy has cut its weight into flat pieces"
        elif norm == "spectral" and not has_matrix(layer):
            why = "a spectral norm is that of a matrix"
        elif weight.requires_grad and not any(_holds(optimizer, weight) for optimizer in optimizers):
            why = "none of the Trainer's optimizers holds its weight"
        if why is not None or weight is None:
            raise ValueError(
                f"Expected argument `max_norm` to be None for layer {describe(name, layer)}, because {why}, so that "
                f"capping a norm is not the rescaling of one tensor after its step, but got {max_norm!r}."
            )
        self._weight: Tensor = weight
        self._max_norm = max_norm
        self._norm = norm
        self._handles = [optimizer.register_step_post_hook(self) for optimizer in optimizers]
        self.project()

    def __call__(self, optimizer: Any, *_: Any) -> None:
        # Writing to the weight where another optimizer steps would spoil graphs in which the weight is still needed.
        if _holds(optimizer, self._weight):
            self.project()

    @torch.no_grad()
    def project(self) -> None:
        """Rescale the weight, if it is too large. The host does not wait for the device."""
        part: Tensor = self._weight.to_local() if hasattr(self._weight, "to_local") else self._weight
        factor = (self._max_norm / self.norm()).clamp(max=1)
        part.copy_(part.to(factor.dtype) * factor)

    @torch.no_grad()
    def norm(self) -> Tensor:
        """Return the weight's norm: of the whole, where processes hold parts of it."""
        weight: Any = self._weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if self._norm == "frobenius":
            norm: Any = torch.linalg.vector_norm(weight.to(dtype))
            whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            return whole
        return spectral_norm((weight.full_tensor() if hasattr(weight, "full_tensor") else weight).to(dtype))

    def close(self) -> None:
        """Cap no more. May be called again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def spectral_norm(matrix: Tensor, *, squarings: int = 16) -> Tensor:
    """Return σ_max of a matrix from above, within a factor of min(d, m)^(2^-(squarings + 2)), from products alone.

    With G = WWᵀ it is ‖G^p‖_F^(1/2p) for p = 2^squarings. A singular value decomposition makes the host wait for the
    device, and a power iteration comes from below, so that the cap might not hold.

    Args:
        matrix: the matrix W.
        squarings: how often to square.

    Returns:
        The norm; a matrix of zeros has one near zero.
    """
    tiny = torch.finfo(matrix.dtype).tiny
    scale = matrix.abs().amax().clamp(min=tiny)  # squares of large entries would overflow
    matrix = matrix / scale
    power = matrix @ matrix.mT if matrix.shape[0] <= matrix.shape[1] else matrix.mT @ matrix
    log: Tensor = matrix.new_zeros(())
    for k in range(squarings + 1):
        size = torch.linalg.vector_norm(power).clamp(min=tiny)
        log = log + size.log() / 2**k
        power = power / size
        power = power @ power
    norm: Tensor = scale * (log / 2).exp()
    return norm


def check_max_norm(max_norm: object) -> float | None:
    """Return a cap.

    Args:
        max_norm: the argument.

    Returns:
        The cap, or ``None``.

    Raises:
        ValueError: if it is something else.
    """
    if max_norm is None:
        return None
    if isinstance(max_norm, bool) or not isinstance(max_norm, int | float) or not 0 < max_norm < math.inf:
        raise ValueError(f"Expected argument `max_norm` to be a finite number above 0, or None, but got {max_norm!r}.")
    return float(max_norm)


def check_norm(norm: object) -> Norm:
    """Return the name of a norm.

    Args:
        norm: the argument.

    Returns:
        The name.

    Raises:
        ValueError: if there is no such norm.
    """
    if norm == "frobenius":
        return "frobenius"
    if norm == "spectral":
        return "spectral"
    raise ValueError(f"Expected argument `norm` to be 'frobenius' or 'spectral', but got {norm!r}.")


def _holds(optimizer: Any, weight: Tensor) -> bool:
    return any(parameter is weight for group in optimizer.param_groups for parameter in group["params"])
