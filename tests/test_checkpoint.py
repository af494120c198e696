"""Reading checkpoints: bits against the safetensors library; memory and bytes read."""

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from cufuse.checkpoint import QWEN3, Checkpoint, open_checkpoint
from tests.checkpoint_files import (
    BF16,
    CONFIG,
    FIELDS,
    HEADS,
    KV_HEADS,
    SHAPES,
    VOCABULARY,
    D,
    K,
    assert_layer,
    error_of,
    make_tensors,
    write_folder,
    write_shards,
)


def test_folder_with_one_file(tmp_path):
    tensors = make_tensors()
    with open_checkpoint(str(write_folder(tmp_path / "tiny", tensors))) as checkpoint:
        assert checkpoint.layers == (0, 1, 2)
        assert checkpoint.tensor_names == tuple(sorted(tensors))
        assert not checkpoint.synthetic
        config = checkpoint.config
        for key, value in CONFIG.items():
            assert getattr(config, key) == value
        assert (config.name, config.assumed) == ("tiny", ())
        for index in (0, 2):
            layer = checkpoint.layer(index)
            assert_layer(layer, tensors)
            assert layer.source.endswith("model.safetensors")
        packed = layer.qkv_proj
        assert packed.shape == ((HEADS + 2 * KV_HEADS) * D, K)
        np.testing.assert_array_equal(packed[HEADS * D : -KV_HEADS * D].view(np.uint16), layer.k_proj.view(np.uint16))


def test_shards(tmp_path):
    tensors = make_tensors()
    write_shards(tmp_path, tensors)
    with Checkpoint(tmp_path) as checkpoint:
        assert checkpoint.layers == (0, 1, 2)
        for index in checkpoint.layers:
            assert_layer(checkpoint.layer(index), tensors)
        assert checkpoint.layer(2).source.endswith("model-00003-of-00003.safetensors")


def test_one_shard_as_a_single_file_takes_the_config_beside_it(tmp_path):
    tensors = make_tensors()
    write_shards(tmp_path, tensors)
    (tmp_path / "model-00001-of-00003.safetensors").unlink()
    checkpoint = Checkpoint(tmp_path / "model-00002-of-00003.safetensors")
    assert checkpoint.layers == (1,)
    assert checkpoint.config.rms_norm_eps == 1e-5
    assert_layer(checkpoint.layer(1), tensors)
    with pytest.raises(ValueError, match=r"layer 2 is not in .*available: 1 \(config.json promises 3"):
        checkpoint.layer(2)


def test_single_file_without_config(tmp_path):
    tensors = make_tensors(layers=2)
    file = write_folder(tmp_path, tensors, None, "weights.safetensors") / "weights.safetensors"
    config = Checkpoint(file).config
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (K, HEADS, KV_HEADS)
    assert (config.head_dim, config.num_hidden_layers, config.vocab_size, config.name) == (D, 2, VOCABULARY, "weights")
    assert (config.rms_norm_eps, config.rope_theta, config.intermediate_size) == (1e-6, 1e6, None)
    assert "rms_norm_eps=1e-06" in config.assumed
    assert "rope_theta=1000000.0" in config.assumed
    assert_layer(Checkpoint(file).layer(1), tensors)


def test_names_without_the_model_prefix(tmp_path):
    tensors = make_tensors(prefix="")
    checkpoint = Checkpoint(write_folder(tmp_path, tensors))
    assert_layer(checkpoint.layer(1), tensors, prefix="")
    assert checkpoint.embedding([1]).shape == (1, K)


def test_llama_has_no_head_norms(tmp_path):
    tensors = make_tensors(norms=False)
    config = {**CONFIG, "model_type": "llama"}
    assert_layer(Checkpoint(write_folder(tmp_path, tensors, config)).layer(0), tensors)
    qwen = Checkpoint(write_folder(tmp_path / "qwen", tensors))
    assert "tensor 'model.layers.0.self_attn.q_norm.weight': is missing" in error_of(lambda: qwen.layer(0))


def test_float32_is_taken_only_where_nothing_is_rounded(tmp_path):
    exact = make_tensors(dtype=np.float32)
    checkpoint = Checkpoint(write_folder(tmp_path, exact))
    layer, rows = checkpoint.layer(1), checkpoint.embedding([7, 3])
    for field, name in FIELDS.items():
        expected = exact[f"model.layers.1.{name}.weight"].view(np.uint32) >> 16
        np.testing.assert_array_equal(getattr(layer, field).view(np.uint16), expected)
    np.testing.assert_array_equal(rows.view(np.uint16), exact["model.embed_tokens.weight"][[7, 3]].view(np.uint32) >> 16)
    exact["model.layers.1.self_attn.k_norm.weight"][5] = np.float32(1 / 3)
    inexact = Checkpoint(write_folder(tmp_path / "inexact", exact))
    inexact.layer(0)
    message = error_of(lambda: inexact.layer(1))
    assert "'model.layers.1.self_attn.k_norm.weight': dtype is F32 and 1 of the 32 values" in message
    assert "model.to(torch.bfloat16)" in message


