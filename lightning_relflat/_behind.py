"""What a step computes behind a layer: normalisations written out, batch statistics held fixed in the curvature.

PyTorch's third derivatives of layer, batch and instance normalisation are wrong (its issues 175754 and 186256), fused
attention has no second one, and a batch's statistics count as constants in κ. So while a step runs, the calls behind
the layer are seen by a function mode. A normalisation keeps its own output, bit for bit; its gradient goes through the
same formula in elementary operations. Needs torch alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from lightning_relflat.functional._checks import compute_dtype, full_precision
from lightning_relflat.functional._graph import leaves_of, reaches


class Switch:
    """Whether a door or the gates are shut: the loss's gradient passes, that of curvature stops or goes elsewhere."""

    shut = False


class GateSwitch:
    """The switch of one gate, which stays open where the gate does not lie behind the layer that counts.

    Attributes:
        counts: whether it lies there.
    """

    def __init__(self, common: Switch) -> None:
        self._common = common
        self.counts = True

    @property
    def shut(self) -> bool:
        """Whether the gate is shut."""
        return self.counts and self._common.shut


class Door(torch.autograd.Function):
    """The identity, whose gradient stops while the door is shut."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, switch: Switch) -> Tensor:
        """Pass on."""
        ctx.switch = switch
        return value.data  # not a view, so that whatever follows in place is seen in its version

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:
        """Pass on, or stop."""
        return None if ctx.switch.shut else gradients[0], None


class _Gate(torch.autograd.Function):
    """A value whose gradient goes to one tensor, or while the switch is shut to another of the same value."""

    loss_only = (0,)  # the input that curvature does not lead to

    @staticmethod
    def forward(ctx: Any, with_statistics: Tensor, fixed: Tensor, switch: GateSwitch) -> Tensor:
        ctx.switch = switch
        # Not a view, so that an activation in place may follow.
        return with_statistics.data

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        [gradient] = gradients
        return (None, gradient, None) if ctx.switch.shut else (gradient, None, None)


class _Instead(torch.autograd.Function):
    """A value whose gradient goes to another tensor of the same value, to rounding."""

    @staticmethod
    def forward(ctx: Any, written_out: Tensor, value: list[Tensor]) -> Tensor:
        return value[0].data

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Deposit(torch.autograd.Function):
    """A number whose gradients with respect to some tensors have been taken already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, taken: Sequence[Tensor], *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*taken)
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *((gradients[0] * part).to(part.dtype) for part in ctx.saved_tensors)


