"""The Hessian of a loss with respect to the outputs it is computed from, in closed form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from lightning_relflat._shown import show_call
from lightning_relflat.functional._called_batch import CalledBatch, read_batch, rows_of
from lightning_relflat.functional._called_batch import Target as Target
from lightning_relflat.functional._checks import full_precision
from lightning_relflat.functional._scale import centered
from lightning_relflat.functional.criteria import as_criterion as as_criterion
from lightning_relflat.functional.criteria import has_closed_form as has_closed_form

_Diagonal: TypeAlias = "Callable[[Any, Tensor, Tensor], Tensor]"


@dataclass(frozen=True, eq=False)
class OutputHessian:
    r"""The Hessians of n samples' losses with respect to their d outputs, each a diagonal minus a rank-one matrix.

    Sample i adds ``weight[i] · (diag(diagonal[i]) − root[i] root[i]ᵀ)`` to the Hessian of the summed loss; the
    Hessian of the mean loss is that divided by ``total_weight``. Both follow the criterion: class weights, masses of
    soft targets, ignored positions, and what its mean divides by. So numerator and denominator add up over batches
    and processes.

    Attributes:
        diagonal: the diagonals a, of shape (n, d).
        root: the vectors r, of shape (n, d), or ``None`` where there is no rank-one part.
        weight: the samples' weights in the summed loss, of shape (n,).
        total_weight: what the mean divides the summed loss by; a scalar.
        annihilates_constants: whether ``diagonal = root`` sums to one, as for softmax. Then A maps constant vectors
            to zero, which :meth:`trace_through` uses to stay accurate where the softmax is saturated.
        counted: which samples the criterion does not ignore, of shape (n,), or ``None`` where all count. What an
            ignored one holds, be it NaN, is no part of the loss.
    """

    diagonal: Tensor
    root: Tensor | None
    weight: Tensor
    total_weight: Tensor
    annihilates_constants: bool = False
    counted: Tensor | None = None

    def __repr__(self) -> str:
        return show_call(self)

    def trace_through(self, weight: Tensor) -> Tensor:
        r"""Return ``Tr(Wᵀ A_i W)`` of every sample, without the sample's weight.

        It is Σ_s a_s‖w_s‖² − ‖Wᵀr‖². For a softmax, A does not see a vector that is added to all rows of W. So their
        mean is taken out first, in which the digits of the rest would drown where it is large. Then, taking the row of
        the most probable output as the origin leaves only terms of the size of the result, while the plain formula
        subtracts two numbers near ‖w‖² and loses all digits when p is nearly one-hot.

        Args:
            weight: the matrix W, of shape (d, m).

        Returns:
            The traces, of shape (n,).
        """
        if self.annihilates_constants:
            return self._trace_through_centered(centered(weight))
        traces = self.diagonal @ weight.square().sum(dim=1)
        return traces if self.root is None else traces - (self.root @ weight).square().sum(dim=1)

    def _trace_through_centered(self, weight: Tensor) -> Tensor:
        """Return the traces for a softmax and a W whose rows have no large part in common."""
        squared_norms = weight.square().sum(dim=1)
        others, origin_row, offset = self._from_origin(weight)
        mass = others.sum(dim=1)
        # Σ_s p_s ‖w_s − w_k‖², with Σ_{s≠k} p_s w_s = offset + mass · w_k
        cross = (offset * origin_row).sum(dim=1)
        spread = others @ squared_norms - 2 * cross - mass * origin_row.square().sum(dim=1)
        return spread - offset.square().sum(dim=1)

    def column_curvatures(self, weight: Tensor) -> Tensor:
        """Return (Wᵀ A_i W)_kk of every sample and column k: :meth:`trace_through` before its sum over k.

        Args:
            weight: the matrix W, of shape (d, m).

        Returns:
            The diagonals, of shape (n, m), without the samples' weights.
        """
        if not self.annihilates_constants:
            curvatures = self.diagonal @ weight.square()
            return curvatures if self.root is None else curvatures - (self.root @ weight).square()
        weight = centered(weight)
        others, origin_row, offset = self._from_origin(weight)
        mass = others.sum(dim=1, keepdim=True)
        return others @ weight.square() - 2 * offset * origin_row - mass * origin_row.square() - offset.square()

    def diagonals(self) -> Tensor:
        """Return the diagonals (A_i)_ss of every sample, without the sample's weight.

        Returns:
            The diagonals a − r², of shape (n, d).
        """
        if self.root is None:
            return self.diagonal
        if not self.annihilates_constants:
            return self.diagonal - self.root.square()
        # p (1 − p), where 1 − p of the most probable output is the sum of the others: no digit is lost near one.
        origin = self.diagonal.detach().argmax(dim=1, keepdim=True)
        others = self.diagonal.scatter(1, origin, 0.0).sum(dim=1, keepdim=True)
        return self.diagonal * (1 - self.diagonal).scatter(1, origin, others)

    def row_traces(self, weight: Tensor, sample_factor: Tensor) -> Tensor:
        r"""Return ``Σ_i f_i Σ_s' ⟨w_s, w_s'⟩ (A_i)_{s,s'}`` of every output s; they sum to Σ_i f_i Tr(Wᵀ A_i W).

        Args:
            weight: the matrix W, of shape (d, m).
            sample_factor: the factors f, of shape (n,).

        Returns:
            The parts of the outputs, of shape (d,).
        """
        factors = sample_factor[:, None]
        if not self.annihilates_constants:
            traces = (sample_factor @ self.diagonal) * weight.square().sum(dim=1)
            if self.root is None:
                return traces
            return traces - (weight * (self.root.T @ (factors * (self.root @ weight)))).sum(dim=1)
        # p_s ⟨w_s, w_s − Σ_s' p_s' w_s'⟩, where the bracket is w_s − w_k − offset, and −offset for s = k. It does not
        # see what the rows have in common, but what it is multiplied by does.
        rows = centered(weight)
        others, origin_row, offset = self._from_origin(rows)
        pull = others.T @ (factors * origin_row) + self.diagonal.T @ (factors * offset)
        return (weight * ((sample_factor @ others)[:, None] * rows - pull)).sum(dim=1)

    def of_samples(self, part: slice) -> OutputHessian:
        """Return the Hessians of some of the samples.

        Args:
            part: which.

        Returns:
            Them, with the total weight as it is.
        """
        root = None if self.root is None else self.root[part]
        counted = None if self.counted is None else self.counted[part]
        return replace(self, diagonal=self.diagonal[part], root=root, weight=self.weight[part], counted=counted)

    def _from_origin(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return p without its largest entry p_k, the row w_k, and Σ_s p_s (w_s − w_k)."""
        origin = self.diagonal.detach().argmax(dim=1)
        others = self.diagonal.scatter(1, origin[:, None], 0.0)
        origin_row = weight[origin]
        return others, origin_row, others @ weight - others.sum(dim=1, keepdim=True) * origin_row


def output_hessian(
    outputs: Tensor, target: Target = None, *, loss: str | nn.Module, class_dim: int = -1
) -> OutputHessian:
    r"""Return A_i = ∇²_z ℓ(z_i, y_i) of a known criterion as ``diag(a_i) − r_i r_iᵀ`` with the samples' weights.

    With p = softmax(z) and σ the sigmoid, before the criterion's weights:

    =========================  ===================================  ===========================================
    criterion                  ``loss=``                            a, r
    =========================  ===================================  ===========================================
    ``CrossEntropyLoss``       ``"cross_entropy"``                  p, p
    ``BCEWithLogitsLoss``      ``"binary_cross_entropy"``           (1 + (pos_weight − 1) y) σ(z)(1 − σ(z)), none
    ``MSELoss``                ``"mse"``                            2, none
    ``HuberLoss``              ``"huber"``                          1 where \|z − y\| < δ, none
    ``SmoothL1Loss``           ``"smooth_l1"``                      1/β where \|z − y\| < β, none
    ``PoissonNLLLoss``         ``"poisson_nll"``                    eᶻ; without log_input y / (z + eps)², none
    ``GaussianNLLLoss``        ``"gaussian_nll"``                   1 / var, none (in the mean; var a constant)
    =========================  ===================================  ===========================================

    Source: second derivatives of the definitions in the PyTorch reference; the softmax case is the one that
    *FAM: Relative Flatness Aware Minimization* (arXiv 2307.02337) and *Flatness is Necessary, Neural Collapse is Not*
    (arXiv 2509.17738) build on.

    Args:
        outputs: the outputs z, of shape (..., d), or with the d outputs of a sample along ``class_dim``. All other
            dimensions index samples.
        target: what the criterion takes as its target: for cross-entropy class indices of shape (...) or
            probabilities of the outputs' shape; else numbers of the outputs' shape, or without ``class_dim`` where
            d = 1; for ``GaussianNLLLoss`` the pair (target, var). Integers of any type count as indices; any real
            numbers as numbers, as in a step that converts them. May be left out where the curvature does not
            depend on it: cross-entropy without class weights (no position counts as ignored then), binary
            cross-entropy without ``pos_weight``, MSE, Poisson with log_input.
        loss: a criterion of ``torch.nn``, whose options all count, or the name of one with PyTorch's defaults.
        class_dim: the dimension of ``outputs`` along which the outputs of a sample lie: -1 as they leave an
            ``nn.Linear``, 1 as ``nn.CrossEntropyLoss`` takes them.

    Returns:
        The Hessians of the n samples, in the order of the flattened other dimensions, computed in float32 at least.
        NaN for a sample whose loss is not finite because of its target, such as a NaN.

    Raises:
        TypeError: if ``outputs`` are no floating point numbers, or the target is a tuple where it must not be, or
            complex.
        ValueError: if the criterion is not known or has options that PyTorch refuses, or the target is missing, does
            not fit, or holds what the criterion's documentation excludes: a class that no output has, probabilities
            that are negative, above 1 or of a sum that is not 1 (a row of zeros says nothing and is let be), a negative
            variance. Numbers are looked at on a CPU alone. On any other device, and while something traces or
            ``torch.func`` transforms, nothing waits for them, and the samples in question are NaN.

    Examples:
        >>> import torch
        >>> from lightning_relflat.functional import output_hessian
        >>> hessian = output_hessian(torch.zeros(3, 2), torch.tensor([0, 1, 1]), loss="cross_entropy")
        >>> hessian.diagonal[0], hessian.root[0], hessian.total_weight
        (tensor([0.5000, 0.5000]), tensor([0.5000, 0.5000]), tensor(3.))
    """
    criterion = as_criterion(loss)
    called = read_batch(criterion, outputs, target, class_dim)
    with full_precision(outputs):
        if isinstance(criterion, nn.CrossEntropyLoss):
            rows = called.outputs.to(called.weight.dtype)
            if called.counted is not None:
                rows = rows.masked_fill(~called.counted[:, None], 0.0)
            p = rows.softmax(dim=1)
            return OutputHessian(p, p, called.weight, called.total_weight, True, called.counted)
        diagonal = rows_of(_diagonal(criterion, called).reshape(outputs.shape), class_dim)
        return OutputHessian(diagonal, None, called.weight, called.total_weight)


def _diagonal(criterion: Any, called: CalledBatch) -> Tensor:
    """Return the second derivatives of a loss that is a sum over outputs, of the shape that it is called with."""
    outputs, targets = called.outputs, called.targets
    curvature, needs_target = next(of for kind, of in _DIAGONALS.items() if isinstance(criterion, kind))
    if not targets and needs_target(criterion):
        raise ValueError(
            f"Expected argument `target` to be a tensor, because the curvature of {type(criterion).__name__} "
            "depends on it, but got None."
        )
    found = curvature(criterion, outputs, targets[-1] if targets else outputs)
    # Where the loss is not finite, neither is its curvature, even if it would not depend on what makes it so.
    for part in (outputs, *targets):
        found = found.where(part.isfinite(), torch.nan)
    return found


def _binary_cross_entropy(criterion: Any, outputs: Tensor, target: Tensor) -> Tensor:
    curvature: Tensor = outputs.sigmoid() * (-outputs).sigmoid()
    if criterion.pos_weight is not None:
        curvature = curvature * (1 + (criterion.pos_weight.to(outputs) - 1) * target)
    return curvature if criterion.weight is None else curvature * criterion.weight.to(outputs)


def _mse(_: Any, outputs: Tensor, __: Tensor) -> Tensor:
    return torch.full_like(outputs, 2.0)


def _huber(criterion: Any, outputs: Tensor, target: Tensor) -> Tensor:
    return ((outputs - target).abs() < float(criterion.delta)).to(outputs.dtype)


def _smooth_l1(criterion: Any, outputs: Tensor, target: Tensor) -> Tensor:
    if criterion.beta == 0:  # the absolute error
        return torch.zeros_like(outputs)
    return ((outputs - target).abs() < float(criterion.beta)).to(outputs.dtype) / float(criterion.beta)


def _poisson_nll(criterion: Any, outputs: Tensor, target: Tensor) -> Tensor:
    if criterion.log_input:
        return outputs.exp()
    rate = outputs + float(criterion.eps)
    return (target / rate.square()).where(rate > 0, torch.nan)  # the loss takes its logarithm


def _gaussian_nll(criterion: Any, _: Tensor, variance: Tensor) -> Tensor:
    return 1 / variance.detach().clamp(min=criterion.eps)


def _always(_: Any) -> bool:
    return True


# Of every criterion but cross-entropy: the second derivative from the outputs and what it depends on, the target or the
# variance; and whether it does.
_DIAGONALS: dict[type[nn.Module], tuple[_Diagonal, Callable[[Any], bool]]] = {
    nn.BCEWithLogitsLoss: (_binary_cross_entropy, lambda criterion: criterion.pos_weight is not None),
    nn.MSELoss: (_mse, lambda _: False),
    nn.HuberLoss: (_huber, _always),
    nn.SmoothL1Loss: (_smooth_l1, _always),
    nn.PoissonNLLLoss: (_poisson_nll, lambda criterion: not criterion.log_input),
    nn.GaussianNLLLoss: (_gaussian_nll, _always),
}
