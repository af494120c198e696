"""The block in one call: bit for bit the public operations one after the other, under every recipe and in every form."""

import itertools
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import cufuse
from cufuse import named_recipes
from tests.witnesses import demand_bits, random_bf16, without_rounding

BF16 = ml_dtypes.bfloat16
F32 = np.float32
K, D, HEADS, KV_HEADS = 96, 16, 3, 2
ROWS = (HEADS * D, KV_HEADS * D, KV_HEADS * D)
FLOAT32_ACTIVATIONS = [name for name, recipe in cufuse.recipes.items() if recipe.float32_activations]


HEAD_NORM = {"separate-k-norm": "torch"}


def arguments(
    recipe: str, lead: tuple[int, ...] = (5,), packed: bool = True, head_norms: bool = True, rotation: bool = True
) -> dict[str, Any]:
    """Keyword arguments of a block, weights without a pattern."""
    weight = random_bf16(3, sum(ROWS), K, scale=0.2)
    cos, sin = cufuse.rope_tables(np.arange(np.prod(lead, dtype=int)).reshape(lead) * 7, D, dtype=F32)
    return {
        "x": random_bf16(1, *lead, K),
        "norm_weight": random_bf16(2, K),
        "qkv_weight": weight if packed else tuple(np.split(weight, np.cumsum(ROWS)[:2])),
        "q_norm_weight": random_bf16(4, D, scale=3) if head_norms else None,
        "k_norm_weight": random_bf16(5, D, scale=40) if head_norms else None,
        "head_dim": D,
        "heads": HEADS,
        "cos": cos if rotation else None,
        "sin": sin if rotation else None,
        "recipe": recipe,
        "k_slices": 1,
    }


def one_after_the_other(given: dict[str, Any]) -> tuple[np.ndarray, ...]:
    """The same from the public single operations."""
    name, x, residual, extra = given["recipe"], given["x"], given.get("residual"), ()
    if residual is None:
        y = cufuse.rms_norm(x, given["norm_weight"], recipe=name)
    else:
        y, new_residual = cufuse.add_rms_norm(x, residual, given["norm_weight"], recipe=name)
        extra = (new_residual,)
    weights = given["qkv_weight"]
    if isinstance(weights, tuple):
        products = [cufuse.linear(y, weight, recipe=name, k_slices=given["k_slices"]) for weight in weights]
    else:
        products = np.split(cufuse.linear(y, weights, recipe=name, k_slices=given["k_slices"]), np.cumsum(ROWS)[:2], axis=-1)
    q, k, v = (product.reshape(*x.shape[:-1], -1, D) for product in products)
    # of all named recipes only this one normalises heads otherwise than rows
    head_norm = HEAD_NORM.get(name, name)
    if given["q_norm_weight"] is not None:
        q = cufuse.rms_norm(q, given["q_norm_weight"], recipe=head_norm)
        k = cufuse.rms_norm(k, given["k_norm_weight"], recipe=head_norm)
    if given["cos"] is not None:
        q, k = cufuse.rope(q, k, given["cos"], given["sin"], recipe=name)
    if name == "late-rounding":
        q, k, v = (cufuse.round_to_bf16(one) for one in (q, k, v))
    return q, k, v, *extra


