"""The operations on NumPy arrays: each recipe's rounding points written out once more, by hand, and every form of input."""

import itertools
import math
import warnings
from fractions import Fraction
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

import cufuse
from cufuse import gemm
from cufuse.emulation import sums
from cufuse.emulation.rsqrt import rsqrt
from cufuse.emulation.tensor_core import TENSOR_CORES, reference_block
from tests.witnesses import bits, demand_bits, exact, from_codes, random_bf16, round_to_bf16, round_to_float32, without_rounding

NAMES = tuple(cufuse.recipes)
BF16 = ml_dtypes.bfloat16
F32 = np.float32


class NormPoints(NamedTuple):
    """A norm as its implementation's source states it; not read from the recipe."""

    order: str
    mean: str
    round_h: bool
    round_y: bool
    residual: str = "rounded"
    contract: bool = False
    offset: float = 0.0
    order_after_residual: str | None = None
    float32_weight: str = "refuse"


NORMS = {
    "torch": NormPoints("torch-mean", "factor", True, True, float32_weight="promote"),
    "torch-rms-norm": NormPoints("torch-rms-norm", "divide", False, True, contract=True),
    "float32": NormPoints("torch-mean", "factor", False, False, "float32", float32_weight="accept"),
    "late-rounding": NormPoints("torch-mean", "factor", False, False, float32_weight="accept"),
    "separate-k-norm": NormPoints("torch-mean", "factor", False, False, float32_weight="accept"),
    "llama.cpp": NormPoints("llama.cpp", "reciprocal", False, False, "float32", True, float32_weight="accept"),
    "vllm-0.19": NormPoints("vllm", "divide", True, True, order_after_residual="vllm-add"),
    "vllm-0.20": NormPoints("vllm", "divide", False, True, order_after_residual="vllm-add"),
    "flashinfer": NormPoints("flashinfer", "reciprocal", False, True, "stored rounded", True),
    "gemma": NormPoints("torch-mean", "factor", False, True, offset=1.0, float32_weight="accept"),
    "nano-vllm": NormPoints("nano-vllm", "divide", False, True, "stored rounded", True),
    "batch-invariant": NormPoints("torch-rms-norm", "divide", True, True, contract=True, float32_weight="promote"),
}
# these differ from another recipe for quantised weights alone
NORMS |= {"block-scaled": NORMS["torch"], "llama.cpp-q8_1": NORMS["llama.cpp"]}
FLOAT32_ACTIVATIONS = ("float32", "late-rounding", "separate-k-norm", "llama.cpp", "llama.cpp-q8_1")


def expected_norm(x: np.ndarray, weight: np.ndarray, eps: float, points: NormPoints, after_residual: bool = False) -> np.ndarray:
    """The norm of float32 rows [M, K], bfloat16 through ml_dtypes (no NaN here)."""
    order = (after_residual and points.order_after_residual) or points.order
    m, k = x.shape
    if order == "torch-rms-norm" and k % 4:
        mean = sums.mean_of_squares(x, order, contract=points.contract)
    else:
        total = sums.sum_of_squares(x, order, contract=points.contract)
        mean = {
            "factor": total * (F32(m) / F32(m * k)),
            "reciprocal": total * (F32(1) / F32(k)),
            "divide": total / F32(k),
        }[points.mean]
    h = x * rsqrt(mean + F32(eps))[:, None]
    if points.round_h:
        h = h.astype(BF16).astype(F32)
    y = h * (weight.astype(F32) + F32(points.offset))
    promoted = weight.dtype == F32 and points.float32_weight == "promote"
    return y.astype(BF16) if points.round_y and not promoted else y


@pytest.mark.parametrize("name", NAMES)
def test_norms_round_where_their_recipes_say(name: str) -> None:
    points = NORMS[name]
    for m, k in ((1, 1), (2, 3), (5, 64), (17, 128), (3, 1000), (200, 1001), (16, 1024)):
        x, weight = random_bf16(m, m, k, scale=3), random_bf16(k, k, scale=20)
        for eps in (1e-6, 0.0, 0.1):
            found = cufuse.rms_norm(x, weight, eps=eps, recipe=name)
            demand_bits(found, expected_norm(x.astype(F32), weight, eps, points), f"{m}x{k}, eps {eps}")
        if name in FLOAT32_ACTIVATIONS:
            wide = np.random.default_rng(k).standard_normal((m, k)).astype(F32)
            demand_bits(cufuse.rms_norm(wide, weight, recipe=name), expected_norm(wide, weight, 1e-6, points), f"float32 {m}x{k}")
        if points.float32_weight != "refuse":
            weight = np.random.default_rng(k).standard_normal(k).astype(F32)
            demand_bits(cufuse.rms_norm(x, weight, recipe=name), expected_norm(x.astype(F32), weight, 1e-6, points), "wide weight")


