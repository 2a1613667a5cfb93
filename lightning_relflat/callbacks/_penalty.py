"""The penalty of one fit: λ·κ of the passes through a layer that a loss of a training step depends on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_relflat._batch import find_target
from lightning_relflat._head_calls import shares_of_calls
from lightning_relflat.callbacks._base import LightningModule, Trainer, labelled, loggers_are_due
from lightning_relflat.callbacks._claim import flatness_of_criterion, refuse_false_claim, refuse_layer
from lightning_relflat.callbacks._refusals import (
    Finite,
    another_loss,
    has_gradients,
    is_frozen,
    nothing_to_penalise,
    warn_of_no_bound,
)
from lightning_relflat.callbacks._step import Step
from lightning_relflat.callbacks.coefficients import Coefficients
from lightning_relflat.claims import Claim, value_of_callable
from lightning_relflat.functional._second_derivatives import foresee
from lightning_relflat.functional.criteria import has_closed_form
from lightning_relflat.functional.layer_flatness import probe_seed
from lightning_relflat.layer_tap import LayerRecord, LayerTap
from lightning_relflat.linear_layers import describe

if TYPE_CHECKING:
    from lightning_relflat.callbacks.fam import FAM

# Strategies that leave the weights whole; of those that inherit from them some do not.
_WHOLE = ("SingleDeviceStrategy", "DDPStrategy")


class Penalty:
    """Listens to the steps of a module, and adds the penalty to their losses, while one ``fit`` runs.

    Args:
        fam: the callback, whose arguments say what is penalised.
        coefficients: λ of each step.
        trainer: the Trainer.
        module: its module.

    Attributes:
        layer: the name of the layer, once it is known.
        newest: the penalty and the coefficient of the last step with a penalty.
        losses: how many losses were seen while listening.
        ran, applied: how many training steps of the epoch were to be penalised, and how many of their losses were.
        rehearsed: in how many steps of the epoch it was only looked whether one could be.

    Raises:
        ValueError: if there is no such layer, or it cannot be penalised.
    """

    def __init__(self, fam: FAM, coefficients: Coefficients, trainer: Trainer, module: LightningModule) -> None:
        self._fam, self._coefficients, self._module = fam, coefficients, module
        criterion = fam.criterion
        self._claim = None if criterion is None else Claim(criterion)
        self._exact = has_closed_form(criterion)
        # Elsewhere a weight can change, or be freed, between the layer's pass and the backward pass.
        stays = module.automatic_optimization and type(trainer.strategy).__name__ in _WHOLE
        self._tap = LayerTap(module, fam.layer, stays=stays, through_loss=not self._exact)
        if isinstance(criterion, nn.Module):
            criterion.to(module.device)
        self._rehearsal: LayerTap | None = None  # of the first step, if no penalty is due in it
        self._listening: LayerTap | None = None  # which of the two listens to the training step that runs
        self._evaluation: Step | None = None  # the training step that runs
        self._records: list[LayerRecord] = []
        self._added: Tensor | None = None  # in the step
        self._warned = False
        self.layer: str | None = None
        self._settled_on: nn.Module | None = None  # what has that name
        self.newest: tuple[Tensor, Tensor | float] | None = None
        self.losses = 0
        self.begin_epoch()
        self._settle(self._tap)

    def rehearse(self, wanted: bool = True) -> None:
        """Look in the next step whether there could be a penalty, if none is due in it yet; or look no more."""
        # A tap of its own, which writes nothing out: this step computes what it computes without FAM.
        self._rehearsal = LayerTap(self._module, self._fam.layer, through_loss=False) if wanted else None

    def look_again(self) -> None:
        """Look again at the layer, what lies behind it, and whether the loss is the one named: all may have changed."""
        if self._claim is not None:
            self._claim.look_again()
        for tap in filter(None, (self._tap, self._rehearsal)):
            tap.look_again()

    def begin_epoch(self) -> None:
        """Count anew."""
        self.ran = self.applied = self.rehearsed = 0
        self.finite = Finite()

    def went_another_way(self, optimizer: Any) -> bool:
        """Return whether an optimizer has gradients of the layer, but no loss has been seen.

        Args:
            optimizer: an optimizer that is about to step.

        Returns:
            Whether that is so.
        """
        return self._listening is not None and not self.losses and has_gradients(optimizer, self._listening)

    def close(self) -> None:
        """Leave nothing behind."""
        for tap in filter(None, (self._tap, self._rehearsal)):
            tap.close()
        self._forget_step()

    def _forget_step(self) -> None:
        self._evaluation = self._listening = None
        self._records = []
        self._added = None

    def begin(self, step: Step) -> None:
        """Listen to the layer, if the step is to be penalised, or is the first one.

        Args:
            step: a step of the module.
        """
        self._forget_step()
        if step.stage != "train":
            self._tap.attach()
            return
        self._evaluation = step
        if self._coefficients.now != 0:
            self._listening, self._rehearsal = self._tap, None
            self.ran += 1
        elif self._rehearsal is not None:
            self._listening = self._rehearsal
            self.rehearsed += 1
        if self._listening is not self._tap:
            self._tap.attach()
        if self._listening is not None:
            self._listening.start()

    def pause(self, paused: bool) -> None:
        """Do not listen during a backward pass: checkpointed layers run again there."""
        if self._listening is not None:
            self._listening.recording = not paused

    def evaluated(self, step: Step) -> None:
        """Take no notice of validation and test."""

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def end(self) -> None:
        """Stop listening, and log the newest values where loggers are due."""
        step = self._evaluation
        for tap in (self._tap, self._listening):
            if tap is not None:
                tap.stop()
        self._forget_step()
        if step is not None and self.applied and self.newest is not None and loggers_are_due(self._module.trainer):
            penalty, coefficient = self.newest
            # Made on the device: a number would have to be copied there, and the host would wait.
            filled = coefficient + torch.zeros_like(penalty)
            for key, value in (("penalty", penalty), ("coefficient", filled)):
                name = labelled(f"fam/{key}", self._fam.name)
                # The size is told, because Lightning would look for one in a batch that it may not have.
                self._module.log(name, value, on_step=True, on_epoch=False, batch_size=1)

    def of(self, loss: Tensor) -> Tensor | None:
        """Return the penalty: λ·κ, or what stands for κ, of the passes that were recorded and that the loss depends on.

        Args:
            loss: a loss of the training step.

        Returns:
            The penalty, a scalar; ``None`` if none is due, or if in manual optimization the loss does not depend on
            the layer.

        Raises:
            RuntimeError: if it is due and cannot be computed, or if it or the loss is not finite.
        """
        tap, rehearsing = self._listening, self._coefficients.now == 0
        if tap is None or (rehearsing and self._rehearsal is None):
            return None
        self.losses += 1
        self._records += tap.take(loss)
        self._settle(tap)
        automatic = self._module.automatic_optimization
        why = nothing_to_penalise(tap, self._records, through_hessian=self._fam.through_hessian) if automatic else None
        if rehearsing:
            self._rehearse(tap, loss, why)
            return None
        if why is not None:
            raise RuntimeError(f"{self._fam!r}: {why}")
        if automatic and self._records and not any(record.weight.requires_grad for record in self._records):
            self._warn("has a frozen weight. The penalty reaches only what comes before it.")
        self.finite.check(self._fam, f"the loss of training step {self._coefficients.step}", loss)
        kappa = self._kappa(loss) if self._records and loss.requires_grad else None
        if kappa is None:
            if automatic:
                raise RuntimeError(f"{self._fam!r}: {another_loss(tap)}")
            if self._records and not any(record.outputs.requires_grad for record in self._records):
                self._warn(
                    "and all before it are frozen for now. The penalty of a loss that comes after them is left out; "
                    "name the loss to have it."
                )
            return None
        coefficient = self._coefficients.of(loss, kappa)
        penalty = kappa * (coefficient * self._fam.every_n_steps)
        self.finite.check(self._fam, f"the penalty of training step {self._coefficients.step}", penalty)
        self.applied += 1
        added = penalty.detach()
        self._added = added if self._added is None else self._added + added  # of another loss of the step
        self.newest = self._added, coefficient
        return penalty

    def _rehearse(self, tap: LayerTap, loss: Tensor, why: str | None) -> None:
        """Refuse now what the first penalised step would refuse, of a loss that gets no penalty yet."""
        met = [record for record in self._records if record.is_in(loss)]
        if why is None and not met and self._module.automatic_optimization:
            why = another_loss(tap)
        if why is not None and not is_frozen(tap):
            raise RuntimeError(f"{self._fam!r}: {why}")
        if why is not None:
            rank_zero_warn(f"{self._fam!r}: {why} This is refused if it is still so when the penalty begins.")
        elif not met:
            return  # in manual optimization another loss may
        self._rehearsal, self.rehearsed = None, 0
        if self._claim is None and loss.requires_grad:
            foresee(loss, [record.outputs for record in met])
            called = [record for record in met if record.call is not None]
            if called:
                shares_of_calls(loss, called)
        if self._claim is not None and met:
            self._check_claim(self._claim, loss, met)

    def _kappa(self, loss: Tensor) -> Tensor | None:
        fam = self._fam
        if self._claim is None:
            return self._through(loss, self._records)
        # A named loss is penalised once, with the first loss that depends on the pass; other passes do not count.
        records = [record for record in self._records if record.is_in(loss)]
        self._records = [record for record in self._records if record not in records]
        if not records:
            return None
        target = self._check_claim(self._claim, loss, records)
        criterion = self._claim.criterion
        if not self._exact:
            values = [value_of_callable(criterion, record.outputs, target) for record in records]
            return self._through(torch.stack(values).sum(), records)
        if fam.temperature == 1 and fam.shared_probes is None and self._claim.verified:
            # The loss is what was named, and can be read itself, which is quicker.
            plain = self._tap.plain_flatness_of(
                loss,
                records,
                through_hessian=fam.through_hessian,
                measure=fam.measure,
                normalize_features=fam.normalize_features,
            )
            if plain is not None:
                return plain
        assert isinstance(criterion, nn.Module)
        return flatness_of_criterion(
            records,
            target,
            criterion,
            through_hessian=fam.through_hessian,
            measure=fam.measure,
            temperature=fam.temperature,
            normalize_features=fam.normalize_features,
            probes=fam.shared_probes,
            generator=None if fam.shared_probes is None else self._generator(loss.device),
        )

    def _through(self, loss: Tensor, records: Sequence[LayerRecord]) -> Tensor | None:
        """Return κ of a loss in its graph, exact where it is recognised."""
        fam = self._fam
        kappa = self._tap.flatness_of(
            loss,
            records,
            probes=fam.probes,
            generator=lambda: self._generator(records[0].features.device),
            through_hessian=fam.through_hessian,
            measure=fam.measure,
            normalize_features=fam.normalize_features,
            shared_probes=fam.shared_probes,
        )
        if kappa is not None and self._tap.flat:
            self._warn("has κ = 0, because the loss is piecewise linear in its outputs: FAM adds nothing.")
        return kappa

    def _generator(self, device: torch.device) -> torch.Generator:
        seed = probe_seed(self._fam.seed, self._coefficients.step, self._module.trainer.global_rank)
        return torch.Generator(device).manual_seed(seed)

    def _settle(self, tap: LayerTap) -> None:
        """Say once which layer it is, and refuse one that cannot be penalised."""
        layer, name = tap.layer, tap.name
        if layer is None or name is None or self._settled_on is layer:
            return
        if self._claim is not None:
            refuse_layer(name, layer)
        self.layer, self._settled_on = name, layer
        rank_zero_info(f"{self._fam!r}: relative flatness is penalised at layer {describe(name, layer)}.")
        if self._fam.coefficient != "auto" and self._fam.coefficient < 0:
            warn_of_no_bound(self._fam, self._module.trainer, name)

    def _check_claim(self, claim: Claim, loss: Tensor, records: Sequence[LayerRecord]) -> Any:
        """Return the target, and check that the loss trained with has the curvature of the one that is named."""
        target = find_target(self._evaluation and self._evaluation.batch, self._fam.target)
        refuse_false_claim(self._fam, (self._listening or self._tap).name, claim, loss, records, target)
        return target

    def _warn(self, what: str) -> None:
        assert self._listening is not None
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"{self._fam!r}: layer {self._listening.name!r} {what}")
