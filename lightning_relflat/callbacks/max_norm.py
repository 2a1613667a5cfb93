"""MaxNorm: keep the norm of a layer's weight below a cap, whatever steps an optimizer takes."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from lightning_relflat.callbacks._base import Callback, LightningModule, Trainer
from lightning_relflat.functional._checks import check_positive, full_precision
from lightning_relflat.functional._weights import has_matrix, is_adapted
from lightning_relflat.linear_layers import describe, find_layer

Norm: TypeAlias = Literal["frobenius", "spectral"]


class MaxNorm(Callback):
    r"""Multiplies the weight W of a layer by min(1, max_norm / ‖W‖) after every step of an optimizer that holds it.

    So ‖W‖ is at most ``max_norm``, up to rounding, from the start of training to its end. It is asked after each step
    which weight the layer has and whether the optimizer that stepped holds it, so that both may be replaced while
    training runs. Accumulated batches have no step, and neither has a batch that a gradient scaler skips. If the weight
    is tied to another layer's, that one is capped with it. Where processes hold parts of a weight, the whole is capped,
    with an all-reduce of one number after each step. The host does not wait for the device.

    Together with ``normalize_features`` it bounds the κ of a cross-entropy, as a FAM with a negative coefficient needs.

    Args:
        layer: the dotted name of a linear or convolution layer whose weight is one tensor: no parametrization, no
            adapters, no strategy that flattens weights.
        max_norm: the cap.
        norm: ``"frobenius"``, the root of the sum of squares, of a convolution's kernel too; or ``"spectral"``, the
            largest singular value of a matrix (which is gathered whole after each step if it is sharded).

    Raises:
        ValueError: if an argument is not what it should be; in ``fit`` before the first step, or at the beginning of an
            epoch, if there is no such layer or its weight cannot be capped.

    Examples:
        >>> from lightning_relflat import FAM, MaxNorm
        >>> callbacks = [FAM("head", -0.1), MaxNorm("head", 5.0)]
        >>> callbacks[1]
        MaxNorm(layer='head', max_norm=5.0)
    """

    def __init__(self, layer: str, max_norm: float, norm: Norm = "frobenius") -> None:
        super().__init__()
        if not isinstance(layer, str):
            raise ValueError(f"Expected argument `layer` to be the dotted name of a layer, but got {layer!r}.")
        self.layer = layer
        self.max_norm = check_positive("max_norm", max_norm)
        self.norm = _check_norm(norm)
        self._module: LightningModule | None = None
        self._weight: Tensor | None = None
        self._handle: RemovableHandle | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the weight."""
        self._find(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cap the weight, whose values a checkpoint may just have brought, and listen to all optimizers."""
        self._detach()
        self._weight = self._find(trainer, pl_module)
        self._module = pl_module
        # An optimizer's own hook would go with it where it is replaced, as some callbacks do while training runs.
        self._handle = register_optimizer_step_post_hook(self._after_step)
        project(self._weight, self.max_norm, self.norm)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again at the layer, which may have changed."""
        self._weight = self._find(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind; `teardown` is not called after an exception."""
        self._detach()

    def _find(self, trainer: Trainer, module: LightningModule) -> Tensor:
        """Return the layer's weight, and refuse one that cannot be capped."""
        layer = find_layer(module, self.layer)
        _free_gathered_weights(module)
        weight = layer._parameters.get("weight")
        why = None
        if is_adapted(layer):
            why = "adapters are part of what it computes"
        elif is_parametrized(layer, "weight") or weight is None:
            why = "its weight is computed from other parameters (a parametrization, or a strategy that flattens)"
        elif weight.ndim < 2:
            why = "a strategy has cut its weight into flat pieces"
        elif self.norm == "spectral" and not has_matrix(layer):
            why = "a spectral norm is that of a matrix"
        elif weight.requires_grad and not any(_holds(optimizer, weight) for optimizer in trainer.optimizers):
            why = "none of the Trainer's optimizers holds its weight"
        if why is not None or weight is None:
            raise ValueError(
                "Expected argument `layer` to name a layer whose weight is one tensor that can be rescaled after its "
                f"optimizer's step, but got {describe(self.layer, layer)}: {why}."
            )
        return weight

    def _after_step(self, optimizer: Any, *_: Any) -> None:
        assert self._module is not None
        found = self._module.get_submodule(self.layer)._parameters.get("weight")
        # While a strategy keeps a gathered weight in the layer, it is the one found before that the optimizer holds.
        for weight in (found, self._weight):
            # Writing to it where another optimizer steps would spoil graphs in which it is still needed.
            if weight is not None and _holds(optimizer, weight):
                self._weight = weight
                project(weight, self.max_norm, self.norm)
                return

    def _detach(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._module = self._weight = None


@torch.no_grad()
def project(weight: Tensor, max_norm: float, norm: Norm) -> None:
    """Multiply a weight by min(1, max_norm / ‖W‖), without reading the device.

    Args:
        weight: the weight W, which is changed; of the whole, where processes hold parts of it.
        max_norm: the cap.
        norm: which norm.
    """
    part: Tensor = weight.to_local() if hasattr(weight, "to_local") else weight
    # In manual optimization optimizers step within the autocast of mixed precision.
    with full_precision(part):
        factor = (max_norm / _norm_of(weight, norm)).clamp(max=1)
        part.copy_(part.to(factor.dtype) * factor)


def _norm_of(weight: Any, norm: Norm) -> Tensor:
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if norm == "spectral":
        return spectral_norm((weight.full_tensor() if hasattr(weight, "full_tensor") else weight).to(dtype))
    length: Any = torch.linalg.vector_norm(weight.to(dtype))
    whole: Tensor = length.full_tensor() if hasattr(length, "full_tensor") else length
    return whole


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


def _check_norm(norm: object) -> Norm:
    if norm == "frobenius":
        return "frobenius"
    if norm == "spectral":
        return "spectral"
    raise ValueError(f"Expected argument `norm` to be 'frobenius' or 'spectral', but got {norm!r}.")


def _holds(optimizer: Any, weight: Tensor) -> bool:
    return any(parameter is weight for group in optimizer.param_groups for parameter in group["params"])


def _free_gathered_weights(module: nn.Module) -> None:
    """Give the layers of a module sharded by FSDP2 their own parts of the weights back.

    After a pass without a backward pass, as in validation, the root keeps its gathered weights, which no optimizer
    holds. The next pass gathers them again.
    """
    for child in module.modules():
        if any(kind.__name__ == "FSDPModule" for kind in type(child).__mro__):
            child.reshard()  # type: ignore[operator]  # its home differs between versions of PyTorch
