"""Strategies of cufuse.testing: what they draw and leave out, on both libraries, that examples shrink, and that ordinary health
checks pass."""

import math
import types
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import NoSuchExample
from hypothesis.extra import numpy as hnp

import cufuse
from cufuse import testing
from cufuse.testing import _codes, _recipes
from tests.witnesses import bf16_neighbours, bits

BF16 = cufuse.bfloat16
QUICK = settings(max_examples=200, database=None)
with np.errstate(invalid="ignore"):
    VALUES = np.arange(65536, dtype=np.uint16).view(BF16).astype(np.float64)
FULL = settings(max_examples=2000, database=None, derandomize=True, phases=[Phase.generate, Phase.shrink])


def drawn_kinds(codes: set[int]) -> dict[str, bool]:
    magnitudes = {code & 0x7FFF for code in codes}
    return {
        "nan": any(one > 0x7F80 for one in magnitudes),
        "infinity": 0x7F80 in magnitudes,
        "subnormal": any(0 < one < 0x80 for one in magnitudes),
        "negative zero": 0x8000 in codes,
        "negative": any(code > 0x8000 for code in codes),
        "largest": 0x7F7F in codes,
    }


def all_drawn(strategy: st.SearchStrategy[Any], examples: int = 1000) -> list[Any]:
    seen: list[Any] = []

    @settings(max_examples=examples, database=None, derandomize=True)
    @given(strategy)
    def look(value: Any) -> None:
        seen.append(value)

    look()
    return seen


def test_every_code_is_in_one_place() -> None:
    order = _codes.simplest_first().tolist()
    assert sorted(order) == list(range(65536))
    assert order[:6] == [0x0000, 0x8000, 0x3F80, 0xBF80, 0x4000, 0xC000]
    places = {code: place for place, code in enumerate(order)}
    simple_to_odd = [0x0000, 0x3F80, 0x4380, 0x3FC0, 0x3FA0, 0x3F81, 0x4B00, 0x7F7F, 0x0001, 0x7F80, 0x7F81]
    assert sorted(simple_to_odd, key=places.get) == simple_to_odd


@pytest.mark.parametrize("options", [{}, {"allow_nan": False}, {"allow_infinity": False}, {"allow_subnormal": False},
                                     {"allow_negative_zero": False}, {"min_value": 0.0}, {"min_value": -0.0}, {"max_value": 1e-40}],
                         ids=str)  # fmt: skip
def test_options_leave_out_what_they_name(options: dict[str, Any]) -> None:
    """Codes, values and arrays alike; what is not left out is drawn within 60 to 400 examples."""
    bounded = "min_value" in options or "max_value" in options
    expected = {
        "nan": options.get("allow_nan", not bounded),
        "infinity": options.get("allow_infinity", True),
        "subnormal": options.get("allow_subnormal", True),
        "negative zero": options.get("allow_negative_zero", True) and str(options.get("min_value")) != "0.0",
        "negative": "min_value" not in options,
        "largest": "max_value" not in options,
    }
    codes = set(all_drawn(testing.bf16_bits(**options), 400))
    assert drawn_kinds(codes) == expected
    assert drawn_kinds({int(bits(np.asarray(value))) for value in all_drawn(testing.bf16_values(**options), 300)}) == expected
    arrays = all_drawn(testing.bf16_arrays((32,), **options), 60)
    assert all(array.dtype == BF16 and array.shape == (32,) for array in arrays)
    assert drawn_kinds({int(code) for array in arrays for code in bits(array)}) == expected


@QUICK
@given(st.floats(width=32, allow_nan=False), st.floats(width=32, allow_nan=False))
def test_bounds_need_not_be_bfloat16_values(one: float, other: float) -> None:
    low, high = sorted((one, other))
    inside = np.flatnonzero((low <= VALUES) & (high >= VALUES)).tolist()
    if low == 0 and math.copysign(1, low) > 0:
        inside = [code for code in inside if code != 0x8000]
    if high == 0 and math.copysign(1, high) < 0:
        inside = [code for code in inside if code != 0x0000]
    if not inside or (str(low), str(high)) == ("0.0", "-0.0"):
        with pytest.raises(ValueError, match="no bfloat16 is left"):
            testing.bf16_bits(min_value=low, max_value=high)
        return
    assert sorted(_codes.drawable({"min_value": low, "max_value": high}).codes) == inside


