"""The decoder's steps behind q, k and v on CuPy arrays: softmax, attention, SwiGLU, residual sum, gathered rows, argmax."""

import struct
from typing import Any, Final

from cufuse import launch
from cufuse.bf16 import bfloat16
from cufuse.compiler import Kernel
from cufuse.emulation import attention_products
from cufuse.recipe import Attention, Mlp, Recipe

_SOFTMAX: Final = struct.Struct("PPPqqi0q")
_SCORES: Final = struct.Struct("5P6q7if0q")
_VALUES: Final = struct.Struct("5P3q7i0q")
_SWIGLU: Final = struct.Struct("PPPqqqi0q")
_ADD: Final = struct.Struct("PPPq")
_GATHER: Final = struct.Struct("PPPi0q")
_ARGMAX: Final = struct.Struct("7Pqi0q")

_WARP_ROWS: Final = 2048  # columns that the order of one warp is for
HEAD_DIMS: Final = (64, 128, 256)


def _softmax_kernel(float32: bool, block: bool, exact: bool) -> Kernel:
    name = f"softmax {'float32' if float32 else 'bfloat16'}, a {'block' if block else 'warp'} a row{', exact exp' if exact else ''}"
    defines = (("X_FLOAT32", int(float32)), ("BLOCK", int(block)), ("EXACT_EXPONENTIAL", int(exact)))
    return Kernel(name, "softmax.cu", "softmax", defines, 1024 if block else 128, 128 if block else 0)


def _scores_kernel(dimensions: int, numerics: Attention) -> Kernel:
    defines = {
        "DIMENSIONS": dimensions,
        "ROUND_SCORES": int(numerics.round_scores),
        "ROUND_SCALED": int(numerics.round_scaled),
        "SCORES_FLOAT32": int(not numerics.round_scaled),
    }
    rounded = "".join(f", {name.lower().replace('_', ' ')}" for name, value in defines.items() if value and name != "DIMENSIONS")
    name = f"attention_scores D {dimensions}{rounded}"
    return Kernel(name, "attention_scores.cu", "attention_scores", tuple(defines.items()), 128)


def _values_kernel(float32: bool) -> Kernel:
    name = f"attention_values -> {'float32' if float32 else 'bfloat16'}"
    return Kernel(name, "attention_values.cu", "attention_values", (("OUT_FLOAT32", int(float32)),), 128)


def _swiglu_kernel(x_float32: bool, y_float32: bool, round_activated: bool, exact: bool) -> Kernel:
    defines = (
        ("X_FLOAT32", int(x_float32)), ("Y_FLOAT32", int(y_float32)), ("ROUND_ACTIVATED", int(round_activated)),
        ("EXACT_EXPONENTIAL", int(exact)),
    )  # fmt: skip
    return Kernel("swiglu " + ", ".join(f"{name.lower()} {value}" for name, value in defines), "swiglu.cu", "swiglu", defines, 256)


def _add_kernel(x: bool, residual: bool, y: bool) -> Kernel:
    names = ("X_FLOAT32", "RESIDUAL_FLOAT32", "Y_FLOAT32")
    defines = tuple(zip(names, (int(x), int(residual), int(y)), strict=True))
    return Kernel(f"add {int(x)}{int(residual)}{int(y)}", "add.cu", "add", defines, 256)


_GATHER_KERNEL: Final = Kernel("gather", "gather.cu", "gather", (), 256)
_ARGMAX_KERNELS: Final = tuple(
    Kernel(f"argmax {name}", "argmax.cu", "argmax", (("X_FLOAT32", wide),), 1024, 8192)
    for wide, name in enumerate(("bfloat16", "float32"))
)
_UNROUNDED: Final = Attention(round_scores=False, round_scaled=False, round_output=False)

KERNELS: Final = (
    *(_softmax_kernel(wide, block, False) for wide in (False, True) for block in (False, True)),
    *(_scores_kernel(size, numerics) for size in HEAD_DIMS for numerics in (Attention(), _UNROUNDED)),
    *(_values_kernel(wide) for wide in (False, True)),
    *(_swiglu_kernel(*flags, False) for flags in ((False, False, True), (False, False, False), (True, True, False))),
    *(_add_kernel(*flags) for flags in ((False, False, False), (False, False, True), (True, True, True), (True, False, True))),
    _GATHER_KERNEL,
    *_ARGMAX_KERNELS,
)
"""Those of the named recipes; others are made as they are asked for."""


