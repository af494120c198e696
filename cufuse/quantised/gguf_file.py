"""One GGUF file as untrusted input: a bounded, checked header, and reads of single tensors.

The format (ggml, docs/gguf.md, versions 2 and 3, little endian): magic, version, numbers of tensors and of metadata; metadata
as key, type, value; for each tensor name, dimensions (the fastest first), type and offset; padding to the alignment; the bytes.

Why not ``gguf.GGUFReader`` (gguf 0.19.0, measured): it maps the file into memory, and one that becomes shorter ends the process
with SIGBUS; a header with 151,936 tokens and 151,387 merges takes it 16 s and 490 MB, here 0.4 s and less than one; of the 29
malformed files in tests/test_gguf.py it accepts 6 (tensors on each other, say), does not end within 8 s for one, and mostly answers
with errors of NumPy's that name neither file nor tensor. The package is the tests' witness, which writes files and reads them too.
"""

import math
import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import numpy as np

from cufuse._safetensors_file import CheckpointError, _identity, _read_exactly, failure, open_regular, printable
from cufuse.bf16 import bfloat16
from cufuse.quantised.formats import FORMATS
from cufuse.quantised.weight import QuantisedWeight

MAX_TENSORS: Final = 100_000
MAX_METADATA: Final = 100_000
MAX_DIMENSIONS: Final = 4  # ggml's GGML_MAX_DIMS
MAX_NAME_BYTES: Final = 65_535
MAX_HEADER_BYTES: Final = 1 << 28

