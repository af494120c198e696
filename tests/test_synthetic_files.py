"""Synthetic checkpoints as files: against the library, bounded memory, and what may be overwritten."""

import errno
import json
import shutil
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from cufuse import synthetic
from cufuse._synthetic_weights import checkpoint_tensors
from cufuse.checkpoint import QWEN3, Checkpoint, CheckpointError
from cufuse.synthetic import (
    synthetic_embedding,
    synthetic_layer,
    write_synthetic,
)
from tests.checkpoint_files import FIELDS, codes, digests, write_small


def test_file_layer_and_library_agree(tmp_path):
    folder = write_synthetic(str(tmp_path / "new" / "small"), layers=2, embeddings=20, seed=3)
    assert folder == tmp_path / "new" / "small"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    with Checkpoint(folder) as checkpoint, safetensors.safe_open(folder / "model.safetensors", "numpy") as library:
        assert checkpoint.synthetic
        assert checkpoint.layers == (0, 1)
        assert set(library.keys()) == set(checkpoint.tensor_names)
        assert len(checkpoint.tensor_names) == 2 * 11 + 2
        for index in (0, 1):
            read, made = checkpoint.layer(index), synthetic_layer("qwen3-0.6b", index, 3)
            assert read.synthetic
            assert made.synthetic
            assert "synthetic" in made.source
            for field in FIELDS:
                np.testing.assert_array_equal(codes(getattr(read, field)), codes(getattr(made, field)))
            k_proj = library.get_tensor(f"model.layers.{index}.self_attn.k_proj.weight")
            np.testing.assert_array_equal(codes(k_proj), codes(read.k_proj))
        rows = checkpoint.embedding([19, 0, 7])
        np.testing.assert_array_equal(codes(rows), codes(synthetic_embedding("qwen3-0.6b", [19, 0, 7], 3)))
        np.testing.assert_array_equal(codes(rows), codes(library.get_tensor("model.embed_tokens.weight"))[[19, 0, 7]])
        down = library.get_tensor("model.layers.1.mlp.down_proj.weight")
        assert down.shape == (1024, 3072)
        assert down.astype(np.float64).std() == pytest.approx(0.02, rel=0.01)


def test_it_says_that_it_is_synthetic(tmp_path):
    folder = write_small(tmp_path / "small", seed=7)
    with safetensors.safe_open(folder / "model.safetensors", "numpy") as library:
        metadata = library.metadata()
    assert metadata == {
        "format": "pt", "synthetic": "true", "model": "qwen3-0.6b", "seed": "7", "writer": "cufuse.synthetic/1",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    assert (config["synthetic"], config["synthetic_seed"]) == ("true", "7")
    assert (folder / "README.md").read_text().startswith("# Synthetic weights")
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if "synth" not in key}))
    assert Checkpoint(folder).synthetic, "the file's metadata alone tell it"
    assert Checkpoint(folder / "model.safetensors").layer(0).synthetic
    tensors = {
        name: np.zeros(4, ml_dtypes.bfloat16)
        for name in (f"model.layers.0.{field}" for field in ("self_attn.q_proj.weight", "self_attn.k_norm.weight"))
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert not Checkpoint(folder).synthetic
    (folder / "config.json").write_text(json.dumps(config))
    assert Checkpoint(folder).synthetic, "config.json alone tells it"


def test_config_of_the_model(tmp_path):
    config = Checkpoint(write_small(tmp_path / "small", model="qwen3-1.7b", embeddings=3)).config
    expected = QWEN3["qwen3-1.7b"]
    for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
                "intermediate_size", "max_position_embeddings", "tie_word_embeddings", "model_type"):  # fmt: skip
        assert getattr(config, key) == getattr(expected, key)
    assert (config.num_hidden_layers, config.vocab_size, config.assumed) == (1, 3, ())


def test_shards_hold_the_same_bits(tmp_path):
    one = write_small(tmp_path / "one", layers=2)
    many = write_small(tmp_path / "many", layers=2, max_shard_bytes=5_000_000)
    files = sorted(many.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{number:05}-of-00004.safetensors" for number in (1, 2, 3, 4)]
    assert all(file.stat().st_size < 5_010_000 for file in files)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * (20 * 1024 + 2 * (4096 * 1024 + 1024 + 256))
    left, right = Checkpoint(one), Checkpoint(many)
    assert left.tensor_names == right.tensor_names == tuple(sorted(index["weight_map"]))
    for layer in (0, 1):
        for field in FIELDS:
            np.testing.assert_array_equal(*(codes(getattr(side.layer(layer), field)) for side in (left, right)))
    tensor_by_tensor = write_small(tmp_path / "single", max_shard_bytes=1)
    assert len(list(tensor_by_tensor.glob("*.safetensors"))) == 7
    assert Checkpoint(tensor_by_tensor).layer(0).q_proj.shape == (2048, 1024)


def test_without_embeddings(tmp_path):
    checkpoint = Checkpoint(write_small(tmp_path / "small", embeddings=False))
    assert len(checkpoint.tensor_names) == 6
    assert checkpoint.config.vocab_size == 151_936
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight': is missing"):
        checkpoint.embedding([0])


def test_output_head_where_it_is_not_tied():
    for model, tied in (("qwen3-4b", True), ("qwen3-8b", False)):
        for embeddings in (True, False):
            names = {tensor.name for tensor in checkpoint_tensors(QWEN3[model], model, 0, embeddings, False)}
            assert ("lm_head.weight" in names) == (embeddings and not tied)
            assert "model.norm.weight" in names


def test_memory_is_bounded(tmp_path):
    calls = []
    tracemalloc.start()
    write_small(tmp_path / "large", model="qwen3-4b", progress=lambda *call: calls.append(call))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    written = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert written > 31_000_000
    assert peak < 20_000_000
    assert calls[-1][0] == calls[-1][1] == written - 8 - header_size(tmp_path / "large")
    assert [done for done, _, _ in calls] == sorted({done for done, _, _ in calls})
    assert calls[0][2] == "model.embed_tokens.weight"


def header_size(folder: Path) -> int:
    size = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert size % 8 == 0
    return size


def test_nothing_is_overwritten_unasked(tmp_path):
    folder = write_small(tmp_path / "small")
    before = digests(folder)
    with pytest.raises(FileExistsError, match="pass overwrite=True"):
        write_small(folder, seed=1)
    assert digests(folder) == before
    write_small(folder, seed=1, overwrite=True)
    assert digests(folder) != before
    write_small(folder, overwrite=True, max_shard_bytes=1)
    write_small(folder, overwrite=True)
    assert digests(folder) == before
    empty = tmp_path / "empty"
    empty.mkdir()
    assert digests(write_small(empty)) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "small"]


