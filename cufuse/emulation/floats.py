"""float32 arithmetic that NumPy lacks: the fused multiply-add."""

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Float32Array: TypeAlias = NDArray[np.float32]
Float64Array: TypeAlias = NDArray[np.float64]

# A float64 lies halfway between two float32 when the 29 bits that float32 lacks are exactly this.
_TIE_MASK = np.int64((1 << 29) - 1)
_TIE = np.int64(1 << 28)
# Below 2**-125 the spacing of float32 stops shrinking, so that the halfway points lie elsewhere.
_SMALL = np.float64(2.0**-125)


def fma32(a: Float32Array, b: Float32Array, c: Float32Array) -> Float32Array:
    """``a * b + c`` in float32 with one rounding, to nearest even: CUDA's ``__fmaf_rn``, C's ``fmaf``.

    Shapes: broadcast against one another. dtype: float32 in, float32 out. Special values as in IEEE 754: subnormal
    operands and results are kept, ``0 * inf`` is NaN, an exact zero is +0 unless both terms are -0. NaN payloads are
    NumPy's. Correctly rounded for all operands.

    Proof. The product of two 24-bit significands has at most 48 bits and an exponent between -298 and 255: it is exact
    in float64. The float64 sum ``s`` of product and ``c`` is off by ``e``, which Knuth's TwoSum delivers exactly
    (nothing overflows, and every value is a multiple of 2**-298, so nothing underflows). Rounding ``s`` to float32
    gives the float32 nearest to ``s + e``, except where ``s`` is itself a halfway point between two float32 and ``e``
    breaks the tie (for any other ``s``, no halfway point lies between ``s`` and ``s + e``: halfway points are
    float64, and the float64 nearest to ``s + e`` is ``s``). There ``s`` is replaced by the odd one of the two float64
    around ``s + e``, which is no halfway point and lies on the right side of it: 53 >= 24 + 2 bits (Boldo and
    Melquiond, "Emulation of FMA and correctly rounded sums", 2008), and float32 subnormals have fewer bits still.
    """
    for name, operand in (("a", a), ("b", b), ("c", c)):
        if operand.dtype != np.float32:
            raise TypeError(f"{name} has dtype {operand.dtype}; needed is float32: cast it, or use float64 itself")
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.multiply(a, b, dtype=np.float64)
        addend = np.asarray(c, np.float64)
        total = np.asarray(product + addend)
        tie = (total.view(np.int64) & _TIE_MASK) == _TIE
        tie |= (np.abs(total) < _SMALL) & (total != 0)  # a zero sum is exact
        if tie.any():
            shape = total.shape
            total[tie] = _sum_to_odd(np.broadcast_to(product, shape)[tie], np.broadcast_to(addend, shape)[tie])
        return total.astype(np.float32)


def _sum_to_odd(x: Float64Array, y: Float64Array) -> Float64Array:
    """``x + y`` in float64, rounded to odd: of the two neighbours of an inexact sum, the one whose last bit is 1."""
    total = x + y
    y_part = total - x
    error = (x - (total - y_part)) + (y - y_part)  # Knuth's TwoSum: x + y == total + error
    bits = total.view(np.int64)
    outward = (error > 0) == (total > 0)
    moved = bits + np.where(outward, np.int64(1), np.int64(-1))
    inexact_and_even = (error != 0) & ((bits & 1) == 0) & np.isfinite(total)
    return np.where(inexact_and_even, moved, bits).view(np.float64)
