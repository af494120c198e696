"""Products with quantised weights on NumPy: against slow simulators that share no code with them, and as one operation."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import gemm, quantised
from cufuse.emulation import tensor_core
from cufuse.quantised import FORMATS, QuantisedWeight, quantised_linear
from cufuse.recipe import Gemm
from tests.quantised_weights import random_weight
from tests.test_quantised_formats import scalar_weight
from tests.witnesses import demand_bits, random_bf16

F = np.float32
BLOCK_SCALED = Gemm(input="float32", k_slices=1, output="float32", quantised="block-scaled")
Q8_1 = Gemm(input="float32", k_slices=1, output="float32", quantised="q8_1")


def fused(a: float, b: float, c: float) -> np.float32:
    """a * b + c with one rounding to nearest even, by rational arithmetic: for finite normal results."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        return F(float(a) * float(b) + float(c))
    exponent = 0
    magnitude = abs(exact)
    while magnitude >= 2:
        magnitude, exponent = magnitude / 2, exponent + 1
    while magnitude < 1:
        magnitude, exponent = magnitude * 2, exponent - 1
    scaled = magnitude * 2**23
    below = scaled.numerator // scaled.denominator
    rest = scaled - below
    below += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and below % 2)
    return F((-1 if exact < 0 else 1) * float(below) * 2.0 ** (exponent - 23))


def block_of(weight: QuantisedWeight, row: int, block: int) -> bytes:
    size = weight.format.size
    return bytes(weight.data[row, block * size : (block + 1) * size])


