"""The tensor core's steps and products: `reference_block`, in Python integers, is the witness; bits are compared."""

import importlib.util

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cufuse.emulation.tensor_core import TENSOR_CORES, block, matmul, reference_block, split_float32

bfloat16 = np.dtype(ml_dtypes.bfloat16)
float16 = np.dtype(np.float16)
NO_NUMBA = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="Numba is not installed")
ENGINES = ["numpy", pytest.param("numba", marks=NO_NUMBA)]
COMBINATIONS = [(core.name, dtype) for core in TENSOR_CORES.values() for dtype in core.dtypes]
KINDS = ["normal", "wide", "bits", "subnormal", "huge", "cancelling", "special"]


def operand(rng, kind, shape, dtype):
    """Random elements of one kind."""
    dtype = np.dtype(dtype)
    bf16 = dtype == bfloat16
    ordinary = rng.standard_normal(shape).astype(np.float32)
    if kind == "wide":
        reach = 60 if bf16 else 12
        ordinary = np.ldexp(ordinary, rng.integers(-reach, reach + 1, shape))
    elif kind == "bits":
        return rng.integers(0, 1 << 16, shape).astype(np.uint16).view(dtype)
    elif kind == "subnormal":  # products from the smallest to far above the smallest float32
        codes = rng.integers(0, 70 << 7 if bf16 else 4 << 10, shape) | rng.integers(0, 2, shape) << 15
        return np.where(rng.random(shape) < 0.2, 0, codes).astype(np.uint16).view(dtype)
    elif kind == "huge":
        reach = 64 if bf16 else 15
        ordinary = np.ldexp(np.clip(ordinary, -1.9, 1.9), rng.integers(reach - 5, reach, shape))
    elif kind == "cancelling":  # small integers of both signs and many zeros: sums that are exactly zero
        ordinary = rng.integers(-2, 3, shape).astype(np.float32) * np.where(rng.random(shape) < 0.5, -0.0, 1.0)
    elif kind == "special":
        for value, share in ((0.0, 0.1), (-0.0, 0.1), (np.inf, 0.01), (-np.inf, 0.01), (np.nan, 0.003)):
            ordinary[rng.random(shape) < share] = value
    return ordinary.astype(dtype)


def accumulator(rng, kind, shape):
    if kind == "bits":
        return rng.integers(0, 1 << 32, shape, dtype=np.uint64).astype(np.uint32).view(np.float32)
    if kind == "subnormal":
        codes = rng.integers(0, 1 << 26, shape) | rng.integers(0, 2, shape) << 31
        return np.where(rng.random(shape) < 0.5, 0, codes).astype(np.uint32).view(np.float32)
    return operand(rng, "huge" if kind == "huge" else "cancelling" if kind == "cancelling" else "normal", shape, "f4")


def assert_same_bits(actual, expected):
    assert actual.dtype == np.float32
    actual, expected = np.atleast_1d(actual).view(np.uint32), np.atleast_1d(expected).view(np.uint32)
    assert actual.shape == expected.shape
    differing = np.argwhere(actual != expected)
    if differing.size:
        at = tuple(differing[0])
        pytest.fail(f"{len(differing)} of {actual.size} differ, first at {at}: {actual[at]:#x}, not {expected[at]:#x}")


def stepped(parts, b, core, *, k_slices=1, step=block):
    """The product from the definition of matmul: padded to 16, cut into slices, every step by `step`."""
    core = TENSOR_CORES[core]
    depth = b.shape[1]
    pad = ((0, 0), (0, -depth % 16))
    parts = [np.pad(part.view(np.uint16), pad).view(b.dtype) for part in parts]
    b = np.pad(b.view(np.uint16), pad).view(b.dtype)
    length = int(np.ceil(np.ceil(depth / 64) / k_slices)) * 64
    total = None
    for first in range(0, depth, length):
        c = np.zeros((parts[0].shape[0], b.shape[0]), np.float32)
        for group in range(first, min(first + length, b.shape[1]), 16):
            for part in parts:
                for k in range(group, group + 16, core.terms):
                    c = step(part[:, None, k : k + core.terms], b[None, :, k : k + core.terms], c, core=core)
        with np.errstate(invalid="ignore", over="ignore"):
            total = c if total is None else total + c
    total[np.isnan(total)] = np.uint32(0x7FFFFFFF).view(np.float32)
    return total


