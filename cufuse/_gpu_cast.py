"""``round_to_bf16`` on CuPy arrays: kernels/round_to_bf16.cu."""

import struct
from typing import Any, Final

import numpy as np

from cufuse import _layout, launch
from cufuse.launch import Kernel

_MODES: Final = ("nearest_even", "nearest_away", "toward_zero", "up", "down", "stochastic")
"""RoundingMode of bf16.cuh, in its order."""

_THREADS: Final = 256
_MOST_PLANS: Final = 4096
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
    arrays = (x, out) if random_bits is None else (x, out, random_bits)
    key, pointers, devices = _described(arrays, mode)
    if len(set(devices)) > 1:
        launch.device_of(x=x, random_bits=random_bits, out=out)
    with launch.on_device(devices[0]):
        plan = _plans.get(key)
        if plan is None:
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
            plan = _plans[key] = _Plan(arrays, mode, devices[0])
        plan.run(arrays, pointers)
    return out


def repeat(arrays: tuple[Any, ...], mode: str) -> bool:
    """Launch a call whose like in mode, shapes, strides and dtypes ``round_to_bf16`` was given; False where there was none.

    arrays : CuPy's: x, out, and for "stochastic" the random bits.
    """
    key, pointers, devices = _described(arrays, mode)
    plan = _plans.get(key)
    if plan is None:
        return False
    with launch.on_device(devices[0]):
        plan.run(arrays, pointers)
    return True


def _described(arrays: tuple[Any, ...], mode: str) -> tuple[tuple[Any, ...], list[int], tuple[int, ...]]:
    """The key of a call's plan, and the arrays' addresses and devices."""
    memory = [array.data for array in arrays]
    devices = tuple([one.device_id for one in memory])
    layouts = tuple([(array.shape, array.strides, array.dtype) for array in arrays])
    return (mode, devices, layouts), [one.ptr for one in memory], devices


class _Plan:
    """All of a call that its mode, shapes, strides and dtypes decide."""

    __slots__ = ("_contiguous", "_mode", "_overlap", "_prepared", "_size")

    def __init__(self, arrays: tuple[Any, ...], mode: str, device: int) -> None:
        x = arrays[0]
        blocks = min(-(-x.size // _THREADS), 8 * launch.multiprocessors(device))
        self._prepared = launch.prepare(_KERNELS[np.dtype(x.dtype).name], device, blocks)
        self._contiguous = all(array.flags.c_contiguous for array in arrays)
        self._size, self._mode = x.size, _MODES.index(mode)
        inputs = {"x": x} if len(arrays) == 2 else {"x": x, "random_bits": arrays[2]}
        self._overlap = _layout.Overlap({"out": arrays[1]}, inputs)

    def run(self, arrays: tuple[Any, ...], pointers: list[int]) -> None:
        """Launch on the current stream. ValueError where out overlaps an input."""
        self._overlap.check([pointers[1], pointers[0], *pointers[2:]])
        if self._contiguous:
            self._launch(*pointers)
            return
        x, out, *random = arrays
        inputs = [launch.contiguous(array, name) for array, name in zip((x, *random), ("x", "random bits"), strict=False)]
        dense = out if out.flags.c_contiguous else launch.temporary(out.shape, out.dtype, "cast")
        self._launch(inputs[0].data.ptr, dense.data.ptr, *(array.data.ptr for array in inputs[1:]))
        if dense is not out:
            out[...] = dense

    def _launch(self, x: int, out: int, random_bits: int = 0) -> None:
        self._prepared(_ARGUMENTS.pack(x, random_bits, out, self._size, self._mode))


_plans: dict[Any, _Plan] = {}
