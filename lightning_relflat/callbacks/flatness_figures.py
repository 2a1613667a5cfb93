"""FlatnessFigures: pictures of what the monitors have measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_relflat._labels import class_names
from lightning_relflat._shown import show
from lightning_relflat.callbacks._base import Callback, LightningModule, Trainer, named
from lightning_relflat.callbacks._figures import Drawn, bars, check_matplotlib, curve_of_gaps, heat_map, sample_grid
from lightning_relflat.callbacks._gallery import Gallery
from lightning_relflat.callbacks._monitor import Monitor
from lightning_relflat.callbacks._step import Stage
from lightning_relflat.callbacks.flatness_monitor import FlatnessMonitor
from lightning_relflat.callbacks.layers_monitor import LayersMonitor
from lightning_relflat.callbacks.sharpest_monitor import SharpestMonitor, loaders_of
from lightning_relflat.functional._checks import check_count

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FlatnessFigures(Callback):
    """Draws what the Trainer's monitors have measured over validation and test data, for the loggers.

    There are bars of κ of each class (``report=["classes"]`` of a :class:`~lightning_relflat.FlatnessMonitor`), the
    matrix of the neuron pairs (``"neuron_pairs"``), bars of the layers of a :class:`~lightning_relflat.LayersMonitor`,
    the samples of a :class:`~lightning_relflat.SharpestMonitor` with their labels and predictions, and κ against the
    generalisation gap. They are drawn when ``fit``, ``validate`` or ``test`` ends, and more often if asked for, as
    ``val_flatness_figures/classes``, ``…/neuron_pairs``, ``…/layers``, ``…/sharpest_samples`` and ``…/gap``.
    TensorBoard, MLflow and Weights & Biases take pictures; for others they are written to files beside their logs.

    Classes are called what an attribute ``classes`` or ``class_names`` of the data set, the data module or the module
    calls them, if it has as many names; else by their numbers. Titles have the epoch and step of the loggers.

    Args:
        every_n_epochs: in ``fit``, draw after the validation of every n-th epoch too.
        gap: the names of two logged metrics, such as ``("train_loss", "val_loss")``, whose difference, the second minus
            the first, is the generalisation gap of an epoch. Then κ is drawn against it, a point for each epoch with a
            validation.
        flatness: which κ stands in that picture, by the name that it is logged with.

    Raises:
        ValueError: if an argument is not what it should be; with the first point, if a metric is not logged.
        ModuleNotFoundError: if matplotlib is not installed.

    Examples:
        >>> from lightning_relflat import FlatnessFigures
        >>> FlatnessFigures(every_n_epochs=10)
        FlatnessFigures(every_n_epochs=10)
    """

    def __init__(
        self,
        *,
        every_n_epochs: int | None = None,
        gap: tuple[str, str] | None = None,
        flatness: str = "val/relative_flatness",
    ) -> None:
        super().__init__()
        if every_n_epochs is not None:
            check_count("every_n_epochs", every_n_epochs, at_least=1)
        self.every_n_epochs = every_n_epochs
        self.gap = _check_gap(gap)
        self.flatness = flatness
        check_matplotlib()
        self._gallery = Gallery()
        self._points: list[tuple[int, float, float]] = []  # of the curve: epoch, gap, κ
        self._epoch = 0  # of the last validation
        self._validated = self._loaded = False
        self._undrawn = self._curve_due = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the curve, unless a checkpoint holds one."""
        if not self._loaded:
            self._points = []
        self._validated = self._loaded = False
        self._undrawn = self._curve_due = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the last epoch's gap; its training values were not there before."""
        self._note_gap(trainer)
        if self._curve_due:
            self._draw_curve(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the last epoch's gap, and draw what the last validation has not drawn."""
        self._note_gap(trainer)
        self._draw_curve(trainer)
        if self._undrawn:
            self._draw(trainer, "val")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw, if it is time."""
        if trainer.sanity_checking:
            return
        self._validated = self._undrawn = True
        self._epoch = trainer.current_epoch
        self._curve_due = self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.state.fn != "fit" or self._curve_due:
            self._draw(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw."""
        self._draw(trainer, "test")

    def state_dict(self) -> dict[str, Any]:
        """Return the points of the curve."""
        return {"gaps": list(self._points)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the points of the curve."""
        self._points = [(epoch, gap, value) for epoch, gap, value in state_dict["gaps"]]
        self._loaded = True

    def _draw(self, trainer: Trainer, stage: Stage) -> None:
        """Draw what there is of a stage."""
        self._undrawn = False
        if trainer.is_global_zero:
            for label, figure in self._figures(trainer, stage):
                self._gallery.show(trainer, label, figure)

    def _draw_curve(self, trainer: Trainer) -> None:
        """Draw κ against the gap, as far as the epochs have gone."""
        self._curve_due = False
        if trainer.is_global_zero and self._points and self.gap is not None:
            first, last = self._points[0][0], self._points[-1][0]
            where = f"validation data, epoch {first}" + (f" to {last}" if last > first else "")
            gap = f"{self.gap[1]} − {self.gap[0]}"
            figure = curve_of_gaps(self._points, "κ and the generalisation gap", where, gap=gap, flatness=self.flatness)
            self._gallery.show(trainer, named("val", "flatness_figures/gap", None), figure)

    def _figures(self, trainer: Trainer, stage: Stage) -> Iterator[tuple[str, Figure]]:
        """Draw what each monitor has measured of a stage, with what tells its pictures from others'."""
        callbacks: list[object] = trainer.callbacks  # type: ignore[union-attr]  # set by Lightning's connector
        for monitor in callbacks:
            measured: Iterator[tuple[str, Iterator[tuple[str, Figure]]]]
            if isinstance(monitor, FlatnessMonitor):
                keys = _behind(monitor.reports, stage)
                measured = ((behind, self._of_report(trainer, stage, behind, monitor)) for behind in keys)
            elif isinstance(monitor, LayersMonitor):
                keys = _behind(monitor.values, stage)
                measured = ((behind, self._of_layers(stage, behind, monitor)) for behind in keys)
            elif isinstance(monitor, SharpestMonitor):
                keys = _behind(monitor.samples, stage)
                measured = ((behind, self._of_samples(trainer, stage, behind, monitor)) for behind in keys)
            else:
                continue
            for behind, figures in measured:
                for label, figure in figures:
                    yield named(stage, f"flatness_figures/{label}", monitor.name) + behind, figure

    def _of_report(
        self, trainer: Trainer, stage: Stage, behind: str, monitor: FlatnessMonitor
    ) -> Iterator[tuple[str, Figure]]:
        values = {name: value.cpu() for name, value in monitor.reports[f"{stage}{behind}"].items()}
        where = _where(monitor, stage, behind, f"layer {monitor.measured_layer}")
        if "per_class" in values and isinstance(monitor.report, Sequence) and "classes" in monitor.report:
            parts = values["per_class"].tolist()
            names = self._class_names(trainer, stage, behind, len(parts))
            numbers = [f"class {number}" for number in range(len(parts))]
            yield "classes", bars(parts, names or numbers, "κ of each class", where)
        if "neuron_pairs" in values:
            pairs: Tensor = values["neuron_pairs"]
            names = self._class_names(trainer, stage, behind, len(pairs))
            yield "neuron_pairs", heat_map(pairs, names, "κ by pairs of outputs", where)

    def _of_layers(self, stage: Stage, behind: str, monitor: LayersMonitor) -> Iterator[tuple[str, Figure]]:
        names, flatness, errors = monitor.values[f"{stage}{behind}"]
        where = _where(monitor, stage, behind)
        yield "layers", bars(flatness, names, "κ of each layer ± standard error", where, errors=errors)

    def _of_samples(
        self, trainer: Trainer, stage: Stage, behind: str, monitor: SharpestMonitor
    ) -> Iterator[tuple[str, Figure]]:
        data, samples = _loader(trainer, stage, behind).dataset, monitor.samples[f"{stage}{behind}"]
        names = self._class_names(trainer, stage, behind, monitor.num_classes)
        drawn = [
            Drawn(data[one.index], one.index, one.part, _called(one.label, names), _called(one.prediction, names))
            for one in samples
        ]
        where = _where(monitor, stage, behind, f"layer {monitor.measured_layer}")
        yield "sharpest_samples", sample_grid(drawn, "The sharpest samples", where)

    def _class_names(self, trainer: Trainer, stage: Stage, behind: str, count: int | None) -> list[str] | None:
        owners = getattr(trainer, "datamodule", None), trainer.lightning_module
        return class_names(count, getattr(_loader(trainer, stage, behind), "dataset", None), *owners)

    def _note_gap(self, trainer: Trainer) -> None:
        """Add a point to the curve, when all values of an epoch with a validation are logged."""
        validated, self._validated = self._validated, False
        if self.gap is None or not validated:
            return
        logged = trainer.callback_metrics
        wanted = [*self.gap, self.flatness if self.flatness in logged else f"{self.flatness}/dataloader_idx_0"]
        if not set(wanted) <= set(logged):
            raise ValueError(
                f"Expected arguments `gap` and `flatness` to name logged metrics, of "
                f"{', '.join(sorted(map(repr, logged)))}, but got {self.gap!r} and {self.flatness!r}."
            )
        train, val, value = (float(logged[name]) for name in wanted)
        self._points.append((self._epoch, val - train, value))


_DATA: dict[Stage, str] = {"val": "validation", "test": "test"}


def _behind(values: dict[str, Any], stage: Stage) -> list[str]:
    """Return what stands behind a stage's name in the keys of its values: a data loader's number, or nothing."""
    return [key[len(stage) :] for key in values if key.partition("/")[0] == stage]


def _where(monitor: Monitor, stage: Stage, behind: str, *more: str) -> str:
    """Say of which data and, after training, when: by the epoch and step of the loggers."""
    epoch, step = monitor.measured_at[stage]
    loader = [f"loader {_number(behind)}"] if behind else []
    return ", ".join([f"{_DATA[stage]} data", *loader, *([f"epoch {epoch}, step {step}"] if step else []), *more])


def _number(behind: str) -> int:
    return int(behind.rpartition("_")[2] or 0)


def _loader(trainer: Trainer, stage: Stage, behind: str) -> Any:
    return loaders_of(trainer, stage)[_number(behind)]


def _called(number: float | None, names: Sequence[str] | None) -> str | None:
    """Return what a class is called, or a number that is none."""
    if number is None:
        return None
    return f"{number:.4g}" if names is None else names[int(number)]


def _check_gap(gap: object) -> tuple[str, str] | None:
    if gap is None:
        return None
    if isinstance(gap, Sequence) and len(gap) == 2 and all(isinstance(name, str) for name in gap):
        return gap[0], gap[1]
    raise ValueError(f"Expected argument `gap` to be the names of two logged metrics, or None, but got {show(gap)}.")
