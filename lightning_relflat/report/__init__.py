"""What ``measure`` returns: a report in words, tables, pictures and one HTML page. Needs torch and torchmetrics."""

from lightning_relflat.report._collector import Collector, Seen
from lightning_relflat.report._comparison import Comparison
from lightning_relflat.report._report import ClassFlatness, LayerFlatness, LossTaken, Report, SharpSample

__all__ = [
    "ClassFlatness",
    "Collector",
    "Comparison",
    "LayerFlatness",
    "LossTaken",
    "Report",
    "Seen",
    "SharpSample",
]


def __dir__() -> list[str]:
    return sorted(__all__)