class Behind(TorchFunctionMode):
    """Sees what is computed behind a layer, from its first pass on.

    Args:
        measures: whether curvature is only looked at. Then the loss keeps its own gradient, bit for bit, and only that
            of curvature goes through what is written out; else both do, because a penalty's gradient needs it.

    Attributes:
        switch: of all gates there are: those of one mode lie in the graphs of another.
        rewrote: whether anything was written out.
        gated: whether statistics of a batch were among it.
    """

    switch: ClassVar[Switch] = Switch()

    def __init__(self, *, measures: bool = False) -> None:
        super().__init__()
        self.measures = measures
        self.forget()

    def forget(self) -> None:
        """Begin anew, as if the layer had not run."""
        self.rewrote = self.gated = self._paused = False
        self._depends: dict[Node, bool] = {}
        self._entered: list[tuple[Tensor, Tensor, Switch]] = []
        self._left: list[tuple[Tensor, object]] = []  # what has left which layer
        self._gates: list[tuple[Tensor, GateSwitch]] = []  # what enters which gate

    def enter(self, value: Tensor) -> Tensor:
        """Put a tensor behind a door, beyond which κ's own gradient need not be followed but can be handed over.

        Args:
            value: the tensor.

        Returns:
            The same, behind the door.
        """
        if not value.requires_grad:
            return value
        switch = Switch()
        behind: Tensor = _apply(Door, value, switch)
        self._entered.append((value, behind, switch))
        return behind

    def begin(self, outputs: Tensor, layer: object = None) -> Tensor:
        """Take notice of what left the layer: what depends on it lies behind.

        Args:
            outputs: the outputs.
            layer: the layer, one of several as long as it is not settled which one counts.

        Returns:
            The same, behind a door.
        """
        behind = self.enter(outputs)
        if behind.grad_fn is not None:
            self._depends[behind.grad_fn] = True
        self._left.append((behind, layer))
        return behind

    def gate(self, value: Tensor) -> GateSwitch:
        """Return the switch of a new gate.

        Args:
            value: what enters it.

        Returns:
            The switch.
        """
        switch = GateSwitch(self.switch)
        self._gates.append((value, switch))
        return switch

    def settle(self, layer: object) -> None:
        """Let one layer count alone: doors after others are forgotten, gates that are not behind it stay open.

        Args:
            layer: the layer that counts.
        """
        others = [behind for behind, left in self._left if left is not layer]
        self._entered = [entry for entry in self._entered if not any(entry[1] is other for other in others)]
        outputs = [behind for behind, left in self._left if left is layer]
        self._depends = {behind.grad_fn: True for behind in outputs if behind.grad_fn is not None}
        for value, switch in self._gates:
            switch.counts = self._is_behind(value)
        self.gated = any(switch.counts for _, switch in self._gates)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Write out what has a form of its own and lies behind the layer."""
        kwargs = kwargs or {}
        form = FORMS.get(func)
        if (
            form is None
            or self._paused
            or torch.compiler.is_compiling()
            or not self._depends
            or not torch.is_grad_enabled()
        ):
            return func(*args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if not any(self._is_behind(tensor) for tensor in tensors):
            return func(*args, **kwargs)
        return form(self, func, args, kwargs)

    def _is_behind(self, tensor: Tensor) -> bool:
        """Return whether a tensor depends on what left the layer."""
        root = tensor.grad_fn
        if root is None:
            return False
        known: dict[Any, bool] = self._depends
        waiting: list[Any] = [root]
        while waiting:
            node = waiting[-1]
            before = [] if node in known else [found for found, _ in node.next_functions if found is not None]
            unknown = [found for found in before if found not in known]
            if unknown:
                waiting += unknown
            elif waiting.pop() not in known:
                known[node] = any(known[found] for found in before)
        return known[root]

    @contextmanager
    def curvature(self) -> Iterator[None]:
        """Take curvature: gates are shut, and nothing that is computed is written out."""
        self._paused = self.switch.shut = True
        try:
            yield
        finally:
            self._paused = self.switch.shut = False

    def deposit(self, kappa: Tensor) -> Tensor:
        """Take the gradient of a κ whose curvature goes through gates while these are shut; call in :meth:`curvature`.

        Later the loss's gradient and this one meet at the gates, where they could no longer be told apart. So κ's is
        taken now, as far as the doors, and joins the loss's beyond them.

        Args:
            kappa: κ in its graph.

        Returns:
            κ, whose gradient is known.
        """
        if not self.gated or not kappa.requires_grad:
            return kappa
        # What depends on another door lies between two passes of the layer; there the gates have to stay shut, too.
        doors = [
            entry
            for entry in self._entered
            if not reaches([entry[0]], [behind for _, behind, _ in self._entered if behind is not entry[1]])
        ]
        for _, _, switch in doors:
            switch.shut = True
        try:
            leaves = leaves_of(kappa, [behind for _, behind, _ in doors])
            taken: Sequence[Tensor | None] = torch.autograd.grad(
                kappa,
                [*(behind for _, behind, _ in doors), *leaves],
                allow_unused=True,
                retain_graph=True,  # the loss has yet to go back through it
            )
        finally:
            for _, _, switch in doors:
                switch.shut = False
        targets = [value for value, _, _ in doors]
        pairs = [(tensor, part) for tensor, part in zip([*targets, *leaves], taken, strict=True) if part is not None]
        if not pairs:
            return kappa.detach()
        result: Tensor = _apply(_Deposit, kappa.detach(), [part for _, part in pairs], *(tensor for tensor, _ in pairs))
        return result


def _layer_norm(mode: Behind, func: _Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Write out layer normalisation, over the last dimensions."""
    given = _arguments(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs, eps=1e-5)
    dims = tuple(range(-len(given["normalized_shape"]), 0))

    def formula(x: Tensor) -> Tensor:
        return _scaled(_standardised(x, dims, given["eps"]), given["weight"], given["bias"])

    return _instead(mode, func, args, kwargs, given["input"], formula)


