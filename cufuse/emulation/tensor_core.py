"""What NVIDIA's tensor cores compute, bit for bit: one step, and the matrix products built from it.

One step c <- block(a[L], b[L], c) of the instruction D = A B + C with float32 accumulators:

1. Each product a_i b_i is exact, with exponent e(a_i) + e(b_i); its significand, in [0, 4), is not renormalised. A
   subnormal keeps its value and has the exponent of the smallest normal (bfloat16 and float32 -126, float16 -14).
2. e_max is the largest exponent among the non-zero products and c, at least e_0.
3. Every product, and c too, is truncated toward zero to a multiple of 2**(e_max - F). The sum of these is exact.
4. The sum is truncated toward zero to float32, subnormals included.

A zero sum is +0. A sum of 2**128 or more in magnitude is an infinity. An infinite term gives that infinity; infinity
times zero, infinities of both signs and NaN terms give NaN, whose bits are 0x7FFFFFFF. Permuting the terms of a step
changes nothing; moving a term to another step does.

`reference_block` is this text in Python integers, `block` the same for arrays, `matmul` whole products.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cufuse.emulation import _tiles

Float32Array = NDArray[np.float32]

NAN_BITS: Final = 0x7FFFFFFF


@dataclass(frozen=True)
class TensorCore:
    """Constants of one architecture's step.

    name : "sm_90", ...
    terms : L, products in one step: a divisor of 16 and a multiple of 4.
    fraction_bits : F, bits kept below the largest exponent.
    floor : e_0, the exponent that an all-zero step is aligned to; matters below the normal float32 only.
    dtypes : operand types that it multiplies.
    known : how this is known, and the source.
    """

    name: str
    terms: int
    fraction_bits: int
    floor: int
    dtypes: tuple[str, ...]
    known: str

    def __post_init__(self) -> None:
        if self.terms not in (4, 8, 16):
            raise ValueError(f"terms is {self.terms}; needed is 4, 8 or 16: an instruction is 16 / terms steps")
        most = 29 - (self.terms.bit_length() - 1)  # terms * 2**(fraction_bits + 2) <= 2**31: sums of terms fit int32
        if not 1 <= self.fraction_bits <= most:
            raise ValueError(f"fraction_bits is {self.fraction_bits}; needed is 1 to {most} with {self.terms} terms")
        if self.floor >= _tiles.LOWEST:
            raise ValueError(f"floor is {self.floor}; needed is an exponent below {_tiles.LOWEST}")
        unknown = set(self.dtypes) - set(_tiles.FORMATS)
        if unknown:
            raise ValueError(f"dtypes names {sorted(unknown)}; needed are some of {list(_tiles.FORMATS)}")


_MMASIM = "mmasim 2.1.1 (arXiv 2511.10909)"
_BOTH = ("bfloat16", "float16")

TENSOR_CORES: Final[Mapping[str, TensorCore]] = MappingProxyType(
    {
        core.name: core
        for core in (
            TensorCore("sm_70", 4, 23, -131, ("float16",), f"Published: {_MMASIM}, Volta, m8n8k4."),
            TensorCore("sm_75", 8, 24, -132, ("float16",), f"Published: {_MMASIM}, Turing, m16n8k8."),
            TensorCore("sm_80", 8, 24, -132, _BOTH, f"Published: {_MMASIM}, Ampere, m16n8k16."),
            TensorCore("sm_86", 8, 24, -132, _BOTH, f"Published: {_MMASIM}, Ampere, m16n8k16."),
            TensorCore("sm_89", 8, 24, -132, _BOTH, f"Published: {_MMASIM}, Ada Lovelace, m16n8k16."),
            TensorCore(
                "sm_90", 16, 25, -133, _BOTH,
                f"Measured for bfloat16 on an H200 (mma.sync and wgmma); the floor and float16 published: {_MMASIM}.",
            ),
            TensorCore("sm_100", 16, 25, -133, _BOTH, f"Published: {_MMASIM}, Blackwell, tcgen05.mma."),
            TensorCore("sm_120", 16, 25, -133, _BOTH, f"Published: {_MMASIM}, RTX Blackwell, m16n8k16."),
        )
    }
)  # fmt: skip
"""Compute capability -> constants. They are the float32-accumulator ones; float16 accumulators round otherwise."""


def matmul(
    a: NDArray[Any] | tuple[NDArray[Any], ...],
    b: NDArray[Any],
    *,
    core: str | TensorCore = "sm_90",
    k_slices: int = 1,
    progress: Callable[[float], object] | None = None,
    threads: int | None = None,
    engine: str | None = None,
) -> Float32Array:
    """The product a b^T with the bits of a tensor core that walks K upward: float32 accumulators, not yet rounded.

    Formula, for each output (m, n), with steps as in the head of this module and c = +0 at the start:

        for g in 0, 16, 32, ...:              K padded with zeros to a multiple of 16
            for part in parts:                one, unless a is a tuple
                for k in g, g + L, ... < g + 16:
                    c <- block(part[m, k : k + L], b[n, k : k + L], c)

    With ``k_slices=S`` K is first cut, as cuBLAS's split K does, into slices of ceil(ceil(K / 64) / S) blocks of 64
    (K / 64 rounded up first or not: ceil(K / 64 / S) is the same number). The last slice ends at K, so it may be
    shorter and end in a partial block; where fewer than S slices cover K the empty ones do not exist. Every slice
    accumulates from +0 and the slices are added in float32, to nearest even, first to last.

    Parameters
    ----------
    a : [M, K] bfloat16 or float16, any strides; or a tuple of such arrays of one shape: the parts of a float32
        activation (`split_float32`), multiplied in the order given within each group of 16 k.
    b : [N, K] of the same dtype, any strides.
    core : a name in `TENSOR_CORES`, or a `TensorCore`.
    k_slices : S >= 1.
    progress : called from the calling thread with the fraction done, rising to 1.0; an exception from it ends the work.
    threads : threads to use; None: one a processor.
    engine : "numpy", "numba", or None: Numba where it can be imported, NumPy otherwise. The bits are the same.

    Returns
    -------
    float32 [M, N], C-contiguous. Zeros where K is 0.

    Special values: of steps, as in the head of this module; NaN is 0x7FFFFFFF. Opposite infinities in two slices: NaN.

    Accuracy: truncation biases sums toward zero; a step is off by less than (L + 1) 2**(e_max - F) before its result is
    truncated. The bits are the hardware's as far as ``core.known`` says, and those of cuBLAS, hence PyTorch's linear
    layers, where its number of slices is given (measured on an H200, torch 2.11, cuBLAS 13.1).

    Memory: besides the output some megabytes a thread, whatever M, N and K: operands are never copied whole. Speed:
    outputs that meet infinities, NaN, or a largest exponent outside [-96, 120] take a slower form, those alone.

    Raises TypeError for kinds and dtypes (also a dtype that the core does not multiply), ValueError for shapes and
    values, ImportError where ``engine="numba"`` and Numba cannot be imported.
    """
    core = _core(core)
    parts = a if isinstance(a, tuple) else (a,)
    if not parts:
        raise ValueError("a is an empty tuple; needed is at least one array [M, K]")
    for i, part in enumerate(parts):
        _check_operand(f"a[{i}]" if isinstance(a, tuple) else "a", part, core)
    _check_operand("b", b, core)
    for i, part in enumerate(parts):
        if part.dtype != b.dtype:
            raise TypeError(f"a has dtype {part.dtype} and b {b.dtype}; needed is one dtype for both")
        if part.shape != parts[0].shape:
            raise ValueError(f"a[{i}] has shape {part.shape} and a[0] {parts[0].shape}; parts have one shape")
    if parts[0].shape[1] != b.shape[1]:
        raise ValueError(f"a has K = {parts[0].shape[1]} and b has K = {b.shape[1]}; needed are a [M, K] and b [N, K]")
    _check_count("k_slices", k_slices)
    threads = os.cpu_count() or 1 if threads is None else threads
    _check_count("threads", threads)
    return _tiles.multiply(parts, b, core, k_slices, _engine(engine), threads, progress)


def block(a: NDArray[Any], b: NDArray[Any], c: Float32Array, *, core: str | TensorCore) -> Float32Array:
    """One step of the tensor core: c + sum_i a_i b_i as in the head of this module.

    Shapes: a, b [..., L] of bfloat16 or float16, c [...] of float32, L = ``core.terms``; leading axes broadcast.
    Returns float32 [...]. All values of the formats are allowed, special ones as in the head of this module. Written
    for generality: `matmul` is faster. Raises TypeError for dtypes, ValueError for an L that is not the core's.
    """
    core = _core(core)
    for name, operand in (("a", a), ("b", b)):
        _check_dtype(name, operand, core)
        if operand.ndim == 0 or operand.shape[-1] != core.terms:
            raise ValueError(f"{name} has shape {operand.shape}; needed is [..., {core.terms}] for {core.name}")
    if a.dtype != b.dtype:
        raise TypeError(f"a has dtype {a.dtype} and b {b.dtype}; needed is one dtype for both")
    if not isinstance(c, (np.ndarray, np.generic)) or c.dtype != np.float32:
        raise TypeError(f"c is {_described(c)}; needed is a NumPy array of float32")
    shape = np.broadcast_shapes(a.shape[:-1], b.shape[:-1], c.shape)
    left, right = (_step_operand(operand, shape) for operand in (a, b))
    return _tiles.general_step(
        left.values, left.exponents, right.values, right.exponents,
        np.array(np.broadcast_to(c, shape)), core.fraction_bits, core.floor,
    )  # fmt: skip


def _step_operand(x: NDArray[Any], shape: tuple[int, ...]) -> _tiles.Operand:
    """Decode [..., L], broadcast to the leading axes ``shape``, into [L, ...]."""
    terms = x.shape[-1]
    operand = _tiles.Operand(x.dtype.name, (terms, *shape))
    operand.bits[...] = np.moveaxis(np.broadcast_to(x.view(np.uint16), (*shape, terms)), -1, 0)
    operand.decode(terms)
    return operand


def reference_block(
    a_bits: list[int], b_bits: list[int], c_bits: int, *, core: str | TensorCore, dtype: str = "bfloat16"
) -> int:
    """One step for one output, from bits to bits, in Python integers alone: the definition to test against.

    ``a_bits``, ``b_bits``: L codes of ``dtype`` each, ``c_bits``: a float32's code; returns a float32's code. Right
    because nothing in it can round: a finite value is an integer times a power of two, and the only lossy operations
    are the two truncations of the definition, each a shift of a magnitude.
    """
    core = _core(core)
    fraction = _tiles.FORMATS[dtype].fraction_bits
    exponent_bits = 15 - fraction
    terms = []  # (sign, significand, exponent, place): sign * significand * 2**place; an infinity has significand None
    for a_code, b_code in zip(a_bits, b_bits, strict=True):
        a, b = _unpack(a_code, exponent_bits, fraction), _unpack(b_code, exponent_bits, fraction)
        if a is None or b is None or (a[1] is None and b[1] == 0) or (b[1] is None and a[1] == 0):
            return NAN_BITS
        significand = None if a[1] is None or b[1] is None else a[1] * b[1]
        terms.append((a[0] * b[0], significand, a[2] + b[2], a[2] + b[2] - 2 * fraction))
    c = _unpack(c_bits, 8, 23)
    if c is None:
        return NAN_BITS
    terms.append((*c, c[2] - 23))

    infinities = {sign for sign, significand, _, _ in terms if significand is None}
    if infinities:
        return NAN_BITS if len(infinities) == 2 else _pack_infinity(infinities.pop())
    e_max = max([exponent for _, significand, exponent, _ in terms if significand], default=core.floor)
    unit = max(e_max, core.floor) - core.fraction_bits
    total = sum(sign * _shift(significand or 0, place - unit) for sign, significand, _, place in terms)
    return _pack_truncated(total, unit)


def _unpack(code: int, exponent_bits: int, fraction_bits: int) -> tuple[int, int | None, int] | None:
    """Sign, significand as an integer (None: infinity), exponent; or None for NaN."""
    sign = -1 if code >> (exponent_bits + fraction_bits) else 1
    field = code >> fraction_bits & (1 << exponent_bits) - 1
    fraction = code & (1 << fraction_bits) - 1
    bias = (1 << exponent_bits - 1) - 1
    if field == (1 << exponent_bits) - 1:
        return None if fraction else (sign, None, 0)
    return sign, fraction + (1 << fraction_bits if field else 0), max(field, 1) - bias


def _shift(magnitude: int, places: int) -> int:
    return magnitude << places if places >= 0 else magnitude >> -places


def _pack_truncated(total: int, unit: int) -> int:
    """total * 2**unit as a float32's code, truncated toward zero; zero is +0."""
    exponent = max(abs(total).bit_length() - 1 + unit, -126)
    significand = _shift(abs(total), unit - (exponent - 23))
    if significand == 0:
        return 0
    if exponent > 127:
        return _pack_infinity(-1 if total < 0 else 1)
    # a normal significand carries the leading 2**23 into the exponent field, a subnormal one has none
    return (total < 0) << 31 | (exponent + 126 << 23) + significand


