"""The projection ``x W^T`` with the order of a tensor core."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from cufuse import _arrays, named_recipes
from cufuse.bf16 import bfloat16, nearest
from cufuse.emulation import cublas, tensor_core
from cufuse.emulation.cublas import AssumedSlicesWarning
from cufuse.norm import rounding_remedy
from cufuse.quantised import projection
from cufuse.quantised.weight import QuantisedWeight, dequantise
from cufuse.recipe import Gemm, Recipe

_RECORDED_CORE = "sm_90"


def linear(
    x: Any, weight: Any, *, recipe: str | Recipe = "torch", k_slices: int | None = None, out: Any = None
) -> Any:
    """Matrix product with a weight stored row by row, as ``torch.nn.functional.linear`` without a bias.

    Formula: ``out[..., n] = sum over k of x[..., k] * weight[n, k]``: K ascending, one tensor-core block at a time on one float32
    accumulator (``cufuse.emulation.tensor_core``), slices of K added in float32 first to last, then rounded if the recipe says.

    Parameters
    ----------
    x : [..., K], bfloat16; float32 too where the recipe's projection takes float32 (split exactly into three bfloat16 parts).
    weight : [N, K], bfloat16.
    recipe : name or Recipe; ``recipe.gemm`` is used.
    k_slices : number of slices of K; None takes the recipe's. Where the recipe says "cublas", NumPy arrays take the
        recorded number (the Qwen3 projections at M <= 8192 on an H200), CuPy arrays that of the installed cuBLASLt; where there is
        none, one slice is assumed, with an AssumedSlicesWarning.
    out : [..., N] array of the result's dtype to write to; it may not overlap an input.

    Returns
    -------
    [..., N], bfloat16 or float32 (``recipe.gemm.output``).

    Special values: a NaN, infinity times zero, or infinities of both signs give NaN (0x7FFF in bfloat16); a zero sum is +0.
    Accuracy: the bits of the recipe. Each block truncates toward zero: with u = 2**-23, B = ceil(K/16) + slices (three times as
    many for float32 activations) and T the largest magnitude of a product or partial sum, the accumulator is within 17 B u T of
    the exact sum.
    Equal to ``torch.nn.functional.linear``: recipe "torch" on an H200, wherever K and N are multiples of 8 (every Qwen3 projection,
    K = 96 and 1000, N = 8, 96 and 1000, M from 1 to 4096: 0 differing bits). Where K or N is not, cuBLAS takes other kernels for
    most shapes: the result is then the same sum in this recipe's order, not PyTorch's bits (``tests/test_gpu_projections.py``
    lists the compared ones with PyTorch's order).

    Raises TypeError for kinds and dtypes, ValueError for shapes, k_slices and an overlapping ``out``.
    """
    call, done = _arrays.repeated("linear", (out, x, weight), recipe, k_slices)
    if done:
        return out
    numerics = named_recipes.get(recipe)
    gemm = numerics.gemm
    backend = _arrays.backend({"out": out}, x=x, weight=weight)
    _check(x, weight, numerics, k_slices)
    n, k = weight.shape
    dtype = bfloat16 if gemm.output == "bfloat16" else np.dtype(np.float32)
    result = _arrays.output(out, (*x.shape[:-1], n), dtype, backend, x)
    if result.size == 0:
        return result
    if backend == "cupy":
        from cufuse import _gpu_gemm

        return _gpu_gemm.linear(x, weight, gemm, k_slices, result, call)
    _arrays.refuse_overlap(out, x=x, weight=weight)
    rows = np.ascontiguousarray(x).reshape(-1, k)
    slices = slices_of(rows.shape[0], n, k, gemm, k_slices)
    result[...] = project(rows, weight, gemm, slices).reshape(result.shape)
    return result


def project(
    x: np.ndarray,
    weight: np.ndarray | QuantisedWeight,
    gemm: Gemm,
    k_slices: int,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """The emulation behind ``linear``: rows [M, K] (bfloat16, or float32 for a float32 recipe) times weight [N, K]^T."""
    if isinstance(weight, QuantisedWeight):
        if gemm.quantised != "decoded":
            return projection.project(x, weight, gemm, k_slices, progress)
        weight = np.asarray(dequantise(weight, dtype=bfloat16))
    activations: Any = x
    if x.dtype == np.float32:
        activations = tensor_core.split_float32(x)
        if np.isfinite(weight).all():
            # parts that are zero everywhere leave an accumulator as it is (it has fewer bits than a block keeps), unless
            # an infinity makes NaN of them
            high, *lower = activations
            activations = (high, *(part for part in lower if part.astype(bool).any()))
    total = tensor_core.matmul(activations, weight, core=gemm.core, k_slices=k_slices, progress=progress)
    return nearest(total) if gemm.output == "bfloat16" else total


def slices_of(m: int, n: int, k: int, gemm: Gemm, k_slices: int | None = None, *, quantised: bool = False) -> int:
    """The slices of K that a NumPy product takes; one, with an AssumedSlicesWarning, where cuBLAS's answer is not recorded."""
    if k_slices is not None:
        return k_slices
    if quantised and gemm.quantised != "decoded":
        return gemm.quantised_slices
    if gemm.k_slices != "cublas":
        return gemm.k_slices
    recorded = cublas.recorded_slices(m, n, k) if gemm.core == _RECORDED_CORE else None
    if recorded is None:
        warnings.warn(
            f"how cuBLAS cuts K for M = {m}, N = {n}, K = {k} on {gemm.core} is not recorded: one slice assumed; "
            "give k_slices if you know it",
            AssumedSlicesWarning,
            stacklevel=3,
        )
        return 1
    return recorded


def slices_for(m: int, weight: Any, gemm: Gemm, k_slices: int | None = None) -> int:
    """``slices_of`` for a product with this weight [N, K], bfloat16 or quantised."""
    n, k = weight.shape
    return slices_of(m, n, k, gemm, k_slices, quantised=isinstance(weight, QuantisedWeight))


def check_slices(k_slices: int | None) -> None:
    """ValueError unless k_slices is None or an integer >= 1."""
    if k_slices is not None and (isinstance(k_slices, bool) or not isinstance(k_slices, (int, np.integer)) or k_slices < 1):
        raise ValueError(f"k_slices is {k_slices!r}; needed is an integer >= 1, or None for the recipe's")


def memory_of(weight: Any) -> Any:
    """The array behind a projection's weight: itself, or the bytes of a quantised one."""
    return weight.data if isinstance(weight, QuantisedWeight) else weight


def check_projection_weight(name: str, weight: Any) -> None:
    """TypeError unless a projection's weight is bfloat16 or quantised."""
    if not isinstance(weight, QuantisedWeight) and weight.dtype != bfloat16:
        raise TypeError(f"{name} has dtype {weight.dtype}; needed is bfloat16: {rounding_remedy(weight)}")


def _check(x: Any, weight: Any, recipe: Recipe, k_slices: int | None) -> None:
    if x.dtype != bfloat16 and not (x.dtype == np.float32 and recipe.gemm.input == "float32"):
        takes = "bfloat16" if recipe.gemm.input == "bfloat16" else "bfloat16 or float32"
        raise TypeError(f"x has dtype {x.dtype}; the projection of recipe {recipe.name!r} takes {takes}: {rounding_remedy(x)}")
    check_projection_weight("weight", weight)
    check_slices(k_slices)
    if weight.ndim != 2 or weight.shape[1] == 0:
        raise ValueError(f"weight has shape {weight.shape}; needed is [N, K] with K >= 1")
    if x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x has shape {x.shape}; needed is [..., {weight.shape[1]}], the K of weight {weight.shape}")
