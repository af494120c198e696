"""A report as pictures: error along the stages, difference against the K-norm weight, what quantising costs."""

import os
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np

from cufuse import plot as house
from cufuse.report import Report
from cufuse.report_quantised import Row

_MARKERS = "os^vD<>Phx*+"
_FLOOR = 1e-12  # a logarithmic axis has no zero
_APART = 0.1  # bytes between formats of one size


def plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the pictures into one file; its ending (.png, .svg, .pdf) decides the format.

    Left: root-mean-square error against the float64 oracle, stage by stage. Right: for every channel of a head its largest
    difference from the reference after the K norm, against the channel's K-norm weight. A third below where the report has
    quantised projections: the error of the last stage against the bytes of a weight.
    Raises ImportError, naming the extra, without matplotlib; OSError and ValueError as matplotlib does for the file.
    """
    figure = draw(report)
    figure.savefig(path, dpi=150)


def check_target(path: str | os.PathLike[str]) -> None:
    """The errors of ``plot`` that can be told beforehand: ImportError without matplotlib, ValueError for the name's ending."""
    known = house.figure()[0].canvas.get_supported_filetypes()
    ending = os.path.splitext(path)[1].removeprefix(".").lower()
    if ending not in known:
        raise ValueError(f"{os.fspath(path)} ends in {ending!r}; a plot's name ends in one of {', '.join(sorted(known))}")


def draw(report: Report) -> Any:
    """The pictures as a matplotlib Figure, for notebooks."""
    rows = [["stages", "norm"], ["quantising", "quantising"]] if report.quantisation else [["stages", "norm"]]
    figure, whole = house.figure(width=10.5, height=4.6 * len(rows))
    whole.remove()
    panels = figure.subplot_mosaic(rows)
    left, right = panels["stages"], panels["norm"]
    stages = list(report.recipes[report.reference].stages)
    groups = _alike(report, stages)
    for number, names in enumerate(groups):
        style = _style(number, len(groups))
        errors = [max(report.recipes[names[0]].stages[stage].rms_error, _FLOOR) for stage in stages]
        label = ", ".join(names)
        left.plot(stages, errors, linewidth=1, label=label, **style)
        if report.recipes[names[0]].worst is not None and names[0] in report.samples:
            weight, difference = np.abs(report.samples["k_norm_weight"]), report.samples[names[0]]
            shown = difference > 0
            right.plot(weight[shown], difference[shown], label=label, **(style | {"linestyle": ""}))
    left.set_yscale("log")
    right.set(xscale="log", yscale="log")
    house.label(left, "Error along the stages", y="RMS distance from the float64 oracle")
    left.tick_params(axis="x", rotation=35)
    labels = {"x": "|K-norm weight| of the channel", "y": f"largest |k_normed - {report.reference}|"}
    house.label(right, "What the K norm makes of a rounding", **labels)
    if groups:
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2, fontsize=8, frameon=False)
    if right.get_legend_handles_labels()[0]:
        right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.24), ncols=2, fontsize=8, frameon=False)
    if report.quantisation:
        _draw_quantisation(panels["quantising"], report.quantisation)
    figure.suptitle(f"{report.model}, layer {report.layer}, {report.tokens} tokens, {report.arch}", fontsize=11)
    return figure


def _style(number: int, count: int) -> dict[str, Any]:
    """Grey, marker and line of the number-th of ``count`` series: it reads without colour."""
    shade = str(np.linspace(0.0, 0.6, count)[number])
    return house.series(number) | {"color": shade, "marker": _MARKERS[number % len(_MARKERS)], "markersize": 5}


def _draw_quantisation(axes: Any, rows: Sequence[Row]) -> None:
    """Error of the last stage against the bytes of a weight, a line for each recipe; the counter-example in the accent."""
    stage = list(rows[0].stages)[-1]
    places = _places(rows)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.recipe if row.norms == "kept" else f"{row.recipe}, norm weights quantised too", []).append(row)
    for number, (label, points) in enumerate(groups.items()):
        ordered = sorted(points, key=lambda row: places[row.weights])
        errors = [max(row.stages[stage].rms_error, _FLOOR) for row in ordered]
        # hollow and each larger than the one before: where several agree, all can be seen
        style = _style(number, len(groups)) | {"markersize": 5 + 1.5 * number, "fillstyle": "none" if number else "full"}
        if points[0].norms != "kept":
            style["color"] = house.ACCENT
        axes.plot([places[row.weights] for row in ordered], errors, linewidth=1, label=label, **style)
    axes.set_yscale("log")
    house.label(axes, "What quantising costs", x="bytes a weight of the projections", y=f"RMS distance of {stage} from the oracle")
    axes.set_xticks(list(places.values()), [f"{row.weights}\n{row.bits / 8:.3g}" for row in _by_format(rows)])
    axes.set_xlim(left=0)
    axes.legend(loc="lower left", fontsize=8.5, framealpha=0.9, edgecolor="0.8")


def _by_format(rows: Sequence[Row]) -> list[Row]:
    """A row of each format, the smallest first."""
    return sorted({row.weights: row for row in rows}.values(), key=lambda row: row.bits)


def _places(rows: Sequence[Row]) -> dict[str, float]:
    """Where each format stands on the axis: at its bytes a weight, those of one size side by side around them."""
    found: dict[str, float] = {}
    for bits, same in groupby(_by_format(rows), key=lambda row: row.bits):
        names = [row.weights for row in same]
        for number, name in enumerate(names):
            found[name] = bits / 8 + _APART * (number - (len(names) - 1) / 2)
    return found


def _alike(report: Report, stages: list[str]) -> list[list[str]]:
    """Recipes whose stages all have the same numbers, together: one line, one entry in the legend."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, result in report.recipes.items():
        groups.setdefault(tuple(result.stages[stage] for stage in stages), []).append(name)
    return list(groups.values())
