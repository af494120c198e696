"""What every norm has to be, whatever its recipe: homogeneous in powers of two, odd, blind to other rows, right at zero, and
within a derived distance of the real value."""

import dataclasses
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import cufuse
from cufuse import norm, oracle, testing
from cufuse.recipe import Norm
from tests.totals import count, ratio
from tests.witnesses import bits, from_codes

BF16 = cufuse.bfloat16
# every named norm, and every order of summation that no named one takes
RECIPES = [
    *cufuse.recipes.values(),
    *(
        cufuse.recipes["torch"].derive(f"torch, {order}", norm={"sum_order": order, "mean": "divide"})
        for order in ("torch-mean-2.9", "llama.cpp-cpu", "sequential", "vllm-add")
    ),
]
RECIPE = st.sampled_from(RECIPES)
# rows that PyTorch's orders tell apart, and columns on both sides of its vectors of four and its 128 threads
ROWS = st.sampled_from([1, 2, 3, 5, 8, 17])
COLUMNS = st.sampled_from([1, 2, 3, 7, 16, 33, 64, 127, 128, 130, 260])
INPUTS = testing.rms_norm_inputs(rows=ROWS, columns=COLUMNS, kinds=["ordinary", "outlier", "zero row"], allow_subnormal=False)
AREA = "norms: algebraic properties"


def normalised(inputs: dict[str, Any], recipe: cufuse.Recipe, **changed: Any) -> np.ndarray:
    return np.asarray(cufuse.rms_norm(**(inputs | changed), recipe=recipe))


def counted(y: np.ndarray) -> None:
    count(AREA, inputs=y.size, outputs=y.size)


def order_knows_rows_by_place(recipe: cufuse.Recipe, columns: int) -> bool:
    """ATen reads aligned vectors of four: where rows begin elsewhere, a row's place decides its order."""
    return recipe.norm.sum_order.startswith("torch-mean") and columns % 4 != 0


@given(INPUTS, RECIPE, st.integers(-20, 20))
def test_scaling_by_a_power_of_two(inputs: dict[str, Any], recipe: cufuse.Recipe, power: int) -> None:
    """x times 2**p with eps times 4**p: the statistic scales, the factor scales back, no bit of the result changes.

    (rsqrt.approx repeats itself every second binade; nothing under- or overflows here.)
    """
    scaled = np.ldexp(inputs["x"].astype(np.float64), power).astype(BF16)
    y = normalised(inputs, recipe)
    testing.assert_bits_equal(normalised(inputs, recipe, x=scaled, eps=math.ldexp(inputs["eps"], 2 * power)), y)
    heavier = np.ldexp(inputs["weight"].astype(np.float64), 4).astype(BF16)
    if recipe.norm.weight_offset == 0:
        expected = np.ldexp(y.astype(np.float64), 4).astype(y.dtype)
        testing.assert_bits_equal(normalised(inputs, recipe, weight=heavier), expected)
    counted(y)


@given(INPUTS, RECIPE)
def test_odd(inputs: dict[str, Any], recipe: cufuse.Recipe) -> None:
    y = normalised(inputs, recipe)
    sign = np.uint32(1) << np.uint32(8 * y.itemsize - 1)
    testing.assert_bits_equal(bits(normalised(inputs, recipe, x=-inputs["x"])), bits(y) ^ sign.astype(bits(y).dtype))
    counted(y)


@given(INPUTS, RECIPE, st.randoms(use_true_random=False))
def test_permuting_rows(inputs: dict[str, Any], recipe: cufuse.Recipe, random: Any) -> None:
    x = inputs["x"]
    order = list(range(len(x)))
    random.shuffle(order)
    if order_knows_rows_by_place(recipe, x.shape[1]):
        return
    y = normalised(inputs, recipe)
    testing.assert_bits_equal(normalised(inputs, recipe, x=x[order]), y[order])
    # and what the other rows hold does not matter
    others = x.copy()
    others[1:] *= BF16(2.5)
    testing.assert_bits_equal(normalised(inputs, recipe, x=others)[:1], y[:1])
    counted(y)


@given(INPUTS, st.sampled_from([recipe for recipe in RECIPES if recipe.norm.sum_order != "torch-mean"]), st.integers(1, 9))
def test_rows_that_are_added_at_the_end(inputs: dict[str, Any], recipe: cufuse.Recipe, more: int) -> None:
    """Where the order does not depend on their number, further rows change nothing."""
    if recipe.norm.sum_order == "torch-mean-2.9":
        return
    x = inputs["x"]
    y = normalised(inputs, recipe)
    testing.assert_bits_equal(normalised(inputs, recipe, x=np.resize(x, (len(x) + more, x.shape[1])))[: len(x)], y)
    counted(y)


