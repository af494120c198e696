"""The truth of the operations behind the attention's front, in float64 from the same inputs; ``cufuse.oracle`` says how exact.

An exponential of float64 is within an ulp of 2**-52, a division and a product within half of one; the sums are of non-negative
numbers, so that a softmax is within (K + 8) 2**-52 of the true weight, relatively.
"""

import math
from typing import Any

import numpy as np


def add(x: Any, residual: Any) -> np.ndarray:
    """``x + residual`` of one shape [...], float64 (exact unless the exponents are more than 45 apart)."""
    return np.asarray(float64(x) + float64(residual))


def softmax(x: Any) -> np.ndarray:
    """``exp(x - max) / sum`` over the last axis of [..., K], float64.

    -inf has weight 0; a row with +inf or NaN, or of nothing but -inf, is NaN. An empty row is NumPy's ValueError.
    """
    wide = float64(x)
    with np.errstate(invalid="ignore", over="ignore"):
        exponentials = np.exp(wide - wide.max(axis=-1, keepdims=True))
        return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


def silu(x: Any) -> np.ndarray:
    """``x / (1 + exp(-x))``, elementwise, float64. +inf gives +inf, -inf NaN (as the formula does), -0 gives -0."""
    wide = float64(x)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(wide / (1 + np.exp(-wide)))


def swiglu(gate: Any, up: Any) -> np.ndarray:
    """``silu(gate) * up`` of one shape [...], elementwise, float64."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(silu(gate) * float64(up))


def attention(q: Any, k: Any, v: Any, *, scale: float | None = None, causal: bool = True) -> np.ndarray:
    """``softmax(q k^T scale) v`` per head for q [..., T, Hq, D], k, v [..., S, Hkv, D]: [..., T, Hq, D], float64.

    scale : by default 1 / sqrt(D). causal : query t of T sees keys up to S - T + t; keys that it must not see have no weight.
    Hq is a multiple of Hkv: query heads in order share the key heads.
    """
    queries, keys, values = (float64(x).swapaxes(-3, -2) for x in (q, k, v))
    group = queries.shape[-3] // keys.shape[-3]
    keys, values = (np.repeat(x, group, axis=-3) for x in (keys, values))
    factor = 1 / math.sqrt(queries.shape[-1]) if scale is None else scale
    scores = queries @ keys.swapaxes(-1, -2) * factor
    if causal:
        tokens, length = scores.shape[-2:]
        hidden = np.arange(length)[None] > np.arange(length - tokens, length)[:, None]
        scores = np.where(hidden, -np.inf, scores)
    return np.asarray((softmax(scores) @ values).swapaxes(-3, -2))


def float64(x: Any) -> np.ndarray:
    """The values as float64: bfloat16 and float32 values are float64 values, nothing is rounded."""
    return np.asarray(x).astype(np.float64)
