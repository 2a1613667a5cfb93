"""``coefficient="auto"`` with numbers of one's own, so that λ follows the loss from the first steps of a small net."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from lightning_relflat import FAM
from lightning_relflat.callbacks.coefficients import Automatic, Coefficients


class Share(FAM):
    """Its λκ may be another share of what the loss has fallen, and its λ however large."""

    def __init__(self, layer: str, share: float, **options: Any) -> None:
        super().__init__(layer, "auto", **options)
        self.share = share
        rule = partial(Automatic, share, math.inf)
        self._coefficients = Coefficients(self.every_n_steps, self.start_epoch, rule)
