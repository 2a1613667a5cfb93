"""Reports as words, tables, pictures and one page that needs nothing else."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import subprocess
import sys
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_relflat import measure
from lightning_relflat.report import ClassFlatness, Comparison, LayerFlatness, LossTaken, Report, SharpSample
from lightning_relflat.report._pictures import png

EVIL = '<script>alert("x")</script>&\'"'


def make(kappa: float = 2.0, error: float = 0.0, **changes: object) -> Report:
    parts = {"weight_norm": 1.0, "feature_norm": 2.0, "curvature": kappa / 2, "flat_samples": 0.0, "dead_features": 0.0}
    whole = Report(
        model="Net",
        layer="head",
        kind="Linear(in_features=2, out_features=2, bias=True)",
        loss=LossTaken("cross_entropy", "named", "The loss is cross_entropy, as you named it."),
        samples=10,
        batches=2,
        training=False,
        relative_flatness=kappa,
        error=error,
        mean_loss=0.5,
        made_of=parts | {"zero_rows": 0.0},
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]


def full() -> Report:
    return make(
        accuracy=0.75,
        layers=(
            LayerFlatness("body", "Linear(4, 2)", 3.0, 0.25),
            LayerFlatness("aside", "Linear(4, 2)", reason="it did not run as a module"),
            LayerFlatness("head", "Linear(2, 2)", 2.0, 0.0),
        ),
        network=(5.0, 0.25),
        classes=(
            ClassFlatness("cat", 6, 1.0, 1.0),
            ClassFlatness("dog", 4, 3.5, 0.25),
            ClassFlatness("owl", 0, None, None),
        ),
        sharpest=(
            SharpSample(7, 9.0, "cat", "dog", png(torch.rand(3, 4, 5))),
            SharpSample(2, 8.0, "dog", "dog"),
        ),
    )


class Page(HTMLParser):
    """Reads a page: what is not closed, what it would load, its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag not in ("meta", "img", "br", "link", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "one.html"
    full().save(path)
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert [load[:22] for load in page.loads] == ["data:image/png;base64,"]
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert not re.search(r"https?:|@import|url\(", text)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme:dark" in text
    words = "".join(page.words)
    assert all(sentence in words for sentence in full().sentences())
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match=r"Expected argument `path` to be a name that ends with '.html', but got"):
        full().save(tmp_path / "one.png")


@pytest.mark.parametrize("many", [False, True])
def test_whatever_things_are_called_is_text(many: bool) -> None:
    report = make(
        model=EVIL,
        layer=EVIL,
        kind=EVIL,
        loss=LossTaken(EVIL, "named", EVIL),
        layers=(LayerFlatness(EVIL, EVIL, 1.0, 0.1), LayerFlatness(EVIL, EVIL, reason=EVIL)),
        network=(1.0, 0.1),
        classes=(ClassFlatness(EVIL, 1, 1.0, 1.0), ClassFlatness("b", 1, 2.0, 1.0)),
        sharpest=(SharpSample(1, 1.0, EVIL, EVIL), SharpSample(2, 1.0)),
        notes=(EVIL,),
    )
    compared = Comparison({EVIL: report, "b": report} if many else {EVIL: report})
    for text in (compared._repr_html_(), *([] if many else [report._repr_html_()])):
        page = Page(text)
        assert "script" not in page.tags
        assert page.open == []
        assert EVIL in "".join(page.words)


def test_what_a_report_says() -> None:
    said = " ".join(full().sentences())
    assert said.startswith(
        "The loss is cross_entropy, as you named it. κ of the head, layer 'head', is 2, exact, over 10"
    )
    assert "Nothing is saturated, no sample" not in said
    assert "Nothing is saturated" in said
    assert "Of 2 layers measured the sharpest is 'body' (κ 3.00 ± 0.25, 60 % of the sum over all layers)" in said
    assert "Not measured, because it did not run as a module: 'aside'." in said
    assert "The flattest class is 'cat' (κ 1), the sharpest 'dog' (κ 3.5, 3.5 times as much)." in said
    assert "1 of 3 classes have no samples here." in said
    assert "1 of the 2 sharpest samples is predicted wrongly." in said
    assert repr(full()) == "Report(Net, layer='head', κ=2, samples=10)"
    assert all(word in str(full()) for word in ("body", "not measured", "weight_norm", "owl", "#" * 0 + "7"))


