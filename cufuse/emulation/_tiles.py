"""The tensor core's steps over whole matrices, in NumPy: tiles, steps, slices.

A product [M, K] x [N, K] is cut into tiles of at most ROWS x COLUMNS outputs. A tile walks K upward and applies one
step after another to its accumulators `c`. A step exists in three forms that give the same bits:

- `general_step`: float64, any exponents, infinities, NaN. Plain, and the yardstick of the other two.
- `NumpyStep`: float32 and int32, for the outputs whose largest exponent lies in [LOWEST, HIGHEST].
- `_tiles_numba.NumbaStep`: the same arithmetic compiled.

The last two leave outputs outside that range alone and name them; those alone go through `general_step`.

Operands are held decoded and transposed, [k, row], so that inner loops run over neighbouring outputs: `values`
(float32, exact) and `exponents` (int16, unbiased; a subnormal has the exponent of the smallest normal; ZERO for
zeros, SPECIAL for infinities and NaN).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from cufuse.emulation.tensor_core import TensorCore

Float32 = NDArray[np.float32]
Int16 = NDArray[np.int16]

# Sentinels among the exponents. A normal product has an exponent in [-252, 254]; with a ZERO factor it lies below
# -2000 + 127, with a SPECIAL factor and no matter which other above 5000 - 2000.
ZERO = -2000
SPECIAL = 5000
NO_PRODUCT = -1000  # no non-zero product is that low, every product with a zero factor is

# Why float32 and int32 suffice while LOWEST <= e_max <= HIGHEST (e_p is the exponent of one product p = a * b):
# - p has at most 22 significant bits (bf16 8 + 8, fp16 11 + 11) and |p| < 2^(e_p + 2) <= 2^122: no overflow, and
#   exact when e_p >= -126, its last bit being 2^(e_p - 14) >= 2^-140 for bf16 and 2^(e_p - 20) >= 2^-48 for fp16.
# - e_p <= -127 happens for bf16 only. Then |p| < 2^-125, and rounding keeps |p| <= 2^-125. The step asks for
#   trunc(p * 2^(F - e_max)), and 2^(-125 + F - e_max) < 1 because e_max >= LOWEST > F - 125 for F <= 27: zero either
#   way. The same holds for a subnormal accumulator.
# - 2^(F - e_max) lies within 2^-107 .. 2^123: a normal float32. Times p it only moves the exponent; the result is
#   below 2^(F + 2), or so small that it truncates to zero whatever its rounding.
# - The terms are integers below 2^(F + 2) in magnitude. L of them stay inside int32 because L * 2^(F + 2) <= 2^31.
# - The accumulator's own term is below 2^(F + 1); its sum with the others is exact in float64 (34 bits).
# - Cut to 24 bits the sum fits float32, and so does it times 2^(e_max - F): zero or at least 2^(-96 - 27), a normal
#   number, and below 17 * 2^122 < 2^127. Overflow and subnormal results thus belong to `general_step`.
LOWEST = -96
HIGHEST = 120

ROWS = 256  # outputs of a tile: enough rows to repay decoding the weights once per tile
COLUMNS = 1024
STRIP = 16384  # outputs that NumpyStep takes at once: enough to outweigh the calls, few enough for the caches
DEPTH = 128  # k decoded at once, a multiple of 64
GROUP = 16  # k of one instruction


@dataclass(frozen=True)
class Format:
    """Where a 16-bit format keeps its exponent."""

    fraction_bits: int
    bias: int


FORMATS = {"bfloat16": Format(7, 127), "float16": Format(10, 15)}


class Step(Protocol):
    """One step on a tile: changes `c` in place; returns the outputs that it left alone, or None if there are none."""

    def __call__(
        self, a_values: Float32, a_exponents: Int16, b_values: Float32, b_exponents: Int16, c: Float32
    ) -> NDArray[np.bool_] | None: ...


class Operand:
    """Decoded elements, in buffers that serve again: page faults on fresh ones cost more than the decoding."""

    def __init__(self, dtype: str, shape: tuple[int, ...]) -> None:
        self.form = FORMATS[dtype]
        self.bits = np.empty(shape, np.uint16)
        self.values: Float32 = np.empty(shape, np.float32)
        self.exponents: Int16 = np.empty(shape, np.int16)

    def load_rows(self, rows: NDArray[Any]) -> int:
        """Decode [R, k] rows into [k, R]; returns k padded, with zeros, to whole instructions."""
        depth: int = rows.shape[1]
        padded = -(-depth // GROUP) * GROUP
        # two copies: to transpose straight from rows a power of two apart is three times as slow
        self.bits[:depth] = np.ascontiguousarray(rows.view(np.uint16)).T
        self.bits[depth:padded] = 0
        self.decode(padded)
        return padded

    def decode(self, depth: int) -> None:
        """Values and exponents of the first `depth` rows of `bits`."""
        bits, values, exponents = self.bits[:depth], self.values[:depth], self.exponents[:depth]
        fraction_bits, bias = self.form.fraction_bits, self.form.bias
        if self.form is FORMATS["bfloat16"]:
            widened = values.view(np.uint32)
            widened[...] = bits
            widened <<= 16
        else:
            values[...] = bits.view(np.float16)
        magnitudes = exponents.view(np.uint16)
        np.bitwise_and(bits, 0x7FFF, out=magnitudes)
        least, most = (int(magnitudes.min()), int(magnitudes.max())) if bits.size else (1, 1)
        zeros = magnitudes == 0 if least == 0 else None
        magnitudes >>= fraction_bits
        if least >> fraction_bits == 0:
            np.maximum(exponents, 1, out=exponents)
        exponents -= bias
        if zeros is not None:
            exponents[zeros] = ZERO
        infinity = 0x7FFF >> fraction_bits
        if most >> fraction_bits == infinity:
            exponents[exponents == infinity - bias] = SPECIAL


def general_step(
    a_values: Float32,
    a_exponents: Int16,
    b_values: Float32,
    b_exponents: Int16,
    c: Float32,
    fraction_bits: int,
    floor: int,
) -> Float32:
    """One step for any values: operands [L, ...], c [...], result float32 [...].

    Everything before the last line is exact in float64: products have 22 significant bits and lie within
    2^-266 .. 2^256, terms are integers below 2^(F + 2), and so is their sum but for five more bits.
    """
    with np.errstate(all="ignore"):
        products = a_values.astype(np.float64) * b_values
        unrounded = products.sum(axis=0) + c  # read only where a term is infinite or NaN
        product_exponents = (a_exponents.astype(np.int32) + b_exponents).max(axis=0)
        c_fields = (c.view(np.int32) >> 23) & 0xFF
        c_exponents = np.where(c == 0, ZERO, np.maximum(c_fields, 1) - 127)
        e_max = np.maximum(np.maximum(product_exponents, c_exponents), floor)
        e_max = np.where(np.isfinite(unrounded), e_max, 0)
        terms = np.trunc(np.ldexp(products, fraction_bits - e_max))
        total = terms.sum(axis=0) + np.trunc(np.ldexp(c.astype(np.float64), fraction_bits - e_max))
        # 2^unit is the last place of the float32 result; 2^-149 is that of the subnormals
        unit = np.maximum(np.frexp(total)[1] + (e_max - fraction_bits - 24), -149)
        rounded = np.ldexp(np.trunc(np.ldexp(total, e_max - fraction_bits - unit)), unit)
        result: Float32 = np.where(np.isfinite(unrounded), rounded + 0.0, unrounded).astype(np.float32)
    return with_tensor_core_nan(result)


def with_tensor_core_nan(x: Float32) -> Float32:
    """Replace the bits of every NaN, in place, by 0x7FFFFFFF: what NVIDIA's float32 instructions give."""
    nan = np.isnan(x)
    if nan.any():
        x.view(np.uint32)[nan] = 0x7FFFFFFF
    return x