@given(INPUTS, RECIPE)
@example({"x": from_codes([[0x0000, 0x8000]]), "weight": from_codes([0xC000, 0xC000]), "eps": 1e-6}, cufuse.recipes["torch"])
@example({"x": from_codes([[0x0000]]), "weight": from_codes([0x8000]), "eps": 1e-6}, cufuse.recipes["torch"])
def test_zero_rows(inputs: dict[str, Any], recipe: cufuse.Recipe) -> None:
    """Zero for eps > 0, with the sign of x times the weight; NaN for eps = 0."""
    x = np.where(np.arange(len(inputs["x"]))[:, None] % 2 == 0, inputs["x"] * BF16(0), inputs["x"])
    y = normalised(inputs, recipe, x=x)
    assert (y[::2].astype(np.float32) == 0).all()
    weight = inputs["weight"].astype(np.float32)
    if recipe.norm.weight_offset != 0:  # +0 would take the sign of a -0
        weight = weight + np.float32(recipe.norm.weight_offset)
    testing.assert_bits_equal(np.signbit(y[::2]), np.signbit(x[::2]) ^ np.signbit(weight))
    assert np.isnan(normalised(inputs, recipe, x=x, eps=0.0)[::2].astype(np.float32)).all()
    counted(y)


def relative_bound(numerics: Norm, columns: int) -> float:
    """How far a norm may be from the real value, relative to it, where nothing under- or overflows.

    With u = 2**-24 for float32 and b = 2**-8 for bfloat16, each the largest relative error of one rounding to nearest:

    - squares of bfloat16 are exact; however the K of them are added, the sum is off by less than a factor (1 + u)**K, and so is
      ``variance + mean**2`` of K values with some operations more: 4 K in all is generous for Welford's steps, 2 divisions and
      2 products a value (all terms are positive after the first subtraction, whose error is relative to the value itself);
    - the mean: at most three more (rows times columns, the quotient, the product), eps and its addition two;
    - the root halves that; rsqrt.approx is within 2.5 units of the last place, each at most 2**-23;
    - x r, the weight's offset and the product with it: three;
    - one b for each rounding to bfloat16.
    """
    u, b = 2.0**-24, 2.0**-8
    operations = (4 * columns if columns % 4 and numerics.sum_order == "torch-rms-norm" else columns) + 5
    statistic = math.expm1(operations * math.log1p(u))
    root = 1 / math.sqrt(1 - statistic)
    roundings = numerics.round_normalised + numerics.round_weighted
    return root * (1 + 5 * u) * (1 + u) ** 3 * (1 + b) ** roundings - 1 + columns * 2.0**-53


@given(testing.rms_norm_inputs(rows=ROWS, columns=COLUMNS, allow_subnormal=False), RECIPE)
def test_within_the_derived_bound(inputs: dict[str, Any], recipe: cufuse.Recipe) -> None:
    offset = recipe.norm.weight_offset
    y = normalised(inputs, recipe).astype(np.float64)
    truth = oracle.rms_norm(**inputs, weight_offset=offset)
    # below the normal range a rounding is off by half of bfloat16's smallest step, here times the weight, and once more
    floor = 2.0**-134 * (np.abs(inputs["weight"].astype(np.float64) + offset) * 2 + 1)
    bound = relative_bound(recipe.norm, inputs["x"].shape[1]) * np.abs(truth) + floor
    shares = np.abs(y - truth) / bound
    assert (shares <= 1).all()
    worst = float(shares.max(initial=0))
    ratio(f"norms, {recipe.norm.round_normalised + recipe.norm.round_weighted} roundings", worst)
    count("norms against the float64 oracle", inputs=y.size, outputs=y.size)


@pytest.mark.parametrize("name", cufuse.recipes)
def test_the_bound_notices_a_rounding_too_many(name: str) -> None:
    """With one more rounding of r to bfloat16 the bound of the recipe is broken."""
    recipe = cufuse.recipes[name]
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((64, 256))).astype(BF16)
    weight = rng.uniform(0.5, 2, 256).astype(BF16)
    r = cufuse.round_to_bf16(norm.reciprocal_rms(x.astype(np.float32), 1e-6, recipe.norm)).astype(np.float32)
    no_norm = dataclasses.replace(recipe.norm, round_normalised=False, round_weighted=False)
    h = x.astype(np.float32) * r[:, None]
    if recipe.norm.round_normalised:
        h = cufuse.round_to_bf16(h).astype(np.float32)
    y = h * (weight.astype(np.float32) + np.float32(no_norm.weight_offset))
    y = (cufuse.round_to_bf16(y) if recipe.norm.round_weighted else y).astype(np.float64)
    truth = oracle.rms_norm(x, weight, weight_offset=recipe.norm.weight_offset)
    assert (np.abs(y - truth) > relative_bound(recipe.norm, 256) * np.abs(truth)).any()


def test_powers_of_two_beyond_the_float32_squares() -> None:
    """Where the squares leave float32 the homogeneity ends: the statistic is infinite, the rows are zero."""
    x = np.full((1, 8), 2.0**70, BF16)
    y = cufuse.rms_norm(x, np.ones(8, BF16))
    assert (y.astype(np.float32) == 0).all()
    assert oracle.rms_norm(x, np.ones(8, BF16))[0, 0] == 1
    assert Fraction(float(x[0, 0])) ** 2 > Fraction(float(np.finfo(np.float32).max))
