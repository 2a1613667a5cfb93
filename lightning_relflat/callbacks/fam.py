"""FAM: train towards relative flatness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn

from lightning_relflat.callbacks._base import (
    Callback,
    LightningModule,
    Trainer,
    check_key,
    check_layer,
    check_name,
    find_target,
    labelled,
    refuse_collisions,
)
from lightning_relflat.callbacks._claim import refuse_false_claim
from lightning_relflat.callbacks._refusals import another_loss, is_capped, is_frozen, nothing_to_penalise
from lightning_relflat.callbacks._step import Step, StepWatcher
from lightning_relflat.callbacks.coefficients import Coefficients
from lightning_relflat.claims import Claim
from lightning_relflat.functional._checks import check_count, check_flag, check_number, check_probes
from lightning_relflat.functional._graph import foresee
from lightning_relflat.functional._probes import Measure
from lightning_relflat.functional._softmax_trace import is_large
from lightning_relflat.functional._weights import has_matrix
from lightning_relflat.functional.layer_flatness import probe_seed
from lightning_relflat.functional.relative_flatness import (
    check_measure,
    check_shared_probes,
    check_temperature,
    owned_criterion,
    relative_flatness,
)
from lightning_relflat.layer_tap import LayerRecord, LayerTap
from lightning_relflat.linear_layers import describe

# Strategies that leave the weights whole; of those that inherit from them some do not.
_WHOLE = ("SingleDeviceStrategy", "DDPStrategy")


class FAM(Callback):
    r"""Adds λ·κ, the relative flatness of a layer, to the loss of every training step.

    .. math:: L + λ κ, \qquad κ = \sum_{s,s'} ⟨w_s, w_{s'}⟩ \operatorname{Tr}(H_{s,s'})

    The module is not touched: its ``training_step`` (with manual optimization its ``manual_backward``) is wrapped
    while ``fit`` runs. The penalty joins the loss before anything is done with it, so that gradient accumulation,
    clipping, mixed precision with its scaler, line searches and distributed strategies treat it as they treat the
    loss. It costs no second forward pass.

    Logged in each step with a penalty: ``fam/penalty``, what was added to the losses of the step, and
    ``fam/coefficient``, the λ of the step. Several of these callbacks in one Trainer need different names.

    What a later step would refuse is refused in the first step of ``fit``, also where the penalty begins later:
    ``docs/trainer_settings.md`` says what cannot be known then.

    Source: Adilova et al., *FAM: Relative Flatness Aware Minimization* (arXiv 2307.02337), the regularised
    objective and its gradient, Lemma 1.

    Args:
        layer: the dotted name of a linear or convolution layer, hidden or last, or ``None`` for the last linear one
            that the loss of the first penalised step depends on.
        coefficient: λ; negative to train away from flatness.
        loss: ``None`` to take the curvature from the loss tensor itself, with random probes: any loss, nothing to
            declare. Or the criterion, by name or as the object that the module trains with, computed from the outputs
            of a linear layer and the batch's target alone: then κ is exact. Once an epoch it is checked that its
            curvature there is that of the loss of the step; not with 2²¹ outputs or more. With a cross-entropy of
            2²¹ outputs or more in a batch, loss and penalty go backward through the layer together, which saves their
            memory; a hook on the outputs then sees the gradient of the loss alone.
        target: where a named loss finds its target: an index or key of the batch; a list of them, followed one after
            the other; a callable on the batch; or ``None`` if its curvature needs none.
        probes: how many random probes to average without a named loss; ``None`` takes all products that there are: the
            smaller of the layer's sides many where no rows meet behind it, that times the number of features where they
            do; up to 10,000.
        shared_probes: for a named cross-entropy with very many outputs: how many random probes, shared by the samples
            of a batch, stand for its exact κ; see :func:`~lightning_relflat.functional.relative_flatness`.
        through_hessian: whether gradients flow through the Hessian into all parameters, as in the paper. If not, the
            Hessian counts as a constant, and only the layer's weight gets a gradient.
        every_n_steps: penalise only every n-th training step, with n·λ·κ, so that the mean over steps stays the same.
            A training step is a batch, whatever the accumulation of gradients.
        warmup_steps: over how many training steps after ``start_epoch`` λ rises linearly to its value.
        start_epoch: the first epoch with the penalty.
        stop_epoch: the first epoch without it again.
        seed: where the probes start; every step and every process draws others.
        relative: whether ``coefficient`` is relative to the loss: λ = coefficient · (max L - L) / max κ, where L and κ
            are averages over the penalised steps before (exponentially, 0.9 of the old ones kept) and over processes,
            and max is their largest value so far. So λκ is at most about ``coefficient`` times what the loss has
            fallen since ``start_epoch``: λ is 0 at first, and as long as κ is less than a millionth of the fall, and
            needs no ``warmup_steps``. Begin with 0.1, and centre the targets of a regression, whose mean is learned
            before anything else. Schedules act on ``coefficient``; ``fam/coefficient`` is the λ that they come to.
            Costs an all-reduce of three numbers after a penalised step.
        measure: ``"relative_flatness"`` for κ, or ``"trace"`` for the layer-wise trace ‖W‖_F² Tr(H) in its place.
        temperature: τ, to penalise the κ that the loss has at z/τ, which is that of z but for 1/τ² and softer
            probabilities. For a named cross-entropy or binary cross-entropy alone.
        normalize_features: whether ‖φ_p‖ counts as 1 in κ for every row that the weight is multiplied with (sample,
            token, patch), with the curvature at the outputs as they are: features can then neither be shrunk for a
            smaller κ nor, with a negative λ, grow without end.
        name: a group of its own for what is logged: ``fam/hidden/penalty`` for ``"hidden"``.

    A negative λ has no bound from below, and training can diverge. ``normalize_features`` with a
    :class:`~lightning_relflat.MaxNorm` of the layer bounds the κ of a cross-entropy; without one there is a warning.

    Raises:
        ValueError: if an argument is not what it should be; in ``fit`` before the optimizer's first step if there is no
            such layer, the batch has no such target, or another FAM has the same name.
        RuntimeError: in ``fit``, if a penalty could not be added: the layer did not run, carries no graph, or is
            frozen with nothing else to penalise; if a loss that is named is not the one trained with, or the curvature
            of the one that is cannot be had rightly; or if the loss or the penalty is not finite.

    Example:
        >>> from lightning_relflat import FAM
        >>> FAM(layer="head", coefficient=0.2)
        FAM(layer='head', coefficient=0.2)
        >>> FAM(coefficient=1.0, warmup_steps=100).coefficient_at(epoch=0, step=49)
        0.5
    """

    def __init__(
        self,
        layer: str | None = None,
        coefficient: float = 0.1,
        *,
        loss: str | nn.Module | None = None,
        target: int | str | Sequence[int | str] | Callable[[Any], Any] | None = 1,
        probes: int | None = 1,
        shared_probes: int | None = None,
        through_hessian: bool = True,
        every_n_steps: int = 1,
        warmup_steps: int = 0,
        start_epoch: int = 0,
        stop_epoch: int | None = None,
        seed: int = 0,
        relative: bool = False,
        measure: Measure = "relative_flatness",
        temperature: float = 1.0,
        normalize_features: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        check_probes(probes)
        self.layer = check_layer(layer)
        self.coefficient = check_number("coefficient", coefficient)
        self.loss = loss
        self.criterion = None if loss is None else owned_criterion(loss)
        self.target = check_key(target)
        self.probes = probes
        self.through_hessian = check_flag("through_hessian", through_hessian)
        self.every_n_steps = check_count("every_n_steps", every_n_steps, at_least=1)
        self.warmup_steps = check_count("warmup_steps", warmup_steps, at_least=0)
        self.start_epoch = check_count("start_epoch", start_epoch, at_least=0)
        if stop_epoch is not None:
            check_count("stop_epoch", stop_epoch, at_least=start_epoch + 1)
        self.stop_epoch = stop_epoch
        self.seed = check_count("seed", seed, at_least=0)
        self.relative = check_flag("relative", relative)
        self.measure = check_measure(measure)
        self.temperature = check_temperature(temperature, self.criterion)
        self.shared_probes = check_shared_probes("shared_probes", shared_probes, self.criterion, self.measure)
        self.normalize_features = check_flag("normalize_features", normalize_features)
        self.name = check_name(name)
        self._coefficients = Coefficients(self.every_n_steps, self.start_epoch, relative=self.relative)
        self._module: LightningModule | None = None
        self._tap: LayerTap | None = None
        self._rehearsal: LayerTap | None = None  # of the first step, if no penalty is due in it
        self._listening: LayerTap | None = None  # which of the two listens to the training step that runs
        self._announced: str | None = None
        self._claim = None if self.criterion is None else Claim(self.criterion)
        self._warned = False
        self._evaluation: Step | None = None  # the training step that runs
        self._records: list[LayerRecord] = []
        self._logged: dict[str, Tensor] = {}  # of the step
        self._losses = 0  # of the run, that were seen while listening
        self._begin_epoch()

    def coefficient_at(self, *, epoch: int, step: int) -> float:
        """Return λ for a training step. Override for a policy of your own.

        Args:
            epoch: the epoch, from 0.
            step: how many training steps came before this one since ``start_epoch``.

        Returns:
            λ, with ``relative`` the factor before (max L - L) / max κ; at 0 nothing is computed.
        """
        if epoch < self.start_epoch or (self.stop_epoch is not None and epoch >= self.stop_epoch):
            return 0.0
        return self.coefficient * min(1.0, (step + 1) / (self.warmup_steps or 1))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layer, and wrap the module's methods."""
        refuse_collisions(trainer, self)
        self._coefficients.begin_run(anew=trainer.global_step == 0)
        self._forget_step()
        self._warned = False
        self._losses = 0
        self._begin_epoch()
        # Elsewhere a weight can change, or be freed, between the layer's pass and the backward pass.
        late = pl_module.automatic_optimization and type(trainer.strategy).__name__ in _WHOLE
        self._tap = LayerTap(
            pl_module,
            self.layer,
            late=late and isinstance(self.criterion, nn.CrossEntropyLoss),
            through_loss=self.criterion is None,
        )
        self._module = pl_module
        if self.criterion is not None:
            self.criterion.to(pl_module.device)
        self._settle(self._tap)
        StepWatcher.join(pl_module, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take notice that a checkpoint, if there is one, has been loaded."""
        self._coefficients.train()
        if self.coefficient != 0 and (self.stop_epoch is None or trainer.current_epoch < self.stop_epoch):
            # A tap of its own, which writes nothing out: this step computes what it computes without FAM.
            self._rehearsal = LayerTap(pl_module, self.layer, through_loss=False)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again at what lies behind the layer, and whether the loss is the one named; both may have changed."""
        if self._claim is not None:
            self._claim.look_again()
        if self._tap is not None:
            self._tap.look_again()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decide on the step's coefficient."""
        self._coefficients.begin(self.coefficient_at, trainer.current_epoch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Refuse gradients of losses that went by another way than `manual_backward`, before they move anything."""
        tap = self._listening
        if pl_module.automatic_optimization or self._losses or tap is None or not tap.pending:
            return
        own = None if tap.layer is None else set(tap.layer.parameters())
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if any(parameter.grad is not None for parameter in held if own is None or parameter in own):
            raise RuntimeError(
                f"{self!r}: the optimizer has gradients of a loss, but none went through `self.manual_backward`, so "
                "that no penalty can be added. Call that in place of `loss.backward()`."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the sizes of loss and κ, and forget the batch."""
        self._coefficients.end(pl_module.device, trainer.world_size)
        self._forget_step()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the epoch's penalties were added."""
        if self._not_finite is not None and bool(self._not_finite):
            raise RuntimeError(
                f"{self!r}: the loss or the penalty of a training step in epoch {trainer.current_epoch} was nan or "
                "infinite."
            )
        # In automatic optimization a step that returned a loss was penalised, or refused; one without is no fault.
        if not pl_module.automatic_optimization:
            why = "because no loss that depends on the layer went through `self.manual_backward`"
            if self._ran and not self._applied:
                raise RuntimeError(f"{self!r} added no penalty in epoch {trainer.current_epoch}, {why}.")
            if self._rehearsed:
                rank_zero_warn(f"{self!r} could not have added a penalty in epoch {trainer.current_epoch}, {why}.")
                self._rehearsal = None
        self._begin_epoch()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind; `teardown` is not called after an exception."""
        self._coefficients.take_back()
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of training steps, which warm-up, `every_n_steps` and probes go by, and the sizes."""
        return self._coefficients.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up from a checkpoint what `state_dict` put there."""
        self._coefficients.load(state_dict)

    def _detach(self) -> None:
        for tap in (self._tap, self._rehearsal):
            if tap is not None:
                tap.close()
        self._tap = self._rehearsal = None
        if self._module is not None:
            StepWatcher.leave(self._module, self)
            self._module = None
        self._coefficients.forget()
        self._forget_step()

    def _forget_step(self) -> None:
        self._evaluation = self._listening = None
        self._records = []
        self._logged = {}

    def _begin_epoch(self) -> None:
        self._ran = self._applied = self._rehearsed = 0  # training steps that were listened to, and penalties
        self._not_finite: Tensor | None = None

    def begin(self, step: Step) -> None:
        """Listen to the layer, if the step is to be penalised, or is the first one.

        Args:
            step: a step of the module.
        """
        self._forget_step()
        if self._tap is None:
            return
        self._tap.attach()
        if step.stage != "train":
            return
        self._evaluation = step
        if self._coefficients.now != 0:
            self._listening, self._rehearsal = self._tap, None
            self._ran += 1
        elif self._rehearsal is not None:
            self._listening = self._rehearsal
            self._rehearsed += 1
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
        """Log what was added in the step, and stop listening."""
        logged, self._logged = self._logged, {}
        for tap in (self._tap, self._listening):
            if tap is not None:
                tap.stop()
        self._forget_step()
        for name, value in logged.items():
            assert self._module is not None
            # The size is told, because Lightning would look for one in a batch that it may not have.
            self._module.log(labelled(name, self.name), value, on_step=True, on_epoch=False, batch_size=1)

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
        tap, module, rehearsing = self._listening, self._module, self._coefficients.now == 0
        if tap is None or module is None or (rehearsing and self._rehearsal is None):
            return None
        self._losses += 1
        self._records += tap.take(loss)
        self._settle(tap)
        automatic = module.automatic_optimization
        why = nothing_to_penalise(tap, self._records, through_hessian=self.through_hessian) if automatic else None
        if rehearsing:
            self._rehearse(tap, loss, why)
            return None
        if why is not None:
            raise RuntimeError(f"{self!r}: {why}")
        if automatic and self._records and not any(record.weight.requires_grad for record in self._records):
            self._warn("has a frozen weight. The penalty reaches only what comes before it.")
        self._check_finite("loss", loss)
        kappa = self._kappa(loss) if self._records and loss.requires_grad else None
        if kappa is None:
            if automatic:
                raise RuntimeError(f"{self!r}: {another_loss(tap)}")
            if self._records and not any(record.outputs.requires_grad for record in self._records):
                self._warn(
                    "and all before it are frozen for now. The penalty of a loss that comes after them is left out; "
                    "name the loss to have it."
                )
            return None
        coefficient = self._coefficients.of(loss, kappa)
        penalty = coefficient * self.every_n_steps * kappa
        self._check_finite("penalty", penalty)
        self._applied += 1
        added = penalty.detach()
        if "fam/penalty" in self._logged:  # of another loss of the step
            added = added + self._logged["fam/penalty"]
        self._logged = {"fam/penalty": added, "fam/coefficient": coefficient}
        return penalty

    def _rehearse(self, tap: LayerTap, loss: Tensor, why: str | None) -> None:
        """Refuse now what the first penalised step would refuse, of a loss that gets no penalty yet."""
        assert self._module is not None
        met = [record for record in self._records if record.is_in(loss)]
        if why is None and not met and self._module.automatic_optimization:
            why = another_loss(tap)
        if why is not None and not is_frozen(tap):
            raise RuntimeError(f"{self!r}: {why}")
        if why is not None:
            rank_zero_warn(f"{self!r}: {why} This is refused if it is still so when the penalty begins.")
        elif not met:
            return  # in manual optimization another loss may
        self._rehearsal, self._rehearsed = None, 0
        if self.criterion is None and loss.requires_grad:
            foresee(loss, [record.outputs for record in met])
        if self.criterion is not None and met:
            target = find_target(self._evaluation and self._evaluation.batch, self.target)
            if not any(is_large(record.outputs) for record in met):
                self._check_claim(loss, met, target)

    def _kappa(self, loss: Tensor) -> Tensor | None:
        assert self._module is not None
        generator = None
        if self.criterion is None or self.shared_probes is not None:
            device = self._records[0].features.device
            seed = probe_seed(self.seed, self._coefficients.step, self._module.trainer.global_rank)
            generator = torch.Generator(device).manual_seed(seed)
        if self.criterion is None:
            assert self._tap is not None
            kappa = self._tap.flatness_of(
                loss,
                self._records,
                probes=self.probes,
                generator=generator,
                through_hessian=self.through_hessian,
                measure=self.measure,
                normalize_features=self.normalize_features,
            )
            if kappa is not None and self._tap.flat:
                self._warn("has κ = 0, because the loss is piecewise linear in its outputs: FAM adds nothing.")
            return kappa
        # A named loss is penalised once, with the first loss that depends on the pass; other passes do not count.
        records = [record for record in self._records if record.is_in(loss)]
        self._records = [record for record in self._records if record not in records]
        target = find_target(self._evaluation and self._evaluation.batch, self.target)
        self._check_claim(loss, records, target)
        kappas = [
            relative_flatness(
                record.features if self.through_hessian else record.features.detach(),
                record.weight,
                record.outputs if self.through_hessian else record.outputs.detach(),
                target,
                loss=self.criterion,
                class_dim=-1,
                measure=self.measure,
                temperature=self.temperature,
                normalize_features=self.normalize_features,
                probes=self.shared_probes,
                generator=generator,
                beside=record.beside(loss) if self.through_hessian else None,
            )
            for record in records
        ]
        return torch.stack(kappas).sum() if kappas else None

    def _settle(self, tap: LayerTap) -> None:
        """Say once which layer it is, and refuse one that cannot be penalised."""
        layer, name = tap.layer, tap.name
        if layer is None or name is None:
            return
        if self.criterion is not None and not has_matrix(layer):
            raise ValueError(
                f"Expected argument `layer` to name an nn.Linear where the loss is named, but got "
                f"{describe(name, layer)}. Leave out `loss`: then the curvature comes from the loss itself."
            )
        if self._announced == name:
            return
        self._announced = name
        rank_zero_info(f"{type(self).__name__}: relative flatness is penalised at layer {describe(name, layer)}.")
        if self.coefficient < 0 and self._module is not None and not is_capped(self._module.trainer, name):
            rank_zero_warn(
                f"{self!r}: a negative coefficient trains away from flatness, which nothing bounds, so that training "
                f"can diverge. The callback `MaxNorm({name!r}, …)` caps the layer's weight; `normalize_features` "
                "leaves the features' length out."
            )

    def _check_claim(self, loss: Tensor, records: list[LayerRecord], target: Any) -> None:
        """Check once an epoch that the loss trained with has the curvature of the one that is named."""
        assert self._claim is not None
        # Where outputs are very many, a second derivative of them would not fit beside them.
        if records and not any(record.late for record in records):
            name = None if self._tap is None else self._tap.name
            refuse_false_claim(self, name, self._claim, loss, records, target)

    def _warn(self, what: str) -> None:
        assert self._listening is not None
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"{self!r}: layer {self._listening.name!r} {what}")

    def _check_finite(self, name: str, value: Tensor) -> None:
        finite = value.detach().isfinite().all()
        if value.device.type != "cpu":
            # Reading it now would make the host wait for the device; it is read at the end of the epoch.
            self._not_finite = ~finite if self._not_finite is None else self._not_finite | ~finite
        elif not bool(finite):
            raise RuntimeError(f"{self!r}: the {name} of training step {self._coefficients.step} is {value.detach()}.")
