"""Two runs of a whole model under two recipes: the first value that differs, how the difference grows, what the text becomes.

    model = cufuse.qwen3.synthetic()
    found = cufuse.trace.trace(model, [9, 7, 0, 7], 64, "torch", "late-rounding")
    print(found.first.name, found.first_token)

``Trace.to_json`` gives schema 1: ``model``, ``source``, ``synthetic``, ``reference``, ``recipe``, ``prompt``, ``first`` (name,
step, token, index, both values, number differing), ``first_rounded`` (the same, of values rounded to bfloat16), ``causes`` (the
recipes' statements), ``chain`` (name, reference, recipe), ``growth`` (a row for each layer), ``tokens`` (both), ``first_token``,
``logits`` there, ``texts``.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cufuse import named_recipes
from cufuse.bf16 import nearest, ulp_distance
from cufuse.checkpoint import AttentionLayer
from cufuse.emulation.cublas import AssumedSlicesWarning
from cufuse.explanation import Link, Worst, explain_worst
from cufuse.qwen3.decoder import Progress
from cufuse.qwen3.model import Generation, Qwen3
from cufuse.recipe import Recipe
from cufuse.report_block import LayerBlock

SCHEMA = 1

_FRONT = ("normalised", "q", "k", "v", "q_normed", "k_normed", "q_rotated", "k_rotated")

# the beginning of the recipe's lines that state a stage
_STATED = {
    "hidden": "residual", "attention_residual": "residual", "mlp_residual": "residual", "normalised": "norm:", "q": "projection",
    "k": "projection", "v": "projection", "q_normed": "head norm", "k_normed": "head norm", "q_rotated": "rotation",
    "k_rotated": "rotation", "scores": "attention: s ", "scaled_scores": "attention: s'", "masked_scores": "attention: s'",
    "weights": "attention: e", "attended": "attention: o", "attention_output": "output, gate", "mlp_normalised": "MLP's norm",
    "gate": "output, gate", "up": "output, gate", "activated": "MLP: a", "gated": "MLP: y", "down": "output, gate",
    "final_normalised": "MLP's norm", "logits": "output, gate",
}  # fmt: skip


@dataclass(frozen=True)
class Difference:
    """The first differing value of an intermediate: ``step`` 0 is the prompt, 1 the first decoded token, and so on.

    ``index`` is the place behind the token: (channel,), (head, channel) or (head, key).
    """

    name: str
    step: int
    token: int
    index: tuple[int, ...]
    reference: float
    recipe: float
    differing: int
    size: int

    @property
    def layer(self) -> int | None:
        """The layer, None behind the last one."""
        return int(self.name.split(".")[1]) if self.name.startswith("layers.") else None

    @property
    def operation(self) -> str:
        """The stage's name."""
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class Growth:
    """How far the two runs are apart in one intermediate of one layer, on the prompt, both rounded to bfloat16."""

    layer: int
    stage: str
    share: float
    median_ulp: float
    """Of the values that differ (0 where none does)."""
    max_ulp: int
    relative: float
    """Root mean square of the differences over that of the reference's values."""


@dataclass(frozen=True)
class Trace:
    """What ``trace`` found. ``first`` is None where every value of the prompt and of all decoded tokens is equal."""

    model: str
    source: str
    synthetic: bool
    reference: str
    recipe: str
    prompt: tuple[int, ...]
    first: Difference | None
    first_rounded: Difference | None
    causes: tuple[str, ...]
    chain: tuple[Link, ...]
    worst: Worst | None
    growth: tuple[Growth, ...]
    tokens: tuple[tuple[int, ...], tuple[int, ...]]
    first_token: int | None
    logits: tuple[tuple[str, int, float, float], ...] = ()
    """At the first differing token, for both choices: whose it is, the token, its logit under the reference and under the
    recipe."""
    texts: tuple[str, str] | None = field(default=None)

    def to_json(self) -> dict[str, Any]:
        """Schema 1, see the head of this module."""
        return {"schema": SCHEMA} | dataclasses.asdict(self)