def integer_step(a, b, c, *, core):
    """`block` by `reference_block`, output by output."""
    shape = np.broadcast_shapes(a.shape[:-1], b.shape[:-1], c.shape)
    a, b = (np.broadcast_to(x.view(np.uint16), (*shape, core.terms)) for x in (a, b))
    codes = np.broadcast_to(c.view(np.uint32), shape)
    out = np.empty(shape, np.uint32)
    dtype = "float16" if core.dtypes == ("float16",) else "bfloat16"
    for at in np.ndindex(shape):
        out[at] = reference_block(a[at].tolist(), b[at].tolist(), int(codes[at]), core=core, dtype=dtype)
    return out.view(np.float32)


def float32_code(x):
    return int(np.float32(x).view(np.uint32))


def codes(values, dtype=bfloat16):
    return np.asarray(values, np.float32).astype(dtype).view(np.uint16).tolist()


# The reference itself: cases worked out by hand.


@pytest.mark.parametrize(
    ("core", "products", "c", "expected"),
    [
        ("sm_90", [], -0.0, 0.0),
        ("sm_90", [(-1, 0.0)], -0.0, 0.0),
        ("sm_90", [(1, 1), (-1, 1)], 0.0, 0.0),
        # F = 25: with a term of exponent 0, 2**-25 survives in the sum and 2**-26 does not
        ("sm_90", [(1, 1), (-1, 1), (2.0**-25, 1)], 0.0, 2.0**-25),
        ("sm_90", [(1, 1), (-1, 1), (2.0**-26, 1), (2.0**-26, 1)], 0.0, 0.0),
        ("sm_80", [(1, 1), (-1, 1), (2.0**-24, 1)], 0.0, 2.0**-24),
        ("sm_80", [(1, 1), (-1, 1), (2.0**-25, 1)], 0.0, 0.0),
        # four terms of 2**-25 make one unit in the last place of 2.0; three are lost by the final truncation
        ("sm_90", [(2.0**-25, 1)] * 4 + [(1, 1)], 0.0, 1 + 2.0**-23),
        ("sm_90", [(2.0**-25, 1)] * 3 + [(1, 1)], 0.0, 1.0),
        # toward zero, not down
        ("sm_90", [(-(2.0**-25), 1)] * 3 + [(-1, 1)], 0.0, -1.0),
        # the product's exponent is not renormalised: 1.5 * 1.5 = 2.25 has exponent 0, so 2**-25 survives beside it
        ("sm_90", [(1.5, 1.5), (-1.5, 1.5), (2.0**-25, 1)], 0.0, 2.0**-25),
        # but 2.25 as 1.125 * 2 has exponent 1
        ("sm_90", [(1.125, 2), (-1.125, 2), (2.0**-25, 1)], 0.0, 0.0),
        # the accumulator counts for the largest exponent and is truncated itself
        ("sm_90", [(4, 1), (-4, 1)], 1 + 2.0**-23, 1 + 2.0**-23),
        ("sm_90", [(8, 1), (-8, 1)], 1 + 2.0**-23, 1.0),
        ("sm_90", [(2.0**-26, 1)], 1.0, 1.0),
        # a zero product does not raise the largest exponent
        ("sm_90", [(2.0**100, 0.0), (2.0**-60, 1)], 0.0, 2.0**-60),
        # beyond float32 and back
        ("sm_90", [(2.0**100, 2.0**100), (-(2.0**100), 2.0**100)], 1.0, 0.0),
        ("sm_90", [(2.0**64, 2.0**64)], 0.0, np.inf),
        ("sm_90", [(-(2.0**127), 1), (-(2.0**127), 1)], 0.0, -np.inf),
        ("sm_90", [(2.0**102, 1.9921875)], np.finfo(np.float32).max, np.finfo(np.float32).max),
        ("sm_90", [(2.0**104, 1)], np.finfo(np.float32).max, np.inf),
        # results below the normal numbers are truncated to a multiple of 2**-149
        ("sm_90", [(2.0**-75, 2.0**-74)], 0.0, 2.0**-149),
        ("sm_90", [(2.0**-75, 1.9921875 * 2.0**-75)], 0.0, 0.0),
        ("sm_90", [(1.5 * 2.0**-75, 1.5 * 2.0**-74)], 0.0, 2.0**-148),
        # a subnormal operand counts with the exponent -126: 2**-133 * 2**20 has -106, and 2**-131 survives beside it
        ("sm_90", [(2.0**-133, 2.0**20)], 0.0, 2.0**-113),
        ("sm_90", [(2.0**-133, 2.0**20), (-(2.0**-133), 2.0**20), (2.0**-100, 2.0**-31)], 0.0, 2.0**-131),
        ("sm_90", [(2.0**-133, 2.0**20), (-(2.0**-133), 2.0**20), (2.0**-100, 2.0**-32)], 0.0, 0.0),
        ("sm_90", [(np.inf, 1), (1, 1)], -3.0, np.inf),
        ("sm_90", [(1, 1)], -np.inf, -np.inf),
    ],
)
def test_reference_by_hand(core, products, c, expected):
    terms = TENSOR_CORES[core].terms
    a, b = zip(*(products + [(0.0, 0.0)] * (terms - len(products))), strict=True)
    result = reference_block(codes(a), codes(b), float32_code(c), core=core)
    assert result == float32_code(expected)
    stepped_once = block(
        np.array(codes(a), np.uint16).view(bfloat16),
        np.array(codes(b), np.uint16).view(bfloat16),
        np.float32(c),
        core=core,
    )
    assert_same_bits(stepped_once, np.float32(expected))


