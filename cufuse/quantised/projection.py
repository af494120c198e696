"""The emulation of products with quantised weights whose integers are multiplied as they are."""

from collections.abc import Callable
from typing import Any

import numpy as np

from cufuse.bf16 import nearest
from cufuse.emulation import block_scaled, q8_1, tensor_core
from cufuse.quantised import formats, tiles
from cufuse.quantised.weight import QuantisedWeight
from cufuse.recipe import Gemm


def project(
    x: np.ndarray, weight: QuantisedWeight, gemm: Gemm, k_slices: int, progress: Callable[[float], object] | None = None
) -> np.ndarray:
    """Rows [M, K] times a quantised weight [N, K]^T for ``gemm.quantised`` "block-scaled" or "q8_1"; checked NumPy arrays."""
    if gemm.quantised == "q8_1":
        total = q8_1.matmul(x.astype(np.float32), weight.format.name, _parts_of_blocks(weight), progress)
    else:
        content = weight.content()
        weights = block_scaled.Weights(*content, weight.format.group, tiles.piece_columns(weight.format))
        total = block_scaled.matmul(_activations(x), weights, core=gemm.core, k_slices=k_slices, progress=progress)
    return nearest(total) if gemm.output == "bfloat16" else total


def _activations(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """The bfloat16 parts of x, without those that are zero everywhere: integers are finite, so they change nothing."""
    if x.dtype != np.float32:
        return (x,)
    high, *lower = tensor_core.split_float32(x)
    return (high, *(part for part in lower if part.view(np.uint16).any()))


def _parts_of_blocks(weight: QuantisedWeight) -> dict[str, Any]:
    """The integers as llama.cpp multiplies them, with the scales not yet joined."""
    form, blocks = weight.format, weight.unpacked().data
    integers = formats.split(blocks, form).integers
    one = np.ascontiguousarray(blocks).reshape(-1, form.size)
    rows = weight.shape[0]

    def half(first: int) -> np.ndarray:
        return np.ascontiguousarray(one[:, first : first + 2]).view("<f2").astype(np.float32).reshape(rows, -1)

    if form.name == "Q4_0":
        return {"integers": integers + np.int8(8), "d": half(0)}
    if form.name == "Q8_0":
        return {"integers": integers, "d": half(0)}
    if form.name == "Q4_K":
        scales, minima = (both.reshape(rows, -1) for both in formats.six_bits(one[:, 4:16]))
        return {"integers": integers, "d": half(0), "dmin": half(2), "s": scales, "m": minima}
    return {"integers": integers, "d": half(208), "s": one[:, 192:208].view(np.int8).reshape(rows, -1)}