@given(testing.bf16_arrays(hnp.array_shapes(max_dims=3, max_side=4)))
def test_shapes_by_strategy(array: np.ndarray) -> None:
    assert array.dtype == BF16
    assert 1 <= array.ndim <= 3


def test_elements_fill_and_unique() -> None:
    ones = testing.bf16_arrays(st.integers(1, 9), elements=st.sampled_from([1.0, np.float32(-2.5), BF16(0.5), 7]))
    for array in all_drawn(ones, 50):
        assert set(array.astype(np.float64).tolist()) <= {1.0, -2.5, 0.5, 7.0}
    sparse = testing.bf16_arrays(100, elements=testing.bf16_values(), fill=st.just(3.0))
    assert all(np.count_nonzero(array.astype(np.float32) == 3) > 50 for array in all_drawn(sparse, 50))
    for array in all_drawn(testing.bf16_arrays(20, unique=True), 50):
        assert len(set(bits(array).tolist())) == 20
    large = all_drawn(testing.bf16_arrays((40, 50)), 20)
    assert max(len(set(bits(array).reshape(-1).tolist())) for array in large) > 200
    with pytest.raises(ValueError, match="allow_nan would have no effect"):
        testing.bf16_arrays(3, elements=st.just(1.0), allow_nan=False)
    with pytest.raises(ValueError, match=r"0\.1 is no bfloat16 value.*bf16_values"):
        all_drawn(testing.bf16_arrays(3, elements=st.just(0.1)))


@given(testing.float32_near_ties(beside="ties", steps=3), testing.float32_near_ties(beside="values", steps=1))
def test_float32_near_ties_are_near(tie: np.float32, value: np.float32) -> None:
    assert type(tie) is type(value) is np.float32
    for one, base, steps in ((tie, 0x8000, 3), (value, 0, 1)):
        tail = int(one.view(np.uint32)) & 0xFFFF
        assert min((tail - base) % 65536, (base - tail) % 65536) <= steps


@given(testing.float64_near_ties((3,)))
def test_float64_near_ties_are_near(values: np.ndarray) -> None:
    assert values.dtype == np.float64
    for value in values.tolist():
        place = bf16_neighbours(Fraction(abs(value)))[2]
        distance = abs(place - Fraction(1, 2))
        assert distance == 0 or (distance.numerator == 1 and 2**9 <= distance.denominator <= 2**45)


def test_float64_near_ties_find_the_double_rounding() -> None:
    """ml_dtypes goes by way of float32; about every second value shows it, and the smallest example is a plain one."""
    seen = all_drawn(testing.float64_near_ties(allow_subnormal=False), 300)
    wrong = [bits(cufuse.round_to_bf16(x)) != bits(np.asarray(x.astype(ml_dtypes.bfloat16))) for x in seen]
    assert 0.3 < np.mean(wrong) < 0.7
    near_one = testing.float64_near_ties(min_value=1.0, max_value=256.0)
    smallest = find(near_one, lambda x: bits(cufuse.round_to_bf16(x)) != bits(np.asarray(x.astype(BF16))), settings=FULL)
    assert 1 < smallest < 2.1


def test_hard_sums_are_hard() -> None:
    """Orders differ on most of them, and a tensor core loses what float64 holds."""
    for kind, least in (("cancellation", 0.1), ("wide", 0.3), ("truncated", 0.3)):
        arrays = all_drawn(testing.accumulation_hard((64,), kinds=[kind]), 100)[20:]
        ones = np.ones((1, 64), BF16)
        lost = 0
        for array in arrays:
            found = cufuse.linear(array[None], ones, recipe=UNROUNDED, k_slices=1)
            lost += float(found[0, 0]) != math.fsum(array.astype(np.float64).tolist())
        assert lost / len(arrays) > least, kind
    assert {array.shape for array in all_drawn(testing.accumulation_hard(st.sampled_from([(2, 3), (4,)])), 50)} == {(2, 3), (4,)}


