"""Find the feature layer of a model and record what enters and leaves it. Needs torch alone.

A tap changes nothing in the model it listens to and leaves nothing behind: no attribute, no entry in a state dict, and
after :meth:`LayerTap.close` no hook. Several taps on one layer share one hook and one copy of the weight.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat._around import WITHIN, depends_beside, refuse_gradients, refuse_transform
from lightning_relflat._behind import Behind
from lightning_relflat._calls import CriterionCalls
from lightning_relflat._head_calls import leave, listen
from lightning_relflat._layer_hook import LayerHook, LayerRecord
from lightning_relflat._sharded import holding, sharded_groups
from lightning_relflat._shown import show_call
from lightning_relflat.curvature import Trying, exact_parts, plainly_exact
from lightning_relflat.functional._checks import ordinary, sum_of
from lightning_relflat.functional._graph import reaches
from lightning_relflat.functional._linear_map import as_use
from lightning_relflat.functional._meeting import Looker
from lightning_relflat.functional._probes import Measure
from lightning_relflat.functional.layer_flatness import flatness_of_layers
from lightning_relflat.linear_layers import candidates

__all__ = ["LayerRecord", "LayerTap", "did_not_run"]


class LayerTap:
    """Listens to a layer of a model while it is recording; as a context manager, from beginning to end.

    Args:
        module: the model.
        layer: the dotted name of a linear or convolution layer in it, or ``None`` for the last linear one that runs
            while the tap records for the first time. Linear is an ``nn.Linear``; a layer around one that is called
            ``base_layer``, as LoRA's, as a whole, with the weight W + BA; and what has a matrix ``weight`` and turns
            out to compute x Wᵀ + b, as Hugging Face's ``Conv1D`` or PyTorch Geometric's ``Linear``. A call of
            ``torch.nn.functional.linear_cross_entropy`` with a layer's weight counts as if the layer ran.
        copies: whether records are detached copies, fit to be read at any later time, or the tensors in their graph;
            then only passes with gradients are recorded.
        through_loss: whether κ is to be taken from the loss. Then, while the tap records, normalisations behind the
            layer are written out, because PyTorch's own derivatives of them are wrong in the third order, and fused
            attention is replaced by the kernel that can be differentiated twice: a function mode of PyTorch, entered
            in ``start`` and left in ``stop``. It is left out after 8 measured steps in a row in which it found nothing
            to do, until the next :meth:`look_again`.
        stays: whether the layer's weight is neither changed nor freed between its pass and the backward pass, so that
            no copy of it is needed.
        measures: whether κ is only looked at and not trained with. Then what is written out leaves the loss and its
            gradients as they are, bit for bit.
        behind: such a mode, to be shared by several taps, which somebody else enters.

    Attributes:
        recording: whether the tap listens. Set it to pause.
        missed: whether the layer ran without gradients since records were handed out, of which nothing is kept.
        transformed: whether it ran within a transform of ``torch.func`` since it was looked anew, of which neither is.
        opens: whether the graph begins at the layer, where gradients are switched on; for a step without any.
        calls: what is told of the outputs that a step goes on with, to follow them to a criterion.
        exact: whether the κ last taken is exact, because its loss was recognised.

    Raises:
        ValueError: if there is no such layer in the model. The message lists those that there are.

    Examples:
        In a plain training loop, or one with Fabric, three lines add the penalty λ·κ to any loss:

        >>> import torch
        >>> from lightning_relflat.layer_tap import LayerTap
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> with LayerTap(net, "2") as tap:
        ...     loss = net(torch.ones(5, 4)).square().mean()
        ...     (loss + 0.1 * tap.relative_flatness(loss)).backward()

        What went through the last linear layer:

        >>> tap = LayerTap(net)
        >>> tap.start()
        >>> outputs = net(torch.ones(5, 4))
        >>> [record] = tap.take()
        >>> tap.name, record.features.shape, torch.equal(record.outputs, outputs)
        ('2', torch.Size([5, 3]), True)
        >>> tap.close()
    """

    def __init__(
        self,
        module: nn.Module,
        layer: str | None = None,
        *,
        copies: bool = False,
        stays: bool = False,
        through_loss: bool = True,
        measures: bool = False,
        behind: Behind | None = None,
    ) -> None:
        self._module = weakref.ref(module)
        self._asked = layer
        self._candidates = candidates(module, layer)
        self._settled = layer is not None  # else by a loss
        self.copies = copies
        self.stays = stays
        self.through_loss = through_loss
        self.measures = measures
        self.opens = False
        self.calls: CriterionCalls | None = None
        self.recording = False
        self.missed = False
        self.exact = False
        self._own_behind = Behind(measures=measures) if behind is None and through_loss and not copies else None
        self.behind = behind or self._own_behind
        self._mode = ExitStack()
        self._records: list[LayerRecord] = []
        self._originals: list[Tensor] = []  # what the step went on with, while calls are followed
        self._unseen: list[tuple[nn.Module, Tensor]] = []  # layers and outputs of passes that could not be recorded
        self._seen: list[Tensor] = []  # outputs that were handed out since
        self.transformed = False
        self._hooks: list[LayerHook] = []
        self._looker = Looker()
        self.look_again()
        self._follows = False

    def __repr__(self) -> str:
        return show_call(self, module=self._module(), layer=self.name, behind=None)

    @property
    def name(self) -> str | None:
        """The layer's dotted name; ``None`` as long as it is not known which layer runs last."""
        return next(iter(self._candidates)) if len(self._candidates) == 1 else None

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """The layers that it listens to: one, once it is known which."""
        return self._candidates

    @property
    def layer(self) -> nn.Module | None:
        """The layer, once it is known."""
        return next(iter(self._candidates.values())) if len(self._candidates) == 1 else None

    @property
    def flat(self) -> bool:
        """Whether the loss last measured is piecewise linear in the outputs, so that its κ is 0 whatever they are."""
        return self._looker.last is not None and self._looker.last.flat

    @property
    def looks(self) -> bool:
        """Whether there may be anything to write out behind the layer."""
        return self._own_behind is None or self._idle < _LOOKS or self.opens

    @property
    def pending(self) -> bool:
        """Whether there are records that have not been handed out."""
        return bool(self._records)

    def attach(self) -> None:
        """Put the hooks on, without recording: what is compiled now has them when there is something to record."""
        self.stop()
        if self._follows:
            self._follow()
        self._hooks = self._own_hooks()
        for hook in self._hooks:
            hook.join(self)

    def start(self) -> None:
        """Put the hooks on, forget what was recorded and begin to record."""
        self.attach()
        self.recording = True
        listen(self)
        if self._own_behind is not None and self.looks and not self.copies:
            self._mode.enter_context(self._own_behind)

    def stop(self) -> None:
        """Stop recording, forget what was recorded and take the hooks away."""
        self._records, self._originals = [], []
        self.recording = self.missed = False
        leave(self)
        for hook in self._hooks:
            hook.drop(self)
        self._hooks = []
        self._mode.close()
        self._end_step()

    def look_again(self) -> None:
        """Look anew, with the next step, for what there is to write out or is changed in place, and how rows meet.

        And for the layer: its name may belong to another module by then, as where a head is exchanged for one with more
        classes. A name that was given has to be there still; of one that was found and is gone another takes the place.
        """
        self._follows = True  # not yet: who is told first that an epoch begins may be told before what is exchanged
        for hook in self._own_hooks():
            hook.forget()
        self._sharded: list[Any] | None = None
        self._idle = 0  # how many measured steps in a row have had nothing to write out
        self._measured = False  # whether κ was taken in the step
        self._trying = Trying()
        self._looker.look_again()
        self.transformed = False

    def staying_whole(self) -> AbstractContextManager[None]:
        """Return a context in which fully sharded weights stay whole after a backward pass; see ``_sharded``."""
        if self._sharded is None:
            self._sharded = sharded_groups(self._module())
        return holding(self._sharded, "reshard_after_backward", False) if self._sharded else nullcontext()

    def has_measured(self) -> None:
        """Take notice that κ was taken of a loss of the step, here or elsewhere."""
        self._measured = True

    def _end_step(self) -> None:
        """Count the steps in which nothing was written out, so that in the end it is no longer looked for."""
        if self._own_behind is not None:
            if self._measured:
                self._idle = 0 if self._own_behind.rewrote else self._idle + 1
            self._own_behind.forget()
        self._measured = False
        self._unseen, self._seen = [], []

    def take(self, loss: Tensor | None = None) -> list[LayerRecord]:
        """Hand out what was recorded since the last time, in order, and forget it.

        If the layer was left open, it is settled now: the last one that ran, of those that a loss depends on.

        Args:
            loss: the loss. If it depends on none of the layers that were left open, nothing is handed out and none is
                forgotten.

        Returns:
            The records; none if no layer ran.

        Raises:
            RuntimeError: if features or outputs of a record were changed in place since, or the loss depends on the
                layer by another way than its outputs too; without ``loss`` also if there are none because the layer ran
                without gradients.
        """
        records, self._records = self._records, []
        missed, self.missed = self.missed, False
        if loss is not None:
            self._refuse_other_ways(loss, records)
        if not records:
            if missed and loss is None:
                raise RuntimeError(f"There is nothing to hand out, because {_ran_without_gradients(self)}")
            return []
        if not self._settled:
            last = next((record for record in reversed(records) if loss is None or record.is_in(loss)), None)
            if last is not None:
                self._settle(last.layer)
            elif len(self._candidates) > 1:
                self._records = records
                return []
        records = [record for record in records if record.layer is self.layer]
        for record in records:
            # What is done with passes of another loss, or of none, is no matter.
            if record.is_written and (loss is None or record.is_in(loss)):
                record.check_unwritten(self.name or "")
            if record.handed is not None and record.call is None:
                LayerHook.of(record.layer).note(record)
        return records

    def _refuse_other_ways(self, loss: Tensor, records: Sequence[LayerRecord]) -> None:
        """Raise if a loss depends on a layer by another way than its outputs."""
        unmarked = [hook.layer() for hook in self._hooks if hook.gradients.unmarked]
        if self._unseen or unmarked:
            self._seen += [record.outputs for record in records]
        for hook in reversed(self._hooks):
            frozen = hook.gradients.constant and any(
                record.layer is hook.layer() and not record.weight.requires_grad for record in records
            )
            if frozen or hook.gradients.are_in(loss):
                raise refuse_gradients(self._name_of(hook.layer()))
        for layer in unmarked:
            if layer is not None and depends_beside(loss, layer, [], self._seen):
                raise refuse_gradients(self._name_of(layer))
        # A weight that was moved by gradients of an earlier pass, as MAML does it, is not the one that is learned.
        if len(records) > 1 and reaches([r.weight for r in records], [r.outputs for r in records]):
            for record in records:
                earlier = [other.outputs for other in records if other.layer is record.layer]
                if reaches([record.weight], earlier) and record.is_in(loss):
                    raise refuse_gradients(self._name_of(record.layer))
        for layer in dict.fromkeys(layer for layer, _ in reversed(self._unseen)):
            unseen = [outputs for other, outputs in self._unseen if other is layer and outputs.requires_grad]
            if unseen and depends_beside(loss, layer, unseen, self._seen):
                raise refuse_transform(self._name_of(layer))

    def _name_of(self, layer: nn.Module | None) -> str:
        return next(name for name, candidate in self._candidates.items() if candidate is layer)

    def peek(self) -> list[LayerRecord]:
        """Return what was recorded since the last time, in order, without forgetting it."""
        return list(self._records)

    def went_on_with(self, outputs: Tensor) -> bool:
        """Return whether some outputs left this layer, while calls are followed.

        Args:
            outputs: what a step went on with.

        Returns:
            Whether they did.
        """
        return any(tensor is outputs for tensor in self._originals)

    def take_those(self, outputs: Sequence[Tensor]) -> list[LayerRecord]:
        """Hand out the passes of some outputs, and forget all; a layer that was left open is settled by the last.

        Args:
            outputs: what the step went on with.

        Returns:
            The records; none if they left another layer, and then nothing is forgotten.
        """
        found = [
            record
            for record, original in zip(self._records, self._originals, strict=True)
            if any(tensor is original for tensor in outputs)
        ]
        if found:
            self._records, self._originals = [], []
            if not self._settled:
                self._settle(found[-1].layer)
        return [record for record in found if record.layer is self.layer]

    def relative_flatness(
        self,
        loss: Tensor,
        *,
        probes: int | None = 1,
        generator: torch.Generator | None = None,
        through_hessian: bool = True,
    ) -> Tensor:
        """Return κ of the layer in a loss, differentiable, from the passes recorded since the last time.

        Args:
            loss: the scalar loss, before its backward pass.
            probes: as for :func:`~lightning_relflat.functional.layer_flatness`.
            generator: as for :func:`~lightning_relflat.functional.layer_flatness`.
            through_hessian: as for :func:`~lightning_relflat.functional.layer_flatness`.

        Returns:
            κ, a scalar. Where batch normalisation in training mode lies behind the layer, its gradient has been taken
            already, and cannot be differentiated once more.

        Raises:
            RuntimeError: if the layer did not run with gradients, or its outputs were changed in place since.
            ValueError: if the loss does not depend on the layer.
        """
        missed = self.missed
        records = self.take(loss)
        if not records and not self.pending:
            if missed:
                raise RuntimeError(f"There is no flatness to compute, because {_ran_without_gradients(self)}")
            raise RuntimeError(
                f"There is no flatness to compute, because {did_not_run(self)} with gradients since flatness was last "
                "taken, which forgets all passes. Of several losses, take that of their sum."
            )
        kappa = self.flatness_of(loss, records, probes=probes, generator=generator, through_hessian=through_hessian)
        if kappa is None:
            raise ValueError(f"Expected argument `loss` to depend on layer {self.name!r}, but got one that does not.")
        self._end_step()  # a tap that listens to a whole loop begins anew with the next pass
        return kappa

    def flatness_of(
        self,
        loss: Tensor,
        records: Sequence[LayerRecord],
        *,
        probes: int | None = 1,
        generator: torch.Generator | Callable[[], torch.Generator] | None = None,
        through_hessian: bool = True,
        measure: Measure = "relative_flatness",
        normalize_features: bool = False,
        shared_probes: int | None = None,
    ) -> Tensor | None:
        """Return κ of the layer in a loss, over all those of some passes on which the loss depends.

        It is exact, without probes, where the loss is recognised as that of a criterion with a closed form.

        Args:
            loss: the scalar loss.
            records: the records, not copies, of the present step.
            probes: as for :func:`~lightning_relflat.functional.layer_flatness`.
            generator: as for :func:`~lightning_relflat.functional.layer_flatness`, or what makes it where it is needed.
            through_hessian: as for :func:`~lightning_relflat.functional.layer_flatness`.
            measure: ``"relative_flatness"`` for κ, or ``"trace"`` for the layer-wise trace in its place.
            normalize_features: whether every row counts as if it had the length 1.
            shared_probes: how many random probes, shared by all rows, stand for the exact κ of a cross-entropy; drawn
                by ``generator``.

        Returns:
            κ, a scalar, or ``None`` if the loss depends on none of them.

        Raises:
            ValueError: as :func:`~lightning_relflat.functional.layer_flatness` does.
            RuntimeError: as :func:`~lightning_relflat.functional.layer_flatness` does.
        """
        if not records:
            return None
        options: Any = {"measure": measure, "normalize_features": normalize_features}
        if shared_probes is None:
            plain = self.plain_flatness_of(loss, records, through_hessian=through_hessian, **options)
            if plain is not None:
                return plain
        module = self._module()
        with _within_fabric(), ordinary(), self.staying_whole():
            mine = [record for record in records if record.is_in(loss)]
            recognised = self._trying.recognise(loss, mine)
            self.exact = recognised is not None
            if shared_probes is not None and (recognised is None or recognised.kind != "softmax"):
                raise RuntimeError(
                    "Expected the loss to be a cross-entropy of the layer's outputs where random probes are shared by "
                    "its rows, but got one that is not recognised as such. Leave out `shared_probes`, or name the loss."
                )
            self.has_measured()
            if recognised is not None:
                exact = exact_parts(
                    recognised,
                    mine,
                    through_hessian=through_hessian,
                    probes=shared_probes,
                    generator=generator() if shared_probes is not None and callable(generator) else None,
                    **options,
                )
                return sum_of([part.sum() for part in exact])
            behind = self.behind
            with nullcontext() if behind is None else behind.curvature():
                enter = behind.enter if behind is not None and behind.gated else _as_it_is
                uses = [
                    as_use(record.layer, enter(record.features), record.outputs, enter(record.weight))
                    for record in records
                ]
                [parts] = flatness_of_layers(
                    loss,
                    [uses],
                    lookers=[self._looker],
                    mode=(module is not None and module.training, records[0].layer.training),
                    probes=probes,
                    generator=generator() if callable(generator) else generator,
                    through_hessian=through_hessian,
                    **options,
                )
                sums = [part.sum() / (probes or 1) for part in parts if part is not None]
                if not sums:
                    return None
                kappa = sum_of(sums)
                return kappa if behind is None else behind.deposit(kappa)

    def plain_flatness_of(self, loss: Tensor, records: Sequence[LayerRecord], **options: Any) -> Tensor | None:
        """Return what :meth:`flatness_of` does, where the loss is PyTorch's own cross-entropy and nothing else.

        Args:
            loss: as there.
            records: as there.
            options: as there.

        Returns:
            κ, exact; ``None`` if the loss is another.
        """
        with ordinary():
            found = plainly_exact(loss, records, **options)
        if found is not None:
            self.exact = True
            self.has_measured()
        return found

    def __enter__(self) -> LayerTap:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop recording. May be called again."""
        self.stop()

    def receive(self, record: LayerRecord) -> None:
        """Take in what a hook recorded.

        Args:
            record: the record.
        """
        if self.calls is not None and not torch.compiler.is_compiling():
            self._originals.append(record.outputs if record.handed is None else record.handed)
            self.calls.track(self._originals[-1], whole=record.call is not None)
        self._records.append(record.copied() if self.copies else record)

    def overlook(self, layer: nn.Module, outputs: Tensor) -> None:
        """Take notice of a pass that cannot be recorded, within a transform of ``torch.func``.

        Args:
            layer: the layer.
            outputs: what left it, outside of the transform.
        """
        self.transformed = True
        self._unseen.append((layer, outputs))

    def _own_hooks(self) -> list[LayerHook]:
        return [LayerHook.of(candidate) for candidate in self._candidates.values()]

    def _follow(self) -> None:
        """Take the modules that have the names now."""
        module, name = self._module(), self.name if self._settled else None
        self._follows = False
        if module is not None:
            found = candidates(module, self._asked)
            self._settled = name in found
            self._candidates = {name: found[name]} if name is not None and name in found else found

    @property
    def exchanged(self) -> bool:
        """Whether another module has the layer's name by now, or none."""
        module = self._module()
        if module is None or self.name is None:
            return False
        try:
            return candidates(module, self._asked).get(self.name) is not self.layer
        except ValueError:
            return True

    def _settle(self, layer: nn.Module) -> None:
        self._settled = True
        self._candidates = {name: candidate for name, candidate in self._candidates.items() if candidate is layer}
        for hook in self._hooks:
            if hook.layer() is not layer:
                hook.drop(self)
        self._hooks = [hook for hook in self._hooks if hook.layer() is layer]
        if self._own_behind is not None:
            self._own_behind.settle(layer)


