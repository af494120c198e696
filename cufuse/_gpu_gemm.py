"""``linear`` on CuPy arrays: rows, slices of K as the recipe says, and the product's kernels."""

import functools
import warnings
from typing import Any, Final

from cufuse import _gpu_linear, _layout, _repeat, cublaslt, launch
from cufuse.compiler import Kernel
from cufuse.emulation.cublas import AssumedSlicesWarning
from cufuse.quantised.weight import QuantisedWeight
from cufuse.recipe import Gemm

KERNELS: Final[tuple[Kernel, ...]] = ()
"""None of its own: they are those of _gpu_linear."""

_MOST_OVERLAPS: Final = 4096


def linear(x: Any, weight: Any, gemm: Gemm, k_slices: int | None, result: Any, call: _repeat.Call | None = None) -> Any:
    """x [..., K] times weight [N, K]^T into ``result`` [..., N], all checked; see ``cufuse.linear``. Returns result.

    Rows of x may lie any distance apart. A result that is not contiguous costs a copy.
    call : what the call shall be remembered by, if it shall.
    """
    if isinstance(weight, QuantisedWeight):
        from cufuse import _gpu_quantised

        return _gpu_quantised.linear(x, weight, gemm, k_slices, result)
    _refuse_overlap(x, weight, result)
    n, k = weight.shape
    rows = x if x.ndim == 2 else _rows(x, k)
    _layout.require_unit_stride(x=rows, weight=weight)
    slices = gemm.k_slices if k_slices is None else int(k_slices)
    if slices == "cublas":
        slices = asked_slices(rows.shape[0], n, k)
    if result.flags.c_contiguous:
        _gpu_linear.linear(rows, weight, result if result.ndim == 2 else result.reshape(-1, n), slices, call=call)
        return result
    with launch.on_device(result.device.id):
        dense = launch.temporary((len(rows), n), result.dtype, "product")
        _gpu_linear.linear(rows, weight, dense, slices)
        code = "u2" if result.itemsize == 2 else "u4"
        result.view(code)[...] = dense.view(code).reshape(result.shape)
    return result


def _rows(x: Any, k: int) -> Any:
    """x as [M, K]: a view where its leading axes collapse, ValueError where that would need a copy."""
    rows = x.reshape(-1, k)
    if rows.data.ptr != x.data.ptr:
        raise ValueError(f"x has strides {x.strides}, whose leading axes do not collapse into rows; give cupy.ascontiguousarray(x)")
    return rows


@functools.lru_cache(maxsize=65536)
def asked_slices(m: int, n: int, k: int) -> int:
    """Slices of K as the installed cuBLASLt answers; cached, so a warning comes once."""
    try:
        return cublaslt.k_slices(m, n, k)
    except cublaslt.CublasLtError as error:
        warnings.warn(
            f"how cuBLAS cuts K for M = {m}, N = {n}, K = {k} cannot be asked ({error}): one slice assumed; give k_slices",
            AssumedSlicesWarning,
            stacklevel=4,
        )
        return 1


_overlaps: dict[Any, _layout.Overlap] = {}


def _refuse_overlap(x: Any, weight: Any, result: Any) -> None:
    arrays = (result, x, weight)
    key = tuple([(array.shape, array.strides, array.itemsize) for array in arrays])
    overlap = _overlaps.get(key)
    if overlap is None:
        if len(_overlaps) >= _MOST_OVERLAPS:
            _overlaps.clear()
        overlap = _overlaps[key] = _layout.Overlap({"out": result}, {"x": x, "weight": weight})
    overlap.check([array.data.ptr for array in arrays])
