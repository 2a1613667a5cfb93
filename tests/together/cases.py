"""The factors, which of their combinations can be, and which are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from tests.together.cover import Case, covering

ONE: Mapping[str, tuple[str, ...]] = {
    "strategy": ("single",),
    "precision": ("64", "32", "bf16-mixed", "16-mixed", "bf16-true"),
    "optimization": ("automatic", "manual"),
    "accumulation": ("1", "3"),
    "clipping": ("none", "norm", "value"),
    "form": ("named", "exact"),
    "option": (
        *("none", "every_n_steps", "warmup", "late", "relative"),
        *("constant_hessian", "unit_features", "trace", "temperature"),
    ),
    "layer": ("linear", "conv", "tokens", "lora", "peft", "weight_norm", "spectral_norm", "conv1d"),
    "place": ("last", "hidden"),
    "behind": ("tanh", "layer_norm", "batch_norm"),
    "compiled": ("nothing", "layer", "body", "module"),
    "checkpointed": ("nothing", "body", "layer", "behind"),
    "beside": ("nothing", "average", "swa", "resume", "stopping", "schedule", "rates"),
    "output": ("tensor", "dict", "extra"),
    "loss": ("cross_entropy", "mse", "custom"),
    "optimizer": ("sgd", "adam", "lbfgs"),
    "sizes": ("even", "uneven"),
    "monitor": ("nothing", "flatness", "report", "layers", "sharpest"),
    "capped": ("nothing", "frobenius", "spectral"),
}
TWO: Mapping[str, tuple[str, ...]] = {
    **ONE,
    "strategy": ("ddp", "fsdp", "fsdp-units"),
    "precision": ("64", "32", "bf16-mixed", "bf16-true"),
    "compiled": ("nothing", "layer", "body"),
}

# What Lightning, PyTorch or plain sense do not have, whatever this package does.
_IMPOSSIBLE: dict[str, Callable[[Case], bool]] = {
    "nothing lies behind a last layer": lambda c: (
        c["place"] == "last" and (c["behind"] != "tanh" or c["checkpointed"] == "behind")
    ),
    "rows of a convolution or of tokens meet": lambda c: c["layer"] in ("conv", "tokens") and c["place"] == "last",
    "a criterion has outputs of a last layer": lambda c: (
        c["form"] == "named" and (c["place"] == "hidden" or c["loss"] == "custom")
    ),
    "a temperature belongs to a named cross-entropy": lambda c: (
        c["option"] == "temperature" and (c["form"] != "named" or c["loss"] != "cross_entropy")
    ),
    "manual optimization returns nothing": lambda c: c["optimization"] == "manual" and c["output"] != "tensor",
    "Lightning schedules accumulation itself": lambda c: (
        c["beside"] == "schedule" and (c["accumulation"] != "1" or c["optimization"] == "manual")
    ),
    "scaled gradients are clipped by hand": lambda c: (
        c["precision"] == "16-mixed" and c["optimization"] == "manual" and c["clipping"] != "none"
    ),
    "LBFGS runs its closure several times": lambda c: (
        c["optimizer"] == "lbfgs"
        and (
            c["precision"] != "64" or c["accumulation"] != "1" or c["option"] == "relative" or c["beside"] == "schedule"
        )
    ),
    "SWA adds an epoch for batch normalisation": lambda c: c["beside"] == "swa" and c["behind"] == "batch_norm",
    "a checkpoint iterates spectral_norm once more": lambda c: (
        c["layer"] == "spectral_norm" and c["checkpointed"] == "layer"
    ),
    "PyTorch's compiler and checkpoints": lambda c: (
        (c["compiled"] == "module" and c["checkpointed"] != "nothing")
        or (c["compiled"] != "nothing" and c["compiled"] == c["checkpointed"])
    ),
    "rounding is all that half precision shows behind batch normalisation": lambda c: (
        c["behind"] == "batch_norm" and c["precision"].startswith("bf16")
    ),
    "averages need whole weights": lambda c: c["strategy"].startswith("fsdp") and c["beside"] in ("average", "swa"),
    "samples have parts where the loss has a closed form": lambda c: (
        c["monitor"] == "sharpest" and (c["place"] == "hidden" or c["loss"] == "custom" or c["compiled"] == "module")
    ),
    "a cap has one tensor to scale, a spectral one a matrix": lambda c: (
        c["capped"] != "nothing"
        and (
            c["layer"] in ("peft", "weight_norm", "spectral_norm") or (c["capped"], c["layer"]) == ("spectral", "conv")
        )
    ),
    "a line search reads each process's own loss": lambda c: c["strategy"] != "single" and c["optimizer"] == "lbfgs",
}

# What may be refused, in these words; else it is right.
_REFUSED: dict[str, Callable[[Case], bool]] = {
    r"cannot be differentiated twice, as compiled functions .* (name it: `loss=`|`stages` says where)": lambda c: (
        (c["form"] == "exact" and c["compiled"] == "module")
        or (c["monitor"] == "layers" and c["compiled"] != "nothing")
    ),
    r"Activation checkpointing lies between the layer and the loss.* Penalise a layer behind": lambda c: (
        c["checkpointed"] == "behind" and c["behind"] in ("layer_norm", "batch_norm")
    ),
    r"Expected argument `layer` to .* one tensor": lambda c: c["capped"] != "nothing" and c["layer"] == "lora",
    r"name an nn.Linear where a criterion of its outputs is asked for": lambda c: (
        c["monitor"] == "report" and c["layer"] == "conv"
    ),
}


def cover(factors: Mapping[str, tuple[str, ...]], ways: int, seed: int) -> Iterator[Case]:
    """Yield cases in which all levels of so many factors meet, and some that may be refused, by each level once.

    What is refused says nothing of the other settings, so that it counts as no meeting.
    """
    yield from covering(factors, ways, possible=_is_right, seed=seed, dear=["compiled"])
    yield from covering(factors, 1, possible=lambda case: possible(case) and bool(refusals(case)), seed=seed)


def _is_right(case: Case) -> bool:
    return possible(case) and not refusals(case)


def possible(case: Case) -> bool:
    """Return whether a case can be."""
    return not any(rule(case) for rule in _IMPOSSIBLE.values())


def refusals(case: Case) -> list[str]:
    """Return the words, as patterns, in which a case may be refused."""
    return [words for words, rule in _REFUSED.items() if rule(case)]


def described(case: Case) -> str:
    """Return a case in a line."""
    return " ".join(f"{name}={level}" for name, level in case.items())


def parsed(line: str) -> Case:
    """Return the case of such a line."""
    return dict(item.split("=", 1) for item in line.split())