def test_signs_that_kappa_means_nothing_are_said() -> None:
    parts = make().made_of | {"flat_samples": 0.9, "dead_features": 0.004}
    said = " ".join(make(made_of=parts).sentences())
    assert "90 % of the samples are saturated and under 1 % of the features are zero for every sample." in said
    assert "No output has a weight of zero." in said
    assert "So κ says little" in said
    parts["flat_samples"] = 0.3
    assert "So κ says little" not in " ".join(make(made_of=parts).sentences())


@pytest.mark.parametrize(
    ("plain", "fam", "words"),
    [
        (make(10.0), make(2.0), "'fam' is 5.0 times flatter than 'plain': κ is 2 beside 10, the loss 0.5 beside 0.5."),
        (make(2.0), make(2.0), "is as flat as"),
        (
            make(2.0, 0.5),
            make(2.5, 0.5),
            "'plain' and 'fam' cannot be told apart: κ is 2.00 ± 0.50 and 2.50 ± 0.50, the loss",
        ),
        (make(2.0), make(-0.5), "'fam' is flatter than 'plain': κ is -0.5 beside 2,"),
        (make(3000.0), make(2.0), "'fam' is 1500 times flatter than"),
    ],
)
def test_reports_are_compared_in_words(plain: Report, fam: Report, words: str) -> None:
    compared = plain.compare(fam, names=("plain", "fam"))
    assert words in " ".join(compared.sentences())
    assert words in str(compared)
    assert words in "".join(Page(compared._repr_html_()).words)


def test_reports_of_other_losses_and_of_saturated_models_are_compared_with_a_caution() -> None:
    other = make(loss=LossTaken("mse", "named", "The loss is mse."), made_of=make().made_of | {"flat_samples": 0.8})
    said = " ".join(make(4.0).compare(other, names=("a", "b")).sentences())
    assert "The losses differ (cross_entropy, mse)" in said
    assert "κ of 'b' says little: 80 % of its samples are saturated" in said


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kappa", "loss", "message"),
    [
        (NAN, NAN, "is not a number, because the loss is not a number: weights or data are not finite"),
        (INFINITE, INFINITE, "is infinite, because the loss is infinite: weights or data are not finite"),
        (INFINITE, 0.5, "is infinite, though the loss is finite: what is multiplied in it is too large"),
        (NAN, 0.5, "is not a number, though the loss is finite"),
    ],
)
def test_a_kappa_that_is_no_number_is_not_taken_at_its_word(kappa: float, loss: float, message: str) -> None:
    """The share of saturated samples is 0 then: nothing is smaller than another where it is not a number."""
    report = dataclasses.replace(full(), relative_flatness=kappa, mean_loss=loss, notes=("A note.",))
    first, said, note = report.sentences()
    assert first == report.loss.reason
    assert said.startswith(f"κ of the head, layer 'head', {message}")
    assert note == "A note."
    assert "its word" not in str(report)
    page = Page(report.compare(make(), names=("a", "b"))._repr_html_())
    assert message.partition(",")[0] in " ".join(page.words)


def test_one_without_a_number_among_others() -> None:
    reports = {"lost": make(NAN, mean_loss=NAN), "flat": make(1.0), "sharp": make(3.0)}
    lost, compared = Comparison(reports).sentences()
    assert lost.startswith("'lost': κ of the head, layer 'head', is not a number, because the loss is not a number")
    assert compared.startswith("'flat' is 3.0 times flatter than 'sharp'")
    assert len(Comparison({"a": make(NAN), "b": make(NAN)}).sentences()) == 2


