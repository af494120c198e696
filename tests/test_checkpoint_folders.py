"""Folders: what is missing, indices and links that lead elsewhere, special files."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from cufuse.checkpoint import Checkpoint
from tests.checkpoint_files import Q_PROJ, SHAPES, assert_layer, error_of, make_tensors, write_folder, write_index, write_shards


def test_incomplete_folders(tmp_path):
    assert "has no .safetensors file" in error_of(lambda: Checkpoint(tmp_path))
    write_folder(tmp_path, make_tensors(), None)
    assert f"{tmp_path / 'config.json'}: is missing" in error_of(lambda: Checkpoint(tmp_path))
    write_folder(tmp_path, make_tensors())
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    assert Checkpoint(tmp_path).layers == (0, 1, 2)
    shutil.copy(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert "has 2 .safetensors files and no model.safetensors.index.json" in error_of(lambda: Checkpoint(tmp_path))


@pytest.mark.parametrize("name", list(SHAPES))
def test_missing_tensor(name, tmp_path):
    tensors = make_tensors()
    del tensors[f"model.layers.1.{name}.weight"]
    checkpoint = Checkpoint(write_folder(tmp_path, tensors))
    checkpoint.layer(0)
    message = error_of(lambda: checkpoint.layer(1))
    assert message.startswith(f"{tmp_path}: tensor 'model.layers.1.{name}.weight': is missing")
    assert "incomplete" in message


def test_missing_embedding(tmp_path):
    tensors = make_tensors()
    del tensors["model.embed_tokens.weight"]
    checkpoint = Checkpoint(write_folder(tmp_path, tensors))
    assert "tensor 'model.embed_tokens.weight': is missing" in error_of(lambda: checkpoint.embedding([0]))


def test_missing_shards(tmp_path):
    write_shards(tmp_path, make_tensors())
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    message = error_of(lambda: Checkpoint(tmp_path))
    assert message.startswith(f"{tmp_path}: tensor 'model.layers.1.")
    assert "1 of 3 files are missing: model-00002-of-00003.safetensors" in message


def test_tensor_that_its_shard_does_not_hold(tmp_path):
    weight_map = write_shards(tmp_path, make_tensors())
    weight_map["model.layers.2.input_layernorm.weight"] = "model-00001-of-00003.safetensors"
    write_index(tmp_path, weight_map)
    message = error_of(lambda: Checkpoint(tmp_path))
    place = tmp_path / "model-00001-of-00003.safetensors"
    assert message.startswith(f"{place}: tensor 'model.layers.2.input_layernorm.weight': is not in this file")


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/passwd", "/tmp/x.safetensors", "sub/x.safetensors", "..\\x.safetensors",
     "C:x.safetensors", "C:\\x.safetensors", "x.safetensors:stream", "..", ".", "", ".hidden.safetensors",
     "pytorch_model.bin", "a\x00.safetensors", "a\n.safetensors", 3, None, ["x.safetensors"]],
)  # fmt: skip
def test_index_that_escapes_its_folder(name, tmp_path):
    folder = tmp_path / "folder"
    weight_map = write_shards(folder, make_tensors())
    write_folder(tmp_path, make_tensors(), name="secret.safetensors")
    weight_map[Q_PROJ] = name
    write_index(folder, weight_map)
    message = error_of(lambda: Checkpoint(folder))
    assert message.startswith(f"{folder / 'model.safetensors.index.json'}: tensor '{Q_PROJ}': is said to be in")


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": [1]}, {"weight_map": "x"}, []])
def test_index_of_the_wrong_form(index, tmp_path):
    write_shards(tmp_path, make_tensors())
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    message = error_of(lambda: Checkpoint(tmp_path))
    assert "model.safetensors.index.json: " in message
    assert "weight_map" in message or "an object is needed" in message


def test_layer_under_two_names(tmp_path):
    tensors = make_tensors(layers=1) | make_tensors(layers=1, prefix="")
    assert "layer 0 is there twice" in error_of(lambda: Checkpoint(write_folder(tmp_path, tensors)))


# links and special files

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="links and FIFOs as on POSIX")


@posix_only
def test_link_out_of_the_folder(tmp_path):
    write_folder(tmp_path / "elsewhere", make_tensors())
    folder = tmp_path / "folder"
    for linked in ("model.safetensors", "config.json"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "elsewhere", folder)
        (folder / linked).unlink()
        (folder / linked).symlink_to(tmp_path / "elsewhere" / linked)
        message = error_of(lambda: Checkpoint(folder))
        assert message.startswith(f"{folder / linked}: is a symbolic link out of the checkpoint")
        assert "give the folder that holds it" in message
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    assert "cannot be resolved" in error_of(lambda: Checkpoint(folder))
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert Checkpoint(tmp_path / "link").layers == (0, 1, 2), "the path given may be a link"


@posix_only
def test_hugging_face_cache(tmp_path):
    repository = tmp_path / "models--Qwen--Qwen3-Tiny"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    tensors = make_tensors()
    write_shards(blobs, tensors)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        blob = blobs / f"blob{number}"
        name = file.name
        file.rename(blob)
        (snapshot / name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
    checkpoint = Checkpoint(snapshot)
    assert checkpoint.config.name == "Qwen/Qwen3-Tiny"
    assert_layer(checkpoint.layer(2), tensors)
    single = Checkpoint(snapshot / "model-00002-of-00003.safetensors")
    assert_layer(single.layer(1), tensors)
    assert single.config.rms_norm_eps == 1e-5
    # a blob that is itself a link out of the cache
    (blobs / "blob0").rename(tmp_path / "outside")
    (blobs / "blob0").symlink_to(tmp_path / "outside")
    assert "is a symbolic link out of the checkpoint" in error_of(lambda: Checkpoint(snapshot))


@posix_only
def test_special_files_are_refused_without_waiting(tmp_path):
    for name in ("model.safetensors", "config.json"):
        folder = write_folder(tmp_path / name, make_tensors())
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert f"{folder / name}: is not a regular file" in error_of(lambda folder=folder: Checkpoint(folder))
        (folder / name).unlink()
        (folder / name).mkdir()
        assert f"{folder / name}: is not a regular file" in error_of(lambda folder=folder: Checkpoint(folder))
    assert "is not a regular file" in error_of(lambda: Checkpoint("/dev/zero"))