def trace(
    model: Qwen3,
    token_ids: Sequence[int] | np.ndarray,
    n: int,
    reference: str | Recipe = "torch",
    recipe: str | Recipe = "late-rounding",
    *,
    tokenizer: Any = None,
    progress: Progress | None = None,
    known: "Run | None" = None,
) -> Trace:
    """Decode ``n`` tokens greedily under both recipes and compare every intermediate up to the first differing token.

    ``tokenizer`` is an object with ``decode(ids)``, for the texts. ``known``: the reference's run, as ``run`` gave it.
    Errors as ``Qwen3.generate``.
    """
    a, b = named_recipes.get(reference), named_recipes.get(recipe)

    def half(first: float) -> Progress | None:
        share = 1.0 if known is not None else 0.5
        name = b.name if first or known is not None else a.name
        return None if progress is None else lambda what, done: progress(f"{name}: {what}", first + done * share)

    expected = run(model, token_ids, n, a, half(0.0)) if known is None else known
    found = run(model, token_ids, n, b, half(0.0 if known is not None else 0.5))
    tokens = tuple(tuple(int(t) for t in one.generation.tokens) for one in (expected, found))
    parted = np.flatnonzero(expected.generation.tokens != found.generation.tokens)
    first_token = int(parted[0]) if parted.size else None
    # beyond the first differing token the two runs read other inputs
    steps = n if first_token is None else first_token + 1
    pairs = [(expected.steps[step], found.steps[step]) for step in range(steps)]
    first = next(_differences(pairs, exact=True), None)
    rounded = next(_differences(pairs, exact=False), None)
    worst = _explained(model, first, pairs, a, b)
    return Trace(
        model=model.config.name,
        source=model.weights.source,
        synthetic=model.weights.synthetic,
        reference=a.name,
        recipe=b.name,
        prompt=tuple(int(t) for t in np.asarray(token_ids)),
        first=first,
        first_rounded=rounded,
        causes=_causes(first, a, b),
        chain=_chain(first, pairs) if worst is None else worst.chain,
        worst=worst,
        growth=tuple(_growth(model, *pairs[0])),
        tokens=(tokens[0], tokens[1]),
        first_token=first_token,
        logits=_choices(first_token, expected.generation, found.generation, (a.name, b.name)),
        texts=None if tokenizer is None else (tokenizer.decode(list(tokens[0])), tokenizer.decode(list(tokens[1]))),
    )


@dataclass(frozen=True, eq=False)
class Run:
    """One recipe's tokens and logits, and the intermediates of each step."""

    generation: Generation
    steps: list[dict[str, np.ndarray]]


def run(
    model: Qwen3, token_ids: Sequence[int] | np.ndarray, n: int, recipe: str | Recipe, progress: Progress | None = None
) -> Run:
    """One recipe's half of a trace: ``n`` greedily decoded tokens after ``token_ids`` [T], with every intermediate of each step.

    Raises ValueError for ids of another shape; other errors as ``Qwen3.generate``.
    """
    ids = np.asarray(token_ids)
    if ids.ndim != 1:
        raise ValueError(f"token_ids have shape {ids.shape}; needed is [T], one prompt")
    steps: list[dict[str, np.ndarray]] = []
    generation = model.generate(ids, n, recipe=recipe, intermediates=steps, progress=progress)
    return Run(generation, steps)


def _differences(pairs: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]], exact: bool) -> Any:
    """Differences in the order of the computation: of the values themselves, or of their bfloat16."""
    for step, (expected, found) in enumerate(pairs):
        for name, value in expected.items():
            difference = first_difference(name, value, found[name], exact, step)
            if difference is not None:
                yield difference


