"""Quantised weights on CuPy arrays: decoding, and products as the recipe says."""

import struct
from typing import Any, Final

from cufuse import _gpu_gemm, _layout, compiler, launch
from cufuse import _linear_quantised as planning
from cufuse._linear_problem import ceil_div
from cufuse._linear_quantised import Configuration, Machine, Product
from cufuse._linear_quantised_wgmma import WGMMA
from cufuse.bf16 import bfloat16
from cufuse.compiler import Kernel
from cufuse.quantised import tiles
from cufuse.quantised.formats import FORMATS
from cufuse.quantised.weight import QuantisedWeight
from cufuse.recipe import Gemm

_THREADS: Final = 256
_MOST_PLANS: Final = 4096
_DEQUANTISE_ARGUMENTS: Final = struct.Struct("PPqi4x")
_ACTIVATION_ARGUMENTS: Final = struct.Struct("PPqiii4x")

_DEQUANTISE: Final = {
    name: Kernel(f"dequantise {name}", "dequantise.cu", "dequantise", (("FORMAT", number),), _THREADS)
    for number, name in enumerate(FORMATS)
}
_ACTIVATIONS: Final = {
    parts: Kernel(
        f"quantised_activations {'float32' if parts == 3 else 'bfloat16'}",
        "quantised_activations.cu",
        "quantised_activations",
        (("FLOAT32", int(parts == 3)),),
        _THREADS,
    )
    for parts in (1, 3)
}
_Q8_1_ARGUMENTS: Final = struct.Struct("PPPPPq5i4x")
_Q8_1_TOKENS: Final = 8
"""Of one call, as in llama.cpp; four and fewer take more threads."""


def _q8_1_kernel(number: int, name: str, step: int, threads: int) -> Kernel:
    defines = (("FORMAT", number), ("STEP", step), ("THREADS", threads))
    title = f"quantised_q8_1 {name} {threads} threads" if step else "quantised_q8_1 activations"
    return Kernel(title, "quantised_q8_1.cu", "quantised_q8_1", defines, threads, step * _Q8_1_TOKENS * threads * 4)


_Q8_1_ACTIVATIONS: Final = _q8_1_kernel(0, "", 0, 64)
_Q8_1: Final = {
    (name, threads): _q8_1_kernel(number, name, 1, threads) for number, name in enumerate(FORMATS) for threads in (64, 128)
}

KERNELS: Final = (
    _Q8_1_ACTIVATIONS,
    *_Q8_1.values(),
    *_DEQUANTISE.values(),
    *_ACTIVATIONS.values(),
    *(c.kernel for c in planning.ANYWHERE),
    *(c.kernel for c in planning.STREAMED),
    *(c.kernel for c in WGMMA),
)


def dequantise(weight: QuantisedWeight, result: Any) -> Any:
    """The weight's values into ``result`` [N, K], a CuPy array of float32 or bfloat16; returns result."""
    blocks = weight.unpacked().data
    device = launch.device_of(weight=blocks, out=result)
    _layout.Overlap({"out": result}, {"weight": blocks}).check([result.data.ptr, blocks.data.ptr])
    with launch.on_device(device):
        direct = result.flags.c_contiguous and result.data.ptr % 16 == 0
        dense = result if direct else launch.temporary(result.shape, result.dtype, "dequantised")
        eights = dense.size // 8
        grid = min(ceil_div(eights, _THREADS), 16 * launch.multiprocessors(device))
        prepared = launch.prepare(_DEQUANTISE[weight.format.name], device, grid)
        prepared(_DEQUANTISE_ARGUMENTS.pack(blocks.data.ptr, dense.data.ptr, eights, dense.itemsize == 2))
        if dense is not result:
            code = "u2" if result.itemsize == 2 else "u4"
            result.view(code)[...] = dense.view(code)
    return result


def linear(x: Any, weight: QuantisedWeight, gemm: Gemm, k_slices: int | None, result: Any) -> Any:
    """x [..., K] times weight [N, K]^T into ``result`` [..., N], all checked; see ``cufuse.quantised_linear``. Returns result.

    A weight that is not packed is packed first, at each call.
    """
    device = launch.device_of(x=x, weight=weight.data, out=result)
    if gemm.quantised == "decoded":
        with launch.on_device(device):
            decoded = dequantise(weight, launch.temporary(weight.shape, bfloat16, "decoded weight"))
        return _gpu_gemm.linear(x, decoded, gemm, k_slices, result)
    _layout.Overlap({"out": result}, {"x": x, "weight": weight.data}).check([result.data.ptr, x.data.ptr, weight.data.data.ptr])
    n, k = weight.shape
    slices = gemm.quantised_slices if k_slices is None else int(k_slices)
    with launch.on_device(device):
        rows = _rows(x, k)
        dense = result
        if not result.flags.c_contiguous:
            dense = launch.temporary((len(rows), n), result.dtype, "product")
        target = dense if dense.ndim == 2 else dense.reshape(-1, n)
        if gemm.quantised == "q8_1":
            _multiply_q8_1(rows, weight.unpacked(), target)
        else:
            multiply(rows, weight.packed(), target, slices)
        if dense is result:
            return result
        code = "u2" if result.itemsize == 2 else "u4"
        result.view(code)[...] = dense.view(code).reshape(result.shape)
    return result


def _rows(x: Any, k: int) -> Any:
    """x as [M, K] with unit stride along K; ValueError where that would need a copy."""
    rows = x if x.ndim == 2 else x.reshape(-1, k)
    if rows.data.ptr != x.data.ptr:
        raise ValueError(f"x has strides {x.strides}, whose leading axes do not collapse into rows; give cupy.ascontiguousarray(x)")
    _layout.require_unit_stride(x=rows)
    return rows


