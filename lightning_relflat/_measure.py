"""The flatness of a model over data, in one call. Needs torch and torchmetrics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from typing import Any

from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, RandomSampler

from lightning_relflat._batch import Target, check_key, size_of
from lightning_relflat.curvature import Loss
from lightning_relflat.functional._checks import check_flag, said
from lightning_relflat.report._collector import Collector, Seen
from lightning_relflat.report._forward import Forward, device_of, inputs_of, moved
from lightning_relflat.report._loss import LossTaker
from lightning_relflat.report._progress import Progress, telling
from lightning_relflat.report._report import Report
from lightning_relflat.report._undisturbed import undisturbed


def measure(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    layer: str | None = None,
    loss: Loss | None = None,
    target: Target = 1,
    forward: Forward | None = None,
    layers: str | Sequence[str] | None = "*",
    sharpest: int = 8,
    class_names: Sequence[str] | None = None,
    probes: int = 2,
    seed: int = 0,
    training: bool = False,
    progress: Progress = False,
    name: str | None = None,
) -> Report:
    r"""Measure how flat a model is on some data: κ of its head and of every layer, and what it is made of.

    Every sample counts once, whatever the sizes of batches. κ of the head is exact where the loss is a criterion with a
    closed form of the head's outputs, else it is estimated with random probes, and comes with its standard error; so do
    the layers before it. The model is run in evaluation mode, with gradients, and is left exactly as it was.

    Source: Petzka et al., *Relative Flatness and Generalization*, NeurIPS 2021 (arXiv 2001.00939), definition of κ_Tr.

    Args:
        model: any model of PyTorch. Batches go to the device where it lies.
        loader: gives batches: tuples (inputs, target), where inputs may be several in a tuple, or mappings of named
            arguments, as Hugging Face's models take them.
        layer: the dotted name of the head, a linear or convolution layer; ``None`` for the last linear layer that the
            loss depends on.
        loss: ``None`` for the loss that the model returns (``output.loss``), else for the one that outputs and targets
            leave no doubt of: cross-entropy for class numbers, mean squared error for numbers in the shape of the
            outputs. Or the name of a criterion or a criterion of ``torch.nn``, of the outputs and the target; or any
            callable ``loss(output, target)`` of what the model returns. The report says which it was.
        target: where the target is in a batch: an index, a key, a path of them, or a callable on the batch. In a batch
            with names, 1 stands for the one of the names ``labels``, ``label``, ``targets``, ``target`` and ``y`` that
            it has.
        forward: how the model is called, ``forward(model, batch)``, where it is not with the batch without its target;
            returns what the model would.
        layers: patterns of the names of layers to measure beside the head, as :mod:`fnmatch` understands them; ``None``
            for the head alone, which is much cheaper.
        sharpest: how many of the samples with the largest parts in κ to keep.
        class_names: what the classes are called; left out, the data set or the model may say it, by an attribute
            ``classes`` or ``class_names`` or in Hugging Face's configuration.
        probes: how many random probes to take of a batch, two at least.
        seed: where the probes start.
        training: whether to run the model in training mode; the statistics of a batch count as constants then.
        progress: whether to show a bar on stderr, drawn by rich where that is installed (the extra ``cli``); or a
            callable that gets the number of batches done and of all.
        name: what the report calls the model; the name of its class if left out.

    Returns:
        The report: ``print`` shows it, a notebook as tables; it has :meth:`~lightning_relflat.Report.to_dict`,
        :meth:`~lightning_relflat.Report.plot` and :meth:`~lightning_relflat.Report.save`.

    Raises:
        TypeError: if ``model`` is no model.
        ValueError: if the loader has no batches, there is no such layer, or the batches do not show what the loss is.
        RuntimeError: if the loss does not depend on the head, or the curvature cannot be had rightly.
        FloatingPointError: if the loss of a batch is not finite.

    Examples:
        >>> import torch
        >>> from lightning_relflat import measure
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> inputs, classes = torch.eye(4), torch.tensor([0, 1, 2, 0])
        >>> report = measure(net, [(inputs[:3], classes[:3]), (inputs[3:], classes[3:])])
        >>> print(report.sentences()[0])
        The loss is cross_entropy, inferred: the targets are class numbers and the outputs have 3 scores for each.
        >>> [layer.name for layer in report.layers], report.samples, report.error
        (['0', '2'], 4, 0.0)
    """
    _check(model, loader)
    if forward is not None and not callable(forward):
        raise ValueError(f"Expected argument `forward` to be a callable, or None, but got {said(forward)}.")
    if not isinstance(progress, bool) and not callable(progress):
        raise ValueError(f"Expected argument `progress` to be True, False or a callable, but got {said(progress)}.")
    check_flag("training", training)
    taker = LossTaker(loss, check_key(target))
    bare = _bare(model)
    collector = Collector(
        bare,
        layer=layer,
        layers=layers,
        probes=probes,
        seed=seed,
        sharpest=sharpest,
        class_names=class_names or _names_of_config(bare),
        places=(getattr(loader, "dataset", None), bare),
        mean=taker.mean,
        name=name,
        sync_on_compute=False,  # what another process measures is its own affair
    )
    total = len(loader) if isinstance(loader, Sized) else None
    done = 0
    with undisturbed(bare, training=training), telling(progress, total) as tell:
        for batch in loader:
            try:
                _add(collector, taker, bare, moved(batch, device_of(bare)), forward, target, done, training)
            finally:
                collector.stop()
            done += 1
            tell(done)
        if taker.taken is None:
            raise ValueError("Expected argument `loader` to give at least one batch, but got one that gives none.")
        return collector.report(taker.taken, _notes(loader))


def _add(
    collector: Collector,
    taker: LossTaker,
    model: nn.Module,
    batch: Any,
    forward: Forward | None,
    target: Target,
    number: int,
    training: bool,
) -> None:
    """Run a batch, and add it."""
    if forward is None:
        args, kwargs = inputs_of(model, batch, target)
        inputs: Any = (args, kwargs)
    else:
        args, kwargs, inputs = (), {}, batch
    collector.start()
    output = model(*args, **kwargs) if forward is None else forward(model, batch)
    loss = taker.of(output, batch)
    if not loss.isfinite():
        raise FloatingPointError(
            f"Expected the loss to be a finite number, but got {loss.item()} for batch {number}, counted from 0."
        )
    collector.add(loss, Seen(inputs=inputs, samples=size_of(inputs), training=training))


def _check(model: object, loader: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected argument `model` to be an nn.Module, but got {said(model)}.")
    wanted = "Expected argument `loader` to give batches, as a DataLoader or a list of batches does"
    if isinstance(loader, Dataset):
        raise TypeError(f"{wanted}, but got a {type(loader).__name__}, a data set. Put it into a DataLoader.")
    if isinstance(loader, Tensor | str | bytes | dict) or not isinstance(loader, Iterable):
        raise TypeError(f"{wanted}, but got {said(loader)}.")


def _bare(model: nn.Module) -> nn.Module:
    """Return a model as it is within what compiles or distributes it, through which there is no second derivative."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _names_of_config(model: nn.Module) -> list[str] | None:
    """Return what the configuration of a model of Hugging Face's calls the classes, if it does."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not isinstance(names, dict) or sorted(names) != list(range(len(names))):
        return None
    found = [str(names[number]) for number in range(len(names))]
    return None if found == [f"LABEL_{number}" for number in range(len(names))] else found


def _notes(loader: object) -> list[str]:
    if isinstance(loader, DataLoader) and isinstance(getattr(loader, "sampler", None), RandomSampler):
        return ["The loader shuffles, so that the samples' numbers are their places in this one pass."]
    return []
