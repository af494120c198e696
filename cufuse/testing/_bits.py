"""Arrays of any library as NumPy arrays, their codes, and distances in units in the last place."""

import sys
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np

from cufuse.bf16 import bfloat16

UNSIGNED: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
NOT_COMPARABLE: Final = np.uint64(2**64 - 1)
"""The distance in ulp where one of the two is NaN."""

_FRACTION_BITS: Final = {bfloat16: 7, np.float16: 10, np.float32: 23, np.float64: 52}


def to_host(name: str, array: Any) -> np.ndarray:
    """A NumPy array of the same dtype and bits; CuPy arrays and PyTorch tensors are copied to the host.

    Raises TypeError for anything else (a list has no dtype whose bits could be compared).
    """
    if isinstance(array, (np.ndarray, np.generic)):
        return np.asarray(array)
    # looked up, not imported: whoever holds such an array has imported the library
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if cupy is not None and isinstance(array, cupy.ndarray):
        codes = cupy.asnumpy(array.view(f"u{array.dtype.itemsize}"))
        return np.asarray(codes).view(array.dtype)
    if torch is not None and isinstance(array, torch.Tensor):
        held = array.detach().cpu()
        if held.dtype == torch.bfloat16:  # NumPy has no such type of its own
            return np.asarray(held.view(torch.int16).numpy()).view(bfloat16)
        return np.asarray(held.numpy())
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    raise TypeError(f"{name} is a {kind}; needed is a NumPy or CuPy array or a PyTorch tensor: numpy.asarray converts lists")


def codes(array: np.ndarray) -> np.ndarray:
    """The bits as unsigned integers, any strides."""
    held = np.ascontiguousarray(array)  # gives an array without axes one
    return held.view(UNSIGNED[array.dtype.itemsize]).reshape(array.shape)


def is_float(dtype: np.dtype) -> bool:
    """Whether it is one of the four formats that have an ulp here."""
    return dtype.type in _FRACTION_BITS


def is_nan(array: np.ndarray) -> np.ndarray:
    """NaN, without the warnings that a signalling one can cause; False for integers."""
    if not is_float(array.dtype):
        return np.zeros(array.shape, bool)
    fraction = _FRACTION_BITS[array.dtype.type]
    width = 8 * array.dtype.itemsize
    found = codes(array)
    kind = found.dtype.type
    return np.asarray((found & kind((1 << width - 1) - 1)) > kind(((1 << width - 1 - fraction) - 1) << fraction))


def ulp_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many steps of their format lie between two arrays of one dtype (uint64).

    Zeros of both signs are 0 apart, infinity is one step above the largest finite value, two NaN are 0 apart, and a NaN is
    ``NOT_COMPARABLE`` from anything else. Integers: the difference.
    """
    if not is_float(a.dtype):
        wide = np.abs(a.astype(object) - b.astype(object))
        return np.asarray(wide, dtype=np.uint64)
    sign = np.uint64(1 << 8 * a.dtype.itemsize - 1)
    one, other = codes(a).astype(np.uint64), codes(b).astype(np.uint64)
    m, n = one & ~sign, other & ~sign
    same_side = (one & sign) == (other & sign)
    distance = np.where(same_side, np.maximum(m, n) - np.minimum(m, n), m + n)
    nan_a, nan_b = is_nan(a), is_nan(b)
    return np.where(nan_a & nan_b, np.uint64(0), np.where(nan_a | nan_b, NOT_COMPARABLE, distance))


def error_in_ulp(actual: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """``|actual - exact|`` in units of the last place that actual's format has at ``exact`` (float64), exact being float64.

    The unit is that of exact's binade, the smallest subnormal's below the normal range and the largest binade's beyond it. Equal
    infinities and two NaN are 0 apart; one NaN, or one infinity where the other is finite, is infinitely far.
    """
    fraction = _FRACTION_BITS[actual.dtype.type]
    info = {bfloat16: (-126, 127), np.float16: (-14, 15), np.float32: (-126, 127), np.float64: (-1022, 1023)}
    low, high = info[actual.dtype.type]
    with np.errstate(all="ignore"):  # signalling NaN, differences of infinities
        wide = actual.astype(np.float64)
        exponent = np.clip(np.frexp(np.where(np.isfinite(exact), exact, 1.0))[1] - 1, low, high)
        found = np.ldexp(np.abs(wide - exact), fraction - exponent)
        same = (wide == exact) | (np.isnan(wide) & np.isnan(exact))
        return np.where(same, 0.0, np.where(np.isfinite(found), found, np.inf))


def float64_to_odd(value: Fraction) -> float:
    """A rational number in float64, rounded to odd, so that one more rounding to a shorter format is right."""
    try:
        nearest = float(value)
    except OverflowError:
        return sys.float_info.max if value > 0 else -sys.float_info.max
    back = Fraction(nearest)
    if back == value:
        return nearest
    code = int(np.float64(nearest).view(np.uint64))
    if code & 1:
        return nearest
    if nearest == 0:  # below half the smallest subnormal
        return 5e-324 if value > 0 else -5e-324
    code += 1 if (value > back) == (nearest > 0) else -1
    return float(np.uint64(code).view(np.float64))


@dataclass(frozen=True)
class Element:
    """One element of two arrays that were compared: its place, and codes and values of both."""

    index: tuple[int, ...]
    actual: Any
    expected: Any

    def __str__(self) -> str:
        return f"{described(self.actual)}, expected {described(self.expected)}"


def described(value: Any) -> str:
    """A scalar with its code: "0x3f81 (1.0078125)"."""
    array = np.asarray(value)
    digits = 2 * array.dtype.itemsize
    with np.errstate(invalid="ignore"):
        number = float(array.astype(np.float64)) if is_float(array.dtype) else value
    return f"0x{int(codes(array)):0{digits}x} ({number!r})"
