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
from lightning_relflat.callbacks._loss_ratio import LossRatio
from lightning_relflat.callbacks._step import Step, StepWatcher
from lightning_relflat.callbacks._weight_cap import Norm, WeightCap, check_max_norm, check_norm
from lightning_relflat.functional._checks import check_count, check_flag, check_number, check_probes
from lightning_relflat.functional._probes import Measure
from lightning_relflat.functional._weights import has_matrix
from lightning_relflat.functional.layer_flatness import probe_seed
from lightning_relflat.functional.relative_flatness import (
    check_measure,
    check_shared_probes,
    check_temperature,
    owned_criterion,
    relative_flatness,
)
from lightning_relflat.layer_tap import LayerRecord, LayerTap, did_not_run
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

    Logged in each step: ``fam/penalty``, the term that was added, and ``fam/coefficient``, the λ of the step. Several
    of these callbacks in one Trainer need different names: ``fam/hidden/penalty`` for ``name="hidden"``.

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
        target: where a named loss finds its target: an index or key of the batch, a list of them that are followed one
            after the other, a callable on the batch, or ``None`` if its curvature needs none.
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
            fallen, whatever the scale of κ; λ is 0 at first, grows as the network learns, and falls if the loss rises
            again, so that it needs no ``warmup_steps``. Begin with 0.1: on eight small tasks it lowered the test loss
            of plain training by 3 to 12 % on six, where a λ tuned by validation lowered it by 3 to 11 %; it changed
            nothing on a wide network with LayerNorm (tuned: 9 % lower), and on a data set where no λ helps (breast
            cancer) the test loss rose by 31 % at the same accuracy (``benchmarks/relative_coefficient.json``). What
            the loss falls before ``start_epoch`` does not count, and what a regression gains by learning the mean of
            its targets does: centre them. λ is 0 as long as κ is less than a millionth of the fall. Schedules act on
            ``coefficient``; ``fam/coefficient`` is the λ that they come to. Costs an all-reduce of three numbers after
            a penalised step.
        measure: ``"relative_flatness"`` for κ, or ``"trace"`` for the layer-wise trace ‖W‖_F² Tr(H) in its place.
        temperature: τ, to penalise the κ that the loss has at z/τ, which is that of z but for 1/τ² and softer
            probabilities. For a named cross-entropy or binary cross-entropy alone.
        normalize_features: whether ‖φ_p‖ counts as 1 in κ for every row that the weight is multiplied with (sample,
            token, patch), with the curvature at the outputs as they are: features can then neither be shrunk for a
            smaller κ nor, with a negative λ, grow without end.
        max_norm: a cap on the norm of the layer's weight, which is multiplied by min(1, max_norm / ‖W‖) when training
            starts and after every step of the optimizer that holds it; up to rounding. Needs a named layer whose weight
            is one tensor: no parametrization, no adapters. If the weight is tied to another layer's, that one is
            capped with it. The cap holds as long as ``fit`` runs, also before ``start_epoch`` and from ``stop_epoch``.
        name: a group of its own for what is logged, for several of these callbacks in one Trainer.
        norm: what ``max_norm`` caps: ``"frobenius"``, the root of the sum of squares, of a convolution's kernel too;
            or ``"spectral"``, the largest singular value, of an ``nn.Linear`` (gathered whole if it is sharded).

    A negative λ has no bound from below, and training can diverge. ``max_norm`` with ``normalize_features`` bounds the
    κ of a cross-entropy; without ``max_norm`` there is a warning.

    Raises:
        ValueError: if an argument is not what it should be; in ``fit`` before the first step if there is no such
            layer, the batch has no such target, or the layer's weight cannot be capped.
        RuntimeError: in ``fit``, if a penalty could not be added: the layer did not run, carries no graph, or is
            frozen with nothing else to penalise; if a loss that is named is not the one trained with, or the curvature
            of the one that is cannot be had rightly; or if the loss or the penalty is not finite.

    Example:
        >>> from lightning_relflat import FAM
        >>> FAM(layer="head", coefficient=0.1)
        FAM(layer='head')
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
        max_norm: float | None = None,
        norm: Norm = "frobenius",
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
        self.max_norm = check_max_norm(max_norm)
        self.norm = check_norm(norm)
        self.name = check_name(name)
        if self.max_norm is not None and layer is None:
            raise ValueError(
                "Expected argument `layer` to name the layer whose weight `max_norm` caps, because it is capped before "
                "any layer has run, but got None."
            )
        self._steps = 0  # training steps begun since start_epoch
        self._module: LightningModule | None = None
        self._tap: LayerTap | None = None
        self._cap: WeightCap | None = None
        self._ratio = LossRatio()
        self._loaded = False  # whether a checkpoint has brought the state of the run that begins
        self._announced: str | None = None
        self._warned = self._verified = False
        self._coefficient = 0.0  # of the step; 0 also where none is due
        self._step = 0
        self._begun = False
        self._evaluation: Step | None = None  # the training step that runs
        self._records: list[LayerRecord] = []
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
        self._forget_step()
        if trainer.global_step == 0 and not self._loaded:  # a run of its own, as the next fold of a cross-validation
            self._steps = 0
            self._ratio = LossRatio()
        self._warned = self._verified = False
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
        self._settle()
        if self.coefficient < 0 and self.max_norm is None:
            rank_zero_warn(
                f"{self!r}: a negative coefficient trains away from flatness, which nothing bounds, so that training "
                "can diverge. `max_norm` caps the layer's weight; `normalize_features` leaves the features' length out."
            )
        StepWatcher.join(pl_module, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cap the weight, whose values a checkpoint may just have brought."""
        self._loaded = False
        if self.max_norm is not None:
            assert self._tap is not None
            assert self._tap.layer is not None
            if self._cap is not None:
                self._cap.close()
            name = self._tap.name or ""
            self._cap = WeightCap(name, self._tap.layer, self.max_norm, self.norm, trainer.optimizers)

    def on_train_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Decide on the step's coefficient."""
        epoch = trainer.current_epoch
        coefficient = check_number("coefficient_at", self.coefficient_at(epoch=epoch, step=self._steps))
        due = coefficient != 0 and self._steps % self.every_n_steps == 0
        self._coefficient = coefficient if due else 0.0
        self._step = self._steps
        self._begun = True
        self._ratio.begin()
        self._steps += epoch >= self.start_epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the sizes of loss and κ, and forget the batch."""
        # Here, where every process comes once for each batch, whatever its training step has done; the next step uses
        # it, so that the reduction holds up no backward pass, and a line search keeps one λ.
        if self.relative and self._coefficient != 0:
            self._ratio.end(pl_module.device, trainer.world_size)
        self._forget_step()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the epoch's penalties were added."""
        if self._not_finite is not None and bool(self._not_finite):
            raise RuntimeError(
                f"{self!r}: the loss or the penalty of a training step in epoch {trainer.current_epoch} was nan or "
                "infinite."
            )
        # In automatic optimization a step that returned a loss was penalised, or refused; one without is no fault.
        if self._ran and not self._applied and not pl_module.automatic_optimization:
            raise RuntimeError(
                f"{self!r} added no penalty in epoch {trainer.current_epoch}, because no loss that depends on the "
                "layer went through `self.manual_backward`."
            )
        self._begin_epoch()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing behind."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave nothing behind; `teardown` is not called after an exception."""
        if self._begun:  # the step was begun in vain, and a resumed run begins it again
            self._steps = self._step
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of training steps, which warm-up, `every_n_steps` and probes go by, and the sizes."""
        return {"steps": self._steps} | ({"sizes": self._ratio.state()} if self.relative else {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up from a checkpoint what `state_dict` put there."""
        self._loaded = True
        self._steps = state_dict["steps"]
        self._ratio.load(state_dict.get("sizes", []))

    def _detach(self) -> None:
        if self._tap is not None:
            self._tap.close()
            self._tap = None
        if self._module is not None:
            StepWatcher.leave(self._module, self)
            self._module = None
        if self._cap is not None:
            self._cap.close()
            self._cap = None
        self._forget_step()

    def _forget_step(self) -> None:
        self._coefficient = 0.0
        self._begun = False
        self._evaluation = None
        self._records = []

    def _begin_epoch(self) -> None:
        self._ran = self._applied = 0
        self._not_finite: Tensor | None = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again at what lies behind the layer, and whether the loss is the one named; both may have changed."""
        self._verified = False
        if self._tap is not None:
            self._tap.look_again()

    def begin(self, step: Step) -> None:
        """Listen to the layer, if the step is to be penalised.

        Args:
            step: a step of the module.
        """
        self._records = []
        if self._tap is None:
            return
        if step.method == "training_step" and self._coefficient != 0:
            self._evaluation = step
            self._ran += 1
            self._tap.start()
        else:
            self._tap.attach()

    def pause(self, paused: bool) -> None:
        """Do not listen during a backward pass: checkpointed layers run again there."""
        if self._coefficient != 0 and self._tap is not None:
            self._tap.recording = not paused

    def end(self) -> None:
        """Stop listening."""
        self._records = []
        if self._tap is not None:
            self._tap.stop()

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
        tap, module = self._tap, self._module
        if self._coefficient == 0 or tap is None or module is None:
            return None
        self._records += tap.take(loss)
        self._settle()
        automatic = module.automatic_optimization
        if automatic:
            self._check_records()
        self._check_finite("loss", loss)
        kappa = self._kappa(loss) if self._records and loss.requires_grad else None
        if kappa is None:
            if automatic:
                raise RuntimeError(
                    f"{self!r}: the loss of `training_step` does not depend on the outputs of "
                    f"{'any linear layer' if tap.name is None else f'layer {tap.name!r}'}, so that there is nothing to "
                    "penalise."
                )
            if self._records and not any(record.outputs.requires_grad for record in self._records):
                self._warn(
                    "and all before it are frozen for now. The penalty of a loss that comes after them is left out; "
                    "name the loss to have it."
                )
            return None
        # Made on the device: a number that is logged would have to be copied there, and the host would wait for it.
        coefficient = torch.full_like(kappa.detach(), self._coefficient)
        if self.relative:
            coefficient = coefficient * self._ratio.ratio(kappa)
            self._ratio.measure(loss, kappa)
        penalty = coefficient * self.every_n_steps * kappa
        self._check_finite("penalty", penalty)
        self._applied += 1
        values = {"penalty": penalty.detach(), "coefficient": coefficient}
        for name, value in values.items():
            # The size is told, because Lightning would look for one in a batch that it may not have.
            module.log(labelled(f"fam/{name}", self.name), value, on_step=True, on_epoch=False, batch_size=1)
        return penalty

    def _kappa(self, loss: Tensor) -> Tensor | None:
        assert self._module is not None
        generator = None
        if self.criterion is None or self.shared_probes is not None:
            device = self._records[0].features.device
            seed = probe_seed(self.seed, self._step, self._module.trainer.global_rank)
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

    def _settle(self) -> None:
        """Say once which layer it is, and refuse one that cannot be penalised."""
        assert self._tap is not None
        layer, name = self._tap.layer, self._tap.name
        if layer is None or name is None:
            return
        if self.criterion is not None and not has_matrix(layer):
            raise ValueError(
                f"Expected argument `layer` to name an nn.Linear where the loss is named, but got "
                f"{describe(name, layer)}. Leave out `loss`: then the curvature comes from the loss itself."
            )
        if self._announced != name:
            self._announced = name
            rank_zero_info(f"{type(self).__name__}: relative flatness is penalised at layer {describe(name, layer)}.")

    def _check_records(self) -> None:
        assert self._tap is not None
        if not self._records and not self._tap.pending:
            raise RuntimeError(
                f"{self!r}: no penalty could be added, because {did_not_run(self._tap)} with gradients in "
                "`training_step`. Is it used there, and outside of `torch.no_grad()`? If it lies in re-entrant "
                "activation checkpointing, use `use_reentrant=False`. If the module was compiled and had run before "
                "`fit`, call `torch._dynamo.reset()` first."
            )
        if not self._records:
            return  # the loss depends on none of the layers that ran, which is said later
        frozen = not any(record.weight.requires_grad for record in self._records)
        if frozen and not (self.through_hessian and any(record.outputs.requires_grad for record in self._records)):
            raise RuntimeError(
                f"{self!r}: there is nothing to penalise, because the weight of layer {self._tap.name!r} is frozen"
                + (" and so is all before it." if self.through_hessian else " and through_hessian=False.")
            )
        if frozen:
            self._warn("has a frozen weight. The penalty reaches only what comes before it.")

    def _check_claim(self, loss: Tensor, records: list[LayerRecord], target: Any) -> None:
        """Check once an epoch that the loss trained with has the curvature of the one that is named."""
        assert self.criterion is not None
        # Where outputs are very many, a second derivative of them would not fit beside them.
        if self._verified or not records or any(record.late for record in records):
            return
        self._verified = refuse_false_claim(
            self,
            None if self._tap is None else self._tap.name,
            loss,
            records,
            target,
            self.criterion,
            remedy="Leave out `loss`: then the curvature comes from the loss itself.",
        )

    def _warn(self, what: str) -> None:
        assert self._tap is not None
        if not self._warned:
            self._warned = True
            rank_zero_warn(f"{self!r}: layer {self._tap.name!r} {what}")

    def _check_finite(self, name: str, value: Tensor) -> None:
        finite = value.detach().isfinite().all()
        if value.device.type != "cpu":
            # Reading it now would make the host wait for the device; it is read at the end of the epoch.
            self._not_finite = ~finite if self._not_finite is None else self._not_finite | ~finite
        elif not bool(finite):
            raise RuntimeError(f"{self!r}: the {name} of training step {self._step} is {value.detach()}.")
