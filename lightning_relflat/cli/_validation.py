"""Running a model's validation step over a user's data, in which every sample counts once."""

from __future__ import annotations

import re
import sys
import warnings
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_relflat.callbacks._watcher import interruptible
from lightning_relflat.cli._shared import InputError

Part = Literal["train", "val"]


class SharedData:
    """A user's data module, from which each process gets its share of the whole training or validation set.

    Every sample is given once, in order, to one process. Lightning's own sampler repeats samples, so that every process
    has as many.

    Args:
        data: the data module.
    """

    def __init__(self, data: LightningDataModule) -> None:
        self.data = data
        self.part: Part = "val"
        self._setup = data.setup
        self._loaders = {"train": data.train_dataloader, "val": data.val_dataloader}
        self._ready = False
        # The data module itself goes to the Trainer, so that its hooks for moving batches count.
        data.setup = self._setup_once  # type: ignore[method-assign]
        data.val_dataloader = self._share  # type: ignore[method-assign]

    def _setup_once(self, stage: str) -> None:  # noqa: ARG002
        if not self._ready:  # so that a split drawn at random is one and the same
            self._setup("fit")  # sets up both parts
        self._ready = True

    def _share(self) -> Any:
        loader = self._loaders[self.part]()
        trainer = self.data.trainer
        rank, world = (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)
        if not isinstance(loader, DataLoader) and (world > 1 or isinstance(loader, list | tuple | dict)):
            raise InputError(
                f"{self.part}_dataloader returns a {type(loader).__name__}; only a single DataLoader can be measured"
            )
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            if world > 1:
                raise InputError(
                    f"{self.part}_dataloader has an IterableDataset, which processes cannot share; use --devices 1"
                )
            return loader
        how: dict[str, Any] = {
            "collate_fn": loader.collate_fn,
            "num_workers": loader.num_workers,
            "pin_memory": loader.pin_memory,
            "timeout": loader.timeout,
            "worker_init_fn": loader.worker_init_fn,
            "multiprocessing_context": loader.multiprocessing_context,
        }
        size = len(loader.dataset)  # type: ignore[arg-type]
        if size < world:
            raise InputError(f"the {self.part} data has {size} samples, fewer than --devices {world}; give fewer")
        # Samples rather than batches are dealt out, so that values averaged over processes hardly differ.
        share = Subset(loader.dataset, range(rank, size, world))
        makes_batches = loader.batch_size is None and loader.batch_sampler is None  # the data set does
        return DataLoader(share, batch_size=None if makes_batches else loader.batch_size or 64, **how)


def make_trainer(config: Namespace, callbacks: list[Callback]) -> Trainer:
    """Return a Trainer that leaves nothing on the disk, with a progress bar where there is a terminal to show it.

    Args:
        config: the options.
        callbacks: its callbacks.

    Returns:
        The Trainer.

    Raises:
        InputError: if it does not take the options.
    """
    show = sys.stderr.isatty()
    bar: list[Callback] = [RichProgressBar(console_kwargs={"stderr": True})] if show else []
    settings: dict[str, Any] = {
        "accelerator": config.accelerator,
        "devices": config.devices,
        "strategy": "ddp" if config.devices > 1 else "auto",
        "precision": config.precision,
        "callbacks": [*callbacks, *bar],
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": show,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
    }
    try:
        return Trainer(**settings)
    except ValueError as error:  # its words for a wrong --accelerator, --devices or --precision
        raise InputError(str(error)) from error


def validate(
    model: LightningModule,
    data: SharedData,
    part: Part,
    config: Namespace,
    callbacks: list[Callback],
) -> dict[str, float]:
    """Run the model's validation step over a part of the data.

    Args:
        model: the model.
        data: the data.
        part: which part of it.
        config: the options.
        callbacks: for the Trainer.

    Returns:
        All that was logged, by names that begin with the part of the data.

    Raises:
        KeyboardInterrupt: on Ctrl-C.
    """
    data.part = part
    with warnings.catch_warnings():
        # Whoever asked for the values says in one line that there are none.
        warnings.filterwarnings(
            "ignore", ".*so that (nothing was measured there|it is left out|there is no report on it)"
        )
        trainer = make_trainer(config, callbacks)
        with interruptible(trainer):
            [values] = trainer.validate(model, datamodule=data.data, verbose=False)
    return {f"{part}/{re.sub(r'^val(id|idation)?[/_.]', '', name)}": value for name, value in values.items()}
