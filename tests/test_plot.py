"""The pictures' helpers: what they draw is what the casts say, files are small PNGs, and matplotlib is needed only for pictures."""

import io
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cufuse import plot

pytest.importorskip("matplotlib")


def test_bfloat16_between_is_every_code_of_the_interval() -> None:
    found = plot.bfloat16_between(-1.0, 2.0)
    # from the format's definition: 0, and (1 + f / 128) 2**e with the subnormals f / 128 2**-126 below
    magnitudes = {Fraction(f, 128) * Fraction(2) ** -126 for f in range(128)}
    magnitudes |= {(1 + Fraction(f, 128)) * Fraction(2) ** e for e in range(-126, 2) for f in range(128)}
    expected = {m for m in magnitudes if m <= 2} | {-m for m in magnitudes if m <= 1}
    assert [Fraction(value) for value in found.tolist()] == sorted(expected)


def test_bfloat16_between_reaches_the_largest_value() -> None:
    assert plot.bfloat16_between(3.3e38, np.inf)[-1] == float.fromhex("0x1.FEp127")
    assert len(plot.bfloat16_between(-np.inf, np.inf)) == 2 * 0x7F80 - 1
    with pytest.raises(ValueError, match="low is 2 and high is 1"):
        plot.bfloat16_between(2, 1)


@pytest.mark.parametrize(("mode", "end"), [("nearest_even", 1.0), ("up", 1.0078125), ("toward_zero", 1.0)])
def test_the_arrow_ends_at_the_rounded_value(mode: str, end: float) -> None:
    _, axes = plot.figure()
    plot.number_line(axes, 0.99, 1.02, [(1 + 2.0**-8, "tie")], mode=mode)
    arrows = [text.xy for text in axes.texts if text.arrow_patch is not None]
    assert [x for x, _ in arrows] == [end]
    assert "tie" in [text.get_text() for text in axes.texts]


def test_a_number_line_has_a_tick_for_every_value_and_few_labels() -> None:
    _, axes = plot.figure()
    plot.number_line(axes, 1.0, 2.0)
    ticks = [segment[0][0] for segment in axes.collections[0].get_segments()]
    assert ticks == [1 + f / 128 for f in range(129)]
    labels = [text.get_text() for text in axes.texts]
    assert len(labels) <= 9 and "2" in labels  # the roundest value is labelled
    with pytest.raises(ValueError, match="mode is 'sideways'"):
        plot.number_line(axes, 1.0, 2.0, [(1.5, "x")], mode="sideways")


def test_series_are_told_apart_without_colour() -> None:
    looks = [plot.series(number) for number in range(6)]
    assert len({(str(one["linestyle"]), one["marker"]) for one in looks}) == 6
    assert all(0 <= float(one["color"]) <= 0.7 for one in looks)


def test_the_accent_is_dark_in_grey() -> None:
    red, green, blue = (int(plot.ACCENT[place : place + 2], 16) / 255 for place in (1, 3, 5))
    assert 0.2 < 0.299 * red + 0.587 * green + 0.114 * blue < 0.4


def test_bars_say_their_numbers_and_stand_in_order_twice_on_shared_axes() -> None:
    _, grid = plot.figure(1, 2, sharey=True)
    for axes in grid:
        plot.bars(axes, {"first": 0.0, "second": 2.5}, form="{:.1f} %", accent=["first"])
    bottom, top = grid[0].get_ylim()
    assert bottom > top
    assert [text.get_text() for text in grid[1].texts] == ["0.0 %", "2.5 %"]
    assert [bar.get_width() for bar in grid[1].patches] == [0.0, 2.5]


def test_logarithmic_bars_begin_at_the_least() -> None:
    _, axes = plot.figure()
    plot.bars(axes, {"none": 0.0, "some": 10.0}, least=0.1)
    assert axes.get_xscale() == "log"
    assert [bar.get_x() + bar.get_width() for bar in axes.patches] == pytest.approx([0.1, 10.0])


def test_grey_maps_are_grey_and_written_readably() -> None:
    drawn, axes = plot.figure()
    plot.grey_map(axes, np.array([[0.0, 10.0]]), unit="%", numbers="{:.0f}")
    shades = axes.images[0].cmap(np.linspace(0, 1, 9))[:, :3]
    assert np.abs(shades - shades.mean(axis=1, keepdims=True)).max() < 0.01
    assert [(text.get_text(), text.get_color()) for text in axes.texts] == [("0", plot.INK), ("10", "white")]
    assert drawn.axes[1].get_ylabel() == "%"


def test_the_numbers_of_a_grey_map_stand_out_from_their_fields() -> None:
    _, axes = plot.figure()
    values = np.linspace(0.0, 100.0, 21)[None]
    plot.grey_map(axes, values, unit="%", numbers="{:.0f}")
    image = axes.images[0]
    for text, value in zip(axes.texts, values[0], strict=True):
        field = image.cmap(image.norm(value))[0]
        shade = 1.0 if text.get_color() == "white" else float(text.get_color())
        assert _contrast(shade, field) > 3.5, value


