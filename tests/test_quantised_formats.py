"""Block formats: gguf's bits in both directions, a scalar reading of the layouts, packing for kernels, and misuse."""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cufuse
from cufuse import quantised
from cufuse.quantised import FORMATS, QuantisedWeight, encode, formats, tiles
from tests.quantised_weights import random_weight
from tests.witnesses import demand_bits

SCALES = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}
EVERY_HALF = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)


def gguf() -> Any:
    """The package that the bits are promised for."""
    return pytest.importorskip("gguf")


@pytest.mark.parametrize("name", FORMATS)
def test_dequantise_has_gguf_bits_for_every_scale(name: str) -> None:
    """All 2^16 float16 scales, NaN and infinities among them, over random integers: 0 differing bits."""
    form, package = FORMATS[name], gguf()
    rng = np.random.default_rng(1)
    for place in SCALES[name]:
        blocks = rng.integers(0, 256, (1 << 16, form.size), np.uint8)
        blocks[:, place : place + 2] = EVERY_HALF
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # gguf's own: invalid values
            expected = package.quants.dequantize(blocks, package.GGMLQuantizationType[name])
        weight = QuantisedWeight(blocks, name, (1 << 16, form.values))
        demand_bits(quantised.dequantise(weight), expected, name)
        assert np.isnan(expected).any()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("code", [0x00, 0xFF, 0x80, 0x7F, 0x0F, 0xF0])
