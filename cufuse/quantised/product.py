"""The projection ``x W^T`` with a quantised weight."""

from typing import Any

import numpy as np

from cufuse import _arrays, gemm, named_recipes
from cufuse.bf16 import bfloat16
from cufuse.norm import rounding_remedy
from cufuse.quantised.weight import QuantisedWeight, require
from cufuse.recipe import Recipe


def quantised_linear(
    x: Any, weight: QuantisedWeight, *, recipe: str | Recipe = "block-scaled", k_slices: int | None = None, out: Any = None
) -> Any:
    """Matrix product with a quantised weight.

    Formula: ``out[..., n] = sum over k of x[..., k] * w[n, k]``, where ``recipe.gemm.quantised`` says what w is and in which order
    the sum is taken: "decoded": w rounded to bfloat16, then as ``linear``; "block-scaled": integers on the tensor core, scales in
    float32; "q8_1": llama.cpp's integer dot products.

    Parameters
    ----------
    x : [..., K], bfloat16; float32 too where the recipe's projection takes float32.
    weight : a QuantisedWeight [N, K] of the same library. CuPy: ``weight.on_gpu()``, once; raw blocks are packed at each call.
    recipe : name or Recipe; ``recipe.gemm`` is used.
    k_slices : number of slices of K, of whole pieces (64 k; 256 for the K formats) where the weight is "block-scaled"; None takes
        the recipe's. "q8_1" has none.
    out : [..., N] array of the result's dtype to write to; it may not overlap an input.

    Returns
    -------
    [..., N], bfloat16 or float32 (``recipe.gemm.output``).

    Special values: a scale that is NaN or infinite, NaN and infinities in x: NaN or infinity in the outputs that they reach (0x7FFF
    in bfloat16). "q8_1" loses a NaN in x where the format needs no sum of x (all but Q4_0), as llama.cpp does.
    Accuracy: the bits of the recipe. Against exact arithmetic with the same weights "block-scaled" is off by float32's roundings
    alone; "decoded" by 2**-8 of each weight, "q8_1" by 1/254 of the largest |x| of 32, for each product.

    Raises TypeError for kinds and dtypes, ValueError for shapes, k_slices and an overlapping ``out``.
    """
    numerics = named_recipes.get(recipe)
    require("weight", weight)
    backend = _arrays.backend({"out": out}, x=x, weight=weight.data)
    _check(x, weight, numerics, k_slices)
    n, k = weight.shape
    dtype = bfloat16 if numerics.gemm.output == "bfloat16" else np.dtype(np.float32)
    result = _arrays.output(out, (*x.shape[:-1], n), dtype, backend, x)
    if result.size == 0:
        return result
    if backend == "cupy":
        from cufuse import _gpu_quantised

        return _gpu_quantised.linear(x, weight, numerics.gemm, k_slices, result)
    _arrays.refuse_overlap(out, x=x, weight=weight.data)
    rows = np.ascontiguousarray(x).reshape(-1, k)
    slices = gemm.slices_for(rows.shape[0], weight, numerics.gemm, k_slices)
    result[...] = gemm.project(rows, weight, numerics.gemm, slices).reshape(result.shape)
    return result


def _check(x: Any, weight: QuantisedWeight, recipe: Recipe, k_slices: int | None) -> None:
    if x.dtype != bfloat16 and not (x.dtype == np.float32 and recipe.gemm.input == "float32"):
        takes = "bfloat16" if recipe.gemm.input == "bfloat16" else "bfloat16 or float32"
        raise TypeError(f"x has dtype {x.dtype}; the projection of recipe {recipe.name!r} takes {takes}: {rounding_remedy(x)}")
    gemm.check_slices(k_slices)
    if recipe.gemm.quantised == "q8_1" and k_slices is not None:
        raise ValueError(f"k_slices is {k_slices}; the integer dot products of recipe {recipe.name!r} have none: leave it out")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {x.shape}; needed is [..., {weight.shape[1]}], the K of weight {weight.shape}")
