"""The arithmetic of `_tiles.NumpyStep`, compiled by Numba: the same bits, several times as fast.

Importing this module needs Numba. The proof that the arithmetic is exact is in `_tiles`; LLVM keeps it so because
Numba neither reorders nor contracts float32 operations unless asked to (`fastmath`).
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from cufuse.emulation._tiles import HIGHEST, LOWEST, NO_PRODUCT, ZERO, Float32, Int16


def _compiled(function: Callable[..., int]) -> Callable[..., int]:
    """Compile without holding the GIL, and keep the machine code on disk where there is a place to write to.

    A full disk or a damaged file of that cache costs a compilation in this process, not the result.
    """
    compiled: Callable[..., int]
    try:
        compiled = numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        return numba.njit(nogil=True)(function)

    def call(*arguments: Any) -> int:
        nonlocal compiled
        try:
            return compiled(*arguments)
        except Exception:  # the function raises nothing, and reading or writing the cache comes before it begins
            compiled = numba.njit(nogil=True)(function)
            return compiled(*arguments)

    return call


@_compiled
def _rows(
    a_values: Any, a_exponents: Any, b_values: Any, b_exponents: Any, c: Any, left: Any,
    exponents: Any, scale: Any, total: Any, exact: Any, fraction_bits: Any,
) -> int:  # fmt: skip
    """One step on c [rows, columns]; marks in `left` the outputs not touched and returns how many there are.

    Terms are taken four at a time so that what is kept per output is loaded and stored once for four products; L is
    a multiple of four on every tensor core. Inner loops run over the columns, which LLVM turns into vectors.
    """
    columns = c.shape[1]
    scale_bits = scale.view(np.int32)
    exact_bits = exact.view(np.int64)
    untouched = 0
    for m in range(c.shape[0]):
        row = c[m]
        row_bits = row.view(np.int32)
        for n in range(columns):
            field = np.int16(((row_bits[n] >> 23) & 0xFF) - 127)
            exponents[n] = field if row[n] != 0 else np.int16(ZERO)
            total[n] = 0
        for k in range(0, a_values.shape[0], 4):
            e0, e1, e2, e3 = a_exponents[k, m], a_exponents[k + 1, m], a_exponents[k + 2, m], a_exponents[k + 3, m]
            f0, f1, f2, f3 = b_exponents[k], b_exponents[k + 1], b_exponents[k + 2], b_exponents[k + 3]
            for n in range(columns):
                low = max(np.int16(e0 + f0[n]), np.int16(e1 + f1[n]))
                high = max(np.int16(e2 + f2[n]), np.int16(e3 + f3[n]))
                exponents[n] = max(exponents[n], max(low, high))
        least, most = np.int16(LOWEST), np.int16(HIGHEST)
        for n in range(columns):
            least, most = min(least, exponents[n]), max(most, exponents[n])
            clipped = min(max(exponents[n], np.int16(LOWEST)), np.int16(HIGHEST))
            scale_bits[n] = np.int32(fraction_bits + 127 - clipped) << 23
        for k in range(0, a_values.shape[0], 4):
            a0, a1, a2, a3 = a_values[k, m], a_values[k + 1, m], a_values[k + 2, m], a_values[k + 3, m]
            b0, b1, b2, b3 = b_values[k], b_values[k + 1], b_values[k + 2], b_values[k + 3]
            for n in range(columns):
                s = scale[n]
                low2 = np.int32(a0 * b0[n] * s) + np.int32(a1 * b1[n] * s)
                high2 = np.int32(a2 * b2[n] * s) + np.int32(a3 * b3[n] * s)
                total[n] += low2 + high2
        for n in range(columns):
            exact[n] = np.float64(total[n]) + np.float64(np.int32(row[n] * scale[n]))
            scale_bits[n] = (254 << 23) - scale_bits[n]
        for n in range(columns):
            exact_bits[n] &= -(1 << 29)
        if least == LOWEST and most == HIGHEST:
            for n in range(columns):
                row[n] = np.float32(exact[n]) * scale[n]
            continue
        for n in range(columns):
            outside = exponents[n] > HIGHEST or NO_PRODUCT < exponents[n] < LOWEST
            left[m, n] = outside
            if outside:
                untouched += 1
            else:
                row[n] = np.float32(exact[n]) * scale[n]
    return untouched


class NumbaStep:
    """The step for outputs with LOWEST <= e_max <= HIGHEST, and for those whose terms are all zero."""

    def __init__(self, terms: int, fraction_bits: int, columns: int) -> None:
        self.fraction_bits = np.int32(fraction_bits)
        self.exponents = np.empty(columns, np.int16)
        self.scale = np.empty(columns, np.float32)
        self.total = np.empty(columns, np.int32)
        self.exact = np.empty(columns, np.float64)
        self.left = np.zeros((0, columns), np.bool_)

    def __call__(
        self, a_values: Float32, a_exponents: Int16, b_values: Float32, b_exponents: Int16, c: Float32
    ) -> NDArray[np.bool_] | None:
        if self.left.shape != c.shape:
            self.left = np.zeros(c.shape, np.bool_)
        untouched = _rows(
            a_values, a_exponents, b_values, b_exponents, c, self.left,
            self.exponents, self.scale, self.total, self.exact, self.fraction_bits,
        )  # fmt: skip
        if untouched == 0:
            return None
        left, self.left = self.left, np.zeros((0, 0), np.bool_)  # rows without such outputs were not written
        return left
