"""κ, what it is made of, its neighbours, and the signs that it means nothing, over a data set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat.functional._checks import check_count, check_flag
from lightning_relflat.functional.flatness_report import report_from_sums, report_sums
from lightning_relflat.metrics.layer_measures import LayerMeasure, check_weight_shape


class FlatnessReport(LayerMeasure):
    r"""A report on the flatness of a linear layer over a data set: one update feeds the whole family of measures.

    What several of them need is computed once. All states are sums over samples, so that batches and processes of
    uneven sizes give exactly the report on their union.

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
        class_dim: as for :func:`~lightning_relflat.functional.relative_flatness`.
        kwargs: the arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: if the loss has no closed form or does not reduce to a mean or a sum, or a count is no positive
            integer.

    Example:
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

    def __init__(
        self,
        loss: str | nn.Module = "cross_entropy",
        *,
        in_features: int,
        out_features: int,
        num_classes: int | None = None,
        neuron_pairs: bool = False,
        class_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(loss, class_dim=class_dim, **kwargs)
        m = check_count("in_features", in_features, at_least=1)
        d = check_count("out_features", out_features, at_least=1)
        self.num_classes = None if num_classes is None else check_count("num_classes", num_classes, at_least=1)
        self._shape = d, m
        self._add_totals(8)
        self._add_sums("pairs", m, m)
        self._add_sums("moments", 2, m)
        self._names = ["pairs", "moments"]
        if self.num_classes is not None:
            self._names.append("per_class")
            self._add_sums("per_class", 2, self.num_classes)
        if check_flag("neuron_pairs", neuron_pairs):
            self._names.append("neuron_pairs")
            self._add_sums("neuron_pairs", d, d)

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
        check_weight_shape(weight, self._shape)
        with torch.no_grad():
            sums = report_sums(
                features,
                weight,
                outputs,
                target,
                loss=self.loss,
                num_classes=self.num_classes,
                neuron_pairs="neuron_pairs" in self._names,
                class_dim=self.class_dim,
            )
        self._add_to_totals(*sums["totals"])
        for name in self._names:
            setattr(self, name, getattr(self, name) + sums[name].to(self.totals))

    def compute(self) -> dict[str, Tensor]:
        """Return the report on all data so far, over all processes."""
        sums = {name: getattr(self, name) for name in self._names}
        return report_from_sums({"totals": self.totals[:-1], **sums}, mean=self._mean)
