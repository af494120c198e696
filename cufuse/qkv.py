"""The front of an attention layer in one call: residual sum, RMSNorm, Q/K/V projection, Q/K head norm, rotation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cufuse import _arrays, gemm, named_recipes, norm
from cufuse.bf16 import bfloat16, nearest
from cufuse.quantised.weight import QuantisedWeight
from cufuse.recipe import Recipe
from cufuse.rope import check_tables, rotate

STAGES = ("normalised", "q", "k", "v", "q_normed", "k_normed", "q_rotated", "k_rotated")
"""The named intermediates in their order; "q_normed" and "k_normed" are absent without head norms, the last two without cos."""


_OPTIONAL = ("q_norm_weight", "k_norm_weight", "cos", "sin", "residual", "cache_slots")


def rms_norm_qkv(
    x: Any,
    norm_weight: Any,
    qkv_weight: Any,
    q_norm_weight: Any,
    k_norm_weight: Any,
    *,
    eps: float = 1e-6,
    cos: Any = None,
    sin: Any = None,
    residual: Any = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    recipe: str | Recipe = "torch",
    k_slices: int | None = None,
    cache_slots: Any = None,
    static_weights: bool = False,
    out: Any = None,
) -> tuple[Any, ...]:
    """RMSNorm, Q/K/V projection, Q/K head norm and rotary embedding, every rounding point as the recipe states it.

    Formula: ``y = rms_norm(x + residual, norm_weight); q, k, v = y Wq^T, y Wk^T, y Wv^T; q = rope(rms_norm(q, q_norm_weight))``,
    k alike, per head of D; v stays.

    Parameters
    ----------
    x : [..., K], bfloat16 (float32 where the recipe has float32 activations). The leading axes are the tokens.
    norm_weight : [K].
    qkv_weight : one packed [(Hq + 2 Hkv) D, K] array with the rows of q, k, v in this order, or a tuple of three, [Hq D, K] and
        twice [Hkv D, K] (Hugging Face's separate projections, of which cuBLAS cuts K otherwise than of a packed one). bfloat16, or
        QuantisedWeights (``cufuse.quantised``), which ``recipe.gemm.quantised`` says how to multiply by.
    q_norm_weight, k_norm_weight : [D], or both None for a model without head norms (head_dim is then needed).
    eps : of all norms.
    cos, sin : [..., D] with x's leading axes (``rope_tables``), or None: no rotation.
    residual : [..., K], added first; the new residual is then returned as well.
    heads, kv_heads : Hq and Hkv; of a packed weight one of them is needed, of a tuple none.
    recipe, k_slices : as in ``linear``.
    cache_slots : [...], int64, with x's leading axes, on a GPU contiguous: keys and values go to these rows of a cache. out is
        then needed, with k and v as caches [slots, Hkv, D]; a token whose slot is negative or beyond the cache is not written
        (padding), and no two tokens may have the same slot. All other rows stay as they are.
    static_weights : the weights (of projection and norms) are written by nothing that may still be under way in the stream: a
        promise that an engine with loaded weights can give. On a GPU the call may then fetch them while the kernel in front of it
        still runs. Changes no bit; without a GPU nothing at all.
    out : a tuple (q, k, v), or (q, k, v, new residual), of arrays to write to. They may be views, of one packed buffer, say.

    Returns
    -------
    q [..., Hq, D], k [..., Hkv, D], v [..., Hkv, D], and the new residual [..., K] if there was one; bfloat16, or float32 where
    the recipe leaves them so. With cache_slots k and v are the caches.

    On a GPU nothing is allocated where out is given, and the call can be captured in a graph; graphs captured on one stream share
    a workspace with each other and with its calls: they must not be replayed at the same time as one of these.

    Special values, errors: as ``rms_norm``, ``linear`` and ``rope``.
    """
    names = ("q", "k", "v") if residual is None else ("q", "k", "v", "new residual")
    outs = _arrays.outputs(out, names)
    weights = tuple(qkv_weight) if isinstance(qkv_weight, (tuple, list)) else (qkv_weight,)
    static_weights, numbers = bool(static_weights), (eps, heads, kv_heads, head_dim, k_slices)
    # with their classes, for 1 == 1.0 == True
    options = (recipe if isinstance(recipe, str) else id(recipe), static_weights, *numbers, *map(type, numbers))
    kernels = _arrays.loaded_kernels("_gpu_qkv", (x,))
    if kernels is not None:
        arrays = (x, norm_weight, q_norm_weight, k_norm_weight, cos, sin, residual, cache_slots, *weights)
        repeated = kernels.again(arrays, outs, options)
        if repeated is not None:
            return repeated  # type: ignore[no-any-return]
    numerics = named_recipes.get(recipe)
    inputs = {
        "x": x,
        "norm_weight": norm_weight,
        "q_norm_weight": q_norm_weight,
        "k_norm_weight": k_norm_weight,
        "cos": cos,
        "sin": sin,
        "residual": residual,
        "cache_slots": cache_slots,
    } | {f"qkv_weight[{index}]": gemm.memory_of(weight) for index, weight in enumerate(weights)}
    required = {name: array for name, array in inputs.items() if name not in _OPTIONAL}
    optional = {name: inputs[name] for name in _OPTIONAL} | {f"out[{index}]": one for index, one in enumerate(outs)}
    backend = _arrays.backend(optional, **required)
    norm.check_eps(eps)
    gemm.check_slices(k_slices)
    shape = check(inputs, weights, numerics, heads, kv_heads, head_dim)
    shapes = [(*x.shape[:-1], count, shape.head_dim) for count in (shape.heads, shape.kv_heads, shape.kv_heads)]
    dtypes = [output_dtype(numerics, name, cos is not None, q_norm_weight is not None) for name in ("q", "k", "v")]
    if cache_slots is not None:
        shapes[1:3] = [(_check_slots(cache_slots, x, outs), *shapes[1][-2:])] * 2
    if residual is not None:
        shapes.append(x.shape)
        dtypes.append(np.dtype(np.float32) if numerics.residual_sum == "float32" else np.dtype(bfloat16))
    results = tuple(
        _arrays.output(given, wanted, dtype, backend, x, f"out[{index}]")
        for index, (given, wanted, dtype) in enumerate(zip(outs, shapes, dtypes, strict=True))
    )
    if x.size == 0:
        return results
    if backend == "cupy" and any(isinstance(weight, QuantisedWeight) for weight in weights):
        from cufuse import _gpu_quantised_qkv

        return _gpu_quantised_qkv.rms_norm_qkv(inputs, weights, shape, eps, numerics, k_slices, static_weights, results)
    if backend == "cupy":
        from cufuse import _gpu_qkv

        named = {f"out[{index}]": result for index, result in enumerate(results)}
        _gpu_qkv.rms_norm_qkv(inputs, outs, named, shape, eps, numerics, k_slices, static_weights, options)
        return results
    _arrays.refuse_overlap(*outs, **inputs)
    found = stages(inputs, weights, shape, eps, numerics, k_slices)
    last = [next(found[stage] for stage in names if stage in found) for names in LAST_STAGES]
    for result, value in zip(results, [*last, found.get("new_residual")], strict=False):
        assert value is not None
        rounded = nearest(value) if result.dtype != value.dtype else value
        if cache_slots is not None and (result is results[1] or result is results[2]):
            slots = cache_slots.reshape(-1)
            stored = (slots >= 0) & (slots < len(result))
            result[slots[stored]] = rounded[stored]
        else:
            result[...] = rounded.reshape(result.shape)
    return results


def _check_slots(slots: Any, x: Any, outs: tuple[Any, ...]) -> int:
    """Rows of the caches that k and v go to."""
    if slots.dtype != np.int64:
        raise TypeError(f"cache_slots has dtype {slots.dtype}; needed is int64")
    _arrays.require_shape("cache_slots", slots, x.shape[:-1], "a slot for each token")
    for index, name in ((1, "K"), (2, "V")):
        if outs[index] is None:
            raise ValueError(f"out[{index}] is None; cache_slots needs a {name} cache [slots, Hkv, D] there")
        if outs[index].ndim != 3 or len(outs[index]) != len(outs[1]):
            shape = outs[index].shape
            raise ValueError(f"out[{index}] has shape {shape}; cache_slots needs two caches [slots, Hkv, D] of one size")
    return len(outs[1])


LAST_STAGES = (("q_rotated", "q_normed", "q"), ("k_rotated", "k_normed", "k"), ("v",))


@dataclass(frozen=True)
class Heads:
    """Numbers of query and key/value heads, and their size D."""

    heads: int
    kv_heads: int
    head_dim: int

    @property
    def rows(self) -> tuple[int, int, int]:
        """Weight rows of q, k and v."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim


def stages(
    inputs: dict[str, Any],
    weights: tuple[Any, ...],
    shape: Heads,
    eps: float,
    recipe: Recipe,
    k_slices: int | None = None,
    projected: Callable[..., np.ndarray] = gemm.project,
) -> dict[str, np.ndarray]:
    """Every intermediate of the block on NumPy arrays: STAGES that occur, "new_residual" if any. q, k, v are [M, H, D].

    ``projected`` computes one projection as ``gemm.project`` does (the report puts a memory of products in its place).
    """
    columns = inputs["x"].shape[-1]
    rows = np.ascontiguousarray(inputs["x"]).reshape(-1, columns)
    found: dict[str, np.ndarray] = {}
    added = inputs.get("residual") is not None
    if added:
        other = np.ascontiguousarray(inputs["residual"]).reshape(-1, columns)
        wide, found["new_residual"] = norm.add_residual(rows, other, recipe)
    else:
        wide = rows.astype(np.float32)
    found["normalised"] = norm.normalise(wide, inputs["norm_weight"], eps, recipe.norm, added)
    count = len(rows)
    products = [
        projected(found["normalised"], w, recipe.gemm, gemm.slices_for(count, w, recipe.gemm, k_slices)) for w in weights
    ]
    if len(products) == 1:
        products = np.split(products[0], np.cumsum(shape.rows)[:2], axis=1)
    for name, product in zip("qkv", products, strict=True):
        found[name] = np.ascontiguousarray(product).reshape(count, -1, shape.head_dim)
    for name in "qk":
        weight = inputs.get(f"{name}_norm_weight")
        if weight is not None:
            per_head = found[name].reshape(-1, shape.head_dim).astype(np.float32)
            found[f"{name}_normed"] = norm.normalise(per_head, weight, eps, recipe.head_norm).reshape(found[name].shape)
        if inputs.get("cos") is not None:
            cos, sin = (np.ascontiguousarray(inputs[table]).reshape(count, -1) for table in ("cos", "sin"))
            found[f"{name}_rotated"] = rotate(found.get(f"{name}_normed", found[name]), cos, sin, recipe.rope)
    return {name: found[name] for name in (*STAGES, "new_residual") if name in found}


def output_dtype(recipe: Recipe, name: str, rotated: bool, head_norm: bool) -> np.dtype:
    """The type in which q, k or v leaves the block."""
    found = recipe.output(head_norm=head_norm and name != "v", rotation=rotated and name != "v")
    return np.dtype(bfloat16) if found == "bfloat16" else np.dtype(np.float32)


def check(
    inputs: dict[str, Any],
    weights: tuple[Any, ...],
    recipe: Recipe,
    heads: int | None,
    kv_heads: int | None,
    head_dim: int | None,
) -> Heads:
    """The head counts, after every input's dtype and shape was found right; TypeError or ValueError otherwise."""
    for name, count in (("heads", heads), ("kv_heads", kv_heads), ("head_dim", head_dim)):
        if count is not None and not isinstance(count, (int, np.integer)):
            raise TypeError(f"{name} is a {type(count).__name__}; needed is an integer >= 1, or None")
    x = inputs["x"]
    norm.check_activations("x", x, recipe)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {x.shape}; needed is [..., K] with K >= 1")
    columns = x.shape[-1]
    norm.check_norm_weight("norm_weight", inputs["norm_weight"], recipe.norm, recipe)
    _arrays.require_shape("norm_weight", inputs["norm_weight"], (columns,), "one weight for each of x's columns")
    if inputs["norm_weight"].dtype == np.float32 and recipe.norm.float32_weight == "promote":
        raise TypeError(
            f"norm_weight has dtype float32, which makes the norm of recipe {recipe.name!r} float32, but its projection takes "
            "bfloat16: round it with cufuse.round_to_bf16"
        )
    if inputs["residual"] is not None:
        norm.check_activations("residual", inputs["residual"], recipe)
        _arrays.require_shape("residual", inputs["residual"], x.shape, "x's shape")
    for index, weight in enumerate(weights):
        gemm.check_projection_weight(f"qkv_weight[{index}]", weight)
        _arrays.require_shape(f"qkv_weight[{index}]", weight, (None, columns), "rows of x's K columns")
    head_dim = _head_dim(inputs, recipe, head_dim)
    shape = _head_counts(weights, head_dim, heads, kv_heads)
    if (inputs["cos"] is None) != (inputs["sin"] is None):
        raise ValueError("cos and sin go together: give both, or neither for no rotation")
    if inputs["cos"] is not None:
        check_tables(inputs["cos"], inputs["sin"], recipe)
        for name in ("cos", "sin"):
            _arrays.require_shape(name, inputs[name], (*x.shape[:-1], head_dim), "one row of D for each token")
        if head_dim % 2:
            raise ValueError(f"head_dim is {head_dim}; rotation needs an even number")
    return shape


def _head_dim(inputs: dict[str, Any], recipe: Recipe, head_dim: int | None) -> int:
    q, k = inputs["q_norm_weight"], inputs["k_norm_weight"]
    if (q is None) != (k is None):
        raise ValueError("q_norm_weight and k_norm_weight go together: give both, or None for both")
    if q is None:
        if head_dim is None or head_dim < 1:
            raise ValueError(f"head_dim is {head_dim}; without head norm weights it is needed, an integer >= 1")
        return head_dim
    size = int(q.shape[0]) if q.ndim == 1 else 0
    for name, weight in (("q_norm_weight", q), ("k_norm_weight", k)):
        norm.check_norm_weight(name, weight, recipe.head_norm, recipe)
        if weight.dtype == np.float32 and recipe.head_norm.float32_weight == "promote":
            raise TypeError(f"{name} has dtype float32; the block of recipe {recipe.name!r} takes bfloat16 head norm weights")
        _arrays.require_shape(name, weight, (size or None,), "one weight for each element of a head")
    if size == 0 or head_dim not in (None, size):
        raise ValueError(f"head_dim is {head_dim}, but q_norm_weight has shape {q.shape}; they must agree")
    return size


def _head_counts(weights: tuple[Any, ...], head_dim: int, heads: int | None, kv_heads: int | None) -> Heads:
    sizes = [int(weight.shape[0]) for weight in weights]
    if len(weights) not in (1, 3):
        raise ValueError(f"qkv_weight is a tuple of {len(weights)}; needed is one packed array or three (q, k, v)")
    if any(size % head_dim or size == 0 for size in sizes):
        raise ValueError(f"qkv_weight has {sizes} rows; needed are multiples of the head size {head_dim}")
    counts = [size // head_dim for size in sizes]
    if len(counts) == 1:
        total = counts[0]
        if heads is None and kv_heads is None:
            raise ValueError(f"qkv_weight is packed, {total} heads together; give heads (of q) or kv_heads to divide it")
        found = (heads if heads is not None else total - 2 * (kv_heads or 0), kv_heads)
        found = (found[0], kv_heads if kv_heads is not None else (total - found[0]) // 2)
        if found[0] < 1 or found[1] is None or found[1] < 1 or found[0] + 2 * found[1] != total:
            raise ValueError(f"heads = {heads} and kv_heads = {kv_heads} do not divide {total} heads as Hq + 2 Hkv")
        return Heads(found[0], found[1], head_dim)
    if counts[1] != counts[2]:
        raise ValueError(f"qkv_weight has {counts[1]} key heads and {counts[2]} value heads; needed are as many of each")
    for name, given, count in (("heads", heads, counts[0]), ("kv_heads", kv_heads, counts[1])):
        if given not in (None, count):
            raise ValueError(f"{name} is {given}, but the weights have {count}")
    return Heads(counts[0], counts[1], head_dim)