def _contrast(one: float, other: float) -> float:
    """Of two greys, as the Web Content Accessibility Guidelines define it (large text needs 3)."""
    light = [grey / 12.92 if grey <= 0.04045 else ((grey + 0.055) / 1.055) ** 2.4 for grey in (one, other)]
    return (max(light) + 0.05) / (min(light) + 0.05)


def test_logarithmic_grey_maps_give_equal_ratios_equal_steps() -> None:
    _, axes = plot.figure()
    plot.grey_map(axes, np.array([[0.0, 0.01, 0.1, 1.0]]), unit="|difference|", logarithmic=True)
    image = axes.images[0]
    assert [float(image.norm(value)) for value in (0.01, 0.1, 1.0)] == pytest.approx([0.0, 0.5, 1.0])
    assert image.cmap(image.norm(np.ma.masked_less_equal([0.0], 0.0)))[0, 3] == 0  # nothing is drawn: the paper's white


def test_pairs_stand_side_by_side_and_differ_without_colour() -> None:
    _, axes = plot.figure()
    plot.pairs(axes, ["a", "b"], {"one": [60.0, 0.2], "other": [70.0, 30.0]}, form="{:.0f} %", least=1.0)
    plot.label(axes, legend="upper right")
    bars = axes.patches
    assert [bar.get_height() for bar in bars] == [60.0, 0.2, 70.0, 30.0]
    ends = [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars]
    assert ends[0][1] <= ends[2][0] and ends[2][1] <= ends[1][0] and ends[1][1] <= ends[3][0]
    assert [bar.get_hatch() for bar in bars] == [None, None, "////", "////"]
    assert [text.get_text() for text in axes.texts] == ["60 %", "70 %", "30 %"]  # 0.2 is below the least
    assert [text.get_text() for text in axes.get_xticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["one", "other"]
    for values in ({"one": [1.0, 2.0]}, {"one": [1.0, 2.0], "other": [1.0]}):
        with pytest.raises(ValueError, match="needed are two, one number a name"):
            plot.pairs(axes, ["a", "b"], values)


def test_texts_mark_every_word_that_is_not_the_first_rows() -> None:
    from matplotlib.colors import to_hex

    _, axes = plot.figure()
    plot.texts(axes, {"first": [5, 6, 7], "second": [5, 8, 7, 9]})
    words = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    assert [words[place + 0.5, 0] for place in range(3)] == [("5", plot.INK), ("6", plot.INK), ("7", plot.INK)]
    # the fourth has no counterpart: another text too
    assert [words[place + 0.5, -1] for place in range(4)] == [("5", plot.INK), ("8", "white"), ("7", plot.INK), ("9", "white")]
    dark = [field.get_x() for field in axes.patches if to_hex(field.get_facecolor()) == plot.ACCENT]
    assert [int(x) for x in dark] == [1, 3]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["first", "second"]
    assert axes.get_xlim() == (0, 4)


def test_a_picture_is_a_small_png_with_a_description(tmp_path: Path) -> None:
    drawn, axes = plot.figure(width=4.0, height=2.0)
    plot.number_line(axes, 1.0, 1.05)
    plot.label(axes, "title", x="value", y="share, %")
    picture = plot.Picture(drawn, "ticks", dpi=50)
    assert repr(picture) == "Picture: ticks"
    png = picture._repr_png_()
    assert png.startswith(b"\x89PNG") and struct.unpack(">II", png[16:24]) == (200, 100)
    raw = io.BytesIO()
    drawn.savefig(raw, format="png", dpi=50)
    assert len(png) < 0.7 * len(raw.getvalue())
    picture.save(tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes() == png
    with pytest.raises(ValueError, match=r"ends in \.png"):
        picture.save(tmp_path / "p.svg")


def test_a_slider_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert plot.slider(lambda value: 10 * value, [1, 2, 3], "value", at=2) == 20  # stands still
    with pytest.raises(ValueError, match="at is 4; needed is one of the values, from 1 to 3"):
        plot.slider(print, [1, 2, 3], "value", at=4)


def test_a_slider_shows_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    widgets = SimpleNamespace(
        SelectionSlider=lambda **given: given, interactive=lambda draw, options, **named: (draw, options, named)
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    draw, options, named = plot.slider(lambda steps: 10 * steps, range(3), "count of steps", at=1)
    assert options == {"auto_display": True}
    (argument,) = named  # ipywidgets calls draw with the slider's value by this name
    assert draw(**{argument: 2}) == 20
    assert named[argument]["options"] == [0, 1, 2]
    assert named[argument]["value"] == 1
    assert named[argument]["description"] == "count of steps"


def test_without_matplotlib_the_error_names_the_extra() -> None:
    text = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "from cufuse import plot\n"
        "try:\n    plot.figure()\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert "cufuse[plot]" in done.stdout
