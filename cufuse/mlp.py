"""The gated activation of the MLP: silu and SwiGLU."""

from typing import Any

import numpy as np

from cufuse import _arrays, named_recipes
from cufuse.bf16 import bfloat16, nearest
from cufuse.emulation.exponential import expf
from cufuse.norm import rounding_remedy
from cufuse.recipe import Mlp, Recipe


def silu(x: Any, *, recipe: str | Recipe = "torch", out: Any = None) -> Any:
    """``x / (1 + exp(-x))`` elementwise, as ``torch.nn.functional.silu`` on CUDA.

    Parameters
    ----------
    x : bfloat16, any shape and strides; float32 too where the recipe leaves the activation unrounded (``recipe.mlp``).
    recipe : name or Recipe.
    out : array of the result's shape and dtype to write to; it may not overlap x.

    Returns
    -------
    Array of x's shape: bfloat16, or float32 where ``recipe.mlp.round_activated`` is False.

    Special values: -inf gives NaN (inf / inf), inf gives inf, NaN NaN (0x7FFF); large negative x give -0.
    Accuracy: the bits of the recipe; all 65,536 bfloat16 inputs are compared with PyTorch's on an H200 by the tests.

    Raises TypeError for kinds and dtypes, ValueError for shapes and an overlapping ``out``.
    """
    numerics = named_recipes.get(recipe)
    backend = _arrays.backend({"out": out}, x=x)
    _check("x", x, numerics)
    result = _arrays.output(out, x.shape, _dtype(numerics.mlp.round_activated), backend, x)
    if x.size == 0:
        return result
    if backend == "cupy":
        from cufuse import _gpu_decoder

        return _gpu_decoder.swiglu(x, None, numerics.mlp, result)
    _arrays.refuse_overlap(out, x=x)
    result[...] = activated(np.ascontiguousarray(x), numerics.mlp)
    return result


def swiglu(gate: Any, up: Any, *, recipe: str | Recipe = "torch", out: Any = None) -> Any:
    """The MLP's gated activation, ``silu(gate) * up``.

    Formula: ``a = gate / (1 + exp(-gate)); y = a * up``; ``recipe.mlp`` says whether a and y are rounded to bfloat16.

    Parameters
    ----------
    gate, up : arrays of one shape, bfloat16; float32 too where the recipe's projections give float32.
    recipe : name or Recipe.
    out : array of the result's shape and dtype to write to; it may not overlap an input.

    Returns
    -------
    Array of gate's shape: bfloat16, or float32 where ``recipe.mlp.round_gated`` is False.

    Special values: as ``silu``, then those of a product. Errors: as ``silu``.
    """
    numerics = named_recipes.get(recipe)
    backend = _arrays.backend({"out": out}, gate=gate, up=up)
    for name, x in (("gate", gate), ("up", up)):
        _check(name, x, numerics)
    _arrays.require_shape("up", up, gate.shape, "gate's shape")
    result = _arrays.output(out, gate.shape, _dtype(numerics.mlp.round_gated), backend, gate)
    if gate.size == 0:
        return result
    if backend == "cupy":
        from cufuse import _gpu_decoder

        return _gpu_decoder.swiglu(gate, up, numerics.mlp, result)
    _arrays.refuse_overlap(out, gate=gate, up=up)
    result[...] = gated(activated(np.ascontiguousarray(gate), numerics.mlp), np.ascontiguousarray(up), numerics.mlp)
    return result


def activated(gate: np.ndarray, numerics: Mlp) -> np.ndarray:
    """The emulation behind ``silu``: contiguous bfloat16 or float32 of any shape -> bfloat16, or float32 where the recipe does not
    round; special values as ``silu``; nothing is checked."""
    wide = gate.astype(np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        result = wide / (np.float32(1) + expf(-wide, numerics.exponential))
    return nearest(result) if numerics.round_activated else result


def gated(a: np.ndarray, up: np.ndarray, numerics: Mlp) -> np.ndarray:
    """The product behind ``swiglu``: ``a * up`` of one shape, bfloat16, or float32 where the recipe does not round; nothing is
    checked."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        result = a.astype(np.float32) * up.astype(np.float32)
    return nearest(result) if numerics.round_gated else result


def _dtype(rounded: bool) -> Any:
    return bfloat16 if rounded else np.dtype(np.float32)


def _check(name: str, x: Any, recipe: Recipe) -> None:
    wide = not (recipe.mlp.round_activated and recipe.mlp.round_gated)
    if x.dtype == bfloat16 or (wide and x.dtype == np.float32):
        return
    takes = "bfloat16 or float32" if wide else "bfloat16"
    raise TypeError(f"{name} has dtype {x.dtype}; the MLP of recipe {recipe.name!r} takes {takes}: {rounding_remedy(x)}")
