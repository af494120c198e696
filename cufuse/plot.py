"""Pictures for notebooks, in one style: ink on white, one accent that is dark in grey too, labels with units, no rainbow.

Needs the extra ``plot`` (matplotlib). A picture is begun with ``figure``, filled with matplotlib's own methods and those of this
module, labelled with ``label``, and shown as the last expression of a cell through ``Picture``, which makes small PNG files::

    drawn, axes = plot.figure()
    plot.number_line(axes, 1.0, 1.04, [(1.005, "x")])
    plot.label(axes, "bfloat16 values around 1", x="value")
    plot.Picture(drawn, "ticks 0.0078 apart, and x between two of them")
"""

import importlib
import importlib.util
import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from cufuse.bf16 import from_bits, round_to_bf16

INK: Final = "0.1"
FAINT: Final = "0.72"
ACCENT: Final = "#a8321a"
"""Of luminance 0.3: as dark as ink in grey, apart from it in colour. For the one thing that a picture is about."""

_INFINITY: Final = 0x7F80  # the code behind the largest finite bfloat16
_COLOURS: Final = 48  # of a saved palette: grey levels and tints of the accent need no more
_SHADES: Final = ("0.1", "0.45", "0.65", "0.1", "0.45", "0.25")
_MARKERS: Final = "os^Dvx"
_LINES: Final = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))


def figure(rows: int = 1, columns: int = 1, *, width: float = 9.0, height: float = 3.2, **options: Any) -> tuple[Any, Any]:
    """A matplotlib Figure and its axes: one Axes, or an array of them as ``Figure.subplots`` gives it.

    width, height : inches; 9 inches are 900 pixels, the width of a notebook's text.
    options : for ``Figure.subplots``, such as sharex, width_ratios, squeeze.

    Raises ImportError, naming the extra, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib; install it with pip install 'cufuse[plot]'") from error
    drawn = Figure(figsize=(width, height), layout="constrained")
    return drawn, drawn.subplots(rows, columns, **options)


def series(number: int) -> dict[str, Any]:
    """Shade, marker and line of the number-th of several series, so that they are told apart without colour."""
    return {"color": _SHADES[number % 6], "marker": _MARKERS[number % 6], "linestyle": _LINES[number % 6], "markersize": 4}


def label(axes: Any, title: str = "", *, x: str = "", y: str = "", grid: str = "both", legend: str | None = None) -> None:
    """Title, axis labels (with their units), a faint grid behind ("x", "y", "both", or "" for none), and a legend at ``legend``
    (a matplotlib location such as "upper left")."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(True, axis=grid, which="major", color="0.9", linewidth=0.7)
    if legend is not None:
        axes.legend(loc=legend, fontsize=8.5, framealpha=0.9, edgecolor="0.8")


def bfloat16_between(low: float, high: float) -> np.ndarray:
    """All finite bfloat16 values v with low <= v <= high, ascending, as float64 [count]; -0 and +0 are one zero.

    Raises ValueError unless low < high.
    """
    if not low < high:
        raise ValueError(f"low is {low} and high is {high}; needed is low < high")
    magnitudes = from_bits(np.arange(_INFINITY, dtype=np.uint16)).astype(np.float64)
    every = np.unique(np.concatenate([-magnitudes, magnitudes]))
    return every[(every >= low) & (every <= high)]