UNROUNDED = cufuse.recipes["batch-invariant"].derive("unrounded", gemm={"output": "float32"})


@given(testing.gemm_inputs(allow_nan=True, allow_infinity=True), testing.rms_norm_inputs(residual=True))
def test_inputs_fit_the_operations(product: dict[str, Any], norm: dict[str, Any]) -> None:
    found = cufuse.linear(**product, k_slices=1)
    assert found.shape == (len(product["x"]), len(product["weight"]))
    assert np.isfinite(norm["x"].astype(np.float32)).all()
    assert cufuse.add_rms_norm(**norm)[0].shape == norm["x"].shape


@pytest.mark.parametrize("special", ["nan", "infinity", "subnormal", "negative_zero"])
def test_special_elements_only_where_allowed(special: str) -> None:
    for allowed in (True, False):
        options = {f"allow_{one}": one == special and allowed for one in ("nan", "infinity", "subnormal", "negative_zero")}
        inputs = testing.gemm_inputs(kinds=["wide"], **options)
        seen = {int(code) for drawn in all_drawn(inputs, 100) for code in bits(drawn["x"]).reshape(-1)}
        kinds = drawn_kinds(seen)
        assert kinds.pop(special.replace("_", " ")) == allowed
        assert not any(kinds.get(other) for other in ("nan", "infinity", "subnormal", "negative zero"))


@given(testing.recipes())
def test_recipes_are_valid_and_say_what_changed(recipe: cufuse.Recipe) -> None:
    base = cufuse.recipes[recipe.name.split(",")[0]]
    changed = {name for name in _recipes.choices() if _recipes.value_of(recipe, name) != _recipes.value_of(base, name)}
    assert {part.split("=")[0].strip() for part in recipe.name.split(",")[1:]} == changed
    assert recipe.rounding_points()


def test_recipes_reach_every_choice() -> None:
    """A change takes place on some named recipe, whatever it contradicts on others."""
    for name, values in _recipes.choices().items():
        reached = {_recipes.value_of(_recipes.changed_recipe(base, {name: value}), name)
                   for base in cufuse.recipes.values() for value in values}  # fmt: skip
        assert reached == set(values) != set(), name
    drawn_fields = {part.split("=")[0].strip() for one in all_drawn(testing.recipes(), 300) for part in one.name.split(",")[1:]}
    assert len(drawn_fields) > len(_recipes.choices()) / 2
    assert {recipe.name for recipe in all_drawn(testing.recipes(changes=0), 300)} == set(cufuse.recipes)
    narrow = all_drawn(testing.recipes(fields=("norm.rsqrt",)), 300)
    assert {recipe.norm.rsqrt for recipe in narrow} == {"hardware", "correct"}
    assert len({recipe.name for recipe in narrow}) == 2 * len(cufuse.recipes)
    drawn = all_drawn(testing.recipes(kernels_only=True), 200)
    assert all("llama.cpp-cpu" not in str(recipe.norm) + str(recipe.head_norm) for recipe in drawn)


def test_examples_shrink() -> None:
    values = testing.bf16_values(allow_nan=False)
    assert float(find(values, lambda x: x > 2, settings=FULL)) == 3
    assert 2.0**-10 < float(find(values, lambda x: 0 < x < 1, settings=FULL)) < 1
    assert int(bits(np.asarray(find(values, lambda x: 0 < x < 1e-39, settings=FULL)))) == 1
    assert float(find(testing.bf16_values(), np.isinf, settings=FULL)) == math.inf
    arrays = testing.bf16_arrays(st.integers(1, 40), allow_nan=False)
    assert find(arrays, lambda x: (x.astype(np.float64) > 5).any(), settings=FULL).shape == (1,)
    assert find(testing.recipes(), lambda one: one.norm.rsqrt == "correct", settings=FULL).name == "torch, norm.rsqrt=correct"
    found = find(testing.rms_norm_inputs(), lambda one: (cufuse.rms_norm(**one).astype(np.float32) != 0).any(), settings=FULL)
    assert found["x"].size <= 2
    with pytest.raises(NoSuchExample):
        find(testing.bf16_values(min_value=1, max_value=2), lambda x: x > 2, settings=FULL)


