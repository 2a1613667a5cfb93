"""Every public function, and every metric's update, as a call with its inputs on a device; some in several forms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_relflat import functional as f
from lightning_relflat import metrics
from lightning_relflat.functional.layer_flatness import layer_use

N, M, D = 12, 5, 3
COUNT = M * M + M + D * M + D  # of parameters


class Problem:
    """A layer with its features, outputs and targets, all on a device."""

    def __init__(self, device: torch.device | None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.device = device
        self.net = nn.Sequential(nn.Linear(M, M, device=device), nn.Tanh(), nn.Linear(M, D, device=device))
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.inputs = torch.randn(N, M, generator=generator).to(device)
        self.target = (torch.arange(N) % D).to(device)
        self.ignoring = self.target.where(self.target > 0, -100)
        self.soft = torch.rand(N, D, generator=generator).softmax(dim=1).to(device)
        self.class_weight = torch.tensor([1.0, 2.0, 0.5]).to(device)
        self.layer: Any = self.net[2]
        self.weight: Any = self.layer.weight
        self.features: Tensor = self.net[:2](self.inputs)
        self.outputs: Tensor = self.layer(self.features)

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features, weight, outputs and target."""
        return self.features, self.weight, self.outputs, self.target

    @property
    def loss(self) -> Tensor:
        """A loss that is not recognised."""
        return (self.outputs.logsumexp(dim=1) - self.outputs.gather(1, self.target[:, None])[:, 0]).mean()

    def losses(self, outputs: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target, reduction="none")

    def of_features(self, features: Tensor) -> Tensor:
        outputs: Tensor = self.layer(features)
        return F.cross_entropy(outputs, self.target, reduction="none")

    def through(self, metric: Any, *args: Any, **kwargs: Any) -> Call:
        """Return an update that is not a metric's first: in that one it may look at what it gets."""
        metric = metric.to(self.device)
        metric.update(*args, **kwargs)

        def update() -> list[Tensor]:
            metric.update(*args, **kwargs)
            states = [getattr(metric, name) for name in metric._defaults]
            return [state for state in states if isinstance(state, Tensor)]

        return update


Call = Callable[[], Any]
CE = "cross_entropy"


def named(name: str, *, loss: Any = CE, target: str = "target", **options: Any) -> Callable[[Problem], Call]:
    """Return the call of a function of features, weight, outputs, target and a named loss."""
    return lambda p: lambda: getattr(f, name)(*p.given[:3], getattr(p, target), loss=loss, **options)


def metric(name: str, *args: Any, **options: Any) -> Callable[[Problem], Call]:
    """Return the call of the update of a metric of features, weight, outputs and target."""
    return lambda p: p.through(getattr(metrics, name)(*args, **options), *p.given)


def backward(call: Callable[[Problem], Call]) -> Callable[[Problem], Call]:
    """Return a call, and the gradients of what it returns."""

    def build(p: Problem) -> Call:
        return lambda: torch.autograd.grad(call(p)(), list(p.net.parameters()), retain_graph=True, allow_unused=True)

    return build


