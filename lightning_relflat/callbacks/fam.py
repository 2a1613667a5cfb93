"""FAM: train towards relative flatness."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_relflat._batch import check_key
from lightning_relflat.callbacks._base import (
    Callback,
    LightningModule,
    Trainer,
    check_layer,
    check_name,
    refuse_collisions,
)
from lightning_relflat.callbacks._penalty import Penalty
from lightning_relflat.callbacks._step import StepWatcher
from lightning_relflat.callbacks.coefficients import Automatic, Coefficients, check_coefficient
from lightning_relflat.curvature import Loss, read_loss
from lightning_relflat.functional._checks import check_count, check_flag, check_probes
from lightning_relflat.functional._probes import Measure
from lightning_relflat.functional.criteria import has_closed_form
from lightning_relflat.functional.relative_flatness import check_measure, check_shared_probes, check_temperature


class FAM(Callback):
    r"""Adds λ·κ, the relative flatness of a layer, to the loss of every training step.

    .. math:: L + λ κ, \qquad κ = \sum_{s,s'} ⟨w_s, w_{s'}⟩ \operatorname{Tr}(H_{s,s'})

    The module is not touched: its ``training_step`` (with manual optimization its ``manual_backward``) is wrapped
    while ``fit`` runs. The penalty joins the loss before anything is done with it, so that gradient accumulation,
    clipping, mixed precision with its scaler, line searches and distributed strategies treat it as they treat the
    loss. It costs no second forward pass.

    Logged: ``fam/penalty``, what was added to the losses of a step, and ``fam/coefficient``, its λ. They are those of
    the newest step with a penalty, in the steps that the Trainer's ``log_every_n_steps`` counts and in the last step of
    an epoch; :attr:`newest` has them in every step. Several of these callbacks in one Trainer need different names.

    What a later step would refuse is refused in the first step of ``fit``, also where the penalty begins later:
    ``docs/trainer_settings.md`` says what cannot be known then.

    Source: Adilova et al., *FAM: Relative Flatness Aware Minimization* (arXiv 2307.02337), the regularised
    objective and its gradient, Lemma 1.

    Args:
        layer: the dotted name of a linear or convolution layer, hidden or last, or ``None`` for the last linear one
            that the loss of the first penalised step depends on.
        coefficient: λ; negative to train away from flatness. ``docs/choosing_lambda.md`` shows what 0.003 does, and why
            no larger number is the default. ``"auto"`` is 0.003 too, but less where κ is so large that λκ were more
            than about a tenth of what the loss has fallen: λ = min(0.003, 0.1 · (max L - L) / max κ). L and κ are
            averages over the penalised steps before (exponentially, 0.9 of the old ones kept) and over processes, and
            max is their largest value so far; so λ is 0 at first, and needs no ``warmup_steps``. It costs an
            all-reduce of three numbers after a penalised step.
        loss: ``None`` for the loss of the step, whatever it is. Where that is linear in a criterion with a closed form
            of a linear layer's outputs, with whatever weights, masks and factors, κ is exact; elsewhere random probes
            go through what follows the layer. A call of ``torch.nn.functional.linear_cross_entropy`` with the layer's
            weight counts as the cross-entropy of its outputs, which are not made. Or a criterion, by name or as an
            object, or a callable ``loss(outputs, target)``, of the outputs of a linear layer and the batch's target
            alone. That is compared with the loss of the step when an epoch begins, when other operations lie between,
            and every 1,000 steps.
        target: where a named loss finds its target: an index or key of the batch; a list of them, followed one after
            the other; a callable on the batch; or ``None`` if its curvature needs none.
        probes: how many random probes to average where there is no closed form; ``None`` takes all products that there
            are: the smaller of the layer's sides many where no rows meet behind it, that times the number of features
            where they do; up to 10,000.
        shared_probes: for a cross-entropy with very many outputs: how many random probes, shared by the samples of a
            batch, stand for its exact κ; see :func:`~lightning_relflat.functional.relative_flatness`.
        through_hessian: whether gradients flow through the Hessian into all parameters, as in the paper. If not, the
            Hessian counts as a constant, and only the layer's weight gets a gradient.
        every_n_steps: penalise only every n-th training step, with n·λ·κ, so that the mean over steps stays the same.
            A training step is a batch, whatever the accumulation of gradients.
        warmup_steps: over how many training steps after ``start_epoch`` λ rises linearly to its value.
        start_epoch: the first epoch with the penalty.
        stop_epoch: the first epoch without it again.
        seed: where the probes start; every step and every process draws others.
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

    Examples:
        >>> from lightning_relflat import FAM
        >>> FAM(layer="head", coefficient=0.2)
        FAM(layer='head', coefficient=0.2)
        >>> FAM(coefficient=1.0, warmup_steps=100).coefficient_at(epoch=0, step=49)
        0.5
    """

    def __init__(
        self,
        layer: str | None = None,
        coefficient: float | Literal["auto"] = 0.003,
        *,
        loss: Loss | None = None,
        target: int | str | Sequence[int | str] | Callable[[Any], Any] | None = 1,
        probes: int | None = 1,
        shared_probes: int | None = None,
        through_hessian: bool = True,
        every_n_steps: int = 1,
        warmup_steps: int = 0,
        start_epoch: int = 0,
        stop_epoch: int | None = None,
        seed: int = 0,
        measure: Measure = "relative_flatness",
        temperature: float = 1.0,
        normalize_features: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__()
        check_probes(probes)
        self.layer = check_layer(layer)
        self.coefficient: float | Literal["auto"] = check_coefficient(coefficient)
        self.loss = loss
        self.criterion: Any = None if loss is None else read_loss(loss)
        known: Any = self.criterion if has_closed_form(self.criterion) else None
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
        self.measure = check_measure(measure)
        self.temperature = check_temperature(temperature, known)
        self.shared_probes = check_shared_probes("shared_probes", shared_probes, known, self.measure)
        self.normalize_features = check_flag("normalize_features", normalize_features)
        self.name = check_name(name)
        self._begin_anew()
        self._penalty: Penalty | None = None  # of the fit that runs
        self._module: LightningModule | None = None
        self._penalised: str | None = None
        self._newest: tuple[Tensor, Tensor | float] | None = None

    @property
    def newest(self) -> dict[str, Tensor | float]:
        """``"penalty"`` and ``"coefficient"`` of the newest step with a penalty, as they are logged; empty before."""
        newest = self._newest if self._penalty is None else self._penalty.newest
        return {} if newest is None else dict(zip(("penalty", "coefficient"), newest, strict=True))

    @property
    def penalised_layer(self) -> str | None:
        """The name of the layer that is penalised, or was last; ``None`` as long as it is not known."""
        return self._penalised if self._penalty is None else self._penalty.layer

    def coefficient_at(self, *, epoch: int, step: int) -> float:
        """Return λ for a training step. Override for a policy of your own.

        Args:
            epoch: the epoch, from 0.
            step: how many training steps came before this one since ``start_epoch``.

        Returns:
            λ; with ``"auto"`` a factor before the λ that it finds, 1 after the warm-up. At 0 nothing is computed.
        """
        if epoch < self.start_epoch or (self.stop_epoch is not None and epoch >= self.stop_epoch):
            return 0.0
        value = 1.0 if self.coefficient == "auto" else self.coefficient
        return value * min(1.0, (step + 1) / (self.warmup_steps or 1))

    def with_coefficient(self, coefficient: float | Literal["auto"]) -> FAM:
        """Return a copy with another coefficient, which has not trained.

        Args:
            coefficient: λ.

        Returns:
            The copy, of the same class.

        Raises:
            ValueError: if it is neither a finite number nor ``"auto"``.

        Examples:
            >>> from lightning_relflat import FAM
            >>> FAM("head", warmup_steps=10).with_coefficient(0.1)
            FAM(layer='head', coefficient=0.1, warmup_steps=10)
        """
        other = copy.deepcopy(self)
        other.coefficient = check_coefficient(coefficient)
        other._begin_anew()
        return other

    def _begin_anew(self) -> None:
        self._coefficients = Coefficients(
            self.every_n_steps, self.start_epoch, Automatic if self.coefficient == "auto" else None
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layer, and listen to the module's steps."""
        refuse_collisions(trainer, self)
        self._coefficients.begin_run(anew=trainer.global_step == 0)
        self._penalty = Penalty(self, self._coefficients, trainer, pl_module)
        self._module = pl_module
        StepWatcher.join(pl_module, self._penalty)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take notice that a checkpoint, if there is one, has been loaded."""
        self._coefficients.train()
        if self.coefficient != 0 and (self.stop_epoch is None or trainer.current_epoch < self.stop_epoch):
            self._running.rehearse()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look again at the layer, what lies behind it, and whether the loss is the one named: all may have changed."""
        self._running.look_again()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Decide on the step's coefficient."""
        self._coefficients.begin(self.coefficient_at, trainer.current_epoch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Refuse gradients of losses that went by another way than `manual_backward`, before they move anything."""
        if not pl_module.automatic_optimization and self._running.went_another_way(optimizer):
            raise RuntimeError(
                f"{self!r}: the optimizer has gradients of a loss, but none went through `self.manual_backward`, so "
                "that no penalty can be added. Call that in place of `loss.backward()`."
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take in the sizes of loss and κ."""
        self._coefficients.end(pl_module.device, trainer.world_size)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that the epoch's penalties were added."""
        penalty = self._running
        if not penalty.finite.all():
            raise RuntimeError(
                f"{self!r}: the loss or the penalty of a training step in epoch {trainer.current_epoch} was nan or "
                "infinite."
            )
        # In automatic optimization a step that returned a loss was penalised, or refused; one without is no fault.
        if not pl_module.automatic_optimization:
            why = "because no loss that depends on the layer went through `self.manual_backward`"
            if penalty.ran and not penalty.applied:
                raise RuntimeError(f"{self!r} added no penalty in epoch {trainer.current_epoch}, {why}.")
            if penalty.rehearsed:
                rank_zero_warn(f"{self!r} could not have added a penalty in epoch {trainer.current_epoch}, {why}.")
                penalty.rehearse(False)
        penalty.begin_epoch()

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

    @property
    def _running(self) -> Penalty:
        assert self._penalty is not None
        return self._penalty

    def _detach(self) -> None:
        if self._penalty is not None and self._module is not None:
            StepWatcher.leave(self._module, self._penalty)
            self._penalised, self._newest = self._penalty.layer, self._penalty.newest
            self._penalty.close()
        self._penalty = self._module = None
        self._coefficients.forget()