def test_overwrite_touches_nothing_else(tmp_path):
    def refused(path):
        with pytest.raises(FileExistsError, match="yourself"):
            write_small(path, overwrite=True)

    real = write_small(tmp_path / "real")
    (real / "config.json").write_text('{"model_type": "qwen3"}')
    refused(real)
    more = write_small(tmp_path / "more")
    (more / "tokenizer.json").write_text("{}")
    refused(more)
    nested = write_small(tmp_path / "nested")
    (nested / "model.safetensors.d").mkdir()
    refused(nested)
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file")
    (tmp_path / "link").symlink_to(write_small(tmp_path / "target"))
    refused(tmp_path / "link")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    refused(tmp_path / "dangling")
    assert (real / "config.json").read_text() == '{"model_type": "qwen3"}'
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("there", [False, True])
def test_interruption_leaves_nothing(error, there, tmp_path):
    folder = tmp_path / "small"
    before = digests(write_small(folder)) if there else None

    def stop(done, total, name):
        if done > total / 2:
            raise error

    with pytest.raises((KeyboardInterrupt, OSError)):
        write_small(folder, seed=1, overwrite=there, progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == (["small"] if there else [])
    assert before is None or digests(folder) == before


def test_failed_renaming_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    folder = write_small(tmp_path / "small")
    before = digests(folder)
    rename = Path.rename

    def fail_once(path, target):
        if path.suffix == ".partial":
            raise PermissionError(errno.EACCES, "in use", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(PermissionError):
        write_small(folder, seed=1, overwrite=True)
    assert digests(folder) == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_something_that_appears_meanwhile_is_kept(tmp_path):
    folder = tmp_path / "small"

    def appear(done, total, name):
        folder.mkdir(exist_ok=True)
        (folder / "mine").write_text("mine")

    with pytest.raises(FileExistsError):
        write_small(folder, progress=appear)
    assert [path.name for path in folder.iterdir()] == ["mine"]


def test_too_little_space_is_seen_first(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match=r"bytes are needed, 1000 are free; take fewer layers") as caught:
        write_small(tmp_path / "small")
    assert caught.value.errno == errno.ENOSPC
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "error", "problem"),
    [
        ({"model": "qwen3-7b"}, ValueError, "model is 'qwen3-7b'; needed is one of qwen3-0.6b, "),
        ({"model": None}, TypeError, "model is a NoneType"),
        ({"layers": 0}, ValueError, "needed are 1 or more"),
        ({"layers": -1}, ValueError, "layers is -1"),
        ({"layers": 1.0}, TypeError, "layers is a float"),
        ({"layers": True}, TypeError, "layers is a bool"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": "0"}, TypeError, "seed is a str"),
        ({"embeddings": 151_937}, ValueError, "embeddings is 151937; qwen3-0.6b has 151936 rows"),
        ({"embeddings": -1}, ValueError, "embeddings is -1"),
        ({"max_shard_bytes": 0}, ValueError, "needed are 1 or more"),
        ({"path": "x.safetensors"}, ValueError, "needed is the name of a folder"),
    ],
)
def test_wrong_arguments(options, error, problem, tmp_path):
    path = tmp_path / options.pop("path", "small")
    with pytest.raises(error, match=problem):
        write_small(path, **options)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_without_a_file():
    with pytest.raises(ValueError, match="layer is -1"):
        synthetic_layer("qwen3-0.6b", -1)
    with pytest.raises(TypeError, match="layer is a float"):
        synthetic_layer("qwen3-0.6b", 0.0)
    with pytest.raises(ValueError, match="needed is one of"):
        synthetic_embedding("llama", [0])
    with pytest.raises(ValueError, match=r"needed are ids in 0\.\.151935"):
        synthetic_embedding("qwen3-0.6b", [151_936])
    assert synthetic_embedding("qwen3-0.6b", []).shape == (0, 1024)
