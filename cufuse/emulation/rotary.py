"""The cos and sin tables of rotary embedding with the bits of Hugging Face's Qwen3RotaryEmbedding on CUDA.

Its float32 cos and sin come from CUDA's ``cosf`` and ``sinf`` and are then rounded to bfloat16; the float64 value of the same
float32 angle, rounded twice in the same way, is equal but for a few near ties (and for one frequency that PyTorch's float32
power misses by an ulp). These exceptions were recorded for every position on an H200: ``data/rope.json``.
"""

import functools
import json
from importlib import resources

import ml_dtypes
import numpy as np

RECORDED_BASE = 1e6
RECORDED_POSITIONS = 40960


def inverse_frequencies(head_dim: int, base: float = RECORDED_BASE) -> np.ndarray:
    """float32(1) / float32(base**(2i / head_dim)) for i in [0, head_dim/2), the power correctly rounded."""
    exponent = np.arange(0, head_dim, 2) / head_dim
    return np.float32(1) / np.asarray(base**exponent, np.float32)


def tables(positions: np.ndarray, head_dim: int, base: float, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin [..., head_dim] of integer positions [...]: both halves alike, as rotate_half needs them.

    bfloat16: Hugging Face's bits for base 1e6, head_dim 64, 128, 256 and positions below 40,960 (all of them were compared).
    Elsewhere the same formula, whose entries may be an ulp off now and then (192 of the 18,350,080 compared ones are, four of
    them by more: cosines near zero, by 2 and 21 ulp, at the one frequency that differs).
    float32: the float64 value of the float32 angle, rounded; CUDA's own float32 may be off by up to 2 ulp from it.
    """
    flat = positions.reshape(-1)
    angle = flat.astype(np.float32)[:, None] * inverse_frequencies(head_dim, base)[None, :]
    both = [function(angle.astype(np.float64)).astype(np.float32) for function in (np.cos, np.sin)]
    if dtype == ml_dtypes.bfloat16:
        both = [table.astype(ml_dtypes.bfloat16) for table in both]
        if base == RECORDED_BASE:
            _apply_exceptions(both, flat, head_dim)
    cos, sin = (np.concatenate([table, table], axis=-1).reshape(*positions.shape, head_dim) for table in both)
    return cos, sin


def _apply_exceptions(both: list[np.ndarray], positions: np.ndarray, head_dim: int) -> None:
    for which, position, index, code in _exceptions().get(str(head_dim), []):
        both[which].view(np.uint16)[positions == position, index] = code


@functools.cache
def _exceptions() -> dict[str, list[list[int]]]:
    record = json.loads(resources.files("cufuse.emulation").joinpath("data/rope.json").read_text())
    assert (record["base"], record["positions"]) == (RECORDED_BASE, RECORDED_POSITIONS)
    exceptions: dict[str, list[list[int]]] = record["exceptions"]
    return exceptions
