"""Quantising: float32 weights to blocks.

Q4_0 and Q8_0 have the bits of ``gguf.quants.quantize`` (gguf 0.19.0), which are those of ggml's reference quantisers on CPUs.
Q4_K and Q6_K are cufuse's own and plain: each group's range decides its scale, nothing is searched for. llama.cpp's search finds
smaller errors; use its files where the error matters.
"""

from typing import Final

import numpy as np

from cufuse.quantised.formats import Format, join_six_bits

_ROWS_AT_A_TIME: Final = 1 << 22


def encode(weights: np.ndarray, form: Format) -> np.ndarray:
    """Raw blocks, uint8 [..., bytes of a row], of float32 weights [..., K].

    Special values: an infinity or NaN makes its block's scale infinite or NaN, as in gguf; integers are then what casts give.
    Raises ValueError unless K is a multiple of the block's weights.
    """
    row_bytes = form.bytes_of(weights.shape[-1])
    flat = np.ascontiguousarray(weights, np.float32).reshape(-1, form.values)
    blocks = np.empty((len(flat), form.size), np.uint8)
    step = max(1, _ROWS_AT_A_TIME // form.values)
    with np.errstate(all="ignore"):
        for first in range(0, len(flat), step):
            blocks[first : first + step] = _ENCODERS[form.name](flat[first : first + step])
    return blocks.reshape(*weights.shape[:-1], row_bytes)


def _bytes(half: np.ndarray) -> np.ndarray:
    return half.astype("<f2").view(np.uint8)


def _encode_q4_0(x: np.ndarray) -> np.ndarray:
    # the value of largest magnitude, the first of several, becomes -8
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    d = extreme / np.float32(-8)
    inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    codes = np.trunc(x * inverse + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([_bytes(d), codes[:, :16] | codes[:, 16:] << 4], axis=1)


def _encode_q8_0(x: np.ndarray) -> np.ndarray:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.where(d == 0, np.float32(0), np.float32(1) / d)
    scaled = x * inverse
    # to nearest, ties away from zero
    magnitude = np.abs(scaled)
    floor = np.floor(magnitude)
    rounded = np.sign(scaled) * (floor + np.floor(np.float32(2) * (magnitude - floor)))
    return np.concatenate([_bytes(d), rounded.astype(np.int8).view(np.uint8)], axis=1)


def _encode_q4_k(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(-1, 8, 32)
    low = np.minimum(groups.min(axis=2), 0)
    step = (groups.max(axis=2) - low) / np.float32(15)
    d, dmin = (one.max(axis=1, keepdims=True).astype(np.float16) / np.float16(63) for one in (step, -low))
    scales, minima = (_six_bit_multiples(one, unit) for one, unit in ((step, d), (-low, dmin)))
    scale = d.astype(np.float32) * scales
    codes = _quotient(groups + (dmin.astype(np.float32) * minima)[..., None], scale[..., None]).clip(0, 15).astype(np.uint8)
    pairs = codes.reshape(-1, 4, 2, 32)
    packed = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128)
    return np.concatenate([_bytes(d), _bytes(dmin), join_six_bits(scales, minima), packed], axis=1)


def _six_bit_multiples(values: np.ndarray, unit: np.ndarray) -> np.ndarray:
    return np.asarray(_quotient(values, unit.astype(np.float32)).clip(0, 63).astype(np.uint8))


def _encode_q6_k(x: np.ndarray) -> np.ndarray:
    groups = x.reshape(-1, 16, 16)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=2, keepdims=True), axis=2)[..., 0]
    step = extreme / np.float32(-32)
    d = (np.abs(step).max(axis=1, keepdims=True) / np.float32(127)).astype(np.float16)
    scales = _quotient(step, d.astype(np.float32)).clip(-128, 127).astype(np.int8)
    codes = _quotient(groups, (d.astype(np.float32) * scales)[..., None]).clip(-32, 31).astype(np.int8) + np.int8(32)
    halves = codes.view(np.uint8).reshape(-1, 2, 4, 32)
    low = (halves[:, :, :2] & 15 | (halves[:, :, 2:] & 15) << 4).reshape(-1, 128)
    top = halves >> 4
    high = (top[:, :, 0] | top[:, :, 1] << 2 | top[:, :, 2] << 4 | top[:, :, 3] << 6).reshape(-1, 64)
    return np.concatenate([low, high, scales.view(np.uint8), _bytes(d)], axis=1)


def _quotient(values: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """values / unit to the nearest integer, 0 where the unit is."""
    return np.asarray(np.where(unit == 0, 0, np.rint(values / np.where(unit == 0, 1, unit))))


_ENCODERS: Final = {"Q4_0": _encode_q4_0, "Q8_0": _encode_q8_0, "Q4_K": _encode_q4_k, "Q6_K": _encode_q6_k}