def demand_all(found: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    for name, one, other in zip(("q", "k", "v", "new residual"), found, expected, strict=False):
        demand_bits(one, other, name)
    assert len(found) == len(expected)


@pytest.mark.parametrize("name", cufuse.recipes)
def test_one_call_is_the_composition(name: str) -> None:
    for packed, head_norms, rotation, with_residual in itertools.product([True, False], repeat=4):
        given = arguments(name, packed=packed, head_norms=head_norms, rotation=rotation)
        if with_residual:
            given["residual"] = random_bf16(6, 5, K, scale=5)
        found = cufuse.rms_norm_qkv(**given)
        assert [one.shape for one in found[:3]] == [(5, HEADS, D), (5, KV_HEADS, D), (5, KV_HEADS, D)]
        demand_all(found, one_after_the_other(given))


@pytest.mark.parametrize("name", cufuse.recipes)
def test_one_call_adds_in_the_composition_s_order(name: str) -> None:
    """The same without roundings, on values whose sums round: the order of every sum shows in float32."""
    given = arguments("float32", (17,)) | {"recipe": without_rounding(name)}
    given |= {"x": random_bf16(1, 17, K, binades=13), "qkv_weight": random_bf16(3, sum(ROWS), K, binades=13)}
    demand_all(cufuse.rms_norm_qkv(**given), one_after_the_other(given))
    given["residual"] = random_bf16(6, 17, K, binades=13)
    demand_all(cufuse.rms_norm_qkv(**given), one_after_the_other(given))


@pytest.mark.parametrize("name", FLOAT32_ACTIVATIONS)
def test_float32_activations(name: str) -> None:
    given = arguments(name)
    given["x"] = given["x"].astype(F32) * F32(1.003)
    demand_all(cufuse.rms_norm_qkv(**given), one_after_the_other(given))
    given["residual"] = np.random.default_rng(7).standard_normal((5, K)).astype(F32)
    demand_all(cufuse.rms_norm_qkv(**given), one_after_the_other(given))
    mixed = given | {"residual": random_bf16(8, 5, K)}
    demand_all(cufuse.rms_norm_qkv(**mixed), one_after_the_other(mixed))


@pytest.mark.parametrize("name", ["gemma", "float32", "llama.cpp", "late-rounding"])
def test_float32_norm_weights(name: str) -> None:
    given = arguments(name)
    for weight in ("norm_weight", "q_norm_weight", "k_norm_weight"):
        given[weight] = given[weight].astype(F32) * F32(1.0001)
    demand_all(cufuse.rms_norm_qkv(**given), one_after_the_other(given))


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 4)])
def test_leading_axes(lead: tuple[int, ...]) -> None:
    given = arguments("torch", lead)
    found = cufuse.rms_norm_qkv(**given)
    assert [one.shape for one in found] == [(*lead, HEADS, D), (*lead, KV_HEADS, D), (*lead, KV_HEADS, D)]
    flat = given | {name: given[name].reshape(-1, given[name].shape[-1]) for name in ("x", "cos", "sin")}
    demand_all(tuple(one.reshape(-1, *one.shape[-2:]) for one in found), cufuse.rms_norm_qkv(**flat))


def test_strided_inputs() -> None:
    given = arguments("torch", (4,)) | {"residual": random_bf16(6, 4, K)}
    strided = dict(given)
    for name in ("x", "residual", "norm_weight", "q_norm_weight", "k_norm_weight", "cos", "sin", "qkv_weight"):
        value = given[name]
        wide = np.zeros(tuple(3 * size for size in value.shape), value.dtype)
        strided[name] = wide[tuple(slice(None, None, -3) for _ in value.shape)]
        strided[name][...] = value
        assert not strided[name].flags.c_contiguous
    demand_all(cufuse.rms_norm_qkv(**strided), cufuse.rms_norm_qkv(**given))


@pytest.mark.parametrize("name", ["torch", "late-rounding", "float32"])
def test_out_may_be_views_of_one_buffer(name: str) -> None:
    given = arguments(name, (2, 3)) | {"residual": random_bf16(6, 2, 3, K)}
    expected = cufuse.rms_norm_qkv(**given)
    buffer = np.zeros((2, 3, sum(ROWS)), expected[0].dtype)
    outs = [part.reshape(2, 3, -1, D) for part in np.split(buffer, np.cumsum(ROWS)[:2], axis=-1)]
    kept = np.zeros((2, 3, 2 * K), expected[3].dtype)[..., ::-2]
    for found, one in zip(cufuse.rms_norm_qkv(**given, out=(*outs, kept)), (*outs, kept), strict=True):
        assert found is one
    demand_all((*outs, kept), expected)
    demand_bits(buffer, np.concatenate([one.reshape(2, 3, -1) for one in expected[:3]], axis=-1))
    only_k = np.zeros_like(expected[1])
    found = cufuse.rms_norm_qkv(**given, out=(None, only_k, None, None))
    assert found[1] is only_k
    demand_all(found, expected)


