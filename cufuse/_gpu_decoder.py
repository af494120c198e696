"""The decoder's steps behind q, k and v on CuPy arrays: softmax, attention, SwiGLU, residual sum, gathered rows, argmax."""

import struct
from typing import Any, Final

from cufuse import compiler, launch
from cufuse.bf16 import bfloat16
from cufuse.compiler import Kernel
from cufuse.emulation import attention_products
from cufuse.recipe import Attention, Mlp, Recipe

_SOFTMAX: Final = struct.Struct("PPPqqi0q")
_SCORES: Final = struct.Struct("3P6q7if0q")
_VALUES: Final = struct.Struct("3P3q7i0q")
_DECODE_SCORES: Final = struct.Struct("5P5q5if0q")
_DECODE_VALUES: Final = struct.Struct("5P3q7i0q")
_SWIGLU: Final = struct.Struct("PPPqqqi0q")
_ADD: Final = struct.Struct("PPPq")
_GATHER: Final = struct.Struct("PPPi0q")
_ARGMAX: Final = struct.Struct("8Pqii")

_WARP_ROWS: Final = 2048  # columns that the order of one warp is for
HEAD_DIMS: Final = (64, 128, 256)
# of attention_decode_scores.cu (keys: of attention_scores.cu too) and attention_decode_values.cu
_MOST_LANES: Final = 128
_SCORE_KEYS, _SCORE_ROWS = 32, 8
_VALUE_KEYS, _VALUE_ROWS, _VALUE_WIDTHS = 512, 4, (16, 32)


def _softmax_kernel(float32: bool, block: bool, exact: bool) -> Kernel:
    name = f"softmax {'float32' if float32 else 'bfloat16'}, a {'block' if block else 'warp'} a row{', exact exp' if exact else ''}"
    defines = (("X_FLOAT32", int(float32)), ("BLOCK", int(block)), ("EXACT_EXPONENTIAL", int(exact)))
    return Kernel(name, "softmax.cu", "softmax", defines, 1024 if block else 128, 128 if block else 0)


def _scores_kernel(dimensions: int, numerics: Attention, decode: bool) -> Kernel:
    source = "attention_decode_scores" if decode else "attention_scores"
    defines = {
        "DIMENSIONS": dimensions,
        "ROUND_SCORES": int(numerics.round_scores),
        "ROUND_SCALED": int(numerics.round_scaled),
        "SCORES_FLOAT32": int(not numerics.round_scaled),
    }
    rounded = "".join(f", {name.lower().replace('_', ' ')}" for name, value in defines.items() if value and name != "DIMENSIONS")
    name = f"{source} D {dimensions}{rounded}"
    if not decode:
        return Kernel(name, f"{source}.cu", source, tuple(defines.items()), 128)
    memory = 2 * _SCORE_KEYS * (dimensions + 8) + 4 * _SCORE_ROWS * dimensions + 4 * _MOST_LANES * (2 * _SCORE_KEYS + 1)
    return Kernel(name, f"{source}.cu", source, tuple(defines.items()), 256, memory)


def _values_kernel(float32: bool) -> Kernel:
    name = f"attention_values -> {'float32' if float32 else 'bfloat16'}"
    return Kernel(name, "attention_values.cu", "attention_values", (("OUT_FLOAT32", int(float32)),), 128)


def _decode_values_kernel(softmax: bool, float32: bool, out_float32: bool, exact: bool, width: int) -> Kernel:
    """softmax: of scores, float32 or bfloat16, in the same launch; else of weights. Shared memory is given at the launch."""
    defines = {
        "SOFTMAX": int(softmax), "X_FLOAT32": int(float32), "OUT_FLOAT32": int(out_float32), "EXACT_EXPONENTIAL": int(exact),
    }  # fmt: skip
    source = "attention_decode_values"
    name = f"{source} {width} wide{''.join(f', {name.lower()}' for name, value in defines.items() if value)}"
    return Kernel(name, f"{source}.cu", source, (*defines.items(), ("WIDTH", width)), 256)


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
_PARTS_KERNELS: Final = tuple(
    Kernel(f"largest_of_parts {name}", "argmax.cu", "largest_of_parts", (("X_FLOAT32", wide), ("PARTS", 1)), 256, 64)
    for wide, name in enumerate(("bfloat16", "float32"))
)
_ARGMAX_KERNEL: Final = Kernel("argmax", "argmax.cu", "argmax", (("X_FLOAT32", 0), ("PARTS", 0)), 32)
_ARGMAX_PART: Final = 2048  # logits at least
_UNROUNDED: Final = Attention(round_scores=False, round_scaled=False, round_output=False)