class NumpyStep:
    """The step for outputs with LOWEST <= e_max <= HIGHEST, and for those whose terms are all zero."""

    def __init__(self, terms: int, fraction_bits: int, columns: int) -> None:
        self.fraction_bits = fraction_bits
        self.rows = max(1, STRIP // columns)
        shape = (terms, self.rows, columns)
        self.exponents = np.empty(shape, np.int16)
        self.products = np.empty(shape, np.float32)
        self.integers = np.empty(shape, np.int32)

    def __call__(
        self, a_values: Float32, a_exponents: Int16, b_values: Float32, b_exponents: Int16, c: Float32
    ) -> NDArray[np.bool_] | None:
        left: NDArray[np.bool_] | None = None
        for start in range(0, c.shape[0], self.rows):
            rows = slice(start, start + self.rows)
            mask = self._strip(a_values[:, rows, None], a_exponents[:, rows, None], b_values, b_exponents, c[rows])
            if mask is not None:
                if left is None:
                    left = np.zeros(c.shape, np.bool_)
                left[rows] = mask
        return left

    def _strip(
        self, a_values: Float32, a_exponents: Int16, b_values: Float32, b_exponents: Int16, c: Float32
    ) -> NDArray[np.bool_] | None:
        count = c.shape[0]
        exponents, products, integers = self.exponents[:, :count], self.products[:, :count], self.integers[:, :count]

        np.add(a_exponents, b_exponents[:, None], out=exponents)
        product_max = np.maximum.reduce(exponents, axis=0)
        # zero and subnormal accumulators come out as -127, below LOWEST
        c_exponents = ((c.view(np.int32) >> 23) & 0xFF).astype(np.int16)
        c_exponents -= 127
        e_max = np.maximum(product_max, c_exponents)
        left: NDArray[np.bool_] | None = None
        if int(e_max.min()) < LOWEST or int(e_max.max()) > HIGHEST:
            all_zero = (product_max < NO_PRODUCT) & (c == 0)
            left = ((e_max < LOWEST) | (e_max > HIGHEST)) & ~all_zero
            np.clip(e_max, LOWEST, HIGHEST, out=e_max)  # zero terms stay zero at any scale

        scale_bits = (self.fraction_bits + 127 - e_max).astype(np.int32)
        scale_bits <<= 23
        scale = scale_bits.view(np.float32)  # 2^(F - e_max)
        np.multiply(a_values, b_values[:, None], out=products)
        np.multiply(products, scale, out=products)
        np.copyto(integers, products, casting="unsafe")  # float to integer truncates toward zero
        total = np.add.reduce(integers, axis=0, dtype=np.int32).astype(np.float64)
        total += np.trunc(c * scale)
        # sign and magnitude: clearing the 29 low bits of the 53 truncates toward zero to 24
        total.view(np.int64)[...] &= -(1 << 29)
        np.subtract(254 << 23, scale_bits, out=scale_bits)  # now 2^(e_max - F)
        updated = total.astype(np.float32)
        updated *= scale
        if left is None or not left.any():
            c[...] = updated
            return None
        np.copyto(c, updated, where=~left)
        return left


def slice_bounds(depth: int, k_slices: int) -> list[tuple[int, int]]:
    """First and last k of each of cuBLAS's slices: ceil(ceil(K / 64) / S) blocks of 64 each, empty ones left out."""
    blocks = -(-depth // 64)
    length = -(-blocks // k_slices) * 64
    return [(start, min(start + length, depth)) for start in range(0, depth, length)] if depth else []


def _tile(parts: Sequence[NDArray[Any]], b: NDArray[Any], core: "TensorCore", k_slices: int, step: Step) -> Float32:
    """All slices of one tile: parts [rows, K] each, b [columns, K] -> [rows, columns]."""
    (columns, depth), rows, dtype = b.shape, parts[0].shape[0], b.dtype.name
    b_operand = Operand(dtype, (DEPTH, columns))
    a_operands = [Operand(dtype, (DEPTH, rows)) for _ in parts]
    total = None
    for first, last in slice_bounds(depth, k_slices):
        c = np.zeros((rows, columns), np.float32)
        for start in range(first, last, DEPTH):
            chunk = slice(start, min(start + DEPTH, last))
            padded = b_operand.load_rows(b[:, chunk])
            for operand, part in zip(a_operands, parts, strict=True):
                operand.load_rows(part[:, chunk])
            for group in range(0, padded, GROUP):
                for operand in a_operands:
                    for k in range(group, group + GROUP, core.terms):
                        _step(step, operand, b_operand, slice(k, k + core.terms), c, core)
        total = c if total is None else with_tensor_core_nan(total + c)
    return np.zeros((rows, columns), np.float32) if total is None else total


def _step(step: Step, a: Operand, b: Operand, depth: slice, c: Float32, core: "TensorCore") -> None:
    """Apply `step`, then `general_step` to the outputs that it left, a strip of them at a time."""
    a_values, a_exponents = a.values[depth], a.exponents[depth]
    b_values, b_exponents = b.values[depth], b.exponents[depth]
    left = step(a_values, a_exponents, b_values, b_exponents, c)
    if left is None:
        return
    rows, columns = np.nonzero(left)
    for start in range(0, rows.size, STRIP):
        m, n = rows[start : start + STRIP], columns[start : start + STRIP]
        gathered = a_values[:, m], a_exponents[:, m], b_values[:, n], b_exponents[:, n], c[m, n]
        c[m, n] = general_step(*gathered, core.fraction_bits, core.floor)


def _tile_bounds(m: int, n: int, threads: int) -> Iterator[tuple[slice, slice]]:
    """Cut [M, N] into tiles; few rows get wider ones, and every thread gets its share of the columns."""
    columns = max(COLUMNS, 4 * COLUMNS // m)
    pieces = -(-n // columns)
    if m <= ROWS:
        pieces = -(-pieces // threads) * threads
    columns = max(-(-n // pieces), min(n, 128))
    for row in range(0, m, ROWS):
        for column in range(0, n, columns):
            yield slice(row, min(row + ROWS, m)), slice(column, min(column + columns, n))


def multiply(
    parts: Sequence[NDArray[Any]],
    b: NDArray[Any],
    core: "TensorCore",
    k_slices: int,
    make_step: Callable[[int, int, int], Step],
    threads: int,
    progress: Callable[[float], object] | None,
) -> Float32:
    """Parts [M, K] each times b [N, K] -> float32 [M, N]; arguments already checked.

    `make_step(terms, fraction_bits, columns)` gives a step with work space of its own; `progress` is called in the
    calling thread.
    """
    m, n = parts[0].shape[0], b.shape[0]
    out = np.empty((m, n), np.float32)
    if out.size == 0:
        return out
    tiles = list(_tile_bounds(m, n, threads))

    def run(tile: tuple[slice, slice]) -> None:
        rows, columns = tile
        step = make_step(core.terms, core.fraction_bits, columns.stop - columns.start)
        with np.errstate(all="ignore"):
            out[tile] = _tile([part[rows] for part in parts], b[columns], core, k_slices, step)

    def report(done: int) -> None:
        if progress is not None:
            progress(done / len(tiles))

    if threads == 1 or len(tiles) == 1:
        for done, tile in enumerate(tiles, 1):
            run(tile)
            report(done)
        return out
    with ThreadPoolExecutor(min(threads, len(tiles))) as pool:
        try:
            for done, future in enumerate(as_completed([pool.submit(run, tile) for tile in tiles]), 1):
                future.result()
                report(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the error need not wait for tiles not yet begun
            raise
    return out
