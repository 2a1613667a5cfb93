"""Measures of a whole network that relative flatness is compared with: Fisher–Rao, PAC-Bayes flatness, SAM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_relflat.functional._checks import check_count, check_positive, compute_dtype, said
from lightning_relflat.functional._network import (
    IGNORED,
    Batches,
    LossOfEverySample,
    count_of,
    losses_of,
    noise_for,
    parameters_of,
    passes,
    right_of,
    some,
)


def fisher_rao_norm(
    module: nn.Module, loss: LossOfEverySample, batches: Batches, *, ignore_index: int | None = None
) -> Tensor:
    r"""Return the Fisher–Rao norm of all parameters θ of a network, with the Fisher information of the data.

    .. math::
        ‖θ‖_{fr}^2 = ⟨θ, I(θ) θ⟩ = \frac{1}{n} \sum_i ⟨θ, ∇_θ ℓ(f_θ(x_i), y_i)⟩^2,
        \qquad I(θ) = \frac{1}{n} \sum_i ∇_θ ℓ_i ∇_θ ℓ_i^⊤

    In a network of L linear layers without biases, whose activations are positively homogeneous, ⟨θ, ∇ℓ_i⟩ is
    L ⟨∂ℓ_i/∂f, f⟩. The code of the comparison below takes that closed form, with L = 6 for a network of 5 layers with
    biases; here the derivatives themselves are taken, twice through the network.

    Parameters, buffers and inputs in half precision are taken in float32, and without autocast: what is measured here
    is too small for the digits of half precision.

    Sources: Liang, Poggio, Rakhlin, Stokes, *Fisher-Rao Metric, Geometry, and Complexity of Neural Networks*, AISTATS
    2019 (arXiv 1711.01530), the definition with the sample's mean for the expectation. Compared with relative
    flatness in Petzka et al., NeurIPS 2021 (arXiv 2001.00939).

    Args:
        module: the network. It is neither changed nor trained, and runs in the mode that it is in: call ``eval()``
            before, unless dropout and batch statistics shall count.
        loss: ``loss(outputs, target)`` with a loss for every sample, such as
            ``nn.CrossEntropyLoss(reduction="none")``. Where it returns more, as for tokens, each counts as a sample.
        batches: pairs of inputs and target, on the module's device; a list or a data loader. All batches weigh by
            their samples.
        ignore_index: the class index of positions that count as no samples, for targets that hold a class index for
            every loss. If left out, it is the loss's own, by an attribute or argument of that name; a loss of
            ``torch.nn`` without one ignores nothing, and any other callable what PyTorch does, -100.

    Returns:
        ‖θ‖_fr, a float64 scalar.

    Raises:
        TypeError: if ``batches`` can be run over only once.
        ValueError: if the module has no parameters, the loss is not one for every sample, or there are no samples.
        RuntimeError: if an operation in the network cannot be differentiated twice.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import fisher_rao_norm
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, 3.0)
        >>> batches = [(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]]))]
        >>> squared_error = torch.nn.MSELoss(reduction="none")
        >>> fisher_rao_norm(net, squared_error, batches) ** 2  # the mean of (2 w² x²)²
        tensor(2754., dtype=torch.float64)
    """
    parameters = {name: value.requires_grad_() for name, value in parameters_of(module).items()}
    total, samples = 0.0, 0.0
    with passes(module, batches, gradients=True) as pairs:
        for inputs, target in pairs:
            losses = losses_of(module, loss, parameters, inputs, target)
            samples += float(count_of(loss, losses, target, ignore_index))
            total += float(_slopes(losses, parameters).square().sum())
    return torch.tensor(math.sqrt(total / some(samples)), dtype=torch.float64)


def fisher_rao_sums(
    module: nn.Module, loss: LossOfEverySample, inputs: Any, target: Any, *, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return what :func:`fisher_rao_norm` is computed from; it adds up over batches and processes.

    Args:
        module: as for :func:`fisher_rao_norm`.
        loss: as for :func:`fisher_rao_norm`.
        inputs: of the batch.
        target: of the batch.
        ignore_index: as for :func:`fisher_rao_norm`.

    Returns:
        Σ_i ⟨θ, ∇ℓ_i⟩² and the number of samples, two float64 scalars.

    Raises:
        ValueError: as :func:`fisher_rao_norm` does.
        RuntimeError: as :func:`fisher_rao_norm` does.
    """
    parameters = {name: value.requires_grad_() for name, value in parameters_of(module).items()}
    with passes(module, [(inputs, target)], gradients=True) as pairs:
        [(inputs, target)] = pairs
        losses = losses_of(module, loss, parameters, inputs, target)
        slopes = _slopes(losses, parameters)
    return slopes.square().sum(), count_of(loss, losses, target, ignore_index)