def number_line(
    axes: Any,
    low: float,
    high: float,
    marks: Sequence[tuple[float, str]] = (),
    *,
    mode: str = "nearest_even",
    middles: bool = False,
    form: str = "{:.7g}",
) -> None:
    """The number line from low to high: a tick for every bfloat16 value, and an arrow from every mark to what it becomes.

    Parameters
    ----------
    axes : matplotlib Axes, taken for nothing else.
    marks : (value, name): drawn one above the other, each with an arrow to ``round_to_bf16(value, mode=mode)``.
    mode : a rounding mode of ``cufuse.round_to_bf16``, but not "stochastic".
    middles : also the middles between neighbours, where ties are, as short ticks.
    form : how values are written under the ticks; "" writes none. No more than nine are written.

    Raises ValueError for an unknown mode and unless low < high.
    """
    values = bfloat16_between(low, high)
    axes.axhline(0, color=INK, linewidth=1)
    axes.vlines(values, -0.25, 0.25, color=INK, linewidth=1.2)
    if middles:
        axes.vlines((values[1:] + values[:-1]) / 2, -0.12, 0.12, color="0.55", linewidth=1)
    every = max(1, -(-len(values) // 9))
    codes = np.abs(values).astype(np.float32).view(np.uint32) | np.uint32(1 << 31)
    roundest = int(np.argmax(codes & (~codes + np.uint32(1)))) if len(values) else 0  # most zero bits at the end
    for value in values[roundest % every :: every] if form else ():
        axes.annotate(form.format(value), (value, -0.3), ha="center", va="top", fontsize=8.5, color=INK)
    for place, (value, name) in enumerate(marks):
        height = 0.75 + 0.62 * place
        rounded = float(round_to_bf16(np.float64(value), mode=mode))
        axes.plot([value, value], [0, height], color=ACCENT, linewidth=0.8, linestyle=":")
        axes.plot([value], [height], "o", color=ACCENT, markersize=5)
        arrow = {"arrowstyle": "-|>", "color": ACCENT, "linewidth": 1.3, "shrinkA": 4, "shrinkB": 0}
        axes.annotate("", (rounded, 0.27), (value, height), arrowprops=arrow)
        axes.annotate(
            name, (value, height), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=9, color=ACCENT,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip
    axes.set(xlim=(low, high), ylim=(-0.75, 1.15 + 0.62 * max(len(marks) - 1, 0 if marks else -1)))
    axes.set_yticks([])
    axes.spines[["left", "right", "top", "bottom"]].set_visible(False)
    axes.set_xticks([])


def bars(axes: Any, values: Mapping[str, float], *, form: str = "{:.3g}", accent: Sequence[str] = (), least: float = 0.0) -> None:
    """Horizontal bars, the first on top, each with its number behind it; those named in ``accent`` in the accent.

    form : how a number is written, such as "{:.1f} %".
    least : where the axis begins; with a value above zero it is logarithmic, and a bar of zero has no length.
    """
    names, numbers = list(values), list(values.values())
    places = range(len(names))
    colours = [ACCENT if name in accent else "0.5" for name in names]
    axes.barh(places, [max(number, least) - least for number in numbers], left=least, color=colours, height=0.62)
    for place, number in enumerate(numbers):
        at = (max(number, least), place)
        axes.annotate(form.format(number), at, xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(places, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    if least > 0:
        axes.set_xscale("log")
        axes.set_xlim(left=least)
    axes.margins(x=0.18)


def pairs(axes: Any, names: Sequence[str], values: Mapping[str, Sequence[float]], *, form: str = "", least: float = 0.0) -> None:
    """Two upright bars over every name: the first series filled, the second hatched in the accent, for a legend by their names.

    names : what stands below, one for each value.
    values : two series by name, each as long as ``names``.
    form : how a number is written over its bar, such as "{:.0f} %"; "" writes none.
    least : no number is written over bars below it.

    Raises ValueError for another number of series, or of values.
    """
    lengths = [len(numbers) for numbers in values.values()]
    if lengths != [len(names)] * 2:
        raise ValueError(f"values has series of {lengths} numbers for {len(names)} names; needed are two, one number a name")
    styles = ({"color": "0.25"}, {"facecolor": "white", "edgecolor": ACCENT, "hatch": "////"})
    for side, style, (name, numbers) in zip((-0.2, 0.2), styles, values.items(), strict=True):
        axes.bar(np.arange(len(names)) + side, numbers, 0.38, label=name, **style)
        for place, number in enumerate(numbers):
            if form and number >= least:
                at = (place + side, number)
                axes.annotate(form.format(number), at, xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8.5)
    axes.set_xticks(range(len(names)), names)
    axes.margins(y=0.12)


def texts(axes: Any, rows: Mapping[str, Sequence[Any]]) -> None:
    """Texts as rows of fields, the first on top, place by place: a field that is not the first row's is filled with the accent.

    rows : name -> words or token ids; rows may end early. Up to thirty of four characters can be read in a picture 9 inches wide.
    """
    names = list(rows)
    first = list(rows[names[0]])
    for line, name in enumerate(names):
        for place, word in enumerate(rows[name]):
            equal = place < len(first) and word == first[place]
            axes.add_patch(box(place + 0.04, -line - 0.4, "0.92" if equal else ACCENT, width=0.92, height=0.8, linewidth=0))
            colour = INK if equal else "white"
            axes.annotate(str(word), (place + 0.5, -line), ha="center", va="center", fontsize=8.5, color=colour)
    axes.set(xlim=(0, max(len(row) for row in rows.values())), ylim=(0.5 - len(names), 0.5))
    axes.set_yticks([-line for line in range(len(names))], names, fontsize=9)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[["left", "right", "top", "bottom"]].set_visible(False)


def grey_map(axes: Any, values: np.ndarray, *, unit: str, numbers: str = "", logarithmic: bool = False) -> None:
    """A matrix [rows, columns] as grey fields, white for the least and black for the most, with a bar that says what a grey is.

    unit : what the values are, written beside the bar.
    numbers : how to write every value into its field, such as "{:.0f}"; "" writes none.
    logarithmic : equal ratios are equal steps of grey; zeros, which have no place there, stay white.
    """
    norm = "log" if logarithmic else None
    image = axes.imshow(values, cmap="Greys", aspect="auto", interpolation="nearest", norm=norm)
    bar = axes.figure.colorbar(image, ax=axes, pad=0.015)
    bar.set_label(unit, fontsize=9)
    bar.ax.tick_params(labelsize=8.5)
    if numbers:
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if image.norm(value) > 0.6 else INK
            axes.annotate(numbers.format(value), (column, row), ha="center", va="center", fontsize=8.5, color=colour)


def box(x: float, y: float, shade: Any = "white", *, width: float = 1.0, height: float = 1.0, **style: Any) -> Any:
    """A matplotlib Rectangle with its lower left corner at (x, y), for ``axes.add_patch``: one bit, or one field, of a number."""
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, **({"facecolor": shade, "edgecolor": "0.35", "linewidth": 0.8} | style))


class Picture:
    """A finished figure as a notebook shows it: a PNG with a palette, a few times smaller than matplotlib's.

    ``repr`` is the description, for readers without the picture.
    """

    def __init__(self, figure: Any, description: str, *, dpi: int = 100) -> None:
        """figure : matplotlib Figure; description : one sentence of what is to be seen; dpi : pixels an inch."""
        self.figure, self.description, self.dpi = figure, description, dpi
        self._bytes = b""

    def __repr__(self) -> str:
        return f"Picture: {self.description}"

    def _repr_png_(self) -> bytes:
        return self.png()

    def png(self) -> bytes:
        """The bytes of the PNG file, drawn once: a second drawing of the same figure may lie a pixel elsewhere."""
        if not self._bytes:
            self._bytes = self._drawn()
        return self._bytes

    def _drawn(self) -> bytes:
        from PIL import Image

        raw, small = io.BytesIO(), io.BytesIO()
        self.figure.savefig(raw, format="png", dpi=self.dpi)
        image = Image.open(raw).convert("RGB").quantize(_COLOURS, dither=Image.Dither.NONE)
        image.save(small, format="PNG", optimize=True)
        return small.getvalue()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the PNG file. Raises ValueError where the name ends otherwise, OSError as ``open`` does."""
        if not os.fspath(path).lower().endswith(".png"):
            raise ValueError(f"path is {os.fspath(path)!r}; needed is a name that ends in .png")
        with open(path, "wb") as file:
            file.write(self.png())


def slider(draw: Callable[[Any], Any], values: Sequence[Any], name: str, *, at: Any) -> Any:
    """A slider over ``values`` that shows ``draw(value)``, where ipywidgets is installed; elsewhere ``draw(at)``, standing still.

    draw : gives what a cell can show, such as a ``Picture``.
    name : what the values are, written before the slider.
    at : the value at which the slider begins, one of ``values``.

    Raises ValueError where ``at`` is none of the values. As the last expression of a cell, either is shown.
    """
    choices = list(values)
    if at not in choices:
        raise ValueError(f"at is {at!r}; needed is one of the values, from {choices[0]!r} to {choices[-1]!r}")
    if importlib.util.find_spec("ipywidgets") is None:
        return draw(at)
    ipywidgets = importlib.import_module("ipywidgets")
    wide = {"style": {"description_width": "initial"}, "layout": {"width": "60%"}}
    chosen = ipywidgets.SelectionSlider(options=choices, value=at, description=name, continuous_update=False, **wide)
    return ipywidgets.interactive(lambda value: draw(value), {"auto_display": True}, value=chosen)
