"""Assertions of cufuse.testing: what passes, what fails, and what the message says."""

import math
import sys
import types
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cufuse
from cufuse import testing
from cufuse.bf16 import ulp_distance
from cufuse.testing import _bits
from tests.witnesses import bits, from_codes, random_bf16, round_to_bf16_codes, round_to_float32

BF16 = cufuse.bfloat16


def message(call: Callable[[], None]) -> str:
    with pytest.raises(AssertionError) as caught:
        call()
    return str(caught.value)


def test_a_mismatch_is_described() -> None:
    expected = from_codes([[0x3F80, 0x3F80, 0x0000], [0x7FFF, 0x4000, 0x4000]])
    actual = from_codes([[0x3F80, 0x3F81, 0x8000], [0x3F80, 0x4005, 0x4001]])
    assert message(lambda: testing.assert_bits_equal(actual, expected, what="y")).splitlines() == [
        "y: 5 of 6 differ",
        "  first at (0, 1): 0x3f81 (1.0078125), expected 0x3f80 (1.0): 1 ulp apart",
        "  distances: 0 ulp (sign of zero, bits of NaN): 1; 1 ulp: 2; 4-7 ulp: 1; NaN against a number: 1",
        "  largest at (1, 1): 0x4005 (2.078125), expected 0x4000 (2.0): 5 ulp apart",
    ]
    found = message(lambda: testing.assert_bits_equal(np.float32([1.0]), np.nextafter(np.float32([1.0]), np.float32(2))))
    assert "0x3f800000 (1.0), expected 0x3f800001 (1.0000001192092896): 1 ulp apart" in found
    assert "result: 1 of 1 differ" in found


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32, np.float64, np.int16, np.uint8, np.bool_])
def test_every_dtype(dtype: Any) -> None:
    ones = np.ones((3, 2), dtype)
    testing.assert_bits_equal(ones, ones.copy())
    testing.assert_bits_equal(ones[::-1], ones[::-1].copy())
    testing.assert_bits_equal(ones[0, 0], ones[1, 1])
    zeros = ones.copy()
    zeros[2, 1] = 0
    assert "1 of 6 differ\n  first at (2, 1)" in message(lambda: testing.assert_bits_equal(zeros, ones))
    testing.assert_bits_equal(ones[:0], ones[:0])


def test_nan_and_zeros_count() -> None:
    one, other = from_codes([0x7FC0, 0x3F80]), from_codes([0x7FFF, 0x3F80])
    assert "first at (0,)" in message(lambda: testing.assert_bits_equal(one, other))
    testing.assert_bits_equal(one, other, nan="any")
    assert message(lambda: testing.assert_bits_equal(from_codes([0x8000]), from_codes([0]), nan="any"))
    assert message(lambda: testing.assert_bits_equal(from_codes([0x7FFF]), from_codes([0x7F80]), nan="any"))
    signalling = np.array([0x7FA00000], np.uint32).view(np.float32)
    testing.assert_bits_equal(signalling, signalling.copy())
    testing.assert_bits_equal(signalling, np.float32([np.nan]), nan="any")
    with pytest.raises(ValueError, match="nan is 'all'"):
        testing.assert_bits_equal(one, other, nan="all")


def test_dtypes_and_shapes_have_to_agree() -> None:
    ones = np.ones((2, 3), np.float32)
    assert message(lambda: testing.assert_bits_equal(ones, ones.astype(BF16))) == "result: dtype float32, expected bfloat16"
    assert message(lambda: testing.assert_bits_equal(ones, ones[:1], what="q")) == "q: shape (2, 3), expected (1, 3)"
    for kind in ([1.0], 1.0, None):
        with pytest.raises(TypeError, match=r"actual is a builtins.*numpy\.asarray"):
            testing.assert_bits_equal(kind, ones)


def test_other_libraries_come_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    class Array:
        """Of a stand-in for CuPy."""

        def __init__(self, host: np.ndarray) -> None:
            self.host, self.dtype = host, host.dtype

        def view(self, dtype: Any) -> "Array":
            return Array(self.host.view(dtype))

    cupy = types.ModuleType("cupy")
    cupy.ndarray, cupy.asnumpy = Array, lambda array: array.host  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    x = random_bf16(1, 3, 4)
    testing.assert_bits_equal(Array(x), x)
    testing.assert_bits_equal(x, Array(x))
    y = x.copy()
    y[1, 2] *= BF16(2)
    assert "first at (1, 2)" in message(lambda: testing.assert_bits_equal(Array(x), Array(y)))


@pytest.mark.filterwarnings("ignore")
def test_pytorch_tensors_too() -> None:
    torch = pytest.importorskip("torch")
    x = random_bf16(1, 3, 4)
    tensor = torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).requires_grad_()
    testing.assert_bits_equal(tensor, x)
    testing.assert_bits_equal(torch.ones(3), np.ones(3, np.float32))
    testing.assert_within_ulp(tensor.detach().T, x.T, 0)
    assert "dtype float32" in message(lambda: testing.assert_bits_equal(tensor.float(), x))


@given(st.lists(st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)), max_size=20))
def test_distances_are_those_of_the_casts_module(pairs: list[tuple[int, int]]) -> None:
    a, b = (from_codes([pair[place] for pair in pairs]) for place in (0, 1))
    expected = ulp_distance(a, b).astype(np.uint64)
    found = _bits.ulp_distance(a, b)
    assert (np.where(found == _bits.NOT_COMPARABLE, 65536, found) == expected).all()


