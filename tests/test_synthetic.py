"""The numbers of synthetic checkpoints: pinned bits, and a witness in Python integers and fractions."""

import hashlib
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

from cufuse._synthetic_weights import checkpoint_tensors
from cufuse.checkpoint import QWEN3
from cufuse.synthetic import (
    DOCUMENTED_K_NORM_MAXIMA,
    K_NORM_MAXIMA,
    synthetic_embedding,
    synthetic_layer,
)
from tests.checkpoint_files import FIELDS, codes, digests, write_small

# the numbers


def words(name, model="qwen3-0.6b", seed=0):
    """PCG64 XSL RR 128/64 (O'Neill 2014, section 6.3) in Python integers."""
    digest = hashlib.sha256(f"cufuse.synthetic/1|{model}|{seed}|{name}".encode()).digest()
    state, increment = int.from_bytes(digest[:16], "little"), int.from_bytes(digest[16:], "little") | 1
    while True:
        state = (state * 0x2360ED051FC65DA44385DF649FCCF645 + increment) % (1 << 128)
        low, rotation = (state >> 64) ^ (state & ((1 << 64) - 1)), state >> 122
        yield ((low >> rotation) | (low << (64 - rotation))) & ((1 << 64) - 1)


def fields(word):
    return [(word >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]


def rounded(value, significand):
    """A normal number, rounded to nearest even to so many significand bits."""
    value = Fraction(value)
    if not value:
        return value
    exponent = 0
    while abs(value) >= 2 ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - significand + 1)
    return round(value / unit) * unit  # Python rounds a Fraction half to even


@pytest.mark.parametrize(
    ("field", "name", "deviation"),
    [("q_proj", "q_proj", 0.03), ("k_proj", "k_proj", 0.03), ("v_proj", "v_proj", 0.02)],
)
def test_matrix_against_fractions(field, name, deviation):
    found = getattr(synthetic_layer("qwen3-0.6b", 3, 5), field).reshape(-1)[:2000]
    stream = words(f"model.layers.3.self_attn.{name}.weight", seed=5)
    # the scale is a float32 constant: deviation over that of a sum of four numbers uniform in 0..65535
    scale = Fraction(float(np.float32(deviation / ((65536**2 - 1) / 3) ** 0.5)))
    expected = [rounded(rounded((sum(fields(next(stream))) - 131_070) * scale, 24), 8) for _ in range(2000)]
    assert [Fraction(float(weight)) for weight in found] == expected


def test_embedding_against_fractions():
    stream = words("model.embed_tokens.weight", "qwen3-1.7b", 9)
    scale = Fraction(float(np.float32(0.027 / ((65536**2 - 1) / 3) ** 0.5)))
    expected = [rounded(rounded((sum(fields(next(stream))) - 131_070) * scale, 24), 8) for _ in range(4096)]
    found = synthetic_embedding("qwen3-1.7b", [1, 0, 1], 9)
    assert [Fraction(float(weight)) for weight in found[1]] == expected[:2048]
    assert [Fraction(float(weight)) for weight in found[0]] == expected[2048:]
    np.testing.assert_array_equal(codes(found)[0], codes(found)[2])


@pytest.mark.parametrize(
    ("field", "name", "count", "least", "width", "share", "factor"),
    [
        ("input_norm", "input_layernorm", 1024, Fraction(1, 8), Fraction(11, 8), Fraction(1, 64), 6),
        ("q_norm", "self_attn.q_norm", 128, 1, 2, Fraction(1, 32), 4),
    ],
)
def test_norms_against_fractions(field, name, count, least, width, share, factor):
    stream = words(f"model.layers.0.{name}.weight")
    expected = []
    for _ in range(count):
        first, second, _, _ = fields(next(stream))
        weight = rounded(least + rounded(width * Fraction(first, 65536), 24), 24)
        expected.append(rounded(rounded(weight * factor, 24) if Fraction(second, 65536) < share else weight, 8))
    found = getattr(synthetic_layer(), field)
    assert [Fraction(float(weight)) for weight in found] == expected
    assert sum(weight > (4 if field == "q_norm" else 2) for weight in expected) > 0