def test_no_tokens() -> None:
    for residual in (None, random_bf16(6, 0, K)):
        found = cufuse.rms_norm_qkv(**arguments("torch", (0,)), residual=residual)
        assert [one.shape for one in found] == [(0, HEADS, D), (0, KV_HEADS, D), (0, KV_HEADS, D), (0, K)][: len(found)]
        assert len(found) == (3 if residual is None else 4)


def test_head_counts_can_be_given_or_told() -> None:
    given = arguments("torch")
    expected = cufuse.rms_norm_qkv(**given)
    del given["heads"], given["head_dim"]
    for counts in ({"kv_heads": KV_HEADS}, {"heads": HEADS, "kv_heads": KV_HEADS}, {"heads": np.int64(HEADS), "head_dim": D}):
        demand_all(cufuse.rms_norm_qkv(**given, **counts), expected)
    apart = arguments("torch", packed=False)
    del apart["heads"], apart["head_dim"]
    demand_all(cufuse.rms_norm_qkv(**apart), expected)


def test_slices_of_one_call() -> None:
    """Separate projections are cut each as its own shape says; what is not recorded is announced, once for each."""
    given = arguments("torch") | {"k_slices": None}
    with pytest.warns(cufuse.AssumedSlicesWarning, match="M = 5, N = 112, K = 96") as caught:
        demand_all(cufuse.rms_norm_qkv(**given), cufuse.rms_norm_qkv(**given | {"k_slices": 1}))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cufuse.rms_norm_qkv(**given | {"recipe": "batch-invariant"})
        given = given | {"k_slices": 2}
        demand_all(cufuse.rms_norm_qkv(**given), one_after_the_other(given))


def test_slices_of_qwen3_8b_differ_between_packed_and_separate() -> None:
    """The same weights in the two forms: 3 slices of K for k and v apart, 1 for all together."""
    x, weight = random_bf16(1, 2, 4096), random_bf16(2, 6144, 4096, scale=0.02)
    given = {"x": x, "norm_weight": np.ones(4096, BF16), "q_norm_weight": None, "k_norm_weight": None, "head_dim": 128}
    packed = cufuse.rms_norm_qkv(qkv_weight=weight, heads=32, **given)
    apart = cufuse.rms_norm_qkv(qkv_weight=tuple(np.split(weight, [4096, 5120])), **given)
    rows = np.split(weight, [4096, 5120])
    y = cufuse.rms_norm(x, given["norm_weight"])
    demand_bits(apart[1], cufuse.linear(y, rows[1], k_slices=3).reshape(2, 8, 128))
    demand_bits(apart[2], cufuse.linear(y, rows[2], k_slices=3).reshape(2, 8, 128))
    demand_bits(packed[1], cufuse.linear(y, rows[1], k_slices=1).reshape(2, 8, 128))
    assert any((one.astype(F32) != other.astype(F32)).any() for one, other in zip(packed, apart, strict=True))


def test_a_derived_recipe_with_another_head_norm() -> None:
    """head_norm is its own: another offset there changes q and k, and neither v nor the norm."""
    given = arguments("torch")
    derived = named_recipes.get("torch").derive("mine", head_norm={"weight_offset": 1.0})
    found = cufuse.rms_norm_qkv(**given | {"recipe": derived})
    plain = cufuse.rms_norm_qkv(**given | {"q_norm_weight": None, "k_norm_weight": None, "cos": None, "sin": None})
    shifted = derived.derive("rows", norm={"weight_offset": 1.0})
    q, k = (cufuse.rms_norm(one, given[f"{name}_norm_weight"], recipe=shifted) for name, one in zip("qk", plain, strict=False))
    demand_all(found[:2], cufuse.rope(q, k, given["cos"], given["sin"]))
    demand_bits(found[2], plain[2])