@pytest.mark.parametrize("name", NAMES)
def test_norms_after_a_residual_sum(name: str) -> None:
    points = NORMS[name]
    for m, k in ((1, 8), (3, 1000), (17, 256)):
        x, residual, weight = random_bf16(m, m, k), random_bf16(k, m, k, scale=9), random_bf16(3, k)
        kinds = [(x, residual)]
        if name in FLOAT32_ACTIVATIONS:
            kinds.append(tuple(one.astype(F32) * F32(1.001) for one in (x, residual)))
        for one, other in kinds:
            total = one.astype(F32) + other.astype(F32)
            rounded = total.astype(BF16)
            normalised, kept = cufuse.add_rms_norm(one, other, weight, recipe=name)
            demand_bits(kept, total if points.residual == "float32" else rounded, "new residual")
            rows = rounded.astype(F32) if points.residual == "rounded" else total
            demand_bits(normalised, expected_norm(rows, weight, 1e-6, points, True), "normalised")


@pytest.mark.parametrize("name", NAMES)
def test_norms_add_in_their_recipes_order(name: str) -> None:
    """The same without the roundings: float32 outputs show every bit of the sum."""
    recipe, points = without_rounding(name), NORMS[name]._replace(round_h=False, round_y=False)
    for m, k in ((1, 1024), (5, 1001), (17, 128), (300, 512)):
        x, residual, weight = (random_bf16(seed, m, k, binades=13) for seed in (1, 2, 3))
        demand_bits(cufuse.rms_norm(x, weight[0], recipe=recipe), expected_norm(x.astype(F32), weight[0], 1e-6, points), "norm")
        total = x.astype(F32) + residual.astype(F32)
        rows = total.astype(BF16).astype(F32) if points.residual == "rounded" else total
        found, _ = cufuse.add_rms_norm(x, residual, weight[0], recipe=recipe)
        demand_bits(found, expected_norm(rows, weight[0], 1e-6, points, True), "after a residual sum")


def test_special_rows() -> None:
    weight = from_codes([0x3F80, 0xBF80, 0x3F80, 0x4000])
    zeros, nan = from_codes([[0, 0x8000, 0, 0]]), from_codes([[0x7FC1, 0x3F80, 0, 0]])
    infinite, tiny = from_codes([[0x7F80, 0x3F80, 0, 0]]), from_codes([[1, 2, 3, 0x8004]])
    assert bits(cufuse.rms_norm(zeros, weight)).tolist() == [[0, 0, 0, 0]]
    assert bits(cufuse.rms_norm(zeros, -weight)).tolist() == [[0x8000, 0x8000, 0x8000, 0x8000]]
    assert bits(cufuse.rms_norm(zeros, weight, eps=0)).tolist() == [[0x7FFF] * 4]
    assert bits(cufuse.rms_norm(nan, weight)).tolist() == [[0x7FFF] * 4]
    assert bits(cufuse.rms_norm(infinite, weight)).tolist() == [[0x7FFF, 0x8000, 0, 0]]
    # squares of subnormals are below float32: only eps is left
    expected = [round_to_bf16(Fraction(float(x)) * int(w) * 1000) for x, w in zip(tiny[0], [1, -1, 1, 2], strict=True)]
    assert bits(cufuse.rms_norm(tiny, weight, eps=1e-6)).tolist() == [expected]


PRODUCTS = [(1, 8, 1), (3, 8, 1000), (777, 5, 16), (5, 3, 17), (64, 33, 130), (1, 1, 4096), (0, 4, 8), (4, 0, 8)]


@pytest.mark.parametrize(("m", "n", "k"), PRODUCTS)
@pytest.mark.parametrize("slices", [1, 3])
def test_products_of_small_integers_are_exact(m: int, n: int, k: int, slices: int) -> None:
    rng = np.random.default_rng(m + n + k)
    x, weight = rng.integers(-3, 4, (m, k)), rng.integers(-1, 2, (n, k))
    expected = (x @ weight.T).astype(F32)
    found = cufuse.linear(x.astype(BF16), weight.astype(BF16), k_slices=slices)
    demand_bits(found, expected.astype(BF16))
    wide = rng.integers(-(2**11), 2**11, (m, k))  # too many bits for bfloat16; every sum below 2**24
    for one in (wide, x):
        kept = cufuse.linear(one.astype(F32), weight.astype(BF16), recipe="float32", k_slices=slices)
        demand_bits(kept, (one @ weight.T).astype(F32))
    demand_bits(cufuse.linear(x.astype(BF16), weight.astype(BF16), recipe="float32", k_slices=slices), expected)


