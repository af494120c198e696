"""Hypothesis strategies for bfloat16 codes, values and arrays, and for float32 and float64 values near the places where a
rounding to bfloat16 turns."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final, Literal, TypeAlias, Unpack

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from cufuse.bf16 import bfloat16, round_to_bf16
from cufuse.testing._codes import FINITE, INFINITY, SIGN, Drawable, ElementOptions, drawable

Shape: TypeAlias = int | tuple[int, ...] | st.SearchStrategy[int] | st.SearchStrategy[tuple[int, ...]]
Draw: TypeAlias = Callable[[st.SearchStrategy[Any]], Any]

# one code in three is drawn from so many of the simplest: whole numbers up to 256 and values near 1
_SIMPLE: Final = 1024
# elements of an array that are drawn by themselves; more would fill the 8 KiB that Hypothesis has for an example
_FEW_DRAWN: Final = 64
_MOST_DRAWN: Final = 256


def bf16_bits(**options: Unpack[ElementOptions]) -> st.SearchStrategy[int]:
    """Codes of bfloat16 values, Python integers from 0 to 0xFFFF.

    options : ``min_value``, ``max_value``, ``allow_nan``, ``allow_infinity``, ``allow_subnormal``, ``allow_negative_zero``, with
        the meaning that ``hypothesis.strategies.floats`` gives them; every code of an allowed kind can be drawn, all 254 NaN too.

    Shrinks to 0, then to small whole numbers, then to values of few significant bits near 1; subnormals, infinities and NaN
    remain only where they are needed. Raises ValueError for contradictory options, TypeError for unknown ones.
    """
    codes, edges = drawable(options).codes, drawable(options).edges
    # places beyond the codes are those of the edges; every branch holds the one before it, so that any place shrinks to any smaller
    count = len(codes)
    places = [st.integers(0, count + len(edges) - 1)]
    if count > _SIMPLE:
        places.insert(0, st.integers(0, _SIMPLE - 1))
    if edges:
        places.append(st.integers(count, count + len(edges) - 1))
    return st.one_of(places).map(lambda place: codes[place if place < count else edges[place - count]])


def bf16_values(**options: Unpack[ElementOptions]) -> st.SearchStrategy[Any]:
    """Scalars of type ``cufuse.bfloat16``; options, shrinking and errors as ``bf16_bits``.

    ``hypothesis.strategies.from_type(cufuse.bfloat16)`` is this strategy without options, once cufuse.testing is imported.
    """
    return bf16_bits(**options).map(_scalar)


def bf16_arrays(
    shape: Shape,
    *,
    elements: st.SearchStrategy[Any] | None = None,
    fill: st.SearchStrategy[Any] | None = None,
    unique: bool = False,
    xp: ModuleType = np,
    **options: Unpack[ElementOptions],
) -> st.SearchStrategy[Any]:
    """bfloat16 arrays, in the style of ``hypothesis.extra.numpy.arrays``.

    Parameters
    ----------
    shape : an integer, a tuple, or a strategy for either, such as ``hypothesis.extra.numpy.array_shapes()``.
    elements : strategy for the elements, of any numbers that are bfloat16 values; by default ``bf16_values(**options)``.
    fill : strategy for one value that stands at every place that is not drawn by itself. By default every element is drawn, but
        beyond 256 elements that many drawn ones are repeated in a drawn order; with ``elements`` the default is
        ``elements`` for one value, as in Hypothesis, and ``hypothesis.strategies.nothing()`` has every element drawn.
    unique : no code twice (-0 and +0 are two codes).
    xp : numpy, or cupy: values are then made on the host and brought over at the end.
    options : those of ``bf16_bits``, where no ``elements`` are given.

    Raises ValueError for options beside elements, and (when an example is drawn) for an element that is no bfloat16 value.
    """
    if elements is not None and options:
        raise ValueError(f"elements are given, so {', '.join(options)} would have no effect; leave out one of them")
    bring = bringing(xp)
    if elements is None and fill is None and not unique:
        table = drawable(options)
        return _arrays(shape, 3, lambda words: pick(table, words).view(bfloat16), bring)
    codes = bf16_bits(**options) if elements is None else elements.map(_code)
    filling = fill.map(_code) if fill is not None else st.nothing() if unique else codes
    arrays = hnp.arrays(np.uint16, shape, elements=codes, fill=filling, unique=unique)
    return arrays.map(lambda array: bring(array.view(bfloat16)))


def float32_near_ties(
    shape: Shape | None = None,
    *,
    steps: int = 2,
    beside: Literal["ties", "values"] = "ties",
    xp: ModuleType = np,
    **options: Unpack[ElementOptions],
) -> st.SearchStrategy[Any]:
    """float32 values at and beside the middle between two bfloat16 values, where rounding to nearest turns.

    Parameters
    ----------
    shape : None for ``numpy.float32`` scalars; else as in ``bf16_arrays``, for arrays.
    steps : how many float32 steps from the middle at most, up to 63.
    beside : "ties" for the middles; "values" for the bfloat16 values themselves, where the directed modes turn.
    xp : as in ``bf16_arrays``.
    options : those of ``bf16_bits``, for the bfloat16 value below the middle. No infinity and no NaN unless asked for: they are
        drawn as they are.

    Shrinks to exact ties, and to the simplest bfloat16 beside them. The tie above the largest finite value, from which on
    the nearest is infinity, is among them.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 0 <= steps <= 63:
        raise ValueError(f"steps is {steps!r}; needed is an integer from 0 to 63")
    if beside not in ("ties", "values"):
        raise ValueError(f"beside is {beside!r}; needed is 'ties' or 'values'")
    table, base = drawable(FINITE | options), 0x8000 if beside == "ties" else 0

    def values(words: np.ndarray) -> np.ndarray:
        heads = pick(table, words >> 8).astype(np.int64)
        offset = _zigzag((words & 0xFF) % (2 * steps + 1))
        magnitude = heads & (SIGN - 1)
        beside_it = np.abs((magnitude << 16) + base + offset)
        codes = np.where(magnitude < INFINITY, beside_it, magnitude << 16) | (heads & SIGN) << 16
        return np.asarray(codes.astype(np.uint32).view(np.float32))

    return _wide(shape, values, xp)


