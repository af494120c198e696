"""The blocks of four of ggml's formats, and what they hold: integers, and the scales that multiply them.

A row of K weights is a row of blocks, each of ``values`` consecutive weights in ``size`` bytes, little endian, without gaps
(ggml/src/ggml-common.h, block_q4_0, block_q8_0, block_q4_K, block_q6_K; QK_K = 256). With d and dmin float16:

======  ======  =====  ==============================================================================================
format  values  bytes  content
======  ======  =====  ==============================================================================================
Q4_0    32      18     d; 16 bytes: low halves are weights 0-15, high halves 16-31; w = d (q - 8)
Q8_0    32      34     d; 32 signed bytes; w = d q
Q4_K    256     144    d; dmin; 12 bytes with a 6-bit scale s and minimum m for each 32 weights; 128 bytes: for each 64 weights
                       32 bytes, low halves the first 32, high halves the others; w = (d s) q - (dmin m)
Q6_K    256     210    128 bytes with the low four bits, 64 with the high two, for each 128 weights in turn; a signed byte s for
                       each 16 weights; d; w = (d s) (q - 32)
======  ======  =====  ==============================================================================================

Every format is thus ``w = scale * integer`` or ``scale * integer - offset`` over *groups* of 16 or 32 weights. The integers have
8 bits at most, so bfloat16 holds them exactly; scale and offset, products of a float16 and a byte, are exact in float32; their
product and difference are rounded to float32 as ``gguf.quants.dequantize`` (gguf 0.19.0) rounds them: ``decode`` has its bits.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np

_ROWS_AT_A_TIME_BYTES: Final = 1 << 24


class Content(NamedTuple):
    """What blocks [..., count of blocks] hold: ``integers`` int8 [..., K], ``scales`` float32 [..., K / group], and ``offsets``
    like them, or None."""

    integers: np.ndarray
    scales: np.ndarray
    offsets: np.ndarray | None


@dataclass(frozen=True)
class Format:
    """A block format: its name, the weights and bytes of a block, the weights that share a scale, ggml's number of the type."""

    name: str
    values: int
    size: int
    group: int
    ggml_type: int

    @property
    def bits(self) -> float:
        """Bits a weight."""
        return 8 * self.size / self.values

    def bytes_of(self, columns: int) -> int:
        """Bytes of a row of so many weights; ValueError unless they are whole blocks."""
        if columns % self.values:
            raise ValueError(f"rows of {columns} weights are no whole blocks; {self.name} needs a multiple of {self.values}")
        return columns // self.values * self.size


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        one.name: one
        for one in (
            Format("Q4_0", 32, 18, 32, 2),
            Format("Q8_0", 32, 34, 32, 8),
            Format("Q4_K", 256, 144, 32, 12),
            Format("Q6_K", 256, 210, 16, 14),
        )
    }
)
"""By name; ``ggml_type`` is ggml.h's enum ggml_type."""


def get(name: str | Format) -> Format:
    """The format of this name in upper or lower case, or the format itself; ValueError for another name, TypeError for a kind."""
    if isinstance(name, Format):
        return name
    if not isinstance(name, str):
        raise TypeError(f"format is a {type(name).__name__}; needed is a name: {', '.join(FORMATS)}")
    if name.upper() not in FORMATS:
        raise ValueError(f"format is {name!r}; known are {', '.join(FORMATS)}: convert the model with llama-quantize")
    return FORMATS[name.upper()]


def split(blocks: np.ndarray, form: Format) -> Content:
    """Integers, scales and offsets of raw blocks, uint8 [..., bytes of a row]."""
    one = np.ascontiguousarray(blocks).reshape(-1, form.size)
    with np.errstate(over="ignore", invalid="ignore"):
        integers, scales, offsets = _SPLITS[form.name](one)
    lead = blocks.shape[:-1]
    return Content(integers.reshape(*lead, -1), scales.reshape(*lead, -1), None if offsets is None else offsets.reshape(*lead, -1))


