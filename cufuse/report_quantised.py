"""What quantising a layer's projections costs, on the scale of the roundings: the same stages, against the same float64 truth.

The truth is the oracle with the layer's own weights, before they were quantised. Each row is a recipe on weights in one format; the
norm weights stay as they are, but for the counter-example, which quantises them too.
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from cufuse import named_recipes
from cufuse.checkpoint import AttentionLayer
from cufuse.emulation.cublas import AssumedSlicesWarning
from cufuse.quantised import FORMATS, dequantise, formats, quantise, quantise_layer
from cufuse.report_block import LayerBlock
from cufuse.report_stages import Stage, compare

RECIPES: Final = ("torch", "block-scaled", "llama.cpp", "llama.cpp-q8_1")
"""The roads for quantised weights: decoded, integers in bfloat16, integers and float32 activations, integer dot products."""

_UNQUANTISED: Final = ("torch", "late-rounding", "llama.cpp")


@dataclass(frozen=True)
class Row:
    """One recipe on one format. ``weights`` names the format ("bfloat16": not quantised), ``bits`` counts those of a weight;
    ``norms`` says "kept", or the format of the norm weights in the counter-example. ``stages`` compares with "torch" on the
    unquantised weights, errors with the truth."""

    weights: str
    norms: str
    recipe: str
    bits: float
    stages: dict[str, Stage]


def rows(
    layer: AttentionLayer,
    hidden_states: np.ndarray,
    chosen: Sequence[str],
    *,
    arch: str = "sm_90",
    separate: bool = True,
    first_position: int = 0,
    progress: Callable[[str, float], None] | None = None,
) -> list[Row]:
    """The table for a layer with bfloat16 weights and the formats ``chosen``; "torch" on the unquantised weights comes first.

    Raises ValueError for an unknown format, or widths that are no multiple of its block.
    """
    kinds = [formats.get(name) for name in chosen]
    whole = LayerBlock(layer, hidden_states, separate, first_position, "cpu")
    truth = whole.oracle(0.0)
    plan: list[tuple[str, str, str, float, LayerBlock]] = [("bfloat16", "kept", name, 16.0, whole) for name in _UNQUANTISED]
    for form in kinds:
        block = LayerBlock(quantise_layer(layer, form.name), hidden_states, separate, first_position, "cpu")
        plan += [(form.name, "kept", name, form.bits, block) for name in RECIPES]
        spoilt, norm_format = _with_quantised_norms(layer, form.name)
        block = LayerBlock(quantise_layer(spoilt, form.name), hidden_states, separate, first_position, "cpu")
        plan.append((form.name, norm_format, "block-scaled", form.bits, block))
    reference: dict[str, np.ndarray] | None = None
    found = []
    for number, (weights, norms, name, bits, block) in enumerate(plan):
        if progress is not None:
            progress(f"{weights}, {name}", number / len(plan))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", AssumedSlicesWarning)  # the report's notes have it
            stages = block.run(named_recipes.get(name).on(arch))
        reference = stages if reference is None else reference
        compared = {stage: compare(value, reference[stage], truth[stage]) for stage, value in stages.items()}
        found.append(Row(weights, norms, name, bits, compared))
    return found


def _with_quantised_norms(layer: AttentionLayer, name: str) -> tuple[AttentionLayer, str]:
    """The counter-example: norm weights through a format of as many bits whose blocks are short enough for a head."""
    short = "Q4_0" if FORMATS[name].bits < 5 else "Q8_0"

    def spoil(weight: Any) -> Any:
        if weight is None or weight.shape[0] % FORMATS[short].values:
            return weight
        # float32: rounding what was decoded would be a second change
        return np.asarray(dequantise(quantise(weight[None], short))[0])

    norms = {field: spoil(getattr(layer, field)) for field in ("input_norm", "q_norm", "k_norm")}
    return dataclasses.replace(layer, **norms), short


def print_rows(table_rows: Sequence[Row], console: Console) -> None:
    """The table as a terminal shows it."""
    stages = [name for name in table_rows[0].stages if not name.startswith("q")]
    title = "Quantised projections: root-mean-square distance from the float64 oracle with the unquantised weights"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for column in ("projections", "norm weights", "recipe"):
        table.add_column(column)
    for column in ("bits a weight", *stages, "largest in " + stages[-1]):
        table.add_column(column, justify="right")
    for row in table_rows:
        errors = [f"{row.stages[name].rms_error:.1e}" for name in stages]
        largest = f"{row.stages[stages[-1]].max_abs_error:.3g}"
        style = "bold" if row.norms != "kept" else None
        table.add_row(row.weights, row.norms, row.recipe, f"{row.bits:g}", *errors, largest, style=style)
    console.print(table)
    spoilt = [row for row in table_rows if row.norms != "kept"]
    if spoilt:
        kept = {row.weights: row for row in table_rows if row.norms == "kept" and row.recipe == "block-scaled"}
        last = stages[-1]
        worst = max(spoilt, key=lambda row: row.stages[last].rms_error / kept[row.weights].stages[last].rms_error)
        factor = worst.stages[last].rms_error / kept[worst.weights].stages[last].rms_error
        console.print(
            f"Norm weights must not be quantised (bold, a counter-example): {worst.norms} norm weights make the error of {last} "
            f"{factor:.2g} times that of {worst.weights} projections alone.",
            highlight=False,
        )