def softmax(x: Any, numerics: Attention, out: Any) -> Any:
    """Softmax of checked [..., K] into ``out``; see ``cufuse.softmax``."""
    device = launch.device_of(x=x, out=out)
    with launch.on_device(device):
        dense, target = _dense(x), _target(out)
        columns = x.shape[-1]
        run_softmax(dense.data.ptr, target.data.ptr, x.size // columns, columns, columns, numerics, x.itemsize == 4, device)
        return _delivered(target, out)


def run_softmax(
    x: int, y: int, rows: int, row: int, columns: int, numerics: Attention, float32: bool, device: int, before: int = 0
) -> None:
    """Softmax of rows ``row`` elements apart, of ``columns`` (more by what lies at ``before``, up to ``row``), by address."""
    block = (columns if not before else row) > _WARP_ROWS
    kernel = _softmax_kernel(float32, block, numerics.exponential == "correct")
    launch.prepare(kernel, device, rows if block else -(-rows // 4))(_SOFTMAX.pack(x, y, before, rows, row, columns))


def attention(q: Any, k: Any, v: Any, scale: float, causal: bool, recipe: Recipe, out: Any) -> Any:
    """Attention of checked [..., T, Hq, D] and [..., S, Hkv, D] into ``out``; see ``cufuse.attention``.

    Raises ValueError for a D that is not one of 64, 128, 256 or a tensor core other than that of the device.
    """
    import cupy

    device = launch.device_of(q=q, k=k, v=v, out=out)
    with launch.on_device(device):
        queries, heads, _size = q.shape[-3:]
        keys, _kv_heads = k.shape[-3:-1]
        q, k, v = (_bfloat16(_dense(x)).reshape(-1, *x.shape[-3:]) for x in (q, k, v))
        target = _target(out)
        scores = cupy.empty((len(q) * heads * queries, _padded(keys)), "f4" if not recipe.attention.round_scaled else "u2")
        weights = scores if scores.itemsize == 2 else cupy.empty(scores.shape, "u2")
        both = order_codes(recipe.attention, len(q) * heads, queries, keys)
        run_attention(q, k, v, scores, weights, target, keys, scale, causal, recipe.attention, device, both)
        return _delivered(target, out)


def run_attention(
    q: Any, k: Any, v: Any, scores: Any, weights: Any, out: Any, keys: int, scale: float, causal: bool, numerics: Attention,
    device: int, both: tuple[int, int], before: int = 0, table: int = 0,
) -> None:  # fmt: skip
    """Attention without an allocation: q [B, T, Hq, D], k and v [B, capacity, Hkv, D] of which the first ``keys`` count (or T more
    than lies at the address ``before``), scores and weights [B Hq T, row]. ``both``: order_codes; ``table``: the address of those
    of every number of keys, [keys][2], instead."""
    batch, queries, heads, size = q.shape
    kv_heads = k.shape[2]
    if size not in HEAD_DIMS:
        raise ValueError(f"q has heads of {size}; on a GPU needed is one of {', '.join(map(str, HEAD_DIMS))}")
    row = scores.shape[1]
    most = row if before else keys
    tiles = batch * kv_heads * -(-(heads // kv_heads * queries) // 16)
    strides = [stride // 2 for array in (q, k) for stride in array.strides[:3]]
    pointers = (q.data.ptr, k.data.ptr, scores.data.ptr, before, table)
    arguments = (*pointers, *strides, queries, heads, kv_heads, keys, row, int(causal), both[0], scale)
    launch.prepare(_scores_kernel(size, numerics), device, (tiles, -(-most // 32), 1))(_SCORES.pack(*arguments))
    columns = queries if before else keys
    rows = batch * heads * queries
    wide = scores.itemsize == 4
    run_softmax(scores.data.ptr, weights.data.ptr, rows, row, columns, numerics, wide, device, before)
    strides = [stride // 2 for stride in v.strides[:3]]
    pointers = (weights.data.ptr, v.data.ptr, out.data.ptr, before, table)
    arguments = (*pointers, *strides, queries, heads, kv_heads, keys, row, size, both[1])
    grid = (tiles, -(-size // 32), 1)
    launch.prepare(_values_kernel(not numerics.round_output), device, grid)(_VALUES.pack(*arguments))


def order_codes(numerics: Attention, products: int, queries: int, keys: int) -> tuple[int, int]:
    """The orders of both products of attention, as lanes.cuh reads them."""
    if numerics.products == "blocks":
        return 0, 0
    first, second = (
        one.lanes | one.vector << 8 | one.ascending << 16 | (one.block == 8) << 17 | one.tile << 18
        for one in attention_products.orders(products, queries, keys)
    )
    return first, second


def swiglu(gate: Any, up: Any, numerics: Mlp, out: Any) -> Any:
    """SwiGLU (silu where ``up`` is None) of checked arrays into ``out``; see ``cufuse.mlp``."""
    device = launch.device_of(gate=gate, up=up, out=out)
    with launch.on_device(device):
        inputs = [_dense(x) for x in (gate, up) if x is not None]
        if len({x.itemsize for x in inputs}) > 1:
            raise TypeError(f"gate has dtype {gate.dtype} and up {up.dtype}; on a GPU needed is one dtype for both")
        target = _target(out)
        rounded = numerics.round_activated
        kernel = _swiglu_kernel(inputs[0].itemsize == 4, target.itemsize == 4, rounded, numerics.exponential == "correct")
        second = inputs[1].data.ptr if up is not None else 0
        columns = gate.shape[-1] if gate.ndim else 1
        arguments = _SWIGLU.pack(inputs[0].data.ptr, second, target.data.ptr, gate.size, columns, columns, columns)
        launch.prepare(kernel, device, _blocks(gate.size, device))(arguments)
        return _delivered(target, out)


def add(x: Any, residual: Any, out: Any) -> Any:
    """The residual sum of checked arrays into ``out``; see ``cufuse.residual``."""
    device = launch.device_of(x=x, residual=residual, out=out)
    with launch.on_device(device):
        first, second, target = _dense(x), _dense(residual), _target(out)
        kernel = _add_kernel(first.itemsize == 4, second.itemsize == 4, target.itemsize == 4)
        arguments = _ADD.pack(first.data.ptr, second.data.ptr, target.data.ptr, first.size)
        launch.prepare(kernel, device, _blocks(first.size, device))(arguments)
        return _delivered(target, out)


def gather(table: Any, ids: Any, out: Any) -> Any:
    """Rows ``ids`` (int64, checked) of a bfloat16 table [V, K] into out [rows, K], all contiguous, K even."""
    device = table.device.id
    arguments = _GATHER.pack(table.data.ptr, ids.data.ptr, out.data.ptr, table.shape[1])
    launch.prepare(_GATHER_KERNEL, device, ids.size)(arguments)
    return out


def argmax(logits: Any, ids: Any, state: tuple[Any, ...] = ()) -> Any:
    """The greedy token of each row of contiguous logits [rows, V] into ids [rows]; with ``state`` (log [rows, steps], steps,
    positions, slots [rows], before [1]) also the move to the next position."""
    device = logits.device.id
    pointers = [array.data.ptr for array in state] or [0] * 5
    row = state[0].shape[1] if state else 0
    arguments = _ARGMAX.pack(logits.data.ptr, ids.data.ptr, *pointers, row, logits.shape[1])
    launch.prepare(_ARGMAX_KERNELS[logits.itemsize == 4], device, len(logits))(arguments)
    return ids


def _padded(keys: int) -> int:
    """Elements from one row of scores to the next: even, for accesses of two."""
    return -(-keys // 8) * 8


def _blocks(count: int, device: int) -> int:
    return max(1, min(-(-count // 256), 8 * launch.multiprocessors(device)))


def _dense(x: Any) -> Any:
    if x.flags.c_contiguous:
        return x
    import cupy

    return cupy.ascontiguousarray(codes(x)).view(x.dtype)


def _bfloat16(x: Any) -> Any:
    if x.dtype == bfloat16:
        return x
    import cupy

    from cufuse import _gpu_cast

    return _gpu_cast.round_to_bf16(x, "nearest_even", None, cupy.empty(x.shape, bfloat16))


def _target(out: Any) -> Any:
    if out.flags.c_contiguous:
        return out
    import cupy

    return cupy.empty(out.shape, out.dtype)


def _delivered(target: Any, out: Any) -> Any:
    if target is not out:
        codes(out)[...] = codes(target)
    return out


def codes(x: Any) -> Any:
    """bfloat16 as its codes, for what CuPy does itself (copies, indices); other types as they are."""
    return x.view("u2") if x.dtype == bfloat16 else x
