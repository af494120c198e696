"""Hypothesis strategies for inputs on which orders of summation and roundings show: sums, norms and products."""

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Final, TypeAlias

import numpy as np
from hypothesis import strategies as st

from cufuse.bf16 import bfloat16
from cufuse.emulation.tensor_core import TENSOR_CORES
from cufuse.testing._strategies import Draw, Shape, bringing, shapes, words

Size: TypeAlias = int | st.SearchStrategy[int]

HARD_KINDS: Final = ("cancellation", "wide", "truncated")
PRODUCT_KINDS: Final = ("ordinary", *HARD_KINDS)
FEW: Final = st.integers(1, 4)
UP_TO_64: Final = st.integers(1, 64)
EPS: Final = st.sampled_from([1e-6, 1e-5])
NORM_KINDS: Final = ("ordinary", "outlier", "wide", "zero row")


def accumulation_hard(
    shape: Shape, *, kinds: Sequence[str] = HARD_KINDS, core: str = "sm_90", xp: ModuleType = np
) -> st.SearchStrategy[Any]:
    """bfloat16 arrays whose sums along the last axis are hard, of one of these kinds:

    ============  ===================================================================================================
    cancellation  the second half takes back the first in another order; a small remainder is the true sum
    wide          exponents from -60 to 60
    truncated     in every 16 terms one that is so large that a tensor core cuts the others off or nearly so (they lie
                  around the last of the ``fraction_bits`` that it keeps), and sometimes the same once more, negative
    ============  ===================================================================================================

    Parameters
    ----------
    shape : as in ``bf16_arrays``.
    kinds : those to draw from.
    core : whose ``fraction_bits`` "truncated" aims at, a key of ``cufuse.emulation.tensor_core.TENSOR_CORES``.
    xp : numpy, or cupy for CuPy arrays.

    No infinities, no NaN, no subnormals. As factors of products, take ones or powers of two for the other factor, which keep the
    difficulty (``gemm_inputs`` does). Shrinks to zeros, then to small whole numbers.
    """
    _check_kinds(kinds, HARD_KINDS)
    if core not in TENSOR_CORES:
        raise ValueError(f"core is {core!r}; known are {', '.join(TENSOR_CORES)}")
    bring = bringing(xp)
    given = shapes(shape)

    @st.composite
    def arrays(draw: Draw) -> Any:
        return bring(_hard(draw, draw(given), draw(st.sampled_from(kinds)), core))

    return arrays()


def gemm_inputs(
    *,
    m: Size = FEW,
    n: Size = FEW,
    k: Size = UP_TO_64,
    kinds: Sequence[str] = PRODUCT_KINDS,
    core: str = "sm_90",
    allow_nan: bool = False,
    allow_infinity: bool = False,
    allow_subnormal: bool = True,
    allow_negative_zero: bool = True,
    xp: ModuleType = np,
) -> st.SearchStrategy[dict[str, Any]]:
    """Keyword arguments of ``cufuse.linear``: ``{"x": [M, K], "weight": [N, K]}``, bfloat16.

    Parameters
    ----------
    m, n, k : integers, or strategies for them.
    kinds : "ordinary" (values of similar size), and those of ``accumulation_hard`` for x, where the weight is made of powers of
        two.
    core : as in ``accumulation_hard``.
    allow_nan, allow_infinity : whether up to three such elements are put in; by default none.
    allow_subnormal, allow_negative_zero : the same for subnormals and -0.
    xp : numpy, or cupy for CuPy arrays.

    Shrinks to few, small whole numbers; beyond 256 elements that many drawn ones are repeated in a drawn order.
    """
    _check_kinds(kinds, PRODUCT_KINDS)
    special = _special(allow_nan, allow_infinity, allow_subnormal, allow_negative_zero)
    bring = bringing(xp)

    @st.composite
    def inputs(draw: Draw) -> dict[str, Any]:
        rows, outputs, depth = (_size(draw, one) for one in (m, n, k))
        kind = draw(st.sampled_from(kinds))
        if kind == "ordinary":
            x, weight = _ordinary(draw, (rows, depth)), _ordinary(draw, (outputs, depth))
        else:
            x = _hard(draw, (rows, depth), kind, core)
            weight = _bf16(np.ones((outputs, depth)), _numbers(draw, (outputs, 1), -4, 4))
        _put_in(draw, special, x, weight)
        return {"x": bring(x), "weight": bring(weight)}

    return inputs()


