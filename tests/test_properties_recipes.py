"""Recipes that differ in one field differ only where that field can matter: every other stage keeps its bits, and where the field
can matter it does, on some input."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import cufuse
from cufuse import testing
from cufuse.testing import _recipes
from tests.totals import count, part_of_profile
from tests.witnesses import random_bf16

F32 = np.float32
FRONT = ("normalised", "q", "k", "v")
HEADS = tuple(f"{name}_{part}" for name in "qk" for part in ("r", "h", "normed"))
ROTATED = ("q_rotated", "k_rotated")
STAGES = ("r", "h", *FRONT, *HEADS, *ROTATED)

NOTHING: tuple[str, ...] = ()
MATTERS: dict[str, tuple[str, ...]] = {
    # without a residual, with bfloat16 activations and weights: nothing to differ in
    "residual_sum": NOTHING,
    "norm.sum_order_after_residual": NOTHING,
    "head_norm.sum_order_after_residual": NOTHING,
    "norm.float32_weight": NOTHING,
    "head_norm.float32_weight": NOTHING,
    "norm.contract": NOTHING,  # squares of bfloat16 are exact
    "float32_activations": NOTHING,
    "gemm.quantised": NOTHING,
    "gemm.quantised_slices": NOTHING,
    "packed_projections": NOTHING,
    "round_output": NOTHING,  # of the stages; q, k and v are rounded behind the last of them
    "norm.sum_order": STAGES,
    "norm.mean": STAGES,
    "norm.rsqrt": STAGES,
    "norm.round_normalised": STAGES[1:],
    "norm.weight_offset": STAGES[2:],
    "norm.round_weighted": STAGES[2:],
    "gemm.input": STAGES[2:],  # follows norm.round_weighted
    "gemm.core": STAGES[3:],
    "gemm.k_slices": STAGES[3:],
    "gemm.output": STAGES[3:],
    "head_norm.sum_order": (*HEADS, *ROTATED),
    "head_norm.contract": (*HEADS, *ROTATED),
    "head_norm.mean": (*HEADS, *ROTATED),
    "head_norm.rsqrt": (*HEADS, *ROTATED),
    "head_norm.round_normalised": ("q_h", "k_h", "q_normed", "k_normed", *ROTATED),
    "head_norm.weight_offset": ("q_normed", "k_normed", *ROTATED),
    "head_norm.round_weighted": ("q_normed", "k_normed", *ROTATED),
    "rope.tables": ROTATED,
    "rope.round_products": ROTATED,
    "rope.contract": ROTATED,
    "rope.round_sum": ROTATED,
}
BEHIND = ("attention.", "mlp.")


def may_matter(field: str) -> tuple[str, ...]:
    """The stages that a field may change; KeyError for a field that nobody has thought about."""
    return NOTHING if field.startswith(BEHIND) else MATTERS[field]


def block_of(tokens: int, columns: int, head_dim: int, seed: int = 1, binades: int = 8) -> dict[str, Any]:
    """Inputs of a small attention front, dense enough for orders and roundings to show."""
    cos, sin = cufuse.rope_tables(np.arange(tokens) * 7, head_dim, dtype=F32)
    sizes = (2 * head_dim, head_dim, head_dim)
    return {
        "x": random_bf16(seed, tokens, columns, binades=binades),
        "norm_weight": random_bf16(seed + 1, columns),
        "qkv_weight": tuple(random_bf16(seed + 2 + place, size, columns) for place, size in enumerate(sizes)),
        "q_norm_weight": random_bf16(seed + 5, head_dim),
        "k_norm_weight": random_bf16(seed + 6, head_dim, scale=40),
        "cos": cos,
        "sin": sin,
    }


BLOCKS = st.builds(
    block_of,
    st.sampled_from([1, 2, 5, 16]),
    st.sampled_from([16, 60, 96, 160]),
    st.sampled_from([12, 16]),
    seed=st.integers(0, 2**16),
    binades=st.sampled_from([0, 8]),
)


def stages(recipe: cufuse.Recipe, inputs: dict[str, Any]) -> dict[str, np.ndarray]:
    # cuBLAS's number of slices is recorded for the Qwen3 projections alone
    slices = {"k_slices": 1} if recipe.gemm.k_slices == "cublas" else {}
    return dict(testing.recipe_stages("rms_norm_qkv", recipe)(**inputs, **slices))


@st.composite
def neighbours(draw: Any) -> tuple[cufuse.Recipe, cufuse.Recipe, set[str]]:
    """Two recipes, and the fields in which they differ: one, or it and those that have to follow."""
    base = draw(testing.recipes(changes=2))
    field = draw(st.sampled_from(sorted(_recipes.choices())))
    other = _recipes.changed_recipe(base, {field: draw(st.sampled_from(_recipes.choices()[field]))})
    differing = {name for name in _recipes.choices() if _recipes.value_of(base, name) != _recipes.value_of(other, name)}
    return base, other, differing


def changed_stages(first: cufuse.Recipe, second: cufuse.Recipe, inputs: dict[str, Any]) -> set[str]:
    one, other = (stages(recipe, inputs) for recipe in (first, second))
    assert list(one) == list(other)
    count("recipes: stages of two that differ in one field", inputs=1, outputs=sum(value.size for value in one.values()))
    return different(one, other)


def different(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> set[str]:
    return {name for name in one if one[name].dtype != other[name].dtype or one[name].tobytes() != other[name].tobytes()}


@part_of_profile(4)
@given(neighbours(), BLOCKS)
def test_other_stages_keep_their_bits(pair: tuple[cufuse.Recipe, cufuse.Recipe, set[str]], inputs: dict[str, Any]) -> None:
    first, second, fields = pair
    allowed = {stage for field in fields for stage in may_matter(field)}
    changed = changed_stages(first, second, inputs)
    assert changed <= allowed, f"{first.name} and {second.name} differ in {sorted(fields)}, but {sorted(changed - allowed)} changed"


@given(neighbours(), BLOCKS, st.integers(0, 2**16))
def test_residual_sums_too(pair: tuple[cufuse.Recipe, cufuse.Recipe, set[str]], inputs: dict[str, Any], seed: int) -> None:
    """What is behind the norm cannot matter to it; the new residual depends on its own field alone."""
    first, second, fields = pair
    given_inputs = {"x": inputs["x"], "residual": random_bf16(seed, *inputs["x"].shape), "weight": inputs["norm_weight"]}
    one, other = (dict(testing.recipe_stages("add_rms_norm", recipe)(**given_inputs)) for recipe in (first, second))
    changed = different(one, other)
    if "residual_sum" not in fields:
        assert not changed & {"residual sum", "new residual"}
    mattering = {field for field in fields if field == "residual_sum" or field.startswith("norm.")} - {"norm.float32_weight"}
    assert not changed or mattering, (first.name, second.name, changed)
    if mattering and mattering <= {"norm.round_weighted", "norm.weight_offset"}:
        assert changed <= {"y"}
    if mattering == {"norm.round_normalised"}:
        assert changed <= {"h", "y"}
    if mattering == {"norm.sum_order"} and first.norm.sum_order_after_residual is not None:
        assert not changed
    count("recipes: stages of two that differ in one field", inputs=1, outputs=sum(value.size for value in one.values()))


def test_every_field_has_been_thought_about() -> None:
    for field in _recipes.choices():
        assert set(may_matter(field)) <= set(STAGES), field


def single_changes() -> Iterator[tuple[str, cufuse.Recipe, cufuse.Recipe]]:
    for field in _recipes.choices():
        if may_matter(field):
            for base in (cufuse.recipes["torch"], cufuse.recipes["float32"], cufuse.recipes["llama.cpp"]):
                for value in _recipes.choices()[field]:
                    other = _recipes.changed_recipe(base, {field: value})
                    if _recipes.value_of(other, field) != _recipes.value_of(base, field):
                        yield field, base, other


@pytest.mark.parametrize("field", [field for field in _recipes.choices() if may_matter(field)])
def test_a_field_that_can_matter_does(field: str) -> None:
    """On some recipe, with the right input, its first stage changes (else the table above would be wrong, or the field idle)."""
    # contraction shows where an accumulator takes a second square: of 600 elements the orders of 256 threads give it some
    inputs = block_of(24, 160, 600 if field == "head_norm.contract" else 12)
    if field == "gemm.core":  # what a core of F = 24 cuts off and one of F = 25 does not
        inputs["x"][:, 0] = 2.0**14
    for name, base, other in single_changes():
        if name == field and changed_stages(base, other, inputs) & set(may_matter(field)):
            return
    pytest.fail(f"{field} changes nothing")


@given(
    testing.rms_norm_inputs(rows=st.integers(1, 5), columns=st.sampled_from([1, 2, 4, 16, 64, 128])),
    testing.recipes(changes=0),
    st.sampled_from(["factor", "reciprocal", "divide"]),
)
@example({"x": random_bf16(1, 3, 64), "weight": random_bf16(2, 64), "eps": 1e-6}, cufuse.recipes["torch"], "divide")
def test_means_agree_where_k_is_a_power_of_two(inputs: dict[str, Any], recipe: cufuse.Recipe, mean: str) -> None:
    other = recipe.derive("other", norm={"mean": mean})
    testing.assert_bits_equal(cufuse.rms_norm(**inputs, recipe=other), cufuse.rms_norm(**inputs, recipe=recipe), nan="any")


@given(testing.rms_norm_inputs(columns=1), st.sampled_from(sorted(_recipes.choices()["norm.sum_order"])))
def test_orders_agree_where_there_is_one_column(inputs: dict[str, Any], order: str) -> None:
    first, other = (
        cufuse.recipes["torch"].derive(name, norm={"sum_order": name, "mean": "divide"}) for name in ("sequential", order)
    )
    testing.assert_bits_equal(cufuse.rms_norm(**inputs, recipe=other), cufuse.rms_norm(**inputs, recipe=first), nan="any")


@given(testing.gemm_inputs(k=st.integers(1, 64)), st.integers(1, 9), st.sampled_from(["sm_90", "sm_80"]))
def test_slices_agree_where_one_holds_all(inputs: dict[str, Any], slices: int, core: str) -> None:
    """64 columns are one block of a slice, however many slices are asked for."""
    recipe = cufuse.recipes["torch"].on(core)
    found = cufuse.linear(**inputs, recipe=recipe, k_slices=slices)
    testing.assert_bits_equal(found, cufuse.linear(**inputs, recipe=recipe, k_slices=1))
