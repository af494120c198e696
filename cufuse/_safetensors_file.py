"""One safetensors file as untrusted input: a bounded, checked header, and reads of single tensors.

The format (github.com/huggingface/safetensors, README, "Format"): eight bytes with the header's length N, lowest
first; N bytes of JSON that map each tensor's name to dtype, shape and a byte range; the tensors' bytes without holes.

Why not ``safetensors.safe_open``: measured with safetensors 0.8.0, its ``mmap`` back end dies of SIGBUS, interpreter
and all, when the file is shorter than it was at opening; its ``pread`` back end reads the whole tensor to serve one
row; and of two entries with one name it silently keeps the last. The header has to be checked here in any case, for
errors that name the tensor; what is left for a reader then is one ``readinto``.
"""

import contextlib
import gc
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

MAX_HEADER_BYTES = 100_000_000  # the format's own limit; one of zeros takes 200 MB until it is refused
MAX_TENSORS = 500_000  # the largest published checkpoints hold about 200,000
MAX_RANK = 32
MAX_JSON_ITEMS = 12 * MAX_TENSORS  # what a matrix takes in a header; bounds the parser's memory, see parse_json_object

# bits per element; the names are safetensors 0.8.0's
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

# what people hand over instead of safetensors, by its first bytes
_OTHER_FORMATS = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "fetch the file with 'git lfs pull'"),
    (b"PK\x03\x04", "is a zip archive or PyTorch pickle, which is never unpickled", "convert it to safetensors"),
    (b"\x80", "is a Python pickle, which is never unpickled", "convert it to safetensors"),
    (b"GGUF", "is a GGUF file", "take the safetensors version of the model"),
    (b"<", "looks like a web page", "download the file itself"),
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line that names the file, the tensor and the remedy."""

    __module__ = "cufuse.checkpoint"  # where users import it from


class TensorEntry(NamedTuple):
    """One tensor's entry in the header; the byte range counts from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def printable(text: object, limit: int = 200) -> str:
    """``text`` on one line: control characters escaped, the middle left out beyond ``limit`` characters."""
    string = str(text)
    if len(string) > limit:
        string = f"{string[: limit // 2]}...{string[-limit // 4 :]}"
    return string if string.isprintable() else ascii(string)[1:-1]


def failure(path: Path, problem: str, remedy: str = "download it again", *, tensor: str | None = None) -> CheckpointError:
    """The error to raise: file, tensor where there is one, problem and remedy on one line."""
    place = printable(path, 400) + (f": tensor '{printable(tensor)}'" if tensor is not None else "")
    return CheckpointError(f"{place}: {problem}; {remedy}")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading, unbuffered; a folder, FIFO, socket or device is refused, not waited for."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            problem = "is not a regular file (a folder, FIFO, socket or device?)"
            raise failure(path, problem, "give a folder of files or a .safetensors file")
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise failure(path, f"cannot be opened: {error.strerror}", "check the path and its permissions") from error


