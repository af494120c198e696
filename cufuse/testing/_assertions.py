"""Assertions on bits. Every one says where the first mismatch is, both codes and values, how far apart, and how many there are."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, Final, Literal

import numpy as np

from cufuse.bf16 import bfloat16, round_to_bf16
from cufuse.testing import _bits

DEFAULT_BATCHES: Final = (1, 2, 3, 4, 7, 8, 15, 16, 17, 64)
"""Batch sizes on both sides of every change of PyTorch's order of the mean."""


def assert_bits_equal(actual: Any, expected: Any, *, nan: Literal["bits", "any"] = "bits", what: str = "result") -> None:
    """The same dtype, shape and bits, -0 and NaN included.

    Parameters
    ----------
    actual, expected : NumPy or CuPy arrays or PyTorch tensors, of any dtype; one of each is fine, they are compared on the host.
    nan : "bits": a NaN must have the same code; "any": any two NaN are equal.
    what : what the message calls the arrays.

    Raises AssertionError with the first mismatch (place, codes, values, distance in ulp), the count and a histogram of the
    distances; TypeError for other kinds of arrays, ValueError for another ``nan``.
    """
    if nan not in ("bits", "any"):
        raise ValueError(f"nan is {nan!r}; needed is 'bits' or 'any'")
    one, other = _pair(actual, expected, what)
    differ = _bits.codes(one) != _bits.codes(other)
    if nan == "any":
        differ &= ~(_bits.is_nan(one) & _bits.is_nan(other))
    if differ.any():
        raise AssertionError(_message(what, "differ", one, other, differ))


def assert_within_ulp(actual: Any, expected: Any, ulps: float, *, what: str = "result") -> None:
    """No element farther than ``ulps`` from the expected one.

    Arrays of one dtype are compared by the number of steps of the format between them: -0 and +0 are 0 apart, infinity one
    step above the largest finite value, two NaN 0, a NaN and anything else infinitely far. Where ``expected`` is float64 and
    ``actual`` of a shorter format, expected is taken for the real value, and the distance is a real number of units in the last
    place that ``actual``'s format has there: a correctly rounded result is within 0.5.

    Parameters, errors: as ``assert_bits_equal``; ValueError where ulps is negative.
    """
    if not ulps >= 0:
        raise ValueError(f"ulps is {ulps!r}; needed is a number >= 0")
    one, other = _bits.to_host("actual", actual), _bits.to_host("expected", expected)
    if other.dtype == np.float64 and one.dtype != np.float64 and _bits.is_float(one.dtype):
        _same_shape(one, other, what)
        error = _bits.error_in_ulp(one, other)
        far = error > ulps
        if far.any():
            at = tuple(int(i) for i in np.argwhere(far)[0])
            worst = tuple(int(i) for i in np.unravel_index(int(np.argmax(error)), error.shape))
            raise AssertionError(
                f"{what}: {np.count_nonzero(far)} of {one.size} are farther than {ulps:g} ulp from the real value\n"
                f"  first at {at}: {_bits.described(one[at])}, the real value is {float(other[at])!r}: {error[at]:.6g} ulp\n"
                f"  largest at {worst}: {error[worst]:.6g} ulp"
            )
        return
    one, other = _pair(one, other, what)
    distance = _bits.ulp_distance(one, other)
    # a float's steps may exceed what uint64 compares with a float exactly; both are far beyond any use
    far = distance > np.uint64(min(int(ulps), 2**63))
    if far.any():
        raise AssertionError(_message(what, f"are farther than {ulps:g} ulp apart", one, other, far))


def assert_correctly_rounded(actual: Any, exact: Any, *, mode: str = "nearest_even", what: str = "result") -> None:
    """Every element is the exact value, rounded once to actual's format.

    Parameters
    ----------
    actual : bfloat16 array (any mode), or float32 (nearest_even).
    exact : what is rounded: a float64 (or float32) array of actual's shape, taken as exact; or numbers of type
        ``fractions.Fraction`` in nested sequences or an object array, where float64 cannot hold the value.
    mode : a rounding mode of ``cufuse.round_to_bf16`` (not "stochastic").

    A zero among fractions has no sign; +0 is expected for it. Errors as ``assert_bits_equal``; TypeError for other dtypes.
    """
    one = _bits.to_host("actual", actual)
    if one.dtype not in (bfloat16, np.float32) or (one.dtype == np.float32 and mode != "nearest_even"):
        raise TypeError(f"actual has dtype {one.dtype}, mode is {mode!r}; needed is bfloat16, or float32 with 'nearest_even'")
    wide = _real_values(exact)
    if wide.shape != one.shape:
        raise AssertionError(f"{what}: shape {one.shape}, but exact has shape {wide.shape}")
    if one.dtype == bfloat16:
        rounded = round_to_bf16(wide, mode=mode)
    else:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            rounded = wide.astype(np.float32)
    differ = (_bits.codes(one) != _bits.codes(rounded)) & ~(_bits.is_nan(one) & _bits.is_nan(rounded))
    if differ.any():
        raise AssertionError(_message(what, f"are not the exact value rounded by {mode}", one, rounded, differ))


