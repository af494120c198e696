"""The order of a weight's bytes that the kernels read: tiles of 16 rows, cut along K into pieces, a tile's pieces in a row.

A piece is 64 k (256 for the formats with blocks of 256) of 16 rows. Its codes lie as the tensor core's A fragments want them
(m16n8k16; lane 4 g + t holds rows g and g + 8 at k = 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of each sixteen): 16 bytes a lane and 64 k for
four bits. Scales follow the 64 k that they belong to, those of rows g and g + 8 side by side; what a block of 256 has but once
follows its four times 64. Rows past N and k past K are blocks of zeros. kernels/quantised.cuh reads this.

========  =====================================================================================================================
codes     of 64 k, bytes
Q4_0      lane, step of 16 k: 4 bytes with row half (low, high half of a byte), then k half of the step, then k odd
Q8_0      pair of steps, lane, step of the pair: 8 bytes with row half, then k odd, then k half of the step
Q4_K      as Q4_0
Q6_K      the low four bits as Q4_0; then the high two: lane, pair of steps: k odd, step of the pair: a byte with row half, k half
scales    of 64 k, bytes: g, row half:
Q4_0      d of the first 32, of the second 32; Q8_0 alike
Q4_K      scale, minimum (a byte each) of the first 32, of the second 32; after 256 k: g, row half: d, dmin
Q6_K      the four signed bytes; after 256 k: g, row half: d
========  =====================================================================================================================

Nothing is lost: ``unpack`` gives the blocks back, bit for bit. NumPy's functions pass CuPy arrays on to CuPy, so that both work.
"""

from typing import Any, Final

import numpy as np

from cufuse.quantised.formats import Format, join_six_bits, six_bits

ROWS: Final = 16
"""Rows of a tile."""

_CHUNK: Final = 64


def piece_columns(form: Format) -> int:
    """k of a piece."""
    return max(_CHUNK, form.values)


