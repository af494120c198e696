"""The analysis of one attention layer under every recipe: where they part, by how much, and which rounding did it.

``analyse`` returns a ``Report``, a plain dataclass; ``Report.to_json`` is its documented form (schema 1), ``cufuse.report_text``
prints it and ``cufuse.report_plot`` draws it. ``cufuse report`` is the same from the command line.
"""

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cufuse import named_recipes, qkv
from cufuse.bf16 import to_bits
from cufuse.checkpoint import AttentionLayer
from cufuse.emulation import cublas
from cufuse.emulation.cublas import AssumedSlicesWarning
from cufuse.explanation import Worst, explain_worst
from cufuse.quantised.gguf_checkpoint import QuantisedLayer
from cufuse.recipe import Recipe
from cufuse.report_block import LayerBlock
from cufuse.report_quantised import Row
from cufuse.report_stages import Stage, as_bfloat16, compare

SCHEMA = 1

OPTIONS = {
    "PyTorch path": "torch",
    "fused kernel, late rounding": "late-rounding",
    "option 1: PyTorch's rounding points, one call": "torch",
    "option 2: float32 throughout": "float32",
    "option 3: K norm apart": "separate-k-norm",
}
"""The rows of the rounding study that cufuse grew from, and the recipe of each."""


@dataclass(frozen=True)
class RecipeResult:
    """A recipe's stages; ``amplification`` is the largest difference after the K norm over that before it (None: no
    difference before); ``worst`` explains the largest difference of the last key stage (None: there is none)."""

    stages: dict[str, Stage]
    amplification: float | None
    worst: Worst | None


@dataclass(frozen=True)
class Option:
    """A row of the study's table: what becomes of k before and after its norm, against the PyTorch path."""

    recipe: str
    k: Stage
    k_normed: Stage | None
    amplification: float | None
    all_bits_equal: bool


@dataclass(frozen=True)
class Report:
    """One layer under every recipe. Fields as in the JSON form (``to_json``)."""

    model: str
    layer: int
    tokens: int
    reference: str
    arch: str
    form: str
    synthetic: bool
    max_k_norm_weight: float | None
    recipes: dict[str, RecipeResult]
    options: dict[str, Option]
    notes: tuple[str, ...]
    quantisation: tuple[Row, ...] = ()
    """Rows of ``cufuse.report_quantised``, where asked for."""
    samples: dict[str, np.ndarray] = dataclasses.field(repr=False, compare=False, default_factory=dict)
    """For plots: "k_norm_weight" [D] and, per recipe, the largest difference of "k_normed" in every channel [D]."""

    def to_json(self) -> dict[str, Any]:
        """The documented form, schema 1: model, layer, tokens, reference, arch, form, synthetic, max_k_norm_weight, notes,
        ``recipes: {name: {"stages": {stage: {...}}, "amplification", "worst"}}``, ``options``: the fields of the dataclasses,
        and ``quantisation`` where it was asked for.
        NaN and infinities, which JSON lacks, are None."""
        content = dataclasses.asdict(dataclasses.replace(self, samples={}))
        del content["samples"]
        if not self.quantisation:
            del content["quantisation"]
        return {"schema": SCHEMA, **_without_nan(content)}


def analyse(
    layer: AttentionLayer,
    hidden_states: np.ndarray,
    *,
    recipes: Sequence[str | Recipe] | None = None,
    reference: str | Recipe = "torch",
    arch: str = "sm_90",
    separate: bool = True,
    first_position: int = 0,
    device: str = "cpu",
    notes: Sequence[str] = (),
    progress: Callable[[str, float], None] | None = None,
) -> Report:
    """Run a layer's norm, projections, head norms and rotation under each recipe and compare.

    Parameters
    ----------
    layer : its attention weights (``cufuse.checkpoint`` or ``cufuse.synthetic``).
    hidden_states : [T, K] bfloat16, the layer's input.
    recipes : names or Recipes; None takes all named ones. The reference is always among the results.
    reference : what the others are compared with.
    arch : the tensor core of all recipes ("sm_80" for an A100, "sm_90" for an H100 or H200, ...).
    separate : q, k and v projected separately, as Hugging Face does, or from one packed weight.
    first_position : position of the first token, for the rotation.
    device : "cpu" for the emulation; "gpu" for the kernels on CuPy's current device, whose every bit is then compared with the
        emulation's and the count put into the notes. ``arch`` must be that GPU's.
    notes : remarks of the caller on the input, kept in the report.
    progress : called with a recipe's name and the fraction done.

    Raises TypeError and ValueError as the operations do, and ValueError for no tokens.
    """
    if not isinstance(hidden_states, np.ndarray):
        raise TypeError(f"hidden_states is a {type(hidden_states).__name__}; needed is a NumPy array [T, K]")
    if hidden_states.ndim != 2 or hidden_states.size == 0:
        raise ValueError(f"hidden_states has shape {hidden_states.shape}; needed is [T, K] with one token or more")
    chosen = _chosen(recipes, reference, arch, isinstance(layer, QuantisedLayer))
    reference_name = named_recipes.get(reference).name
    gpu = _gpu(device, arch)
    block = LayerBlock(layer, hidden_states, separate, first_position, device)
    by_name = {recipe.name: recipe for recipe in chosen}
    found: dict[str, dict[str, np.ndarray]] = {}
    results = {}
    with _assumptions() as assumed:
        for number, recipe in enumerate(chosen):
            if progress is not None:
                progress(recipe.name, number / len(chosen))
            found[recipe.name] = block.run(recipe)
        if progress is not None:
            progress("oracle", 1.0)
        truths = {offset: block.oracle(offset) for offset in {recipe.norm.weight_offset for recipe in chosen}}
        expected = found[reference_name]
        for name, stages in found.items():
            truth = truths[by_name[name].norm.weight_offset]
            compared = {stage: compare(stages[stage], expected[stage], truth[stage]) for stage in stages}
            worst = None
            if name != reference_name:
                worst = explain_worst(block, by_name[reference_name], by_name[name], expected, stages)
            results[name] = RecipeResult(compared, _amplification(compared), worst)
        options = _options(block, by_name, found, truths)
    return Report(
        model=layer.config.name,
        layer=layer.index,
        tokens=len(hidden_states),
        reference=reference_name,
        arch=arch,
        form="separate" if separate else "packed",
        synthetic=layer.synthetic,
        max_k_norm_weight=None if layer.k_norm is None else float(np.abs(layer.k_norm.astype(np.float32)).max()),
        recipes=results,
        options=options,
        notes=(*notes, *block.notes, *_notes(layer, arch, chosen, assumed), *_agreement(block, gpu)),
        samples=_samples(layer, found, reference_name),
    )


