"""find_coefficient: train with several coefficients of FAM as one would train, and suggest one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_relflat._shown import show
from lightning_relflat.callbacks import FAM
from lightning_relflat.callbacks._base import LightningModule, Trainer
from lightning_relflat.callbacks._trial import Trial, lightning_package, quietly
from lightning_relflat.callbacks._watcher import too_short
from lightning_relflat.callbacks.coefficients import check_coefficient
from lightning_relflat.coefficient_search import Candidate, CoefficientSearch, Curve, lowest
from lightning_relflat.coefficient_search import show as show_candidate
from lightning_relflat.functional._checks import check_count


class SearchInterruptedError(KeyboardInterrupt):
    """A search was interrupted. Its message is the table so far.

    Args:
        search: what was found until then.

    Attributes:
        search: likewise.
    """

    def __init__(self, search: CoefficientSearch) -> None:
        super().__init__(f"\n{search!r}")
        self.search = search


def find_coefficient(
    trainer: Trainer,
    model: LightningModule | Callable[[], LightningModule],
    datamodule: Any = None,
    *,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    fam: FAM | None = None,
    candidates: Sequence[Candidate] = ("auto", 0.001, 0.01, 0.1, 1.0),
    max_epochs: int | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    monitor: str | None = None,
) -> CoefficientSearch:
    """Train with each of several coefficients of FAM, and suggest one of them.

    For every seed and every candidate a copy of the Trainer trains a copy of the model to the end, all of one seed from
    the same weights and on the same batches. Of each run the epoch counts whose validation loss is lowest. Suggested
    is, of the coefficients whose validation loss lies within one standard error of the lowest, the one with the
    smallest κ. That costs as many trainings as there are candidates times seeds. Shorter ones favour a small λ, because
    a penalty slows learning at first: what is found says for which λ the validation loss still fell at the end.

    Everything is as the Trainer has it: processes, precision, clipping, when it validates, its callbacks. Copies do
    without its loggers, checkpoints, progress bar (there is one of the whole search), summary, profiler, and without
    the callbacks of this package that only watch. The Trainer, the model, the data and the random state are left as
    they were. On several processes all come to the same.

    Args:
        trainer: a Trainer that has not trained yet, of which every process lives through several fits (``ddp``, not
            ``ddp_spawn`` or ``ddp_notebook``).
        model: the module, all runs of which start from its weights, so that seeds differ in batches and noise alone;
            or what makes one when it is called, as its class: then every seed has weights of its own.
        datamodule: the data module, copied for each run, or what makes one when it is called.
        train_dataloaders: as for ``Trainer.fit``, in place of a data module.
        val_dataloaders: likewise.
        fam: the penalty whose coefficient is sought; ``None`` for that of the Trainer's callbacks, or ``FAM()`` if
            there is none.
        candidates: the coefficients, numbers or ``"auto"``. 0, plain training, is tried in any case.
        max_epochs: how long each run is; ``None`` for as long as the Trainer trains.
        seeds: for each, a run of every candidate. With one there are no standard errors.
        monitor: the name under which the validation loss is logged, which is to be small; ``None`` for the one that
            ``validation_step`` logs as ``val/loss``, ``val_loss`` or the like, or that alone has "loss" in its name.

    Returns:
        The validation losses and κ of all candidates, and the suggestion; printed, it is a table.

    Raises:
        ValueError: if an argument is not what it should be, there is nothing to validate, no validation loss is
            logged, or a run would validate but once.
        RuntimeError: if training diverges with all candidates, κ cannot be measured, or something cannot be copied.
        SearchInterruptedError: on Ctrl-C. It is a ``KeyboardInterrupt``; its message is the table so far.

    Examples:
        >>> import lightning as L, torch
        >>> from lightning_relflat import find_coefficient
        >>> class Net(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.head = torch.nn.Linear(2, 2)
        ...     def training_step(self, batch):
        ...         return torch.nn.functional.cross_entropy(self.head(batch[0]), batch[1])
        ...     def validation_step(self, batch):
        ...         self.log("val/loss", self.training_step(batch))
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> data = torch.utils.data.TensorDataset(torch.eye(2), torch.tensor([0, 1]))
        >>> loader = torch.utils.data.DataLoader(data, batch_size=2)
        >>> quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = L.Trainer(max_epochs=4, accelerator="cpu", **quiet)
        >>> found = find_coefficient(trainer, Net, train_dataloaders=loader, val_dataloaders=loader, candidates=[10.0])
        >>> found.suggestion, found.unfinished
        (0.0, [0.0, 10.0])
    """
    package = lightning_package(trainer)
    _check_trainer(trainer, max_epochs)
    asked, seeds = _check_candidates(candidates), _check_seeds(seeds)
    data = {"datamodule": datamodule, "train_dataloaders": train_dataloaders, "val_dataloaders": val_dataloaders}
    trial = Trial(package, trainer, model, data, _find_fam(trainer, fam), max_epochs, monitor)
    curves: dict[Candidate, list[Curve]] = {candidate: [] for candidate in asked}

    def found() -> CoefficientSearch:
        return CoefficientSearch(asked, seeds, {key: tuple(runs) for key, runs in curves.items()}, trial.monitor)

    shown = trainer.is_global_zero and trainer.progress_bar_callback is not None
    bar = tqdm(total=len(asked) * len(seeds), disable=not shown, leave=False, unit="run")
    with bar, quietly(), trial.seeding():
        try:
            for seed in seeds:
                for candidate in asked:
                    label = f"seed {seed}, λ = {show_candidate(candidate)}"
                    tell = partial(_tell, bar, label)
                    curves[candidate].append(trial.run(candidate, seed, tell))
                    bar.update()
        except KeyboardInterrupt:
            raise SearchInterruptedError(found()) from None
    lowest(found().losses)  # there is one, or it says why not
    return found()


def _tell(bar: tqdm, label: str, epoch: int) -> None:
    """Show where the search is."""
    bar.set_description(f"{label}, epoch {epoch}")


def _check_trainer(trainer: Any, max_epochs: int | None) -> None:
    """Refuse a Trainer that cannot train anew, or would not stop, or validate."""
    if trainer.fast_dev_run:
        raise ValueError("Expected argument `trainer` to train, but got one with `fast_dev_run`.")
    if trainer.global_step or trainer.current_epoch:
        raise ValueError(
            "Expected argument `trainer` to be one that has not trained yet, but got one in epoch "
            f"{trainer.current_epoch}. Make a new one."
        )
    # Elsewhere it is only seen afterwards that nothing came back.
    if any(kind.__name__ == "_MultiProcessingLauncher" for kind in type(trainer.strategy.launcher).__mro__):
        raise ValueError(
            "Expected argument `trainer` to keep its processes from one fit to the next, but got a strategy that makes "
            "new ones each time, as `ddp_spawn` and `ddp_notebook` do. Take `ddp`, or one device."
        )
    if max_epochs is not None:
        check_count("max_epochs", max_epochs, at_least=1)
    epochs = trainer.max_epochs if max_epochs is None else max_epochs
    if epochs in (None, -1) and trainer.max_steps == -1:
        raise ValueError(
            "Expected argument `max_epochs` to say how long a run is, because the Trainer does not, but got "
            f"{max_epochs}. Give as many epochs as you train for."
        )
    every, interval = trainer.check_val_every_n_epoch, trainer.val_check_interval
    once_an_epoch = every is not None and isinstance(interval, float) and interval == 1
    if once_an_epoch and epochs not in (None, -1) and epochs // every < 2:
        raise too_short(f"{epochs}, with a validation every {every} epochs" if every > 1 else str(epochs))


def _check_candidates(candidates: Sequence[Candidate]) -> tuple[Candidate, ...]:
    """Return the coefficients, 0 first."""
    values = [candidates] if isinstance(candidates, str) else list(candidates)
    read = [check_coefficient(value) for value in values]
    wrong = [value for value in read if value != "auto" and value < 0]
    others = list(dict.fromkeys(value for value in read if value != 0))
    if wrong or not others:
        raise ValueError(
            f"Expected argument `candidates` to hold numbers from 0 on or 'auto', and more than 0, but got {values}."
        )
    return (0.0, *others)


def _check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Return the seeds."""
    values = tuple(check_count("seeds", seed, at_least=0) for seed in seeds)
    if not values or len(set(values)) < len(values):
        raise ValueError(f"Expected argument `seeds` to be one or more different integers, but got {list(values)}.")
    return values


def _find_fam(trainer: Any, fam: FAM | None) -> tuple[FAM, int | None]:
    """Return the penalty, and its place among the Trainer's callbacks, if it is one of them."""
    callbacks = trainer.callbacks
    if fam is not None and not isinstance(fam, FAM):
        raise ValueError(f"Expected argument `fam` to be a FAM, or None, but got {show(fam)}.")
    places = [place for place, callback in enumerate(callbacks) if isinstance(callback, FAM)]
    if fam is not None:
        return fam, next((place for place in places if callbacks[place] is fam), None)
    if len(places) > 1:
        raise ValueError(
            f"Expected argument `fam` to be the one whose coefficient is sought, because the Trainer has {len(places)} "
            "of them, but got None."
        )
    return (callbacks[places[0]], places[0]) if places else (FAM(), None)
