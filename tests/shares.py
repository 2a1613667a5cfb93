"""``coefficient="auto"`` with a factor of one's own, as a policy has it."""

from __future__ import annotations

from typing import Any

from lightning_relflat import FAM


class Share(FAM):
    """Its λκ may be another share of what the loss has fallen; it passes warm-up, late epochs and left-out steps on."""

    def __init__(self, layer: str, share: float, **options: Any) -> None:
        super().__init__(layer, "auto", **options)
        self.share = share

    def coefficient_at(self, *, epoch: int, step: int) -> float:
        own = FAM(self.layer, "auto").coefficient_at(epoch=0, step=0)
        return super().coefficient_at(epoch=epoch, step=step) * (self.share / own)