@pytest.mark.parametrize("core", ["sm_90", "sm_80"])
@pytest.mark.parametrize(("k", "slices"), [(40, 1), (200, 2), (1000, 5)])
def test_products_are_steps_of_the_tensor_core(core: str, k: int, slices: int) -> None:
    """Python integers, one step at a time; slices of ceil(blocks of 64 / slices) blocks, added in float32."""
    x, weight = random_bf16(k, 2, k), random_bf16(k + 1, 3, k, scale=0.1)
    terms = TENSOR_CORES[core].terms
    length = 64 * math.ceil(math.ceil(k / 64) / slices)
    codes = [np.pad(bits(one), ((0, 0), (0, -k % 16))).tolist() for one in (x, weight)]
    expected = np.zeros((2, 3), F32)
    for m, n in np.ndindex(2, 3):
        parts = []
        for first in range(0, k, length):
            accumulator = 0
            for start in range(first, min(first + length, len(codes[0][m])), terms):
                a, b = codes[0][m][start : start + terms], codes[1][n][start : start + terms]
                accumulator = reference_block(a, b, accumulator, core=core)
            parts.append(np.uint32(accumulator).view(F32))
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        expected[m, n] = total
    recipe = cufuse.recipes["torch"].on(core)
    demand_bits(cufuse.linear(x, weight, recipe=recipe, k_slices=slices), expected.astype(BF16))
    unrounded = recipe.derive("unrounded", gemm={"output": "float32"})
    demand_bits(cufuse.linear(x, weight, recipe=unrounded, k_slices=slices), expected)
    demand_bits(cufuse.linear(x, weight, recipe=unrounded.derive("cut", gemm={"k_slices": slices})), expected)


