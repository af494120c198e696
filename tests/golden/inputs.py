"""Seeded inputs for the golden files, the same on every machine and NumPy version.

Only the raw 64-bit stream of PCG64 is used, whose stability NumPy guarantees (NEP 19; it does not guarantee that of
``Generator.normal``), and arithmetic that is exact, so the recording machine and the tests build equal bits.
"""

import hashlib
import zlib

import ml_dtypes
import numpy as np


def seed_of(*key: object) -> int:
    """A seed from a case's name and sizes."""
    return zlib.crc32("/".join(map(str, key)).encode())


def bell(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> np.ndarray:
    """bfloat16 values of a bell curve with standard deviation about ``scale``: sums of four 16-bit integers."""
    count = int(np.prod(shape))
    raw = np.random.PCG64(seed).random_raw(max(count, 1))[:count]
    total = np.zeros(count, np.int64)
    for field in range(4):
        total += ((raw >> np.uint64(16 * field)) & np.uint64(0xFFFF)).astype(np.int64)
    # the variance of the sum is 4 (2**32 - 1) / 12: its root is 37837 to the nearest integer
    values = (total - 131070).astype(np.float32) * np.float32(scale / 37837.0)
    return values.astype(ml_dtypes.bfloat16).reshape(shape)


def heavy(shape: tuple[int, ...], seed: int, scale: float = 1.0) -> np.ndarray:
    """Like ``bell``, with about one value in 64 up to 256 times as large: activations with outliers."""
    values = bell(shape, seed, scale).astype(np.float32)
    count = values.size
    raw = np.random.PCG64(seed ^ 0x5EED).random_raw(max(count, 1))[:count].reshape(shape)
    power = np.where(raw % np.uint64(64) == 0, ((raw >> np.uint64(8)) % np.uint64(9)).astype(np.int32), 0)
    return np.ldexp(values, power).astype(np.float32).astype(ml_dtypes.bfloat16)


def norm_weight(size: int, seed: int, largest: float) -> np.ndarray:
    """bfloat16 norm weights around 1, one of them ``largest``."""
    weight = (bell((size,), seed, 0.25).astype(np.float32) + np.float32(1)).astype(ml_dtypes.bfloat16)
    weight[seed % size] = largest
    return weight


def special_rows(columns: int) -> np.ndarray:
    """Rows that are hard for a norm: zeros, negative zeros, subnormals, the largest values, one NaN, one infinity."""
    tiny, largest = np.uint16(0x0001), np.uint16(0x7F7F)
    rows = np.zeros((8, columns), np.uint16)
    rows[1] = 0x8000
    rows[2] = tiny
    rows[3] = np.arange(columns, dtype=np.uint16) % 128
    rows[4] = largest
    rows[5, columns // 2] = 0x7FC0
    rows[6, columns // 3] = 0xFF80
    rows[7] = bell((columns,), seed_of("special", columns)).view(np.uint16)
    rows[7, 0] = largest
    return rows.view(ml_dtypes.bfloat16)


def special_float32() -> np.ndarray:
    """float32 values for casts: for every bfloat16 code the value, the tie above it and the ties' neighbours."""
    high = np.arange(65536, dtype=np.uint32) << np.uint32(16)
    low = np.array([0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    return (high[:, None] + low[None, :]).reshape(-1).view(np.float32)


def row_digests(values: np.ndarray) -> np.ndarray:
    """One 64-bit digest (BLAKE2b) for each row's bits: equal digests, equal bits; a differing one names its row."""
    rows = np.ascontiguousarray(values).view(np.uint8).reshape(values.shape[0], -1)
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return np.frombuffer(b"".join(digests), np.uint64).copy()