KERNELS: Final = (
    *(_softmax_kernel(wide, block, False) for wide in (False, True) for block in (False, True)),
    *(_scores_kernel(size, numerics, one) for size in HEAD_DIMS for numerics in (Attention(), _UNROUNDED) for one in (False, True)),
    *(_values_kernel(wide) for wide in (False, True)),
    *(_decode_values_kernel(True, wide, wide, False, width) for wide in (False, True) for width in _VALUE_WIDTHS),
    *(_decode_values_kernel(False, False, wide, False, width) for wide in (False, True) for width in _VALUE_WIDTHS),
    *(_swiglu_kernel(*flags, False) for flags in ((False, False, True), (False, False, False), (True, True, False))),
    *(_add_kernel(*flags) for flags in ((False, False, False), (False, False, True), (True, True, True), (True, False, True))),
    _GATHER_KERNEL,
    *_PARTS_KERNELS,
    _ARGMAX_KERNEL,
)
"""Those of the named recipes; others are made as they are asked for."""


def softmax(x: Any, numerics: Attention, out: Any) -> Any:
    """Softmax of checked [..., K] into ``out``; see ``cufuse.softmax``."""
    device = launch.device_of(x=x, out=out)
    with launch.on_device(device):
        dense, target = launch.contiguous(x, "x"), _target(out)
        columns = x.shape[-1]
        run_softmax(dense.data.ptr, target.data.ptr, x.size // columns, columns, columns, numerics, x.itemsize == 4, device)
        return _delivered(target, out)


def run_softmax(
    x: int, y: int, rows: int, row: int, columns: int, numerics: Attention, float32: bool, device: int, before: int = 0,
    programmatic: bool = False,
) -> None:  # fmt: skip
    """Softmax of rows ``row`` elements apart, of ``columns`` (more by what lies at ``before``, up to ``row``), by address."""
    block = (columns if not before else row) > _WARP_ROWS
    kernel = _softmax_kernel(float32, block, numerics.exponential == "correct")
    prepared = launch.prepare(kernel, device, rows if block else -(-rows // 4), programmatic=programmatic)
    prepared(_SOFTMAX.pack(x, y, before, rows, row, columns))


def attention(q: Any, k: Any, v: Any, scale: float, causal: bool, recipe: Recipe, out: Any) -> Any:
    """Attention of checked [..., T, Hq, D] and [..., S, Hkv, D] into ``out``; see ``cufuse.attention``.

    Raises ValueError for a D that is not one of 64, 128, 256 or a tensor core other than that of the device.
    """
    device = launch.device_of(q=q, k=k, v=v, out=out)
    with launch.on_device(device):
        queries, heads, _size = q.shape[-3:]
        keys, _kv_heads = k.shape[-3:-1]
        q, k, v = (as_kernels_read(x, name).reshape(-1, *x.shape[-3:]) for name, x in (("q", q), ("k", k), ("v", v)))
        target = _target(out)
        shape = (len(q) * heads * queries, _padded(keys))
        scores = launch.temporary(shape, "f4" if not recipe.attention.round_scaled else "u2", "scores")
        weights = scores if scores.itemsize == 2 else launch.temporary(shape, "u2", "weights")
        if fuses_softmax(queries, scores.shape[1]):
            weights = None
        both = order_codes(recipe.attention, len(q) * heads, queries, keys)
        run_attention(q, k, v, scores, weights, target, keys, scale, causal, recipe.attention, device, both)
        return _delivered(target, out)


def fuses_softmax(queries: int, row: int) -> bool:
    """Whether ``run_attention`` takes the softmax of such rows in the same launch as the values, so that weights may be None."""
    return queries == 1 and row <= _WARP_ROWS


def run_attention(
    q: Any, k: Any, v: Any, scores: Any, weights: Any, out: Any, keys: int, scale: float, causal: bool, numerics: Attention,
    device: int, both: tuple[int, int],
) -> None:  # fmt: skip
    """Attention without an allocation: q [B, T, Hq, D], k and v [B, capacity, Hkv, D] of which the first ``keys`` count, scores
    and weights [B Hq T, row]; weights None: nobody asks for them (``fuses_softmax``). ``both``: order_codes."""
    batch, queries, heads, size = q.shape
    kv_heads = k.shape[2]
    if queries == 1:
        run_decode(q, k, v, scores, weights, out, keys, scale, numerics, device, both)
        return
    _require_head_dim(size)
    row = scores.shape[1]
    tiles = batch * kv_heads * -(-(heads // kv_heads * queries) // 16)
    strides = [stride // 2 for array in (q, k) for stride in array.strides[:3]]
    pointers = (q.data.ptr, k.data.ptr, scores.data.ptr)
    arguments = (*pointers, *strides, queries, heads, kv_heads, keys, row, int(causal), both[0], scale)
    memory = 4 * (both[0] & 255) * (_SCORE_KEYS + 1)  # of the lanes' sums
    prepared = launch.prepare(_scores_kernel(size, numerics, False), device, (tiles, -(-keys // _SCORE_KEYS), 1), smem=memory)
    prepared(_SCORES.pack(*arguments))
    rows = batch * heads * queries
    run_softmax(scores.data.ptr, weights.data.ptr, rows, row, keys, numerics, scores.itemsize == 4, device)
    strides = [stride // 2 for stride in v.strides[:3]]
    arguments = (weights.data.ptr, v.data.ptr, out.data.ptr, *strides, queries, heads, kv_heads, keys, row, size, both[1])
    launch.prepare(_values_kernel(not numerics.round_output), device, (tiles, -(-size // 32), 1))(_VALUES.pack(*arguments))


def run_decode(
    q: Any, k: Any, v: Any, scores: Any, weights: Any, out: Any, keys: int, scale: float, numerics: Attention, device: int,
    both: tuple[int, int], before: int = 0, table: int = 0, programmatic: bool = False,
) -> None:  # fmt: skip
    """``run_attention`` for one query a sequence. ``before``: the address of the number of keys before this one, instead of
    ``keys``; ``table``: that of the order codes of every number of keys, [keys][2], instead of ``both``.

    programmatic : launched as dependents, which read those two and all keys and values but the last early: these must have been
    written before the chain of dependents began.
    """
    batch, _, heads, size = q.shape
    kv_heads = k.shape[2]
    _require_head_dim(size)
    group, row, pairs = heads // kv_heads, scores.shape[1], batch * kv_heads
    most = k.shape[1] if before else keys
    strides = [array.strides[axis] // 2 for array, axes in ((q, (0, 2)), (k, (0, 1, 2))) for axis in axes]
    pointers = (q.data.ptr, k.data.ptr, scores.data.ptr, before, table)
    tiles = pairs * -(-group // _SCORE_ROWS)
    # several blocks a multiprocessor; beyond, a block takes several tiles of keys
    blocks = min(-(-most // _SCORE_KEYS), max(1, 8 * launch.multiprocessors(device) // tiles))
    prepared = launch.prepare(_scores_kernel(size, numerics, True), device, (tiles, blocks, 1), programmatic=programmatic)
    prepared(_DECODE_SCORES.pack(*pointers, *strides, heads, kv_heads, keys, row, both[0], scale))
    fused = weights is None
    if not fused:
        rows, columns = batch * heads, 1 if before else keys
        wide = scores.itemsize == 4
        run_softmax(scores.data.ptr, weights.data.ptr, rows, row, columns, numerics, wide, device, before, programmatic)
    pitch = -(-row // 16) * 16 + 8 if fused else _VALUE_KEYS + 8
    held = min(group, _VALUE_ROWS)
    tiles = pairs * -(-group // _VALUE_ROWS)
    width, memory = _value_width(tiles * size, held, pitch, device)
    exact = fused and numerics.exponential == "correct"
    kernel = _decode_values_kernel(fused, fused and scores.itemsize == 4, not numerics.round_output, exact, width)
    strides = [stride // 2 for stride in v.strides[:3]]
    given = scores if fused else weights
    pointers = (given.data.ptr, v.data.ptr, out.data.ptr, before, table)
    arguments = (*pointers, *strides, heads, kv_heads, keys, row, size, both[1], pitch)
    launch.prepare(kernel, device, (tiles, size // width, 1), smem=memory, programmatic=programmatic)(
        _DECODE_VALUES.pack(*arguments)
    )


def _value_width(columns: int, rows: int, pitch: int, device: int) -> tuple[int, int]:
    """How much of D a block of attention_decode_values takes, of so many in all, and its shared memory: the wide one where there
    is more work than two narrow blocks a multiprocessor, as each block takes the softmax of its rows itself."""

    def memory(width: int) -> int:
        return 4 * _VALUE_KEYS * width + 4 * (rows * pitch + _VALUE_ROWS + _MOST_LANES * (rows * width + 1))

    narrow, wide = _VALUE_WIDTHS
    many = columns > 2 * narrow * launch.multiprocessors(device)
    fits = memory(wide) <= compiler.shared_memory_limit(launch.capability(device))
    width = wide if many and fits else narrow
    return width, memory(width)


def _require_head_dim(size: int) -> None:
    if size not in HEAD_DIMS:
        raise ValueError(f"q has heads of {size}; on a GPU needed is one of {', '.join(map(str, HEAD_DIMS))}")


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
        inputs = [launch.contiguous(x, name) for name, x in (("gate", gate), ("up", up)) if x is not None]
        if len({x.itemsize for x in inputs}) > 1:
            raise TypeError(f"gate has dtype {gate.dtype} and up {up.dtype}; on a GPU needed is one dtype for both")
        target = _target(out)
        second = inputs[1].data.ptr if up is not None else 0
        columns = gate.shape[-1] if gate.ndim else 1
        run_swiglu(inputs[0].data.ptr, second, target, columns, columns, inputs[0].itemsize == 4, numerics, device)
        return _delivered(target, out)


def run_swiglu(
    gate: int, up: int, out: Any, columns: int, row: int, float32: bool, numerics: Mlp, device: int, programmatic: bool = False
) -> None:
    """SwiGLU of rows of gate and up, ``row`` elements apart, by address, into a contiguous ``out``."""
    kernel = _swiglu_kernel(float32, out.itemsize == 4, numerics.round_activated, numerics.exponential == "correct")
    prepared = launch.prepare(kernel, device, _blocks(out.size, device), programmatic=programmatic)
    prepared(_SWIGLU.pack(gate, up, out.data.ptr, out.size, row, row, columns))


def add(x: Any, residual: Any, out: Any) -> Any:
    """The residual sum of checked arrays into ``out``; see ``cufuse.residual``."""
    device = launch.device_of(x=x, residual=residual, out=out)
    with launch.on_device(device):
        first, second, target = launch.contiguous(x, "x"), launch.contiguous(residual, "residual"), _target(out)
        kernel = _add_kernel(first.itemsize == 4, second.itemsize == 4, target.itemsize == 4)
        arguments = _ADD.pack(first.data.ptr, second.data.ptr, target.data.ptr, first.size)
        launch.prepare(kernel, device, _blocks(first.size, device))(arguments)
        return _delivered(target, out)


def gather(table: Any, ids: Any, out: Any, programmatic: bool = False) -> Any:
    """Rows ``ids`` (int64, checked) of a bfloat16 table [V, K] into out [rows, K], all contiguous, K even."""
    arguments = _GATHER.pack(table.data.ptr, ids.data.ptr, out.data.ptr, table.shape[1])
    launch.prepare(_GATHER_KERNEL, table.device.id, ids.size, programmatic=programmatic)(arguments)
    return out


def argmax(logits: Any, ids: Any, state: tuple[Any, ...] = (), programmatic: bool = False) -> Any:
    """The greedy token of each row of contiguous logits [rows, V] into ids [rows]; with ``state`` (log [rows, steps], steps,
    positions, slots [rows], before [1]) also the move to the next position."""
    device, (rows, columns) = logits.device.id, logits.shape
    pointers = [array.data.ptr for array in state] or [0] * 5
    row = state[0].shape[1] if state else 0
    parts = max(1, min(-(-columns // _ARGMAX_PART), 64))
    workspace = launch.workspace(device, 8 * rows * parts)
    arguments = _ARGMAX.pack(logits.data.ptr, workspace, ids.data.ptr, *pointers, row, columns, parts)
    shapes = ((_PARTS_KERNELS[logits.itemsize == 4], (rows, parts, 1)), (_ARGMAX_KERNEL, (rows, 1, 1)))
    prepared = [launch.prepare(kernel, device, grid, programmatic=programmatic) for kernel, grid in shapes]
    launch.one_by_one((one, arguments) for one in prepared)
    return ids


def _padded(keys: int) -> int:
    """Elements from one row of scores to the next: even, for accesses of two."""
    return -(-keys // 8) * 8


def _blocks(count: int, device: int) -> int:
    return max(1, min(-(-count // 256), 8 * launch.multiprocessors(device)))


def as_kernels_read(x: Any, purpose: str) -> Any:
    """bfloat16, contiguous, beginning at a multiple of 16 bytes."""
    x = launch.contiguous(x, purpose)
    if x.dtype != bfloat16:
        from cufuse import _gpu_cast

        return _gpu_cast.round_to_bf16(x, "nearest_even", None, launch.temporary(x.shape, bfloat16, f"{purpose}, rounded"))
    if x.data.ptr % 16:
        moved = launch.temporary(x.shape, bfloat16, f"{purpose}, moved")
        codes(moved)[...] = codes(x)
        return moved
    return x


def _target(out: Any) -> Any:
    if out.flags.c_contiguous:
        return out
    return launch.temporary(out.shape, out.dtype, "result")


def _delivered(target: Any, out: Any) -> Any:
    if target is not out:
        codes(out)[...] = codes(target)
    return out


def codes(x: Any) -> Any:
    """bfloat16 as its codes, for what CuPy does itself (copies, indices); other types as they are."""
    return x.view("u2") if x.dtype == bfloat16 else x