KEPT_AND_LOST = {-156: ((127, 1), (17, 15)), -158: ((73, 7), (33, 31))}


@pytest.mark.parametrize(
    ("core", "unit"),
    [("sm_80", -156), ("sm_86", -156), ("sm_89", -156), ("sm_90", -158), ("sm_100", -158), ("sm_120", -158)],
)
def test_floor_is_seen(core, unit):
    # Near the smallest float32 the floor alone decides what survives: multiples of 2**(-132 - 24) or 2**(-133 - 25).
    # A product of one such unit completes a sum to 2**-149, one of half a unit is lost, and the whole sum with it
    for place, (x, y) in zip((unit, unit - 1), KEPT_AND_LOST[unit], strict=True):
        assert x * y * 2.0**place + 2.0**place == 2.0**-149
        a = codes([x * 2.0**-80, 2.0**-80] + [0] * 14)[: TENSOR_CORES[core].terms]
        b = codes([y * 2.0 ** (place + 80), 2.0 ** (place + 80)] + [0] * 14)[: TENSOR_CORES[core].terms]
        expected = 1 if place == unit else 0
        assert reference_block(a, b, 0, core=core) == expected
        operands = (np.array(values, np.uint16).view(bfloat16)[None] for values in (a, b))
        assert matmul(*operands, core=core, engine="numpy").view(np.uint32) == expected


@pytest.mark.parametrize("special", [np.nan, -np.nan])
def test_nan_has_one_code(special):
    ones = codes([1.0] * 16)
    assert reference_block(codes([special] + [1.0] * 15), ones, 0, core="sm_90") == 0x7FFFFFFF
    assert reference_block(ones, ones, float32_code(special), core="sm_90") == 0x7FFFFFFF
    assert reference_block(codes([np.inf] + [1.0] * 15), codes([0.0] + [1.0] * 15), 0, core="sm_90") == 0x7FFFFFFF
    assert reference_block(codes([np.inf] + [1.0] * 15), ones, float32_code(-np.inf), core="sm_90") == 0x7FFFFFFF


# The array form against the reference.


