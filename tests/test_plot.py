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
    assert plot.slider(print, [1, 2], "value") is None


def test_a_slider_shows_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    widgets = SimpleNamespace(
        SelectionSlider=lambda **given: given, interactive=lambda draw, options, **named: (draw, options, named)
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "ipywidgets", widgets)
    draw, options, named = plot.slider(print, range(3), "count")
    assert draw is print and options == {"auto_display": True}
    assert named["count"]["options"] == [0, 1, 2]


def test_without_matplotlib_the_error_names_the_extra() -> None:
    text = (
        "import sys; sys.modules['matplotlib'] = None; sys.modules['matplotlib.figure'] = None\n"
        "from cufuse import plot\n"
        "try:\n    plot.figure()\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert "cufuse[plot]" in done.stdout
