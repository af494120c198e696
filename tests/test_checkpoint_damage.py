"""Damaged and hostile safetensors files: one CheckpointError that names file and tensor, nothing executed."""

import contextlib
import gc
import json
import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from cufuse._safetensors_file import SafetensorsFile
from cufuse.checkpoint import Checkpoint, CheckpointError
from tests.checkpoint_files import FIELDS, error_of, make_tensors, write_folder


def container(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start, end, shape=None, dtype="BF16", **more):
    return {"dtype": dtype, "shape": [(end - start) // 2] if shape is None else shape, "data_offsets": [start, end], **more}


def one(**changes):
    return container({"a": {**entry(0, 8), **changes}}, bytes(8))


# file content, what the message says behind the file's name
MALFORMED = {
    "empty": (b"", "has 0 bytes, too few"),
    "seven bytes": (bytes(7), "has 7 bytes, too few"),
    "header longer than the file": (struct.pack("<Q", 100) + b"{}", "header length is 100 but only 2 bytes follow"),
    "header over the limit": (struct.pack("<Q", 100_000_001) + b"{}", "header length is 100000001, at most 100000000"),
    "header length 2^64-1": (b"\xff" * 16, "header length is 18446744073709551615, at most"),
    "header of no bytes": (bytes(8), "header does not begin with '{'"),
    "no object": (container(b"[1, 2]", b""), "header does not begin with '{'"),
    "leading space": (container(b' {"a":1}', b""), "header does not begin with '{'"),
    "not JSON": (container(b'{"a": 1,}', b""), "header is not valid JSON"),
    "NaN": (container(b'{"a": NaN}', b""), "header is not valid JSON: NaN is not JSON"),
    "not UTF-8": (container(b'{"\xff": 1}', b""), r"header is not UTF-8 (byte 2)"),
    "nested": (container(b'{"a":' + b"[" * 100_000, b""), "header is not valid JSON: nested too deeply"),
    "huge number": (container(b'{"a":' + b"9" * 5000 + b"}", b""), "header is not valid JSON"),
    "too many items": (container(b'{"a":[' + b"[]," * 3_000_000 + b"[]]}", b""), "more than the 6000000 items allowed"),
    "duplicate tensor": (
        container(b'{"a":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]},'
                  b'"a":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}', bytes(8)),
        "header is not valid JSON: duplicate key 'a'"),
    "duplicate shape": (
        container(b'{"a":{"dtype":"BF16","shape":[4],"shape":[2,2],"data_offsets":[0,8]}}', bytes(8)),
        "duplicate key 'shape'"),
    "entry is a list": (container({"a": [1]}, b""), "tensor 'a': header entry lacks"),
    "no offsets": (container({"a": {"dtype": "BF16", "shape": [1]}}, b""), "tensor 'a': header entry lacks"),
    "metadata of numbers": (container({"__metadata__": {"a": 1}}, b""), "__metadata__ is not an object of strings"),
    "unknown dtype": (one(dtype="BF17"), "tensor 'a': dtype 'BF17' is unknown"),
    "dtype is a list": (one(dtype=["BF16"]), "tensor 'a': dtype '['BF16']' is unknown"),
    "negative size": (one(shape=[-4]), "tensor 'a': shape [-4] is not a list"),
    "fractional size": (one(shape=[4.0]), "tensor 'a': shape [4.0] is not a list"),
    "boolean size": (one(shape=[True, 4]), "tensor 'a': shape [True, 4] is not a list"),
    "shape is a number": (one(shape=4), "tensor 'a': shape 4 is not a list"),
    "many dimensions": (one(shape=[1] * 33), "tensor 'a': shape [1, 1"),
    "size overflow": (one(shape=[1 << 32, 1 << 32]), "tensor 'a': data_offsets [0, 8] do not hold"),
    "size beyond 2^63": (one(shape=[1 << 63]), "is not a list of at most 32 non-negative integers"),
    "product beyond floats": (one(shape=[(1 << 63) - 1] * 32), "tensor 'a': data_offsets [0, 8] do not hold"),
    "negative offset": (one(data_offsets=[-8, 0]), "tensor 'a': data_offsets [-8, 0] are not two non-negative"),
    "swapped offsets": (one(data_offsets=[8, 0]), "tensor 'a': data_offsets [8, 0] do not hold"),
    "three offsets": (one(data_offsets=[0, 4, 8]), "tensor 'a': data_offsets [0, 4, 8] are not two"),
    "size and shape differ": (one(shape=[5]), "tensor 'a': data_offsets [0, 8] do not hold the 80 bits for BF16 [5]"),
    "half a byte": (one(shape=[15], dtype="F4"), "do not hold the 60 bits for F4 [15]"),
    "overlap": (
        container({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)),
        "tensor 'b': data_offsets [4, 12] overlap those of 'a'"),
    "the same bytes twice": (container({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8)), "overlap those of"),
    "hole": (
        container({"a": entry(0, 4), "b": entry(6, 12)}, bytes(12)),
        "tensor 'b': 2 bytes before it, behind 'a', belong to no tensor"),
    "hole at the beginning": (container({"a": entry(2, 8)}, bytes(8)), "tensor 'a': 2 bytes before it"),
    "bytes left over": (
        container({"a": entry(0, 8)}, bytes(10)), "tensor 'a': 2 bytes behind it, at the end of the file"),
    "truncated": (
        container({"a": entry(0, 4), "b": entry(4, 12)}, bytes(9)),
        "tensor 'b': ends 3 bytes behind the end of the file: truncated"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
    "zip": (b"PK\x03\x04" + bytes(60), "is a zip archive or PyTorch pickle, which is never unpickled"),
    "GGUF": (b"GGUF" + bytes(60), "is a GGUF file"),
    "web page": (b"<!DOCTYPE html><html></html>", "looks like a web page"),
    "no attention": (one(), "has tensors such as 'a', but none of an attention layer"),
    "no tensors": (container({}, b""), "has no tensors, but none of an attention layer"),
    "only another tensor of the layer": (
        container({"model.layers.0.self_attn.k_norm.weight": entry(0, 64)}, bytes(64)),
        "tensor 'model.layers.0.self_attn.q_norm.weight': is missing, and no config.json"),
    "hostile name": (container({"\x1b[31m\n\u202e": [1]}, b""), r"tensor '\x1b[31m\n\u202e': header entry lacks"),
    "surrogate in a name": (container(b'{"\\ud800": [1]}', b""), r"tensor '\ud800': header entry lacks"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file(case, tmp_path):
    content, problem = MALFORMED[case]
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    message = error_of(lambda: Checkpoint(path))
    assert message.startswith(f"{path}: ")
    assert problem in message
    assert "; " in message, "a remedy"
    assert len(message) < 700


def test_pickle_is_not_executed(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        for name in ("model.safetensors", "pytorch_model.bin"):
            (tmp_path / name).write_bytes(pickle.dumps(Payload(), protocol) + bytes(100))
        error_of(lambda: Checkpoint(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    assert "has no .safetensors file (PyTorch's .bin files are pickles" in error_of(lambda: Checkpoint(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_length_bytes_that_look_like_another_format(tmp_path):
    """A header of 0x80 or 0x3C ('<') bytes is no pickle and no web page."""
    for length in (0x80, 0x3C):
        text = json.dumps({"a": entry(0, 8)}, separators=(",", ":")).encode().ljust(length)
        path = tmp_path / "weights.safetensors"
        path.write_bytes(container(text, bytes(8)))
        assert path.read_bytes()[0] == length
        assert "none of an attention layer" in error_of(lambda path=path: Checkpoint(path))


def test_file_that_changes_after_opening(tmp_path):
    checkpoint = Checkpoint(write_folder(tmp_path, make_tensors()))
    file = tmp_path / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    message = error_of(lambda: checkpoint.layer(0))
    assert "model.safetensors: tensor 'model.layers.0.input_layernorm.weight': the file has changed" in message
    file.unlink()
    assert "cannot be opened" in error_of(lambda: checkpoint.layer(0))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_no_damage_ends_in_anything_else(data, tmp_path_factory):
    """Bytes changed, removed or inserted: a CheckpointError, or the very bits that the safetensors library reads."""
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    if not folder.exists():
        write_folder(folder, make_tensors(layers=1), None)
        shutil.copy(folder / "model.safetensors", folder / "whole")
    content = bytearray((folder / "whole").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, header + 4))
        new = data.draw(st.sampled_from([b"", b"0", b"9", b"-", b'"', b",", b"[", b"}", b"F", b"\xff", b"e", b" "]))
        content[place : place + data.draw(st.integers(0, 2))] = new
    path = folder / "model.safetensors"
    path.write_bytes(content)
    try:
        layer = Checkpoint(path).layer(0)
    except CheckpointError:
        return
    with safetensors.safe_open(path, "numpy") as file:
        for field, name in FIELDS.items():
            expected = file.get_tensor(f"model.layers.0.{name}.weight")
            np.testing.assert_array_equal(getattr(layer, field).view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("damaged", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled, damaged, tmp_path):
    """It pauses while a header is read, whether that ends well or not."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(container({"a": entry(0, 2)}, bytes(1 if damaged else 2)))
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with pytest.raises(CheckpointError) if damaged else contextlib.nullcontext():
            SafetensorsFile(path)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