_MAGIC: Final = b"GGUF"
_DEFAULT_ALIGNMENT: Final = 32
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN: Final[dict[int, tuple[str, Any]]] = {
    0: ("F32", np.dtype("<f4")), 1: ("F16", np.dtype("<f2")), 30: ("BF16", np.dtype("<u2")),
}  # fmt: skip
_QUANTISED: Final = {form.ggml_type: form for form in FORMATS.values()}
_OTHER_TYPES: Final = {
    3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
"""ggml.h, enum ggml_type: for messages; their sizes are not known here."""

_REMEDY: Final = "convert the model with llama-quantize to " + ", ".join(FORMATS) + " or Q4_K_M"


class Tensor(NamedTuple):
    """A tensor's entry: shape as NumPy has it (slowest first), number of its type, bytes from the file's start, size in bytes
    (None where the type is not one that is read)."""

    shape: tuple[int, ...]
    ggml_type: int
    start: int
    size: int | None

    @property
    def type_name(self) -> str:
        if self.ggml_type in _PLAIN:
            return _PLAIN[self.ggml_type][0]
        form = _QUANTISED.get(self.ggml_type)
        return form.name if form else _OTHER_TYPES.get(self.ggml_type, f"type {self.ggml_type}")


class GgufFile:
    """A GGUF file whose header has been checked; tensors are read on demand.

    ``metadata``: keys with scalar or string values; of arrays the length alone, under "key#length". ``tensors``: by name. No file
    stays open between calls; every read first compares the file's identity, size and time of modification with those of the check.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as file:
            self._identity = _identity(file)
            reader = _Reader(file, path)
            self.metadata, self.tensors = _read_header(reader)

    def read_float32(self, name: str) -> np.ndarray:
        """A tensor of type F32, F16 or BF16 as float32, exactly."""
        entry = self._entry(name)
        if entry.ggml_type not in _PLAIN:
            raise failure(self.path, f"type is {entry.type_name}; F32 is needed: norm weights are not quantised", tensor=name)
        return _widened(self._read(name, entry), entry.ggml_type).reshape(entry.shape)

    def read_weight(self, name: str) -> QuantisedWeight | np.ndarray:
        """A matrix [N, K]: a QuantisedWeight, bfloat16 for type BF16, float32 for F32 and F16."""
        entry = self._entry(name)
        form = _QUANTISED.get(entry.ggml_type)
        if form is None and entry.ggml_type not in _PLAIN:
            known = ", ".join([*FORMATS, *(plain for plain, _ in _PLAIN.values())])
            raise failure(self.path, f"type is {entry.type_name}; known are {known}", _REMEDY, tensor=name)
        if len(entry.shape) != 2:
            raise failure(self.path, f"shape is {list(entry.shape)}; a matrix is needed", tensor=name)
        if form is None:
            values = self.read_float32(name)
            return values.astype(bfloat16) if entry.ggml_type == 30 else values
        return QuantisedWeight(self._read(name, entry).reshape(entry.shape[0], -1), form, (entry.shape[0], entry.shape[1]))

    def read_rows(self, name: str, rows: list[int]) -> np.ndarray:
        """Rows of a matrix as float32 [rows, K], decoded; reads only these."""
        entry = self._entry(name)
        form = _QUANTISED.get(entry.ggml_type)
        if len(entry.shape) != 2 or entry.size is None:
            raise failure(self.path, f"type is {entry.type_name}, shape {list(entry.shape)}; a known matrix is needed", tensor=name)
        row_bytes = entry.size // entry.shape[0]
        raw = np.concatenate([self._bytes(name, entry.start + row * row_bytes, row_bytes) for row in rows]) if rows else None
        if raw is None:
            return np.empty((0, entry.shape[1]), np.float32)
        if form is not None:
            from cufuse.quantised.weight import dequantise

            return np.asarray(dequantise(QuantisedWeight(raw.reshape(len(rows), -1), form, (len(rows), entry.shape[1]))))
        return _widened(raw, entry.ggml_type).reshape(len(rows), -1)

    def _entry(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise failure(self.path, "is missing", "give a whole model of Qwen3's or Llama's kind", tensor=name)
        return self.tensors[name]

    def _read(self, name: str, entry: Tensor) -> np.ndarray:
        assert entry.size is not None
        return self._bytes(name, entry.start, entry.size)

    def _bytes(self, name: str, start: int, size: int) -> np.ndarray:
        data = np.empty(size, np.uint8)
        with open_regular(self.path) as file:
            if _identity(file) != self._identity:
                problem = "the file has changed since it was opened"
                raise failure(self.path, problem, "open the checkpoint again", tensor=name)
            _read_exactly(file, start, data.data, self.path, name)
        return data


def _widened(raw: np.ndarray, ggml_type: int) -> np.ndarray:
    """Bytes of a plain type as float32."""
    plain = raw.view(_PLAIN[ggml_type][1])
    wide = (plain.astype(np.uint32) << 16).view(np.float32) if ggml_type == 30 else plain.astype(np.float32)
    return np.asarray(wide)


class _Reader:
    """Bytes of the header, one after the other, never past the end of the file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.at = 0
        self._file = file
        self._window = b""
        self._window_at = 0

    def take(self, count: int, what: str) -> bytes:
        """The next ``count`` bytes; CheckpointError where the file ends before."""
        self.skip(count, what)
        first = self.at - count - self._window_at
        if first < 0 or first + count > len(self._window):
            data = bytearray(min(max(count, 1 << 16), self.size - (self.at - count)))
            _read_exactly(self._file, self.at - count, memoryview(data), self.path, None)
            self._window, self._window_at, first = bytes(data), self.at - count, 0
        return self._window[first : first + count]

    def skip(self, count: int, what: str) -> None:
        """Step over bytes that must exist."""
        if count > self.size - self.at:
            problem = f"{what} needs {count} bytes at byte {self.at}, the file has {self.size}: truncated or damaged"
            raise failure(self.path, problem)
        if self.at + count > MAX_HEADER_BYTES:
            problem = f"{what} at byte {self.at} makes the header longer than the {MAX_HEADER_BYTES} bytes allowed"
            raise failure(self.path, problem)
        self.at += count

    def number(self, code: str, what: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, limit: int, what: str) -> str:
        length = self.number("Q", what)
        if length > limit:
            raise failure(self.path, f"{what} has {length} bytes, at most {limit} are allowed")
        try:
            return self.take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise failure(self.path, f"{what} is not UTF-8 (byte {error.start})") from error


def _read_header(reader: _Reader) -> tuple[dict[str, Any], dict[str, Tensor]]:
    path = reader.path
    magic = reader.take(4, "magic")
    if magic != _MAGIC:
        raise failure(path, f"begins with {printable(magic)!r}, a GGUF file with 'GGUF'", "give a .gguf file")
    version = reader.number("I", "version")
    if version not in (2, 3):
        swapped = ": its bytes are those of a big-endian machine" if version in (2 << 24, 3 << 24) else ""
        raise failure(path, f"GGUF version is {version}, 2 or 3 are known{swapped}", "convert the model with today's llama.cpp")
    tensor_count, metadata_count = reader.number("Q", "number of tensors"), reader.number("Q", "number of metadata")
    for count, limit, what in ((tensor_count, MAX_TENSORS, "tensors"), (metadata_count, MAX_METADATA, "metadata")):
        if count > limit:
            raise failure(path, f"promises {count} {what}, at most {limit} are allowed")
    metadata: dict[str, Any] = {}
    for index in range(metadata_count):
        key = reader.string(MAX_NAME_BYTES, f"key {index}")
        if key in metadata or f"{key}#length" in metadata:
            raise failure(path, f"metadata '{printable(key, 80)}' is there twice")
        name, value = _read_value(reader, key)
        metadata[name] = value
    entries = _read_entries(reader, tensor_count)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise failure(path, f"general.alignment is {printable(alignment, 40)}; a power of two from 8 on is needed")
    start = -(-reader.at // alignment) * alignment
    return metadata, _checked(entries, start, alignment, reader)


def _read_value(reader: _Reader, key: str) -> tuple[str, Any]:
    """A metadata value under the name to keep it by; arrays are stepped over."""
    what = f"value of '{printable(key, 80)}'"
    kind = reader.number("I", what)
    if kind in _SCALARS:
        return key, reader.number(_SCALARS[kind], what)
    if kind == _STRING:
        return key, reader.string(MAX_HEADER_BYTES, what)
    if kind != _ARRAY:
        raise failure(reader.path, f"{what} has the unknown type {kind}")
    element, count = reader.number("I", what), reader.number("Q", what)
    if element in _SCALARS:
        reader.skip(count * struct.calcsize(f"<{_SCALARS[element]}"), what)
    elif element == _STRING:
        if count > (reader.size - reader.at) // 8:
            raise failure(reader.path, f"{what} promises {count} strings in {reader.size - reader.at} bytes")
        for _ in range(count):
            reader.skip(reader.number("Q", what), what)
    else:
        raise failure(reader.path, f"{what} is an array of the unknown type {element}")
    return f"{key}#length", count


def _read_entries(reader: _Reader, count: int) -> dict[str, tuple[tuple[int, ...], int, int]]:
    """Shape, type and offset of each tensor, as the table states them."""
    entries: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for index in range(count):
        name = reader.string(MAX_NAME_BYTES, f"name of tensor {index}")
        if name in entries:
            raise failure(reader.path, "is there twice", tensor=name)
        dimensions = reader.number("I", "number of dimensions")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise failure(reader.path, f"has {dimensions} dimensions, 1 to {MAX_DIMENSIONS} are allowed", tensor=name)
        lengths = [reader.number("Q", "dimension") for _ in range(dimensions)]
        if any(not 1 <= length < 1 << 40 for length in lengths):
            raise failure(reader.path, f"has dimensions {printable(lengths, 80)}; needed are positive ones", tensor=name)
        kind, offset = reader.number("I", "type"), reader.number("Q", "offset")
        entries[name] = (tuple(reversed(lengths)), kind, offset)
    return entries


def _checked(
    entries: dict[str, tuple[tuple[int, ...], int, int]], start: int, alignment: int, reader: _Reader
) -> dict[str, Tensor]:
    """Every tensor inside the file, aligned, in whole blocks, and none on top of another."""
    tensors = {}
    for name, (shape, kind, offset) in entries.items():
        if offset % alignment:
            raise failure(reader.path, f"offset {offset} is no multiple of the alignment {alignment}", tensor=name)
        size = _size(shape, kind, name, reader.path)
        if start + offset + (size or 0) > reader.size:
            needed = start + offset + (size or 0)
            problem = f"{printable(list(shape), 60)} ends at byte {needed}, the file at {reader.size}: truncated, or a lying table"
            raise failure(reader.path, problem, tensor=name)
        tensors[name] = Tensor(shape, kind, start + offset, size)
    end, previous = start, "the header"
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise failure(reader.path, f"begins at byte {tensor.start}, inside '{printable(previous, 80)}'", tensor=name)
        end, previous = tensor.start + (tensor.size or 0), name
    return tensors


def _size(shape: tuple[int, ...], kind: int, name: str, path: Path) -> int | None:
    if kind in _PLAIN:
        return math.prod(shape) * int(_PLAIN[kind][1].itemsize)
    form = _QUANTISED.get(kind)
    if form is None:
        return None
    if shape[-1] % form.values:
        problem = f"rows of {shape[-1]} weights are no whole blocks of {form.name} ({form.values} weights)"
        raise failure(path, problem, tensor=name)
    return math.prod(shape[:-1]) * form.bytes_of(shape[-1])


__all__ = ["CheckpointError", "GgufFile", "Tensor"]
