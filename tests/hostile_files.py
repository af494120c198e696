"""Hostile checkpoints: handmade ones, each wrong in one way, and seeded mutations of a valid file."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoint_files import CONFIG, Q_PROJ, make_tensors, write_folder, write_index, write_shards

Header = dict[str, Any]

SECRET = "secret.safetensors"
"""A valid checkpoint beside the folder under attack, which nothing may open."""

_UP = "../" + SECRET


def container(header: Header | bytes, data: bytes, length: int | None = None) -> bytes:
    """A file of the format, whatever is in it; ``length`` other than the header's is a lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def parts(content: bytes) -> tuple[Header, bytes]:
    """Header and data of a valid file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


# handmade: each builds what is opened inside a folder of its own and returns its path


def _valid(folder: Path, **changes: Any) -> Path:
    return write_folder(folder / "model", make_tensors(layers=1), CONFIG | {"num_hidden_layers": 1} | changes)


def _content(change: Callable[[Header, bytes], bytes]) -> Callable[[Path], Path]:
    """A folder whose safetensors file was changed: the config beside it is right."""

    def build(folder: Path) -> Path:
        model = _valid(folder)
        file = model / "model.safetensors"
        file.write_bytes(change(*parts(file.read_bytes())))
        return model

    return build


def _entry(**changes: Any) -> Callable[[Path], Path]:
    """One member of the q projection's entry is another."""

    def change(header: Header, data: bytes) -> bytes:
        header[Q_PROJ] |= changes
        return container(header, data)

    return _content(change)


def _offsets(change: Callable[[list[int]], list[int]]) -> Callable[[Path], Path]:
    def changed(header: Header, data: bytes) -> bytes:
        header[Q_PROJ]["data_offsets"] = change(header[Q_PROJ]["data_offsets"])
        return container(header, data)

    return _content(changed)


