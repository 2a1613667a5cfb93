"""The passes through one layer that a loss depends on, for the monitors of one layer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

from lightning_relflat._batch import Target, find_target
from lightning_relflat._calls import CriterionCalls
from lightning_relflat._shown import show
from lightning_relflat.callbacks._base import LightningModule
from lightning_relflat.callbacks._claim import has_value, refuse_calls, refuse_false_claim, refuse_layer
from lightning_relflat.callbacks._measurable import Measurable
from lightning_relflat.callbacks._refusals import another_loss, did_not_run_in, no_loss_shown
from lightning_relflat.callbacks._step import Stage, Step, the_loss
from lightning_relflat.claims import Claim
from lightning_relflat.curvature import Loss, read_loss
from lightning_relflat.functional._checks import is_open
from lightning_relflat.layer_tap import LayerRecord, LayerTap
from lightning_relflat.linear_layers import describe


class LayerMeter:
    """Listens to one layer in the steps of a module, and hands out what there is to measure.

    Args:
        who: the monitor, for messages.
        layer: the layer's dotted name, or ``None`` for the last linear one that the loss depends on.
        loss: what is said to be the loss, or ``None`` for the step's own.
        target: where what is said finds its target.
        linear: whether the layer has to be a linear one.
    """

    def __init__(self, who: object, layer: str | None, loss: Loss | None, target: Target, *, linear: bool) -> None:
        self.claim = None if loss is None else Claim(read_loss(loss))
        self._who = who
        self._layer = layer
        self._target = target
        self._linear = linear
        self._tap: LayerTap | None = None
        self.module: LightningModule | None = None
        self.listens = False
        self.layer: nn.Module | None = None  # once it is known
        self.name: str | None = None
        # Batches of a stage and loader whose loss was another than those before, or not shown.
        self.missed: Counter[tuple[Stage, int]] = Counter()
        self.ambiguous = self.closed = self._compared = False
        self._stepped: set[Stage] = set()  # stages with a step that was listened to, and with one in which it ran
        self._ran: set[Stage] = set()
        # Whether the loss of a stage and loader is the result of a criterion of the outputs, once that is known.
        self._plain: dict[tuple[Stage, int], bool] = {}
        # Where that cannot be trusted: something changes outputs or losses in place and is not seen to do it.
        self._doubted: set[tuple[Stage, int]] = set()
        self._open: list[LayerRecord] = []  # of the step that runs: passes that no loss has depended on yet
        self._age: int | None = None  # of the weights with which the step's passes were computed

    @property
    def tap(self) -> LayerTap:
        """The tap, while there is one."""
        assert self._tap is not None
        return self._tap

    def attach(self, module: LightningModule) -> None:
        """Find the layer.

        Args:
            module: the module.

        Raises:
            ValueError: if there is no such layer, or it cannot be measured.
        """
        self._forget_run()
        self.module = module
        if self.claim is not None:
            self.claim.look_again()
            if isinstance(self.claim.criterion, nn.Module):
                self.claim.criterion.to(module.device)
        self._tap = LayerTap(module, self._layer, through_loss=self.claim is None, measures=True)
        self._settle()
        self._tap.look_again()  # a module may exchange the layer when it is told, after us, that a run begins

    def detach(self) -> None:
        """Listen no more. May be called again."""
        if self._tap is not None:
            self._tap.close()
            self._tap = None
        self.module = None
        self._open = []

    def look_again(self) -> None:
        """Look anew at the layer, what lies behind it, and whether the loss is the one that was said."""
        if self._tap is not None:
            self._tap.look_again()
        if self.claim is not None:
            self.claim.look_again()

    def begin(self, step: Step, loader: int, *, listens: bool) -> None:
        """Listen in a step, or only have the hooks on, so that what is compiled now has them when it matters.

        Args:
            step: the step.
            loader: which loader its batch is from.
            listens: whether to listen.
        """
        if self._tap is None:
            return
        self._open, self._age, self.listens = [], None, listens
        self._tap.copies = self._tap.opens = False
        self._tap.calls = None
        if not listens:
            self._tap.attach()
            return
        self._stepped.add(step.stage)
        if step.stage != "train":
            step.calls = self._tap.calls = step.calls or CriterionCalls()
            # A loss that is a criterion of the outputs is seen without a graph; any other needs one.
            plain = self._plain.get((step.stage, loader), self._is_sane()) and (step.stage, loader) not in self._doubted
            if self.claim is None and not plain:
                step.graph = step.graph or "layer"
                self._tap.opens = True
            self._tap.copies = not self._tap.opens
        self._tap.start()

    def pause(self, *, paused: bool) -> None:
        """Do not listen during a backward pass: checkpointed layers run again there."""
        if self._tap is not None and self.listens:
            self._tap.recording = not paused

    def end(self) -> None:
        """Stop listening."""
        self._open = []
        if self._tap is not None:
            self._tap.stop()

    def of(self, step: Step, loss: Tensor) -> Measurable | None:
        """Return what there is to measure in a loss of a training step.

        Args:
            step: the step.
            loss: the loss.

        Returns:
            The passes that it depends on, computed with the weights of the step's first; ``None`` if there is none,
            which in automatic optimization is an error.

        Raises:
            RuntimeError: if the loss does not depend on the layer, or is not the one that was said.
        """
        assert self.module is not None
        self._open += self.tap.take(loss)
        mine = [record for record in self._open if record.is_in(loss)]
        if not mine and self.module.automatic_optimization:
            if not self._open and not self.tap.pending:
                raise RuntimeError(f"{self._who!r}: {did_not_run_in(self.tap, '`training_step`')}")
            raise RuntimeError(f"{self._who!r}: {another_loss(self.tap, 'measure')}")
        self._settle()
        self._open = [record for record in self._open if record not in mine]
        if self._age is None and mine:
            self._age = mine[0].age
        mine = [record for record in mine if record.age == self._age]
        if not mine:
            return None
        if self.claim is None:
            return Measurable(loss, mine, None)
        target = find_target(step.batch, self._target)
        refuse_false_claim(self._who, self.tap.name, self.claim, loss, mine, target)
        return Measurable(None, mine, (self.claim.criterion, target))

    def evaluated(self, step: Step, loader: int) -> Measurable | None:
        """Return what there is to measure in a step of validation or test.

        Args:
            step: the step, which has run.
            loader: which loader its batch is from.

        Returns:
            It; ``None`` if the layer did not run, or the step shows no loss that depends on it.
        """
        if self.claim is not None:
            assert step.calls is not None
            # If a criterion is called, its passes count; others are of a search, or generate text.
            called = [call.source.origin for call in step.calls.calls if call.source is not None]
            records = self.tap.take_those(called) or self.tap.take()
            if not records:
                return None
            self._ran.add(step.stage)
            self._settle()
            refuse_calls(self._who, self.tap.name, records)
            target = find_target(step.batch, self._target)
            if len(records) == 1 and not (self.claim.verified or self._compared):
                holds = has_value(self.claim, step, records[0], target)
                self._compared, self.claim.verified = holds is not None, holds is True
            return Measurable(None, records, (self.claim.criterion, target))
        ran = self.tap.pending
        if ran:
            self._ran.add(step.stage)
        found, sees = self._in_graph(step, loader) if self.tap.opens else self._called(step, loader)
        if found is not None:
            self._settle()
        elif ran and not self._is_sane():
            self.missed[step.stage, loader] += 1
        if sees is not None:
            self._plain[step.stage, loader] = sees
        return found

    def doubt(self, stage: Stage, loader: int) -> None:
        """Take the steps of a stage and loader in a graph from now on, whatever they seem to be.

        Args:
            stage: the stage.
            loader: the loader.
        """
        self._doubted.add((stage, loader))

    def _called(self, step: Step, loader: int) -> tuple[Measurable | None, bool | None]:
        """Return what the one criterion says that a step has called for its loss, and whether it is the loss."""
        assert step.calls is not None
        for losses in step.losses():
            if not losses:
                continue
            calls = [call for call in step.calls.calls if any(call.result is loss for loss in losses)]
            source = calls[0].source if len(calls) == len(losses) == 1 and not calls[0].written else None
            records = [] if source is None else self.tap.take_those([source.origin])
            if not records:
                return None, False  # another loss, for which it takes a graph
            [record] = records
            with torch.inference_mode(False):
                outputs = record.outputs.clone().requires_grad_()
                record = replace(
                    record, features=record.features.clone(), weight=record.weight.clone(), outputs=outputs
                )
            value = calls[0].again(outputs)
            holds = _has_value(value, losses[0])
            if holds is False:
                self.doubt(step.stage, loader)
                return None, False
            return Measurable(value, [record], calls[0].as_criterion(), holds if holds is not True else None), True
        return None, None  # no loss at all

    def _in_graph(self, step: Step, loader: int) -> tuple[Measurable | None, bool | None]:
        """Return what a step says that has run in a graph, and whether it could be seen without one."""
        assert step.calls is not None
        self.closed |= step.closed and self.tap.pending
        shown = next((losses for losses in step.losses() if losses), [])
        if not any(loss.requires_grad for loss in shown):
            # Computed where the step has switched gradients off, behind the layer or around both: as without a graph.
            found, sees = self._called(step, loader)
            if found is not None or (step.closed and shown):
                return found, sees
        loss, several = the_loss(step, self.tap.peek())
        self.ambiguous |= several
        if loss is None:
            return None, None
        records = [record for record in self.tap.take(loss) if record.is_in(loss)]
        calls = [
            call
            for call in step.calls.calls
            if call.result is loss and call.source is not None and self.tap.went_on_with(call.source.origin)
        ]
        one = len(calls) == len(records) == 1 and not calls[0].written and (step.stage, loader) not in self._doubted
        holds = _has_value(calls[0].again(records[0].outputs.detach()), loss) if one else True
        if holds is False:
            one = False
            self.doubt(step.stage, loader)
        seen = one and len(shown) == 1 and shown[0] is loss
        called = calls[0].as_criterion() if one else None
        return Measurable(loss, records, called, holds if isinstance(holds, Tensor) else None), seen

    def _is_sane(self) -> bool:
        assert self.module is not None
        return self.module.trainer.sanity_checking

    def _settle(self) -> None:
        """Say once which layer it is, and refuse one that cannot be measured."""
        layer, name = self.tap.layer, self.tap.name
        if layer is None or name is None or self.layer is layer:
            return
        if self._linear:
            refuse_layer(name, layer)
        self.layer, self.name = layer, name
        rank_zero_info(f"{self._who!r}: measured at layer {describe(name, layer)}.")

    def absent(self, stage: Stage) -> str | None:
        """Say why there was nothing to measure in a whole epoch.

        Args:
            stage: the stage.

        Returns:
            The message; ``None`` if there was no step.

        Raises:
            RuntimeError: outside of ``fit``, if the layer did not run.
        """
        assert self.module is not None
        if stage not in self._stepped:
            return None
        if stage != "train" and stage not in self._ran and self.module.trainer.state.fn != "fit":
            raise RuntimeError(f"{self._who!r}: {did_not_run_in(self.tap, f'any {stage} batch')}")
        return no_loss_shown(self.tap, stage, ran=stage in self._ran, several=self.ambiguous, closed=self.closed)

    def unverified(self) -> str | None:
        """Say outside of ``fit`` that nothing has shown the loss that was named; ``None`` if that is not so."""
        assert self.module is not None
        if self.claim is None or self.claim.verified or self.module.trainer.state.fn == "fit":
            return None
        return (
            f"that {show(self.claim.criterion)} of the layer's outputs is the loss that the module trains with has not "
            "been verified, because no step has shown that loss. Return it from the step, or measure within `fit`."
        )

    def _forget_run(self) -> None:
        self.layer = self.name = None
        self.missed.clear()
        self.ambiguous = self.closed = self._compared = False
        self._stepped, self._ran, self._plain, self._doubted = set(), set(), {}, set()
        self._open, self._age = [], None


def _has_value(value: Tensor, loss: Tensor) -> Tensor | bool:
    """Return whether a criterion, called again, has the value that a step shows; a tensor where to look means a wait.

    It has not if what the criterion was given, or what it returned, has been written to by something that no function
    mode sees. They may differ by the rounding of their types.
    """
    value, loss = value.detach().reshape(()), loss.detach().reshape(())
    eps = max(torch.finfo(one.dtype).eps for one in (value, loss))
    holds = torch.isclose(value.to(loss), loss, rtol=max(1e-4, 4 * eps), atol=0.0, equal_nan=True)
    return bool(holds) if is_open(value, loss) else holds