def test_dequantise_has_gguf_bits_for_uniform_blocks(name: str, code: int) -> None:
    form, package = FORMATS[name], gguf()
    blocks = np.full((3, 2 * form.size), code, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = package.quants.dequantize(blocks, package.GGMLQuantizationType[name])
    demand_bits(formats.decode(blocks, form), expected, name)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0"])
def test_quantise_has_gguf_bits(name: str) -> None:
    rng = np.random.default_rng(2)
    ties = rng.integers(-40, 40, (50, 512)).astype(np.float32) / np.float32(4)
    inputs = {
        "bell": rng.standard_normal((64, 1024)).astype(np.float32),
        "small": (rng.standard_normal((64, 512)) * 1e-8).astype(np.float32),
        "subnormal": rng.integers(0, 1 << 20, (16, 512), np.uint32).view(np.float32),
        "ties": ties,
        "zeros": np.zeros((2, 64), np.float32),
        "large": (rng.standard_normal((16, 512)) * 1e30).astype(np.float32),
        "bfloat16": rng.standard_normal((32, 512)).astype(cufuse.bfloat16).astype(np.float32),
    }
    package = gguf()
    for what, x in inputs.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            expected = package.quants.quantize(x, package.GGMLQuantizationType[name])
        demand_bits(encode.encode(x, FORMATS[name]), expected, f"{name}, {what}")
    weight = inputs["bell"].astype(cufuse.bfloat16)
    demand_bits(quantised.quantise(weight, name.lower()).data, encode.encode(weight.astype(np.float32), FORMATS[name]))


def scalar_weight(block: bytes, name: str, k: int) -> tuple[float, int, float]:
    """(d, integer times its byte of scale, minimum's part): the layout read one weight at a time, from ggml's C."""

    def half(at: int) -> float:
        return float(np.frombuffer(block[at : at + 2], "<f2")[0])

    if name == "Q4_0":
        byte = block[2 + k % 16]
        return half(0), (byte & 15 if k < 16 else byte >> 4) - 8, 0.0
    if name == "Q8_0":
        return half(0), int.from_bytes(block[2 + k : 3 + k], "little", signed=True), 0.0
    if name == "Q4_K":
        j, s = k // 32, block[4:16]
        if j < 4:
            scale, minimum = s[j] & 63, s[j + 4] & 63
        else:
            scale, minimum = s[j + 4] & 15 | (s[j - 4] >> 6) << 4, s[j + 4] >> 4 | (s[j] >> 6) << 4
        byte = block[16 + k // 64 * 32 + k % 32]
        return half(0), scale * (byte >> 4 if k % 64 >= 32 else byte & 15), half(2) * minimum
    n, rest = divmod(k, 128)
    low = block[n * 64 + rest % 64] >> 4 * (rest // 64) & 15
    high = block[128 + n * 32 + rest % 32] >> 2 * (rest // 32) & 3
    scale = int.from_bytes(block[192 + k // 16 : 193 + k // 16], "little", signed=True)
    return half(208), scale * ((low | high << 4) - 32), 0.0


@pytest.mark.parametrize("name", FORMATS)
def test_layouts_one_weight_at_a_time(name: str) -> None:
    """d times integers is exact in float64 for these; the float32 results are that, rounded (Q4_K: the difference of two such)."""
    form = FORMATS[name]
    weight = random_weight(name, 4, 2 * form.values, 7)
    values = quantised.dequantise(weight)
    for row in range(4):
        for k in range(2 * form.values):
            block = weight.data[row, k // form.values * form.size :][: form.size].tobytes()
            d, integer, minimum = scalar_weight(block, name, k % form.values)
            assert values[row, k] == np.float32(np.float64(d) * integer - minimum), (row, k)


@given(st.sampled_from(list(FORMATS)), st.integers(1, 40), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=60)
def test_packing_loses_nothing(name: str, rows: int, blocks: int, seed: int) -> None:
    form = FORMATS[name]
    data = np.random.default_rng(seed).integers(0, 256, (rows, blocks * form.size), np.uint8)
    weight = QuantisedWeight(data, form, (rows, blocks * form.values))
    packed = weight.packed()
    assert packed.layout == "tiles"
    assert packed.packed() is packed
    demand_bits(packed.unpacked().data, data)
    assert weight.unpacked() is weight


def test_fragments_lie_where_the_tensor_core_wants_them() -> None:
    """The low half of byte 0 of lane 4 g + t is row g at k = 2 t, its high half row g + 8; two bytes on k = 2 t + 1."""
    blocks = np.zeros((16, 18 * 2), np.uint8)
    weight = QuantisedWeight(blocks, "Q4_0", (16, 64))
    for row, k in ((3, 4), (11, 4), (3, 5), (3, 12), (3, 20), (0, 32)):
        marked = blocks.copy()
        marked[row, 18 * (k // 32) + 2 + k % 16] = 15 if k % 32 < 16 else 240
        (place,) = np.flatnonzero(QuantisedWeight(marked, "Q4_0", (16, 64)).packed().data != weight.packed().data)
        lane, byte = divmod(int(place), 16)
        step, inside = divmod(byte, 4)
        assert lane == 4 * (row % 8) + k % 8 // 2
        assert step == k // 16
        assert inside == 2 * (k % 2) + k % 16 // 8
        value = QuantisedWeight(marked, "Q4_0", (16, 64)).packed().data.reshape(-1)[place]
        assert value == (15 if row < 8 else 240)


def test_own_quantisers_are_within_a_step() -> None:
    """Half a step of a group's range, and what the scales' own rounding adds."""
    x = np.random.default_rng(3).standard_normal((32, 1024)).astype(np.float32)
    for name, step in (("Q4_K", 1 / 15), ("Q6_K", 1 / 32)):
        back = quantised.dequantise(quantised.quantise(x, name))
        reach = np.abs(x).reshape(32, -1, FORMATS[name].group).max(axis=2).repeat(FORMATS[name].group, axis=1)
        assert (np.abs(back - x) <= 1.7 * reach * step).all(), name
        assert not quantised.dequantise(quantised.quantise(np.zeros((2, 256), np.float32), name)).any()


def test_errors_of_the_formats_rank_as_their_bytes() -> None:
    x = np.random.default_rng(4).standard_normal((64, 1024)).astype(np.float32)
    errors = {name: float(np.square(quantised.dequantise(quantised.quantise(x, name)) - x).mean()) for name in FORMATS}
    assert errors["Q8_0"] < errors["Q6_K"] < errors["Q4_K"] < errors["Q4_0"]


def test_dequantise_writes_and_rounds() -> None:
    weight = random_weight("Q6_K", 3, 512)
    values = quantised.dequantise(weight)
    out = np.empty((3, 512), cufuse.bfloat16)
    assert quantised.dequantise(weight, dtype=cufuse.bfloat16, out=out) is out
    demand_bits(out, cufuse.round_to_bf16(values))
    demand_bits(quantised.dequantise(weight.packed()), values)


def test_concatenating() -> None:
    a, b = random_weight("Q4_0", 3, 64), random_weight("Q4_0", 18, 64, 1)
    both = quantised.concatenate([a, b.packed()])
    assert both.shape == (21, 64)
    demand_bits(both.data, np.concatenate([a.data, b.data]))
    with pytest.raises(ValueError, match=r"weights\[1\] is Q8_0 \(4, 64\).*tuple of three"):
        quantised.concatenate([a, random_weight("Q8_0", 4, 64)])
    with pytest.raises(ValueError, match="weights is empty"):
        quantised.concatenate([])


BLOCKS = np.zeros((2, 36), np.uint8)
MISUSE = [
    (lambda: QuantisedWeight(BLOCKS, "Q5_K", (2, 64)), ValueError, "format is 'Q5_K'; known are Q4_0"),
    (lambda: QuantisedWeight(BLOCKS, 3, (2, 64)), TypeError, "format is a int"),
    (lambda: QuantisedWeight(BLOCKS, "Q4_0", (2, 60)), ValueError, "rows of 60 weights are no whole blocks"),
    (lambda: QuantisedWeight(BLOCKS[:, :-1], "Q4_0", (2, 64)), ValueError, r"data has shape \(2, 35\).*needs \(2, 36\)"),
    (lambda: QuantisedWeight(BLOCKS[:1], "Q4_0", (2, 64)), ValueError, r"data has shape \(1, 36\)"),
    (lambda: QuantisedWeight(BLOCKS.view(np.int8), "Q4_0", (2, 64)), TypeError, "data has dtype int8"),
    (lambda: QuantisedWeight([1], "Q4_0", (2, 64)), TypeError, "data is a builtins.list"),
    (lambda: QuantisedWeight(BLOCKS, "Q4_0", (0, 64)), ValueError, "shape is"),
    (lambda: QuantisedWeight(BLOCKS, "Q4_0", (2, 64), "rows"), ValueError, "layout is 'rows'"),  # type: ignore[arg-type]
    (lambda: QuantisedWeight(BLOCKS, "Q4_0", (2, 64), "tiles"), ValueError, r"needs \(1, 1, 576\)"),
    (lambda: quantised.quantise(np.zeros((2, 33), np.float32), "Q4_0"), ValueError, "rows of 33 weights"),
    (lambda: quantised.quantise(np.zeros((2, 64)), "Q4_0"), TypeError, "weight has dtype float64"),
    (lambda: quantised.quantise(np.zeros(64, np.float32), "Q4_0"), ValueError, r"weight has shape \(64,\)"),
    (lambda: quantised.dequantise(BLOCKS), TypeError, "weight is a ndarray; needed is a QuantisedWeight"),
    (lambda: quantised.dequantise(QuantisedWeight(BLOCKS, "Q4_0", (2, 64)), dtype=np.float16), TypeError, "dtype is float16"),
]


@pytest.mark.parametrize(("call", "error", "message"), MISUSE)
def test_misuse(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_pieces_are_whole_units_of_sixteen_bytes() -> None:
    assert [tiles.piece_bytes(form) for form in FORMATS.values()] == [576, 1088, 2368, 3360]
    assert [form.bits for form in FORMATS.values()] == [4.5, 8.5, 4.5, 6.5625]
