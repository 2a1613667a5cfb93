"""What all metrics have in common: states that are sums over samples, and that are their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_sum
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_relflat._shown import show, show_call

# What every metric of torchmetrics can be told, and what holds if it is not.
_COMMON = {"compute_on_cpu": False, "dist_sync_on_step": False, "sync_on_compute": True, "compute_with_cache": True}


class SummedMetric(Metric):
    """A metric whose states are sums over samples, which processes add up in one all-reduce.

    Torchmetrics itself gathers: for every state a barrier, the shapes of all processes and their values, which it adds
    up then. That is three calls per state, and as many copies of the state on every process as there are processes.
    The states that are no sums still go that way, and all of them where a metric is given a ``dist_sync_fn``.

    The first of the states is a NaN. A MetricCollection lets metrics share their states from the second batch on where
    these are equal after the first, as those of two criteria, scales or steps can be, and then one of them gets the
    other's values. NaN is equal to nothing. It comes first, because torchmetrics 1.4 compares no other state.

    States stay in float64, whatever a module that holds the metric is converted to, as Lightning does with
    ``precision="bf16-true"``: sums over many samples have no digits to spare. ``set_dtype`` leaves them so, too.

    Args:
        kwargs: the arguments of :class:`torchmetrics.Metric`.
    """

    is_differentiable = False
    full_state_update = False

    apart: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("apart", torch.tensor(torch.nan, dtype=torch.float64), dist_reduce_fx="sum")

    def __repr__(self) -> str:
        kept = self._set_to()
        if show(getattr(self, "loss", None)) == "CrossEntropyLoss()":
            kept["loss"] = "cross_entropy"  # the name is the default, and the object made from it is what is kept
        common = {name: getattr(self, name, usual) for name, usual in _COMMON.items()}
        return show_call(self, **kept, **{name: value for name, value in common.items() if value != _COMMON[name]})

    def _set_to(self) -> dict[str, Any]:
        """Return what the arguments were that are no attributes of their names."""
        return {}

    def _called(self) -> object:
        """Return the loss if it is called with what a network makes, so that it has to be in the network's dtype."""
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        """Move what the metric holds to a device, and leave it in its dtype."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        super()._apply(moved, exclude_state)
        called = self._called()
        if isinstance(called, nn.Module):
            called._apply(fn)  # type: ignore[no-untyped-call]  # theirs
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load states, and refuse such as have lost digits."""
        own = {f"{prefix}{name}" for name in self._defaults}
        state_dict.update({key: _in_full(key, value) for key, value in state_dict.items() if key in own})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Add other states, as ``forward`` and ``merge_state`` do, and refuse such as have lost digits."""
        super()._reduce_states({name: _in_full(name, value) for name, value in incoming_state.items()})

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot a single value or several, as every metric of torchmetrics does.

        Args:
            val: a result of ``forward`` or ``compute``, or a list of them; the metric's present value if left out.
            ax: a matplotlib axis to draw on.

        Returns:
            The figure and the axis.
        """
        return self._plot(val, ax)

    def _add_sums(self, name: str, *shape: int) -> None:
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def _add_to_numbers(self, name: str, values: Sequence[Tensor]) -> None:
        """Add to each of the numbers of a state."""
        numbers: Tensor = getattr(self, name)
        setattr(self, name, numbers + torch.stack(list(values)).to(numbers))

    def _together(self) -> AbstractContextManager[None]:
        """Hold the states of all processes together, as within ``compute``."""
        return self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute)

    def _sum_of_processes(self, value: Tensor, dist_sync_fn: Callable[..., Any], process_group: Any | None) -> Tensor:
        """Return the sum of a value over the processes that are synchronised."""
        group = process_group or self.process_group
        if dist_sync_fn is not gather_all_tensors:
            return torch.stack([*dist_sync_fn(value, group=group)]).sum(dim=0)
        whole = value.clone()
        torch.distributed.all_reduce(whole, group=group)
        return whole

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        reductions = self._reductions
        sums = [name for name in reductions if reductions[name] is dim_zero_sum and dist_sync_fn is gather_all_tensors]
        if sums:
            parts: list[Tensor] = [getattr(self, name) for name in sums]
            whole = self._sum_of_processes(torch.cat([part.flatten() for part in parts]), dist_sync_fn, process_group)
            totals = torch.split(whole, [part.numel() for part in parts])
            for name, part, total in zip(sums, parts, totals, strict=True):
                setattr(self, name, total.view_as(part))
        if len(sums) == len(reductions):
            return
        try:
            self._reductions = {name: reduction for name, reduction in reductions.items() if name not in sums}
            super()._sync_dist(dist_sync_fn, process_group)
        finally:
            self._reductions = reductions


def _in_full(name: str, value: Any) -> Any:
    """Return a state in float64; one that is in less and holds nothing yet has lost nothing."""
    if not isinstance(value, Tensor):
        return [_in_full(name, part) for part in value]
    if value.dtype != torch.float64 and value.nan_to_num().any():
        raise TypeError(
            f"Expected state {name!r} to be in float64, but got {value.dtype}, in which sums lose their digits. A "
            "wrapper such as `Running` has states of its own, which are converted with the module that holds it: keep "
            "it outside the module, or convert the module before the first batch. Of a `state_dict` that was "
            "converted, leave the metric's states out."
        )
    return value.double()