def read_small_file(path: Path, limit: int) -> bytearray:
    """All bytes of a file of at most ``limit`` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise failure(path, f"has {size} bytes, more than the {limit} allowed")
        data = bytearray(size)
        _read_exactly(file, 0, memoryview(data), path, None)
    return data


def parse_json_object(
    data: bytes | bytearray, path: Path, what: str, members_of: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> dict[str, Any]:
    """``data`` as a JSON object in UTF-8 without duplicate keys, NaN or Infinity; ``members_of`` makes other things of objects.

    Every list element and object member costs a bracket, comma or colon in the text, so that counting these first
    bounds the memory that parsing can take: below 1 GB at worst, where 100 MB of ``[],`` would otherwise take 2 GB.
    """
    if sum(data.count(mark) for mark in (b"{", b"[", b",", b":")) > MAX_JSON_ITEMS:
        raise failure(path, f"{what} has more than the {MAX_JSON_ITEMS} items allowed")
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=members_of or _unique_keys, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise failure(path, f"{what} is not UTF-8 (byte {error.start})") from error
    except RecursionError as error:
        raise failure(path, f"{what} is not valid JSON: nested too deeply") from error
    except ValueError as error:  # JSONDecodeError, the two raised below, integers of more than 4300 digits
        raise failure(path, f"{what} is not valid JSON: {printable(error)}") from error
    if not isinstance(parsed, dict):
        raise failure(path, f"{what} is a JSON {type(parsed).__name__}, an object is needed")
    return parsed


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"duplicate key '{printable(repeated)}'")
    return members


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_exactly(file: BinaryIO, start: int, target: memoryview, path: Path, tensor: str | None) -> None:
    """Fill ``target`` from byte ``start`` on; a file that ends before that is an error, never a short array."""
    try:
        file.seek(start)
        done = 0
        while done < len(target):
            count = file.readinto(target[done:])  # type: ignore[attr-defined]
            if not count:
                raise failure(path, f"ends {len(target) - done} bytes too early", tensor=tensor)
            done += count
    except OSError as error:
        raise failure(path, f"cannot be read: {error.strerror}", "check the disk", tensor=tensor) from error


class SafetensorsFile:
    """A safetensors file whose header has been checked; tensors are read on demand.

    No file stays open between calls. Every read first compares the file's identity, size and time of modification with
    those of the header's check, so that byte ranges are never applied to another file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _collector_paused(), open_regular(path) as file:
            self._identity = _identity(file)
            header, self._data_start = _read_header(file, path)
            data_size = os.fstat(file.fileno()).st_size - self._data_start
            self.metadata = _check_metadata(header.pop("__metadata__", {}), path)
            if len(header) > MAX_TENSORS:
                raise failure(path, f"describes {len(header)} tensors, more than the {MAX_TENSORS} allowed")
            self.tensors = {name: _check_entry(name, entry, path) for name, entry in header.items()}
            _check_coverage(self.tensors, data_size, path)

    def read_bfloat16(self, name: str, rows: Sequence[int] | None = None) -> Array:
        """Tensor ``name`` as bfloat16, or only ``rows`` of it (indices into its first dimension, in range).

        Dtype BF16 is taken as it is. F32 is taken where every value is a bfloat16 already (its lower 16 bits are 0);
        nothing is ever rounded here, and every other dtype is an error.
        """
        entry = self.tensors[name]
        if entry.dtype not in ("BF16", "F32"):
            raise failure(self.path, f"dtype is {entry.dtype}, BF16 is needed", _CONVERT, tensor=name)
        begin = self._data_start + entry.start
        stored = np.dtype("<u2") if entry.dtype == "BF16" else np.dtype("<u4")
        shape = entry.shape if rows is None else (len(rows), *entry.shape[1:])
        try:
            bits = np.empty(shape, dtype=stored)
        except MemoryError as error:
            problem = f"{printable(list(shape), 80)} of {entry.dtype} does not fit into memory"
            raise failure(self.path, problem, "take a smaller model, or free some memory", tensor=name) from error
        with open_regular(self.path) as file:
            if _identity(file) != self._identity:
                problem = "the file has changed since it was opened"
                raise failure(self.path, problem, "open the checkpoint again", tensor=name)
            if rows is None:
                _read_exactly(file, begin, _bytes_of(bits), self.path, name)
            else:
                row_bytes = math.prod(entry.shape[1:]) * stored.itemsize
                for position, row in enumerate(rows):
                    _read_exactly(file, begin + row * row_bytes, _bytes_of(bits[position]), self.path, name)
        if entry.dtype == "F32":
            bits = self._upper_half(bits, name)
        return bits.astype(np.uint16, copy=False).view(ml_dtypes.bfloat16)

    def map_bfloat16(self, name: str) -> Array:
        """Tensor ``name`` as a read-only bfloat16 array over the file's pages, which are read when they are used.

        A tensor that cannot be mapped (F32, an odd address, no bytes) is read as by ``read_bfloat16``. A file must not be made
        shorter while an array over it lives: the operating system then ends the process (SIGBUS) at the next use.
        """
        entry = self.tensors[name]
        begin = self._data_start + entry.start
        if entry.dtype != "BF16" or begin % 2 or entry.start == entry.end or np.dtype("<u2") != np.dtype(np.uint16):
            return self.read_bfloat16(name)
        with open_regular(self.path) as file:
            if _identity(file) != self._identity:
                problem = "the file has changed since it was opened"
                raise failure(self.path, problem, "open the checkpoint again", tensor=name)
            bits = np.memmap(file, np.uint16, "r", begin, entry.shape)
        return np.asarray(bits).view(ml_dtypes.bfloat16)

    def _upper_half(self, bits: Array, name: str) -> Array:
        inexact = int(np.count_nonzero(bits & np.uint32(0xFFFF)))
        if inexact:
            problem = f"dtype is F32 and {inexact} of the {bits.size} values read are no bfloat16"
            raise failure(self.path, problem, _CONVERT, tensor=name)
        return (bits >> np.uint32(16)).astype(np.uint16)


_CONVERT = "convert the checkpoint once, e.g. model.to(torch.bfloat16).save_pretrained(folder) in transformers"


