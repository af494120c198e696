"""The oracle against rational arithmetic: its one rounding, its exactly rounded sums, and the bounds it states."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cufuse
from cufuse import oracle
from tests.witnesses import bits, demand_bits, exact, from_codes, random_bf16, round_to_bf16

U = Fraction(1, 2**53)


def norm_errors(found: np.ndarray, z: np.ndarray, weight: np.ndarray, eps: float, offset: float = 0.0) -> list[Fraction]:
    """(found / true)**2 - 1 for every element: the true norm has a root in it, its square is a fraction."""
    errors = []
    scale = [w + Fraction(offset) for w in exact(weight)]
    for row, values in zip(exact(found), exact(z), strict=True):
        mean = sum(value * value for value in values) / len(values) + Fraction(eps)
        for y, value, w in zip(row, values, scale, strict=True):
            assert (y > 0) == (value * w > 0)
            assert (y == 0) == (value * w == 0)
            if y:
                errors.append(abs(y * y * mean / (value * w) ** 2 - 1))
    return errors


def squared(bound: Fraction) -> Fraction:
    """A relative error's bound as one of the squares."""
    return (1 + bound) ** 2 - 1


@given(st.floats(width=64, allow_nan=False, allow_infinity=False))
def test_rounded_is_one_rounding(value: float) -> None:
    expected = round_to_bf16(Fraction(value)) | (0x8000 if math.copysign(1, value) < 0 else 0)
    assert bits(oracle.rounded(np.array([value]))).item() == expected


def test_rounded_beside_every_tie() -> None:
    """One unit of float64 beside the middle of every pair of neighbours, where a cast by way of float32 goes wrong."""
    heads = np.arange(1, 0x7F7F)
    ties = (from_codes(heads).astype(np.float64) + from_codes(heads + 1).astype(np.float64)) / 2
    demand_bits(oracle.rounded(np.nextafter(ties, 0)), from_codes(heads))
    demand_bits(oracle.rounded(np.nextafter(ties, np.inf)), from_codes(heads + 1))
    demand_bits(oracle.rounded(ties), from_codes(heads + heads % 2))
    twice = np.nextafter(ties, np.inf).astype(ml_dtypes.bfloat16)
    assert (bits(twice) != heads + 1).sum() > 16000, "ml_dtypes no longer rounds float64 twice"


def test_rounded_takes_scalars_and_lists() -> None:
    assert oracle.rounded(1.5) == 1.5
    assert oracle.rounded([1.0, math.nan]).dtype == cufuse.bfloat16
    assert bits(oracle.rounded([math.nan])).item() == 0x7FFF


@pytest.mark.parametrize("k", [1, 3, 64, 1000])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norm_within_its_bound(k: int, offset: float) -> None:
    x, weight = random_bf16(k, 4, k), random_bf16(k + 1, k, scale=30)
    x[1] *= x.dtype.type(2.0**60)
    x[2] = 0
    x[3] = from_codes(np.arange(k) % 127 + 1)  # subnormals
    for eps in (1e-6, 1e-300):
        for by_fsum, k_terms in ((False, k), (True, 1)):
            found = oracle.rms_norm(x, weight, eps=eps, weight_offset=offset, exact=by_fsum)
            assert found.dtype == np.float64
            errors = norm_errors(found, x, weight, eps, offset)
            assert max(errors) <= squared((Fraction(k_terms, 2) + 4) * U)
    wrong = oracle.rms_norm(x, weight, eps=1e-6, weight_offset=offset) * (1 + (k / 2 + 6) * 2.0**-53)
    assert max(norm_errors(wrong, x, weight, 1e-6, offset)) > squared((Fraction(k, 2) + 4) * U), "the bound notices nothing"


def test_norm_of_a_residual_sum() -> None:
    """Sums of two bfloat16 of like size are exact in float64."""
    x, residual, weight = random_bf16(1, 3, 32), random_bf16(2, 3, 32), random_bf16(3, 32)
    total = x.astype(np.float64) + residual.astype(np.float64)
    assert [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(exact(x), exact(residual), strict=True)] == exact(total)
    found = oracle.rms_norm(x, weight, residual=residual)
    assert max(norm_errors(found, total, weight, 1e-6)) <= squared((Fraction(32, 2) + 4) * U)


def test_norm_keeps_leading_axes_and_special_values() -> None:
    x, weight = random_bf16(5, 2, 3, 16), random_bf16(6, 16)
    for by_fsum in (False, True):
        found = oracle.rms_norm(x, weight, exact=by_fsum)
        assert found.shape == x.shape
        demand_bits(found[1, 2], oracle.rms_norm(x[1, 2], weight, exact=by_fsum))
    x[0, 0, 0] = np.inf
    assert np.isnan(oracle.rms_norm(x, weight)[0, 0, 0])
    assert (oracle.rms_norm(x, weight)[0, 0, 1:] == 0).all()
    with pytest.raises((ValueError, OverflowError)):
        oracle.linear(np.array([[np.inf, -np.inf]]), np.ones((1, 2)), exact=True)


