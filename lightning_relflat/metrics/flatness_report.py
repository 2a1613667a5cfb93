"""κ, what it is made of, its neighbours, and the signs that it means nothing, over a data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat.functional._checks import check_count, check_flag, check_floating, shape_of
from lightning_relflat.functional._sums import merge_moments
from lightning_relflat.functional.flatness_report import (
    eigenvalues_of_report,
    neuron_hessian,
    report_class_means,
    report_from_sums,
    report_sums,
)
from lightning_relflat.functional.spectrum import has_blocks, layer_hessian
from lightning_relflat.metrics.layer_measures import check_weight_shape
from lightning_relflat.metrics.spectrum import SpectralMeasure, Spectrum


class FlatnessReport(SpectralMeasure):
    r"""A report on the flatness of a linear layer over a data set: one update feeds the whole family of measures.

    What several of them need is computed once. All states are sums over samples, or moments that are merged, so
    that batches and processes of uneven sizes give exactly the report on their union.

    As input to ``update`` the metric takes what :class:`~lightning_relflat.RelativeFlatness` takes; as output of
    ``compute`` it returns a dictionary of float64 tensors with the names of
    :func:`~lightning_relflat.functional.flatness_report.flatness_report`.

    Source: as :func:`~lightning_relflat.functional.flatness_report.flatness_report`.

    Args:
        loss: the criterion that is minimised, by name or as an object of ``torch.nn``; its reduction decides between
            the report on the mean and on the sum.
        in_features: m, the columns of W.
        out_features: d, the rows of W.
        num_classes: how many classes there are, for ``per_class``.
        neuron_pairs: whether to compute ``neuron_pairs``, of shape (d, d).
        eigenvalues: whether to compute eigenvalues, from sketches of d·m·k numbers as
            :class:`~lightning_relflat.metrics.LargestEigenvalue` makes them by default.
        neural_collapse: whether to compute neural collapse, which needs ``num_classes``.
        class_means: the means that NC4 compares with, of shape (C, m), as :meth:`compute_class_means` of a former
            pass returns them; there is no ``nc4_mismatch`` without.
        class_dim: as for :func:`~lightning_relflat.functional.relative_flatness`.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        TypeError: if the class means are no floating point numbers.
        ValueError: if the loss has no closed form or does not reduce to a mean or a sum, a count is no positive
            integer, or class means or the number of classes do not fit what is asked for.

    Examples:
        >>> import torch
        >>> from lightning_relflat.metrics import FlatnessReport
        >>> report = FlatnessReport(in_features=2, out_features=2, num_classes=2)
        >>> features, weight = torch.tensor([[40.0, 0.0], [0.0, 0.0]]), torch.eye(2)
        >>> report.update(features, weight, features @ weight.T, torch.tensor([0, 1]))
        >>> values = report.compute()
        >>> values["flat_samples"].item(), values["dead_features"].item()
        (0.5, 0.5)
    """

    pairs: Tensor
    moments: Tensor
    per_class: Tensor
    neuron_pairs: Tensor
    class_counts: Tensor
    class_sums: Tensor
    class_squares: Tensor
    class_products: Tensor
    class_weights: Tensor
    mismatches: Tensor

    def __init__(
        self,
        loss: str | nn.Module = "cross_entropy",
        *,
        in_features: int,
        out_features: int,
        num_classes: int | None = None,
        neuron_pairs: bool = False,
        eigenvalues: bool = False,
        neural_collapse: bool = False,
        class_means: Tensor | None = None,
        class_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, class_dim=class_dim, **kwargs)
        self._add_sums("totals", 8)
        m = check_count("in_features", in_features, at_least=1)
        d = check_count("out_features", out_features, at_least=1)
        self.num_classes = None if num_classes is None else check_count("num_classes", num_classes, at_least=1)
        self.weight_shape = d, m
        self.neural_collapse = check_flag("neural_collapse", neural_collapse)
        self.class_means = _class_means(class_means, self.num_classes, m) if self.neural_collapse else None
        if check_flag("eigenvalues", eigenvalues):
            self._spectra = (
                Spectrum(self, d, m, blocks=has_blocks(self.loss)),
                Spectrum(self, d, m, blocks=True, prefix="neuron_"),
            )
        shapes: dict[str, tuple[int, ...]] = {"pairs": (m, m)}
        if self.num_classes is not None:
            shapes["per_class"] = (2, self.num_classes)
        if check_flag("neuron_pairs", neuron_pairs):
            shapes["neuron_pairs"] = (d, d)
        if self.num_classes is not None and neural_collapse:
            shapes["class_counts"] = shapes["class_squares"] = (self.num_classes,)
            shapes["class_sums"], shapes["class_products"] = (self.num_classes, m), (m, m)
            shapes["class_weights"] = (d, m)
        if self.class_means is not None and self.num_classes == d:
            shapes["mismatches"] = ()
        self._names = tuple(shapes)
        self.in_features, self.out_features = m, d
        self.eigenvalues = eigenvalues
        for name, shape in shapes.items():
            self._add_sums(name, *shape)
        self.add_state("moments", torch.zeros(3, m, dtype=torch.float64), dist_reduce_fx=merge_moments)

    def _set_to(self) -> dict[str, Any]:
        return {"neuron_pairs": "neuron_pairs" in self._names}

    def update(self, features: Tensor, weight: Tensor, outputs: Tensor, target: Any = None) -> None:
        """Add a batch.

        Args:
            features: what enters the layer, of shape (..., m).
            weight: the layer's weight, of shape (d, m).
            outputs: what leaves the layer, of shape (..., d), or (n, d, ...).
            target: what the loss takes as its target.

        Raises:
            TypeError: if features, weight or outputs are no floating point numbers.
            ValueError: if shapes do not fit each other or the metric, the target is missing or does not fit, or
                ``num_classes`` was given and it holds no class indices.
        """
        check_weight_shape(weight, self.weight_shape)
        with torch.no_grad():
            sums = report_sums(
                features,
                weight,
                outputs,
                target,
                loss=self.loss,
                num_classes=self.num_classes,
                neuron_pairs="neuron_pairs" in self._names,
                neural_collapse=self.neural_collapse,
                class_means=self.class_means,
                class_dim=self.class_dim,
            )
            if self._spectra:
                hessian = layer_hessian(features, weight, outputs, target, loss=self.loss, class_dim=self.class_dim)
                whole, neurons = self._spectra
                whole.add(hessian)
                neurons.add(neuron_hessian(hessian, weight))
        self._add_to_numbers("totals", sums["totals"].unbind())
        for name in self._names:
            setattr(self, name, getattr(self, name) + sums[name].to(self.totals))
        self.moments = merge_moments(torch.stack([self.moments, sums["moments"].to(self.moments)]))

    def compute(self) -> dict[str, Tensor]:
        """Return the report on all data so far, over all processes."""
        values = report_from_sums(self._sums(), mean=self._mean)
        if self._spectra:
            whole, neurons = self._spectra
            values |= eigenvalues_of_report(
                whole.bounds(add_up=False),
                neurons.bounds(add_up=True),
                values["weight_norm"],
                self.totals[1] if self._mean else 1,
            )
        return values

    def compute_class_means(self) -> Tensor:
        """Return the class means of all data so far, over all processes, for NC4 in a second pass.

        Returns:
            The means, of shape (C, m), with a row of NaN for every class without samples.

        Raises:
            ValueError: if the metric was made without ``neural_collapse``.
        """
        if not self.neural_collapse:
            raise ValueError("Expected argument `neural_collapse` to be True for class means, but got False.")
        with self._together():
            return report_class_means(self._sums())

    def _sums(self) -> dict[str, Tensor]:
        sums = {name: getattr(self, name) for name in (*self._names, "moments")}
        return {"totals": self.totals, **sums}


def _class_means(value: Tensor | None, num_classes: int | None, width: int) -> Tensor | None:
    if num_classes is None:
        raise ValueError("Expected argument `num_classes` to be given where `neural_collapse` is, but got None.")
    if value is None:
        return None
    check_floating("class_means", value)
    if value.shape != (num_classes, width):
        raise ValueError(
            f"Expected argument `class_means` to be of shape {shape_of((num_classes, width))}, "
            f"but got {shape_of(value)}."
        )
    return value.detach().double().clone()
