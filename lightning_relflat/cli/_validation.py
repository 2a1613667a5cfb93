"""Running a model's validation step over a part of a user's data."""

from __future__ import annotations

import re
import sys
import warnings
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lightning_relflat.callbacks._watcher import interruptible
from lightning_relflat.cli._data import Part, SharedData
from lightning_relflat.cli._shared import InputError


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
        InputError: if there is no such part.
        KeyboardInterrupt: on Ctrl-C.
    """
    data.check(part)
    data.part = part
    with warnings.catch_warnings():
        # Whoever asked for the values says in one line that there are none.
        warnings.filterwarnings(
            "ignore", ".*so that (nothing was measured there|it is left out|there is no report on it)"
        )
        trainer = make_trainer(config, callbacks)
        with interruptible(trainer):
            own = data.data if isinstance(data.data, LightningDataModule) else None
            [values] = trainer.validate(model, datamodule=own, verbose=False)
    return {f"{part}/{re.sub(r'^val(id|idation)?[/_.]', '', name)}": value for name, value in values.items()}
