"""Calls of every operation on shapes drawn from a seed, and outputs between guard bands."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import cufuse

POISON = 0xA5


class Guarded:
    """An output in the middle of a poisoned buffer, its rows apart from each other."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, rng: np.random.Generator) -> None:
        size = np.dtype(dtype).itemsize
        gap, misplaced = int(rng.integers(0, 5)), int(rng.integers(0, 9))
        rows, columns = int(np.prod(shape[:-1])), shape[-1]
        stride = columns + gap
        self.buffer = np.full((256 + misplaced + rows * stride + 256) * size, POISON, np.uint8)
        start = (256 + misplaced) * size
        strides = [size]
        for length in (stride, *reversed(shape[1:-1])):
            strides.insert(0, strides[0] * length)
        self.out = np.ndarray(shape, dtype, self.buffer.data, start, strides[-len(shape) :])
        self.inside = np.zeros(self.buffer.size, bool)
        np.ndarray((*shape, size), bool, self.inside.data, start, (*strides[-len(shape) :], 1))[...] = True

    def demand_intact(self, what: str) -> None:
        """Nothing beside the output was written."""
        touched = np.flatnonzero((self.buffer != POISON) & ~self.inside)
        assert touched.size == 0, f"{what}: {touched.size} bytes beside the output were written, first at {touched[0]}"


def guarded_calls(
    seed: int, bring: Callable[[np.ndarray], Any], columns: Sequence[int] = range(1, 200), halves: Sequence[int] = range(1, 17)
) -> list[tuple[str, Callable[..., Any]]]:
    """Every operation on arrays of shapes drawn from the seed, made where ``bring`` brings them; each call takes ``out``, a single
    array or a tuple. ``columns`` and ``halves`` (of heads): what to choose from, so that a GPU has not to compile hundreds."""
    rng = np.random.default_rng(seed)
    rows, features, heads, kv_heads = (int(rng.integers(1, most)) for most in (9, 70, 5, 3))
    width, half = int(rng.choice(columns)), int(rng.choice(halves))
    lead = (rows,) if seed % 3 else (2, rows)
    name = list(cufuse.recipes)[seed % len(cufuse.recipes)]
    recipe = cufuse.recipes[name]

    def values(*shape: int) -> Any:
        return bring(rng.standard_normal(shape).astype(np.float32).astype(cufuse.bfloat16))

    x, residual, weight = values(*lead, width), values(*lead, width), values(width)
    tables = np.dtype(cufuse.bfloat16 if recipe.rope.tables == "bfloat16" else np.float32)
    cos, sin = map(bring, cufuse.rope_tables(np.arange(int(np.prod(lead))).reshape(lead), 2 * half, dtype=tables))
    q, k = values(*lead, heads, 2 * half), values(*lead, kv_heads, 2 * half)
    packed = values((heads + 2 * kv_heads) * 2 * half, width)
    norms = values(2 * half), values(2 * half)
    wide = bring(rng.standard_normal((*lead, width)).astype(np.float32 if seed % 2 else np.float64))
    projection = values(features, width)
    return [
        ("round_to_bf16", lambda **given: cufuse.round_to_bf16(wide, **given)),
        (f"rms_norm, {name}", lambda **given: cufuse.rms_norm(x, weight, recipe=name, **given)),
        (f"add_rms_norm, {name}", lambda **given: cufuse.add_rms_norm(x, residual, weight, recipe=name, **given)),
        (f"linear, {name}", lambda **given: cufuse.linear(x, projection, recipe=name, k_slices=1, **given)),
        (f"rope, {name}", lambda **given: cufuse.rope(q, k, cos, sin, recipe=name, **given)),
        (f"rms_norm_qkv, {name}", lambda **given: cufuse.rms_norm_qkv(
            x, weight, packed, *norms, cos=cos, sin=sin, heads=heads, kv_heads=kv_heads, k_slices=1, recipe=name, **given)),
    ]  # fmt: skip
