"""Softmax of the last axis, in float32, in the order of PyTorch's kernels."""

from typing import Any

import numpy as np

from cufuse import _arrays, named_recipes
from cufuse.bf16 import bfloat16, nearest
from cufuse.emulation.exponential import expf
from cufuse.emulation.softmax_sums import SOFTMAX_ORDERS
from cufuse.norm import rounding_remedy
from cufuse.recipe import Attention, Recipe

_ELEMENTS_AT_A_TIME = 1 << 22


def softmax(x: Any, *, recipe: str | Recipe = "torch", out: Any = None) -> Any:
    """Softmax over the last axis, as ``torch.softmax(x, dim=-1, dtype=torch.float32)`` and a cast give it on CUDA.

    Formula: ``e = exp(x - max(x)); y = e / sum(e)``, all in float32, y rounded to bfloat16. ``recipe.attention`` says how the
    exponential is computed and in which order e is added up.

    Parameters
    ----------
    x : [..., K], bfloat16 or float32, K >= 1. Any strides. The rows are counted together: where K is above 9,216 and not a multiple
        of 4, PyTorch's order depends on a row's index.
    recipe : name or Recipe.
    out : [..., K] bfloat16 array to write to; it may not overlap x.

    Returns
    -------
    [..., K], bfloat16.

    Special values: -inf gives 0; a row with +inf, NaN, or of -inf alone gives NaN (0x7FFF).
    Accuracy: the bits of the recipe; float32 throughout but for the last rounding.

    Raises TypeError for kinds and dtypes, ValueError for shapes and an overlapping ``out``.
    """
    numerics = named_recipes.get(recipe)
    backend = _arrays.backend({"out": out}, x=x)
    _check(x)
    result = _arrays.output(out, x.shape, bfloat16, backend, x)
    if x.size == 0:
        return result
    if backend == "cupy":
        from cufuse import _gpu_decoder

        return _gpu_decoder.softmax(x, numerics.attention, result)
    _arrays.refuse_overlap(out, x=x)
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    result[...] = nearest(weights(rows.astype(np.float32), numerics.attention)).reshape(x.shape)
    return result


def weights(x: np.ndarray, numerics: Attention, first_row: int = 0) -> np.ndarray:
    """The emulation behind ``softmax``: float32 [rows, K] -> float32, not yet rounded; row 0 is row ``first_row`` of the call.

    Special values as ``softmax``; nothing is checked.
    """
    result = np.empty_like(x)
    add_up = SOFTMAX_ORDERS[numerics.softmax_order]
    step = max(1, _ELEMENTS_AT_A_TIME // x.shape[1])
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        for first in range(0, len(x), step):
            block = x[first : first + step]
            exponentials = expf(block - block.max(axis=1, keepdims=True), numerics.exponential)
            result[first : first + step] = exponentials / add_up(exponentials, first_row + first)[:, None]
    return result


def _check(x: Any) -> None:
    if x.dtype not in (bfloat16, np.float32):
        raise TypeError(f"x has dtype {x.dtype}; needed is bfloat16 or float32: {rounding_remedy(x)}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {x.shape}; needed is [..., K] with K >= 1")
