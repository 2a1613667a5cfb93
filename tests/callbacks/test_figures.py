"""What pictures look like: what is drawn of images and of others, and the one style of all."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from lightning_relflat import FAM, FlatnessFigures, FlatnessMonitor, LayersMonitor, MaxNorm, SharpestMonitor
from lightning_relflat._style import COLOURS, DARK_ORANGE, INK, new_figure, styled
from lightning_relflat.callbacks._figures import Drawn, bars, curve_of_gaps, heat_map, image_in, sample_grid
from tests.models import Net, make_loader, make_trainer


def rows(figure: Figure) -> tuple[list[str], list[float], list[str]]:
    """Return the names, lengths and written numbers of bars, from top to bottom as a reader sees them."""
    [axes] = figure.axes
    bottom, top = axes.get_ylim()
    assert bottom > top
    lengths = [bar.get_width() for bar in axes.patches]  # type: ignore[attr-defined]  # rectangles
    return [label.get_text() for label in axes.get_yticklabels()], lengths, [text.get_text() for text in axes.texts]


def test_what_is_an_image() -> None:
    colours = torch.arange(24.0).reshape(3, 2, 4)
    found = image_in({"label": 3, "picture": colours})
    assert found is not None
    assert torch.equal(found, colours.permute(1, 2, 0) / 23)
    assert torch.equal(image_in(colours[0].to(torch.uint8)), colours[0] / 7)  # type: ignore[arg-type]
    assert image_in(torch.ones(4)) is None
    assert image_in((torch.ones(2, 3, 3), "text")) is None
    assert torch.equal(image_in([torch.ones(1, 2, 2)]), torch.zeros(2, 2))  # type: ignore[arg-type]


def test_a_sample_without_an_image_leaves_bars_of_all() -> None:
    samples = [Drawn((torch.ones(2, 2), 1), 7, 5.0, "1", "0"), Drawn((torch.ones(3), 1), 2, 4.0)]
    names, lengths, _ = rows(sample_grid(samples, "", ""))
    assert names == ["sample 7: label 1, predicted 0", "sample 2"]
    assert lengths == [5.0, 4.0]


def test_nothing_is_said_of_a_sample_that_is_not_known() -> None:
    image = torch.rand(1, 2, 2)
    samples = [Drawn(image, 0, 2.0, "cat", "dog"), Drawn(image, 1, 1.0, "cat", "cat"), Drawn(image, 2, 0.5)]
    places = sample_grid([*samples, Drawn(image, 3, 0.25, None, "dog")], "", "").axes
    assert [axes.get_xlabel() for axes in places] == [
        "label cat\npredicted dog",
        "label cat\npredicted cat",
        "",
        "predicted dog",
    ]
    assert [axes.xaxis.label.get_color() == INK for axes in places] == [False, True, True, True]


def test_of_very_many_the_largest_are_drawn_in_their_order() -> None:
    values = torch.rand(200, generator=torch.Generator().manual_seed(0)).tolist()
    values[3] = math.nan
    figure = bars(values, [f"class {k}" for k in range(200)], "κ of each class", "data")
    names, lengths, _ = rows(figure)
    kept = sorted(sorted(range(200), key=lambda k: -1 if math.isnan(values[k]) else values[k])[-60:])
    assert names == [f"class {k}" for k in kept]
    assert lengths == [values[k] for k in kept]
    assert figure.get_suptitle() == "κ of each class: the 60 largest of 200\ndata"
    drawn = [Drawn(torch.rand(1, 2, 2), k, 1.0) for k in range(50)]
    figure = sample_grid(drawn, "The sharpest samples", "data")
    assert len(figure.axes) == 36
    assert figure.get_suptitle() == "The sharpest samples: 36 of 50\ndata"


def test_names_may_come_twice_and_a_class_may_have_no_sample() -> None:
    names, lengths, written = rows(bars([1.0, math.nan, -3.0], ["crane", "crane", "owl"], "", "", errors=[0.25, 0, 0]))
    assert names == ["crane", "crane", "owl"]
    assert (lengths[0], lengths[2]) == (1.0, -3.0)
    assert written == ["1 ± 0.2", "none seen", "-3"]


def test_outputs_have_their_names_as_long_as_they_can_be_read() -> None:
    axes = heat_map(torch.eye(3), ["cat", "dog", "owl"], "", "").axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "dog", "owl"]
    for names in (None, [f"name {k}" for k in range(30)]):
        axes = heat_map(torch.eye(30), names, "", "").axes[0]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("output", "output")
        assert not any("name" in label.get_text() for label in axes.get_yticklabels())
    heat_map(torch.zeros(2, 2), None, "", "").savefig("/dev/null", format="png")  # nothing to tell apart


def test_users_settings_do_not_show_and_are_left_as_they_were() -> None:
    theirs: Any = {"axes.facecolor": "black", "text.color": "red", "font.size": 30, "figure.dpi": 20}
    with mpl.rc_context(theirs):
        before = dict(mpl.rcParams)
        figures = [
            bars([1.0], ["a"], "title", "data"),
            heat_map(torch.eye(2), None, "title", "data"),
            curve_of_gaps([(0, 0.1, 3.0), (1, 0.2, 2.0)], "title", "data", gap="b − a", flatness="κ"),
            sample_grid([Drawn(torch.rand(1, 2, 2), 0, 1.0)], "title", "data"),
        ]
        assert dict(mpl.rcParams) == before
    for figure in figures:
        assert figure.dpi == 150
        assert to_rgb(figure.axes[0].get_facecolor()) == to_rgb(figure.get_facecolor()) == (1, 1, 1)
        [title] = [text for text in figure.texts if text.get_text() == "title\ndata"]
        assert title.get_color() == INK
        assert title.get_fontsize() == 11
        assert 540 <= figure.get_figwidth() * figure.dpi <= 750  # pixels: a page's or a column's width


def test_a_style_is_left_where_drawing_fails() -> None:
    before = dict(mpl.rcParams)
    with pytest.raises(ValueError, match="positive"), styled():
        new_figure(1, -1)
    assert dict(mpl.rcParams) == before


def linear(colour: str) -> torch.Tensor:
    """Return a colour's light: red, green and blue."""
    value = torch.tensor(to_rgb(colour), dtype=torch.float64)
    return torch.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def luminance(colour: str) -> float:
    return float(linear(colour) @ torch.tensor([0.2126, 0.7152, 0.0722], dtype=torch.float64))