def test_float16_is_refused(tmp_path):
    tensors = make_tensors()
    tensors["model.layers.0.self_attn.v_proj.weight"] = np.zeros(SHAPES["self_attn.v_proj"], np.float16)
    checkpoint = Checkpoint(write_folder(tmp_path, tensors))
    message = error_of(lambda: checkpoint.layer(0))
    assert "model.safetensors: tensor 'model.layers.0.self_attn.v_proj.weight': dtype is F16, BF16 is needed" in message


def test_embedding(tmp_path):
    tensors = make_tensors()
    checkpoint = Checkpoint(write_folder(tmp_path, tensors))
    table = tensors["model.embed_tokens.weight"].view(np.uint16)
    for ids in ([0, VOCABULARY - 1, 3, 3], np.array([4, 2], np.int32), range(5), []):
        rows = checkpoint.embedding(ids)
        assert rows.dtype == BF16
        assert rows.shape == (len(ids), K)
        np.testing.assert_array_equal(rows.view(np.uint16), table[list(ids)])
    for ids in ([VOCABULARY], [-1], [1, 1 << 40]):
        with pytest.raises(ValueError, match=r"needed are ids in 0\.\.49"):
            checkpoint.embedding(ids)
    for ids in ([1.0], [True], ["a"], [1 << 70]):
        with pytest.raises(TypeError, match="needed are integers"):
            checkpoint.embedding(ids)
    with pytest.raises(ValueError, match="one dimension"):
        checkpoint.embedding([[1, 2]])


def test_a_layer_is_read_without_the_rest(tmp_path):
    """A file of 300 MB, nearly all of it sparse: loading 60 kB of it takes 60 kB."""
    tensors = make_tensors(layers=1)
    embedding = tensors.pop("model.embed_tokens.weight")
    header, blob = {}, b""
    for name, tensor in tensors.items():
        header[name] = {"dtype": "BF16", "shape": tensor.shape, "data_offsets": [len(blob), len(blob) + tensor.nbytes]}
        blob += tensor.tobytes()
    rows = 300_000_000 // embedding[0].nbytes
    end = len(blob) + rows * embedding[0].nbytes
    header["model.embed_tokens.weight"] = {"dtype": "BF16", "shape": [rows, K], "data_offsets": [len(blob), end]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text + blob)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": rows}))

    def bytes_read():  # by all read system calls of this process, Linux only
        io = Path("/proc/self/io")
        return int(io.read_text().split()[1]) if io.exists() else 0

    tracemalloc.start()
    before = bytes_read()
    checkpoint = Checkpoint(tmp_path)
    layer = checkpoint.layer(0)
    last = checkpoint.embedding([rows - 1, 0])
    read = bytes_read() - before
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_layer(layer, tensors)
    assert not last.view(np.uint16).any()
    assert peak < len(blob) + 300_000
    assert read < len(blob) + 300_000


def test_hundred_thousand_tensors(tmp_path):
    tensors = make_tensors(layers=1)
    tensors |= {f"model.layers.0.mlp.experts.{i}.down_proj.weight": np.zeros(1, np.uint8) for i in range(100_000)}
    checkpoint = Checkpoint(write_folder(tmp_path, tensors))
    assert len(checkpoint.tensor_names) == 100_007
    assert_layer(checkpoint.layer(0), tensors)


def test_wrong_layer_and_path(tmp_path):
    checkpoint = Checkpoint(write_folder(tmp_path, make_tensors()))
    for index in (3, -1, 1 << 80):
        with pytest.raises(ValueError, match=rf"layer {index} is not in .*; available: 0-2$"):
            checkpoint.layer(index)
    for index in (True, 1.0, "0", None):
        with pytest.raises(TypeError, match="needed is an integer"):
            checkpoint.layer(index)
    assert checkpoint.layer(np.int64(1)).index == 1
    with pytest.raises(TypeError, match="path is a int"):
        Checkpoint(3)
    message = error_of(lambda: Checkpoint(tmp_path / "Qwen" / "Qwen3-0.6B"))
    assert "cannot be opened" in message
    assert "write_synthetic" in message


def test_closed(tmp_path):
    with Checkpoint(write_folder(tmp_path, make_tensors())) as checkpoint:
        pass
    for action in (lambda: checkpoint.layer(0), lambda: checkpoint.embedding([0])):
        with pytest.raises(ValueError, match="is closed"):
            action()


def test_the_six_models():
    assert list(QWEN3) == [f"qwen3-{size}" for size in ("0.6b", "1.7b", "4b", "8b", "14b", "32b")]
    sizes = {(c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim) for c in QWEN3.values()}
    assert sizes == {
        (1024, 16, 8, 128), (2048, 16, 8, 128), (2560, 32, 8, 128), (4096, 32, 8, 128), (5120, 40, 8, 128),
        (5120, 64, 8, 128),
    }  # fmt: skip
    assert {(c.rms_norm_eps, c.rope_theta, c.vocab_size) for c in QWEN3.values()} == {(1e-6, 1e6, 151_936)}
