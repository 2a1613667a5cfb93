"""What there is to measure of a step, and how: of its loss in the graph, or of a criterion of a layer's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat.claims import Criterion
from lightning_relflat.curvature_sums import Probes, sums_of_callable, sums_of_criterion, sums_of_loss
from lightning_relflat.functional.criteria import has_closed_form
from lightning_relflat.layer_tap import LayerRecord, LayerTap


@dataclass(frozen=True, eq=False)
class Measurable:
    """What there is to measure of a step.

    Attributes:
        loss: the loss, in the graph of the records; ``None`` where a claim stands for it.
        records: the passes that it depends on.
        called: a criterion or callable of the records' outputs that is the loss, and its target; ``None`` if none is
            known.
        holds: on a device, whether the criterion that the step has called still has the value of the loss that the step
            shows; ``None`` where that is known already, or nothing rests on it.
    """

    loss: Tensor | None
    records: Sequence[LayerRecord]
    called: tuple[Criterion, Any] | None
    holds: Tensor | None = None

    def sums(self, probes: Probes, tap: LayerTap, *, training: bool) -> Tensor | None:
        """Return the sums of κ, as :mod:`lightning_relflat.curvature_sums` has them.

        Args:
            probes: for what has no closed form.
            tap: what has listened to the layer.
            training: whether the module was in training mode.

        Returns:
            The sums, all NaN if the loss is another than the criterion; ``None`` if it does not depend on the layer.
        """
        if self.loss is not None:
            with tap.staying_whole():
                sums = sums_of_loss(self.loss, self.records, probes, behind=tap.behind, mode=training)
            return sums if self.holds is None or sums is None else sums.where(self.holds, torch.nan)
        assert self.called is not None
        found, (criterion, target) = [], self.called
        for record in self.records:
            batch = record.features.detach(), record.weight.detach(), record.outputs.detach(), target
            if has_closed_form(criterion):
                assert isinstance(criterion, nn.Module)
                found.append(sums_of_criterion(*batch, criterion))
            else:
                found.append(sums_of_callable(*batch, criterion, probes))
        return torch.stack(found).sum(dim=0)
