"""Graph networks of PyTorch Geometric, with its own Lightning data modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.clients.agreement import QUIET, Case, Fit, dtype_of

pytest.importorskip("torch_geometric")
pyg_data: Any = pytest.importorskip("torch_geometric.data")
pyg_lightning: Any = pytest.importorskip("torch_geometric.data.lightning")
pyg_nn: Any = pytest.importorskip("torch_geometric.nn")

INPUTS, CLASSES = 4, 3


class GraphClassifier(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.conv = pyg_nn.GCNConv(INPUTS, 5)
        self.head = nn.Linear(5, CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        nodes = self.conv(batch.x, batch.edge_index).relu()
        loss = F.cross_entropy(self.head(pyg_nn.global_mean_pool(nodes, batch.batch)), batch.y)
        self.log("loss", loss, batch_size=batch.num_graphs)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class NodeClassifier(L.LightningModule):
    def __init__(self, gnn: nn.Module) -> None:
        super().__init__()
        self.gnn = gnn

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        outputs = self.gnn(batch.x, batch.edge_index)
        return F.cross_entropy(outputs[batch.train_mask], batch.y[batch.train_mask])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


def graph(nodes: int, seed: int, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(seed)
    ends = torch.randint(0, nodes, (2, 2 * nodes), generator=generator)
    return pyg_data.Data(
        x=torch.randn(nodes, INPUTS, generator=generator).to(dtype),
        edge_index=torch.cat([ends, ends.flip(0)], dim=1),
        y=torch.randint(0, CLASSES, (nodes,), generator=generator),
        train_mask=torch.rand(nodes, generator=generator) < 0.7,
    )


def test_graph_classification(case: Case) -> None:
    """`GCNConv`, mean over the nodes, a linear head; `LightningDataset`"""

    def fit(callbacks: list[Any], **settings: Any) -> None:
        torch.manual_seed(0)
        graphs = [graph(6, seed, dtype_of(settings)) for seed in range(10)]
        for one in graphs:
            one.y = one.y[:1]
        data = pyg_lightning.LightningDataset(train_dataset=graphs, batch_size=5)
        L.Trainer(callbacks=callbacks, **(QUIET | {"max_epochs": 100} | settings)).fit(GraphClassifier(), data)

    case.agrees(fit, "head")


def fitting_nodes(make: Callable[[], nn.Module]) -> Fit:
    def fit(callbacks: list[Any], **settings: Any) -> None:
        torch.manual_seed(0)
        one = graph(12, 1, dtype_of(settings))
        one.val_mask = one.test_mask = ~one.train_mask
        data = pyg_lightning.LightningNodeData(one, loader="full")
        trainer = L.Trainer(callbacks=callbacks, **(QUIET | {"max_epochs": 100} | settings))
        trainer.fit(NodeClassifier(make()), data)

    return fit


def test_node_classification_gcn(case: Case) -> None:
    """`GCN` on one whole graph, whose last layer's nodes meet in the message passing; `LightningNodeData`"""
    case.agrees(fitting_nodes(lambda: pyg_nn.GCN(INPUTS, 5, 2, CLASSES)), "gnn.convs.1.lin")


def test_node_classification_gat(case: Case) -> None:
    """`GAT`, whose attention comes from the last layer's outputs; `LightningNodeData`"""
    case.agrees(fitting_nodes(lambda: pyg_nn.GAT(INPUTS, 4, 2, CLASSES, heads=2, dropout=0.3)), "gnn.convs.1.lin")


def test_node_classification_sage(case: Case) -> None:
    """`GraphSAGE`, with a layer for a node and one for its neighbours; `LightningNodeData`"""
    case.agrees(fitting_nodes(lambda: pyg_nn.GraphSAGE(INPUTS, 5, 2, CLASSES, norm="BatchNorm")), "gnn.convs.1.lin_r")


def test_node_classification_gin(case: Case) -> None:
    """`GIN`, a small network after each sum over neighbours; `LightningNodeData`"""
    case.agrees(fitting_nodes(lambda: pyg_nn.GIN(INPUTS, 5, 2, CLASSES)), "gnn.convs.1.nn.lins.1")
