"""The largest eigenvalue of a linear layer's Hessian over a data set, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat.functional._checks import check_count
from lightning_relflat.functional.layer_measures import Scale, check_scale
from lightning_relflat.functional.spectrum import bounds_from_sketch, layer_hessian, sketch, sketch_columns
from lightning_relflat.metrics.layer_measures import LayerMeasure, check_weight_shape


class LargestEigenvalue(LayerMeasure):
    r"""The largest eigenvalue of the Hessian H of a loss over a linear layer's weight W, from one pass over the data.

    λ_max(H), ‖W‖_F² λ_max(H) or Σ_s ‖w_s‖² λ_max(H_{s,s}). Eigenvalues do not add up over batches, but sketches
    Y = HΩ do: the states are sums of those and of traces, so that batches and processes of uneven sizes give the
    value for their union. ``compute`` returns a lower bound, ``compute_bounds`` that and an upper one; see
    :func:`~lightning_relflat.functional.largest_eigenvalue_bounds` for how near they come and **where they do not**,
    and :func:`~lightning_relflat.functional.largest_eigenvalue` for the exact value in several passes.

    Where W changes between batches, it is the eigenvalue of the average of the batches' Hessians, each scaled with
    its own W. That is not the average of eigenvalues, but at most that.

    As input to ``forward`` and ``update`` the metric takes ``features`` (..., m), ``weight`` (d, m), ``outputs``
    (..., d) or (n, d, ...) and ``target``, as :class:`~lightning_relflat.RelativeFlatness`; as output of ``forward``
    and ``compute`` it returns a float64 scalar.

    Source: as for :func:`~lightning_relflat.functional.largest_eigenvalue_bounds`.

    Args:
        loss: the criterion that is minimised, by name or as an object of ``torch.nn``; its reduction decides between
            the eigenvalue of the mean and of the sum.
        in_features: m, the columns of W.
        out_features: d, the rows of W.
        scale: ``"none"`` for λ_max(H), ``"layer"`` for ‖W‖_F² λ_max(H), ``"neuron"`` for Σ_s ‖w_s‖² λ_max(H_{s,s}).
        columns: how many columns Ω has, k; the state has d·m·k numbers, and a batch costs k products with H. ``None``
            for as many as make that 2²¹ numbers, but 128 at least.
        seed: of the random columns, the same on all processes.
        class_dim: as for :func:`~lightning_relflat.functional.relative_flatness`.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if the loss has no closed form or does not reduce to a mean or a sum, or another argument is not
            what it should be.

    Example:
        >>> import torch
        >>> from lightning_relflat.metrics.spectrum import LargestEigenvalue
        >>> eigenvalue = LargestEigenvalue("mse", in_features=2, out_features=1)
        >>> weight = torch.tensor([[1.0, 1.0]])
        >>> for features in (torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])):
        ...     eigenvalue.update(features, weight, features @ weight.T)
        >>> eigenvalue.compute()
        tensor(4., dtype=torch.float64)
    """

    sketch: Tensor
    traces: Tensor

    def __init__(
        self,
        loss: str | nn.Module = "cross_entropy",
        *,
        in_features: int,
        out_features: int,
        scale: Scale = "none",
        columns: int | None = None,
        seed: int = 0,
        class_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, class_dim=class_dim, **kwargs)
        check_scale(scale)
        check_count("in_features", in_features, at_least=1)
        check_count("out_features", out_features, at_least=1)
        self.scale: Scale = scale
        # As `layer_hessian` finds for a batch: of the closed forms, that of cross-entropy alone couples outputs.
        self.blocks = scale == "neuron" or not isinstance(self.loss, nn.CrossEntropyLoss)
        self._test = sketch_columns(out_features, in_features, blocks=self.blocks, columns=columns, seed=seed)
        self._add_sums("sketch", out_features, in_features, self._test.shape[1])
        self._add_sums("traces", out_features)
        self._add_totals(1)

    def update(self, features: Tensor, weight: Tensor, outputs: Tensor, target: Any = None) -> None:
        """Add a batch.

        Args:
            features: what enters the layer, of shape (..., m).
            weight: the layer's weight, of shape (d, m).
            outputs: what leaves the layer, of shape (..., d), or (n, d, ...).
            target: what the loss takes as its target.

        Raises:
            TypeError: if features, weight or outputs are no floating point numbers.
            ValueError: if shapes do not fit each other or the metric's, or the target is missing or does not fit.
        """
        with torch.no_grad():
            hessian = layer_hessian(
                features, weight, outputs, target, loss=self.loss, scale=self.scale, class_dim=self.class_dim
            )
            check_weight_shape(weight, (self.sketch.shape[0], self.sketch.shape[1]))
            self._test = self._test.to(features.device)
            self.sketch = self.sketch + sketch(hessian, self._test)
            self.traces = self.traces + hessian.traces()
        self._add_to_totals(hessian.outputs.total_weight)

    def compute(self) -> Tensor:
        """Return the estimate for all data so far, over all processes; it is a lower bound."""
        return self._bounds()[0]

    def compute_bounds(self) -> tuple[Tensor, Tensor]:
        """Return a lower and an upper bound for all data so far, over all processes.

        Returns:
            Two scalars.
        """
        with self.sync_context(should_sync=self.sync_on_compute):
            return self._bounds()

    def _bounds(self) -> tuple[Tensor, Tensor]:
        lower, upper = bounds_from_sketch(
            self.sketch,
            self.traces,
            self._test.to(self.sketch.device),
            blocks=self.blocks,
            add_up=self.scale == "neuron",
        )
        return (lower / self.totals[0], upper / self.totals[0]) if self._mean else (lower, upper)
