"""What every rounding to bfloat16 has to be: idempotent, monotone, odd, exact where it can, within half a step, bracketed by the
directed modes, indifferent to powers of two, and harmless after one float32 operation."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import cufuse
from cufuse import bf16, testing
from tests.totals import count
from tests.witnesses import bits, from_codes, round_to_bf16, round_to_float32

MODES = tuple(mode for mode in bf16.ROUNDING_MODES if mode != "stochastic")
MIRROR = {"up": "down", "down": "up"}
SIZE = 48
AREA = "casts: algebraic properties"


def bit_patterns(unsigned: type, dtype: type) -> st.SearchStrategy[np.ndarray]:
    """Any values of a format, NaN apart."""
    drawn = st.binary(min_size=SIZE * unsigned().itemsize, max_size=SIZE * unsigned().itemsize)
    values = drawn.map(lambda raw: np.frombuffer(raw, unsigned).view(dtype))
    return values.map(lambda x: np.where(np.isnan(x), dtype(0), x))


WIDE = {
    "float32": st.one_of(
        testing.float32_near_ties(SIZE, allow_infinity=True),
        testing.float32_near_ties(SIZE, beside="values"),
        bit_patterns(np.uint32, np.float32),
    ),
    "float64": st.one_of(testing.float64_near_ties(SIZE), bit_patterns(np.uint64, np.float64)),
}
ANY = st.one_of(*WIDE.values())
MODE = st.sampled_from(MODES)


def rounded(x: np.ndarray, mode: str) -> np.ndarray:
    return np.asarray(cufuse.round_to_bf16(x, mode=mode))


def wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def places(x: np.ndarray) -> np.ndarray:
    """Codes along the line of numbers, -0 just below +0."""
    codes = bits(x).astype(np.int32)
    return np.where(codes < 0x8000, codes, 0x7FFF - codes)


@given(ANY, MODE)
def test_idempotent(x: np.ndarray, mode: str) -> None:
    once = rounded(x, mode)
    for again in MODES:
        testing.assert_bits_equal(rounded(once.astype(x.dtype), again), once)
    count(AREA, inputs=x.size, outputs=x.size * len(MODES))


@given(ANY, MODE)
def test_monotone(x: np.ndarray, mode: str) -> None:
    """Larger values never round to smaller ones; a value's sign is kept, so that order holds down to the zeros."""
    unsigned = {4: np.int32, 8: np.int64}[x.itemsize]
    order = np.argsort(x, kind="stable")
    ascending = x[order]
    ascending = ascending[np.lexsort((~np.signbit(ascending), ascending))]
    assert ascending.view(unsigned).size == SIZE
    assert (np.diff(places(rounded(ascending, mode))) >= 0).all()
    count(AREA, inputs=x.size, outputs=x.size)


@given(ANY, MODE)
def test_odd(x: np.ndarray, mode: str) -> None:
    """Rounding the negative is the negative of rounding; up and down change places."""
    testing.assert_bits_equal(rounded(-x, mode), from_codes(bits(rounded(x, MIRROR.get(mode, mode))) ^ np.uint16(0x8000)))
    count(AREA, inputs=x.size, outputs=x.size)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mode", MODES)
def test_every_bfloat16_stays(mode: str, dtype: type) -> None:
    codes = np.array([code for code in range(65536) if code & 0x7FFF <= 0x7F80], np.uint16)
    testing.assert_bits_equal(rounded(from_codes(codes).astype(dtype), mode), from_codes(codes))
    count(AREA, inputs=codes.size, outputs=codes.size)


def steps(x: np.ndarray) -> np.ndarray:
    """A bfloat16 step in the binade of each finite value, float64."""
    exponent = np.frexp(np.abs(x))[1] - 1
    return np.ldexp(1.0, np.maximum(np.where(x == 0, -126, exponent), -126) - 7)


@given(ANY)
def test_within_a_half_and_bracketed(x: np.ndarray) -> None:
    """The nearest is within half a step; down and up are the value's neighbours or the value; the others are one of the two.

    Differences of a float64 and the bfloat16 beside it are exact: they agree in all but their last 45 bits.
    """
    exact = wide(x)
    inside = np.abs(exact) < 2.0**127 * (2 - 2.0**-8)
    x, exact = x[inside], exact[inside]
    found = {mode: rounded(x, mode) for mode in MODES}
    values = {mode: wide(one) for mode, one in found.items()}
    step = steps(exact)
    for mode in ("nearest_even", "nearest_away"):
        assert (np.abs(values[mode] - exact) <= step / 2).all()
    assert (values["down"] <= exact).all()
    assert (exact <= values["up"]).all()
    apart = places(found["up"]) - places(found["down"])
    assert ((apart == 0) == (exact == values["down"])).all()
    # between the smallest negative and zero lies -0, and there only is another way to say nothing
    assert (apart <= 1).all()
    for mode in ("nearest_even", "nearest_away", "toward_zero"):
        assert ((bits(found[mode]) == bits(found["up"])) | (bits(found[mode]) == bits(found["down"]))).all()
    assert (np.abs(values["toward_zero"]) == np.minimum(np.abs(values["up"]), np.abs(values["down"]))).all()
    tie = np.abs(values["up"] - exact) == np.abs(values["down"] - exact)
    assert (bits(found["nearest_even"])[tie] % 2 == 0)[exact[tie] != values["up"][tie]].all()
    assert (np.abs(values["nearest_away"]) >= np.abs(exact))[tie].all()
    count(AREA, inputs=x.size, outputs=x.size * len(MODES))


