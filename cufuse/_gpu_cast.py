"""``round_to_bf16`` on CuPy arrays: kernels/round_to_bf16.cu."""

import struct
from typing import Any, Final

import numpy as np

from cufuse import launch
from cufuse.launch import Kernel

_MODES: Final = ("nearest_even", "nearest_away", "toward_zero", "up", "down", "stochastic")
"""RoundingMode of bf16.cuh, in its order."""

_THREADS: Final = 256
_ARGUMENTS: Final = struct.Struct("PPPqi4x")

_KERNELS: Final = {
    dtype: Kernel(f"round_to_bf16 {dtype}", "round_to_bf16.cu", "round_to_bf16", (("FLOAT64", int(dtype == "float64")),), _THREADS)
    for dtype in ("float32", "float64")
}

KERNELS: Final = tuple(_KERNELS.values())


def round_to_bf16(x: Any, mode: str, random_bits: Any, out: Any) -> Any:
    """Round checked CuPy arrays (float32 or float64, any strides) into ``out``; see ``cufuse.round_to_bf16``."""
    if x.size == 0:
        return out
    import cupy

    device = launch.device_of(x=x, random_bits=random_bits, out=out)
    with launch.on_device(device):
        values = cupy.ascontiguousarray(x)
        random = None if random_bits is None else cupy.ascontiguousarray(random_bits)
        dense = out if out.flags.c_contiguous else cupy.empty(out.shape, out.dtype)
        blocks = min(-(-values.size // _THREADS), 8 * launch.multiprocessors(device))
        prepared = launch.prepare(_KERNELS[np.dtype(x.dtype).name], device, blocks)
        bits = 0 if random is None else random.data.ptr
        prepared(_ARGUMENTS.pack(values.data.ptr, bits, dense.data.ptr, values.size, _MODES.index(mode)))
        if dense is not out:
            out[...] = dense
    return out