def cancelling(seed: int, m: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Products that cancel but for a small remainder, spread over many binades."""
    rng = np.random.default_rng(seed)
    half = np.ldexp(rng.standard_normal((m, k // 2)), rng.integers(-20, 21, (m, k // 2))).astype(ml_dtypes.bfloat16)
    x = np.concatenate([half, -half], axis=1)
    column = random_bf16(seed + 1, n, k // 2)
    weight = np.concatenate([column, column], axis=1)
    weight[:, ::7] = random_bf16(seed + 2, n, k)[:, ::7] * weight.dtype.type(2.0**-20)
    return x, weight


@pytest.mark.parametrize("k", [2, 64, 1000])
def test_exact_products_are_rounded_once(k: int) -> None:
    x, weight = cancelling(k, 5, 6, k)
    products = [[a * b for a, b in zip(row, column, strict=True)] for row in exact(x) for column in exact(weight)]
    truth = [sum(terms) for terms in products]
    found = oracle.linear(x, weight, exact=True)
    demand_bits(found.reshape(-1), np.array([float(value) for value in truth]))
    plain = oracle.linear(x, weight)
    for value, true, terms in zip(plain.ravel().tolist(), truth, products, strict=True):
        assert abs(Fraction(value) - true) <= (k + 1) * U * sum(map(abs, terms))
    if k == 1000:
        assert (plain != found).any(), "nothing cancels here: float64's order should show"


def test_products_of_leading_axes() -> None:
    x, weight = random_bf16(1, 2, 3, 16), random_bf16(2, 5, 16)
    for by_fsum in (False, True):
        found = oracle.linear(x, weight, exact=by_fsum)
        assert found.shape == (2, 3, 5)
        assert found[1, 2, 4] == pytest.approx(float(sum(a * b for a, b in zip(exact(x[1, 2]), exact(weight[4]), strict=True))))
        assert oracle.linear(x[:0], weight, exact=by_fsum).size == 0


def test_a_near_tie_is_decided_by_the_exact_sum() -> None:
    """1 + 2**-8 is halfway between two bfloat16: what is 2**-40 beyond it decides, and float32 would not hold it."""
    x = np.array([[1, 2.0**-8, 2.0**-40]], ml_dtypes.bfloat16)
    weight = np.array([[1, 1, 1], [1, 1, -1], [1, 1, 0]], ml_dtypes.bfloat16)
    found = oracle.linear(x, weight, exact=True)
    assert bits(oracle.rounded(found)).tolist() == [[0x3F81, 0x3F80, 0x3F80]]
    assert bits(found.astype(np.float32).astype(ml_dtypes.bfloat16)).tolist() == [[0x3F80, 0x3F80, 0x3F80]]


def test_rotation() -> None:
    cos, sin = oracle.rope_angles(np.arange(6).reshape(2, 3), 8, base=10000.0)
    assert cos.shape == sin.shape == (2, 3, 8)
    for position in range(6):
        for i in range(4):
            angle = position * 10000.0 ** (-2 * i / 8)
            at = (*divmod(position, 3), i)
            assert cos[at] == cos[*at[:2], i + 4] == pytest.approx(math.cos(angle), abs=2e-15)
            assert sin[at] == sin[*at[:2], i + 4] == pytest.approx(math.sin(angle), abs=2e-15)
    x = random_bf16(9, 2, 3, 5, 8)
    found = oracle.rope(x, cos, sin)
    for place in np.ndindex(2, 3, 5):
        for i in range(4):
            a, b, first, second = (Fraction(float(one[*place, at])) for one in (x, found) for at in (i, i + 4))
            c, s = (Fraction(float(table[*place[:2], i])) for table in (cos, sin))
            bound = 4 * U * (abs(a) + abs(b))  # two products and a sum are rounded
            assert abs(first - (a * c - b * s)) <= bound
            assert abs(second - (b * c + a * s)) <= bound


def test_stages_are_the_single_steps() -> None:
    x, norm_weight, head_weight = random_bf16(1, 4, 32), random_bf16(2, 32), random_bf16(3, 8)
    weights = tuple(random_bf16(seed, rows, 32) for seed, rows in ((4, 16), (5, 8), (6, 8)))
    cos, sin = oracle.rope_angles(np.arange(4), 8)
    found = oracle.qkv_stages(x, norm_weight, weights, head_weight, head_weight, 8, cos=cos, sin=sin)
    assert set(found) == {"normalised", "q", "k", "v", "q_normed", "k_normed", "q_rotated", "k_rotated"}
    y = oracle.rms_norm(x, norm_weight)
    k = oracle.linear(y, weights[1]).reshape(4, 1, 8)
    demand_bits(found["k"], k)
    demand_bits(found["k_rotated"], oracle.rope(oracle.rms_norm(k, head_weight), cos, sin))
    demand_bits(found["v"], oracle.linear(y, weights[2]).reshape(4, 1, 8))
    bare = oracle.qkv_stages(x, norm_weight, weights, None, None, 8, weight_offset=1.0)
    assert set(bare) == {"normalised", "q", "k", "v"}
    demand_bits(bare["normalised"], oracle.rms_norm(x, norm_weight, weight_offset=1.0))
