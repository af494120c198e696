"""Attention of queries over keys and values, in the order of eager PyTorch: scores, softmax, weights times V."""

import math
from typing import Any

import numpy as np

from cufuse import _arrays, named_recipes
from cufuse.bf16 import bfloat16, nearest
from cufuse.emulation.attention_products import BLOCKS, Order, multiply, orders
from cufuse.norm import rounding_remedy
from cufuse.recipe import Recipe
from cufuse.softmax import weights as softmax_weights

STAGES = ("scores", "scaled_scores", "masked_scores", "weights", "attended")
"""The named intermediates in their order: all but the last are [..., T, Hq, S]."""

MASKED = np.uint32(0xFF7F0000).view(np.float32)
"""What is added to the score of a key that a query must not see: bfloat16's lowest finite value, as in transformers."""


def attention(
    q: Any, k: Any, v: Any, *, scale: float | None = None, causal: bool = True, recipe: str | Recipe = "torch", out: Any = None
) -> Any:
    """Scaled dot-product attention with grouped heads, as transformers' ``eager_attention_forward``.

    Formula, per query head h with key head ``g = h // (Hq / Hkv)``: ``s = q_h k_g^T; s' = s * float32(scale) + mask;
    w = softmax(s'); o = w v_g``. ``recipe.attention`` says where s, s' and o are rounded; w always is, for it enters a tensor core.
    Both products take the projection's tensor core (``recipe.gemm.core``) in blocks of 16, or, as ``recipe.attention.products``
    says, the kernels that cuBLAS takes for the shape.

    Parameters
    ----------
    q : [..., T, Hq, D], bfloat16. float32 queries, keys and values are rounded first where the recipe's front leaves them so.
    k, v : [..., S, Hkv, D], S >= T: the keys and values of the last T positions are those of the queries themselves.
    scale : None for 1 / sqrt(D).
    causal : whether query t sees keys 0 ... S - T + t alone; all of them otherwise.
    recipe : name or Recipe.
    out : [..., T, Hq, D] array of the result's dtype to write to; it may not overlap an input.

    Returns
    -------
    [..., T, Hq, D]: bfloat16, or float32 where ``recipe.attention.round_output`` is False.

    Special values: NaN in a query or a key that is seen makes the outputs NaN; masked scores are finite, their weights 0.
    Accuracy: the bits of the recipe. Raises TypeError for kinds and dtypes, ValueError for shapes, scale and an overlapping
    ``out``.
    """
    numerics = named_recipes.get(recipe)
    backend = _arrays.backend({"out": out}, q=q, k=k, v=v)
    scale = _check(q, k, v, scale, numerics)
    dtype = bfloat16 if numerics.attention.round_output else np.dtype(np.float32)
    result = _arrays.output(out, q.shape, dtype, backend, q)
    if result.size == 0:
        return result
    if backend == "cupy":
        from cufuse import _gpu_decoder

        return _gpu_decoder.attention(q, k, v, scale, causal, numerics, result)
    _arrays.refuse_overlap(out, q=q, k=k, v=v)
    result[...] = stages(q, k, v, scale, causal, numerics)["attended"]
    return result


def stages(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, causal: bool, recipe: Recipe, keep: bool = False
) -> dict[str, np.ndarray]:
    """The emulation behind ``attention``: "attended" [..., T, Hq, D], and with ``keep`` every one of STAGES. Arguments as there,
    NumPy arrays; nothing is checked."""
    queries, heads, size = q.shape[-3:]
    keys, kv_heads = k.shape[-3:-1]
    batch = math.prod(q.shape[:-3])
    wide = [_bfloat16(x).reshape(batch, *x.shape[-3:]) for x in (q, k, v)]
    group = heads // kv_heads
    found: dict[str, list[np.ndarray]] = {name: [] for name in STAGES}
    mask = _mask(queries, keys) if causal else np.zeros((queries, keys), np.float32)
    both = orders_of(recipe, batch * heads, queries, keys)
    for entry in range(batch):
        for head in range(kv_heads):
            mine = slice(head * group, (head + 1) * group)
            rows = np.ascontiguousarray(wide[0][entry][:, mine].swapaxes(0, 1)).reshape(-1, size)  # [group * T, D]
            first = (entry * heads + head * group) * queries
            kv = wide[1][entry][:, head], wide[2][entry][:, head]
            one = _one_head(rows, *kv, scale, np.tile(mask, (group, 1)), recipe, first, both)
            for name, value in one.items():
                if keep or name == "attended":
                    found[name].append(value.reshape(group, queries, -1))
    shape = (*q.shape[:-3], queries, heads, -1)
    return {
        name: np.ascontiguousarray(np.stack(values).reshape(batch, heads, queries, -1).swapaxes(1, 2)).reshape(shape)
        for name, values in found.items()
        if values
    }