def assert_same_row_any_batch(
    f: Callable[[Any], Any], x: Any, *, batches: Sequence[int] = DEFAULT_BATCHES, what: str = "f(x)"
) -> None:
    """Every row's result is the same whatever other rows are computed with it.

    Parameters
    ----------
    f : from [M, K] to an array [M, ...] or a tuple of such arrays, row by row.
    x : [M, K] with M >= 1, NumPy or CuPy array or PyTorch tensor. Every row is computed alone first, then in batches.
    batches : the sizes to try. Sizes up to M take consecutive rows of x, larger ones repeat them.

    Raises AssertionError that names the batch size, the row and the first differing element. A recipe that takes PyTorch's order of
    the sum does not pass (``"batch-invariant"`` does).
    """
    count = len(x)
    if count == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}; needed is at least one row")
    alone = [_outputs(f(x[row : row + 1])) for row in range(count)]
    for size in batches:
        starts = range(0, count, size) if size < count else (0,)
        for start in starts:
            rows = [(start + place) % count for place in range(size)]
            together = _outputs(f(x[rows]))
            for place, row in enumerate(rows):
                for index, (one, other) in enumerate(zip(together, alone[row], strict=True)):
                    part = f"{what}[{index}]" if len(together) > 1 else what
                    case = f"{part}: row {row} at place {place} of a batch of {size}, against alone"
                    assert_bits_equal(one[place : place + 1], other, what=case)


def _outputs(found: Any) -> tuple[np.ndarray, ...]:
    return tuple(_bits.to_host("f(x)", one) for one in (found if isinstance(found, tuple) else (found,)))


def _pair(actual: Any, expected: Any, what: str) -> tuple[np.ndarray, np.ndarray]:
    one, other = _bits.to_host("actual", actual), _bits.to_host("expected", expected)
    if one.dtype != other.dtype:
        raise AssertionError(f"{what}: dtype {one.dtype}, expected {other.dtype}")
    _same_shape(one, other, what)
    return one, other


def _same_shape(one: np.ndarray, other: np.ndarray, what: str) -> None:
    if one.shape != other.shape:
        raise AssertionError(f"{what}: shape {one.shape}, expected {other.shape}")


def _real_values(exact: Any) -> np.ndarray:
    numbers = isinstance(exact, (list, tuple, Fraction)) or (isinstance(exact, np.ndarray) and exact.dtype.kind == "O")
    if not numbers:
        held = _bits.to_host("exact", exact)
        if held.dtype not in (np.float64, np.float32):
            raise TypeError(f"exact has dtype {held.dtype}; needed is float64, float32, or fractions.Fraction")
        return held.astype(np.float64)
    nested = np.array(exact, dtype=object)
    wide = np.array([_bits.float64_to_odd(Fraction(number)) for number in nested.reshape(-1)], np.float64)
    return wide.reshape(nested.shape)


def _message(what: str, verdict: str, one: np.ndarray, other: np.ndarray, differ: np.ndarray) -> str:
    places = np.argwhere(differ)
    at = tuple(int(i) for i in places[0])
    distance = _bits.ulp_distance(one[differ], other[differ])
    element = _bits.Element(at, one[at], other[at])
    lines = [
        f"{what}: {len(places)} of {one.size} {verdict}",
        f"  first at {at}: {element}: {_steps(int(distance[0]))}",
        f"  distances: {histogram(distance)}",
    ]
    finite = distance[distance != _bits.NOT_COMPARABLE]
    if len(finite) > 1:
        largest = tuple(int(i) for i in places[int(np.argmax(np.where(distance == _bits.NOT_COMPARABLE, 0, distance)))])
        lines.append(f"  largest at {largest}: {_bits.Element(largest, one[largest], other[largest])}: {_steps(int(finite.max()))}")
    return "\n".join(lines)


def histogram(distance: np.ndarray) -> str:
    """Distances in ulp, counted by powers of two: "1 ulp: 12; 2-3 ulp: 4; NaN against a number: 1"."""
    nan = distance == _bits.NOT_COMPARABLE
    parts = []
    zero = int(np.count_nonzero(distance == 0))
    if zero:
        parts.append(f"0 ulp (sign of zero, bits of NaN): {zero}")
    rest = distance[~nan & (distance != 0)]
    for bits in range(64):
        low, high = 1 << bits, (2 << bits) - 1
        if count := int(np.count_nonzero((rest >= np.uint64(low)) & (rest <= np.uint64(high)))):
            parts.append(f"{low if low == high else f'{low}-{high}'} ulp: {count}")
    if nan.any():
        parts.append(f"NaN against a number: {np.count_nonzero(nan)}")
    return "; ".join(parts)


def _steps(distance: int) -> str:
    return "NaN against a number" if distance == int(_bits.NOT_COMPARABLE) else f"{distance} ulp apart"