# What is left of the light for those without one kind of cones: Viénot, Brettel and Mollon, Color Res. Appl. 24 (1999),
# and for the third kind Machado, Oliveira and Fernandes, IEEE TVCG 15 (2009).
SEEN = {
    "all cones": torch.eye(3, dtype=torch.float64),
    "no red": torch.tensor([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]).double(),
    "no green": torch.tensor([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]).double(),
    "no blue": torch.tensor(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]]
    ).double(),
}
TO_XYZ = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]).double()


def lab(colour: str, seen: torch.Tensor) -> torch.Tensor:
    """Return a colour's place in CIE L*a*b*."""
    xyz = TO_XYZ @ (seen @ linear(colour)).clamp(0, 1) / torch.tensor([0.9505, 1.0, 1.089]).double()
    x, y, z = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-9) ** (1 / 3), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eyes", SEEN)
def test_colours_are_told_apart(eyes: str) -> None:
    """A difference of 10 is seen at a glance; of 2.3 just so."""
    for one, other in itertools.combinations((*COLOURS, INK), 2):
        assert torch.dist(lab(one, SEEN[eyes]), lab(other, SEEN[eyes])) > 10, (one, other)


def test_letters_are_read_on_white_and_transparent_pictures_on_black_pages() -> None:
    """WCAG 2.1: 4.5 for letters, 3 for what is large."""
    for colour in (INK, DARK_ORANGE):
        assert 1.05 / (luminance(colour) + 0.05) > 4.5
        assert (luminance(colour) + 0.05) / (luminance("#0d1117") + 0.05) > 3


@pytest.mark.filterwarnings("ignore:There is no logger")
def test_no_callback_draws_anything_but_the_one_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    begin = Figure.__init__

    def noted(figure: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append(figure)
        begin(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "__init__", noted)
    monitors = [FlatnessMonitor(report=["classes", "neuron_pairs"]), LayersMonitor(), SharpestMonitor(2)]
    callbacks: list[Any] = [FAM(coefficient=0.1), MaxNorm("head", 1.0), *monitors]
    trainer = make_trainer(precision="64-true", callbacks=callbacks, max_epochs=2, default_root_dir=tmp_path)
    net = Net().double()
    trainer.fit(net, make_loader([4]), make_loader([4]))
    trainer.test(net, make_loader([4]), verbose=False)
    assert drawn == []
    trainer.callbacks.append(FlatnessFigures())  # type: ignore[attr-defined]  # set by Lightning's connector
    trainer.test(net, make_loader([4]), verbose=False)
    assert len(drawn) == 4