def _one_head(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float, mask: np.ndarray, recipe: Recipe, first_row: int,
    both: tuple[Order, Order],
) -> dict[str, np.ndarray]:
    """Every stage for rows of queries [R, D] over keys and values [S, D]."""
    numerics = recipe.attention

    def rounded(x: np.ndarray, wanted: bool) -> np.ndarray:
        return nearest(x) if wanted else x

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        scores = rounded(multiply(q, k, both[0], recipe.gemm.core), numerics.round_scores)
        scaled = rounded(scores.astype(np.float32) * np.float32(scale), numerics.round_scaled)
        masked = rounded(scaled.astype(np.float32) + mask, numerics.round_scaled)
    weights = nearest(softmax_weights(masked.astype(np.float32), numerics, first_row))
    attended = rounded(multiply(weights, v.T, both[1], recipe.gemm.core), numerics.round_output)
    return dict(zip(STAGES, (scores, scaled, masked, weights, attended), strict=True))


def orders_of(recipe: Recipe, products: int, queries: int, keys: int) -> tuple[Order, Order]:
    """The orders of both products under a recipe; cuBLAS's are those of an H200, whatever the recipe's tensor core."""
    return orders(products, queries, keys) if recipe.attention.products == "cublas" else (BLOCKS, BLOCKS)


def _mask(queries: int, keys: int) -> np.ndarray:
    """[T, S] float32: 0 where query t may see key s, MASKED elsewhere."""
    seen = np.arange(keys)[None] <= np.arange(keys - queries, keys)[:, None]
    return np.where(seen, np.float32(0), MASKED)


def _bfloat16(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == bfloat16 else nearest(np.ascontiguousarray(x))


def _check(q: Any, k: Any, v: Any, scale: float | None, recipe: Recipe) -> float:
    """The scale, after every argument was found right."""
    wide = not recipe.rope.round_sum and not recipe.round_output
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != bfloat16 and not (wide and x.dtype == np.float32):
            takes = "bfloat16 or float32" if wide else "bfloat16"
            problem = f"{name} has dtype {x.dtype}; the attention of recipe {recipe.name!r} takes {takes}"
            raise TypeError(f"{problem}: {rounding_remedy(x)}")
        if x.ndim < 3 or 0 in x.shape[-2:]:
            raise ValueError(f"{name} has shape {x.shape}; needed is [..., tokens, heads, D]")
    if k.shape != v.shape:
        raise ValueError(f"k has shape {k.shape} and v {v.shape}; needed is one shape, [..., S, Hkv, D]")
    if q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1] or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"q has shape {q.shape} and k {k.shape}; needed are [..., T, Hq, D] and [..., S, Hkv, D] with equal leading axes, "
            "equal D, and Hq a multiple of Hkv"
        )
    if q.shape[-3] > k.shape[-3]:
        raise ValueError(f"q has {q.shape[-3]} tokens and k {k.shape[-3]}; needed are keys of all the queries' positions at least")
    found = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if not isinstance(found, (int, float, np.floating)) or not math.isfinite(found):
        raise ValueError(f"scale is {scale!r}; needed is a finite number, or None for 1 / sqrt(D)")
    return float(found)
