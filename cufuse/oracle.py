"""The truth: the same formulas in float64, from the same inputs, with no rounding on the way.

Results are float64 arrays. ``rounded`` rounds one to bfloat16, once; ``math.fsum`` forms give exactly rounded sums where a
near tie has to be decided. Bounds, with u = 2**-53:

- a product of two bfloat16 values is exact in float64 (8 + 8 <= 53 significand bits) unless it underflows below 2**-1074,
  which needs factors below 2**-537: impossible;
- a sum of K such products by ``numpy.matmul`` in any order is within ``K u`` times the sum of their magnitudes (first order;
  Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1);
- a norm is a sum of squares (no cancellation: relative error at most K u), a division, a root and two products: relative
  error at most (K / 2 + 4) u. (x + residual and weight + offset are exact unless their exponents are more than 45 apart.)

``exact=True`` takes the sums by ``math.fsum``: exactly rounded whatever cancels, and far slower. It takes
finite values only: infinities of both signs are fsum's ValueError, sums beyond float64 its OverflowError.

Inputs are NumPy arrays, or what ``numpy.asarray`` takes, of any floating dtype; all become float64, which holds every bfloat16,
float16 and float32 value. Special values are those of the formula in IEEE arithmetic: a NaN reaches all that depends on it,
infinity over infinity and infinity times zero are NaN, and subnormals count. Nothing is checked beyond what NumPy
refuses: shapes that do not fit are its ValueError, CuPy arrays its TypeError.
"""

import math
from typing import Any

import numpy as np

from cufuse.bf16 import round_to_bf16
from cufuse.oracle_decoder import add, attention, float64, silu, softmax, swiglu

__all__ = [
    "add", "attention", "linear", "qkv_stages", "rms_norm", "rope", "rope_angles", "rounded", "silu", "softmax", "swiglu",
]  # fmt: skip


def rounded(x: np.ndarray) -> np.ndarray:
    """A float64 result of any shape as bfloat16: one rounding to nearest even, right at near ties, subnormals and overflow.

    Every NaN becomes 0x7FFF, as in ``cufuse.round_to_bf16``.
    """
    return np.asarray(round_to_bf16(np.asarray(x, np.float64)))


def rms_norm(
    x: Any, weight: Any, *, eps: float = 1e-6, residual: Any = None, weight_offset: float = 0.0, exact: bool = False
) -> np.ndarray:
    """``z / sqrt(mean(z*z) + eps) * (weight + weight_offset)`` of z = x + residual, over the last axis, float64.

    Parameters
    ----------
    x, residual : [..., K]; no residual is a residual of zeros.
    weight : [K].
    exact : the sum of squares by ``math.fsum``.

    A row of zeros gives zeros, with eps = 0 NaN; a row with an infinity gives NaN there and zeros elsewhere.
    Relative error and errors: head of this module.
    """
    z = float64(x) if residual is None else float64(x) + float64(residual)
    if exact:
        flat = z.reshape(-1, z.shape[-1])
        total = np.array([math.fsum(value * value for value in row) for row in flat.tolist()]).reshape(*z.shape[:-1], 1)
    else:
        total = np.sum(z * z, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(z / np.sqrt(total / z.shape[-1] + eps) * (float64(weight) + weight_offset))


def linear(x: Any, weight: Any, *, exact: bool = False) -> np.ndarray:
    """``x W^T`` for x [..., K] and weight [N, K]: [..., N], float64.

    exact : every sum by ``math.fsum``, finite values only. Accuracy otherwise, and errors: head of this module.
    """
    wide, other = float64(x), float64(weight)
    if not exact:
        with np.errstate(invalid="ignore", over="ignore"):
            return np.asarray(wide @ other.T)
    flat = wide.reshape(-1, wide.shape[-1])
    sums = [[math.fsum((row * column).tolist()) for column in other] for row in flat]
    return np.array(sums).reshape(*wide.shape[:-1], other.shape[0])


def rope_angles(positions: Any, head_dim: int, *, base: float = 1e6) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [..., D] of ``position * base**(-2i/D)`` in float64, both halves alike.

    positions : integers [...]; head_dim : D, even. (``cufuse.rope_tables`` gives Hugging Face's, of float32 angles.)
    """
    angle = np.asarray(positions)[..., None] * base ** (-np.arange(0, head_dim, 2) / head_dim)
    return np.concatenate([np.cos(angle)] * 2, axis=-1), np.concatenate([np.sin(angle)] * 2, axis=-1)


def rope(x: Any, cos: Any, sin: Any) -> np.ndarray:
    """``x * cos + rotate_half(x) * sin`` for x [..., H, D] and tables [..., D]: x's shape, float64.

    rotate_half(x) is -x's second half, then its first. Two products and a sum: within 3 2**-53 of the magnitudes added.
    """
    wide = float64(x)
    half = wide.shape[-1] // 2
    rotated = np.concatenate([-wide[..., half:], wide[..., :half]], axis=-1)
    return np.asarray(wide * float64(cos)[..., None, :] + rotated * float64(sin)[..., None, :])


def qkv_stages(
    x: Any,
    norm_weight: Any,
    weights: tuple[Any, ...],
    q_norm_weight: Any,
    k_norm_weight: Any,
    head_dim: int,
    *,
    eps: float = 1e-6,
    cos: Any = None,
    sin: Any = None,
    weight_offset: float = 0.0,
) -> dict[str, np.ndarray]:
    """Every stage of ``rms_norm_qkv`` (``cufuse.qkv.STAGES``) in float64 for x [M, K] and weights (q, k, v).

    x : [M, K]; norm_weight [K]; weights (q, k, v), each [H D, K]; q_norm_weight and k_norm_weight [D], or None for no such norm;
    cos, sin : [M, D], or None for no rotation; ``weight_offset`` is that of all norms.

    Returns a dict of float64 arrays: "normalised" [M, K], all others [M, H, D]; stages that are left out are missing.
    """
    found = {"normalised": rms_norm(x, norm_weight, eps=eps, weight_offset=weight_offset)}
    for name, weight in zip("qkv", weights, strict=True):
        found[name] = linear(found["normalised"], weight).reshape(len(found["normalised"]), -1, head_dim)
    for name, head_weight in (("q", q_norm_weight), ("k", k_norm_weight)):
        if head_weight is not None:
            found[f"{name}_normed"] = rms_norm(found[name], head_weight, eps=eps, weight_offset=weight_offset)
        if cos is not None:
            found[f"{name}_rotated"] = rope(found.get(f"{name}_normed", found[name]), cos, sin)
    return found