def test_names_of_a_comparison() -> None:
    assert list(make().compare(make(), make(model="Other")).reports) == ["Net 1", "Net 2", "Other"]
    with pytest.raises(ValueError, match="Expected argument `names` to be 2 different names"):
        make().compare(make(), names=("a", "a"))
    with pytest.raises(ValueError, match="Expected argument `reports` to hold one report at least"):
        Comparison({})


def test_the_dictionary_is_plain() -> None:
    report = dataclasses.replace(full(), mean_loss=float("nan"))
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["mean_loss"] is None
    assert plain["layers"][0] == {
        "name": "body",
        "kind": "Linear(4, 2)",
        "relative_flatness": 3.0,
        "error": 0.25,
        "reason": None,
    }
    assert plain["sharpest"][0]["picture"].startswith("data:image/png;base64,")
    assert set(full().compare(full(), names=("a", "b")).to_dict()) == {"a", "b"}


def test_the_plot_has_a_panel_for_each_part() -> None:
    figure = full().plot()
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "κ of the layers",
        "κ of the classes",
        "sharpest samples: part in κ",
    ]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["body", "head"]
    assert len(full().compare(make(), names=("a", "b")).plot().axes) == 2
    assert len(make().plot().axes) == 1


def test_a_plot_without_matplotlib_says_what_is_missing() -> None:
    code = (
        "import importlib.util\nfrom lightning_relflat.report._plot import plot_reports\n"
        "importlib.util.find_spec = lambda name: None\nplot_reports({})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install matplotlib" in found.stderr


def decoded(data: bytes) -> Tensor:
    """Read a PNG by the standard, as (H, W, channels)."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    place, parts = 8, {}
    while place < len(data):
        [size], kind = struct.unpack(">I", data[place : place + 4]), data[place + 4 : place + 8]
        body = data[place + 8 : place + 8 + size]
        assert struct.unpack(">I", data[place + 8 + size : place + 12 + size])[0] == zlib.crc32(kind + body)
        parts[kind] = body
        place += 12 + size
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", parts[b"IHDR"])
    assert (depth, rest) == (8, [0, 0, 0])
    channels = {0: 1, 2: 3}[colour]
    rows = torch.tensor(list(zlib.decompress(parts[b"IDAT"]))).reshape(height, 1 + width * channels)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, channels)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([1, 3]), st.integers(2, 9), st.integers(2, 9), st.floats(-5, 5), st.floats(0, 100))
def test_pictures_are_png_files(channels: int, height: int, width: int, shift: float, scale: float) -> None:
    torch.manual_seed(0)
    image = torch.rand(channels, height, width) * scale + shift
    pixels = decoded(png(image))
    assert pixels.shape == (height, width, channels)
    if scale > 1e-3:
        least, most = image.min(), image.max()
        expected = ((image - least) / (most - least) * 255).movedim(0, -1)
        assert (pixels - expected).abs().max() <= 0.51


def test_large_pictures_and_numbers_that_are_not_finite() -> None:
    assert max(decoded(png(torch.rand(3, 300, 200))).shape) == 96
    image = torch.tensor([[[0.0, 1.0], [torch.nan, torch.inf]]])
    assert decoded(png(image)).flatten().tolist() == [0, 255, 0, 0]
    assert decoded(png(torch.full((1, 2, 2), 0.5))).unique().tolist() == [128]


def test_a_measured_report_has_pictures_and_names() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2))
    images, labels = torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 0, 1, 1, 0])
    report = measure(net, [(images[:4], labels[:4]), (images[4:], labels[4:])], sharpest=3, class_names=("cat", "dog"))
    assert len(report.sharpest) == 3
    for sample in report.sharpest:
        assert sample.label == ("cat", "dog")[labels[sample.index]]
        assert sample.prediction == ("cat", "dog")[net(images)[sample.index].argmax()]
        assert sample.picture == png(images[sample.index])
    assert [one.name for one in report.classes] == ["cat", "dog"]
    assert report._repr_html_().count("<img") == 3
