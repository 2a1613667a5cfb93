"""``relflat measure``: the report of a checkpoint on training and validation data."""

from __future__ import annotations

import re
import sys
import warnings
from typing import Any, Literal, get_args

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import RichProgressBar
from torch.utils.data import DataLoader, IterableDataset, Subset

from lightning_relflat._numbers import number
from lightning_relflat.callbacks import FlatnessMonitor
from lightning_relflat.callbacks._trial import interruptible
from lightning_relflat.cli._checkpoint import load_model
from lightning_relflat.cli._shared import (
    InputError,
    Parser,
    Result,
    add_classes,
    add_hardware,
    add_layer,
    add_outputs,
    build,
    check_outputs,
    class_path,
    find_loss,
    new_table,
)

Part = Literal["train", "val"]
Measure = Literal[
    "relative_flatness",
    "weight_norm",
    "feature_norm",
    "curvature",
    "hessian_trace",
    "layer_trace",
    "column_flatness_max",
    "column_flatness_sum",
    "standardized",
    "flat_samples",
    "dead_features",
    "zero_rows",
]
MEANINGS: dict[str, str] = {
    "relative_flatness": "κ, the product of the next three",
    "weight_norm": "‖W‖²",
    "feature_norm": "mean ‖φ‖²",
    "curvature": "κ for weight and features of unit norm",
    "hessian_trace": "Tr(H)",
    "layer_trace": "‖W‖² Tr(H)",
    "column_flatness_max": "max ρ(j)",
    "column_flatness_sum": "Σ ρ(j)",
    "standardized": "κ of features of unit variance",
    "flat_samples": "share of saturated samples",
    "dead_features": "share of features that are always zero",
    "zero_rows": "share of rows of W that are zero",
}
EPILOG = """\
examples:
  relflat measure last.ckpt --model my.Net --data my.Data
  relflat measure last.ckpt --model my.Net --model.width 64 --data my.Data --data.batch_size 256 --layer head
  relflat measure last.ckpt --config run.yaml --measures relative_flatness weight_norm --json > last.json
  relflat measure last.ckpt --model my.Net --data my.Data --devices 2

Every sample of `train_dataloader` and `val_dataloader` counts once, in order, whatever shuffles or drops batches in
training; both go through the model's `validation_step`, whose logged values are shown too. The model's arguments are
those that `save_hyperparameters` put into the checkpoint, unless given.
"""


def make_parser() -> ArgumentParser:
    """Return the command's parser."""
    parser = Parser(
        description="Measure the relative flatness of a checkpoint, what it is made of, and its neighbours.",
        epilog=EPILOG,
    )
    parser.add_argument("ckpt", type=str, metavar="CKPT", help="The checkpoint.")
    add_checkpoint_options(parser)
    parser.add_argument("--split", type=Literal["train", "val", "both"], default="both", help="The data.")
    parser.add_argument(
        "--measures", type=Measure, nargs="+", metavar="MEASURE", help="Which to show, of those of the table; else all."
    )
    add_outputs(parser)
    return parser


def add_checkpoint_options(parser: ArgumentParser, *, of_one_layer: bool = True) -> None:
    """Add what is needed to measure a checkpoint.

    Args:
        parser: the command's parser.
        of_one_layer: whether it is told which layer, and which loss of its outputs.
    """
    add_classes(parser)
    if of_one_layer:
        add_layer(parser)
    add_hardware(parser)
    parser.add_argument(
        "--trust",
        action="store_true",
        help="Load a checkpoint that holds more than tensors and plain values; such a file can run any code.",
    )