def test_distances_in_other_formats() -> None:
    for dtype, unsigned in ((np.float16, np.uint16), (np.float32, np.uint32), (np.float64, np.uint64)):
        one = np.array([1.0, 0.0, -0.0, np.inf, -np.inf, np.nan, np.nan], dtype)
        other = np.array([1.0, -0.0, np.nextafter(dtype(0), dtype(1)), np.finfo(dtype).max, np.inf, np.nan, 1.0], dtype)
        infinity = int(np.array([np.inf], dtype).view(unsigned)[0])
        assert [int(d) for d in _bits.ulp_distance(one, other)] == [0, 0, 1, 1, 2 * infinity, 0, 2**64 - 1]
    assert [int(d) for d in _bits.ulp_distance(np.array([-128], np.int8), np.array([127], np.int8))] == [255]


def test_within_ulp() -> None:
    expected = from_codes([0x3F80, 0x0001, 0x7F80, 0x7FC0, 0x0000])
    near = from_codes([0x3F82, 0x8001, 0x7F7F, 0x7FFF, 0x8000])
    testing.assert_within_ulp(near, expected, 2)
    assert "2 of 5 are farther than 1 ulp apart" in message(lambda: testing.assert_within_ulp(near, expected, 1))
    nan = message(lambda: testing.assert_within_ulp(from_codes([0x7FFF]), from_codes([0x3F80]), 10**30))
    assert "NaN against a number" in nan
    for wrong in (-1, math.nan):
        with pytest.raises(ValueError, match="ulps is"):
            testing.assert_within_ulp(near, expected, wrong)


def test_within_ulp_of_a_real_value() -> None:
    """In units of actual's format: a correctly rounded value is within a half, whatever its size."""
    exact = np.ldexp(np.random.default_rng(1).uniform(1, 1.9, 4000), np.random.default_rng(2).integers(-140, 127, 4000))
    rounded = cufuse.round_to_bf16(exact)
    testing.assert_within_ulp(rounded, exact, 0.5)
    away = from_codes(bits(rounded) + 1)
    assert "farther than 0.5 ulp from the real value" in message(lambda: testing.assert_within_ulp(away, exact, 0.5))
    testing.assert_within_ulp(away, exact, 1.5)
    testing.assert_within_ulp(np.float32([1, np.inf, np.nan]), np.array([1 + 2.0**-24, np.inf, np.nan]), 0.5)
    text = message(lambda: testing.assert_within_ulp(from_codes([0x7F80]), np.array([3.0]), 5))
    assert "the real value is 3.0: inf ulp" in text
    # the unit is that of the real value's binade: just below 1 it is half of that above
    assert _bits.error_in_ulp(from_codes([0x3F80]), np.array([1 - 2.0**-9]))[0] == 0.5
    assert _bits.error_in_ulp(from_codes([0x0001]), np.array([2.0**-134]))[0] == 0.5


@given(st.fractions(), st.integers(-160, 140))
def test_correctly_rounded_fractions(number: Fraction, exponent: int) -> None:
    value = number * Fraction(2) ** exponent
    expected = round_to_bf16_codes(abs(value), value < 0)
    for mode, code in expected.items():
        testing.assert_correctly_rounded(from_codes([code]), [value], mode=mode)
        wrong = from_codes([code ^ 1])
        assert message(lambda: testing.assert_correctly_rounded(wrong, [value], mode=mode))  # noqa: B023
    testing.assert_correctly_rounded(np.array([round_to_float32(value)]), np.array([value], object))


@given(testing.float64_near_ties((5,)))
def test_correctly_rounded_float64(values: np.ndarray) -> None:
    testing.assert_correctly_rounded(cufuse.round_to_bf16(values), values)
    twice = values.astype(np.float32).astype(BF16)
    if (bits(twice) != bits(cufuse.round_to_bf16(values))).any():
        text = message(lambda: testing.assert_correctly_rounded(twice, values, what="cast"))
        assert text.startswith("cast: ") and "are not the exact value rounded by nearest_even" in text


def test_correctly_rounded_misuse() -> None:
    ones = np.ones(2, np.float32)
    nearest = "nearest_even"
    for actual, exact, mode in ((ones.astype(float), ones, nearest), (ones, ones, "up"), (ones, ones.astype(int), nearest)):
        with pytest.raises(TypeError, match="has dtype"):
            testing.assert_correctly_rounded(actual, exact, mode=mode)
    assert "exact has shape (1,)" in message(lambda: testing.assert_correctly_rounded(ones, [Fraction(1)]))
    testing.assert_correctly_rounded(ones, ones)


def test_rounding_a_fraction_to_odd() -> None:
    assert _bits.float64_to_odd(Fraction(10**400)) == sys.float_info.max
    assert _bits.float64_to_odd(Fraction(-1, 10**400)) == -5e-324
    third = _bits.float64_to_odd(Fraction(1, 3))
    assert int(np.float64(third).view(np.uint64)) % 2 == 1
    assert abs(Fraction(third) - Fraction(1, 3)) < Fraction(1, 2**54)


def test_same_row_in_any_batch() -> None:
    x, weight = random_bf16(3, 5, 512, binades=12), random_bf16(4, 512)
    testing.assert_same_row_any_batch(lambda rows: cufuse.rms_norm(rows, weight, recipe="batch-invariant"), x)


    def by_mean(rows: np.ndarray) -> Any:
        return cufuse.rms_norm(rows, weight, recipe="float32")

    text = message(lambda: testing.assert_same_row_any_batch(by_mean, x, what="norm"))
    assert "norm: row" in text and "of a batch of" in text and "against alone" in text

    def pair(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return rows, rows + BF16(len(rows) == 4)

    assert "f(x)[1]: row 0 at place 0 of a batch of 4" in message(lambda: testing.assert_same_row_any_batch(pair, x))
    with pytest.raises(ValueError, match="at least one row"):
        testing.assert_same_row_any_batch(pair, x[:0])
