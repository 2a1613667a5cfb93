"""The largest eigenvalue of a linear layer's Hessian over a data set, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat.functional._checks import check_count
from lightning_relflat.functional.layer_measures import Scale, check_scale
from lightning_relflat.functional.spectrum import (
    KEPT,
    LayerHessian,
    bounds_from_samples,
    bounds_from_sketch,
    has_blocks,
    hessian_of_samples,
    layer_hessian,
    samples_of,
    sketch,
    sketch_columns,
)
from lightning_relflat.metrics.layer_measures import LayerMeasure, check_weight_shape


class SpectralMeasure(LayerMeasure):
    """A measure of a linear layer that has eigenvalues among its states."""

    _spectra: tuple[Spectrum, ...] = ()

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Take together what all processes have; see :class:`torchmetrics.Metric`.

        Args:
            args: as for :class:`torchmetrics.Metric`.
            kwargs: as for :class:`torchmetrics.Metric`.
        """
        for spectrum in self._spectra:
            spectrum.prepare()
        super().sync(*args, **kwargs)


class LargestEigenvalue(SpectralMeasure):
    r"""The largest eigenvalue of the Hessian H of a loss over a linear layer's weight W, from one pass over the data.

    λ_max(H), ‖W‖_F² λ_max(H) or Σ_s ‖w_s‖² λ_max(H_{s,s}). Eigenvalues do not add up over batches, but samples can be
    kept, and sketches Y = HΩ add up: the states are the samples as long as those of all processes are no more than
    2²² numbers, and sums of sketches and traces from then on, so that batches and processes of uneven sizes give the
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
        columns: how many columns Ω has, k; the state has d·m·k numbers, and a batch costs k products with H. Then no
            samples are kept. ``None`` for as many as make that 2²¹ numbers, but 128 at least, once there are more
            samples than can be kept.
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
        self._add_numbers("totals", 1)
        blocks = has_blocks(self.loss, scale)
        self._spectra = (Spectrum(self, out_features, in_features, blocks=blocks, columns=columns, seed=seed),)
        self._shape = out_features, in_features

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
            check_weight_shape(weight, self._shape)
            self._spectra[0].add(hessian)
        self._add_to_numbers("totals", [hessian.outputs.total_weight])

    def compute(self) -> Tensor:
        """Return the estimate for all data so far, over all processes; it is a lower bound."""
        return self._bounds()[0]

    def compute_bounds(self) -> tuple[Tensor, Tensor]:
        """Return a lower and an upper bound for all data so far, over all processes.

        Returns:
            Two scalars.
        """
        with self._together():
            return self._bounds()

    def _bounds(self) -> tuple[Tensor, Tensor]:
        lower, upper = self._spectra[0].bounds(add_up=self.scale == "neuron")
        return (lower / self.totals[0], upper / self.totals[0]) if self._mean else (lower, upper)


class Spectrum:
    """The states of a metric from which the largest eigenvalue of a Hessian is computed.

    Samples are kept, and folded into a sketch once they become too many.

    Args:
        owner: the metric.
        out_features: d, the rows of W.
        in_features: m, the columns of W.
        blocks: whether the Hessians consist of blocks.
        columns: as for :class:`LargestEigenvalue`.
        seed: as for :class:`LargestEigenvalue`.
        prefix: what the names of the states begin with.
    """

    def __init__(
        self,
        owner: LayerMeasure,
        out_features: int,
        in_features: int,
        *,
        blocks: bool,
        columns: int | None = None,
        seed: int = 0,
        prefix: str = "",
    ) -> None:
        self._owner = owner
        self._width = in_features
        self._blocks = blocks
        self._room = KEPT if columns is None else 0
        self._seed = seed
        self._test = sketch_columns(out_features, in_features, blocks=blocks, columns=columns, seed=seed)
        self._samples, self._sums = f"{prefix}samples", (f"{prefix}sketch", f"{prefix}traces", f"{prefix}sketched")
        # In one dimension, so that a process without samples has something of the same kind.
        owner.add_state(self._samples, [], dist_reduce_fx="cat")
        shapes = (out_features, in_features, self._test.shape[1]), (out_features,), ()
        for name, shape in zip(self._sums, shapes, strict=True):
            owner._add_sums(name, *shape)

    def add(self, hessian: LayerHessian) -> None:
        """Add a batch.

        Args:
            hessian: of :func:`layer_hessian`.
        """
        samples = samples_of(hessian).flatten()
        if sum(map(len, getattr(self._owner, self._samples))) + len(samples) > self._room:
            self._fold()
        if len(samples) > self._room:
            self._set(self._folded(hessian))
        else:
            getattr(self._owner, self._samples).append(samples)

    def prepare(self) -> None:
        """Get ready for the processes to take together what they have: no more than one may keep alone."""
        world = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            world = torch.distributed.get_world_size(self._owner.process_group)
        kept = self._kept()
        if len(kept) * world > self._room:
            self._fold()
            kept = kept[:0]
        setattr(self._owner, self._samples, [kept])

    def bounds(self, *, add_up: bool) -> tuple[Tensor, Tensor]:
        """Return bounds for the summed loss of all batches.

        Args:
            add_up: whether to add up the blocks' eigenvalues, or take the largest.

        Returns:
            The lower and the upper bound.
        """
        hessian = self._hessian()
        if not getattr(self._owner, self._sums[2]):
            return bounds_from_samples(hessian, add_up=add_up, seed=self._seed)
        whole, traces, _ = self._folded(hessian)
        test = self._test.to(whole.device)
        return bounds_from_sketch(whole, traces, test, blocks=self._blocks, add_up=add_up)

    def _kept(self) -> Tensor:
        kept = getattr(self._owner, self._samples)
        traces: Tensor = getattr(self._owner, self._sums[1])
        # After a synchronisation it is one tensor.
        return kept if isinstance(kept, Tensor) else torch.cat([traces.new_zeros(0), *kept])

    def _hessian(self) -> LayerHessian:
        d, m = getattr(self._owner, self._sums[0]).shape[:2]
        samples = self._kept().reshape(-1, m + d + (not self._blocks))
        return hessian_of_samples(samples, self._width, blocks=self._blocks)

    def _folded(self, hessian: LayerHessian) -> list[Tensor]:
        whole, traces, sketched = (getattr(self._owner, name) for name in self._sums)
        self._test = self._test.to(whole.device)
        return [whole + sketch(hessian, self._test), traces + hessian.traces(), sketched + 1]

    def _fold(self) -> None:
        if self._kept().numel():
            self._set(self._folded(self._hessian()))
            setattr(self._owner, self._samples, [])

    def _set(self, values: list[Tensor]) -> None:
        for name, value in zip(self._sums, values, strict=True):
            setattr(self._owner, name, value)