def first_difference(name: str, expected: np.ndarray, found: np.ndarray, exact: bool, step: int = 0) -> Difference | None:
    """The first place [T, ...] where two arrays of one shape differ, in value (NaN equals NaN) or, if not exact, rounded."""
    a, b = ((x if exact else to_bfloat16(x)).astype(np.float32) for x in (expected, found))
    differ = (a != b) & ~(np.isnan(a) & np.isnan(b))
    count = int(np.count_nonzero(differ))
    if count == 0:
        return None
    place = tuple(int(i) for i in np.unravel_index(int(np.argmax(differ)), differ.shape))
    return Difference(name, step, place[0], place[1:], float(a[place]), float(b[place]), count, differ.size)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 rounded; bfloat16 as it is."""
    return nearest(np.ascontiguousarray(x)) if x.dtype == np.float32 else x


def _causes(first: Difference | None, a: Recipe, b: Recipe) -> tuple[str, ...]:
    """What the recipes state about the first differing stage, where it is not the same."""
    if first is None:
        return ()
    stated = _STATED[first.operation]
    lines = zip([*a.rounding_points(), *a.decoder_points()], [*b.rounding_points(), *b.decoder_points()], strict=True)
    pairs = [(x, y) for x, y in lines if x.startswith(stated) and x != y]
    if not pairs and a.packed_projections != b.packed_projections:
        return ("one has its projections packed, the other not: cuBLAS cuts their K otherwise",)
    return tuple(f"{a.name} states '{x}', {b.name} '{y}'" for x, y in pairs[:2])


def _chain(first: Difference | None, pairs: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]) -> tuple[Link, ...]:
    """The first differing value and those of the stages before it at the same token and channel, where they have one."""
    if first is None:
        return ()
    expected, found = pairs[first.step]
    names = list(expected)
    until = names.index(first.name)
    links = []
    for name in names[max(0, until - 6) : until + 1]:
        if expected[name].shape == expected[first.name].shape:
            place = (first.token, *first.index)
            links.append(Link(name, float(expected[name][place]), float(found[name][place])))
    return tuple(links)


def _explained(
    model: Qwen3, first: Difference | None, pairs: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]], a: Recipe, b: Recipe
) -> Worst | None:
    """The worst key element of the first differing layer, value by value, where the difference begins in front of the attention."""
    if first is None or first.step or first.layer is None or first.operation not in _FRONT:
        return None
    if first.layer and (a.norm.sum_order_after_residual or b.norm.sum_order_after_residual):
        return None
    expected, found = pairs[0]
    prefix, weights = f"layers.{first.layer}.", model.weights.layers[first.layer]
    hidden = to_bfloat16(expected[prefix + "hidden"])
    layer = AttentionLayer(
        index=first.layer, input_norm=weights.input_norm, q_proj=weights.q_proj, k_proj=weights.k_proj, v_proj=weights.v_proj,
        q_norm=weights.q_norm, k_norm=weights.k_norm, config=model.config, synthetic=model.weights.synthetic, source="",
    )  # fmt: skip
    block = LayerBlock(layer, hidden, True, 0, "cpu")
    stages = [{stage: one[prefix + stage] for stage in ("normalised", "k", "k_normed")} for one in (expected, found)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumedSlicesWarning)  # the decoder has said so already
        return explain_worst(block, a, b, stages[0], stages[1])


_GROWING = ("k", "k_normed", "attention_output", "mlp_residual")


def _growth(model: Qwen3, expected: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> list[Growth]:
    rows = []
    for layer in range(len(model.weights.layers)):
        for stage in _GROWING:
            a, b = (to_bfloat16(one[f"layers.{layer}.{stage}"]) for one in (expected, found))
            ulp = ulp_distance(a, b)
            wide = a.astype(np.float64)
            size = np.sqrt(np.mean(wide**2))
            gap = np.sqrt(np.mean((wide - b.astype(np.float64)) ** 2))
            median = float(np.median(ulp[ulp != 0])) if ulp.any() else 0.0
            relative = float(gap / size) if size > 0 and np.isfinite(gap / size) else 0.0
            rows.append(Growth(layer, stage, float(np.mean(ulp != 0)), median, int(ulp.max()), relative))
    return rows


def _choices(
    step: int | None, expected: Generation, found: Generation, names: tuple[str, str]
) -> tuple[tuple[str, int, float, float], ...]:
    if step is None:
        return ()
    rows = []
    for name, chosen in zip(names, (expected.tokens[step], found.tokens[step]), strict=True):
        a, b = (float(one.logits[step][chosen]) for one in (expected, found))
        rows.append((name, int(chosen), a, b))
    return tuple(rows)