@pytest.mark.parametrize(("core", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_block_is_the_reference(core, dtype, kind):
    rng = np.random.default_rng(KINDS.index(kind))
    terms = TENSOR_CORES[core].terms
    a, b = operand(rng, kind, (64, terms), dtype), operand(rng, kind, (64, terms), dtype)
    c = accumulator(rng, kind, 64)
    expected = [
        reference_block(x, y, z, core=core, dtype=dtype)
        for x, y, z in zip(
            a.view(np.uint16).tolist(), b.view(np.uint16).tolist(), c.view(np.uint32).tolist(), strict=True
        )
    ]
    assert_same_bits(block(a, b, c, core=core), np.array(expected, np.uint32).view(np.float32))


@st.composite
def step_bits(draw):
    """Codes of one step that crowd around one exponent, with any code mixed in."""
    terms = 16
    centre = draw(st.integers(0, 255))
    spread = draw(st.sampled_from([1, 4, 30, 255]))
    near = st.integers(max(0, centre - spread) << 7, min(255, centre + spread) << 7 | 0x7F)
    sign = st.sampled_from([0, 0x8000])
    element = st.one_of(st.builds(int.__or__, near, sign), st.sampled_from([0, 0x8000, 0x3F80, 0xBF80, 0x7F80, 0xFF80]))
    a, b = (draw(st.lists(element, min_size=terms, max_size=terms)) for _ in range(2))
    return a, b, draw(st.integers(0, 2**32 - 1))


@given(step_bits(), st.sampled_from(["sm_80", "sm_90"]))
@settings(max_examples=200, deadline=None)
def test_block_is_the_reference_for_any_bits(bits, core):
    a, b, c = bits
    terms = TENSOR_CORES[core].terms
    a, b = a[:terms], b[:terms]
    actual = block(
        np.array(a, np.uint16).view(bfloat16),
        np.array(b, np.uint16).view(bfloat16),
        np.uint32(c).view(np.float32),
        core=core,
    )
    expected = np.uint32(reference_block(a, b, c, core=core)).view(np.float32)
    assert_same_bits(actual, expected)


def test_block_broadcasts():
    rng = np.random.default_rng(3)
    a, b = operand(rng, "normal", (5, 1, 16), bfloat16), operand(rng, "normal", (1, 7, 16), bfloat16)
    result = block(a, b, np.float32(0), core="sm_90")
    assert result.shape == (5, 7)
    assert_same_bits(result[3, 4], block(a[3, 0], b[0, 4], np.float32(0), core="sm_90"))


# Whole products: every engine against steps of `block`, and against the reference.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 3, 17])
@pytest.mark.parametrize("n", [1, 8])
@pytest.mark.parametrize("k", [1, 7, 16, 1000])
def test_matmul_is_its_steps(engine, kind, m, n, k):
    rng = np.random.default_rng(m * n * k)
    a, b = operand(rng, kind, (m, k), bfloat16), operand(rng, kind, (n, k), bfloat16)
    assert_same_bits(matmul(a, b, engine=engine), stepped([a], b, "sm_90"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("core", "dtype"), COMBINATIONS)
def test_matmul_on_every_core(engine, core, dtype):
    rng = np.random.default_rng(11)
    for kind in KINDS:
        a, b = operand(rng, kind, (4, 70), dtype), operand(rng, kind, (33, 70), dtype)
        assert_same_bits(matmul(a, b, core=core, engine=engine), stepped([a], b, core))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("core", "dtype"), [("sm_90", bfloat16), ("sm_80", bfloat16), ("sm_70", float16)])
@pytest.mark.parametrize("kind", ["normal", "wide", "cancelling", "bits"])
def test_matmul_is_the_reference(engine, core, dtype, kind):
    rng = np.random.default_rng(5)
    a, b = operand(rng, kind, (3, 40), dtype), operand(rng, kind, (9, 40), dtype)
    assert_same_bits(matmul(a, b, core=core, engine=engine), stepped([a], b, core, step=integer_step))


@pytest.mark.parametrize("engine", ENGINES)
def test_matmul_across_tiles(engine):
    rng = np.random.default_rng(8)
    a, b = operand(rng, "normal", (261, 150), bfloat16), operand(rng, "normal", (1100, 150), bfloat16)
    a[7, 3], a[260, 149], b[1030, 60] = np.inf, 2.0**120, np.nan  # some outputs of some tiles take the general step
    b[5], a[100] = 0, 0
    result = matmul(a, b, engine=engine)
    rows, columns = [0, 7, 100, 255, 256, 260], [*range(0, 1100, 97), 5, 1030, 1099]
    assert_same_bits(result[np.ix_(rows, columns)], stepped([a[rows]], b[columns], "sm_90"))
    assert_same_bits(result, matmul(a, b, engine="numpy", threads=1))


@pytest.mark.parametrize("engine", ENGINES)
def test_products_that_float32_cannot_hold(engine):
    # beside terms of 2**e_max, products below the smallest float32 vanish; without them they are what counts
    rng = np.random.default_rng(9)
    a = np.ldexp(rng.standard_normal((6, 64)), rng.integers(-75, -40, (6, 64))).astype(bfloat16)
    b = np.ldexp(rng.standard_normal((40, 64)), rng.integers(-75, -40, (40, 64))).astype(bfloat16)
    a[::2, ::16] = 1.0
    b[::2, ::16] = 1.0
    assert_same_bits(matmul(a, b, engine=engine), stepped([a], b, "sm_90"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("core", ["sm_90", "sm_80"])
@pytest.mark.parametrize("k_slices", [1, 3])
def test_parts(engine, core, k_slices):
    rng = np.random.default_rng(12)
    x = rng.standard_normal((5, 200)).astype(np.float32)
    b = operand(rng, "normal", (30, 200), bfloat16)
    parts = split_float32(x)
    result = matmul(parts, b, core=core, engine=engine, k_slices=k_slices)
    assert_same_bits(result, stepped(parts, b, core, k_slices=k_slices))
    assert_same_bits(matmul((parts[0],), b, engine=engine), matmul(parts[0], b, engine=engine))
    exact = x.astype(np.float64) @ b.astype(np.float64).T
    one = matmul(parts[0], b, core=core, engine=engine)
    assert np.abs(result - exact).max() < np.abs(one - exact).max() / 100


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("k", [64, 65, 320, 1000])
@pytest.mark.parametrize("k_slices", [1, 2, 3, 4, 6, 1000])
def test_slices(engine, k, k_slices):
    rng = np.random.default_rng(k)
    a, b = operand(rng, "normal", (3, k), bfloat16), operand(rng, "normal", (20, k), bfloat16)
    a[2, 0], a[2, -1], b[19, 0], b[19, -1] = np.inf, -np.inf, 1, 1
    assert_same_bits(matmul(a, b, k_slices=k_slices, engine=engine), stepped([a], b, "sm_90", k_slices=k_slices))


@pytest.mark.parametrize("k", [320, 273])
@pytest.mark.parametrize(
    ("k_slices", "starts"),
    [(1, []), (2, [192]), (3, [128, 256]), (4, [128, 256]), (5, [64, 128, 192, 256]), (99, [64, 128, 192, 256])],
)
def test_where_slices_start(k, k_slices, starts):
    # five blocks of 64, the last one partial for k = 273. A 1 just before j is lost to the 2**30 at j, which cancels
    # later, unless a slice starts at j
    for j in range(64, 320, 64):
        a = np.zeros((1, k), bfloat16)
        a[0, j - 1] = 1.0
        a[0, [j, j + 16]] = 2.0**30, -(2.0**30)
        assert matmul(a, np.ones((1, k), bfloat16), k_slices=k_slices)[0, 0] == (j in starts)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [bfloat16, float16])
def test_strided_operands(engine, dtype):
    rng = np.random.default_rng(2)
    a, b = operand(rng, "normal", (9, 130), dtype), operand(rng, "normal", (40, 130), dtype)
    expected = matmul(a, b, engine="numpy")
    wide = np.zeros((27, 260), dtype)
    wide[::3, ::2] = a
    assert_same_bits(matmul(wide[::3, ::2], np.asfortranarray(b), engine=engine), expected)
    assert_same_bits(matmul(a[::-1], b[:, ::-1][:, ::-1], engine=engine), expected[::-1])


@pytest.mark.parametrize("engine", ENGINES)
def test_order_within_a_step_does_not_matter_and_across_steps_does(engine):
    rng = np.random.default_rng(6)
    a, b = operand(rng, "normal", (16, 256), bfloat16), operand(rng, "normal", (64, 256), bfloat16)
    within = np.arange(256).reshape(16, 16)[:, rng.permutation(16)].ravel()
    across = np.arange(256).reshape(16, 16).T.ravel()
    expected = matmul(a, b, engine=engine)
    assert_same_bits(matmul(a[:, within], b[:, within], engine=engine), expected)
    assert (matmul(a[:, across], b[:, across], engine=engine) != expected).any()
    assert (matmul(a[:, within], b[:, within], engine=engine, core="sm_80") != expected).any()
