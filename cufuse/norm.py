"""RMSNorm, alone and after a residual sum."""

from typing import Any

import numpy as np

from cufuse import _arrays, named_recipes
from cufuse.bf16 import bfloat16, nearest
from cufuse.emulation.rsqrt import rsqrt
from cufuse.emulation.sums import SUM_ORDERS, mean_of_squares
from cufuse.recipe import Norm, Recipe

_LARGEST_EPS = float(np.finfo(np.float32).max)


def rms_norm(x: Any, weight: Any, *, eps: float = 1e-6, recipe: str | Recipe = "torch", out: Any = None) -> Any:
    """Root-mean-square normalisation of the last axis.

    Formula: ``y = x * rsqrt(mean(x*x) + eps) * weight``; where it is rounded, in which order the squares are summed and how
    the root is taken is in ``recipe.norm`` (``print(cufuse.recipes["torch"])``).

    Parameters
    ----------
    x : [..., K], bfloat16; float32 too where the recipe has float32 activations. Any strides for
        NumPy; for CuPy unit stride along K and rows at two levels of strides at most, such as the heads of a packed projection
        (ValueError otherwise). The rows are counted together: PyTorch's order of the sum depends on their number.
    weight : [K], bfloat16, or float32 where the recipe takes it ("torch": the result is then float32, PyTorch's promotion).
    eps : added to the mean as a float32; finite and >= 0.
    recipe : name or Recipe.
    out : array of the result's shape and dtype to write to. It may not overlap an input.

    Returns
    -------
    [..., K]: bfloat16, or float32 where the recipe leaves it so.

    Special values: a row of zeros gives zeros (signed) for eps > 0, NaN for eps = 0; a NaN or an infinity in a row makes its
    statistic NaN or infinite and the row NaN or zero, as in the formula. Subnormals take part.
    Accuracy: the bits of the recipe; against the real value about 2**-8 relative for each rounding to bfloat16.

    Raises TypeError for kinds and dtypes, ValueError for shapes, eps and an overlapping ``out``.
    """
    call, done = _arrays.repeated("rms_norm", (out, x, weight), recipe, eps)
    if done:
        return out
    numerics = named_recipes.get(recipe)
    backend = _arrays.backend({"out": out}, x=x, weight=weight)
    columns = _check(x, weight, eps, numerics)
    result = _arrays.output(out, x.shape, _result_dtype(numerics.norm, weight), backend, x)
    if x.size == 0:
        return result
    if backend == "cupy":
        from cufuse import _gpu_norm

        return _gpu_norm.rms_norm(x, weight, eps, numerics.norm, result, call)
    _arrays.refuse_overlap(out, x=x, weight=weight)
    rows = np.ascontiguousarray(x).reshape(-1, columns).astype(np.float32)
    result[...] = normalise(rows, weight, eps, numerics.norm).reshape(x.shape)
    return result


def add_rms_norm(
    x: Any, residual: Any, weight: Any, *, eps: float = 1e-6, recipe: str | Recipe = "torch", out: Any = None
) -> tuple[Any, Any]:
    """Residual sum, then RMSNorm of it.

    Formula: ``z = x + residual; y = rms_norm(z)``. ``recipe.residual_sum`` says whether z is rounded to bfloat16 before it is
    normalised ("rounded"), only where it is stored ("stored rounded"), or never ("float32").

    Parameters are those of ``rms_norm``; residual is [..., K] of x's shape, bfloat16, or float32 where the recipe has float32
    activations. out : a pair of arrays (normalised, new residual) to write to.

    Returns
    -------
    (normalised, new residual), each [..., K]; the new residual is float32 for "float32", bfloat16 otherwise.

    Special values and errors as ``rms_norm``.
    """
    numerics = named_recipes.get(recipe)
    outs = _arrays.outputs(out, ("normalised", "new residual"))
    call, done = _arrays.repeated("add_rms_norm", (*outs, x, residual, weight), recipe, eps)
    if done:
        return outs[0], outs[1]
    backend = _arrays.backend({"out[0]": outs[0], "out[1]": outs[1]}, x=x, residual=residual, weight=weight)
    columns = _check(x, weight, eps, numerics)
    check_activations("residual", residual, numerics)
    _arrays.require_shape("residual", residual, x.shape, "x's shape")
    kept = np.float32 if numerics.residual_sum == "float32" else bfloat16
    normalised = _arrays.output(outs[0], x.shape, _result_dtype(numerics.norm, weight), backend, x, "out[0]")
    new_residual = _arrays.output(outs[1], x.shape, kept, backend, x, "out[1]")
    if x.size == 0:
        return normalised, new_residual
    if backend == "cupy":
        from cufuse import _gpu_norm

        _gpu_norm.add_rms_norm(x, residual, weight, eps, numerics, normalised, new_residual, call)
        return normalised, new_residual
    _arrays.refuse_overlap(*outs, x=x, residual=residual, weight=weight)
    rows, stored = add_residual(x, residual, numerics)
    new_residual[...] = stored
    normalised[...] = normalise(rows.reshape(-1, columns), weight, eps, numerics.norm, True).reshape(x.shape)
    return normalised, new_residual


