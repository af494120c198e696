"""An operation under a recipe with every intermediate named, one for each rounding point."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from cufuse import gemm, named_recipes, norm, qkv
from cufuse.bf16 import bfloat16, nearest
from cufuse.recipe import Norm, Recipe
from cufuse.rope import rotate
from cufuse.testing import _bits

OPERATIONS: Final = ("rms_norm", "add_rms_norm", "linear", "rope", "rms_norm_qkv")

_HEAD_POINTS: Final = {"r": (7, 8), "h": (9,), "normed": (10,), "rotated": (11,)}
POINTS: Final[dict[str, tuple[int, ...]]] = {
    "residual sum": (0,),
    "new residual": (0,),
    "r": (1, 2),
    "h": (3,),
    "y": (4,),
    "product accumulated": (5,),
    "product": (6,),
    "normalised": (4,),
    **dict.fromkeys("qkv", (5, 6)),
    **{f"{name}_{part}": places for name in "qk" for part, places in _HEAD_POINTS.items()},
}
"""Stage -> its lines in ``Recipe.rounding_points()``."""


@dataclasses.dataclass(frozen=True)
class RecipeStages:
    """A function of an operation's arguments that yields its intermediates under a recipe; see ``recipe_stages``."""

    operation: str
    recipe: Recipe

    def __call__(self, *arguments: Any, **named: Any) -> Iterator[tuple[str, np.ndarray]]:
        brought = {name: _to_host(name, value) for name, value in named.items()}
        return _CHAINS[self.operation](self.recipe, *(_to_host("an argument", one) for one in arguments), **brought)


def recipe_stages(operation: str, recipe: str | Recipe = "torch") -> RecipeStages:
    """The emulation of an operation under a recipe as a chain for ``find_first_difference``: arrays in, pairs
    (stage, NumPy array) out, in the order of the computation. CuPy arrays and PyTorch tensors are copied to the host first.

    ==============  ===============================================================  ==============================================
    operation       called with                                                      yields
    ==============  ===============================================================  ==============================================
    rms_norm        x [M, K], weight, eps=1e-6                                       r, h, y
    add_rms_norm    x [M, K], residual, weight, eps=1e-6                             residual sum, new residual, r, h, y
    linear          x [M, K], weight [N, K], k_slices=None                           product accumulated, product
    rope            q [..., Hq, D], k [..., Hkv, D], cos [..., D], sin               q_rotated, k_rotated
    rms_norm_qkv    its own arguments, without residual and out                      r, h, normalised, q, k, v, q_r, q_h, q_normed,
                                                                                     k_r, k_h, k_normed, q_rotated, k_rotated
    ==============  ===============================================================  ==============================================

    r is the reciprocal root of the mean of squares [M], float32; h = x * r and y = h * weight, each bfloat16 where the recipe
    rounds it and float32 where not. "product accumulated" is the float32 accumulator of a projection; "normalised" is the y of the
    first norm, q_r, q_h and q_normed the r, h and y of the queries' norm.

    Raises ValueError for an unknown operation or recipe.
    """
    if operation not in OPERATIONS:
        raise ValueError(f"operation is {operation!r}; needed is one of {', '.join(OPERATIONS)}")
    return RecipeStages(operation, named_recipes.get(recipe))


Stages = Iterator[tuple[str, np.ndarray]]


def _to_host(name: str, value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_to_host(name, one) for one in value)
    return _bits.to_host(name, value) if hasattr(value, "dtype") and hasattr(value, "shape") else value


def _rms_norm(recipe: Recipe, x: Any, weight: Any, eps: float = 1e-6) -> Stages:
    norm.check_activations("x", x, recipe)
    norm.check_norm_weight("weight", weight, recipe.norm, recipe)
    return _norm_stages(np.ascontiguousarray(x).astype(np.float32), weight, eps, recipe.norm)


def _add_rms_norm(recipe: Recipe, x: Any, residual: Any, weight: Any, eps: float = 1e-6) -> Stages:
    norm.check_activations("x", x, recipe)
    norm.check_activations("residual", residual, recipe)
    wide, stored = norm.add_residual(x, residual, recipe)
    yield "residual sum", wide
    yield "new residual", stored
    yield from _norm_stages(wide, weight, eps, recipe.norm, after_residual=True)


def _norm_stages(x: np.ndarray, weight: np.ndarray, eps: float, numerics: Norm, after_residual: bool = False) -> Stages:
    yield "r", norm.reciprocal_rms(x, eps, numerics, after_residual)
    # times one, and one more rounding to where it already is: h itself
    alone = dataclasses.replace(numerics, weight_offset=0.0, round_weighted=numerics.round_normalised)
    yield "h", norm.normalise(x, np.ones(x.shape[1], bfloat16), eps, alone, after_residual)
    yield "y", norm.normalise(x, weight, eps, numerics, after_residual)


def _linear(recipe: Recipe, x: Any, weight: Any, k_slices: int | None = None) -> Stages:
    slices = gemm.slices_of(x.shape[0], weight.shape[0], weight.shape[1], recipe.gemm, k_slices)
    total = gemm.project(np.ascontiguousarray(x), weight, dataclasses.replace(recipe.gemm, output="float32"), slices)
    yield "product accumulated", total
    yield "product", nearest(total) if recipe.gemm.output == "bfloat16" else total


def _rope(recipe: Recipe, q: Any, k: Any, cos: Any, sin: Any) -> Stages:
    yield "q_rotated", rotate(q, cos, sin, recipe.rope)
    yield "k_rotated", rotate(k, cos, sin, recipe.rope)


def _rms_norm_qkv(
    recipe: Recipe,
    x: Any,
    norm_weight: Any,
    qkv_weight: Any,
    q_norm_weight: Any,
    k_norm_weight: Any,
    *,
    eps: float = 1e-6,
    cos: Any = None,
    sin: Any = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    k_slices: int | None = None,
) -> Stages:
    weights = tuple(qkv_weight) if isinstance(qkv_weight, (tuple, list)) else (qkv_weight,)
    inputs = {
        "x": x,
        "norm_weight": norm_weight,
        "q_norm_weight": q_norm_weight,
        "k_norm_weight": k_norm_weight,
        "cos": cos,
        "sin": sin,
        "residual": None,
    }
    numbered = {f"qkv_weight[{index}]": weight for index, weight in enumerate(weights)}
    shape = qkv.check(inputs | numbered, weights, recipe, heads, kv_heads, head_dim)
    found = qkv.stages(inputs, weights, shape, eps, recipe, k_slices)
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1]).astype(np.float32)
    inner = {"normalised": ("", rows, norm_weight, recipe.norm)}
    for name, weight in (("q", q_norm_weight), ("k", k_norm_weight)):
        per_head = np.ascontiguousarray(found[name]).reshape(-1, shape.head_dim).astype(np.float32)
        inner[f"{name}_normed"] = (f"{name}_", per_head, weight, recipe.head_norm)
    for stage in qkv.STAGES:
        if stage in found:
            if stage in inner:
                prefix, wide, weight, numerics = inner[stage]
                for part, array in list(_norm_stages(wide, weight, eps, numerics))[:2]:
                    yield prefix + part, array
            yield stage, found[stage]


_CHAINS: Final[dict[str, Callable[..., Stages]]] = {
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "linear": _linear,
    "rope": _rope,
    "rms_norm_qkv": _rms_norm_qkv,
}
