"""A report as two pictures: the error along the stages, and the difference against the K-norm weight."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from cufuse.plot import figure as figure_and_axes
from cufuse.report import Report
from cufuse.report_quantised import Row

_MARKERS = "os^vD<>Phx*+"
_FLOOR = 1e-12  # a logarithmic axis has no zero


def plot(report: Report, path: str | os.PathLike[str]) -> None:
    """Write the pictures into one file; its ending (.png, .svg, .pdf) decides the format.

    Left: root-mean-square error against the float64 oracle, stage by stage. Right: for every channel of a head its largest
    difference from the reference after the K norm, against the channel's K-norm weight. A third where the report has
    quantised projections: the error of the last stage against the bits of a weight.
    Raises ImportError, naming the extra, without matplotlib; OSError and ValueError as matplotlib does for the file.
    """
    figure = draw(report)
    figure.savefig(path, dpi=150)


def check_target(path: str | os.PathLike[str]) -> None:
    """The errors of ``plot`` that can be told beforehand: ImportError without matplotlib, ValueError for the name's ending."""
    known = figure_and_axes()[0].canvas.get_supported_filetypes()
    ending = os.path.splitext(path)[1].removeprefix(".").lower()
    if ending not in known:
        raise ValueError(f"{os.fspath(path)} ends in {ending!r}; a plot's name ends in one of {', '.join(sorted(known))}")


def draw(report: Report) -> Any:
    """The pictures as a matplotlib Figure, for notebooks."""
    panels = 3 if report.quantisation else 2
    figure, (left, right, *third) = figure_and_axes(1, panels, width=6.5 * panels, height=5.2)
    stages = list(report.recipes[report.reference].stages)
    groups = _alike(report, stages)
    # grey levels and markers, so that it reads without colour
    shades = np.linspace(0.0, 0.6, len(groups))
    for number, names in enumerate(groups):
        style = {"color": str(shades[number]), "marker": _MARKERS[number % len(_MARKERS)]}
        errors = [max(report.recipes[names[0]].stages[stage].rms_error, _FLOOR) for stage in stages]
        label = ", ".join(names)
        left.plot(stages, errors, linewidth=1, markersize=5, label=label, **style)
        if report.recipes[names[0]].worst is not None and names[0] in report.samples:
            weight, difference = np.abs(report.samples["k_norm_weight"]), report.samples[names[0]]
            shown = difference > 0
            right.scatter(weight[shown], difference[shown], s=14, label=label, **style)
    left.set(yscale="log", ylabel="RMS distance from the float64 oracle", title="Error along the stages")
    left.tick_params(axis="x", rotation=35)
    right.set(xscale="log", yscale="log", xlabel="|K-norm weight| of the channel")
    right.set(ylabel=f"largest |k_normed - {report.reference}|", title="What the K norm makes of a rounding")
    if third:
        _draw_quantisation(third[0], report.quantisation)
    for axes in (left, right, *third):
        axes.grid(True, which="major", color="0.9")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    figure.suptitle(f"{report.model}, layer {report.layer}, {report.tokens} tokens, {report.arch}", fontsize=11)
    return figure


def _draw_quantisation(axes: Any, rows: Sequence[Row]) -> None:
    """Error of the last stage against the bits of a weight, a line for each recipe; the counter-example apart."""
    stage = list(rows[0].stages)[-1]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.recipe if row.norms == "kept" else f"{row.recipe}, norm weights quantised too", []).append(row)
    shades = np.linspace(0.0, 0.6, len(groups))
    for number, (label, points) in enumerate(groups.items()):
        ordered = sorted(points, key=lambda row: row.bits)
        errors = [max(row.stages[stage].rms_error, _FLOOR) for row in ordered]
        style = {"color": str(shades[number]), "marker": _MARKERS[number % len(_MARKERS)], "markersize": 5}
        axes.plot([row.bits for row in ordered], errors, linewidth=1, label=label, **style)
    for row in {row.weights: row for row in rows}.values():
        axes.annotate(row.weights, (row.bits, row.stages[stage].rms_error), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes.set(yscale="log", xlabel="bits a weight of the projections", ylabel=f"RMS error of {stage}, against unquantised weights")
    axes.set(title="What quantising costs")


def _alike(report: Report, stages: list[str]) -> list[list[str]]:
    """Recipes whose stages all have the same numbers, together: one line, one entry in the legend."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, result in report.recipes.items():
        groups.setdefault(tuple(result.stages[stage] for stage in stages), []).append(name)
    return list(groups.values())