def _multiply_q8_1(rows: Any, weight: QuantisedWeight, out: Any) -> None:
    """llama.cpp's integer dot products, eight rows at a time, of raw blocks."""
    (m, k), n, device = rows.shape, weight.shape[0], rows.data.device_id
    stride = rows.strides[0] // rows.itemsize if m > 1 else k
    scales_at = ceil_div(_Q8_1_TOKENS * k, 256) * 256
    workspace = launch.workspace(device, scales_at + _Q8_1_TOKENS * k // 32 * 8)
    launches = []
    for first in range(0, m, _Q8_1_TOKENS):
        count = min(_Q8_1_TOKENS, m - first)
        packed = _Q8_1_ARGUMENTS.pack(
            rows.data.ptr + first * stride * rows.itemsize, weight.data.data.ptr, workspace, workspace + scales_at,
            out.data.ptr + first * n * out.itemsize, stride, count, n, k, rows.itemsize == 2, out.itemsize == 2,
        )  # fmt: skip
        launches += [
            (launch.prepare(_Q8_1_ACTIVATIONS, device, ceil_div(count * k // 32, _Q8_1_ACTIVATIONS.threads)), packed),
            (launch.prepare(_Q8_1[weight.format.name, 128 if count <= 4 else 64], device, n), packed),
        ]
    launch.one_by_one(launches)


def multiply(
    rows: Any,
    weight: QuantisedWeight,
    out: Any,
    k_slices: int,
    *,
    configuration: Configuration | None = None,
    programmatic: bool = False,
) -> Any:
    """The "block-scaled" product of checked CuPy arrays of one device, the current one; returns out.

    rows [M, K]: bfloat16 or float32, unit stride along K. weight: packed. out [M, N]: contiguous.
    configuration : which kernel, for measurements; ValueError where it cannot. programmatic : the launch may begin before the one
    in front of it in the stream has ended (where rows are read as they lie; the weight must be older).
    """
    pointers = (rows.data.ptr, weight.data.data.ptr, out.data.ptr)
    key = (
        weight.format, rows.shape, rows.strides, rows.itemsize, weight.shape, out.itemsize, pointers[0] & 15, pointers[2] & 7,
        k_slices, rows.data.device_id, configuration, programmatic,
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        product = describe(rows, weight, out, k_slices, programmatic)
        plan = _plans[key] = Plan(product, rows.data.device_id, configuration)
    workspace = launch.workspace(rows.data.device_id, plan.workspace_bytes) if plan.workspace_bytes else 0
    launch.one_by_one(plan.launches(*pointers, workspace))
    return out


_plans: dict[Any, "Plan"] = {}


def describe(rows: Any, weight: QuantisedWeight, out: Any, k_slices: int, programmatic: bool = False) -> Product:
    """The product of arrays as ``multiply`` takes them."""
    (m, k), n = rows.shape, weight.shape[0]
    stride = rows.strides[0] // rows.itemsize if m > 1 else k
    float32 = rows.itemsize == 4
    whole = k == tiles.padded_columns(k, weight.format)
    return Product(
        weight.format, m, n, k, k_slices, 3 if float32 else 1, stride,
        direct=not float32 and whole and rows.data.ptr % 16 == 0 and stride % 8 == 0 and stride >= k,
        out_float32=out.itemsize == 4,
        pairs=n % 2 == 0 and out.data.ptr % (2 * out.itemsize) == 0,
        programmatic=programmatic,
    )  # fmt: skip


class Plan:
    """The launches of one kind of product: padding or splitting x, multiplying."""

    __slots__ = ("_multiply", "_prepare_x", "_product", "kernel", "workspace_bytes")

    def __init__(self, product: Product, device: int, configuration: Configuration | None = None) -> None:
        capability = launch.capability(device)
        machine = Machine(capability, launch.multiprocessors(device), compiler.shared_memory_limit(capability))
        chosen = planning.choose(product, machine) if configuration is None else configuration
        found = planning.plan(product, chosen, machine)
        if found is None:
            if product.slices > planning.MOST_SLICES:
                most = f"for {product.m} rows the kernels take at most {planning.MOST_SLICES}"
                raise ValueError(f"k_slices is {product.k_slices}; {most}")
            raise ValueError(f"configuration {chosen} cannot take {product}")
        self.kernel = found.kernel
        self.workspace_bytes = product.workspace_bytes
        self._product = product
        self._multiply = found.arguments, launch.prepare(
            found.kernel, device, found.grid, threads=found.threads, smem=found.smem, cluster=found.cluster,
            programmatic=found.programmatic,
        )  # fmt: skip
        self._prepare_x: Any = None
        if not product.direct:
            grid = min(ceil_div(product.m * product.padded, _THREADS), 8 * launch.multiprocessors(device))
            self._prepare_x = launch.prepare(_ACTIVATIONS[product.parts], device, grid)

    def launches(self, x: int, weight: int, out: int, workspace: int) -> list[tuple[Any, bytes]]:
        """Prepared kernels and their arguments, in order; workspace: of workspace_bytes, a multiple of 256."""
        first = []
        if self._prepare_x is not None:
            p = self._product
            first.append((self._prepare_x, _ACTIVATION_ARGUMENTS.pack(x, workspace, p.x_stride, p.m, p.k, p.padded)))
            x = workspace
        arguments, prepared = self._multiply
        return [*first, (prepared, arguments(x, weight, out))]