SIZES: Any = {"in_features": M, "out_features": D}
# Without a backward pass.
FORWARD: dict[str, Callable[[Problem], Call]] = {
    "relative_flatness": named("relative_flatness"),
    "relative_flatness, soft targets": named("relative_flatness", target="soft"),
    "relative_flatness, ignored": named("relative_flatness", target="ignoring"),
    "relative_flatness, class weights": lambda p: named(
        "relative_flatness", loss=nn.CrossEntropyLoss(p.class_weight, label_smoothing=0.1)
    )(p),
    "relative_flatness, trace": named("relative_flatness", measure="trace", temperature=2.0, normalize_features=True),
    "relative_flatness, shared probes": lambda p: named(
        "relative_flatness", probes=2, generator=torch.Generator(p.device or "cpu").manual_seed(0)
    )(p),
    "relative_flatness, none": named("relative_flatness", reduction="none"),
    **{
        f"relative_flatness, {loss}": named("relative_flatness", loss=loss, target="soft")
        for loss in ("mse", "huber", "smooth_l1", "binary_cross_entropy", "poisson_nll")
    },
    "relative_flatness, gaussian_nll": lambda p: (
        lambda: f.relative_flatness(*p.given[:3], (p.soft, p.soft.square()), loss="gaussian_nll")
    ),
    "relative_flatness_sums": named("relative_flatness_sums"),
    "relative_flatness_per_output": named("relative_flatness_per_output"),
    "output_hessian": lambda p: lambda: f.output_hessian(p.outputs, p.target, loss=CE).diagonal,
    "OutputHessian": lambda p: lambda: f.output_hessian(p.outputs, p.target, loss=CE).trace_through(p.weight),
    "layer_hessian": lambda p: lambda: f.layer_hessian(*p.given, loss=CE).scales,
    "LayerHessian": lambda p: lambda: f.layer_hessian(*p.given, loss=CE).product(p.weight.double()),
    "hessian_trace": named("hessian_trace"),
    "hessian_trace, neuron": named("hessian_trace", scale="neuron"),
    "hessian_trace_sums": named("hessian_trace_sums"),
    "column_flatness": named("column_flatness"),
    "column_flatness_sums": named("column_flatness_sums"),
    "standardized_relative_flatness": named("standardized_relative_flatness"),
    "flatness_report": named("flatness_report", num_classes=D, neuron_pairs=True),
    "flatness_report, eigenvalues": named("flatness_report", eigenvalues=True),
    "flatness_report, collapse": named("flatness_report", num_classes=D, neural_collapse=True),
    "neural_collapse": lambda p: lambda: f.neural_collapse(p.features, p.target, p.weight, p.outputs, num_classes=D),
    "center_mismatches": lambda p: lambda: f.center_mismatches(p.features, p.outputs, p.weight.flip(0)),
    "expected_robustness": lambda p: lambda: f.expected_robustness(p.outputs.sum(), delta=0.1, num_features=M),
    "feature_robustness": lambda p: (
        lambda: f.feature_robustness(p.of_features, p.features, torch.ones_like(p.weight[:1]).expand(M, M), delta=0.1)
    ),
    "random_feature_robustness": lambda p: (
        lambda: tuple(f.random_feature_robustness(p.of_features, p.features, delta=0.1, draws=4))
    ),
    "RobustnessEstimate": lambda p: (
        lambda: f.random_feature_robustness(p.of_features, p.features, delta=0.1, draws=4).error
    ),
    "largest_eigenvalue": lambda p: lambda: f.largest_eigenvalue([p.given], loss=CE),
    "largest_eigenvalue_bounds": named("largest_eigenvalue_bounds"),
    "largest_eigenvalue_bounds, sketched": named("largest_eigenvalue_bounds", columns=4),
    "pac_bayes_flatness": lambda p: lambda: f.pac_bayes_flatness(p.net, [(p.inputs, p.target)], draws=2, steps=2),
    "layer_use": lambda p: lambda: layer_use(p.layer, p.features, p.outputs).features,
    "RelativeFlatness": metric("RelativeFlatness"),
    "HessianTrace": metric("HessianTrace", scale="layer"),
    "ColumnFlatness": metric("ColumnFlatness", in_features=M),
    "StandardizedRelativeFlatness": metric("StandardizedRelativeFlatness", in_features=M),
    "FlatnessReport": metric("FlatnessReport", **SIZES, num_classes=D, neuron_pairs=True, neural_collapse=True),
    "FlatnessReport, eigenvalues": metric("FlatnessReport", **SIZES, eigenvalues=True),
    "LargestEigenvalue": metric("LargestEigenvalue", **SIZES),
    "LargestEigenvalue, sketched": metric("LargestEigenvalue", **SIZES, columns=4),
    "NeuralCollapse": lambda p: p.through(metrics.NeuralCollapse(D, M), p.features, p.target, p.weight, p.outputs),
    "SharpestSamples": metric("SharpestSamples", 3),
    "SharpestSamples, numbered": lambda p: p.through(metrics.SharpestSamples(3), *p.given, indices=p.target),
    "FeatureRobustness": lambda p: p.through(metrics.FeatureRobustness(delta=0.1, draws=4), p.of_features, p.features),
    "PACBayesFlatness": lambda p: p.through(
        metrics.PACBayesFlatness(sigmas=[0.1, 0.2], draws=2), p.net, p.inputs, p.target
    ),
}
# With one.
BACKWARD: dict[str, Callable[[Problem], Call]] = {
    "gradient of relative_flatness": backward(named("relative_flatness")),
    "gradient of relative_flatness, shared probes": backward(FORWARD["relative_flatness, shared probes"]),
    "gradient of hessian_trace": backward(named("hessian_trace")),
    "feature_laplacian": lambda p: lambda: f.feature_laplacian(p.loss, p.features),
    "feature_laplacian, exact": lambda p: lambda: f.feature_laplacian(p.loss, p.features, probes=None),
    "layer_flatness": lambda p: lambda: f.layer_flatness(p.loss, p.layer, p.features, p.outputs),
    "layer_flatness, exact": lambda p: lambda: f.layer_flatness(p.loss, p.layer, p.features, p.outputs, probes=None),
    "fisher_rao_norm": lambda p: lambda: f.fisher_rao_norm(p.net, p.losses, [(p.inputs, p.target)]),
    "sam_sharpness": lambda p: lambda: f.sam_sharpness(p.net, p.losses, [(p.inputs, p.target)]),
    "RelativeFlatness, callable": metric("RelativeFlatness", lambda outputs, target: F.cross_entropy(outputs, target)),
    "LayersFlatness": lambda p: p.through(
        metrics.LayersFlatness(1), p.loss, [[layer_use(p.layer, p.features, p.outputs)]], N
    ),
    "FisherRaoNorm": lambda p: p.through(metrics.FisherRaoNorm(p.losses), p.net, p.inputs, p.target),
    "SAMSharpness": lambda p: p.through(
        metrics.SAMSharpness(p.losses, num_parameters=COUNT), p.net, p.inputs, p.target
    ),
    "SAMSharpness, second pass": lambda p: p.through(
        metrics.SAMSharpness(p.losses, num_parameters=COUNT, direction=torch.ones(COUNT)), p.net, p.inputs, p.target
    ),
}

# Those that ask the host for numbers, and why they have to.
_SPECTRUM = "an eigenvalue is iterated for until it is near enough, and LAPACK says whether it converged"
_EPOCH = "takes passes over data with sums on the host, and is no part of a step"
_ROWS = "how rows meet is looked for in each call; taps, callbacks and metrics look once"
_CLASSES = "classes without samples are left out, so that shapes depend on numbers; metrics do it at an epoch's end"
ASKS = {
    "flatness_report, eigenvalues": _SPECTRUM,
    "largest_eigenvalue": _SPECTRUM,
    "largest_eigenvalue_bounds": _SPECTRUM,
    "largest_eigenvalue_bounds, sketched": _SPECTRUM,
    "flatness_report, collapse": _CLASSES,
    "neural_collapse": _CLASSES,
    "pac_bayes_flatness": _EPOCH,
    "fisher_rao_norm": _EPOCH,
    "sam_sharpness": _EPOCH,
    "feature_laplacian": _ROWS,
    "feature_laplacian, exact": _ROWS,
    "layer_flatness": _ROWS,
    "layer_flatness, exact": _ROWS,
}