def block_scaled_by_hand(x: np.ndarray, weight: QuantisedWeight, k_slices: int) -> np.ndarray:
    """The order of cufuse.emulation.block_scaled with tensor_core.reference_block and rational arithmetic."""
    form, (rows, columns) = weight.format, weight.shape
    piece = max(64, form.values)
    pieces = -(-columns // piece)
    per_slice = -(-pieces // k_slices)
    parts = tensor_core.split_float32(x) if x.dtype == np.float32 else (x,)
    out = np.zeros((len(x), rows), np.float32)
    core = tensor_core.TENSOR_CORES["sm_90"]

    def codes(values: list[float]) -> list[int]:
        return [int(code) for code in np.array(values, cufuse.bfloat16).view(np.uint16)]

    def sixteen(part: np.ndarray, m: int, k: int, integers: list[float], c: int) -> int:
        return tensor_core.reference_block(codes([float(v) for v in part[m, k : k + 16]]), codes(integers), c, core=core)

    def as_float(code: int) -> float:
        return float(np.uint32(code).view(np.float32))

    for m in range(len(x)):
        for n in range(rows):
            total = None
            for first in range(0, pieces, per_slice):
                acc = F(0)
                for k in range(first * piece, min(columns, (first + per_slice) * piece), form.group):
                    block, inside = divmod(k, form.values)
                    raw = block_of(weight, n, block)
                    d, _, minimum = scalar_weight(raw, form.name, inside)
                    integers, scale = plain_integers(raw, form.name, inside, form.group)
                    c = s = 0
                    for step in range(0, form.group, 16):
                        for part in parts:
                            c = sixteen(part, m, k + step, integers[step : step + 16], c)
                            s = sixteen(part, m, k + step, [1.0] * 16, s)
                    acc = fused(F(d * scale), as_float(c), acc)
                    if form.name == "Q4_K":
                        acc = fused(F(-minimum), as_float(s), acc)
                total = acc if total is None else F(total + acc)
            out[m, n] = total
    return out


def plain_integers(raw: bytes, name: str, first: int, count: int) -> tuple[list[float], int]:
    """The integers of a group as they are multiplied, and the byte that multiplies d."""
    if name in ("Q4_0", "Q8_0"):
        return [float(scalar_weight(raw, name, first + i)[1]) for i in range(count)], 1
    if name == "Q6_K":
        scale = int.from_bytes(raw[192 + first // 16 : 193 + first // 16], "little", signed=True)
        n, rest = divmod(first, 128)
        integers = []
        for i in range(count):
            low = raw[n * 64 + (rest + i) % 64] >> 4 * ((rest + i) // 64) & 15
            high = raw[128 + n * 32 + (rest + i) % 32] >> 2 * ((rest + i) // 32) & 3
            integers.append(float((low | high << 4) - 32))
        return integers, scale
    j, s = first // 32, raw[4:16]
    scale = s[j] & 63 if j < 4 else s[j + 4] & 15 | (s[j - 4] >> 6) << 4
    codes = [raw[16 + (first + i) // 64 * 32 + (first + i) % 32] for i in range(count)]
    return [float(code >> 4 if first % 64 >= 32 else code & 15) for code in codes], scale


@pytest.mark.parametrize("name", FORMATS)
def test_block_scaled_by_hand(name: str) -> None:
    rng = np.random.default_rng(1)
    for columns, k_slices, dtype in ((512, 2, cufuse.bfloat16), (768 if FORMATS[name].values > 32 else 96, 8, np.float32)):
        weight = random_weight(name, 2, columns, 5)
        x = rng.standard_normal((2, columns)).astype(dtype)
        demand_bits(gemm.project(x, weight, BLOCK_SCALED, k_slices), block_scaled_by_hand(x, weight, k_slices), name)


def mmvq_by_hand(x: np.ndarray, weight: QuantisedWeight) -> np.ndarray:
    """mul_mat_vec_q thread by thread, from ggml-cuda's mmvq.cu and vecdotq.cuh, for up to eight rows of x."""
    name = weight.format.name
    threads = 128 if len(x) <= 4 else 64
    vdr, qi = {"Q4_0": (2, 4), "Q8_0": (2, 8), "Q4_K": (2, 32), "Q6_K": (1, 32)}[name]
    blocks = weight.shape[1] // weight.format.values
    out = np.zeros((len(x), weight.shape[0]), np.float32)
    for m, row in enumerate(x):
        q8, d8, s8 = q8_1_by_hand(row)
        for n in range(weight.shape[0]):
            partial = []
            for thread in range(threads):
                tmp, kqs = F(0), vdr * (thread % (qi // vdr))
                for kbx in range(thread // (qi // vdr), blocks, vdr * threads // qi):
                    first = kbx * weight.format.values
                    tmp = DOTS[name](block_of(weight, n, kbx), q8[first:], d8[first // 32 :], s8[first // 32 :], kqs, tmp)
                partial.append(tmp)
            lanes = partial[:32]
            for warp in range(1, threads // 32):
                lanes = [F(a + b) for a, b in zip(lanes, partial[32 * warp :], strict=False)]
            for offset in (16, 8, 4, 2, 1):
                lanes = [F(lanes[lane] + lanes[lane ^ offset]) for lane in range(32)]
            out[m, n] = lanes[0]
    return out


def q8_1_by_hand(row: np.ndarray) -> tuple[list[int], list[float], list[float]]:
    integers, scales, sums = [], [], []
    for first in range(0, len(row), 32):
        block = [F(v) for v in row[first : first + 32]]
        amax = max(abs(v) for v in block)
        d = F(amax * F(F(1) / F(127)))
        for v in block:
            quotient = Fraction(float(F(v * F(F(1) / d)))) if amax else Fraction(0)
            integers.append((1 if quotient >= 0 else -1) * int(abs(quotient) + Fraction(1, 2)))
        lanes = block
        for offset in (16, 8, 4, 2, 1):
            lanes = [F(lanes[lane] + lanes[lane ^ offset]) for lane in range(32)]
        scales.append(float(np.float16(d)))
        sums.append(float(np.float16(lanes[0])))
    return integers, scales, sums


def half(raw: bytes, at: int) -> float:
    return float(np.frombuffer(raw[at : at + 2], "<f2")[0])


def dot_q4_0(raw: bytes, q: list[int], d8: Any, s8: Any, kqs: int, tmp: np.float32) -> np.float32:
    total = 0
    for i in range(2):
        for byte in range(4 * (kqs + i), 4 * (kqs + i) + 4):
            total += (raw[2 + byte] & 15) * q[byte] + (raw[2 + byte] >> 4) * q[16 + byte]
    return fused(half(raw, 0), fused(total, d8[0], -4 * s8[0]), tmp)


def dot_q8_0(raw: bytes, q: list[int], d8: Any, s8: Any, kqs: int, tmp: np.float32) -> np.float32:
    codes = [int.from_bytes(raw[2 + k : 3 + k], "little", signed=True) for k in range(4 * kqs, 4 * kqs + 8)]
    total = sum(code * q[4 * kqs + i] for i, code in enumerate(codes))
    return fused(F(half(raw, 0) * d8[0]), total, tmp)


def dot_q4_k(raw: bytes, q: list[int], d8: Any, s8: Any, kqs: int, tmp: np.float32) -> np.float32:
    offset, place = 2 * (kqs // 2 // 4), 4 * (kqs // 2 % 4)
    sums_d, sums_m = F(0), F(0)
    for i in range(2):
        dot = ones = 0
        for byte in (*range(place, place + 4), *range(place + 16, place + 20)):
            code = raw[16 + 16 * offset + byte] >> 4 * i & 15
            dot += code * q[32 * (offset + i) + byte]
            ones += q[32 * (offset + i) + byte]
        j, s = offset + i, raw[4:16]
        scale = s[j] & 63 if j < 4 else s[j + 4] & 15 | (s[j - 4] >> 6) << 4
        minimum = s[j + 4] & 63 if j < 4 else s[j + 4] >> 4 | (s[j] >> 6) << 4
        sums_d = fused(d8[offset + i], dot * scale, sums_d)
        sums_m = fused(d8[offset + i], ones * minimum, sums_m)
    return F(tmp + fused(half(raw, 0), sums_d, -F(half(raw, 2) * sums_m)))


def dot_q6_k(raw: bytes, q: list[int], d8: Any, s8: Any, iqs: int, tmp: np.float32) -> np.float32:
    offset = 4 * (iqs // 16) + iqs % 16 // 8
    scale_at, shift = 8 * (iqs // 16) + iqs % 16 // 4, 2 * (iqs % 16 // 8)
    sums = F(0)
    for i in range(2):
        dot = 0
        for byte in range(4):
            low = raw[4 * iqs + byte] >> 4 * i & 15
            high = raw[128 + 4 * (8 * (iqs // 16) + iqs % 8) + byte] >> shift >> 4 * i & 3
            dot += ((low | high << 4) - 32) * q[32 * (offset + 2 * i) + 4 * (iqs % 8) + byte]
        scale = int.from_bytes(raw[192 + scale_at + 4 * i : 193 + scale_at + 4 * i], "little", signed=True)
        sums = fused(d8[offset + 2 * i], dot * scale, sums)
    return fused(half(raw, 208), sums, tmp)


DOTS = {"Q4_0": dot_q4_0, "Q8_0": dot_q8_0, "Q4_K": dot_q4_k, "Q6_K": dot_q6_k}


@pytest.mark.parametrize("name", FORMATS)
def test_q8_1_by_hand(name: str) -> None:
    rng = np.random.default_rng(2)
    long = 4352 if name in ("Q4_0", "Q8_0") else 2304  # more than one turn of a thread's loop
    for m, columns, rows in ((1, long, 1), (5, 512, 2)):
        weight = random_weight(name, rows, columns, 3)
        x = (rng.standard_normal((m, columns)) * 2).astype(np.float32)
        demand_bits(gemm.project(x, weight, Q8_1, 1), mmvq_by_hand(x, weight), f"{name}, {m} tokens")


def test_more_than_eight_tokens_go_in_calls_of_eight() -> None:
    weight = random_weight("Q4_0", 5, 1024)
    x = np.random.default_rng(3).standard_normal((11, 1024)).astype(np.float32)
    whole = gemm.project(x, weight, Q8_1, 1)
    demand_bits(whole, np.concatenate([gemm.project(x[:8], weight, Q8_1, 1), gemm.project(x[8:], weight, Q8_1, 1)]))


def test_decoded_is_linear_with_the_rounded_weight() -> None:
    x = random_bf16(1, 3, 512)
    for name in FORMATS:
        weight = random_weight(name, 20, 512)
        rounded = cufuse.round_to_bf16(quantised.dequantise(weight))
        expected = cufuse.linear(x, rounded, k_slices=2)
        demand_bits(quantised_linear(x, weight, recipe="torch", k_slices=2), expected)
        demand_bits(quantised_linear(x, weight.packed(), recipe="torch", k_slices=2), expected)


def test_accuracy_is_what_the_docstring_says() -> None:
    x = np.random.default_rng(4).standard_normal((4, 1024)).astype(np.float32)
    for name in FORMATS:
        weight = random_weight(name, 64, 1024)
        values = quantised.dequantise(weight).astype(np.float64)
        exact = x.astype(np.float64) @ values.T
        size = np.abs(x) @ np.abs(values).T
        assert (np.abs(quantised_linear(x, weight, recipe="float32") - exact) <= 2.0**-17 * size).all()
        assert (np.abs(quantised_linear(x, weight, recipe="separate-k-norm") - exact) <= 2.0**-8 * size).all()
        largest = np.abs(x).reshape(4, -1, 32).max(axis=2).repeat(32, axis=1)
        slack = largest / 127 * 0.51 @ np.abs(values).T + 2.0**-10 * size
        assert (np.abs(quantised_linear(x, weight, recipe="llama.cpp-q8_1") - exact) <= slack).all(), name


def test_special_values() -> None:
    weight = random_weight("Q8_0", 4, 64)
    weight.data[1, :2] = np.array([np.inf], "<f2").view(np.uint8)
    x = np.ones((2, 64), cufuse.bfloat16)
    x[1, 3] = cufuse.bfloat16(np.nan)
    for recipe in ("block-scaled", "torch"):
        y = quantised_linear(x, weight, recipe=recipe, k_slices=1)
        assert (y[1].view(np.uint16) == 0x7FFF).all()
        assert np.isfinite(y[0, [0, 2, 3]].astype(np.float32)).all()
        assert not np.isfinite(y[0, 1].astype(np.float32))
    # llama.cpp's maximum passes over NaN, and Q8_0 needs no sum: the NaN is lost
    assert np.isfinite(quantised_linear(x.astype(np.float32), weight, recipe="llama.cpp-q8_1")[1, [0, 2, 3]]).all()
    q4 = random_weight("Q4_0", 4, 64)
    assert np.isnan(quantised_linear(x.astype(np.float32), q4, recipe="llama.cpp-q8_1")[1]).all()


def test_shapes_out_and_empty() -> None:
    weight = random_weight("Q4_0", 20, 64)
    x = random_bf16(5, 2, 3, 64)
    y = quantised_linear(x, weight)
    assert y.shape == (2, 3, 20)
    assert y.dtype == cufuse.bfloat16
    out = np.empty((2, 3, 20), cufuse.bfloat16)
    assert quantised_linear(x, weight, out=out) is out
    demand_bits(out, y)
    assert quantised_linear(x[:0], weight).shape == (0, 3, 20)
    assert quantised_linear(x[0, 0], weight).shape == (20,)
    demand_bits(quantised_linear(np.asfortranarray(x), weight), y)


WEIGHT = random_weight("Q4_0", 8, 64)
X = np.ones((2, 64), cufuse.bfloat16)
MISUSE = [
    (lambda: quantised_linear(X, X), TypeError, "weight is a ndarray; needed is a QuantisedWeight"),
    (lambda: quantised_linear(X.astype(np.float32), WEIGHT), TypeError, "x has dtype float32; the projection of recipe"),
    (lambda: quantised_linear(X[:, :32], WEIGHT), ValueError, r"x has shape \(2, 32\); needed is \[..., 64\]"),
    (lambda: quantised_linear(X, WEIGHT, k_slices=0), ValueError, "k_slices is 0"),
    (lambda: quantised_linear(X, WEIGHT, recipe="llama.cpp-q8_1", k_slices=2), ValueError, "have none: leave it out"),
    (lambda: quantised_linear(X, WEIGHT, recipe="gguf"), ValueError, "recipe is 'gguf'"),
    (lambda: quantised_linear(X, WEIGHT, out=np.empty((2, 8), np.float32)), TypeError, "out has dtype float32"),
    (lambda: cufuse.linear(X, WEIGHT), TypeError, "QuantisedWeight"),
]


@pytest.mark.parametrize(("call", "error", "message"), MISUSE)
def test_misuse(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def block_inputs(recipe: str, weights: Any) -> dict[str, Any]:
    return {
        "x": random_bf16(1, 5, 512),
        "norm_weight": random_bf16(2, 512).astype(np.float32 if "llama" in recipe else cufuse.bfloat16),
        "qkv_weight": weights,
        "q_norm_weight": random_bf16(3, 64),
        "k_norm_weight": random_bf16(4, 64, scale=40),
        "recipe": recipe,
    }


@pytest.mark.parametrize("recipe", ["block-scaled", "llama.cpp", "llama.cpp-q8_1", "separate-k-norm"])
def test_rms_norm_qkv_is_its_parts(recipe: str) -> None:
    """With formats mixed as Q4_K_M files mix them; v, which nothing follows, is the projection of the normalised rows."""
    weights = (random_weight("Q4_K", 128, 512), random_weight("Q4_K", 64, 512, 1), random_weight("Q6_K", 64, 512, 2))
    given = block_inputs(recipe, weights)
    q, k, v = cufuse.rms_norm_qkv(**given)
    y = cufuse.rms_norm(given["x"], given["norm_weight"], recipe=recipe)
    demand_bits(v.reshape(5, 64), quantised_linear(y, weights[2], recipe=recipe))
    key = quantised_linear(y, weights[1], recipe=recipe).reshape(5, 1, 64)
    if recipe == "block-scaled":
        demand_bits(k, cufuse.rms_norm(key, given["k_norm_weight"], recipe=recipe))
    assert q.shape == (5, 2, 64)


def test_rms_norm_qkv_packed_is_the_three() -> None:
    parts = tuple(random_weight("Q8_0", rows, 512, rows) for rows in (128, 64, 64))
    apart = cufuse.rms_norm_qkv(**block_inputs("block-scaled", parts))
    packed = cufuse.rms_norm_qkv(**block_inputs("block-scaled", quantised.concatenate(parts)), heads=2)
    for one, other in zip(apart, packed, strict=True):
        demand_bits(one, other)


def test_rms_norm_qkv_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match=r"qkv_weight\[0\] has shape \(128, 256\)"):
        cufuse.rms_norm_qkv(**block_inputs("block-scaled", random_weight("Q4_0", 128, 256)), heads=2)