def add_residual(x: np.ndarray, residual: np.ndarray, recipe: Recipe) -> tuple[np.ndarray, np.ndarray]:
    """(what is normalised, float32; what is stored) of x + residual under a recipe, NumPy arrays."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.ascontiguousarray(x.astype(np.float32) + residual.astype(np.float32))
    if recipe.residual_sum == "float32":
        return total, total
    rounded = nearest(total)
    return (rounded.astype(np.float32) if recipe.residual_sum == "rounded" else total), rounded


def normalise(x: np.ndarray, weight: np.ndarray, eps: float, norm: Norm, after_residual: bool = False) -> np.ndarray:
    """One norm of a recipe on float32 rows [M, K]: the emulation behind ``rms_norm`` and the head norms."""
    r = reciprocal_rms(x, eps, norm, after_residual)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        h = x * r[:, None]
        if norm.round_normalised:
            h = nearest(h).astype(np.float32)
        scale = weight.astype(np.float32)
        if norm.weight_offset != 0:
            scale = scale + np.float32(norm.weight_offset)
        y = h * scale
    return nearest(y) if _result_dtype(norm, weight) == bfloat16 else y


def reciprocal_rms(x: np.ndarray, eps: float, norm: Norm, after_residual: bool = False) -> np.ndarray:
    """The factor r [M] of float32 rows [M, K]."""
    order = norm.sum_order_after_residual if after_residual and norm.sum_order_after_residual else norm.sum_order
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        own = SUM_ORDERS[order].has_own_mean(x.shape[1])
        mean = mean_of_squares(x, order, contract=norm.contract, mean=None if own else norm.mean)
        return rsqrt(mean + np.float32(eps), norm.rsqrt)


def check_activations(name: str, x: Any, recipe: Recipe) -> None:
    """TypeError unless the recipe takes activations of x's dtype."""
    if x.dtype == bfloat16 or (recipe.float32_activations and x.dtype == np.float32):
        return
    takes = "bfloat16 or float32" if recipe.float32_activations else "bfloat16"
    remedy = rounding_remedy(x)
    if x.dtype == np.float32:
        remedy += " or take a recipe with float32 activations, such as 'float32'"
    raise TypeError(f"{name} has dtype {x.dtype}; recipe {recipe.name!r} takes {takes}: {remedy}")


def rounding_remedy(x: Any) -> str:
    """What turns an array of another dtype into a bfloat16 one, for errors."""
    if x.dtype in (np.float32, np.float64):
        return "round it with cufuse.round_to_bf16"
    return "convert it with .astype(numpy.float32) and round that with cufuse.round_to_bf16"


def check_norm_weight(name: str, weight: Any, norm: Norm, recipe: Recipe) -> None:
    """TypeError unless this norm takes a weight of this dtype."""
    if weight.dtype == bfloat16 or (weight.dtype == np.float32 and norm.float32_weight != "refuse"):
        return
    takes = "bfloat16" if norm.float32_weight == "refuse" else "bfloat16 or float32"
    raise TypeError(f"{name} has dtype {weight.dtype}; recipe {recipe.name!r} takes {takes}: {rounding_remedy(weight)}")


def check_eps(eps: float) -> None:
    """ValueError unless eps is a number >= 0 that is finite in float32."""
    if not (isinstance(eps, (int, float, np.floating)) and 0 <= eps <= _LARGEST_EPS):
        raise ValueError(f"eps is {eps!r}; needed is a finite number >= 0, such as the model's rms_norm_eps")


def _check(x: Any, weight: Any, eps: float, recipe: Recipe) -> int:
    check_activations("x", x, recipe)
    check_norm_weight("weight", weight, recipe.norm, recipe)
    check_eps(eps)
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {x.shape}; needed is [..., K] with K >= 1")
    columns = int(x.shape[-1])
    _arrays.require_shape("weight", weight, (columns,), "one weight for each of x's columns")
    return columns


def _result_dtype(norm: Norm, weight: Any) -> Any:
    promoted = weight.dtype == np.float32 and norm.float32_weight == "promote"
    return bfloat16 if norm.round_weighted and not promoted else np.dtype(np.float32)
