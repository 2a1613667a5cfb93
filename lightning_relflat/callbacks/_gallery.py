"""How pictures reach the loggers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_utilities.core.rank_zero import rank_zero_warn

from lightning_relflat._style import styled
from lightning_relflat.callbacks._base import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Gallery:
    """Gives pictures to all loggers; where one takes none, or there is none, to a file, and says so once.

    TensorBoard, MLflow and Weights & Biases take pictures by methods of their own.
    """

    def __init__(self) -> None:
        self._warned = False

    def show(self, trainer: Trainer, name: str, figure: Figure) -> None:
        """Give a picture away; to be called on global rank zero.

        Args:
            trainer: the Trainer.
            name: what it is called, with slashes.
            figure: the picture.
        """
        step = trainer.global_step
        folders = [] if trainer.loggers else [trainer.default_root_dir]
        with styled():  # how a picture is saved may be a setting of the user's, too
            for logger in trainer.loggers:
                give = _taker(logger, name, figure, step)
                if give is None:
                    folders.append(logger.log_dir or trainer.default_root_dir)
                else:
                    give()
            for folder in folders:
                _write(figure, Path(folder) / "figures" / name / f"{step:07d}.png")
        if folders and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"{'A logger takes no pictures' if trainer.loggers else 'There is no logger'}: FlatnessFigures' "
                f"pictures are written to {' and '.join(str(Path(folder) / 'figures') for folder in folders)}."
            )


def _taker(logger: Any, name: str, figure: Figure, step: int) -> Callable[[], object] | None:
    """Return what gives the picture to a logger, or None. By name, since each Lightning has classes of its own."""
    kinds = {kind.__name__ for kind in type(logger).__mro__}
    if "TensorBoardLogger" in kinds:
        return lambda: logger.experiment.add_figure(name, figure, global_step=step, close=False)
    if "MLFlowLogger" in kinds:
        return lambda: logger.experiment.log_figure(logger.run_id, figure, f"{name}/{step:07d}.png")
    if "WandbLogger" in kinds:
        return lambda: logger.log_image(key=name, images=[figure], step=step)
    return None


def _write(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    figure.savefig(part, format="png")
    part.replace(path)  # no reader ever sees half a picture