def _instance_norm(mode: Behind, func: _Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Write out instance normalisation: its statistics are of one sample alone, and a part of its function."""
    given = _arguments(_INSTANCE_NORM, args, kwargs, use_input_stats=True, eps=1e-5)
    if not given["use_input_stats"]:
        return func(*args, **kwargs)
    x = given["input"]
    dims = tuple(range(2, x.ndim))

    def formula(x: Tensor) -> Tensor:
        return _scaled(_standardised(x, dims, given["eps"]), *_for_channels(x, given["weight"], given["bias"]))

    return _instead(mode, func, args, kwargs, x, formula)


def _batch_norm(mode: Behind, func: _Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """Let batch normalisation in training mode have fixed statistics in the curvature, and its own gradient."""
    names = _TORCH_BATCH_NORM if func is torch.batch_norm else _BATCH_NORM
    given = _arguments(names, args, kwargs, training=False, eps=1e-5)
    value: Tensor = func(*args, **kwargs)
    if not given["training"]:
        return value
    mode.rewrote = mode.gated = True
    switch = mode.gate(given["input"])
    with full_precision(value):
        x = given["input"].to(compute_dtype(value))
        with torch.no_grad():
            dims = (0, *range(2, x.ndim))
            variance, mean = torch.var_mean(x, dim=dims, correction=0, keepdim=True)
            deviation = (variance + given["eps"]).sqrt()
        fixed = _scaled((x - mean) / deviation, *_for_channels(x, given["weight"], given["bias"]))
    result: Tensor = _apply(_Gate, value, fixed.to(value.dtype), switch)
    return result


def _attention(mode: Behind, func: _Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Take the one kernel of attention that can be differentiated twice."""
    mode.rewrote = True
    if not mode.measures:
        with sdpa_kernel(SDPBackend.MATH):
            return func(*args, **kwargs)
    found = func(*args, **kwargs)
    if _drops(func, args, kwargs):
        return found  # drawn a second time it would be another, and the run would draw others from then on
    with sdpa_kernel(SDPBackend.MATH):
        again = func(*args, **kwargs)
    if isinstance(found, tuple):  # with the weights, which it may have been asked not to return
        return (_apply(_Gate, found[0], again[0], mode.switch), *found[1:])
    result: Tensor = _apply(_Gate, found, again, mode.switch)
    return result


def _drops(func: _Function, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Return whether a call of attention draws random numbers."""
    if func is F.scaled_dot_product_attention:
        given = _arguments(("query", "key", "value", "attn_mask", "dropout_p"), args, kwargs, dropout_p=0.0)
        return bool(given["dropout_p"])
    given = _arguments(_MULTI_HEAD, args, kwargs, training=True)
    return bool(given["training"] and given["dropout_p"])


def _linear_cross_entropy(mode: Behind, func: _Function, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Let the head that a call takes the weight of make its outputs; made in chunks, they hide their curvature."""
    options = kwargs.get("options")
    if options is None:
        return func(*args, **kwargs)
    mode.rewrote = True
    written_out = func(*args, **{**kwargs, "options": None})
    if not mode.measures:
        return written_out
    # Its gradients are asked for, and passed over, whenever curvature is taken; without this that could be once.
    lasting = dataclasses.replace(options, allow_retain_graph=True)
    result: Tensor = _apply(_Gate, func(*args, **{**kwargs, "options": lasting}), written_out, mode.switch)
    return result


def _apply(function: Any, *args: Any) -> Any:
    """Apply an autograd function, which PyTorch has no types for."""
    return function.apply(*args)


_Function: TypeAlias = Callable[..., Any]
_BATCH_NORM = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_TORCH_BATCH_NORM = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps")
_INSTANCE_NORM = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
# Of multi_head_attention_forward, as far as is needed.
_MULTI_HEAD = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
    *("add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training"),
)
# What to do with which function.
FORMS: dict[_Function, Callable[[Behind, _Function, Sequence[Any], dict[str, Any]], Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.instance_norm: _instance_norm,
    F.batch_norm: _batch_norm,
    torch.batch_norm: _batch_norm,
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _attention,
}
if hasattr(F, "linear_cross_entropy"):  # since PyTorch 2.13
    FORMS[F.linear_cross_entropy] = _linear_cross_entropy


def _arguments(names: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any], **defaults: Any) -> dict[str, Any]:
    """Return arguments by name, ``None`` where there is neither a value nor a default."""
    return dict.fromkeys(names) | defaults | dict(zip(names, args, strict=False)) | kwargs


def _instead(
    mode: Behind,
    func: _Function,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    x: Tensor,
    formula: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return what a function computes, with the gradient of a formula for the same."""
    mode.rewrote = True
    with torch.set_grad_enabled(mode.measures):
        value: Tensor = func(*args, **kwargs)
    with full_precision(value):
        written_out = formula(x.to(compute_dtype(x))).to(value.dtype)
    if mode.measures:
        result: Tensor = _apply(_Gate, value, written_out, mode.switch)
        return result
    replaced: Tensor = _apply(_Instead, written_out, [value])
    return replaced


def _standardised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    centred = x - x.mean(dim=dims, keepdim=True)
    return centred * (centred.square().mean(dim=dims, keepdim=True) + eps).rsqrt()


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is not None:
        x = x * weight
    return x if bias is None else x + bias


def _for_channels(x: Tensor, *parameters: Tensor | None) -> Iterator[Tensor | None]:
    """Give parameters of channels the shape in which they meet (n, channels, ...)."""
    for parameter in parameters:
        yield None if parameter is None else parameter.reshape(-1, *[1] * (x.ndim - 2))
