"""Rotary position embedding, halves rotated (Hugging Face's layout)."""

from typing import Any

import numpy as np

from cufuse import _arrays, named_recipes
from cufuse.bf16 import bfloat16, nearest
from cufuse.emulation import rotary
from cufuse.emulation.floats import fma32
from cufuse.recipe import Recipe, Rope


def rope(
    q: Any, k: Any, cos: Any, sin: Any, *, recipe: str | Recipe = "torch", out: Any = None
) -> tuple[Any, Any]:
    """Rotate queries and keys by their positions' angles.

    Formula: ``y = x * cos + rotate_half(x) * sin`` with ``rotate_half(x) = (-x[D/2:], x[:D/2])``; ``recipe.rope`` says which of the
    products and the sum are rounded to bfloat16 (Hugging Face: all three) or fused.

    Parameters
    ----------
    q, k : [..., Hq, D] and [..., Hkv, D]; bfloat16, or float32 where the recipe's head norm leaves float32. D even. Any strides
        for NumPy; for CuPy unit stride along D and two levels of strides before it at most (ValueError otherwise).
    cos, sin : [..., D], one row for each position (``cufuse.rope_tables``); they broadcast over the heads. bfloat16 or
        float32; float32 ones are rounded first where the recipe has bfloat16 tables.
    out : a pair of arrays to write to.

    Returns
    -------
    (q, k) rotated, same shapes; bfloat16, or float32 where the recipe leaves it so.

    Special values: NaN and infinities spread to the two elements of their pair. Subnormals take part.
    Raises TypeError for kinds and dtypes, ValueError for shapes and an overlapping ``out``.
    """
    numerics = named_recipes.get(recipe)
    outs = _arrays.outputs(out, ("q", "k"))
    given = (*outs, q, k, cos, sin)
    kernels = _arrays.loaded_kernels("_gpu_rope", given)
    if kernels is not None and kernels.repeat(given, numerics):  # a call like this one has passed the checks
        return outs[0], outs[1]
    backend = _arrays.backend({"out[0]": outs[0], "out[1]": outs[1]}, q=q, k=k, cos=cos, sin=sin)
    for name, x in (("q", q), ("k", k)):
        check_rotation(name, x, cos, sin, numerics)
    dtype = bfloat16 if numerics.rope.round_sum else np.dtype(np.float32)
    results = [_arrays.output(outs[index], x.shape, dtype, backend, x, f"out[{index}]") for index, x in enumerate((q, k))]
    if backend == "cupy":
        from cufuse import _gpu_rope

        return _gpu_rope.rope(q, k, cos, sin, numerics.rope, results[0], results[1], numerics)
    _arrays.refuse_overlap(*outs, q=q, k=k, cos=cos, sin=sin)
    for result, x in zip(results, (q, k), strict=True):
        result[...] = rotate(x, cos, sin, numerics.rope)
    return results[0], results[1]


def rope_tables(
    positions: Any, head_dim: int, *, base: float = 1e6, dtype: Any = bfloat16
) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of ``position * base**(-2i/head_dim)`` for rotary embedding, as Hugging Face's Qwen3RotaryEmbedding gives them.

    Parameters
    ----------
    positions : integer NumPy array or sequence of positions >= 0, any shape [...].
    head_dim : D, even.
    base : the model's rope_theta (Qwen3: 1,000,000).
    dtype : bfloat16 or numpy.float32.

    Returns
    -------
    (cos, sin), NumPy arrays [..., D], both halves alike.

    Accuracy: bfloat16 tables have PyTorch's bits on an H200 for base 1e6, D in {64, 128, 256} and every position below 40,960:
    all 18 million entries were compared, and the 192 exceptions from the formula are kept as data. Elsewhere the formula (float64
    cos of the float32 angle, rounded to float32, then to bfloat16) may be off by an ulp now and then, and by more where the
    cosine is near zero (2 and 21 ulp in four of the exceptions).
    float32 tables are the correctly rounded ones, from which CUDA's may differ by 2 ulp.

    Raises TypeError for non-integer positions or another dtype, ValueError for negative positions and an odd head_dim.
    """
    places = np.asarray(positions)
    if places.dtype.kind not in "iu":
        raise TypeError(f"positions have dtype {places.dtype}; needed are integers")
    if places.size and int(places.min()) < 0:
        raise ValueError(f"positions go down to {places.min()}; needed is >= 0")
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; needed is an even number >= 2")
    if not (np.isfinite(base) and base > 0):
        raise ValueError(f"base is {base!r}; needed is a positive number, such as the model's rope_theta")
    if np.dtype(dtype) not in (np.dtype(bfloat16), np.dtype(np.float32)):
        raise TypeError(f"dtype is {dtype!r}; needed is cufuse.bfloat16 or numpy.float32")
    return rotary.tables(places, head_dim, base, np.dtype(dtype))


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, numerics: Rope) -> np.ndarray:
    """The emulation behind ``rope`` for one of q and k, [..., H, D]."""
    c, s = (_table(table, numerics)[..., None, :] for table in (cos, sin))
    wide = x.astype(np.float32)
    half = wide.shape[-1] // 2
    rotated = np.concatenate([-wide[..., half:], wide[..., :half]], axis=-1)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        second = rotated * s
        if numerics.contract:
            total = fma32(wide, np.broadcast_to(c, wide.shape), second)
        elif numerics.round_products:
            total = nearest(wide * c).astype(np.float32) + nearest(second).astype(np.float32)
        else:
            total = wide * c + second
    return nearest(total) if numerics.round_sum else total


def check_rotation(name: str, x: Any, cos: Any, sin: Any, recipe: Recipe) -> None:
    """TypeError or ValueError unless x [..., H, D] can be rotated by cos and sin [..., D] under the recipe."""
    wide = not recipe.head_norm.round_weighted
    if x.dtype != bfloat16 and not (wide and x.dtype == np.float32):
        takes = "bfloat16 or float32" if wide else "bfloat16"
        raise TypeError(f"{name} has dtype {x.dtype}; the rotation of recipe {recipe.name!r} takes {takes}")
    check_tables(cos, sin, recipe)
    if x.ndim < 2 or x.shape[-1] % 2:
        raise ValueError(f"{name} has shape {x.shape}; needed is [..., heads, D] with an even D")
    wanted = (*x.shape[:-2], x.shape[-1])
    for table_name, table in (("cos", cos), ("sin", sin)):
        if table.shape != wanted:
            raise ValueError(f"{table_name} has shape {table.shape}; for {name} of shape {x.shape} needed is {wanted}")


def check_tables(cos: Any, sin: Any, recipe: Recipe) -> None:
    """TypeError unless cos and sin have a type from which the recipe's tables can be had."""
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype == np.float32 or (table.dtype == bfloat16 and recipe.rope.tables == "bfloat16"):
            continue
        takes = "float32" if recipe.rope.tables == "float32" else "bfloat16 or float32"
        raise TypeError(
            f"{name} has dtype {table.dtype}; recipe {recipe.name!r} takes {takes}: "
            "cufuse.rope_tables(positions, D, dtype=numpy.float32)"
        )


def _table(table: np.ndarray, numerics: Rope) -> np.ndarray:
    if table.dtype == np.float32 and numerics.tables == "bfloat16":
        table = nearest(np.ascontiguousarray(table))
    return table.astype(np.float32)
