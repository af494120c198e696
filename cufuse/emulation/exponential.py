"""CUDA's ``expf`` in NumPy: the range reduction that nvcc makes of it, around ``ex2.approx.ftz.f32``, which a table replaces.

What nvcc compiles (without fast math), read in its PTX and compared with it for every float32 on an H200::

    shifted = fma_down(saturate(fma(x, log2(e)/252, 0.5)), 252, 12582913);  whole = shifted - 12583039
    fraction = fma(x, log2(e) low, fma(x, log2(e) high, -whole));  expf(x) = ex2(fraction) * 2**whole

The instruction depends on so many bits of its operand in fixed point; ``data/ex2_sm90.xz`` holds the result for each of them as
the difference from ``ex2_reference``, ``data/ex2.json`` device, rule, counts and the script that measured it. The table is taken
for every architecture; only sm_90 was measured.
"""

import functools
import json
import lzma
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from cufuse.emulation.floats import Float32Array, fma32

_LOG2_E_252 = np.array(0x3BBB989D, np.uint32).view(np.float32)
_LOG2_E_HIGH = np.array(0x3FB8AA3B, np.uint32).view(np.float32)
_LOG2_E_LOW = np.array(0x32A57060, np.uint32).view(np.float32)
_HALF = np.array(0.5, np.float32)
_NAN = 0x7FFFFFFF


def expf(x: Float32Array, mode: str = "hardware") -> Float32Array:
    """exp(x) of a float32 array.

    mode "hardware": within 2 ulp of the correct result, CUDA's bits on an H200. mode "correct": float64's exponential, rounded to
    float32, which is the correctly rounded value but where it lies within float64's own error of a tie.
    Special values: exp(-inf) = 0, exp(inf) = inf; results below 2**-126 are subnormal; NaN gives NaN, bits 0x7FFFFFFF.
    Raises ValueError for another mode, TypeError for another dtype.
    """
    if mode not in ("hardware", "correct"):
        raise ValueError(f"mode is {mode!r}; needed is 'hardware' or 'correct'")
    if x.dtype != np.float32:
        raise TypeError(f"x has dtype {x.dtype}; needed is float32")
    x = np.asarray(x)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if mode == "correct" or not _recorded():
            result = np.exp(x.astype(np.float64)).astype(np.float32)
        else:
            steps = _steps(x)
            whole = np.asarray(steps - 126, np.float32)
            fraction = fma32(x, _LOG2_E_LOW, fma32(x, _LOG2_E_HIGH, -whole))
            scale = np.asarray((steps + 1) << 23, np.int32).view(np.float32)
            result = ex2(fraction) * scale
    result = np.asarray(result)
    nan = np.isnan(result)
    if nan.any():
        result.view(np.uint32)[nan] = _NAN
    return result


def _steps(x: Float32Array) -> np.ndarray:
    """floor(252 * saturate(x * log2(e) / 252 + 0.5)), int32: 126 + floor(x * log2(e)), between 0 and 252."""
    inner = fma32(x, _LOG2_E_252, _HALF)
    saturated = np.where(inner > 0, np.minimum(inner, np.float32(1)), np.float32(0))  # NaN gives 0
    # 252 times a float32 is exact in float64, and 12582913 is so large that fma_down leaves just the integer part
    return np.asarray(np.floor(saturated.astype(np.float64) * 252.0), np.int32)


def ex2(x: Float32Array) -> Float32Array:
    """``ex2.approx.ftz.f32``: 2**x with the H200's bits; results below 2**-126 are 0, above 2**128 infinite.

    Measured for every float32 in [-26, 4); beyond that the integer part is taken to move the exponent and nothing else.
    """
    rule = _rule()
    x = np.asarray(x, np.float32)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        inside = np.where((x >= -126) & (x < 128), x, np.float32(0)).astype(np.float64)
        cut = _cut_off(np.ldexp(inside, rule.bits), rule)
        whole = cut >> rule.bits
        index = cut & ((1 << rule.bits) - 1)
        codes = ex2_reference(index, rule.bits).view(np.int32) + _table()[index]
        result = np.ldexp(np.asarray(codes, np.int32).view(np.float32), whole.astype(np.int32))
    result = np.where(x < -126, np.float32(0), np.where(x >= 128, np.float32(np.inf), result))
    return np.asarray(np.where(np.isnan(x), np.uint32(_NAN).view(np.float32), result), np.float32)


def ex2_reference(q: np.ndarray, bits: int) -> Float32Array:
    """2**(q / 2**bits) for integers 0 <= q < 2**bits: products of float64 roots of two, rounded to float32 once.

    Square roots and products are all it takes, which IEEE 754 defines, so that every machine finds the same; it is the correctly
    rounded value but for near ties.
    """
    half = bits // 2
    high, low = _powers(bits - half, 0), _powers(half, bits - half)
    return np.asarray(high[q >> half] * low[q & ((1 << half) - 1)], np.float32)


@functools.cache
def _powers(count: int, skipped: int) -> np.ndarray:
    """2**(i / 2**(skipped + count)) for 0 <= i < 2**count, from the roots 2**(2**-k), k = skipped + 1 ... skipped + count."""
    root, roots = np.float64(2), []
    for _ in range(skipped + count):
        root = np.sqrt(root)
        roots.append(root)
    table = np.ones(1)
    for root in reversed(roots[skipped:]):  # the lowest bit first
        table = np.concatenate([table, table * root])
    return table


@functools.cache
def _recorded() -> bool:
    """Whether the table is there: until it was measured, the correctly rounded value stands in for it."""
    return resources.files("cufuse.emulation").joinpath("data/ex2.json").is_file()


class _Rule(NamedTuple):
    bits: int
    mode: str


def _cut_off(scaled: np.ndarray, rule: _Rule) -> np.ndarray:
    """The integer, int64, that the instruction makes of its operand times 2**bits. "complement": the magnitude is cut off, and
    where the operand is negative all bits are inverted (one's complement) unless those of the fraction are all zero."""
    if rule.mode != "complement":
        raise ValueError(f"data/ex2.json states the rule {rule.mode!r}; known is 'complement'")
    magnitude = np.floor(np.abs(scaled)).astype(np.int64)
    whole = (magnitude & ((1 << rule.bits) - 1)) == 0
    return np.asarray(np.where(scaled >= 0, magnitude, np.where(whole, -magnitude, ~magnitude)))


def provenance() -> dict[str, Any]:
    """The record beside the table: device, driver, versions, counts."""
    record: dict[str, Any] = json.loads(resources.files("cufuse.emulation").joinpath("data/ex2.json").read_text())
    return record


@functools.cache
def _rule() -> _Rule:
    record = provenance()
    return _Rule(record["table_bits"], record["rule"].split(", ")[1])


@functools.cache
def _table() -> np.ndarray:
    data = resources.files("cufuse.emulation").joinpath("data/ex2_sm90.xz").read_bytes()
    # one byte a fraction: the difference in ulp plus four
    return np.asarray(np.frombuffer(lzma.decompress(data), np.int8) - np.int8(provenance()["offset"]))