@given(ANY, MODE, st.integers(-40, 40))
def test_powers_of_two_pass_through(x: np.ndarray, mode: str, power: int) -> None:
    exact = wide(x)
    magnitude = np.abs(exact)
    safe = (magnitude == 0) | ((magnitude >= 2.0**-80) & (magnitude < 2.0**80))
    x, exact = x[safe], exact[safe]
    scaled = np.ldexp(exact, power).astype(x.dtype)
    expected = np.ldexp(wide(rounded(x, mode)), power).astype(np.float32)
    testing.assert_bits_equal(wide(rounded(scaled, mode)).astype(np.float32), expected)
    count(AREA, inputs=x.size, outputs=x.size)


@given(testing.float32_near_ties(SIZE), st.binary(min_size=2 * SIZE, max_size=2 * SIZE))
def test_stochastic_is_one_of_the_neighbours_and_monotone(x: np.ndarray, raw: bytes) -> None:
    """In the random word: a larger one never gives a smaller magnitude; 0 truncates; representable values never move."""
    words = np.frombuffer(raw, np.uint16)
    drawn = [cufuse.round_to_bf16(x, mode="stochastic", random_bits=one) for one in (words * 0, words // 2, words)]
    magnitudes = [bits(one) & 0x7FFF for one in drawn]
    testing.assert_bits_equal(drawn[0], rounded(x, "toward_zero"))
    assert (magnitudes[0] <= magnitudes[1]).all()
    assert (magnitudes[1] <= magnitudes[2]).all()
    assert (magnitudes[2] - magnitudes[0] <= 1).all()
    testing.assert_bits_equal(drawn[2][x == wide(drawn[0])], drawn[0][x == wide(drawn[0])])
    count(AREA, inputs=x.size, outputs=3 * x.size)


OPERATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Fraction]]] = {
    "+": (np.add, lambda a, b: a + b),
    "-": (np.subtract, lambda a, b: a - b),
    "*": (np.multiply, lambda a, b: a * b),
    "/": (np.divide, lambda a, b: a / b),
}
OPERANDS = testing.bf16_arrays(8, allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("operation", OPERATIONS)
@given(OPERANDS, OPERANDS)
@example(from_codes([0x0001, 0x0080, 0x00FF]), from_codes([0x3F01, 0x3F81, 0x4000]))  # results among the subnormals
@example(from_codes([0x7F7F, 0x7F7F, 0x3F80]), from_codes([0x7F7F, 0x0001, 0x3380]))  # beyond the range, and 1 + 2**-24
def test_one_float32_operation_rounds_as_once(operation: str, a: np.ndarray, b: np.ndarray) -> None:
    """Two bfloat16, one float32 operation, one more rounding: the correctly rounded bfloat16 result, since 24 >= 2 * 8 + 2
    (Figueroa, "When is double rounding innocuous?", 1995)."""
    by_float32, exactly = OPERATIONS[operation]
    if operation == "/":
        b = np.where(b == 0, b.dtype.type(1), b)
    with np.errstate(over="ignore", under="ignore"):
        found = rounded(by_float32(a.astype(np.float32), b.astype(np.float32)), "nearest_even")
    pairs = zip(a.astype(float).tolist(), b.astype(float).tolist(), strict=True)
    expected = [round_to_bf16(exactly(Fraction(one), Fraction(other))) for one, other in pairs]
    # the sign of a zero is the operation's business
    differ = (bits(found) != expected) & ((bits(found) | np.array(expected)) & 0x7FFF != 0)
    assert not differ.any(), (a[differ], b[differ], found[differ], from_codes(expected)[differ])
    count("casts: one float32 operation", inputs=2 * a.size, outputs=a.size)


def test_square_roots_round_as_once() -> None:
    """All of them: y is the nearest to the root of x where (2y - step)**2 <= 4x <= (2y + step)**2 in whole numbers."""
    codes = np.arange(1, 0x7F80, dtype=np.uint16)
    x = from_codes(codes)
    with np.errstate(under="ignore"):
        found = rounded(np.sqrt(x.astype(np.float32)), "nearest_even")
    for value, root in zip(wide(x).tolist(), wide(found).tolist(), strict=True):
        step = Fraction(float(steps(np.array([root]))[0]))
        low = Fraction(root) - step / (4 if np.frexp(root)[0] == 0.5 else 2)
        assert low**2 <= Fraction(value) <= (Fraction(root) + step / 2) ** 2
    count("casts: one float32 operation", inputs=codes.size, outputs=codes.size)


def test_two_float32_operations_do_not() -> None:
    """A sum of three, rounded to float32 twice and to bfloat16 once, is not the rounded sum: why recipes state their orders."""
    a, b, c = Fraction(1), Fraction(1, 2**8), Fraction(1, 2**33)
    stepwise = round_to_float32(Fraction(float(round_to_float32(a + b))) + c)
    assert round_to_bf16(a + b + c) == 0x3F81
    assert round_to_bf16(Fraction(float(stepwise))) == 0x3F80
