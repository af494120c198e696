"""What cuBLASLt's own heuristic says about a bfloat16 product: above all into how many slices it would cut K.

``torch.nn.functional.linear`` runs the kernel that cuBLAS picks, and the number of slices of K is the one thing in that
pick that changes bits. cuBLASLt is asked, in the library that is installed; its rules are not copied.
"""

import ctypes
import ctypes.util
import functools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

# cublasLt.h and library_types.h of CUDA 12 and 13: the values have not changed between the two.
_CUDA_R_32F: Final = 0
_CUDA_R_16BF: Final = 14
_COMPUTE_32F: Final = 68
_OP_T: Final = 1
_DESC_TRANSA: Final = 3
_PREFERENCE_MAX_WORKSPACE: Final = 1
_CONFIG_ID, _CONFIG_TILE, _CONFIG_SPLITK, _CONFIG_REDUCTION, _CONFIG_STAGES = 0, 1, 2, 3, 6

WORKSPACE_BYTES: Final = 32 * 2**20
"""PyTorch's workspace for cuBLAS on Hopper; the heuristic only offers what fits into it."""


class CublasLtError(RuntimeError):
    """cuBLASLt is not installed, has no GPU to speak of, or found no kernel for a product."""


@dataclass(frozen=True)
class Algorithm:
    """The first algorithm of the heuristic's list: kernel number, tile, stages, slices of K, reduction scheme."""

    identifier: int
    tile: int
    stages: int
    k_slices: int
    reduction_scheme: int


class _HeuristicResult(ctypes.Structure):
    _fields_ = [
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


def k_slices(m: int, n: int, k: int) -> int:
    """The number of slices into which cuBLAS cuts K for ``[m, k] x [n, k]^T`` in bfloat16 (1: not at all)."""
    return algorithm(m, n, k).k_slices


@functools.lru_cache(maxsize=65536)
def algorithm(m: int, n: int, k: int) -> Algorithm:
    """cuBLASLt's first choice for ``out[m, n] = x[m, k] weight[n, k]^T`` (bfloat16 in and out, float32 inside).

    Raises CublasLtError where the library, a GPU or an algorithm is missing.
    """
    return _heuristic().algorithm(m, n, k)


def version() -> int:
    """cuBLASLt's version number, such as 130100 for 13.1.0."""
    return int(_heuristic().library.cublasLtGetVersion())


@functools.cache
def _heuristic() -> "_Heuristic":
    return _Heuristic()


class _Heuristic:
    def __init__(self) -> None:
        self.library = _load()
        self.library.cublasLtGetVersion.restype = ctypes.c_size_t
        self.handle = ctypes.c_void_p()
        self._call("cublasLtCreate", ctypes.byref(self.handle))
        self.description = ctypes.c_void_p()
        self._call("cublasLtMatmulDescCreate", ctypes.byref(self.description), _COMPUTE_32F, _CUDA_R_32F)
        transpose = ctypes.c_int32(_OP_T)
        self._call(
            "cublasLtMatmulDescSetAttribute", self.description, _DESC_TRANSA, ctypes.byref(transpose), ctypes.c_size_t(4)
        )
        self.preference = ctypes.c_void_p()
        self._call("cublasLtMatmulPreferenceCreate", ctypes.byref(self.preference))
        workspace = ctypes.c_uint64(WORKSPACE_BYTES)
        self._call(
            "cublasLtMatmulPreferenceSetAttribute",
            self.preference,
            _PREFERENCE_MAX_WORKSPACE,
            ctypes.byref(workspace),
            ctypes.c_size_t(8),
        )

    def algorithm(self, m: int, n: int, k: int) -> Algorithm:
        # column-major cuBLAS sees out^T [n, m] = op_T(weight^T [k, n]) x^T [k, m]
        layouts = [self._layout(k, n), self._layout(k, m), self._layout(n, m)]
        result = _HeuristicResult()
        found = ctypes.c_int()
        try:
            self._call(
                "cublasLtMatmulAlgoGetHeuristic",
                self.handle,
                self.description,
                layouts[0],
                layouts[1],
                layouts[2],
                layouts[2],
                self.preference,
                1,
                ctypes.byref(result),
                ctypes.byref(found),
            )
        finally:
            for layout in layouts:
                self.library.cublasLtMatrixLayoutDestroy(layout)
        if found.value == 0:
            raise CublasLtError(f"cuBLASLt offers no bfloat16 kernel for M = {m}, N = {n}, K = {k}; give k_slices yourself")
        read = functools.partial(self._configuration, result)
        return Algorithm(
            read(_CONFIG_ID), read(_CONFIG_TILE), read(_CONFIG_STAGES), max(read(_CONFIG_SPLITK), 1), read(_CONFIG_REDUCTION)
        )

    def _layout(self, rows: int, columns: int) -> ctypes.c_void_p:
        layout = ctypes.c_void_p()
        self._call(
            "cublasLtMatrixLayoutCreate",
            ctypes.byref(layout),
            _CUDA_R_16BF,
            ctypes.c_uint64(rows),
            ctypes.c_uint64(columns),
            ctypes.c_int64(rows),
        )
        return layout

    def _configuration(self, result: _HeuristicResult, attribute: int) -> int:
        value = ctypes.c_uint32()
        written = ctypes.c_size_t()
        self._call(
            "cublasLtMatmulAlgoConfigGetAttribute",
            ctypes.byref(result.algorithm),
            attribute,
            ctypes.byref(value),
            ctypes.c_size_t(4),
            ctypes.byref(written),
        )
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self.library, name)(*arguments)
        if status != 0:
            raise CublasLtError(f"{name} answered status {status}; is there an NVIDIA GPU with a driver for this CUDA?")


def _load() -> ctypes.CDLL:
    for candidate in _candidates():
        try:
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise CublasLtError("libcublasLt was not found; install the CUDA parts with pip install 'cufuse[cuda13]'")


def _candidates() -> Iterator[str]:
    """Libraries that this process would use: those of the NVIDIA wheels, where PyTorch and CuPy take theirs, then the
    system's."""
    for folder in sys.path:
        for pattern in ("nvidia/cu1*/lib/libcublasLt.so.*", "nvidia/cublas/lib/libcublasLt.so.*"):
            yield from sorted((str(found) for found in Path(folder or ".").glob(pattern)), reverse=True)
    yield from ("libcublasLt.so.13", "libcublasLt.so.12")
    if system := ctypes.util.find_library("cublasLt"):
        yield system
