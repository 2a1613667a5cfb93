"""What a report holds: plain numbers and texts, and the ways to look at them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lightning_relflat.report._comparison import Comparison

Source: TypeAlias = Literal["model", "inferred", "named"]


@dataclass(frozen=True)
class LossTaken:
    """Which loss a report is about.

    Attributes:
        name: what it is called.
        source: whether it is the model's own, inferred from outputs and targets, or named.
        reason: why it was taken, in a sentence.
    """

    name: str
    source: Source
    reason: str


@dataclass(frozen=True)
class LayerFlatness:
    """κ of a layer.

    Attributes:
        name: the layer's dotted name.
        kind: what it is.
        relative_flatness: κ; ``None`` where it could not be measured.
        error: the standard error of the estimate, 0 where κ is exact.
        reason: why it could not be measured.
    """

    name: str
    kind: str
    relative_flatness: float | None = None
    error: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class ClassFlatness:
    """κ of a class: of the loss of its own samples.

    Attributes:
        name: the class's name or number.
        samples: how many rows of the data are of the class.
        relative_flatness: κ; ``None`` for a class without any.
        accuracy: the share of them that is predicted rightly.
    """

    name: str
    samples: int
    relative_flatness: float | None
    accuracy: float | None


@dataclass(frozen=True)
class SharpSample:
    """A sample with a large part in κ.

    Attributes:
        index: its number, from 0, in the order of the loader or of the data set.
        relative_flatness: its part: where the loss is a mean over samples, κ is the mean of the parts.
        label: its class, where it has one.
        prediction: the class that is predicted.
        picture: a PNG file, where the input is a picture.
    """

    index: int
    relative_flatness: float
    label: str | None = None
    prediction: str | None = None
    picture: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True, repr=False)
class Report:
    """How flat a model is on some data.

    ``print`` shows it in words, a notebook as tables; :meth:`to_dict`, :meth:`plot` and :meth:`save` hand it on.

    Attributes:
        model: what the model is called.
        layer: the name of the layer that the report is about, its head.
        kind: what the head is.
        loss: which loss, and why.
        samples: how many samples the data had.
        batches: in how many batches.
        training: whether the model was measured in training mode.
        relative_flatness: κ of the head.
        error: the standard error of its estimate; 0 where κ is exact.
        made_of: what κ of the head is made of, its neighbours, and the signs that it means nothing, by the names of
            :func:`~lightning_relflat.functional.flatness_report.flatness_report`; empty where the loss is no criterion
            of the head's outputs with a closed form.
        widths: how many outputs and features the head has.
        mean_loss: the loss over the data.
        accuracy: the share of rows whose class is predicted rightly; ``None`` without classes.
        layers: κ of every layer that was asked for, in the order of the model.
        network: the sum of these layers' κ, and its standard error; ``None`` where none was asked for.
        classes: κ of every class; empty without classes.
        sharpest: the samples with the largest parts, the largest first; empty where no sample has a part of its own.
        notes: what was left out, and why, in sentences.
    """

    model: str
    layer: str
    kind: str
    loss: LossTaken
    samples: int
    batches: int
    training: bool
    relative_flatness: float
    error: float
    mean_loss: float
    made_of: dict[str, float] = field(default_factory=dict)
    widths: tuple[int, int] | None = None
    accuracy: float | None = None
    layers: tuple[LayerFlatness, ...] = ()
    network: tuple[float, float] | None = None
    classes: tuple[ClassFlatness, ...] = ()
    sharpest: tuple[SharpSample, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        from lightning_relflat._numbers import number, with_error

        kappa = with_error(self.relative_flatness, self.error) if self.error else number(self.relative_flatness)
        return f"Report({self.model}, layer={self.layer!r}, κ={kappa}, samples={self.samples})"

    def __str__(self) -> str:
        from lightning_relflat.report._text import text_of

        return text_of(self)

    def sentences(self) -> list[str]:
        """Return what the report says, in plain sentences."""
        from lightning_relflat.report._words import sentences_of

        return sentences_of(self)

    def compare(self, *others: Report, names: tuple[str, ...] | None = None) -> Comparison:
        """Return this report and others side by side.

        Args:
            others: the others.
            names: what each is called, this one first; else their models' names, numbered where they are the same.

        Returns:
            The comparison.

        Raises:
            ValueError: if there are not as many names as reports, or two are the same.
        """
        from lightning_relflat.report._comparison import Comparison

        return Comparison.of([self, *others], names)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values, which JSON can hold: what is not known or not finite is ``None``."""
        from lightning_relflat.report._text import plain_values

        found: dict[str, Any] = plain_values(self)
        return found

    def plot(self) -> Figure:
        """Draw κ of the layers, of the classes and of the sharpest samples.

        Returns:
            A figure of matplotlib.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        from lightning_relflat.report._plot import plot_reports

        return plot_reports({self.model: self})

    def save(self, path: str | Path) -> None:
        """Write the report as one HTML page, which needs no other file and no network.

        Args:
            path: the file, whose name ends with ``.html``.

        Raises:
            ValueError: if its name ends otherwise.
        """
        self.compare().save(path)

    def _repr_html_(self) -> str:
        from lightning_relflat.report._page import fragment_of

        return fragment_of({self.model: self})
