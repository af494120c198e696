"""Which bfloat16 codes a strategy may draw, in the order in which a counterexample should shrink."""

import functools
import math
from typing import Any, Final, NamedTuple, TypedDict

import numpy as np

from cufuse.bf16 import bfloat16, round_to_bf16

SIGN: Final = 0x8000
INFINITY: Final = 0x7F80


class ElementOptions(TypedDict, total=False):
    """Which values may be drawn, in the words of ``hypothesis.strategies.floats``.

    min_value, max_value : bounds, both included; they need not be bfloat16 values. As in Hypothesis a bound of ``0.0``
        leaves out -0 below it, and ``-0.0`` lets it in.
    allow_nan : every NaN code, both signs; by default where there is no bound.
    allow_infinity : by default where the bounds let one in.
    allow_subnormal, allow_negative_zero : by default yes.
    """

    min_value: float | None
    max_value: float | None
    allow_nan: bool | None
    allow_infinity: bool | None
    allow_subnormal: bool
    allow_negative_zero: bool


FINITE: Final[ElementOptions] = {"allow_nan": False, "allow_infinity": False}


@functools.cache
def simplest_first() -> np.ndarray:
    """All 65,536 codes (uint16): whole numbers up to 256 upward, then values of few significant bits near 1 before others,
    subnormals, infinities, NaN; every positive code is followed by its negative."""
    magnitude = np.arange(SIGN)
    field, fraction = magnitude >> 7, magnitude & 0x7F
    with np.errstate(invalid="ignore"):
        value = magnitude.astype(np.uint16).view(bfloat16).astype(np.float64)
    whole = (value == np.floor(value)) & (value <= 256)
    kind = np.select([whole, field == 0, field < 0xFF, fraction == 0], [0, 2, 1, 3], 4)
    significand = fraction | 0x80
    bits = 8 - np.log2(significand & -significand).astype(int)
    exponent = field - 127
    # the last key is the first to count
    keys = [np.where(kind == 1, key, 0) for key in (exponent < 0, bits, np.abs(exponent))]
    order = np.lexsort((magnitude, *keys, kind))
    return np.stack([order, order | SIGN], axis=1).reshape(-1).astype(np.uint16)


class Drawable(NamedTuple):
    """Codes, simplest first, and the places among them of those at which formats and casts have their edges."""

    array: np.ndarray
    codes: tuple[int, ...]
    edges: tuple[int, ...]


_EDGES = (0x3F81, 0x3F7F, 0x8000, 0x0080, 0x8080, 0x7F7F, 0xFF7F, 0x007F, 0x0001, 0x8001, 0x7F80, 0xFF80, 0x7FFF, 0xFFC0)


@functools.lru_cache(maxsize=64)
def _between(lowest: int, highest: int, nan: bool, subnormal: bool, negative_zero: bool) -> Drawable:
    codes = simplest_first()
    magnitude = codes & np.uint16(SIGN - 1)
    negative = codes >= SIGN
    place = _place(codes.astype(np.int32))
    keep = (place >= lowest) & (place <= highest) & (magnitude <= INFINITY)
    if not subnormal:
        keep &= (magnitude == 0) | (magnitude >= 0x80)
    if not negative_zero:
        keep &= ~(negative & (magnitude == 0))
    if nan:
        keep |= magnitude > INFINITY
    left = codes[keep].tolist()
    return Drawable(codes[keep], tuple(left), tuple(left.index(code) for code in _EDGES if code in left))


def _place(code: Any) -> Any:
    """Where a code lies on the line of numbers, -0 one step below +0."""
    return np.where(code < SIGN, code, SIGN - 1 - code)


def drawable(options: ElementOptions) -> Drawable:
    """The codes that the options leave, simplest first. ValueError where they contradict each other, TypeError for unknown ones."""
    unknown = set(options) - set(ElementOptions.__annotations__)
    if unknown:
        raise TypeError(f"unknown options {sorted(unknown)}; known are {', '.join(ElementOptions.__annotations__)}")
    infinity, nan = options.get("allow_infinity"), options.get("allow_nan")
    farthest = INFINITY - 1 if infinity is False else INFINITY
    limits = []
    for name, mode, default in (("min_value", "up", SIGN | farthest), ("max_value", "down", farthest)):
        bound = options.get(name)
        if bound is None:
            limits.append(int(_place(default)))
            continue
        if not isinstance(bound, (int, float, np.floating, bfloat16)) or math.isnan(bound):
            raise ValueError(f"{name} is {bound!r}; needed is a number, or None for no bound")
        limits.append(int(_place(int(round_to_bf16(np.float64(bound), mode=mode).view(np.uint16)))))
        if nan:
            raise ValueError(f"allow_nan is True, but a NaN is not within {name} = {bound!r}: leave out one of them")
        nan = False
    if infinity is False:
        limits = [max(limits[0], int(_place(SIGN | farthest))), min(limits[1], farthest)]
    left = _between(
        limits[0], limits[1], nan is not False, options.get("allow_subnormal", True), options.get("allow_negative_zero", True)
    )
    if not left.codes:
        raise ValueError(f"no bfloat16 is left by {dict(options)}; widen the bounds")
    return left
