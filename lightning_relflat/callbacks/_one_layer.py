"""What the monitors of one layer have in common: when they listen to it, and what they do with a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_relflat._batch import Target, check_key
from lightning_relflat.callbacks._base import LightningModule, Trainer, check_layer
from lightning_relflat.callbacks._layer_meter import LayerMeter
from lightning_relflat.callbacks._measurable import Measurable
from lightning_relflat.callbacks._monitor import Monitor
from lightning_relflat.callbacks._refusals import changed_unseen
from lightning_relflat.callbacks._step import Stage, Step
from lightning_relflat.curvature import Loss


class OneLayerMonitor(Monitor):
    """Measures one layer in the steps of a module.

    Args:
        layer: the layer's dotted name, or ``None`` for the last linear one that the loss depends on.
        loss: what is said to be the loss, or ``None`` for the step's own.
        target: where what is said finds its target.
        linear: whether the layer has to be a linear one.
        stages: as for :class:`~lightning_relflat.callbacks._monitor.Monitor`.
        every_n_epochs: as there.
        name: as there.

    Raises:
        ValueError: if an argument is not what it should be.
    """

    def __init__(
        self,
        layer: str | None,
        loss: Loss | None,
        target: Target,
        *,
        linear: bool,
        stages: Sequence[Stage],
        every_n_epochs: int,
        name: str | None,
    ) -> None:
        super().__init__(stages, every_n_epochs, name)
        self.layer = check_layer(layer)
        self.loss = loss
        self.target: Target = check_key(target)
        self._meter = LayerMeter(self, layer, loss, self.target, linear=linear)

    @property
    def measured_layer(self) -> str | None:
        """The name of the layer that is measured, or was last; ``None`` as long as it is not known."""
        return self._meter.name

    def measure(self, step: Step, found: Measurable | None) -> None:
        """Take in what a step shows; ``None`` if it shows nothing, in validation and test."""

    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        """Find the layer."""
        self._meter.attach(module)

    def detach(self) -> None:
        """Leave nothing behind."""
        self._meter.detach()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look anew at the layer, what lies behind it, and whether the loss is the one that was named."""
        self._meter.look_again()

    def begin(self, step: Step) -> None:
        """Listen to the layer, if the step counts.

        Args:
            step: a step of the module.
        """
        if self._module is None:
            return
        claim = self._meter.claim
        if step.stage == "train":
            # A loss that is named is compared with that of training, even if only validation is measured.
            listens = self._step is None and (self.is_due("train") or (claim is not None and not claim.verified))
        else:
            listens = self.is_due(step.stage) or (step.stage in self.stages and self._module.trainer.sanity_checking)
        self._meter.begin(step, self._loader, listens=listens)
        if listens:
            self._step = step

    def of(self, loss: Tensor) -> Tensor | None:
        """Measure a loss of a training step.

        Args:
            loss: the loss.

        Returns:
            Nothing: the loss stays as it is.

        Raises:
            RuntimeError: if the loss does not depend on the layer, or is not the one that was named.
        """
        if self._step is not None and self._meter.listens:
            found = self._meter.of(self._step, loss)
            if found is not None and self.is_due("train"):
                self.measure(self._step, found)
        return None

    def pause(self, paused: bool) -> None:
        """Do not listen during a backward pass: checkpointed layers run again there."""
        self._meter.pause(paused=paused)

    def evaluated(self, step: Step) -> None:
        """Measure what a step of validation or test shows.

        Args:
            step: the step, which has run.
        """
        if self._step is step:
            with torch.inference_mode(False):
                self.measure(step, self._meter.evaluated(step, self._loader))

    def end(self) -> None:
        """Stop listening."""
        self._meter.end()

    def doubt(self, stage: Stage, loader: int) -> None:
        """Say that an epoch has no value, because in a batch the loss was not the criterion that the step has called.

        Args:
            stage: its stage.
            loader: its data loader.
        """
        self._meter.doubt(stage, loader)
        self.say(f"doubted in {stage}", changed_unseen(stage))

    def say_missing(self, stage: Stage, loader: int, *, absent: bool) -> None:
        """Say what was not measured in an epoch.

        Args:
            stage: its stage.
            loader: its data loader.
            absent: whether nothing was.
        """
        count = self._meter.missed[stage, loader]
        if absent:
            self.say(f"absent from {stage}", self._meter.absent(stage))
        elif count:
            self.say(
                "missed",
                f"batches of {stage} were left out ({count} so far): their loss was another than before, or not shown.",
            )
