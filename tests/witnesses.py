"""Exact references for the tests (rational arithmetic, nothing of the code under test, as slow as that is), and test data."""

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import cufuse

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits(x: np.ndarray) -> np.ndarray:
    """The codes of an array, whatever its strides."""
    return np.ascontiguousarray(x).view(UNSIGNED[x.dtype.itemsize]).reshape(x.shape)


def same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two arrays have the same shape and codes."""
    return np.array_equal(bits(found), bits(expected))


def demand_bits(found: np.ndarray, expected: np.ndarray, what: str = "result") -> None:
    """The same dtype, shape and bits; the first difference is shown with its place, codes and values."""
    assert found.dtype == expected.dtype, f"{what}: dtype {found.dtype}, expected {expected.dtype}"
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    differ = np.argwhere(bits(found) != bits(expected))
    if len(differ):
        at = tuple(int(i) for i in differ[0])
        codes = f"{int(bits(found)[at]):#x} ({found[at]}), expected {int(bits(expected)[at]):#x} ({expected[at]})"
        pytest.fail(f"{what}: {len(differ)} of {found.size} differ, first at {at}: {codes}")


def bf16_neighbours(value: Fraction) -> tuple[int, int, Fraction]:
    """Codes of the bfloat16 magnitudes around a value >= 0, and where between them it lies, 0 <= place < 1.

    Beyond the largest finite value the numbers go on as if there were a next binade, so that 0x7F80 is the upper one; from
    2**128 on the place is 1.
    """
    return _neighbours(value, fraction_bits=7)


def _neighbours(value: Fraction, fraction_bits: int) -> tuple[int, int, Fraction]:
    largest = (0xFF << fraction_bits) - 1
    if value == 0:
        return 0, 1, Fraction(0)
    if value >= 2**128:
        return largest, largest + 1, Fraction(1)
    numerator, denominator = value.as_integer_ratio()
    exponent = numerator.bit_length() - denominator.bit_length()
    if numerator << max(-exponent, 0) < denominator << max(exponent, 0):  # the bit lengths tell it but for one
        exponent -= 1
    exponent = max(exponent, -126)  # subnormals are in steps of the smallest normals
    ulp = exponent - fraction_bits
    below, rest = divmod(numerator << max(-ulp, 0), denominator << max(ulp, 0))
    code = ((exponent + 126) << fraction_bits) + below
    return code, code + 1, Fraction(rest, denominator << max(ulp, 0))


def round_to_bf16_codes(value: Fraction, negative: bool) -> dict[str, int]:
    """The code of -value or value (>= 0) rounded to bfloat16 by the definition of each mode."""
    below, above, place = bf16_neighbours(value)
    half = 2 * place.numerator - place.denominator  # its sign is that of place - 1/2
    sign = 0x8000 if negative else 0
    return {
        "nearest_even": (above if half > 0 or (half == 0 and below % 2 == 1) else below) | sign,
        "nearest_away": (above if half >= 0 else below) | sign,
        "toward_zero": below | sign,
        "up": (above if place and not negative else below) | sign,
        "down": (above if place and negative else below) | sign,
    }


def round_to_bf16(value: Fraction) -> int:
    """The code of a value rounded to nearest even; a zero is +0."""
    return round_to_bf16_codes(abs(value), value < 0)["nearest_even"]


def round_to_float32(value: Fraction) -> np.float32:
    """A value rounded to float32, to nearest even; a zero is +0."""
    below, above, place = _neighbours(abs(value), fraction_bits=23)
    code = above if place > Fraction(1, 2) or (place == Fraction(1, 2) and below % 2 == 1) else below
    return np.uint32(code | (0x80000000 if value < 0 else 0)).view(np.float32)


def from_codes(codes: object) -> np.ndarray:
    """A bfloat16 array from its codes."""
    return np.asarray(codes, np.uint16).view(ml_dtypes.bfloat16)


def exact(x: np.ndarray) -> list:
    """An array's values as fractions, in nested lists."""
    return [exact(one) for one in x] if x.ndim else Fraction(float(x))


def random_bf16(seed: int, *shape: int, scale: float = 1.0, binades: int = 0) -> np.ndarray:
    """A bell curve, rounded to bfloat16; spread over so many binades, most additions of its squares round."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(shape) * scale
    return (np.ldexp(values, rng.integers(0, binades, shape)) if binades else values).astype(ml_dtypes.bfloat16)


def without_rounding(recipe: str) -> cufuse.Recipe:
    """A named recipe with its orders of summation and none of its roundings: float32 shows every bit of a sum."""
    no_rounding = {"round_normalised": False, "round_weighted": False, "float32_weight": "accept"}
    return cufuse.recipes[recipe].derive(
        f"{recipe} without rounding",
        norm=no_rounding,
        gemm={"input": "float32", "output": "float32"},
        head_norm=no_rounding,
        rope={"round_products": False, "round_sum": False},
        round_output=False,
        float32_activations=True,
    )
