"""The residual sum, alone (``add_rms_norm`` has it fused with a norm)."""

from typing import Any

import numpy as np

from cufuse import _arrays, named_recipes
from cufuse.bf16 import bfloat16
from cufuse.norm import add_residual, check_activations
from cufuse.recipe import Recipe


def add(x: Any, residual: Any, *, recipe: str | Recipe = "torch", out: Any = None) -> Any:
    """``x + residual``: the sum in float32, rounded to bfloat16 unless ``recipe.residual_sum`` is "float32".

    Parameters
    ----------
    x, residual : arrays of one shape, bfloat16; float32 too where the recipe has float32 activations.
    recipe : name or Recipe.
    out : array of the result's shape and dtype to write to; it may not overlap an input.

    Returns
    -------
    Array of x's shape: what ``add_rms_norm`` returns as the new residual.

    Special values: infinities of both signs give NaN (0x7FFF). Accuracy: the correctly rounded sum.
    Raises TypeError for kinds and dtypes, ValueError for shapes and an overlapping ``out``.
    """
    numerics = named_recipes.get(recipe)
    backend = _arrays.backend({"out": out}, x=x, residual=residual)
    for name, array in (("x", x), ("residual", residual)):
        check_activations(name, array, numerics)
    _arrays.require_shape("residual", residual, x.shape, "x's shape")
    dtype = np.dtype(np.float32) if numerics.residual_sum == "float32" else bfloat16
    result = _arrays.output(out, x.shape, dtype, backend, x)
    if x.size == 0:
        return result
    if backend == "cupy":
        from cufuse import _gpu_decoder

        return _gpu_decoder.add(x, residual, result)
    _arrays.refuse_overlap(out, x=x, residual=residual)
    result[...] = add_residual(x, residual, numerics)[1]
    return result
