"""What other libraries have of the measures: curvlinops, BackPACK, hessian-eigenthings and PyHessian.

Each is skipped where its library is missing. Two of them ask for other versions of what is there, so that they come
without what they ask for:

    pip install --no-deps curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 einconv==0.1.0 \\
        linear_operator==0.6.1 unfoldNd==0.2.3
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_relflat.functional import hessian_trace, largest_eigenvalue, largest_eigenvalue_bounds, relative_flatness
from lightning_relflat.functional.flatness_report import flatness_report
from tests.functional.cases import normal, seeded

N, D, M = 60, 4, 6
SIZES = [20, 20, 20]  # PyHessian and hessian-eigenthings average over batches, whatever their sizes

CRITERIA = {
    "cross_entropy": nn.CrossEntropyLoss(),
    "class weights": nn.CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)),
    "mse": nn.MSELoss(),
}
Problem = tuple[nn.Linear, nn.Module, Tensor, Tensor]


@pytest.fixture(params=CRITERIA)
def problem(request: pytest.FixtureRequest) -> Problem:
    criterion = CRITERIA[request.param]
    layer = nn.Linear(M, D, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(normal(seeded(0), D, M))
    features = normal(seeded(1), N, M).relu()
    if isinstance(criterion, nn.MSELoss):
        return layer, criterion, features, normal(seeded(2), N, D)
    return layer, criterion, features, torch.randint(D, (N,), generator=seeded(2))


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def batch_of(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layer, _, features, target = problem
    weight = layer.weight.detach()
    return features, weight, features @ weight.T, target


def assert_ours(problem: Problem, *, trace: float | None = None, largest: float | None = None, rel: float) -> None:
    batch, loss = batch_of(problem), problem[1]
    report = flatness_report(*batch, loss=loss, eigenvalues=True)
    if trace is not None:
        assert float(hessian_trace(*batch, loss=loss)) == pytest.approx(trace, rel=rel)
        assert float(report["hessian_trace"]) == pytest.approx(trace, rel=rel)
        norm = float(batch[1].square().sum())
        assert float(hessian_trace(*batch, loss=loss, scale="layer")) == pytest.approx(norm * trace, rel=rel)
    if largest is not None:
        assert float(largest_eigenvalue([batch], loss=loss)) == pytest.approx(largest, rel=max(rel, 1e-6))
        assert float(largest_eigenvalue_bounds(*batch, loss=loss)[0]) == pytest.approx(largest, rel=rel)
        assert float(report["hessian_eigenvalue"]) == pytest.approx(largest, rel=rel)


def dense_of(operator: Any) -> Tensor:
    columns = [operator @ unit for unit in torch.eye(D * M, dtype=torch.float64)]
    return torch.stack(columns, dim=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what curvlinops imports
def test_curvlinops(problem: Problem) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    layer, criterion, features, target = problem
    batches = [(features, target)]
    whole = curvlinops.HessianLinearOperator(layer, criterion, list(layer.parameters()), batches)
    matrix = dense_of(whole)
    assert_ours(problem, trace=matrix.trace().item(), largest=torch.linalg.eigvalsh(matrix)[-1].item(), rel=1e-9)
    # κ = Σ_{s,s'} ⟨w_s, w_s'⟩ Tr(H_{s,s'})
    weight = layer.weight.detach()
    traces = matrix.reshape(D, M, D, M).diagonal(dim1=1, dim2=3).sum(dim=-1)
    kappa = relative_flatness(*batch_of(problem), loss=criterion)
    torch.testing.assert_close(kappa, ((weight @ weight.T) * traces).sum(), rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_backpack_has_the_same_trace(problem: Problem) -> None:
    """Its exact diagonal of the Hessian: the trace, and that of every neuron."""
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    layer, criterion, features, target = problem
    if isinstance(criterion, nn.CrossEntropyLoss) and criterion.weight is not None:
        pytest.skip("BackPACK has no class weights")
    layer, extended = backpack.extend(layer), backpack.extend(type(criterion)())
    loss = extended(layer(features), target)
    with backpack.backpack(extensions.DiagHessian()):
        loss.backward()
    diagonal = layer.weight.diag_h
    assert_ours(problem, trace=diagonal.sum().item(), rel=1e-9)
    norms = layer.weight.detach().square().sum(dim=1)
    ours = hessian_trace(*batch_of(problem), loss=criterion, scale="neuron")
    torch.testing.assert_close(ours, norms @ diagonal.sum(dim=1), rtol=1e-9, atol=0)
    pairs = flatness_report(*batch_of(problem), loss=criterion, neuron_pairs=True)["neuron_pairs"]
    torch.testing.assert_close(pairs.diagonal(), norms * diagonal.sum(dim=1), rtol=1e-9, atol=0)


def test_hessian_eigenthings(problem: Problem) -> None:
    things = pytest.importorskip("hessian_eigenthings")
    layer, criterion, features, target = problem
    batches = list(zip(features.split(SIZES), target.split(SIZES), strict=True))
    if isinstance(criterion, nn.CrossEntropyLoss) and criterion.weight is not None:
        batches = [(features, target)]  # a mean of batches' weighted means is not that of the union
    operator = things.HessianOperator(layer, batches, things.supervised_loss(criterion))
    largest = things.lanczos(operator, k=1, max_iter=D * M, tol=1e-12, which="LA", seed=0).eigenvalues.max().item()
    trace = sum(operator.matvec(unit) @ unit for unit in torch.eye(D * M, dtype=torch.float64))
    assert_ours(problem, trace=float(trace), largest=largest, rel=1e-9)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_pyhessian(problem: Problem) -> None:
    """Power iteration, in float32: it draws its starts in that; and Hutchinson's estimate of the trace."""
    pyhessian = pytest.importorskip("pyhessian")
    layer, criterion, features, target = problem
    layer.float()
    criterion = criterion.float()
    if not isinstance(criterion, nn.CrossEntropyLoss):
        target = target.float()
    computer = pyhessian.hessian(layer, criterion, data=(features.float(), target), cuda=False)
    [largest], _ = computer.eigenvalues(maxIter=2000, tol=1e-7)
    traces = torch.tensor(computer.trace(maxIter=1000, tol=1e-9))
    layer.double()
    criterion.double()
    assert_ours(problem, largest=largest, rel=1e-3)
    error = traces.std().item() / len(traces) ** 0.5
    ours = hessian_trace(*batch_of(problem), loss=criterion).item()
    assert abs(traces.mean().item() - ours) < 4 * error
    assert error < 0.03 * ours
