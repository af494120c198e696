"""What every product has to be: exact on small integers in every order, indifferent to where rows and columns stand and to the
order of k within a block, homogeneous, and componentwise within the bound that the tensor core's truncation allows."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import cufuse
from cufuse import oracle, testing
from cufuse.emulation.tensor_core import TENSOR_CORES, matmul
from tests.totals import count, ratio
from tests.witnesses import from_codes, random_bf16

BF16 = cufuse.bfloat16
F32 = np.float32
CORES = [name for name, core in TENSOR_CORES.items() if "bfloat16" in core.dtypes]
CORE = st.sampled_from(CORES)
SLICES = st.sampled_from([1, 1, 2, 3, 5])
DEPTH = st.sampled_from([1, 3, 8, 15, 16, 17, 40, 64, 65, 130, 200])
FEW = st.sampled_from([1, 2, 3, 5])
INPUTS = testing.gemm_inputs(m=FEW, n=FEW, k=DEPTH, allow_subnormal=False)
AREA = "products: algebraic properties"


def product(inputs: dict[str, Any], core: str, slices: int, **changed: Any) -> np.ndarray:
    """The float32 accumulators."""
    given = inputs | changed
    return np.asarray(matmul(given["x"], given["weight"], core=core, k_slices=slices, threads=1, engine="numpy"))


def counted(y: np.ndarray) -> None:
    count(AREA, inputs=y.size, outputs=y.size)


@st.composite
def whole_numbers(draw: Any) -> dict[str, np.ndarray]:
    """Whole numbers whose products add up to less than 2**24, whatever is left out."""
    m, n, k = draw(FEW), draw(FEW), draw(DEPTH)
    most = int(min(256, math.sqrt((2**24 - 1) / k)))
    seed = draw(st.binary(min_size=2 * (m + n) * k, max_size=2 * (m + n) * k))
    numbers = np.frombuffer(seed, np.uint16).astype(np.int64) % (2 * most + 1) - most
    wide = {"x": numbers[: m * k].reshape(m, k), "weight": numbers[m * k :].reshape(n, k)}
    # of more than eight bits only the even are bfloat16
    return {name: np.where(np.abs(one) > 255, one // 2 * 2, one).astype(np.float64).astype(BF16) for name, one in wide.items()}


@given(whole_numbers(), CORE, SLICES, st.sampled_from(["torch", "float32"]))
def test_sums_of_whole_numbers_are_exact(inputs: dict[str, np.ndarray], core: str, slices: int, name: str) -> None:
    """In every order, on every core, in slices, with activations in parts: integer arithmetic is the witness."""
    exact = inputs["x"].astype(np.int64) @ inputs["weight"].astype(np.int64).T
    assert (np.abs(inputs["x"].astype(np.int64)) @ np.abs(inputs["weight"].astype(np.int64)).T < 2**24).all()
    unrounded = cufuse.recipes[name].derive("unrounded", gemm={"output": "float32", "core": core})
    x = inputs["x"].astype(F32) if name == "float32" else inputs["x"]
    found = cufuse.linear(x, inputs["weight"], recipe=unrounded, k_slices=slices)
    testing.assert_bits_equal(found, exact.astype(F32))
    rounded = cufuse.linear(inputs["x"], inputs["weight"], recipe=cufuse.recipes["torch"].on(core), k_slices=slices)
    testing.assert_correctly_rounded(rounded, exact.astype(np.float64))
    order = np.random.default_rng(exact.size).permutation(x.shape[1])
    testing.assert_bits_equal(cufuse.linear(x[:, order], inputs["weight"][:, order], recipe=unrounded, k_slices=slices), found)
    count("products of whole numbers: exact in every order", inputs=x.size + inputs["weight"].size, outputs=3 * found.size)


@given(INPUTS, CORE, SLICES, st.randoms(use_true_random=False))
def test_rows_and_columns_may_stand_anywhere(inputs: dict[str, Any], core: str, slices: int, random: Any) -> None:
    y = product(inputs, core, slices)
    rows, columns = (random.sample(range(size), size) for size in y.shape)
    moved = product(inputs, core, slices, x=inputs["x"][rows], weight=inputs["weight"][columns])
    testing.assert_bits_equal(moved, y[np.ix_(rows, columns)])
    alone = product(inputs, core, slices, x=inputs["x"][:1], weight=inputs["weight"][:1])
    testing.assert_bits_equal(alone, y[:1, :1])
    counted(y)


def within_blocks(k: int, terms: int, slices: int, random: Any) -> list[int]:
    """A permutation of k that moves nothing out of its block of so many terms; slices begin at multiples of 64."""
    order = []
    for first in range(0, k, terms):
        block = list(range(first, min(first + terms, k)))
        random.shuffle(block)
        order += block
    assert sorted(order) == list(range(k))
    return order


@given(INPUTS, CORE, SLICES, st.randoms(use_true_random=False))
def test_k_permuted_within_blocks(inputs: dict[str, Any], core: str, slices: int, random: Any) -> None:
    order = within_blocks(inputs["x"].shape[1], TENSOR_CORES[core].terms, slices, random)
    y = product(inputs, core, slices)
    moved = product(inputs, core, slices, x=inputs["x"][:, order], weight=inputs["weight"][:, order])
    testing.assert_bits_equal(moved, y)
    counted(y)


@pytest.mark.parametrize("core", CORES)
def test_k_permuted_across_blocks_may_change_the_result(core: str) -> None:
    """A large term and its negative in one block leave the small ones alone; in two blocks, the first cuts them off."""
    terms, fraction = TENSOR_CORES[core].terms, TENSOR_CORES[core].fraction_bits
    x = np.zeros((1, 2 * terms), BF16)
    x[0, 0], x[0, 1], x[0, terms] = 2.0**30, -(2.0**30), 2.0 ** (30 - fraction - 1)
    order = [terms, *range(1, terms), 0, *range(terms + 1, 2 * terms)]
    ones = np.ones_like(x)
    together, apart = (matmul(one, ones, core=core, engine="numpy")[0, 0] for one in (x, x[:, order]))
    assert together == float(x[0, terms])
    assert apart != together


@given(INPUTS, CORE, SLICES, st.integers(-20, 20))
def test_homogeneous_and_odd(inputs: dict[str, Any], core: str, slices: int, power: int) -> None:
    y = product(inputs, core, slices)
    scaled = product(inputs, core, slices, x=np.ldexp(inputs["x"].astype(np.float64), power).astype(BF16))
    testing.assert_bits_equal(scaled, np.ldexp(y, power))
    negative = product(inputs, core, slices, weight=-inputs["weight"])
    # truncation toward zero is the same on both sides; a zero sum is +0 on both
    testing.assert_bits_equal(negative, np.where(y == 0, F32(0), -y))
    counted(y)


@given(INPUTS, CORE, st.integers(1, 70))
def test_zeros_behind_change_nothing(inputs: dict[str, Any], core: str, more: int) -> None:
    padded = {name: np.pad(one.view(np.uint16), ((0, 0), (0, more))).view(BF16) for name, one in inputs.items()}
    y = product(inputs, core, 1)
    testing.assert_bits_equal(product(padded, core, 1), y)
    counted(y)


def described(core: str) -> str:
    return f"blocks of {TENSOR_CORES[core].terms} (F = {TENSOR_CORES[core].fraction_bits})"


def bound_in_sums_of_magnitudes(core: str, k: int, slices: int, parts: int) -> float:
    """How far an accumulator may be from the exact sum, in units of the sum of the products' magnitudes A.

    One block adds L products to c. With e the largest exponent among them, terms are cut to multiples of 2**(e - F), the largest
    one not at all (a product has 16 significant bits, c has 24, and F is 24 or 25): at most L terms lose less than 2**(e - F)
    each, and 2**e is at most the largest term's magnitude (normal operands), hence at most A. The sum is cut to 24 bits: less than
    2**-23 of it. All cuts are toward zero, so no partial sum exceeds A. Over B blocks: B (L 2**-F + 2**-23) A. Adding S slices
    rounds S - 1 times to nearest: (S - 1) 2**-24 A, generously doubled for the second order.
    """
    tensor_core = TENSOR_CORES[core]
    # slices begin at multiples of 64, and a block of zeros behind the last column cuts nothing: c has no more bits than F keeps
    blocks = parts * math.ceil(k / tensor_core.terms)
    return blocks * (tensor_core.terms * 2.0**-tensor_core.fraction_bits + 2.0**-23) + (slices - 1) * 2.0**-23


def all_but_cut_off(code: int, k: int) -> dict[str, np.ndarray]:
    """One, and terms of which a core keeps hardly half."""
    return {"x": from_codes([[0x3F80] + [code] * (k - 1)]), "weight": from_codes([[0x3F80] * k])}


@given(INPUTS, CORE, SLICES)
@example(all_but_cut_off(0x337F, 16), "sm_90", 1)
@example(all_but_cut_off(0x337F, 160), "sm_90", 1)
@example(all_but_cut_off(0x33FF, 8), "sm_80", 1)
@example(all_but_cut_off(0x33FF, 160), "sm_80", 1)
def test_componentwise_bound(inputs: dict[str, Any], core: str, slices: int) -> None:
    """Never exceeded; the largest share of it is printed. math.fsum is the witness."""
    k = inputs["x"].shape[1]
    used = len(range(0, k, math.ceil(math.ceil(k / 64) / slices) * 64))
    found = product(inputs, core, slices).astype(np.float64)
    exact = oracle.linear(**inputs, exact=True)
    magnitudes = oracle.linear(np.abs(inputs["x"].astype(np.float64)), np.abs(inputs["weight"].astype(np.float64)))
    # the alignment's floor and the smallest float32 are absolute
    floor = 2.0**-140 * k
    kind = "one block" if k <= TENSOR_CORES[core].terms else "several blocks"
    shares = np.abs(found - exact) / (bound_in_sums_of_magnitudes(core, k, used, 1) * magnitudes * (1 + 2.0**-40) + floor)
    assert (shares <= 1).all()
    ratio(f"products, {described(core)}, {kind}", float(shares.max(initial=0)))
    count("products against exact sums", inputs=found.size, outputs=found.size)


@given(INPUTS, CORE)
def test_componentwise_bound_of_float32_activations(inputs: dict[str, Any], core: str) -> None:
    """Activations of 24 bits in three parts: three times as many blocks, and nothing lost by the division."""
    x = inputs["x"].astype(F32) * F32(1 + 2.0**-12 + 2.0**-23)
    k = x.shape[1]
    recipe = cufuse.recipes["float32"].on(core)
    found = cufuse.linear(x, inputs["weight"], recipe=recipe, k_slices=1).astype(np.float64)
    exact = oracle.linear(x, inputs["weight"], exact=True)
    # the parts' magnitudes together are at most (1 + 2**-7) times the activation's
    magnitudes = oracle.linear(np.abs(x.astype(np.float64)), np.abs(inputs["weight"].astype(np.float64))) * (1 + 2.0**-7)
    shares = np.abs(found - exact) / (bound_in_sums_of_magnitudes(core, k, 1, 3) * magnitudes + 2.0**-100)
    assert (shares <= 1).all()
    ratio(f"products, {described(core)}, float32 activations", float(shares.max(initial=0)))
    count("products against exact sums", inputs=found.size, outputs=found.size)


def test_the_bound_is_below_what_rounding_to_bfloat16_does() -> None:
    """An accumulator kept in bfloat16 breaks it, and so do terms cut one bit earlier than the core cuts them."""
    earlier = dataclasses.replace(TENSOR_CORES["sm_90"], fraction_bits=TENSOR_CORES["sm_90"].fraction_bits - 1)
    worst = all_but_cut_off(0x337F, 160)
    error = oracle.linear(**worst, exact=True) - matmul(worst["x"], worst["weight"], core=earlier)
    assert error[0, 0] > bound_in_sums_of_magnitudes("sm_90", 160, 1, 1) * (1 + 2.0**-10)
    x, weight = random_bf16(1, 4, 64), random_bf16(2, 5, 64)
    exact = oracle.linear(x, weight, exact=True)
    magnitudes = oracle.linear(np.abs(x.astype(np.float64)), np.abs(weight.astype(np.float64)))
    bound = bound_in_sums_of_magnitudes("sm_90", 64, 1, 1) * magnitudes
    assert (np.abs(oracle.rounded(exact).astype(np.float64) - exact) > bound).any()