def rms_norm_inputs(
    *,
    rows: Size = FEW,
    columns: Size = UP_TO_64,
    residual: bool = False,
    eps: float | st.SearchStrategy[float] = EPS,
    kinds: Sequence[str] = NORM_KINDS,
    allow_nan: bool = False,
    allow_infinity: bool = False,
    allow_subnormal: bool = True,
    allow_negative_zero: bool = True,
    xp: ModuleType = np,
) -> st.SearchStrategy[dict[str, Any]]:
    """Keyword arguments of ``cufuse.rms_norm``: ``{"x": [M, K], "weight": [K], "eps": float}``, bfloat16.

    Parameters
    ----------
    rows, columns : integers, or strategies for them.
    residual : a "residual" [M, K] too, for ``cufuse.add_rms_norm``.
    eps : a number, or a strategy for it.
    kinds : "ordinary", "outlier" (one element 2**6 to 2**12 times as large), "wide" (exponents from -30 to 30), "zero row".
    allow_nan, allow_infinity, allow_subnormal, allow_negative_zero, xp : as in ``gemm_inputs``.

    Weights go up to 100, as those of Qwen3's K norm do. Shrinking as in ``gemm_inputs``.
    """
    _check_kinds(kinds, NORM_KINDS)
    special = _special(allow_nan, allow_infinity, allow_subnormal, allow_negative_zero)
    bring = bringing(xp)

    @st.composite
    def inputs(draw: Draw) -> dict[str, Any]:
        shape = (_size(draw, rows), _size(draw, columns))
        x = _norm_rows(draw, shape, draw(st.sampled_from(kinds)))
        weight = _bf16(_numbers(draw, shape[1:], 1, 200), -1)
        found = {"x": x, "weight": weight}
        if residual:
            found["residual"] = _ordinary(draw, shape)
        _put_in(draw, special, x, weight)
        chosen = draw(eps) if isinstance(eps, st.SearchStrategy) else eps
        return {name: bring(array) for name, array in found.items()} | {"eps": chosen}

    return inputs()


def _hard(draw: Draw, shape: tuple[int, ...], kind: str, core: str) -> np.ndarray:
    if kind == "wide":
        return _bf16(_numbers(draw, shape, -255, 255), _numbers(draw, shape, -60, 60))
    if kind == "truncated":
        return _truncated(draw, shape, core)
    wide = _numbers(draw, shape, -255, 255) * np.ldexp(1.0, _numbers(draw, shape, 0, 20))
    half = shape[-1] // 2
    if half:
        wide[..., half : 2 * half] = -np.roll(wide[..., :half], draw(st.integers(0, half - 1)), axis=-1)
    if wide.size:
        # what is left of the sum
        wide[..., draw(st.integers(0, shape[-1] - 1))] *= 2.0 ** -draw(st.integers(1, 30))
    return np.asarray(wide.astype(bfloat16))


def _truncated(draw: Draw, shape: tuple[int, ...], core: str) -> np.ndarray:
    top = draw(st.integers(0, 20))
    # of a step whose largest term is 2**top, multiples of 2**(top - fraction_bits) survive
    beside = _numbers(draw, shape, -3, 2)
    values = _numbers(draw, shape, -3, 3) * np.ldexp(1.0, top - TENSOR_CORES[core].fraction_bits + beside)
    values[..., draw(st.integers(0, 15)) :: 16] = 2.0**top
    if draw(st.booleans()):
        values[..., draw(st.integers(0, 15)) :: 16] = -(2.0**top)
    return np.asarray(values.astype(bfloat16))


def _norm_rows(draw: Draw, shape: tuple[int, int], kind: str) -> np.ndarray:
    if kind == "wide":
        return _bf16(_numbers(draw, shape, -255, 255), _numbers(draw, shape, -30, 30))
    x = _ordinary(draw, shape)
    if x.size and kind != "ordinary":
        row, column = (draw(st.integers(0, size - 1)) for size in shape)
        if kind == "outlier":
            x[row, column] = 2.0 ** draw(st.integers(6, 12))
        else:
            x[row] = 0
    return x


def _ordinary(draw: Draw, shape: tuple[int, ...]) -> np.ndarray:
    return _bf16(_numbers(draw, shape, -255, 255), _numbers(draw, shape, -8, -5))


def _bf16(significands: np.ndarray, exponents: Any) -> np.ndarray:
    """Whole numbers below 256 in magnitude times powers of two: bfloat16 values, exactly."""
    return np.asarray(np.ldexp(significands.astype(np.float64), exponents).astype(bfloat16))


def _numbers(draw: Draw, shape: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """Whole numbers from low to high, which shrink to the one nearest to zero."""
    span = high - low + 1
    drawn = words(draw, math.prod(shape), 1 if span <= 256 else 2) % span
    line = np.arange(low, high + 1)
    return np.asarray(line[np.argsort(np.abs(line) * 2 + (line < 0), kind="stable")][drawn].reshape(shape))


def _special(nan: bool, infinity: bool, subnormal: bool, negative_zero: bool) -> list[int]:
    """The codes to put in, the most ordinary first."""
    codes = [0x8000] if negative_zero else []
    if subnormal:
        codes += [0x0001, 0x8001, 0x0040, 0x8040, 0x007F, 0x807F]
    if infinity:
        codes += [0x7F80, 0xFF80]
    if nan:
        codes += [0x7FC0, 0x7FFF, 0xFFC0, 0x7F81]
    return codes


def _put_in(draw: Draw, special: list[int], *arrays: np.ndarray) -> None:
    """Up to three special elements an array, at drawn places."""
    for array in arrays:
        if special and array.size:
            drawn = words(draw, 3, 4)
            drawn = drawn[drawn >> 24 >= 192]  # three in four stay away
            codes = np.array(special, np.uint16)[(drawn & 0xFF) % len(special)]
            array.view(np.uint16).reshape(-1)[(drawn >> 8 & 0xFFFF) % array.size] = codes


def _size(draw: Draw, size: Size) -> int:
    return int(draw(size)) if isinstance(size, st.SearchStrategy) else size


def _check_kinds(kinds: Sequence[str], known: tuple[str, ...]) -> None:
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(known):
        raise ValueError(f"kinds is {kinds!r}; needed are some of {known}")