# A step may have one of several losses, as where batches of several tasks take turns, and one of them alone may go
# through what is to be written out. To look for it costs each call of PyTorch in the step some microseconds.
_LOOKS = 8


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _within_fabric() -> Iterator[None]:
    """Let Lightning Fabric, where it is in use, pass a backward pass that is not its own.

    With mixed precision it raises unless ``fabric.backward`` is called, so that nobody forgets to scale the loss. Here
    nothing is scaled, and the penalty goes through ``fabric.backward`` with the loss.
    """
    modules = [sys.modules.get(f"{package}.wrappers") for package in ("lightning.fabric", "lightning_fabric")]
    fabrics: list[Any] = [module for module in modules if hasattr(module, "_in_fabric_backward")]
    with holding(fabrics, "_in_fabric_backward", True):
        yield


def _ran_without_gradients(tap: LayerTap) -> str:
    """Say why a tap holds nothing, and what to do."""
    which = "the last nn.Linear" if tap.name is None else f"layer {tap.name!r}"
    return (
        f"{which} ran under `torch.no_grad()` or `torch.inference_mode()`, where a tap keeps nothing. Run the model "
        "with gradients; or make a `LayerTap(…, copies=True)` and give what it records to `RelativeFlatness`."
    )


def did_not_run(tap: LayerTap) -> str:
    """Say which layer did not run.

    Args:
        tap: the tap that recorded nothing.

    Returns:
        The beginning of a message.
    """
    if tap.exchanged:
        return (
            f"layer {tap.name!r} has been exchanged for another, which is followed after `look_again`, and did not run"
        )
    if tap.transformed:
        return (
            f"{'each linear layer' if tap.name is None else f'layer {tap.name!r}'} {WITHIN}, and did not run elsewhere"
        )
    return "no nn.Linear ran" if tap.name is None else f"layer {tap.name!r} did not run"