def sam_sharpness(
    module: nn.Module,
    loss: LossOfEverySample,
    batches: Batches,
    *,
    rho: float = 0.05,
    ignore_index: int | None = None,
) -> Tensor:
    r"""Return the sharpness that SAM descends on, the rise of the loss after one step uphill.

    .. math::
        L(θ + ε) - L(θ), \qquad ε = ρ \frac{∇L(θ)}{‖∇L(θ)‖_2},

    with the gradient and both losses over all batches, and ε over all parameters. SAM's sharpness is the maximum over
    ‖ε‖ ≤ ρ; this ε maximises the linear approximation alone, so that the result is a **lower bound** of that maximum.
    It says nothing where the gradient is zero: then it is 0, at a minimum however sharp. It may be negative. Half
    precision is taken in float32, as for :func:`fisher_rao_norm`. A difference of losses has fewer digits than these:
    for a small ρ give it a network in float64.

    Source: Foret, Kleiner, Mobahi, Neyshabur, *Sharpness-Aware Minimization for Efficiently Improving Generalization*,
    ICLR 2021 (arXiv 2010.01412), with p = 2.

    Args:
        module: as for :func:`fisher_rao_norm`.
        loss: as for :func:`fisher_rao_norm`; L is the mean over all samples.
        batches: as for :func:`fisher_rao_norm`; run over two times.
        rho: ρ, how far to step.
        ignore_index: as for :func:`fisher_rao_norm`.

    Returns:
        The difference, a float64 scalar.

    Raises:
        TypeError: as :func:`fisher_rao_norm` does.
        ValueError: as :func:`fisher_rao_norm` does, and if ρ is not a number larger than 0.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import sam_sharpness
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(net.weight, 1.0)
        >>> batches = [(torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [0.0]]))]
        >>> sam_sharpness(net, torch.nn.MSELoss(reduction="none"), batches, rho=0.1)  # 2.5 (1.1² - 1)
        tensor(0.5250, dtype=torch.float64)
    """
    rho = check_positive("rho", rho)
    parameters = {name: value.requires_grad_() for name, value in parameters_of(module).items()}
    before, samples = 0.0, 0.0
    with passes(module, batches, gradients=True) as pairs:
        gradients = [torch.zeros_like(value, dtype=compute_dtype(value)) for value in parameters.values()]
        for inputs, target in pairs:
            losses = losses_of(module, loss, parameters, inputs, target)
            found = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True)
            for gradient, part in zip(gradients, found, strict=True):
                if part is not None:
                    gradient += part
            before += float(losses.detach().double().sum())
            samples += float(count_of(loss, losses, target, ignore_index))
    length = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
    if length == 0:
        return torch.tensor(0.0 if math.isfinite(before / some(samples)) else math.nan, dtype=torch.float64)
    moved = {
        name: (value.detach() + rho / length * gradient).to(value)
        for (name, value), gradient in zip(parameters.items(), gradients, strict=True)
    }
    after = 0.0
    with passes(module, batches, gradients=False) as pairs:
        for inputs, target in pairs:
            after += float(losses_of(module, loss, moved, inputs, target).double().sum())
    return torch.tensor((after - before) / samples, dtype=torch.float64)


def loss_gradient_sum(
    module: nn.Module, loss: LossOfEverySample, inputs: Any, target: Any, *, ignore_index: int | None = None
) -> tuple[Tensor, Tensor]:
    """Return a batch's part in the gradient over all parameters; it adds up over batches and processes.

    Args:
        module: as for :func:`fisher_rao_norm`.
        loss: as for :func:`fisher_rao_norm`.
        inputs: of the batch.
        target: of the batch.
        ignore_index: as for :func:`fisher_rao_norm`.

    Returns:
        ∇Σ_i ℓ_i of all parameters in a row and the number of samples, in float64.

    Raises:
        ValueError: as :func:`fisher_rao_norm` does.
    """
    parameters = {name: value.requires_grad_() for name, value in parameters_of(module).items()}
    with passes(module, [(inputs, target)], gradients=True) as pairs:
        [(inputs, target)] = pairs
        losses = losses_of(module, loss, parameters, inputs, target)
        found = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True, materialize_grads=True)
    count = count_of(loss, losses, target, ignore_index)
    return torch.cat([part.flatten().double() for part in found]), count


