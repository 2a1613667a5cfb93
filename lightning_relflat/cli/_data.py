"""A user's data, whatever it comes in, of which every sample counts once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.core.hooks import DataHooks
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lightning_relflat.cli._shared import InputError

Part = Literal["train", "val"]
PARTS: tuple[Part, ...] = ("train", "val")
NAMES: dict[Part, str] = {"train": "training", "val": "validation"}


class Loaders(LightningDataModule):
    """The loaders that a function returned.

    Args:
        loaders: them, for training, validation or both.
    """

    def __init__(self, loaders: dict[Part, Any]) -> None:
        super().__init__()
        self.loaders = loaders

    def train_dataloader(self) -> Any:
        """Return the loader for training."""
        return self.loaders["train"]

    def val_dataloader(self) -> Any:
        """Return the loader for validation."""
        return self.loaders["val"]


def as_data(found: Any, path: str) -> LightningDataModule:
    """Return what a class or function gave as a data module.

    Args:
        found: a data module, a loader for validation, or loaders for training and validation, as a pair or by the names
            ``train`` and ``val``.
        path: the dotted path of the class or function.

    Returns:
        The data module.

    Raises:
        InputError: if it is something else.
    """
    if isinstance(found, LightningDataModule):
        return found
    given: dict[Any, Any]
    if isinstance(found, dict):
        given = found
    elif isinstance(found, tuple | list) and len(found) == 2:
        given = dict(zip(PARTS, found, strict=True))
    else:
        given = {"val": found}
    loaders: dict[Part, Any] = {part: given[part] for part in PARTS if given.get(part) is not None}
    advice = (
        "let it return a LightningDataModule, a loader for validation, or a pair of loaders for training and validation"
    )
    if not loaders or not set(given) <= set(PARTS):
        what = f"a dict with {', '.join(map(repr, given)) or 'nothing'}" if isinstance(found, dict) else "no loader"
        raise InputError(f"--data {path} returned {what}; {advice}")
    for loader in loaders.values():
        if isinstance(loader, Dataset):
            raise InputError(
                f"--data {path} returned a {type(loader).__name__}, a data set; let it put that into a DataLoader"
            )
        if isinstance(loader, tuple | list | dict | str | bytes | Tensor) or not isinstance(loader, Iterable):
            raise InputError(f"--data {path} returned a {type(loader).__name__}; {advice}")
    return Loaders(loaders)


def parts_of(data: LightningDataModule | LightningModule | type[LightningModule]) -> list[Part]:
    """Return for which parts there are loaders.

    Args:
        data: a data module, or a module, or its class.

    Returns:
        The parts.
    """
    if isinstance(data, Loaders):
        return list(data.loaders)
    hooks = {part: getattr(data, f"{part}_dataloader") for part in PARTS}
    return [part for part in PARTS if getattr(hooks[part], "__func__", hooks[part]) is not _default(part)]


def _default(part: Part) -> Any:
    return getattr(DataHooks, f"{part}_dataloader")


class SharedData:
    """A user's data, from which each process gets its share of the whole training or validation set.

    Every sample is given once, in order, to one process. Lightning's own sampler repeats samples, so that every process
    has as many.

    Args:
        data: the data module, or the module, if it has loaders of its own.

    Attributes:
        data: likewise.
        parts: for which parts there are loaders.
        part: which one the Trainer gets.
    """

    def __init__(self, data: LightningDataModule | LightningModule) -> None:
        self.data = data
        self.parts = parts_of(data)
        self.part: Part = "val"
        self._setup = data.setup
        self._loaders = {"train": data.train_dataloader, "val": data.val_dataloader}
        self._ready = False
        # The data module itself goes to the Trainer, so that its hooks for moving batches count.
        data.setup = self._setup_once  # type: ignore[method-assign]
        data.val_dataloader = self._share  # type: ignore[method-assign]

    def check(self, part: Part) -> None:
        """Refuse a part for which there is no loader.

        Args:
            part: the part.

        Raises:
            InputError: if there is none.
        """
        if part not in self.parts:
            raise InputError(
                f"there is no loader of {NAMES[part]} data; give the data a `{part}_dataloader`, a function of --data "
                f"a pair of loaders, or --split {next(iter(self.parts), 'val')}"
            )

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
                f"the loader of {NAMES[self.part]} data is a {type(loader).__name__}, but a single DataLoader is "
                "needed; put several data sets into one with torch.utils.data.ConcatDataset"
            )
        if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
            if world > 1:
                raise InputError(
                    f"the loader of {NAMES[self.part]} data has an IterableDataset, which processes cannot share; use "
                    "--devices 1"
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
            raise InputError(
                f"the {NAMES[self.part]} data has {size} samples, fewer than --devices {world}; give fewer"
            )
        # Samples rather than batches are dealt out, so that values averaged over processes hardly differ.
        share = Subset(loader.dataset, range(rank, size, world))
        makes_batches = loader.batch_size is None and loader.batch_sampler is None  # the data set does
        return DataLoader(share, batch_size=None if makes_batches else loader.batch_size or 64, **how)
