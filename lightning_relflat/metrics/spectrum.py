"""The largest eigenvalue of a linear layer's Hessian over a data set, in one pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_relflat.functional._checks import check_count
from lightning_relflat.functional.layer_measures import Scale, check_scale
from lightning_relflat.functional.spectrum import (
    KEPT,
    Bounds,
    LayerHessian,
    bounds_from_samples,
    bounds_from_sketch,
    count_columns,
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

    def reset(self) -> None:
        """Forget all samples."""
        # Torchmetrics empties the lists themselves, which a `Running` window still holds.
        for spectrum in self._spectra:
            spectrum.let_go()
        super().reset()

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Add other states, as ``forward`` and ``merge_state`` do, and keep no more samples than there is room for."""
        state = dict(incoming_state)
        for spectrum in self._spectra:
            kept = state[spectrum.samples]
            state[spectrum.samples] = [kept] if isinstance(kept, Tensor) else kept  # after a synchronisation
        super()._reduce_states(state)
        for spectrum in self._spectra:
            spectrum.fold_what_is_too_much()

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        if self._spectra:
            counts = torch.tensor([spectrum.counts() for spectrum in self._spectra], dtype=torch.float64)
            together = self._sum_of_processes(counts.to(self.apart.device), dist_sync_fn, process_group).tolist()
            for spectrum, (kept, sketches) in zip(self._spectra, together, strict=True):
                spectrum.prepare(kept, sketches)
        super()._sync_dist(dist_sync_fn, process_group)


class LargestEigenvalue(SpectralMeasure):
    r"""The largest eigenvalue of the Hessian H of a loss over a linear layer's weight W, from one pass over the data.

    λ_max(H), ‖W‖_F² λ_max(H) or Σ_s ‖w_s‖² λ_max(H_{s,s}). Eigenvalues do not add up over batches, but samples can be
    kept, and sketches Y = HΩ add up: the states are the samples as long as those of all processes are no more than
    2²² numbers, and sums of sketches and traces from then on, which take their memory only then. So batches and
    processes of uneven sizes give the value for their union. ``compute`` returns a lower bound, ``compute_bounds`` that
    and an upper one; see :func:`~lightning_relflat.functional.largest_eigenvalue_bounds` for how near they come and
    **where they do not**, and :func:`~lightning_relflat.functional.largest_eigenvalue` for the value in several passes.

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

    Examples:
        >>> import torch
        >>> from lightning_relflat.metrics import LargestEigenvalue
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
        self.in_features = check_count("in_features", in_features, at_least=1)
        self.out_features = check_count("out_features", out_features, at_least=1)
        self.columns, self.seed = columns, seed
        self.scale: Scale = scale
        self._add_sums("totals", 1)
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
        self._shape = out_features, in_features
        self._blocks = blocks
        self._columns = None if columns is None else check_count("columns", columns, at_least=1)
        self._room = KEPT if columns is None else 0
        self._seed = check_count("seed", seed, at_least=0)
        self._drawn: Tensor | None = None
        self.samples, self._sketch, self._traces = (f"{prefix}{name}" for name in ("samples", "sketch", "traces"))
        # In one dimension, so that a process without samples has something of the same kind.
        owner.add_state(self.samples, [], dist_reduce_fx="cat")
        owner._add_sums(self._sketch)  # a zero until there is one, which may be large
        owner._add_sums(self._traces, out_features)

    def add(self, hessian: LayerHessian) -> None:
        """Add a batch.

        Args:
            hessian: of :func:`layer_hessian`.
        """
        samples = samples_of(hessian).flatten()
        self.fold_what_is_too_much(samples.numel())
        if samples.numel() > self._room:
            self._set(self._folded(hessian))
        else:
            getattr(self._owner, self.samples).append(samples)

    def let_go(self) -> None:
        """Put a new list in the place of that of the samples."""
        setattr(self._owner, self.samples, [])

    def fold_what_is_too_much(self, more: int = 0) -> None:
        """Put the samples into the sketch if they, and more, have no room.

        Args:
            more: how many numbers will come beside them.
        """
        kept, _ = self.counts()
        if kept and kept + more > self._room:
            self._set(self._folded(self._hessian()))
            self.let_go()

    def counts(self) -> tuple[int, int]:
        """Return how many numbers are kept, and whether there is a sketch."""
        kept = getattr(self._owner, self.samples)
        numbers = kept.numel() if isinstance(kept, Tensor) else sum(part.numel() for part in kept)
        return numbers, int(self._whole.ndim > 0)

    def prepare(self, kept: float, sketches: float) -> None:
        """Get ready for the processes to take together what they have.

        Args:
            kept: how many numbers they keep, all together.
            sketches: how many of them have a sketch.
        """
        if kept > self._room:
            self.fold_what_is_too_much(int(kept))
        if (kept > self._room or sketches) and not self._whole.ndim:
            d, m = self._shape
            columns = count_columns(d, m, blocks=self._blocks, columns=self._columns)
            setattr(self._owner, self._sketch, self._whole.new_zeros(d, m, columns))
        setattr(self._owner, self.samples, [self._kept()])

    def bounds(self, *, add_up: bool) -> Bounds:
        """Return bounds for the summed loss of all batches.

        Args:
            add_up: whether to add up the blocks' eigenvalues, or take the largest.

        Returns:
            The lower and the upper bound.
        """
        hessian = self._hessian()
        if not self._whole.ndim:
            return bounds_from_samples(hessian, add_up=add_up, seed=self._seed)
        whole, traces = self._folded(hessian)
        return bounds_from_sketch(whole, traces, self._test, blocks=self._blocks, add_up=add_up)

    @property
    def _whole(self) -> Tensor:
        whole: Tensor = getattr(self._owner, self._sketch)
        return whole

    @property
    def _test(self) -> Tensor:
        """Ω, on the metric's device, made when it is first needed."""
        if self._drawn is None:
            self._drawn = sketch_columns(*self._shape, blocks=self._blocks, columns=self._columns, seed=self._seed)
        self._drawn = self._drawn.to(self._whole.device)
        return self._drawn

    def _kept(self) -> Tensor:
        kept = getattr(self._owner, self.samples)
        # After a synchronisation it is one tensor.
        return kept if isinstance(kept, Tensor) else torch.cat([self._whole.new_zeros(0), *kept])

    def _hessian(self) -> LayerHessian:
        d, m = self._shape
        samples = self._kept().reshape(-1, m + d + (not self._blocks))
        return hessian_of_samples(samples, m, blocks=self._blocks)

    def _folded(self, hessian: LayerHessian) -> tuple[Tensor, Tensor]:
        traces: Tensor = getattr(self._owner, self._traces)
        return self._whole + sketch(hessian, self._test), traces + hessian.traces()

    def _set(self, values: tuple[Tensor, Tensor]) -> None:
        for name, value in zip((self._sketch, self._traces), values, strict=True):
            setattr(self._owner, name, value)