@pytest.mark.parametrize(("recipe", "steps"), [("unrounded", 1), ("float32", 3)])
@pytest.mark.parametrize(("k", "slices"), [(16, 1), (1000, 1), (1000, 4)])
def test_products_within_their_bound(recipe: str, steps: int, k: int, slices: int) -> None:
    """Large products that cancel, then small ones: the bound counts from the largest of them, and is not idle."""
    numerics = cufuse.recipes["torch"].derive("unrounded", gemm={"output": "float32"}) if recipe == "unrounded" else recipe
    x, weight = random_bf16(1, 4, k).astype(F32), random_bf16(2, 5, k)
    x[:, : k // 2] *= np.where(np.arange(k // 2) % 2, 1000, -1000).astype(F32)
    x = x * F32(1.0001) if recipe == "float32" else x.astype(BF16)
    found = cufuse.linear(x, weight, recipe=numerics, k_slices=slices)
    errors = []
    for m, n in np.ndindex(4, 5):
        products = [a * b for a, b in zip(exact(x[m]), exact(weight[n]), strict=True)]
        partial = [abs(one) for one in itertools.accumulate(products)]
        largest = max(*partial, *map(abs, products))
        errors.append(abs(Fraction(float(found[m, n])) - sum(products)) / (Fraction(1, 2**23) * largest))
    assert max(errors) <= 17 * steps * (math.ceil(k / 16) + slices)
    assert max(errors) > Fraction(1, 10)


def test_an_infinite_weight_meets_every_part_of_a_float32() -> None:
    """Infinity times the zero low parts of an activation is NaN, whatever else is in the batch."""
    x, weight = np.array([[1, 2], [1 + 2.0**-12, 2]], F32), np.array([[np.inf, 1]], BF16)
    assert np.isnan(cufuse.linear(x, weight, recipe="float32")).all()
    assert np.isnan(cufuse.linear(x[:1], weight, recipe="float32")).all()
    assert cufuse.linear(x.astype(BF16), weight, k_slices=1)[0, 0] == np.inf


def test_slices_that_are_not_recorded_are_announced() -> None:
    x, weight = random_bf16(1, 2, 64), random_bf16(2, 24, 64)
    for recipe in ("torch", cufuse.recipes["gemma"].on("sm_80")):
        message = "M = 2, N = 24, K = 64 on sm_[89]0 is not recorded.*k_slices"
        with pytest.warns(cufuse.AssumedSlicesWarning, match=message) as caught:
            assumed = cufuse.linear(x, weight, recipe=recipe)
        assert [one.filename for one in caught] == [__file__]
        demand_bits(assumed, cufuse.linear(x, weight, recipe=recipe, k_slices=1))
    with pytest.warns(cufuse.AssumedSlicesWarning, match="on sm_80"):
        cufuse.linear(random_bf16(1, 2, 1024), random_bf16(2, 1024, 1024), recipe=cufuse.recipes["torch"].on("sm_80"))
    with pytest.warns(cufuse.AssumedSlicesWarning, match="M = 8193"):
        gemm.slices_of(8193, 1024, 1024, cufuse.recipes["torch"].gemm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cufuse.linear(random_bf16(1, 2, 1024), random_bf16(2, 1024, 1024))
        for recipe in ("batch-invariant", "float32", "late-rounding"):
            cufuse.linear(x, weight, recipe=recipe)


ROTATIONS = {
    "torch": "bfloat16, three roundings",
    "torch-rms-norm": "bfloat16, three roundings",
    "separate-k-norm": "bfloat16, three roundings",
    "vllm-0.19": "bfloat16, three roundings",
    "gemma": "bfloat16, three roundings",
    "batch-invariant": "bfloat16, three roundings",
    "vllm-0.20": "bfloat16, fused, rounded",
    "flashinfer": "float32, fused, rounded",
    "nano-vllm": "float32, fused, rounded",
    "llama.cpp": "float32, fused",
    "float32": "float32, apart",
    "late-rounding": "float32, apart",
}
ROTATIONS |= {"block-scaled": ROTATIONS["torch"], "llama.cpp-q8_1": ROTATIONS["llama.cpp"]}


def expected_rotation(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, how: str) -> np.ndarray:
    """Element by element in fractions, each rounding where ``how`` says."""
    half = x.shape[-1] // 2
    result = np.zeros(x.shape, F32)
    for place in np.ndindex(x.shape):
        *token, _, i = place
        c, s = (Fraction(float(table[*token, i])) for table in (cos, sin))
        own = Fraction(float(x[place])) * c
        other = Fraction(float(x[*place[:-1], (i + half) % (2 * half)])) * s * (-1 if i < half else 1)
        if "three" in how:
            own, other = (Fraction(float(from_codes(round_to_bf16(product)))) for product in (own, other))
            result[place] = from_codes(round_to_bf16(Fraction(float(round_to_float32(own + other)))))
        else:
            if "apart" in how:
                own = Fraction(float(round_to_float32(own)))
            other = Fraction(float(round_to_float32(other)))
            result[place] = round_to_float32(own + other)
    return result if how in ("float32, apart", "float32, fused") else result.astype(BF16)


@pytest.mark.parametrize("name", NAMES)
def test_rotations_round_where_their_recipes_say(name: str) -> None:
    how = ROTATIONS[name]
    q, k = random_bf16(1, 2, 3, 4, 8), random_bf16(2, 2, 3, 1, 8, scale=50)
    positions = np.array([[0, 1, 2], [39, 1000, 40000]])
    wide_cos, wide_sin = cufuse.rope_tables(positions, 8, dtype=F32)
    cos, sin = (table.astype(BF16) if how.startswith("bfloat16") else table for table in (wide_cos, wide_sin))
    found = cufuse.rope(q, k, cos, sin, recipe=name)
    for one, x in zip(found, (q, k), strict=True):
        demand_bits(one, expected_rotation(x, cos, sin, how))
    for one, same in zip(found, cufuse.rope(q, k, wide_cos, wide_sin, recipe=name), strict=True):
        demand_bits(same, one, "float32 tables are rounded first")
    if not cufuse.recipes[name].head_norm.round_weighted:
        wide = q.astype(F32) * F32(1.0001)
        demand_bits(cufuse.rope(wide, k, cos, sin, recipe=name)[0], expected_rotation(wide, cos, sin, how))


def test_rotary_tables() -> None:
    positions = np.array([[0, 1, 5], [100, 4096, 40959]])
    for dtype in (F32, BF16):
        cos, sin = cufuse.rope_tables(positions, 16, base=10000.0, dtype=dtype)
        assert cos.shape == sin.shape == (2, 3, 16)
        assert cos.dtype == sin.dtype == dtype
        for place in np.ndindex(2, 3, 8):
            frequency = F32(1) / F32(10000.0 ** (2 * place[2] / 16))
            angle = float(F32(positions[place[:2]]) * frequency)
            for table, function in ((cos, np.cos), (sin, np.sin)):
                value = F32(function(angle))
                assert table[place] == table[*place[:2], place[2] + 8] == (from_codes(round_to_bf16(Fraction(float(value))))
                                                                        if dtype == BF16 else value)  # fmt: skip
    for same in ([3, 4], (3, 4), np.array([3, 4], np.uint8), range(3, 5)):
        demand_bits(cufuse.rope_tables(same, 8)[1], cufuse.rope_tables(np.array([3, 4]), 8)[1])


def single_operations(x: np.ndarray, residual: np.ndarray, table: np.ndarray) -> list[np.ndarray]:
    """Every operation but the block, on x [..., 4, 64] with tables [..., 64]."""
    weight = random_bf16(7, 64)
    return [
        cufuse.rms_norm(x, weight),
        *cufuse.add_rms_norm(x, residual, weight),
        cufuse.linear(x, random_bf16(8, 24, 64), k_slices=1),
        *cufuse.rope(x, residual, table, table[..., ::-1]),
    ]


def test_any_strides_and_leading_axes() -> None:
    big_x, big_residual, big_table = random_bf16(1, 3, 6, 8, 128), random_bf16(2, 6, 3, 8, 64), random_bf16(3, 3, 6, 64)
    x, residual, table = big_x[::-1, 1::2, ::-2, ::-2], big_residual.transpose(1, 0, 2, 3)[:, :3, :4], big_table[:, ::-2]
    assert not any(one.flags.c_contiguous for one in (x, residual, table))
    expected = single_operations(*(np.ascontiguousarray(one) for one in (x, residual, table)))
    for found, one in zip(single_operations(x, residual, table), expected, strict=True):
        demand_bits(found, one)
        assert found.shape[:3] == (3, 3, 4)
    flat = single_operations(*(one.reshape(9, *one.shape[2:]) for one in (x, residual, table)))
    for found, one in zip(flat, expected, strict=True):
        demand_bits(found.reshape(one.shape), one)
    weight, norm_weight = random_bf16(4, 128, 24)[::-2, ::3], random_bf16(5, 16)[::-2]
    demand_bits(cufuse.linear(x[..., :8], weight, k_slices=1), cufuse.linear(x[..., :8].copy(), weight.copy(), k_slices=1))
    demand_bits(cufuse.rms_norm(x[..., :8], norm_weight), cufuse.rms_norm(x[..., :8].copy(), norm_weight.copy()))
    one_row = x[0, 0, 0]
    demand_bits(cufuse.rms_norm(one_row, random_bf16(7, 64)), cufuse.rms_norm(one_row[None], random_bf16(7, 64))[0])
    demand_bits(cufuse.linear(one_row, weight[:, :1].repeat(64, 1), k_slices=1).reshape(1, -1),
                cufuse.linear(one_row[None], weight[:, :1].repeat(64, 1), k_slices=1))  # fmt: skip


def test_no_rows() -> None:
    x = random_bf16(1, 0, 4, 64)
    shapes = [one.shape for one in single_operations(x, x, np.zeros((0, 64), BF16))]
    assert shapes == [(0, 4, 64), (0, 4, 64), (0, 4, 64), (0, 4, 24), (0, 4, 64), (0, 4, 64)]


def test_out_of_any_strides() -> None:
    x, residual, weight = random_bf16(1, 5, 64), random_bf16(2, 5, 64), random_bf16(3, 64)
    table = random_bf16(4, 5, 64)
    heads = x[:, None]
    expected = [
        cufuse.rms_norm(x, weight),
        *cufuse.add_rms_norm(x, residual, weight),
        cufuse.linear(x, x, recipe="float32"),
        *cufuse.rope(heads, heads, table, table),
    ]
    buffers = [np.zeros((2 * one.shape[0], *one.shape[1:-1], 3 * one.shape[-1]), one.dtype) for one in expected]
    outs = [buffer[::-2, ..., 1::3] for buffer in buffers]
    assert cufuse.rms_norm(x, weight, out=outs[0]) is outs[0]
    for found, given in zip(cufuse.add_rms_norm(x, residual, weight, out=(outs[1], outs[2])), outs[1:3], strict=True):
        assert found is given
    assert cufuse.linear(x, x, recipe="float32", out=outs[3]) is outs[3]
    for found, given in zip(cufuse.rope(heads, heads, table, table, out=(outs[4], outs[5])), outs[4:], strict=True):
        assert found is given
    for out, one, buffer in zip(outs, expected, buffers, strict=True):
        demand_bits(out, one)
        out[...] = 0
        assert not buffer.any(), "written beside the view"
    normalised = np.zeros_like(x)
    demand_bits(cufuse.add_rms_norm(x, residual, weight, out=(normalised, None))[1], expected[2])
    demand_bits(normalised, expected[1])
