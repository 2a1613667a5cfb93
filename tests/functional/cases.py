"""Random problems for the closed forms: every criterion with its options, in every layout that PyTorch takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.oracles import criterion_loss, criterion_shares

LOSSES = ("cross_entropy", "binary_cross_entropy", "mse", "huber", "smooth_l1", "poisson_nll", "gaussian_nll")
LAYOUTS = ("rows", "tokens", "channels", "images", "unbatched")

# Whether this PyTorch says of a saved tensor that somebody has a hook on it.
HOOKS_ARE_KNOWN = hasattr(torch.ones(1, requires_grad=True).exp().grad_fn._raw_saved_result, "unpack_hook")  # type: ignore[union-attr]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Return numbers from 0.1 to 2.1."""
    return 0.1 + 2 * torch.rand(shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Case:
    """A linear layer with a criterion on it."""

    criterion: nn.Module
    features: Tensor
    weight: Tensor
    bias: Tensor
    target: Any
    class_dim: int
    given_class_dim: int | None = None
    needs_target: bool = True

    @property
    def given_target(self) -> Any:
        return self.target if self.needs_target else None

    def outputs(self, weight: Tensor | None = None) -> Tensor:
        weight = self.weight if weight is None else weight
        return (self.features @ weight.T + self.bias).movedim(-1, self.class_dim)

    def loss(self, weight: Tensor, reduction: str) -> Tensor:
        return criterion_loss(
            self.criterion, self.outputs(weight), self.target, class_dim=self.class_dim, reduction=reduction
        )

    def shares(self, weight: Tensor) -> Tensor:
        return criterion_shares(self.criterion, self.outputs(weight), self.target, class_dim=self.class_dim)


@st.composite
def cases(draw: st.DrawFn, loss: str) -> Case:
    """Draw a problem for a loss."""
    generator = seeded(draw(st.integers(0, 2**32 - 1), label="seed"))
    layout = draw(st.sampled_from(LAYOUTS))
    d, m = draw(st.integers(1, 4), label="d"), draw(st.integers(1, 4), label="m")
    dims = {"rows": 1, "tokens": 2, "channels": 2, "images": 3, "unbatched": 0}[layout]
    samples = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    class_dim = 1 if layout in ("channels", "images") else -1
    scale = draw(st.sampled_from([0.5, 2.0]))
    features, weight, bias = normal(generator, *samples, m), scale * normal(generator, d, m), normal(generator, d)
    shape = tuple(torch.empty(*samples, d).movedim(-1, class_dim).shape)
    reduction = draw(st.sampled_from(["mean", "sum", "none"]))
    squeezed = d == 1 and loss != "cross_entropy" and draw(st.booleans(), label="squeezed")
    target_shape = samples if squeezed else shape
    # A vector of one number for every output, as it broadcasts against the outputs.
    vector = (d, *(1 for _ in samples[1:])) if class_dim == 1 else (d,)
    needs_target = draw(st.booleans(), label="needs_target")
    target: Any = normal(generator, *target_shape)
    criterion: nn.Module

    if loss == "cross_entropy":
        class_weight = uniform(generator, d) if draw(st.booleans(), label="class weights") else None
        smoothing = draw(st.sampled_from([0.0, 0.1, 0.5]))
        if draw(st.booleans(), label="probabilities"):
            needs_target = True
            target = uniform(generator, *shape)
            target = target / target.sum(dim=class_dim, keepdim=True)
            criterion = nn.CrossEntropyLoss(class_weight, reduction=reduction, label_smoothing=smoothing)
        else:
            ignored = draw(st.sampled_from([-100, 7, 0] if d > 1 else [-100, 7]), label="ignore_index")
            indices = torch.randint(d, samples, generator=generator)
            drop = torch.rand(samples, generator=generator) < 0.3
            target = indices.masked_fill(drop, ignored)
            target.view(-1)[0] = d - 1  # at least one stays
            needs_target = needs_target or class_weight is not None or bool((target == ignored).any())
            criterion = nn.CrossEntropyLoss(
                class_weight, ignore_index=ignored, reduction=reduction, label_smoothing=smoothing
            )
    elif loss == "binary_cross_entropy":
        shapes = [vector, (1,)] if squeezed else [vector, shape, (1,)]
        if squeezed and class_dim == 1:
            shapes = [(1,)]
        if squeezed and not samples:  # PyTorch takes no vector beside a number
            shapes = []
        options = [None, *shapes]
        weights = [draw(st.sampled_from(options)) for _ in range(2)]
        rescale, positive = (None if size is None else uniform(generator, *size) for size in weights)
        needs_target = needs_target or positive is not None
        target = torch.rand(target_shape, generator=generator, dtype=torch.float64)
        criterion = nn.BCEWithLogitsLoss(rescale, reduction=reduction, pos_weight=positive)
    elif loss == "mse":
        criterion = nn.MSELoss(reduction=reduction)
    elif loss == "huber":
        needs_target = True
        criterion = nn.HuberLoss(reduction=reduction, delta=draw(st.sampled_from([0.3, 1.0, 2.5])))
    elif loss == "smooth_l1":
        needs_target = True
        criterion = nn.SmoothL1Loss(reduction=reduction, beta=draw(st.sampled_from([0.0, 0.5, 1.0, 2.0])))
    elif loss == "poisson_nll":
        log_input, full = draw(st.booleans(), label="log_input"), draw(st.booleans(), label="full")
        target = torch.randint(5, target_shape, generator=generator).double()
        eps = draw(st.sampled_from([1e-8, 0.5]))
        if not log_input:  # the outputs are rates
            needs_target = True
            features, weight, bias = features.abs(), weight.abs(), bias.abs() + 0.5
        criterion = nn.PoissonNLLLoss(log_input=log_input, full=full, eps=eps, reduction=reduction)
    else:
        needs_target = True
        if squeezed and class_dim == 1:
            target, squeezed = normal(generator, *shape), False
        variances = [shape, shape[:-1], (*shape[:-1], 1)]
        variance = uniform(generator, *(target_shape if squeezed else draw(st.sampled_from(variances))))
        eps = draw(st.sampled_from([1e-6, 0.8]))
        target = (target, variance)
        criterion = nn.GaussianNLLLoss(full=draw(st.booleans()), eps=eps, reduction=reduction)

    ambiguous = dims > 1 and set(samples[1:]) == {d}
    given = None if not ambiguous and draw(st.booleans(), label="leave class_dim out") else class_dim % len(shape)
    return Case(criterion, features, weight, bias, target, class_dim, given, needs_target)


def softmax_problem(kind: str, *, n: int = 300, d: int = 10, m: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    generator = seeded(1)
    if kind == "gaussian":
        features = normal(generator, n, m)
    elif kind == "decaying":
        features = normal(generator, n, m) / torch.arange(1, m + 1)
    else:
        features = (
            normal(generator, n, 20) @ normal(generator, 20, m) / 20**0.5 + 0.3 * normal(generator, n, m)
        ).relu()
    weight = normal(generator, d, m) * (1 if kind == "undecided" else 3) / features.norm(dim=1).mean()
    if kind == "undecided":
        weight = weight * 0.1
    return features, weight, features @ weight.T


COLLAPSE = {"nc1", "nc2_equinorm", "nc2_equiangular", "nc3", "cdnv", "nc4_mismatch"}


def clustered(
    samples: int, width: int, classes: int, seed: int = 0, *, spread: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (samples,), generator=generator)
    means = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    features = means[target] + spread * torch.randn(samples, width, generator=generator, dtype=torch.float64)
    return features, target, weight, features @ weight.T


def floats(values: dict[str, Tensor]) -> dict[str, float]:
    assert all(value.shape == () and value.dtype == torch.float64 for value in values.values())
    return {name: value.item() for name, value in values.items()}
