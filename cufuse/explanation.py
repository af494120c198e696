"""The chain of values behind one key element under two recipes: which rounding or order made the difference."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cufuse import gemm, norm
from cufuse.bf16 import nearest
from cufuse.quantised.weight import QuantisedWeight, dequantise
from cufuse.recipe import Norm, Recipe
from cufuse.rope import rotate


class Block(Protocol):
    """What an explanation needs of a layer and its input: head counts, eps, projection weights, and inputs by name."""

    heads: Any
    eps: float
    weights: tuple[Any, ...]

    def given(self, recipe: Recipe) -> dict[str, Any]:
        """x and the norm weights, with the recipe's cos and sin."""


@dataclass(frozen=True)
class Link:
    """One value of the chain under the reference and under the recipe."""

    name: str
    reference: float
    recipe: float


@dataclass(frozen=True)
class Worst:
    """The element of ``stage`` where a recipe is farthest from the reference (on bfloat16).

    ``channel`` is its place in the head. ``chain`` holds every intermediate value in the order of the computation; of the input
    row the entry is shown whose change contributes most to this element. ``first_difference`` names the first link that
    differs (``stage`` where only entries not shown do), ``cause`` the recipes' statements there.
    """

    stage: str
    token: int
    head: int
    channel: int
    k_norm_weight: float | None
    difference: float
    first_difference: str
    cause: str
    chain: tuple[Link, ...]


def explain_worst(
    block: Block, reference: Recipe, recipe: Recipe, expected: dict[str, np.ndarray], stages: dict[str, np.ndarray]
) -> Worst | None:
    """The largest difference of the keys after their norm (before it where there is none), explained; None if none differs."""
    stage = "k_normed" if "k_normed" in stages else "k"
    difference = np.abs(_float64(expected[stage]) - _float64(stages[stage]))
    if not np.nanmax(difference, initial=0.0) > 0:
        return None
    token, head, channel = (int(i) for i in np.unravel_index(np.nanargmax(difference), difference.shape))
    weight = _key_weight(block, head)
    change = np.abs(_float64(expected["normalised"][token]) - _float64(stages["normalised"][token]))
    entry = int(np.argmax(change * np.abs(_float64(_values(weight)[channel]))))
    chains = [_chain(block, one, weight, (token, channel, entry)) for one in (reference, recipe)]
    links = [(point, Link(name, a, b)) for (point, name, a), (_, _, b) in zip(*chains, strict=True)]
    point, first = next(
        ((point, link.name) for point, link in links if link.reference != link.recipe), (_POINT_OF_STAGE[stage], stage)
    )
    k_norm = block.given(recipe)["k_norm_weight"]
    return Worst(
        stage=stage,
        token=token,
        head=head,
        channel=channel,
        k_norm_weight=None if k_norm is None else float(k_norm[channel]),
        difference=float(difference[token, head, channel]),
        first_difference=first,
        cause=_cause(point, reference, recipe),
        chain=tuple(link for _, link in links),
    )


# places in Recipe.rounding_points
_FACTOR, _NORMALISED, _WEIGHTED, _PRODUCT, _PROJECTED = 2, 3, 4, 5, 6
_HEAD_FACTOR, _HEAD_NORMALISED, _HEAD_WEIGHTED, _ROTATED = 8, 9, 10, 11
_POINT_OF_STAGE = {"k": _PROJECTED, "k_normed": _HEAD_WEIGHTED}

Chain = list[tuple[int, str, float]]


