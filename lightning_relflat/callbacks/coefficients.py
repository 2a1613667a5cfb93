"""λ of each training step: what is due by the number of steps, and a unit of it that needs no tuning."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_relflat._shown import show_call
from lightning_relflat.functional._checks import check_number, said

DECAY = 0.9


def check_coefficient(coefficient: object) -> float | Literal["auto"]:
    """Return λ.

    Args:
        coefficient: the argument ``coefficient`` of a callback.

    Returns:
        A number, or ``"auto"``.

    Raises:
        ValueError: if it is neither.
    """
    if isinstance(coefficient, str) and coefficient == "auto":
        return "auto"
    if isinstance(coefficient, bool) or not isinstance(coefficient, int | float) or not math.isfinite(coefficient):
        raise ValueError(
            f"Expected argument `coefficient` to be a finite number or 'auto', but got {said(coefficient)}."
        )
    return float(coefficient)


class Coefficients:
    """The λ of one training step after another, on as many as there are processes.

    Args:
        every_n_steps: only every n-th training step since ``start_epoch`` has a penalty.
        start_epoch: the epoch from which steps count.
        rule: makes what finds λ of a run; ``None`` where it is given.

    Attributes:
        now: what the policy says of the present step; 0 where no penalty is due, and between the steps.
        step: the number of the present step, from ``start_epoch``.
    """

    def __init__(self, every_n_steps: int, start_epoch: int, rule: Callable[[], Automatic] | None = None) -> None:
        self._every_n_steps = every_n_steps
        self._start_epoch = start_epoch
        self._new_rule = rule
        self._steps = 0  # training steps begun since start_epoch
        self._begun = False
        self._rule = rule and rule()
        self._loaded = False  # whether a checkpoint has brought the state of the run that begins
        self.now = 0.0
        self.step = 0

    def begin_run(self, *, anew: bool) -> None:
        """Begin with 0 steps, unless a checkpoint has brought a number.

        Args:
            anew: whether the run is one of its own, as the next fold of a cross-validation.
        """
        self.forget()
        if anew and not self._loaded:
            self._steps = 0
            self._rule = self._new_rule and self._new_rule()

    def train(self) -> None:
        """Take notice that training begins: what a checkpoint has brought belongs to this run."""
        self._loaded = False

    def begin(self, policy: Callable[..., float], epoch: int) -> None:
        """Decide on a step.

        Args:
            policy: what λ is, or with a rule the factor before its λ, by ``epoch`` and by ``step``, the number of
                training steps before since ``start_epoch``.
            epoch: the step's epoch.

        Raises:
            ValueError: if the policy gives no finite number.
        """
        try:
            value = check_number("coefficient_at", policy(epoch=epoch, step=self._steps))
        except (TypeError, ValueError) as error:
            if self._rule is None:
                raise
            raise ValueError(
                "Expected `coefficient_at` to return a factor where `coefficient` is 'auto', which is no number to "
                f"reckon with, but got {type(error).__name__}: {error} Take "
                "`super().coefficient_at(epoch=epoch, step=step)` in place of `self.coefficient`."
            ) from error
        self.now = value if self._steps % self._every_n_steps == 0 else 0.0
        self.step = self._steps
        self._begun = True
        if self._rule is not None:
            self._rule.begin()
        self._steps += epoch >= self._start_epoch

    def of(self, loss: Tensor, kappa: Tensor) -> Tensor | float:
        """Return λ beside a loss and its κ, and show them to the rule, if there is one.

        Args:
            loss: the loss.
            kappa: its κ.

        Returns:
            λ; a number, or by a rule a tensor on κ's device.
        """
        if self._rule is None:
            return self.now
        coefficient = self._rule.coefficient(kappa) * self.now
        self._rule.measure(loss, kappa)
        return coefficient

    def end(self, device: torch.device, world: int) -> None:
        """End a step, in all processes together.

        Args:
            device: where a process that measured nothing has its zeros.
            world: how many processes there are.
        """
        # Here, where every process comes once for each batch, whatever its training step has done; the next step uses
        # it, so that the reduction holds up no backward pass, and a line search keeps one λ.
        if self._rule is not None and self.now != 0:
            self._rule.end(device, world)
        self.forget()

    def take_back(self) -> None:
        """Take notice that the present step, if there is one, was begun in vain: a resumed run begins it again."""
        if self._begun:
            self._steps = self.step

    def forget(self) -> None:
        """Be between two steps."""
        self.now = 0.0
        self._begun = False

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the number of steps, which probes and warm-up go by, and the sizes."""
        return {"steps": self._steps} | ({} if self._rule is None else {"sizes": self._rule.state()})

    def load(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint kept.

        Args:
            state: what :meth:`state` returned.
        """
        self._loaded = True
        self._steps = state["steps"]
        if self._rule is not None:
            self._rule.load(state.get("sizes", []))


class Automatic:
    """λ = min(0.003, 0.1 · (max L - L) / max κ), which needs no number.

    On the device, and equal in all processes. L and κ are exponential moving averages over the steps that measured
    them, of their means over processes; max is the largest average so far. κ has the unit of the loss and does not
    depend on the features' scale, so that one small λ suits most networks. What holds it back where κ is very large

    - is 0 as long as nothing is learned: else a network whose κ is large from the start stays undecided, or its
      features die;
    - does not rise as κ falls: that would have the gradient of log κ, and reward small κ without end;
    - falls again where the loss rises, which holds back a penalty that is too strong;
    - does not change if a constant is added to the loss, as κ does not.

    Both numbers are from ``docs/experiments/automatic_coefficient.md``.

    Args:
        share: the share of what the loss has fallen that λκ may be.
        most: the largest λ.
    """

    def __init__(self, share: float = 0.1, most: float = 0.003) -> None:
        self.share, self.most = share, most
        self._step: Tensor | None = None
        self._sums: Tensor | None = None  # averages of the sum of losses, of κ, and of how many there were
        self._largest: Tensor | None = None  # smoothed loss, smoothed |κ|

    def __repr__(self) -> str:
        return show_call(self)

    def begin(self) -> None:
        """Forget what was measured in an unfinished step."""
        self._step = None

    def measure(self, loss: Tensor, kappa: Tensor) -> None:
        """Add a loss of the step, and its κ.

        Args:
            loss: the loss.
            kappa: its κ, of whatever sign: probes, and losses that are not convex, have negative ones. Of several
                networks that are trained at once, if it has as many elements.
        """
        dtype = _dtype(kappa.device)
        kappa = kappa.detach().to(dtype)
        loss = loss.detach().to(dtype).reshape(kappa.shape)
        sums = torch.stack([loss, kappa, torch.ones_like(kappa)])
        self._step = sums if self._step is None else self._step + sums

    def end(self, device: torch.device, world: int) -> None:
        """Take in what was measured in the step, in all processes together; each must call it in each step.

        Args:
            device: where a process that measured nothing has its zeros.
            world: how many processes there are.
        """
        step, self._step = self._step, None
        if step is None:
            step = torch.zeros(3, dtype=_dtype(device), device=device)
        if world > 1:
            torch.distributed.all_reduce(step)
        past = torch.zeros_like(step) if self._sums is None else self._sums.to(step)
        # A step without a loss says nothing.
        self._sums = torch.where(step[2] > 0, DECAY * past + (1 - DECAY) * step, past)
        loss, kappa = self._means()
        most_loss, most_kappa = (loss, kappa) if self._largest is None else self._largest.to(step)
        self._largest = torch.stack([torch.maximum(loss, most_loss), torch.maximum(kappa, most_kappa)])

    def coefficient(self, like: Tensor) -> Tensor:
        """Return λ, 0 before anything was measured.

        Args:
            like: a tensor of the device and dtype to return.

        Returns:
            λ, of the shape of what was measured.
        """
        if self._sums is None or self._largest is None:
            return like.new_zeros(())
        loss, kappa = self._largest
        fall = loss - self._means()[0]
        coefficient = (self.share * fall / kappa).clamp(max=self.most)
        # Before there was a loss the fall is no number, and beside a κ of 0 any λ is as good.
        return torch.where((fall > 0) & (kappa > 0), coefficient, 0.0).to(like)

    def state(self) -> list[float]:
        """Return what a checkpoint keeps."""
        if self._sums is None or self._largest is None:
            return []
        return [*self._sums.tolist(), *self._largest.tolist()]

    def load(self, state: list[float]) -> None:
        """Take up what a checkpoint kept.

        Args:
            state: what :meth:`state` returned.
        """
        values = torch.tensor(state, dtype=torch.float64) if state else None
        self._sums, self._largest = (None, None) if values is None else (values[:3], values[3:])

    def _means(self) -> tuple[Tensor, Tensor]:
        """Return the smoothed loss and the size of the smoothed κ; before there was any, what is smaller than any."""
        assert self._sums is not None
        # All three began at 0, so that the division by how many there were takes out the bias as well.
        loss, kappa, count = self._sums
        some = count > 0
        return torch.where(some, loss / count, -math.inf), torch.where(some, kappa.abs() / count, 0.0)


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