def float64_near_ties(
    shape: Shape | None = None, *, xp: ModuleType = np, **options: Unpack[ElementOptions]
) -> st.SearchStrategy[Any]:
    """float64 values at and beside the middle between two bfloat16 values, from 2**-9 down to 2**-45 of a bfloat16 step away.

    Most of them lie nearer to the middle than a float32 can say: a cast that goes by way of float32 rounds twice and is wrong on
    about every second of those. ``shape``, ``xp``, ``options`` and shrinking are those of ``float32_near_ties``; scalars are
    ``numpy.float64``.
    """
    table = drawable(FINITE | options)

    def values(words: np.ndarray) -> np.ndarray:
        heads, last = pick(table, words >> 8).astype(np.int64), (words & 0xFF).astype(np.int64)
        distance, side = last % 38, np.where(last // 38 % 2, -1.0, 1.0)
        magnitude = heads & (SIGN - 1)
        step = np.maximum((magnitude >> 7) - 127, -126) - 7
        value = (magnitude << 16).astype(np.uint32).view(np.float32).astype(np.float64)
        # at most 8 + 1 + 45 bits, the leading one among them: exact
        beside_it = value + np.ldexp(0.5, step) + np.where(distance, np.ldexp(side, step - 46 + distance), 0.0)
        value = np.where(magnitude < INFINITY, beside_it, value)
        return np.asarray(np.copysign(value, np.where(heads & SIGN, -1.0, 1.0)))

    return _wide(shape, values, xp)


def bringing(xp: ModuleType) -> Callable[[np.ndarray], Any]:
    """What makes an array of the library ``xp`` of a NumPy array; TypeError for other libraries."""
    name = getattr(xp, "__name__", None)
    if name not in ("numpy", "cupy"):
        raise TypeError(f"xp is {xp!r}; needed is the module numpy or cupy")
    if name == "numpy":
        return lambda array: array
    # bfloat16 travels as its codes
    return lambda array: xp.asarray(array.view(f"u{array.itemsize}")).view(array.dtype)


def words(draw: Draw, count: int, width: int) -> np.ndarray:
    """``count`` whole numbers of ``width`` bytes (int64), drawn as one string of bytes, which is quick and shrinks to zeros."""
    # always as many bytes: where the shrinker takes a smaller shape, the elements that are left keep their values
    held = next(size for size in (1, 4, _FEW_DRAWN, _MOST_DRAWN) if count <= size or size == _MOST_DRAWN)
    drawn = np.frombuffer(draw(st.binary(min_size=held * width, max_size=held * width)), np.uint8)
    # last elements first: the shrinker sorts upward, and so brings zeros to the end of the array
    values = drawn.reshape(held, width)[::-1] @ (1 << np.arange(8 * width - 8, -8, -8, dtype=np.int64))
    if count > held:
        values = values[np.random.default_rng(draw(st.integers(0, 2**16 - 1))).integers(0, held, count)]
    return np.asarray(values[:count])


def shapes(shape: Shape) -> st.SearchStrategy[tuple[int, ...]]:
    """A strategy for the shape that a user gave in one of four ways."""
    given = shape if isinstance(shape, st.SearchStrategy) else st.just(shape)
    return given.map(lambda one: tuple(one) if isinstance(one, (tuple, list)) else (int(one),))


def pick(table: Drawable, words: np.ndarray) -> np.ndarray:
    """Codes (uint16) by words of three bytes: the first says from where, the others which."""
    source, place = words >> 16, words & 0xFFFF
    codes = table.array
    found = codes[np.where(source < 85, place % min(len(codes), _SIMPLE), place % len(codes))]
    if table.edges:
        found = np.where(source >= 224, codes[np.array(table.edges)[place % len(table.edges)]], found)
    return np.asarray(found)


def _arrays(
    shape: Shape, width: int, values: Callable[[np.ndarray], np.ndarray], bring: Callable[[np.ndarray], Any]
) -> st.SearchStrategy[Any]:
    given = shapes(shape)

    @st.composite
    def arrays(draw: Draw) -> Any:
        chosen = draw(given)
        return bring(values(words(draw, math.prod(chosen), width)).reshape(chosen))

    return arrays()


def _wide(shape: Shape | None, values: Callable[[np.ndarray], np.ndarray], xp: ModuleType) -> st.SearchStrategy[Any]:
    bring = bringing(xp)
    if shape is None:
        return _arrays((), 4, values, lambda array: array[()])
    return _arrays(shape, 4, values, bring)


def _zigzag(places: np.ndarray) -> np.ndarray:
    """0, 1, 2, 3, 4 ... as 0, 1, -1, 2, -2 ..."""
    return np.asarray(np.where(places % 2, (places + 1) // 2, -(places // 2)))


def _scalar(code: int) -> Any:
    return np.uint16(code).view(bfloat16)


def _code(value: Any) -> int:
    if isinstance(value, bfloat16):
        return int(value.view(np.uint16))
    rounded = round_to_bf16(np.float64(value))
    if float(rounded) != float(value) and not math.isnan(value):
        raise ValueError(f"the element {value!r} is no bfloat16 value (the nearest is {rounded}); draw from bf16_values()")
    return int(rounded.view(np.uint16))
