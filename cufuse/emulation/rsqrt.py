"""Reciprocal square root in float32: as ``rsqrt.approx.f32`` computes it on an H200, and correctly rounded.

The instruction reads a table in the chip, which no formula replaces. It was measured for every float32: the results in [1, 4)
are kept as differences from the correctly rounded ones, and every other pair of binades (subnormals too) repeats them, shifted
by a power of two. ``data/rsqrt.json`` names device, driver, CUDA version and the script that measured it. The table is taken
for every architecture; only sm_90 was measured.
"""

import functools
import lzma
from importlib import resources

import numpy as np

_ONE = 0x3F800000


def rsqrt(x: np.ndarray, mode: str = "hardware") -> np.ndarray:
    """1 / sqrt(x) for a float32 array.

    mode "hardware": within 2 ulp of the correct result, the H200's bits. mode "correct": correctly rounded (float64's
    1/sqrt rounded to float32 is that for every float32, checked exhaustively).
    Special values: +0 gives infinity, -0 minus infinity, infinity 0; negative values and NaN give NaN, bits 0x7FFFFFFF.
    Raises ValueError for another mode, TypeError for another dtype.
    """
    if mode not in ("hardware", "correct"):
        raise ValueError(f"mode is {mode!r}; needed is 'hardware' or 'correct'")
    if x.dtype != np.float32:
        raise TypeError(f"x has dtype {x.dtype}; needed is float32")
    shape = x.shape
    x = np.ascontiguousarray(x).reshape(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        result = (1.0 / np.sqrt(x.astype(np.float64))).astype(np.float32)
    if mode == "hardware":
        ordinary = np.isfinite(x) & (x > 0)
        result[ordinary] = _from_table(x[ordinary])
    result.view(np.uint32)[np.isnan(result)] = 0x7FFFFFFF
    return result.reshape(shape)


def _from_table(x: np.ndarray) -> np.ndarray:
    # x = scaled * 4**half with scaled in [1, 4); ldexp and frexp are exact, also for subnormals
    exponent = np.frexp(x)[1] - 1
    half = exponent >> 1
    scaled = np.ldexp(x, -2 * half)
    correct = (1.0 / np.sqrt(scaled.astype(np.float64))).astype(np.float32)
    code = correct.view(np.int32) + _table()[scaled.view(np.int32) - _ONE]
    return np.asarray(np.ldexp(code.view(np.float32), -half))


@functools.cache
def _table() -> np.ndarray:
    data = resources.files("cufuse.emulation").joinpath("data/rsqrt_sm90.xz").read_bytes()
    # one byte a significand: the difference in ulp plus two
    return np.asarray(np.frombuffer(lzma.decompress(data), np.int8) - np.int8(2))