def _pack_infinity(sign: int) -> int:
    return 0xFF800000 if sign < 0 else 0x7F800000


def split_float32(x: Float32Array) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Split float32 values into three bfloat16 arrays (hi, mid, lo) whose exact sum is x.

    Formula: hi = bf16(x), mid = bf16(x - hi), lo = bf16(x - hi - mid), each rounded to nearest even; the subtractions
    are exact in float32. Where bf16(x) would overflow (|x| >= 0x1.FFp127) hi is the largest finite bfloat16 instead.

    Accuracy: hi + mid + lo == x exactly for every finite x that is a multiple of 2**-133, the smallest bfloat16; every
    float32 with |x| >= 2**-110 is one. Elsewhere the sum is a multiple of 2**-133 nearest to x: off by at most 2**-134.

    Proof. For 2**e <= |x| < 2**(e+1), e >= -126, x is a multiple of 2**(e-23). |x - hi| <= 2**(e-8), so it is such a
    multiple with at most 16 bits: a float32. |x - hi - mid| <= 2**(e-17): 7 bits, a bfloat16 if 2**(e-23) is a multiple
    of 2**-133. If not, e < -110, what is left for lo lies below 2**-126, and bfloat16 there is the grid of multiples of
    2**-133: lo takes it exactly where x is such a multiple, otherwise to within half the grid. If hi is the largest
    finite bfloat16, |x - hi| < 2**120 is a multiple of 2**104 (16 bits), and mid leaves at most 2**111 (8 bits).

    Shapes: any; outputs have x's shape. Special values: infinities and NaN (as 0x7FFF) go to hi, with mid = lo = +0;
    -0 has hi = -0. Raises TypeError unless x is a NumPy array of float32.
    """
    if not isinstance(x, (np.ndarray, np.generic)) or x.dtype != np.float32:
        raise TypeError(f"x is {_described(x)}; needed is a NumPy array of float32")
    x = np.asarray(x)
    finite = np.isfinite(x)
    rest = np.where(finite, x, np.float32(0))
    hi = np.where(finite, _nearest_bf16(rest), np.where(np.isnan(x), 0x7FFF, x.view(np.uint32) >> 16)).astype(np.uint16)
    codes = [hi]
    for _ in range(2):
        subtrahend = np.where(finite, codes[-1], 0).astype(np.uint32) << 16
        rest = rest - subtrahend.view(np.float32)
        codes.append(_nearest_bf16(rest).astype(np.uint16))
    hi, mid, lo = (np.asarray(code).view(ml_dtypes.bfloat16) for code in codes)
    return hi, mid, lo


def _nearest_bf16(x: Float32Array) -> NDArray[np.uint32]:
    """Codes of finite float32 values rounded to nearest even; what would overflow becomes the largest finite value."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
    return np.asarray(rounded - (rounded & 0x7FFF == 0x7F80))