def piece_bytes(form: Format) -> int:
    """Bytes of a piece: 16 rows."""
    chunk = {"Q4_0": 512 + 64, "Q8_0": 1024 + 64, "Q4_K": 512 + 64, "Q6_K": 768 + 64}[form.name]
    tail = {"Q4_0": 0, "Q8_0": 0, "Q4_K": 64, "Q6_K": 32}[form.name]
    return chunk * (piece_columns(form) // _CHUNK) + tail


def padded_columns(columns: int, form: Format) -> int:
    """K, rounded up to whole pieces."""
    return -(-columns // piece_columns(form)) * piece_columns(form)


def pack(blocks: Any, form: Format) -> Any:
    """Raw blocks, uint8 [N, bytes of a row], as tiles, uint8 [ceil(N / 16), pieces, bytes of a piece]."""
    rows, count = blocks.shape[0], blocks.shape[1] // form.size
    per_piece = piece_columns(form) // form.values
    padded = np.zeros_like(blocks, shape=(-(-rows // ROWS) * ROWS, -(-count // per_piece) * per_piece, form.size))
    if form.name in _ZERO:
        first, last, code = _ZERO[form.name]
        padded[..., first:last] = code
    padded[:rows, :count] = blocks.reshape(rows, count, form.size)
    tiles = len(padded) // ROWS
    return _PACK[form.name](padded.reshape(-1, form.size), tiles).reshape(tiles, -1, piece_bytes(form))


def unpack(tiles: Any, form: Format, rows: int, columns: int) -> Any:
    """The inverse of ``pack``: the raw blocks of [rows, columns] weights."""
    blocks = _UNPACK[form.name](tiles, len(tiles)).reshape(ROWS * len(tiles), -1, form.size)
    return blocks[:rows, : columns // form.values].reshape(rows, -1).copy()  # contiguous; NumPy's function refuses CuPy arrays


_ZERO: Final = {"Q4_0": (2, 18, 0x88), "Q6_K": (128, 192, 0xAA)}
"""First and last byte, and value, of what is not zero in a block whose scales and integers are."""

# row = 16 tile + 8 half + g; k = 64 chunk + 16 step + 8 p + 2 t + odd, p being the half of the step
_AXES: Final = ("tile", "half", "g", "chunk", "step", "p", "t", "odd")


def _spread(codes: Any, tiles: int, order: tuple[str, ...]) -> Any:
    """Codes [rows, K] with their axes in the order of memory."""
    full = codes.reshape(tiles, 2, 8, -1, 4, 2, 4, 2)
    return full.transpose([_AXES.index(axis) for axis in order])


def _gather(spread: Any, order: tuple[str, ...]) -> Any:
    """The inverse of ``_spread``."""
    return spread.transpose([order.index(axis) for axis in _AXES])


_NIBBLES: Final = ("tile", "chunk", "g", "t", "step", "odd", "p", "half")
_BYTES: Final = ("tile", "chunk", "step", "g", "t", "p", "odd", "half")


def _pack_nibbles(codes: Any, tiles: int) -> Any:
    spread = _spread(codes, tiles, _NIBBLES)
    return (spread[..., 0] | spread[..., 1] << 4).reshape(tiles, -1, 512)


def _unpack_nibbles(packed: Any, tiles: int) -> Any:
    both = np.stack([packed & 15, packed >> 4], axis=-1).reshape(tiles, -1, 8, 4, 4, 2, 2, 2)
    return _gather(both, _NIBBLES).reshape(ROWS * tiles, -1)


def _halves(codes: Any, run: int) -> Any:
    runs = codes.reshape(len(codes), -1, 1, run)
    return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(codes), -1)


def _join_halves(codes: Any, run: int) -> Any:
    pairs = codes.reshape(len(codes), -1, 2, run)
    return (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(len(codes), -1)


def _beside(scales: Any, tiles: int, width: int) -> Any:
    """Scales [blocks, ...] as [tile, groups of ``width`` bytes along K, g, half, width]."""
    return scales.reshape(tiles, 2, 8, -1, width).transpose(0, 3, 2, 1, 4).reshape(tiles, -1, ROWS * width)


def _apart(packed: Any, tiles: int, width: int) -> Any:
    """The inverse of ``_beside``: [rows, bytes along K]."""
    return packed.reshape(tiles, -1, 8, 2, width).transpose(0, 3, 2, 1, 4).reshape(ROWS * tiles, -1)


def _pack_q4_0(blocks: Any, tiles: int) -> Any:
    codes = _pack_nibbles(_halves(blocks[:, 2:], 16).reshape(ROWS * tiles, -1), tiles)
    return np.concatenate([codes, _beside(blocks[:, :2], tiles, 4)], axis=2)


def _unpack_q4_0(packed: Any, tiles: int) -> Any:
    codes = _unpack_nibbles(packed[..., :512], tiles).reshape(-1, 32)
    return np.concatenate([_apart(packed[..., 512:], tiles, 4).reshape(-1, 2), _join_halves(codes, 16)], axis=1)


def _pack_q8_0(blocks: Any, tiles: int) -> Any:
    spread = _spread(blocks[:, 2:].reshape(ROWS * tiles, -1), tiles, _BYTES)
    # the lanes of a pair of steps lie side by side, 16 bytes each
    paired = spread.reshape(tiles, -1, 2, 2, 32, 8).transpose(0, 1, 2, 4, 3, 5)
    return np.concatenate([paired.reshape(tiles, -1, 1024), _beside(blocks[:, :2], tiles, 4)], axis=2)


def _unpack_q8_0(packed: Any, tiles: int) -> Any:
    paired = packed[..., :1024].reshape(tiles, -1, 2, 32, 2, 8).transpose(0, 1, 2, 4, 3, 5)
    codes = _gather(paired.reshape(tiles, -1, 4, 8, 4, 2, 2, 2), _BYTES).reshape(-1, 32)
    return np.concatenate([_apart(packed[..., 1024:], tiles, 4).reshape(-1, 2), codes], axis=1)


def _pack_q4_k(blocks: Any, tiles: int) -> Any:
    codes = _pack_nibbles(_halves(blocks[:, 16:], 32).reshape(ROWS * tiles, -1), tiles)
    scales, minima = six_bits(blocks[:, 4:16])
    pairs = _beside(np.stack([scales, minima], axis=-1), tiles, 4)
    chunks = np.concatenate([codes, pairs], axis=2).reshape(tiles, -1, 4 * 576)
    return np.concatenate([chunks, _beside(blocks[:, :4], tiles, 4)], axis=2)


def _unpack_q4_k(packed: Any, tiles: int) -> Any:
    chunks = packed[..., : 4 * 576].reshape(tiles, -1, 576)
    codes = _unpack_nibbles(chunks[..., :512], tiles).reshape(-1, 256)
    pairs = _apart(chunks[..., 512:], tiles, 4).reshape(-1, 8, 2)
    joined = join_six_bits(pairs[..., 0], pairs[..., 1])
    ends = _apart(packed[..., 4 * 576 :], tiles, 4).reshape(-1, 4)
    return np.concatenate([ends, joined, _join_halves(codes, 32)], axis=1)


def _pack_q6_k(blocks: Any, tiles: int) -> Any:
    low = _halves(blocks[:, :128], 64).reshape(ROWS * tiles, -1)
    two = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    high = np.concatenate([two >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(ROWS * tiles, -1)
    spread = _spread(high, tiles, ("tile", "chunk", "g", "t", "step", "odd", "p", "half")).reshape(tiles, -1, 32, 2, 2, 2, 4)
    spread = spread.transpose(0, 1, 2, 3, 5, 4, 6)  # pair of steps, odd, step of the pair, place
    bits = (spread[..., 0] | spread[..., 1] << 2 | spread[..., 2] << 4 | spread[..., 3] << 6).reshape(tiles, -1, 256)
    chunk = np.concatenate([_pack_nibbles(low, tiles), bits, _beside(blocks[:, 192:208], tiles, 4)], axis=2)
    return np.concatenate([chunk.reshape(tiles, -1, 4 * 832), _beside(blocks[:, 208:], tiles, 2)], axis=2)


def _unpack_q6_k(packed: Any, tiles: int) -> Any:
    chunks = packed[..., : 4 * 832].reshape(tiles, -1, 832)
    low = _unpack_nibbles(chunks[..., :512], tiles)
    bits = chunks[..., 512:768]
    spread = np.stack([bits >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(tiles, -1, 32, 2, 2, 2, 4)
    spread = spread.transpose(0, 1, 2, 3, 5, 4, 6).reshape(tiles, -1, 8, 4, 4, 2, 2, 2)
    high = _gather(spread, ("tile", "chunk", "g", "t", "step", "odd", "p", "half")).reshape(-1, 2, 4, 32)
    two = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    scales = _apart(chunks[..., 768:], tiles, 4).reshape(-1, 16)
    ends = _apart(packed[..., 4 * 832 :], tiles, 2).reshape(-1, 2)
    return np.concatenate([_join_halves(low.reshape(-1, 256), 64), two.reshape(-1, 64), scales, ends], axis=1)


_PACK: Final = {"Q4_0": _pack_q4_0, "Q8_0": _pack_q8_0, "Q4_K": _pack_q4_k, "Q6_K": _pack_q6_k}
_UNPACK: Final = {"Q4_0": _unpack_q4_0, "Q8_0": _unpack_q8_0, "Q4_K": _unpack_q4_k, "Q6_K": _unpack_q6_k}