@contextlib.contextmanager
def _collector_paused() -> Iterator[None]:
    """While a header's objects are made, which all live and hold no cycles: the garbage collector would walk them again and again,
    for a third of the time that a header of 100,000 takes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _identity(file: BinaryIO) -> tuple[int, int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _bytes_of(array: Array) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def _read_header(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header as a JSON object, and the byte at which the tensors begin."""
    size = os.fstat(file.fileno()).st_size
    beginning = bytearray(min(size, 32))
    _read_exactly(file, 0, memoryview(beginning), path, None)
    for magic, problem, remedy in _OTHER_FORMATS:
        if beginning.startswith(magic) and beginning[8:9] != b"{":  # these bytes may also be a header's length
            raise failure(path, problem, remedy)
    if size < 8:
        raise failure(path, f"has {size} bytes, too few for a safetensors header")
    length = int.from_bytes(beginning[:8], "little")
    if length > MAX_HEADER_BYTES:
        problem = f"header length is {length}, at most {MAX_HEADER_BYTES} is allowed"
        raise failure(path, f"{problem}: damaged, or no safetensors file")
    if length > size - 8:
        raise failure(path, f"header length is {length} but only {size - 8} bytes follow: truncated")
    data = bytearray(length)
    _read_exactly(file, 8, memoryview(data), path, None)
    if not data.startswith(b"{"):
        raise failure(path, "header does not begin with '{': damaged, or no safetensors file")
    return parse_json_object(data, path, "header", _header_members), 8 + length


def _check_metadata(metadata: object, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise failure(path, "header's __metadata__ is not an object of strings")
    return metadata


def _are_counts(values: list[Any]) -> bool:
    """Non-negative JSON integers below 2^63 (a JSON true is a Python int, too)."""
    for value in values:  # noqa: SIM110 - a generator costs more than all the rest of an entry's check
        if type(value) is not int or not 0 <= value < _TOO_LARGE:
            return False
    return True


_TOO_LARGE = 1 << 63


def _header_members(pairs: list[tuple[str, Any]]) -> Any:
    """An object of a header: a sound entry as what is kept of it, at once (a header of 100,000 takes a fifth less time and
    memory so); all else as a dict, for whoever names what is wrong."""
    members = _unique_keys(pairs)
    if len(members) != 3 or members.keys() != _ENTRY_MEMBERS:
        return members
    try:
        return _entry(members)
    except _EntryError:
        return members


_ENTRY_MEMBERS = {"dtype", "shape", "data_offsets"}


class _EntryError(ValueError):
    """What is wrong with an entry, and the remedy."""


def _entry(members: dict[str, Any]) -> TensorEntry:
    """One header entry: kinds and ranges of its three members, and its size against dtype and shape."""
    dtype, shape, offsets = members["dtype"], members["shape"], members["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _EntryError(f"dtype '{printable(dtype, 40)}' is unknown", _CONVERT)
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not _are_counts(shape):
        raise _EntryError(f"shape {printable(shape, 80)} is not a list of at most {MAX_RANK} non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_counts(offsets):
        raise _EntryError(f"data_offsets {printable(offsets, 80)} are not two non-negative integers")
    start, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if (end - start) * 8 != bits:  # swapped offsets, too
        needed = f"{printable(bits, 40)} bits for {dtype} {printable(shape, 80)}"
        raise _EntryError(f"data_offsets {offsets} do not hold the {needed}")
    return TensorEntry(dtype, tuple(shape), start, end)


def _check_entry(name: str, entry: object, path: Path) -> TensorEntry:
    if type(entry) is TensorEntry:
        return entry
    if not isinstance(entry, dict) or not entry.keys() >= _ENTRY_MEMBERS:
        raise failure(path, "header entry lacks dtype, shape or data_offsets", tensor=name)
    try:
        return _entry(entry)
    except _EntryError as error:
        raise failure(path, *error.args, tensor=name) from None


def _check_coverage(entries: dict[str, TensorEntry], data_size: int, path: Path) -> None:
    """The tensors' byte ranges must tile the data: no overlap, no hole, nothing beyond the end, nothing left over."""
    position, previous = 0, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < position:
            problem = f"data_offsets [{entry.start}, {entry.end}] overlap those of '{printable(previous)}'"
            raise failure(path, problem, tensor=name)
        if entry.start > position:
            problem = f"{entry.start - position} bytes before it, behind '{printable(previous)}', belong to no tensor"
            raise failure(path, problem, tensor=name)
        if entry.end > data_size:
            problem = f"ends {entry.end - data_size} bytes behind the end of the file: truncated"
            raise failure(path, problem, tensor=name)
        position, previous = entry.end, name
    if position != data_size:
        problem = f"{data_size - position} bytes behind it, at the end of the file, belong to no tensor"
        raise failure(path, problem, tensor=previous)