def _core(core: str | TensorCore) -> TensorCore:
    if isinstance(core, TensorCore):
        return core
    if not isinstance(core, str):
        raise TypeError(f"core is {_described(core)}; needed is a name such as 'sm_90' or a TensorCore")
    if core not in TENSOR_CORES:
        raise ValueError(f"core is {core!r}; known are {', '.join(TENSOR_CORES)}: give a TensorCore for another")
    return TENSOR_CORES[core]


def _described(x: object) -> str:
    return (
        f"an array of {x.dtype}"
        if isinstance(x, (np.ndarray, np.generic))
        else f"a value of type {type(x).__qualname__}"
    )


def _check_dtype(name: str, x: Any, core: TensorCore) -> None:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name} is {_described(x)}; needed is a NumPy array of {' or '.join(core.dtypes)}")
    if x.dtype not in [np.dtype(dtype) for dtype in core.dtypes]:
        remedy = "cufuse.round_to_bf16" if "bfloat16" in core.dtypes else ".astype(numpy.float16)"
        formats = " and ".join(core.dtypes)
        raise TypeError(f"{name} has dtype {x.dtype}; {core.name} multiplies {formats}: round float32 with {remedy}")


def _check_operand(name: str, x: Any, core: TensorCore) -> None:
    _check_dtype(name, x, core)
    if x.ndim != 2:
        raise ValueError(f"{name} has shape {x.shape}; needed is [rows, K]: reshape the leading axes into one")


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}; needed is an integer")
    if value < 1:
        raise ValueError(f"{name} is {value}; needed is 1 or more")


def _engine(engine: str | None) -> Callable[[int, int, int], _tiles.Step]:
    if engine not in (None, "numpy", "numba"):
        raise ValueError(f"engine is {engine!r}; needed is 'numpy', 'numba' or None")
    if engine != "numpy":
        try:
            from cufuse.emulation._tiles_numba import NumbaStep

            return NumbaStep
        except ImportError as error:
            if engine == "numba":
                raise ImportError(
                    "engine='numba' needs Numba, which cannot be imported: install cufuse[fast], or pass engine='numpy'"
                ) from error
    return _tiles.NumpyStep
