"""GGUF files: what gguf's own writer wrote, read back; and files that lie, one line of error each, nothing read out of bounds."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import quantised
from cufuse.checkpoint import CheckpointError
from cufuse.quantised import FORMATS, QuantisedWeight
from cufuse.quantised.gguf_checkpoint import bfloat16_norms
from cufuse.quantised.gguf_file import GgufFile
from tests.quantised_weights import random_weight
from tests.witnesses import demand_bits, random_bf16

HIDDEN, HEAD, HEADS, KV_HEADS, VOCABULARY = 256, 32, 4, 2, 40
SHAPES = {"attn_q": HEADS * HEAD, "attn_k": KV_HEADS * HEAD, "attn_v": KV_HEADS * HEAD}


def gguf() -> Any:
    return pytest.importorskip("gguf")


class Written:
    """A small Qwen3 as gguf.GGUFWriter writes it: two layers, formats by projection."""

    def __init__(self, path: Path, formats: tuple[str, str, str] = ("Q4_K", "Q4_K", "Q6_K"), architecture: str = "qwen3") -> None:
        package = gguf()
        self.path = path
        self.weights: dict[str, Any] = {}
        writer = package.GGUFWriter(path, architecture)
        writer.add_block_count(2)
        writer.add_embedding_length(HIDDEN)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_key_length(HEAD)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(1e6)
        writer.add_token_list([f"token {i}" for i in range(VOCABULARY)])
        writer.add_token_scores([0.5] * VOCABULARY)
        self.add(writer, "token_embd.weight", random_weight("Q6_K", VOCABULARY, HIDDEN, 99))
        for layer in range(2):
            for seed, (name, rows) in enumerate(SHAPES.items()):
                self.add(writer, f"blk.{layer}.{name}.weight", random_weight(formats[seed], rows, HIDDEN, 10 * layer + seed))
            for seed, (name, size) in enumerate({"attn_norm": HIDDEN, "attn_q_norm": HEAD, "attn_k_norm": HEAD}.items()):
                self.add(writer, f"blk.{layer}.{name}.weight", random_bf16(seed + layer, size, scale=9).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    def add(self, writer: Any, name: str, value: Any) -> None:
        self.weights[name] = value
        if isinstance(value, QuantisedWeight):
            writer.add_tensor(name, value.data, raw_dtype=gguf().GGMLQuantizationType[value.format.name])
        else:
            writer.add_tensor(name, value)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def test_a_layer_is_what_was_written(written: Written) -> None:
    with quantised.open_gguf(written.path) as checkpoint:
        assert checkpoint.layers == (0, 1)
        config = checkpoint.config
        assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (256, 4, 2, 32)
        assert (config.rms_norm_eps, config.rope_theta, config.vocab_size, config.name) == (1e-6, 1e6, VOCABULARY, "tiny")
        assert checkpoint.formats[1, "v_proj"] == "Q6_K"
        layer = checkpoint.layer(1)
    for field, name in {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v"}.items():
        found, expected = getattr(layer, field), written.weights[f"blk.1.{name}.weight"]
        assert found.format is expected.format
        assert found.shape == expected.shape
        demand_bits(found.data, expected.data)
    for field, name in {"input_norm": "attn_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}.items():
        demand_bits(getattr(layer, field), written.weights[f"blk.1.{name}.weight"])
    norms, rounded = bfloat16_norms(layer)
    assert rounded == 0
    assert norms["k_norm"].dtype == cufuse.bfloat16


def test_embeddings_are_decoded(written: Written) -> None:
    checkpoint = quantised.open_gguf(written.path)
    rows = checkpoint.embedding([3, 0, 39])
    expected = quantised.dequantise(written.weights["token_embd.weight"])[[3, 0, 39]]
    demand_bits(rows, cufuse.round_to_bf16(expected))
    with pytest.raises(ValueError, match="token_ids holds 40"):
        checkpoint.embedding([40])


def test_every_tensor_as_the_package_reads_it(written: Written) -> None:
    ours = GgufFile(written.path)
    theirs = gguf().GGUFReader(written.path)
    assert set(ours.tensors) == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        entry = ours.tensors[tensor.name]
        assert entry.start == tensor.data_offset
        assert entry.size == tensor.n_bytes
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert entry.type_name == tensor.tensor_type.name
        raw = ours._bytes(tensor.name, entry.start, entry.size)
        demand_bits(raw, np.array(tensor.data).view(np.uint8).reshape(-1))
    del theirs


def test_mixed_formats_stay_apart(written: Written, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights\[2\] is Q6_K.*a packed projection has one format"):
        _ = quantised.open_gguf(written.path).layer(0).qkv_proj
    uniform = quantised.open_gguf(Written(tmp_path / "q8.gguf", ("Q8_0",) * 3).path).layer(0)
    assert uniform.qkv_proj.shape == (256, 256)


def test_plain_types_and_quantised_norms(tmp_path: Path) -> None:
    package = gguf()
    path = tmp_path / "plain.gguf"
    writer = package.GGUFWriter(path, "qwen3")
    half = np.array([[1.5, -2.0, 65504.0, 6e-8] * 8], np.float16)
    narrow = random_bf16(1, 2, 32)
    writer.add_tensor("half", half)
    writer.add_tensor("narrow", narrow.view(np.uint8), raw_dtype=package.GGMLQuantizationType.BF16)
    writer.add_tensor("blocks", random_weight("Q4_0", 1, 32).data, raw_dtype=package.GGMLQuantizationType.Q4_0)
    writer.add_tensor("other", np.zeros((1, 176), np.uint8), raw_dtype=package.GGMLQuantizationType.Q5_K)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(path)
    demand_bits(file.read_weight("half"), half.astype(np.float32))
    demand_bits(file.read_weight("narrow"), narrow)
    demand_bits(file.read_rows("narrow", [1]), narrow[1:].astype(np.float32))
    with pytest.raises(CheckpointError, match="'blocks': type is Q4_0; F32 is needed: norm weights are not quantised"):
        file.read_float32("blocks")
    with pytest.raises(CheckpointError, match=r"'other': type is Q5_K; known are Q4_0, Q8_0, Q4_K, Q6_K, F32.*llama-quantize"):
        file.read_weight("other")
    with pytest.raises(CheckpointError, match="'missing': is missing"):
        file.read_weight("missing")


def plain_file(
    tensors: list[tuple[str, tuple[int, ...], int, int]], data: int, metadata: bytes = b"", count: int | None = None,
    metadata_count: int = 0, version: int = 3, magic: bytes = b"GGUF",
) -> bytes:  # fmt: skip
    """A file by hand: (name, dimensions fastest first, type, offset) and so many bytes of data."""
    text = magic + struct.pack("<IQQ", version, len(tensors) if count is None else count, metadata_count) + metadata
    for name, dimensions, kind, offset in tensors:
        text += struct.pack("<Q", len(name.encode())) + name.encode() + struct.pack("<I", len(dimensions))
        text += struct.pack(f"<{len(dimensions)}Q", *dimensions) + struct.pack("<IQ", kind, offset)
    return text + bytes(-len(text) % 32) + bytes(data)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


GOOD = [("a", (64, 2), 2, 0), ("b", (8,), 0, 96)]
DAMAGES = {
    "another magic": (plain_file(GOOD, 200, magic=b"GGML"), "begins with .*GGML"),
    "another version": (plain_file(GOOD, 200, version=1), "GGUF version is 1"),
    "a big-endian file": (plain_file(GOOD, 200, version=3 << 24), "big-endian"),
    "an empty file": (b"", "magic needs 4 bytes"),
    "half a header": (plain_file(GOOD, 200)[:40], "needs .* bytes"),
    "too many tensors": (plain_file(GOOD, 200, count=1 << 40), "promises 1099511627776 tensors"),
    "more tensors than there are": (plain_file(GOOD, 0, count=3), "needs|dimensions|truncated"),
    "too much metadata": (plain_file(GOOD, 200, metadata_count=1 << 62), "metadata, at most"),
    "a tensor beyond the end": (plain_file([("a", (64, 4), 2, 0)], 143), "truncated, or a lying table"),
    "an offset beyond the end": (plain_file([("a", (64, 2), 2, 1 << 62)], 200), "truncated, or a lying table"),
    "a huge dimension": (plain_file([("a", (64, 1 << 41), 2, 0)], 200), "has dimensions"),
    "a product that overflows": (plain_file([("a", (1 << 35, 1 << 35), 2, 0)], 200), "truncated, or a lying table"),
    "a dimension of zero": (plain_file([("a", (64, 0), 2, 0)], 200), "has dimensions"),
    "no dimensions": (plain_file([("a", (), 0, 0)], 200), "has 0 dimensions"),
    "five dimensions": (plain_file([("a", (1,) * 5, 0, 0)], 200), "has 5 dimensions"),
    "rows that are no whole blocks": (plain_file([("a", (48, 2), 2, 0)], 200), "no whole blocks of Q4_0"),
    "rows no whole block of 256": (plain_file([("a", (128, 2), 12, 0)], 400), "no whole blocks of Q4_K"),
    "one tensor on another": (plain_file([("a", (64, 2), 2, 0), ("b", (8,), 0, 64)], 200), "inside 'a'"),
    "a name twice": (plain_file([GOOD[0], ("a", (8,), 0, 96)], 200), "'a': is there twice"),
    "an offset between units": (plain_file([("a", (64, 2), 2, 8)], 200), "no multiple of the alignment"),
    "a long name": (plain_file([("n" * 70_000, (8,), 0, 0)], 64), "name of tensor 0 has 70000 bytes"),
    "an unknown kind of value": (plain_file(GOOD, 200, text("k") + struct.pack("<I", 99), metadata_count=1), "unknown type 99"),
    "a lying string": (
        plain_file(GOOD, 200, text("k") + struct.pack("<IQ", 8, 1 << 40), metadata_count=1), "has 1099511627776 bytes",
    ),
    "a lying array": (
        plain_file(GOOD, 200, text("k") + struct.pack("<IIQ", 9, 4, 1 << 61), metadata_count=1), "truncated or damaged",
    ),
    "an array of many strings": (
        plain_file(GOOD, 200, text("k") + struct.pack("<IIQ", 9, 8, 1 << 61), metadata_count=1), "promises .* strings",
    ),
    "arrays in arrays": (plain_file(GOOD, 200, text("k") + struct.pack("<IIQ", 9, 9, 1), metadata_count=1), "unknown type 9"),
    "a key twice": (
        plain_file(GOOD, 200, 2 * (text("k") + struct.pack("<II", 4, 1)), metadata_count=2), "'k' is there twice",
    ),
    "an alignment of 48": (
        plain_file(GOOD, 200, text("general.alignment") + struct.pack("<II", 4, 48), metadata_count=1), "alignment is 48",
    ),
    "a key that is no text": (
        plain_file(GOOD, 200, struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1), metadata_count=1), "not UTF-8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files(damage: str, tmp_path: Path) -> None:
    content, message = DAMAGES[damage]
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        GgufFile(path)
    assert "\n" not in str(caught.value)
    assert "damaged.gguf" in str(caught.value)


def test_every_truncation_and_flipped_byte_ends_in_one_error(written: Written, tmp_path: Path) -> None:
    """Nothing but CheckpointError or ValueError, whatever is cut off or changed."""
    whole = written.path.read_bytes()
    header = GgufFile(written.path).tensors
    first = min(tensor.start for tensor in header.values())
    rng = np.random.default_rng(1)
    path = tmp_path / "changed.gguf"

    def attempt(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            quantised.open_gguf(path).layer(0)
        except (CheckpointError, ValueError):
            return True
        return False

    assert all(attempt(whole[: int(end)]) for end in rng.integers(0, first, 40))
    assert attempt(whole[:-1])
    for place in rng.integers(0, first, 300):
        changed = bytearray(whole)
        changed[int(place)] ^= 1 << int(rng.integers(8))
        attempt(bytes(changed))


def test_a_file_that_changes_is_noticed(written: Written, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(written.path.read_bytes())
    checkpoint = quantised.open_gguf(path)
    path.write_bytes(written.path.read_bytes()[:-4096])
    with pytest.raises(CheckpointError, match="changed since it was opened"):
        checkpoint.layer(1)


def test_models_that_are_not_read(written: Written, tmp_path: Path) -> None:
    other = Written(tmp_path / "llama.gguf", architecture="llama")
    with pytest.raises(CheckpointError, match=r"general\.architecture is 'llama'; known are qwen3"):
        quantised.open_gguf(other.path)
    (tmp_path / "none.gguf").write_bytes(plain_file(GOOD, 200))
    with pytest.raises(CheckpointError, match="has no attention layer"):
        quantised.open_gguf(tmp_path / "none.gguf")
    with pytest.raises(CheckpointError, match="cannot be opened"):
        quantised.open_gguf(tmp_path / "absent.gguf")
    with pytest.raises(TypeError, match="path is a int"):
        quantised.open_gguf(3)  # type: ignore[arg-type]
    checkpoint = quantised.open_gguf(written.path)
    with pytest.raises(ValueError, match="layer 2 is not in"):
        checkpoint.layer(2)
    with pytest.raises(TypeError, match="index is a str"):
        checkpoint.layer("0")  # type: ignore[arg-type]


def test_formats_are_the_package_s() -> None:
    package = gguf()
    for name, form in FORMATS.items():
        kind = package.GGMLQuantizationType[name]
        assert (form.ggml_type, form.values, form.size) == (kind.value, *package.GGML_QUANT_SIZES[kind])