def loss_rise_sum(
    module: nn.Module,
    loss: LossOfEverySample,
    inputs: Any,
    target: Any,
    *,
    step: Tensor,
    ignore_index: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return by how much Σ_i ℓ_i of a batch rises with a step of the parameters.

    Args:
        module: as for :func:`fisher_rao_norm`.
        loss: as for :func:`fisher_rao_norm`.
        inputs: of the batch.
        target: of the batch.
        step: what to add to the parameters, in a row.
        ignore_index: as for :func:`fisher_rao_norm`.

    Returns:
        The rise and the number of samples, two float64 scalars.

    Raises:
        ValueError: as :func:`fisher_rao_norm` does.
    """
    parameters = parameters_of(module)
    parts = torch.split(step, [value.numel() for value in parameters.values()])
    moved = {
        name: (value + part.reshape(value.shape)).to(value)
        for (name, value), part in zip(parameters.items(), parts, strict=True)
    }
    sums = []
    for values in (parameters, moved):
        with passes(module, [(inputs, target)], gradients=False) as pairs:
            [(wide_inputs, wide_target)] = pairs
            losses = losses_of(module, loss, values, wide_inputs, wide_target)
        sums.append(losses.double().sum())
    return sums[1] - sums[0], count_of(loss, losses, target, ignore_index)


def right_counts(
    module: nn.Module,
    inputs: Any,
    target: Tensor,
    *,
    sigmas: Sequence[float],
    draws: int,
    seed: int,
    ignore_index: int = IGNORED,
) -> Tensor:
    """Return how many samples of a batch are classified rightly with noise on all parameters.

    Args:
        module: as for :func:`pac_bayes_flatness`.
        inputs: of the batch.
        target: of the batch.
        sigmas: the standard deviations.
        draws: how many perturbations for each; the same ones, scaled.
        seed: as for :func:`pac_bayes_flatness`.
        ignore_index: as for :func:`pac_bayes_flatness`.

    Returns:
        The counts summed over the draws, in float64, of shape (sigmas,).

    Raises:
        ValueError: as :func:`pac_bayes_flatness` does.
    """
    parameters = parameters_of(module)
    generator = torch.Generator().manual_seed(seed)
    counts = []
    for _ in range(draws):
        noise = noise_for(parameters, generator)
        for sigma in sigmas:
            noisy = {name: (value + sigma * noise[name]).to(value) for name, value in parameters.items()}
            with passes(module, [(inputs, target)], gradients=False) as pairs:
                [(wide_inputs, _target)] = pairs
                counts.append(right_of(module, noisy, wide_inputs, target, ignore_index))
    return torch.stack(counts).reshape(draws, len(sigmas)).sum(dim=0)


def pac_bayes_flatness(
    module: nn.Module,
    batches: Batches,
    *,
    drop: float = 0.1,
    tolerance: float = 0.01,
    max_sigma: float = 2.0,
    draws: int = 10,
    steps: int = 15,
    seed: int = 0,
    ignore_index: int = IGNORED,
) -> Tensor:
    r"""Return the PAC-Bayes flatness 1/σ², where noise of standard deviation σ on all parameters costs 0.1 accuracy.

    .. math::
        \text{acc}(θ) - \mathbb{E}_{u ∼ N(0, σ^2 I)} \, \text{acc}(θ + u) = 0.1

    is solved for σ by bisection between 0 and ``max_sigma``, with the mean over some draws for the expectation. The
    draws are the same for every σ, scaled by it. A large value is sharp, unlike what the name says.

    Sources: Jiang, Neyshabur, Mobahi, Krishnan, Bengio, *Fantastic Generalization Measures and Where to Find Them*,
    ICLR 2020 (arXiv 1912.02178), and, for the search, the code by Dziugaite et al. (github.com/nitarshan/
    robust-generalization-measures), from which the comparison with relative flatness by Petzka et al., NeurIPS 2021
    (arXiv 2001.00939), took it with 3 draws. Both pass σ² where a standard deviation is meant, so that their numbers
    are 1/σ² of another σ: this function follows the definition, and gives for the same noise the square of theirs.
    Half precision is taken in float32, as for :func:`fisher_rao_norm`.

    Args:
        module: as for :func:`fisher_rao_norm`.
        batches: as for :func:`fisher_rao_norm`; the target holds class indices, and the outputs have the classes
            along dimension 1.
        drop: how much accuracy is lost at σ.
        tolerance: how close to ``drop`` is close enough. Zero goes through all ``steps``.
        max_sigma: where the search begins.
        draws: how many perturbations to average.
        steps: how often the interval is halved, at most.
        seed: where the noise comes from. PyTorch's own random streams are left alone.
        ignore_index: the class index of positions that count as no samples; PyTorch's -100 if left out.

    Returns:
        1/σ², a float64 scalar.

    Raises:
        TypeError: as :func:`fisher_rao_norm` does.
        ValueError: if the module has no parameters, there are no samples, outputs and target do not fit, a number is
            out of its range, or the accuracy does not drop as much at ``max_sigma``.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import pac_bayes_flatness
        >>> net = torch.nn.Linear(2, 2, bias=False)
        >>> _ = torch.nn.init.eye_(net.weight)
        >>> batches = [(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1]))]
        >>> flatness = pac_bayes_flatness(net, batches, draws=100)
        >>> with torch.no_grad():
        ...     _ = net.weight.mul_(2)  # twice as far from all decisions
        >>> pac_bayes_flatness(net, batches, draws=100, max_sigma=4.0) / flatness
        tensor(0.2500, dtype=torch.float64)
    """
    drop, max_sigma = check_positive("drop", drop), check_positive("max_sigma", max_sigma)
    if not 0 <= tolerance < drop:
        raise ValueError(f"Expected argument `tolerance` to be at least 0 and below `drop`, but got {said(tolerance)}.")
    for name, value, least in (("draws", draws, 1), ("steps", steps, 1), ("seed", seed, 0)):
        check_count(name, value, at_least=least)
    parameters = parameters_of(module)
    accuracy = _accuracy(module, parameters, batches, ignore_index)

    def lost(sigma: float) -> float:
        generator = torch.Generator().manual_seed(seed)
        accuracies = []
        for _ in range(draws):
            noise = noise_for(parameters, generator)
            noisy = {name: (value + sigma * noise[name]).to(value) for name, value in parameters.items()}
            accuracies.append(_accuracy(module, noisy, batches, ignore_index))
        return accuracy - sum(accuracies) / draws

    most = lost(max_sigma)
    if most < drop - tolerance:
        raise ValueError(
            f"Expected argument `max_sigma` to be so large that the accuracy falls by {drop}, "
            f"but got {max_sigma}, where it falls from {accuracy:.4g} by {most:.4g}."
        )
    low, high = 0.0, max_sigma
    sigma = high
    for _ in range(steps):
        sigma = (low + high) / 2
        found = lost(sigma)
        if abs(found - drop) < tolerance:
            break
        low, high = (low, sigma) if found > drop else (sigma, high)
    return torch.tensor(1 / sigma**2, dtype=torch.float64)


def _slopes(losses: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Return ⟨θ, ∇ℓ_i⟩ of every sample, in float64."""
    # ⟨θ, ∇Σ_i v_i ℓ_i⟩ is linear in v, and its derivative there is ⟨θ, ∇ℓ_i⟩ for all samples.
    shares = torch.ones_like(losses, requires_grad=True)
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        losses, list(parameters.values()), shares, create_graph=True, allow_unused=True
    )
    along = [
        (value.detach() * gradient).sum()
        for value, gradient in zip(parameters.values(), gradients, strict=True)
        if gradient is not None
    ]
    [slopes] = torch.autograd.grad(along, [shares])
    return slopes.double()


def _accuracy(module: nn.Module, parameters: dict[str, Tensor], batches: Batches, ignore_index: int) -> float:
    right, samples = 0.0, 0.0
    with passes(module, batches, gradients=False) as pairs:
        for inputs, target in pairs:
            right += float(right_of(module, parameters, inputs, target, ignore_index))
            samples += float((target != ignore_index).sum())
    return right / some(samples)