def test_k_norm_against_fractions():
    for layer, maximum in ((0, 96.5), (5, 34.0), (27, 6.0), (40, 6.0)):
        stream = words(f"model.layers.{layer}.self_attn.k_norm.weight")
        drawn = [fields(next(stream)) for _ in range(128)]
        width = Fraction(float(np.float32(1.6)))
        weights = [rounded(1 + rounded(width * Fraction(first, 65536), 24), 24) for first, *_ in drawn]
        tail = sorted(range(128), key=lambda channel: drawn[channel][1])[:6]
        for channel, part in zip(tail, (1, 0.30, 0.19, 0.12, 0.075, 0.047), strict=True):
            large = rounded(Fraction(float(np.float32(part))) * Fraction(maximum), 24)
            weights[channel] = max(large, weights[channel] / 2)
        found = synthetic_layer(layer=layer).k_norm
        assert [Fraction(float(weight)) for weight in found] == [rounded(weight, 8) for weight in weights]
        assert float(found.max()) == maximum


def test_documented_k_norms():
    assert DOCUMENTED_K_NORM_MAXIMA == {0: 96.5, 1: 44.5, 2: 44.0, 4: 41.75, 5: 34.0}
    assert len(K_NORM_MAXIMA) == 28
    assert sum(maximum > 10 for maximum in K_NORM_MAXIMA) == 16
    statistics = {0: (3.56, 9.13), 1: (2.34, 3.98), 2: (2.47, 3.94)}
    for index, maximum in enumerate(K_NORM_MAXIMA):
        weights = synthetic_layer(layer=index).k_norm.astype(np.float64) if index < 6 else None
        assert maximum == DOCUMENTED_K_NORM_MAXIMA.get(index, maximum)
        assert index in DOCUMENTED_K_NORM_MAXIMA or maximum < 34.0
        assert maximum == float(ml_dtypes.bfloat16(maximum))
        assert weights is None or weights.max() == maximum
        if index in statistics:
            mean, deviation = statistics[index]
            assert weights.mean() == pytest.approx(mean, rel=0.15)
            assert weights.std() == pytest.approx(deviation, rel=0.05)


def test_scales():
    layer = synthetic_layer("qwen3-0.6b", 1, 2)
    for weights, deviation in ((layer.q_proj, 0.03), (layer.k_proj, 0.03), (layer.v_proj, 0.02)):
        values = weights.astype(np.float64)
        assert values.std() == pytest.approx(deviation, rel=0.01)
        assert abs(values.mean()) < deviation / 200
        assert abs(np.corrcoef(values[:, 0], values[:, 1])[0, 1]) < 0.1
    assert synthetic_embedding("qwen3-0.6b", range(100)).astype(np.float64).std() == pytest.approx(0.027, rel=0.01)


PINNED_FILES = {
    "README.md": "9004f21208366017",
    "config.json": "a19882b2e719b5d2",
    "model.safetensors": "75daac7bac36c0d0",
}


def test_a_seed_is_pinned(tmp_path):
    """If this fails, seeds no longer mean the same weights: change WRITER's number and say so to the users."""
    layer = synthetic_layer("qwen3-0.6b", 0, 0)
    digest = hashlib.sha256(b"".join(codes(getattr(layer, field)).astype("<u2").tobytes() for field in FIELDS))
    assert digest.hexdigest()[:32] == "5757fb77e1dcf63ce000078d1d924b56"
    assert digests(write_small(tmp_path / "small")) == PINNED_FILES


def test_seed_model_and_layer_matter():
    seen = set()
    for arguments in (("qwen3-0.6b", 0, 0), ("qwen3-0.6b", 0, 1), ("qwen3-0.6b", 1, 0), ("qwen3-1.7b", 0, 0)):
        layer = synthetic_layer(*arguments)
        for field in ("q_proj", "k_proj", "v_proj", "input_norm"):
            seen.add(codes(getattr(layer, field)).reshape(-1)[:64].tobytes())
    assert len(seen) == 16


# the models


@pytest.mark.parametrize(
    ("model", "parameters"),
    [  # as published with the models on huggingface.co
        ("qwen3-0.6b", 596_049_920),
        ("qwen3-1.7b", 1_720_574_976),
        ("qwen3-4b", 4_022_468_096),
        ("qwen3-8b", 8_190_735_360),
        ("qwen3-14b", 14_768_307_200),
        ("qwen3-32b", 32_762_123_264),
    ],
)
def test_number_of_parameters(model, parameters):
    tensors = list(checkpoint_tensors(QWEN3[model], model, 0, True, False))
    assert sum(tensor.size for tensor in tensors) == 2 * parameters