@contextlib.contextmanager
def _assumptions() -> Iterator[list[str]]:
    """What AssumedSlicesWarning says in here, for the notes; other warnings go on to the caller."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AssumedSlicesWarning)
        yield messages
    for one in caught:
        if one.category is AssumedSlicesWarning:
            messages.append(str(one.message))
        else:
            warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _without_nan(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _chosen(recipes: Sequence[str | Recipe] | None, reference: str | Recipe, arch: str, quantised: bool) -> list[Recipe]:
    wanted = [named_recipes.get(one) for one in (_all_named(quantised) if recipes is None else recipes)]
    first = named_recipes.get(reference)
    ordered = [first] + [one for one in wanted if one.name != first.name]
    return [one.on(arch) for one in {one.name: one for one in ordered}.values()]


def _all_named(quantised: bool) -> list[str]:
    """Without those that are another one as long as no weight is quantised."""
    return [name for name in named_recipes.RECIPES if quantised or name not in named_recipes.QUANTISED_ONLY]


def _amplification(stages: dict[str, Stage]) -> float | None:
    if "k_normed" not in stages or stages["k"].max_abs_diff == 0:
        return None
    return stages["k_normed"].max_abs_diff / stages["k"].max_abs_diff


def _options(
    block: LayerBlock,
    recipes: dict[str, Recipe],
    found: dict[str, dict[str, np.ndarray]],
    truths: dict[float, dict[str, np.ndarray]],
) -> dict[str, Option]:
    """The study's table, where its recipes are among those asked for. Option 1 is run once more, in one call."""
    table = {}
    for title, name in OPTIONS.items():
        if name not in found or "torch" not in found:
            continue
        path, truth = found["torch"], truths[recipes[name].norm.weight_offset]
        stages = {stage: compare(found[name][stage], path[stage], truth[stage]) for stage in path}
        equal = all(stage.mismatches == 0 for stage in stages.values())
        if "one call" in title:
            last = [next(path[stage] for stage in order if stage in path) for order in qkv.LAST_STAGES]
            outputs = block.one_call(recipes[name])
            equal = all((to_bits(a) == to_bits(b)).all() for a, b in zip(outputs, last, strict=True))
        table[title] = Option(name, stages["k"], stages.get("k_normed"), _amplification(stages), equal)
    return table


def _gpu(device: str, arch: str) -> str:
    """The name of the GPU to run on, "" for none; ValueError where ``arch`` is not its own."""
    if device == "cpu":
        return ""
    if device != "gpu":
        raise ValueError(f"device is {device!r}; needed is 'cpu' or 'gpu'")
    from cufuse import launch

    own = f"sm_{launch.capability(launch.current_device())}"
    if arch != own:
        raise ValueError(f"arch is {arch}, but this GPU is {own}; give arch {own}, or device cpu to emulate {arch}")
    return launch.device_name(launch.current_device())


def _agreement(block: LayerBlock, gpu: str) -> tuple[str, ...]:
    if not gpu:
        return ()
    return (f"Computed by the kernels on {gpu}: of {block.compared:,} outputs {block.differing:,} differ from the emulation.",)


def _notes(layer: AttentionLayer, arch: str, recipes: list[Recipe], assumed: list[str]) -> tuple[str, ...]:
    notes = []
    if layer.synthetic:
        notes.append("The weights are synthetic: shapes and the largest K-norm weights are Qwen3's, all else is made up.")
    notes += [
        f"{recipe.name} multiplies by weight + {recipe.norm.weight_offset:g}, another formula than {recipes[0].name}: what differs "
        "there is not rounding alone."
        for recipe in recipes
        if recipe.norm.weight_offset != recipes[0].norm.weight_offset
    ]
    notes += list(dict.fromkeys(assumed))
    notes.append(
        f"Slices of K as recorded from cuBLASLt ({cublas.provenance()})."
        if arch == "sm_90"
        else f"Nothing was measured on {arch}: tensor core as published, rsqrt as on sm_90."
    )
    if layer.config.assumed:
        notes.append("Not stated in the file, assumed: " + ", ".join(layer.config.assumed) + ".")
    return tuple(notes)


def _samples(layer: AttentionLayer, found: dict[str, dict[str, np.ndarray]], reference: str) -> dict[str, np.ndarray]:
    if layer.k_norm is None:
        return {}
    expected = as_bfloat16(found[reference]["k_normed"]).astype(np.float32)
    samples = {"k_norm_weight": layer.k_norm.astype(np.float32)}
    for name, stages in found.items():
        difference = np.abs(as_bfloat16(stages["k_normed"]).astype(np.float32) - expected)
        samples[name] = difference.max(axis=(0, 1))
    return samples
