"""The order in which softmax adds up its exponentials: ``torch.softmax`` over the last dimension of float32 on CUDA.

Source: PyTorch 2.10, ATen/native/cuda/PersistentSoftmax.cuh (``softmax_warp_forward``), SoftMax.cu (``host_softmax``,
``cunn_SoftMaxForwardReg``, ``cunn_SoftMaxForwardSmem``, ``ilpReduce``), block_reduce.cuh.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import numpy as np

from cufuse.emulation.floats import Float32Array
from cufuse.emulation.sums_parts import halve, in_order

_WARP_LIMIT: Final = 2048  # columns that one warp takes; PyTorch up to 2.8: 1024, with the same bits
_THREADS: Final = 1024
_REGISTERS: Final = 9  # elements a thread keeps in registers at most
_SHARED_LIMIT: Final = (49152 - 32 * 4) // 4  # float32 that fit beside the 32 warps' sums


def torch_softmax(x: Float32Array, first_row: int) -> Float32Array:
    """Sums of the rows of x, float32 [rows, columns] -> [rows]; the first of them is row ``first_row`` of the whole array.

    Up to 2,048 columns: lane i of 32 adds elements i, i + 32, ...; then lanes 16, 8, 4, 2, 1 apart. Beyond: 1,024 threads, each of
    which adds elements 1,024 apart (up to 9,216 columns) or vectors of four; then lanes, then warps 16, 8, 4, 2, 1 apart.
    """
    rows, columns = x.shape
    if columns <= _WARP_LIMIT:
        return halve(_strided(x, 32))[:, 0]
    if columns <= _REGISTERS * _THREADS:
        held = _strided(x, _THREADS)
    elif columns % 4 == 0 and columns < _SHARED_LIMIT:
        held = _vectors(x)
    else:
        held = np.empty((rows, _THREADS), np.float32)
        for row in range(rows):
            held[row] = _shifted(x[row], (first_row + row) * columns % 4)
    return halve(halve(held.reshape(rows, 32, 32))[..., 0])[:, 0]


def _strided(x: Float32Array, threads: int) -> Float32Array:
    """Thread t adds elements t, t + threads, ... in order."""
    rows, columns = x.shape
    steps = -(-columns // threads)
    return in_order(_padded(x, steps * threads).reshape(rows, steps, threads).swapaxes(1, 2))


def _vectors(x: Float32Array) -> Float32Array:
    """Thread t adds vectors of four t, t + 1024, ..., element after element."""
    rows, columns = x.shape
    steps = -(-columns // (4 * _THREADS))
    arranged = _padded(x, steps * 4 * _THREADS).reshape(rows, steps, _THREADS, 4).swapaxes(1, 2)
    return in_order(np.ascontiguousarray(arranged).reshape(rows, _THREADS, steps * 4))


def _shifted(x: Float32Array, shift: int) -> Float32Array:
    """``ilpReduce`` for one row that begins ``shift`` elements behind a 16-byte boundary: [columns] -> [1024]."""
    held = np.zeros(_THREADS, np.float32)
    if shift:
        first = x[: _THREADS - shift]
        held[shift:] = first
        x = x[_THREADS - shift :]
    whole = len(x) - len(x) % (4 * _THREADS)
    for vectors in x[:whole].reshape(-1, _THREADS, 4):
        for element in range(4):
            held += vectors[:, element]
    for start in range(whole, len(x), _THREADS):
        part = x[start : start + _THREADS]
        held[: len(part)] += part
    return held


def _padded(x: Float32Array, columns: int) -> Float32Array:
    # zeros change no sum of exponentials, which are not negative
    if x.shape[1] == columns:
        return x
    padded = np.zeros((x.shape[0], columns), np.float32)
    padded[:, : x.shape[1]] = x
    return padded


SOFTMAX_ORDERS: Final[Mapping[str, Callable[[Float32Array, int], Float32Array]]] = MappingProxyType(
    {"torch-softmax": torch_softmax}
)
