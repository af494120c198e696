"""Attention: its products by Python integers, its stages, the truth, and the operation's manners."""

import numpy as np
import pytest

import cufuse
from cufuse import oracle
from cufuse.attention import MASKED, STAGES, attention, stages
from cufuse.emulation import tensor_core
from cufuse.softmax import softmax
from tests.witnesses import bits, demand_bits, random_bf16

TORCH = cufuse.recipes["torch"]


def make(tokens: int, keys: int, heads: int = 4, kv_heads: int = 2, size: int = 32, batch: int = 1) -> tuple[np.ndarray, ...]:
    return tuple(
        random_bf16(seed, batch, count, number, size, scale=2.0)
        for seed, (count, number) in enumerate(((tokens, heads), (keys, kv_heads), (keys, kv_heads)))
    )


def by_integers(a: np.ndarray, b: np.ndarray) -> int:
    """The float32 code of a dot product on a tensor core: blocks of 16, by Python integers alone."""
    codes = [bits(x).tolist() + [0] * (-len(x) % 16) for x in (a, b)]
    total = 0
    for start in range(0, len(codes[0]), 16):
        part = slice(start, start + 16)
        total = tensor_core.reference_block(codes[0][part], codes[1][part], total, core="sm_90")
    return total


def rounded(code: int) -> np.ndarray:
    return cufuse.round_to_bf16(np.array([code], np.uint32).view(np.float32))


def test_stages_of_a_small_case_by_integers() -> None:
    q, k, v = make(3, 5)
    found = stages(q, k, v, 32**-0.5, True, TORCH, keep=True)
    assert tuple(found) == STAGES
    for t in range(3):
        for h in range(4):
            row = np.concatenate([rounded(by_integers(q[0, t, h], k[0, s, h // 2])) for s in range(5)])
            demand_bits(found["scores"][0, t, h], row, f"scores of token {t}, head {h}")
            scaled = cufuse.round_to_bf16(row.astype(np.float32) * np.float32(32**-0.5))
            demand_bits(found["scaled_scores"][0, t, h], scaled)
            mask = np.where(np.arange(5) <= 2 + t, np.float32(0), MASKED)
            masked = cufuse.round_to_bf16(scaled.astype(np.float32) + mask)
            demand_bits(found["masked_scores"][0, t, h], masked)
            weights = softmax(masked[None])[0]
            demand_bits(found["weights"][0, t, h], weights)
            assert (weights[3 + t :] == 0).all()
            attended = np.concatenate([rounded(by_integers(weights, v[0, :, h // 2, d])) for d in range(32)])
            demand_bits(found["attended"][0, t, h], attended, f"output of token {t}, head {h}")
    demand_bits(attention(q, k, v), found["attended"])


def test_batches_and_leading_axes() -> None:
    q, k, v = make(4, 6, batch=3)
    found = attention(q, k, v, recipe="batch-invariant")  # cuBLAS's order depends on the batch
    for entry in range(3):
        demand_bits(found[entry], attention(q[entry], k[entry], v[entry], recipe="batch-invariant"))
    out = np.empty_like(found)
    assert attention(q, k, v, recipe="batch-invariant", out=out) is out
    demand_bits(out, found)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("recipe", ["torch", "float32"])
def test_near_the_truth(recipe: str, causal: bool) -> None:
    q, k, v = make(20, 33, size=128)
    found = attention(q, k, v, causal=causal, recipe=recipe).astype(np.float64)
    expected = oracle.attention(q, k, v, causal=causal)
    # scores of size 25 are rounded to bfloat16 twice under "torch": 0.1 in the exponent
    allowed = 0.3 if recipe == "torch" else 0.03
    assert np.abs(found - expected).max() <= allowed * np.abs(expected).max()
    assert attention(q, k, v, recipe=recipe).dtype == (cufuse.bfloat16 if recipe == "torch" else np.float32)


def test_errors() -> None:
    q, k, v = make(3, 5)
    with pytest.raises(TypeError, match="q has dtype float32"):
        attention(q.astype(np.float32), k, v)
    with pytest.raises(ValueError, match="one shape"):
        attention(q, k, v[:, :4])
    with pytest.raises(ValueError, match="multiple of Hkv"):
        attention(q[:, :, :3], k, v)
    with pytest.raises(ValueError, match="6 tokens"):
        attention(make(6, 5)[0], k, v)
    with pytest.raises(ValueError, match="scale is nan"):
        attention(q, k, v, scale=float("nan"))
    with pytest.raises(ValueError, match="tokens, heads, D"):
        attention(q[0, 0], k, v)
    with pytest.raises(ValueError, match="overlaps"):
        attention(q, k, v, out=q)