def run(config: Namespace, given: Namespace) -> Result:
    """Measure.

    Args:
        config: the options.
        given: those that the user gave.

    Returns:
        The report.
    """
    check_outputs(config)
    if config.ckpt is None:
        raise InputError("name a checkpoint: relflat measure CKPT --model package.module.Class --data …")
    measures = list(get_args(Measure)) if config.measures is None else config.measures
    parts: list[Part] = ["train", "val"] if config.split == "both" else [config.split]
    layer, values = report_checkpoint(config.ckpt, config, given, parts=parts, measures=measures)
    title = f"{config.ckpt}, layer {layer}, loss {config.loss or 'of the step'}"
    heads = {"train": "training", "val": "validation"}
    table = new_table(title, "", *(heads[part] for part in parts), *(["difference"] if len(parts) == 2 else []))
    table.add_column("what it is")
    names = list(dict.fromkeys(name.partition("/")[2] for name in values))
    own = [name for name in names if not is_flatness(name)]
    of_report = [name for measure in measures if (name := _logged(measure)) in names]
    for index, name in enumerate([*own, *of_report]):
        numbers = [values.get(f"{part}/{name}") for part in parts]
        shown = [number(value) for value in numbers]
        if len(parts) == 2:
            train, val = numbers
            shown.append("" if train is None or val is None or name not in own else number(val - train))
        meaning = "logged by the model" if name in own else MEANINGS[name.rpartition("/")[2]]
        table.add_row(name.removeprefix("flatness/"), *shown, meaning, end_section=index == len(own) - 1)
    data = {
        "checkpoint": config.ckpt,
        "model": class_path(config.model, "model"),
        "layer": layer,
        "loss": config.loss,
        "values": values,
    }
    return Result(data, [table])


def _logged(measure: str) -> str:
    return measure if measure == "relative_flatness" else f"flatness/{measure}"


def is_flatness(name: str) -> bool:
    """Return whether a value comes from the monitor.

    Args:
        name: its name, without the part of the data.

    Returns:
        Whether it does.
    """
    return name.startswith(("relative_flatness", "flatness/", "layer_flatness", "network_flatness"))


def report_checkpoint(
    path: str, config: Namespace, given: Namespace, *, parts: list[Part], measures: list[str]
) -> tuple[str, dict[str, float]]:
    """Measure a checkpoint.

    Args:
        path: the file.
        config: the options.
        given: those that the user gave.
        parts: the data.
        measures: which values of the report.

    Returns:
        The layer's name, and the values by names that begin with the part of the data.

    Raises:
        InputError: if something cannot be found or does not fit.
    """
    model, data = load(path, config, given)
    loss = find_loss(config.loss)
    report = measures != ["relative_flatness"]
    values: dict[str, float] = {}
    layer = None
    for part in parts:
        monitor = FlatnessMonitor(config.layer, loss, target=config.target, report=report, seed=config.seed)
        found = validate(model, data, part, config, [monitor])
        layer = monitor.measured_layer
        missing = {_logged(measure) for measure in measures} - {name.partition("/")[2] for name in found}
        if layer is None or missing:
            raise InputError(
                "`validation_step` shows no loss that depends on the layer, or none with a closed form; return the "
                "loss there or log it, or name it with --loss"
            )
        wanted = {_logged(measure) for measure in measures}
        values |= {
            name: value
            for name, value in found.items()
            if (own := name.partition("/")[2]) in wanted or not is_flatness(own)
        }
    assert layer is not None
    return layer, values


def load(path: str, config: Namespace, given: Namespace) -> tuple[LightningModule, SharedData]:
    """Return the model of a checkpoint, and the data.

    Args:
        path: the file.
        config: the options.
        given: those that the user gave.

    Returns:
        Both.

    Raises:
        InputError: if something cannot be found or does not fit.
    """
    class_path(config.model, "model")
    class_path(config.data, "data")
    check_devices(config)
    seed_everything(config.seed, workers=True, verbose=False)
    return load_model(path, config, given), SharedData(build(config.data, "data"))


def check_devices(config: Namespace) -> None:
    """Refuse a number of processes that is none.

    Args:
        config: the options.

    Raises:
        InputError: if it is.
    """
    if config.devices < 1:
        raise InputError(f"--devices {config.devices}: give a number of processes from 1 on")


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
        warnings.filterwarnings("ignore", ".*(so that nothing was measured there|so that it is left out)")
        trainer = make_trainer(config, callbacks)
        with interruptible(trainer):
            [values] = trainer.validate(model, datamodule=data.data, verbose=False)
    return {f"{part}/{re.sub(r'^val(id|idation)?[/_.]', '', name)}": value for name, value in values.items()}