def _duplicate(text: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    """The q projection's entry a second time, behind the others, its name or a member spelt by ``text``."""

    def change(header: Header, data: bytes) -> bytes:
        whole = json.dumps(header).encode()
        again = text(json.dumps({Q_PROJ: header[Q_PROJ]}).encode()[1:-1])
        return container(whole[:-1] + b", " + again + b"}", data)

    return _content(change)


def _many_tensors(overlap: bool) -> Callable[[Path], Path]:
    """100,000 tensors beside those of the model, 2 bytes each; the last one overlaps the one before it, or none does."""

    def change(header: Header, data: bytes) -> bytes:
        start = len(data)
        for number in range(100_000):
            begin = start + 2 * number - (2 if overlap and number == 99_999 else 0)
            header[f"model.layers.0.extra.{number}.weight"] = {"dtype": "BF16", "shape": [1], "data_offsets": [begin, begin + 2]}
        return container(header, data + bytes(199_998 if overlap else 200_000))

    return _content(change)


def _sparse(length: int, size: int) -> Callable[[Path], Path]:
    """A file of ``size`` bytes that takes none on the disk, its header said to have ``length``."""

    def build(folder: Path) -> Path:
        model = _valid(folder)
        file = model / "model.safetensors"
        file.write_bytes(struct.pack("<Q", length) + b"{")
        os.truncate(file, size)
        return model

    return build


def _enormous_tensor(folder: Path) -> Path:
    """A terabyte that is a hole in the file: header, shapes and size agree."""
    rows, columns = 1 << 25, 1 << 14
    shapes = {"q_norm": (128,), "k_norm": (128,), "q_proj": (rows, columns), "k_proj": (128, columns), "v_proj": (128, columns)}
    header, start = {}, 0
    for name, shape in shapes.items():
        end = start + 2 * int(np.prod(shape, dtype=np.int64))
        header[f"model.layers.0.self_attn.{name}.weight"] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        start = end
    header["model.layers.0.input_layernorm.weight"] = {
        "dtype": "BF16", "shape": [columns], "data_offsets": [start, start + 2 * columns],
    }  # fmt: skip
    file = folder / "enormous.safetensors"
    file.write_bytes(container(header, b""))
    os.truncate(file, file.stat().st_size + start + 2 * columns)
    return file


def _lie(**changes: Any) -> Callable[[Path], Path]:
    return lambda folder: _valid(folder, **changes)


def _config_text(text: bytes) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        model = _valid(folder)
        (model / "config.json").write_bytes(text)
        return model

    return build


def _index(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        write_index(folder / "model", change(write_shards(folder / "model", make_tensors())))
        return folder / "model"

    return build


def _missing_shard(folder: Path) -> Path:
    model = _index(dict)(folder)
    (model / "model-00002-of-00003.safetensors").unlink()
    return model


def _link(name: str, target: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        model = _valid(folder)
        (model / name).unlink()
        (model / name).symlink_to(target)
        return model

    return build


def _linked_shard(folder: Path) -> Path:
    model = _index(dict)(folder)
    shard = model / "model-00001-of-00003.safetensors"
    shard.unlink()
    shard.symlink_to(_UP)
    return model


def _fifo(name: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        model = _valid(folder)
        (model / name).unlink()
        os.mkfifo(model / name)
        return model

    return build


def _cut(header: Header, data: bytes) -> bytes:
    return container(header, data[:-1])


def _moved(by: int) -> Callable[[Header, bytes], bytes]:
    """Every tensor but the first begins so much later (a hole) or earlier (an overlap)."""

    def change(header: Header, data: bytes) -> bytes:
        for entry in header.values():
            start, end = entry["data_offsets"]
            if start:
                entry["data_offsets"] = [start + by, end + by]
        return container(header, data + bytes(max(by, 0)) if by > 0 else data[:by])

    return change


# name, how it is made, what the message says; None: nothing is wrong, and the arrays must be right
HANDMADE: dict[str, tuple[Callable[[Path], Path], str | None]] = {
    "header longer than the file": (_content(lambda header, data: container(header, data, 1 << 24)), "truncated"),
    "header length 2^63": (_content(lambda header, data: container(header, data, 1 << 63)), f"header length is {1 << 63}, at most"),
    "header length 2^64 - 8": (_content(lambda header, data: container(header, data, (1 << 64) - 8)), "at most 100000000"),
    "header over 100 MB, all of it there": (_sparse(100_000_001, 100_000_100), "header length is 100000001, at most 100000000"),
    "header one byte short": (
        _content(lambda header, data: container(header, data, len(json.dumps(header)) - 1)), "is not valid JSON"),
    "not UTF-8": (_content(lambda header, data: container(json.dumps(header).encode().replace(b"q_proj", b"q_\xff\xfeoj"), data)),
                  "header is not UTF-8"),
    "UTF-16": (_content(lambda header, data: container(b"{" + json.dumps(header).encode("utf-16"), data)), "header is not UTF-8"),
    "not JSON": (_content(lambda header, data: container(json.dumps(header).encode()[:-1] + b",}", data)), "is not valid JSON"),
    "nested 50,000 deep": (_content(lambda header, data: container(b'{"a":' * 50_000, data)), "nested too deeply"),
    "duplicate tensor": (_duplicate(lambda text: text), f"duplicate key '{Q_PROJ}'"),
    "duplicate tensor, escaped": (_duplicate(lambda text: text.replace(b"q_proj", rb"\u0071_proj")), f"duplicate key '{Q_PROJ}'"),
    "duplicate offsets": (
        _content(lambda header, data: container(
            json.dumps(header).encode().replace(b'"shape"', b'"data_offsets": [0, 2], "shape"', 1), data)),
        "duplicate key 'data_offsets'"),
    "overlap": (_content(_moved(-2)), "overlap those of"),
    "hole": (_content(_moved(2)), "belong to no tensor"),
    "bytes behind the last": (_content(lambda header, data: container(header, data + b"\0\0")), "belong to no tensor"),
    "one byte missing": (_content(_cut), "truncated"),
    "negative offsets": (_offsets(lambda pair: [pair[0] - (1 << 40), pair[1] - (1 << 40)]), "are not two non-negative integers"),
    "swapped offsets": (_offsets(lambda pair: pair[::-1]), "do not hold"),
    "offsets beyond 2^63": (_offsets(lambda pair: [pair[0] + (1 << 63), pair[1] + (1 << 63)]), "are not two non-negative"),
    "offsets that floats cannot tell": (_offsets(lambda pair: [pair[0], pair[1] + 0.0]), "are not two non-negative"),
    "size overflow": (_entry(shape=[1 << 32, 1 << 32, 128, 64]), "do not hold"),
    "size that wraps to the right one": (_entry(shape=[(1 << 62) + 128, 64]), "do not hold"),
    "negative sizes whose product is right": (_entry(shape=[-128, -64]), "is not a list of at most"),
    "unknown dtype": (_entry(dtype="BF17"), "dtype 'BF17' is unknown"),
    "another dtype of the same size": (_entry(dtype="F16"), "dtype is F16, BF16 is needed"),
    "F32 with half the values": (_entry(dtype="F32", shape=[64, 64]), "shape is [64, 64], config says [128, 64]"),
    "odd number of bytes for BF16": (_offsets(lambda pair: [pair[0], pair[1] - 1]), "do not hold"),
    "transposed": (_entry(shape=[64, 128]), "shape is [64, 128], config says [128, 64]"),
    "100,000 tensors": (_many_tensors(overlap=False), None),
    "100,000 tensors, the last two overlap": (_many_tensors(overlap=True), "overlap those of"),
    "a terabyte that is a hole": (_enormous_tensor, "does not fit into memory"),
    "index that points outside": (_index(lambda names: names | {Q_PROJ: _UP}), "needed is a plain *.safetensors name"),
    "index with an absolute path": (_index(lambda names: names | {Q_PROJ: f"/tmp/{SECRET}"}), "needed is a plain"),
    "index with a NUL": (_index(lambda names: names | {Q_PROJ: "model.safetensors\0.safetensors"}), "needed is a plain"),
    "index that names a tensor of another file": (
        _index(lambda names: names | {Q_PROJ: "model-00003-of-00003.safetensors"}), "is not in this file"),
    "missing shard": (_missing_shard, "1 of 3 files are missing"),
    "symbolic link to another checkpoint": (_link("model.safetensors", _UP), "is a symbolic link out of the checkpoint"),
    "symbolic link to a device": (_link("config.json", "/dev/zero"), "is a symbolic link out of the checkpoint"),
    "symbolic link to itself": (_link("model.safetensors", "model.safetensors"), "cannot be resolved"),
    "shard that is a link": (_linked_shard, "is a symbolic link out of the checkpoint"),
    "FIFO": (_fifo("model.safetensors"), "is not a regular file"),
    "FIFO for a config": (_fifo("config.json"), "is not a regular file"),
    "config with another hidden size": (_lie(hidden_size=128), "config says"),
    "config with more heads": (_lie(num_attention_heads=8), "shape is [128, 64], config says [256, 64]"),
    "config with larger heads": (_lie(head_dim=64, num_attention_heads=2, num_key_value_heads=1), "config says [64]"),
    "config with 2^31 - 2 of everything": (_lie(hidden_size=(1 << 31) - 1, head_dim=(1 << 31) - 2), "config says"),
    "config with a size that is a float": (_lie(hidden_size=64.0), "'hidden_size' is 64.0"),
    "config that is no object": (_config_text(b"[" * 100_000), "nested too deeply"),
    "config of 5,000 digits": (_config_text(b'{"hidden_size": ' + b"9" * 5000 + b"}"), "is not valid JSON"),
}  # fmt: skip


# mutations


def mutated(content: bytes, seed: int) -> tuple[str, bytes]:
    """Mutation number ``seed`` of a valid file: what kind it is, and the bytes."""
    chance = random.Random(seed)
    kind = chance.choice(list(_MUTATIONS))
    return kind, _MUTATIONS[kind](content, chance)


def _flip_bits(content: bytes, chance: random.Random) -> bytes:
    """One to eight bits anywhere, three times in four in the header."""
    changed = bytearray(content)
    end = 8 + int.from_bytes(content[:8], "little") if chance.random() < 0.75 else len(content)
    for _ in range(chance.randint(1, 8)):
        changed[chance.randrange(end)] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _truncate(content: bytes, chance: random.Random) -> bytes:
    end = 8 + int.from_bytes(content[:8], "little") + 4 if chance.random() < 0.5 else len(content)
    return content[: chance.randrange(end)]


def _splice(content: bytes, chance: random.Random) -> bytes:
    """A piece cut out, doubled, moved or replaced by noise."""
    header = 8 + int.from_bytes(content[:8], "little")
    start = chance.randrange(header)
    stop = min(start + chance.randint(1, 40), len(content))
    piece = content[start:stop]
    other = chance.randrange(header)
    return chance.choice([
        content[:start] + content[stop:],
        content[:start] + piece + piece + content[stop:],
        content[:start] + chance.randbytes(stop - start) + content[stop:],
        content[:other] + piece + content[other:],
    ])  # fmt: skip


def _other_length(content: bytes, chance: random.Random) -> bytes:
    """The first eight bytes say something else."""
    length = int.from_bytes(content[:8], "little")
    near = length + chance.choice([-1, 1]) * chance.randint(1, 64)
    random_bits = chance.getrandbits(chance.randint(1, 64))
    lies = [near, length ^ 1 << chance.randrange(64), random_bits, length << 8, length * 256**7 % 256**8, len(content) - 8]
    return (max(chance.choice(lies), 0) % 256**8).to_bytes(8, "little") + content[8:]


_DTYPES = ("F16", "F32", "I16", "U16", "F64", "BOOL", "F4", "bf16", "BF16 ", "", 16, None, ["BF16"])
_NUMBERS = (0, 1, -1, 2, 3, 63, 64, 65, 128, 255, 256, 1 << 31, 1 << 32, (1 << 53) + 1, (1 << 63) - 1, 1 << 63, 1 << 64, 10**40,
            0.0, 64.0, 1e308, 0.5, True, False, None, "64", "", [], [64], {})  # fmt: skip


def _edit_header(content: bytes, chance: random.Random) -> bytes:
    """Valid JSON that says something else: another member, name, order, number, or one member less or more."""
    header, data = parts(content)
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(list(header))
        entry = header[name]
        action = chance.randrange(9)
        if action == 0:
            entry["dtype"] = chance.choice(_DTYPES)
        elif action == 1:
            entry["shape"] = _edited(entry.get("shape"), chance)
        elif action == 2:
            entry["data_offsets"] = _edited(entry.get("data_offsets"), chance)
        elif action == 3:
            entry.pop(chance.choice(list(entry) or ["shape"]), None)
        elif action == 4:
            entry[chance.choice(["extra", "\0", "dtype "])] = chance.choice(_NUMBERS)
        elif action == 5:  # two tensors change places, or one vanishes behind the other
            other = chance.choice(list(header))
            header[name], header[other] = header[other], entry
        elif action == 6:
            header[chance.choice(["__metadata__", "", "a", name + "\n"])] = chance.choice([{"a": "b"}, {"a": 1}, entry, [], "x"])
        elif action == 7:
            del header[name]
        else:
            header = dict(chance.sample(list(header.items()), len(header)))
        header = {key: value if isinstance(value, dict) else {"dtype": value} for key, value in header.items()} or {"a": {}}
    text = json.dumps(header, indent=chance.choice([None, None, 1])).encode()
    return container(text + b" " * chance.choice([0, 0, 7, 64]), data)


def _edited(value: object, chance: random.Random) -> object:
    """A list of numbers with one of them different, one less, one more, or the other way round."""
    if not isinstance(value, list) or not value or chance.random() < 0.1:
        return chance.choice(_NUMBERS)
    place = chance.randrange(len(value))
    old = value[place] if type(value[place]) is int else 0
    new = chance.choice([old + 1, old - 1, -old, old * 2, old + 64, old ^ 1 << chance.randrange(64), chance.choice(_NUMBERS)])
    return chance.choice([
        [*value[:place], new, *value[place + 1 :]],
        value[::-1],
        value[:place] + value[place + 1 :],
        [*value, chance.choice(_NUMBERS)],
        [chance.choice(_NUMBERS)] * chance.choice([2, 33]),
    ])  # fmt: skip


_MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits flipped": _flip_bits,
    "truncated": _truncate,
    "pieces cut, doubled, moved": _splice,
    "header edited": _edit_header,
    "length edited": _other_length,
}
