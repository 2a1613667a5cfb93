"""FlatnessFigures: pictures of what the monitors have measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lightning_relflat._shown import show
from lightning_relflat.callbacks._base import Callback, LightningModule, Trainer, labelled
from lightning_relflat.callbacks._figures import Gallery, bars, check_matplotlib, curve_of_gaps, heat_map, sample_grid
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
    the samples of a :class:`~lightning_relflat.SharpestMonitor`, and κ against the generalisation gap. They are drawn
    when ``fit``, ``validate`` or ``test`` ends, and more often if asked for. TensorBoard, MLflow and Weights & Biases
    take pictures; for others they are written to files beside their logs.

    Args:
        every_n_epochs: in ``fit``, draw after the validation of every n-th epoch too.
        gap: the names of two logged metrics, such as ``("train_loss", "val_loss")``, whose difference, the second minus
            the first, is the generalisation gap of an epoch. Then κ is drawn against it, a point for each epoch with a
            validation.
        flatness: which κ stands in that picture, by the name that it is logged with.

    Raises:
        ValueError: if an argument is not what it should be; with the first point, if a metric is not logged.
        ModuleNotFoundError: if matplotlib is not installed.

    Example:
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
        self._points: list[tuple[float, float]] = []
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
        self._points = [(gap, value) for gap, value in state_dict["gaps"]]
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
            gaps, values = zip(*self._points, strict=True)
            figure = curve_of_gaps(gaps, values, f"{self.gap[1]} − {self.gap[0]}", self.flatness)
            self._gallery.show(trainer, "val/flatness_and_gap", figure)

    def _figures(self, trainer: Trainer, stage: Stage) -> Iterator[tuple[str, Figure]]:
        callbacks: list[object] = trainer.callbacks  # type: ignore[union-attr]  # set by Lightning's connector
        for monitor in callbacks:
            if isinstance(monitor, FlatnessMonitor):
                for behind, report in _of(monitor.reports, stage):
                    values = {name: value.cpu() for name, value in report.items()}
                    if "per_class" in values and isinstance(monitor.report, Sequence) and "classes" in monitor.report:
                        parts = values["per_class"].tolist()
                        figure = bars(parts, list(map(str, range(len(parts)))), f"κ of each class, {stage}")
                        yield labelled(f"{stage}/class_flatness", monitor.name) + behind, figure
                    if "neuron_pairs" in values:
                        figure = heat_map(values["neuron_pairs"], f"part in κ, {stage}")
                        yield labelled(f"{stage}/neuron_pairs", monitor.name) + behind, figure
            elif isinstance(monitor, LayersMonitor):
                for behind, (names, flatness, errors) in _of(monitor.values, stage):
                    figure = bars(flatness, names, f"κ of each layer ± standard error, {stage}", errors)
                    yield labelled(f"{stage}/layer_flatness", monitor.name) + behind, figure
            elif isinstance(monitor, SharpestMonitor):
                loaders = loaders_of(trainer, stage)
                for behind, samples in _of(monitor.samples, stage):
                    loader = loaders[int(behind.rpartition("_")[2] or 0)]
                    found = [loader.dataset[sample.index] for sample in samples]
                    figure = sample_grid(found, [one.part for one in samples], [one.index for one in samples])
                    yield labelled(f"{stage}/sharpest_samples", monitor.name) + behind, figure

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
        self._points.append((val - train, value))


def _of(values: dict[str, Any], stage: Stage) -> list[tuple[str, Any]]:
    """Return the values of a stage, with what stands behind its name."""
    return [(key[len(stage) :], value) for key, value in values.items() if key.partition("/")[0] == stage]


def _check_gap(gap: object) -> tuple[str, str] | None:
    if gap is None:
        return None
    if isinstance(gap, Sequence) and len(gap) == 2 and all(isinstance(name, str) for name in gap):
        return gap[0], gap[1]
    raise ValueError(f"Expected argument `gap` to be the names of two logged metrics, or None, but got {show(gap)}.")
