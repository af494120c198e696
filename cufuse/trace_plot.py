"""A trace as a picture: how the difference grows over the layers, and where the text changes."""

import os
from collections.abc import Sequence
from typing import Any

from cufuse.plot import figure as figure_and_axes
from cufuse.trace import Trace

_STAGE_MARKERS = {"k": "o", "k_normed": "^", "attention_output": "s", "mlp_residual": "D"}


def plot(traces: Sequence[Trace], path: str | os.PathLike[str]) -> None:
    """Write the picture; the name's ending (.png, .svg, .pdf) decides the format. Errors as ``cufuse.report_plot.plot``."""
    draw(traces).savefig(path, dpi=150)


def draw(traces: Sequence[Trace]) -> Any:
    """One row of three pictures for each trace: share of differing values, their median distance in ulp, tokens equal or not."""
    size = {"width": 13.0, "height": 3.6 * len(traces) + 0.4}
    figure, grid = figure_and_axes(len(traces), 3, **size, squeeze=False, width_ratios=(2, 2, 3))
    for row, found in zip(grid, traces, strict=True):
        left, middle = (row[0], "share", "share of differing bfloat16"), (row[1], "median_ulp", "median distance of those, ulp")
        for axes, key, label in (left, middle):
            for number, (stage, marker) in enumerate(_STAGE_MARKERS.items()):
                points = [(one.layer, getattr(one, key)) for one in found.growth if one.stage == stage]
                if points:
                    style = {"marker": marker, "color": str(0.2 * number), "markersize": 4, "linewidth": 1}
                    axes.plot(*zip(*points, strict=True), label=stage, **style)
            axes.set(xlabel="layer", ylabel=label)
            axes.grid(True, color="0.9")
        row[1].set_yscale("symlog", linthresh=1)
        row[0].set_ylim(-0.02, 1.02)
        row[0].legend(fontsize=7)
        _draw_tokens(row[2], found)
    figure.suptitle(f"{traces[0].model}: what one rounding becomes, against {traces[0].reference}", fontsize=11)
    return figure


def _draw_tokens(axes: Any, found: Trace) -> None:
    """Both texts as steps of token ids."""
    steps = range(1, len(found.tokens[0]) + 1)
    for name, tokens, shade in zip((found.reference, found.recipe), found.tokens, ("0.6", "0"), strict=True):
        axes.plot(steps, tokens, linewidth=0.8, marker=".", markersize=4, label=name, color=shade)
    if found.first_token is not None:
        axes.axvline(found.first_token + 1, color="0.4", linestyle="--", linewidth=1)
        axes.set_title(f"the text changes at new token {found.first_token + 1}", fontsize=9)
    else:
        axes.set_title("the same text", fontsize=9)
    axes.set(xlabel="new token", ylabel="token id")
    axes.legend(fontsize=7)