@settings(max_examples=20)
@given(
    testing.gemm_inputs(m=64, n=128, k=512),
    testing.rms_norm_inputs(rows=64, columns=4096, residual=True),
)
def test_large_inputs_pass_the_health_checks(product: dict[str, Any], norm: dict[str, Any]) -> None:
    assert product["x"].size == 64 * 512
    assert norm["residual"].size == 64 * 4096


@settings(max_examples=20)
@given(testing.bf16_arrays((64, 1024)), testing.accumulation_hard((3, 5000)), testing.float64_near_ties(5000))
def test_large_arrays_pass_the_health_checks(array: np.ndarray, hard: np.ndarray, wide: np.ndarray) -> None:
    assert [one.size for one in (array, hard, wide)] == [64 * 1024, 15000, 5000]


def test_from_type_knows_them() -> None:
    assert all(type(one) is BF16 for one in all_drawn(st.from_type(BF16), 50))
    assert all(isinstance(one, cufuse.Recipe) for one in all_drawn(st.from_type(cufuse.Recipe), 50))
    assert all(isinstance(one, list) for one in all_drawn(st.lists(st.from_type(BF16), max_size=3), 50))


def test_cupy_arrays_are_made_on_the_host_and_brought_over() -> None:
    """bfloat16 crosses as its codes: a stand-in library records what it is given."""
    library = types.ModuleType("cupy")
    given_dtypes: set[str] = set()

    def asarray(array: np.ndarray) -> np.ndarray:
        given_dtypes.add(str(array.dtype))
        return array.copy()

    library.asarray = asarray  # type: ignore[attr-defined]
    makers = [
        testing.bf16_arrays((2,), xp=library),
        testing.float32_near_ties((2,), xp=library),
        testing.float64_near_ties((2,), xp=library),
        testing.accumulation_hard((2,), xp=library),
    ]
    for maker, dtype in zip(makers, (BF16, np.float32, np.float64, BF16), strict=True):
        assert all(array.dtype == dtype for array in all_drawn(maker, 20))
    assert given_dtypes == {"uint16", "uint32", "uint64"}
    for inputs in (testing.gemm_inputs(xp=library), testing.rms_norm_inputs(xp=library)):
        assert all_drawn(inputs, 1)[0]["x"].dtype == BF16
    with pytest.raises(TypeError, match="module numpy or cupy"):
        testing.bf16_arrays((2,), xp=math)


def test_misuse() -> None:
    wrong = [
        (ValueError, "min_value is nan", lambda: testing.bf16_bits(min_value=math.nan)),
        (ValueError, "no bfloat16 is left", lambda: testing.bf16_bits(min_value=3, max_value=2)),
        (ValueError, "NaN is not within", lambda: testing.bf16_bits(min_value=3, allow_nan=True)),
        (TypeError, "unknown options.*allow_nans", lambda: testing.bf16_bits(allow_nans=True)),
        (ValueError, "steps is 64", lambda: testing.float32_near_ties(steps=64)),
        (ValueError, "beside is 'tie'", lambda: testing.float32_near_ties(beside="tie")),
        (ValueError, "kinds is", lambda: testing.gemm_inputs(kinds=["odd"])),
        (ValueError, "kinds is 'wide'", lambda: testing.accumulation_hard(3, kinds="wide")),
        (ValueError, "core is 'sm_1'", lambda: testing.accumulation_hard(3, core="sm_1")),
        (ValueError, "fields names.*norm.root", lambda: testing.recipes(fields=("norm.root",))),
    ]
    for kind, message, call in wrong:
        with pytest.raises(kind, match=message):
            call()
