"""bfloat16: casts in every rounding mode, bit views, and the distance in ulp.

A bfloat16 has the sign, the eight exponent bits and the top seven fraction bits of a float32, so every bfloat16
(subnormals, infinities and NaN included) is a float32 with sixteen zero bits behind it. All casts here are integer
arithmetic on those bits: they do not depend on the processor's rounding mode or on its treatment of subnormals.
"""

from typing import Any, Final

import ml_dtypes
import numpy as np

from cufuse import _arrays

bfloat16: Final = ml_dtypes.bfloat16
"""The element type of every bfloat16 array in cufuse (``ml_dtypes.bfloat16``), for NumPy and for CuPy."""

ROUNDING_MODES: Final = ("nearest_even", "nearest_away", "toward_zero", "up", "down", "stochastic")

NAN_BITS: Final = 0x7FFF
"""What every NaN becomes: the code of CUDA's ``__float2bfloat16_rn``, and so of PyTorch's cast on a GPU."""

_SIGN32: Final = np.uint32(0x80000000)
_MAGNITUDE32: Final = np.uint32(0x7FFFFFFF)
_INFINITY32: Final = np.uint32(0x7F800000)


def round_to_bf16(x: Any, *, mode: str = "nearest_even", random_bits: Any = None, out: Any = None) -> Any:
    """Round float32 or float64 values to bfloat16, once.

    Formula: the bfloat16 neighbour of ``x`` that ``mode`` names (IEEE 754-2019, section 4.3, for the first five):

    ==============  ==================================================================================
    nearest_even    the nearest; of two equally near, the one with an even last bit
    nearest_away    the nearest; of two equally near, the one of larger magnitude
    toward_zero     the one of smaller magnitude
    up, down        the one that is not smaller, not larger
    stochastic      the one of larger magnitude with the probability of the discarded fraction of an ulp
    ==============  ==================================================================================

    Parameters
    ----------
    x : array of float32 or float64, any shape and strides (NumPy or CuPy).
    mode : one of the table.
    random_bits : for "stochastic" only, an array of x's shape: uint16 for float32 (the discarded fraction has sixteen
        bits, so the probability is exact), uint32 for float64 (the fraction is truncated to 32 bits first, a bias below
        2**-32). The magnitude is rounded up where fraction + random carries. The caller gives the bits: the same bits,
        the same result.
    out : bfloat16 array of x's shape to write to, or None.

    Returns
    -------
    bfloat16 array of x's shape, ``out`` if given.

    Special values: NaN becomes 0x7FFF, whatever its sign and payload (CUDA's answer; PyTorch's vectorised cast on a CPU
    gives 0xFFFF). Infinities and signed zeros stay. Beyond the largest finite value 0x7F7F: the nearest modes give infinity from
    half an ulp on, toward_zero gives 0x7F7F, up and down give infinity on their own side and 0x7F7F on the other,
    stochastic gives infinity where it carries, and always from 2**128 on. Subnormals are rounded like other values.

    Accuracy: exact in every mode: a float64 is not rounded to float32 on the way (ml_dtypes and CuPy do that, and
    give 0x3F80 for 1 + 2**-8 + 2**-40 where 0x3F81 is nearest), but taken there by rounding to odd, which keeps the sticky
    information (Boldo and Melquiond, "When double rounding is odd", 2005: 24 >= 8 + 2 significand bits).

    Raises TypeError for other dtypes, for lists and for mixed libraries; ValueError for an unknown mode, for wrong shapes
    and for missing or superfluous random_bits.
    """
    if mode not in ROUNDING_MODES:
        raise ValueError(f"mode is {mode!r}; needed is one of {', '.join(ROUNDING_MODES)}")
    given = (x, out) if random_bits is None else (x, out, random_bits)
    kernels = _arrays.loaded_kernels("_gpu_cast", given)
    if kernels is not None and kernels.repeat(given, mode):  # a call like this one has passed the checks
        return out
    arrays = {"x": x} | ({"random_bits": random_bits} if random_bits is not None else {})
    backend = _arrays.backend({"out": out}, **arrays)
    if x.dtype not in (np.float32, np.float64):
        raise TypeError(f"x has dtype {x.dtype}; needed is float32 or float64: convert it with x.astype(numpy.float32)")
    _check_random_bits(x, mode, random_bits)
    result = _arrays.output(out, x.shape, bfloat16, backend, x)
    if backend == "cupy":
        from cufuse import _gpu_cast

        return _gpu_cast.round_to_bf16(x, mode, random_bits, result)
    _arrays.refuse_overlap(out, **arrays)
    if x.dtype == np.float32:
        bits = round_float32_bits(x.view(np.uint32), mode, random_bits)
    elif mode == "stochastic":
        bits = _stochastic_float64(x, random_bits)
    else:
        bits = round_float32_bits(round_to_odd(x).view(np.uint32), mode)
    result[...] = bits.view(bfloat16)
    return result