def decode(blocks: np.ndarray, form: Format) -> np.ndarray:
    """The float32 weights [..., K] of raw blocks, uint8 [..., bytes of a row]: gguf's bits."""
    rows = np.ascontiguousarray(blocks).reshape(-1, blocks.shape[-1])
    columns = blocks.shape[-1] // form.size * form.values
    weights = np.empty((len(rows), columns), np.float32)
    step = max(1, _ROWS_AT_A_TIME_BYTES // max(1, 4 * columns))
    for first in range(0, len(rows), step):
        part = slice(first, first + step)
        content = split(rows[part], form)
        grouped = weights[part].reshape(-1, form.group)
        with np.errstate(over="ignore", invalid="ignore"):
            np.multiply(content.scales.reshape(-1, 1), content.integers.reshape(-1, form.group), out=grouped, dtype=np.float32)
            if content.offsets is not None:
                np.subtract(grouped, content.offsets.reshape(-1, 1), out=grouped)
    return weights.reshape(*blocks.shape[:-1], columns)


def _float16(two_bytes: np.ndarray) -> np.ndarray:
    """[..., 2] bytes -> float32 [..., 1]."""
    return np.ascontiguousarray(two_bytes).view("<f2").astype(np.float32)


def _halves(codes: np.ndarray, run: int) -> np.ndarray:
    """Bytes [blocks, n] -> their halves: for each ``run`` bytes first the low ones, then the high ones."""
    runs = codes.reshape(len(codes), -1, 1, run)
    return np.concatenate([runs & 0x0F, runs >> 4], axis=2).reshape(len(codes), -1)


def _split_q4_0(blocks: np.ndarray) -> tuple[Any, Any, Any]:
    return _halves(blocks[:, 2:], 16).view(np.int8) - np.int8(8), _float16(blocks[:, :2]), None


def _split_q8_0(blocks: np.ndarray) -> tuple[Any, Any, Any]:
    return blocks[:, 2:].view(np.int8), _float16(blocks[:, :2]), None


def _split_q4_k(blocks: np.ndarray) -> tuple[Any, Any, Any]:
    scales, minima = six_bits(blocks[:, 4:16])
    d, dmin = _float16(blocks[:, 0:2]), _float16(blocks[:, 2:4])
    return (
        _halves(blocks[:, 16:], 32).view(np.int8),
        d * scales.astype(np.float32),
        dmin * minima.astype(np.float32),
    )


def _split_q6_k(blocks: np.ndarray) -> tuple[Any, Any, Any]:
    low = _halves(blocks[:, :128], 64)
    two = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    high = np.concatenate([two >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(len(blocks), 256)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32)
    return (low | high << 4).view(np.int8) - np.int8(32), _float16(blocks[:, 208:]) * scales, None


_SPLITS: Final = {"Q4_0": _split_q4_0, "Q8_0": _split_q8_0, "Q4_K": _split_q4_k, "Q6_K": _split_q6_k}


def six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight 6-bit scales and minima in Q4_K's twelve bytes [blocks, 12], uint8 [blocks, 8] each.

    Bytes 0-3 hold scales 0-3, bytes 4-7 minima 0-3, in six bits; bytes 8-11 the low four bits of scales 4-7 (low half) and minima
    4-7 (high half), whose upper two bits are the upper two of bytes 0-3 and 4-7 (ggml-quants.c, get_scale_min_k4).
    """
    a, b, c = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([a & 63, c & 15 | a >> 2 & 48], axis=1)
    minima = np.concatenate([b & 63, c >> 4 | b >> 2 & 48], axis=1)
    return scales, minima


def join_six_bits(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """The inverse of ``six_bits``: uint8 [blocks, 12]."""
    a = scales[:, :4] | (scales[:, 4:] & 48) << 2
    b = minima[:, :4] | (minima[:, 4:] & 48) << 2
    return np.concatenate([a, b, scales[:, 4:] & 15 | (minima[:, 4:] & 15) << 4], axis=1)