def _chain(block: Block, recipe: Recipe, weight: Any, place: tuple[int, int, int]) -> Chain:
    """Every intermediate value of one key element under one recipe, each with the rounding point that it belongs to."""
    token, channel, entry = place
    given = block.given(recipe)
    rows = given["x"].astype(np.float32)
    factor = norm.reciprocal_rms(rows, block.eps, recipe.norm)[token]
    chain: Chain = [(_FACTOR, "r of the token", float(factor))]
    names = ("x", "x*r", "y")
    chain += _norm_links(rows[token, entry], factor, given["norm_weight"][entry], recipe.norm, names, f"[{entry}]", _NORMALISED)

    normalised = norm.normalise(rows, given["norm_weight"], block.eps, recipe.norm)
    quantised = isinstance(weight, QuantisedWeight)
    slices = gemm.slices_of(len(rows), _projection_rows(block), rows.shape[1], recipe.gemm, quantised=quantised)
    accumulator = gemm.project(normalised, weight, dataclasses.replace(recipe.gemm, output="float32"), slices)[token]
    k = nearest(accumulator) if recipe.gemm.output == "bfloat16" else accumulator
    chain += [(_PRODUCT, "k, accumulated", float(accumulator[channel])), (_PROJECTED, "k, used", float(k[channel]))]

    if given["k_norm_weight"] is not None:
        # the order of the head norm's sum may depend on how many heads there are
        heads = np.broadcast_to(k.astype(np.float32), (len(rows) * block.heads.kv_heads, len(k))).copy()
        factor = norm.reciprocal_rms(heads[:, :], block.eps, recipe.head_norm)[0]
        chain.append((_HEAD_FACTOR, "r of the head", float(factor)))
        names = ("k", "k*r", "k_normed")
        chain += _norm_links(
            heads[0, channel], factor, given["k_norm_weight"][channel], recipe.head_norm, names, "", _HEAD_NORMALISED
        )
        k = norm.normalise(heads, given["k_norm_weight"], block.eps, recipe.head_norm)[0]
    cos, sin = (given[name][token] for name in ("cos", "sin"))
    rotated = rotate(k[None, None], cos[None], sin[None], recipe.rope)[0, 0]
    partner = (channel + len(k) // 2) % len(k)
    links = (("other half's value", k[partner]), ("cos", cos[channel]), ("sin", sin[channel]), ("k_rotated", rotated[channel]))
    return chain + [(_ROTATED, name, float(value)) for name, value in links]


def _norm_links(
    x: np.float32, r: np.float32, weight: Any, numerics: Norm, names: tuple[str, str, str], index: str, point: int
) -> Chain:
    """The two products of a norm for one element, each before and after its rounding point."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        h = x * r
        h_used = np.float32(nearest(np.array([h]))[0]) if numerics.round_normalised else h
        y = h_used * (np.float32(weight) + np.float32(numerics.weight_offset))
        y_used = nearest(np.array([y]))[0] if numerics.round_weighted else y
    return [
        (point, f"{names[0]}{index}", float(x)),
        (point, f"{names[1]}{index}, computed", float(h)),
        (point, f"{names[1]}{index}, used", float(h_used)),
        (point + 1, f"weight{index}", float(weight)),
        (point + 1, f"{names[2]}{index}, computed", float(y)),
        (point + 1, f"{names[2]}{index}, used", float(y_used)),
    ]


def _cause(point: int, reference: Recipe, recipe: Recipe) -> str:
    """The recipes' statements at the last point, up to the first difference, where they disagree."""
    pairs = list(zip(reference.rounding_points(), recipe.rounding_points(), strict=True))
    for a, b in reversed(pairs[: point + 1]):
        if a != b:
            return f"{reference.name} states '{a}', {recipe.name} '{b}'"
    return "the recipes agree up to here; the difference comes from entries that are not shown"


def _values(weight: Any) -> np.ndarray:
    return np.asarray(dequantise(weight)) if isinstance(weight, QuantisedWeight) else weight


def _key_weight(block: Block, head: int) -> Any:
    """The D rows of the key projection that make one head."""
    start = head * block.heads.head_dim
    if len(block.weights) == 1:
        start += block.heads.rows[0]
    weight = block.weights[min(1, len(block.weights) - 1)]
    if isinstance(weight, QuantisedWeight):
        return weight.rows(start, start + block.heads.head_dim)
    return weight[start : start + block.heads.head_dim]


def _projection_rows(block: Block) -> int:
    return int(block.weights[min(1, len(block.weights) - 1)].shape[0])


def _float64(value: np.ndarray) -> np.ndarray:
    return (nearest(value) if value.dtype == np.float32 else value).astype(np.float64)