def round_float32_bits(u: np.ndarray, mode: str = "nearest_even", random_bits: np.ndarray | None = None) -> np.ndarray:
    """bfloat16 codes (uint16) of float32 codes (uint32), integer arithmetic only: adding to the magnitude carries
    into the kept half exactly where the mode rounds away from zero, and from 0x7F7F into infinity.

    random_bits : integers below 2**16 of u's shape, for "stochastic" only. Any shape; NaN become 0x7FFF, subnormals are rounded
    like all other values. The inside of ``round_to_bf16``: nothing is checked.
    """
    magnitude = u & _MAGNITUDE32
    negative = u >= _SIGN32
    addend: Any
    if mode == "nearest_even":
        addend = np.uint32(0x7FFF) + ((magnitude >> np.uint32(16)) & np.uint32(1))
    elif mode == "nearest_away":
        addend = np.uint32(0x8000)
    elif mode == "toward_zero":
        addend = np.uint32(0)
    elif mode == "stochastic":
        assert random_bits is not None
        addend = random_bits.astype(np.uint32)
    else:
        addend = np.where(negative == (mode == "down"), np.uint32(0xFFFF), np.uint32(0))
    codes = ((magnitude + addend) >> np.uint32(16)).astype(np.uint16) | (negative.astype(np.uint16) << np.uint16(15))
    return np.where(magnitude > _INFINITY32, np.uint16(NAN_BITS), codes)


def round_to_odd(x: np.ndarray) -> np.ndarray:
    """float64 to float32, toward zero, with the last bit set where anything was cut off.

    An odd last bit can be neither a bfloat16 nor a tie between two, so a second rounding to bfloat16 sees on which side
    of the tie the float64 lay. Too large values give the largest finite float32 (odd), tiny ones the smallest subnormal.
    Infinities and NaN stay what they are. Any shape.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        nearest = x.astype(np.float32)
        back = nearest.astype(np.float64)
        inexact = (back != x) & ~np.isnan(x)
        too_large = inexact & (np.abs(back) > np.abs(x))
    codes = np.atleast_1d(nearest).view(np.uint32)
    codes = codes - np.atleast_1d(too_large).astype(np.uint32)
    codes |= np.atleast_1d(inexact).astype(np.uint32)
    return codes.view(np.float32).reshape(np.shape(x))


def to_bits(x: np.ndarray) -> np.ndarray:
    """The codes (uint16) of a bfloat16 array of any shape, NumPy or CuPy: a view, no copy, NaN bits as they are.

    The dtype is not checked: of wider elements it gives the pieces.
    """
    return x.view(np.uint16)


def from_bits(bits: np.ndarray) -> np.ndarray:
    """The bfloat16 array whose codes (uint16) of any shape are given, NumPy or CuPy: a view, no copy, NaN bits as they are."""
    return bits.view(bfloat16)


def nearest(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16, to nearest even, any shape: what every rounding point of a recipe does on NumPy arrays.

    NaN become 0x7FFF, values from 2**128 - 2**119 on infinity. float32 only, unchecked: ``round_to_bf16`` checks.
    """
    return round_float32_bits(x.view(np.uint32)).view(bfloat16)


def ulp_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How many bfloat16 steps lie between two bfloat16 arrays (int32, elementwise).

    Codes are counted along the number line, so -0 and +0 are 0 apart, the smallest subnormals of the two signs 2, and
    infinity is one step above the largest finite value. Two NaN are 0 apart; one NaN is 65536 from everything else.
    Raises TypeError for another dtype.
    """
    place = []
    for name, array in (("a", a), ("b", b)):
        if array.dtype != bfloat16:
            raise TypeError(f"{name} has dtype {array.dtype}; needed is bfloat16: round it with cufuse.round_to_bf16")
        code = to_bits(array).astype(np.int32)
        place.append(np.where(code >= 0x8000, 0x8000 - code, code))
    distance = np.abs(place[0] - place[1])
    nan_a, nan_b = (np.isnan(array.astype(np.float32)) for array in (a, b))
    return np.where(nan_a & nan_b, 0, np.where(nan_a | nan_b, 65536, distance)).astype(np.int32)


def _check_random_bits(x: Any, mode: str, random_bits: Any) -> None:
    if mode != "stochastic":
        if random_bits is not None:
            raise ValueError(f"random_bits given for mode {mode!r}; only mode 'stochastic' takes them")
        return
    wanted = np.uint16 if x.dtype == np.float32 else np.uint32
    if random_bits is None:
        raise ValueError(f"mode 'stochastic' needs random_bits, a {np.dtype(wanted)} array of shape {x.shape}")
    if random_bits.dtype != wanted:
        raise TypeError(f"random_bits has dtype {random_bits.dtype}; for {x.dtype} values needed is {np.dtype(wanted)}")
    if random_bits.shape != x.shape:
        raise ValueError(f"random_bits has shape {random_bits.shape}; needed is x's shape {x.shape}")


def _stochastic_float64(x: np.ndarray, random_bits: np.ndarray) -> np.ndarray:
    truncated = round_float32_bits(round_to_odd(x).view(np.uint32), "toward_zero")
    with np.errstate(invalid="ignore", over="ignore"):
        magnitude = np.abs(x)
        # frexp gives [0.5, 1); a bfloat16 ulp is 2**-7 of the leading bit, and 2**-133 from the subnormals on down
        exponent = np.maximum(np.frexp(magnitude)[1] - 1, -126)
        in_ulps = np.ldexp(magnitude, 7 - exponent)
        finite = np.isfinite(x)
        fraction = np.where(finite, in_ulps - np.floor(in_ulps), 0.0)
        carry = np.floor(fraction * 2.0**32).astype(np.uint64) + random_bits.astype(np.uint64) >= np.uint64(2**32)
        overflow = finite & (magnitude >= 2.0**128)
    codes = np.where(np.isnan(x), truncated, truncated + (carry & finite).astype(np.uint16))
    return np.where(overflow, np.where(x < 0, np.uint16(0xFF80), np.uint16(0x7F80)), codes)
