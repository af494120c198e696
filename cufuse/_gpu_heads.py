"""What follows the projection of an attention layer on CuPy arrays, in one launch: kernels/heads.cu.

Head norm and rotation of q and k, the last rounding, and the way of all three to their places: arrays with strides of their
own, or slots of a K/V cache.
"""

import struct
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import numpy as np

from cufuse import _layout, compiler, launch
from cufuse._linear_problem import ceil_div
from cufuse._norm_kernels import mean_operand, order_defines, point_defines, point_names
from cufuse.compiler import Kernel
from cufuse.named_recipes import RECIPES
from cufuse.recipe import Norm, Recipe, Rope

_WARPS: Final = 4
_ARGUMENTS: Final = struct.Struct("P3i4x" * 8 + "PPP5i3f2i")
_MOST_STRIDE: Final = 2**31 - 1
_MOST_GRID_Y: Final = 65535
_LANES: Final = 32
_ONE_CHAIN: Final = (0, 1)  # CHAIN_ONE, CHAIN_PAIRS of sums.cuh
_BY_POSITION: Final = 2
_BUSY_WARPS: Final = 16
"""Warps that a multiprocessor should have before one takes several heads (H200, a block of 256 rows: 0.6B 9.4 us, with twice as
many 10.2; 4B 19.1 and 18.9, 8B 28.1 and 28.0)."""
_MOST_BLOCKS: Final = 16
"""Of a multiprocessor: 64 warps."""
_FEW_TOKENS: Final = 64
_RESERVED: Final = 1024
"""Bytes of shared memory that a block takes beside its own."""


class Ends(NamedTuple):
    """What is done with q and k after the projection, of which the last rounds where the recipe rounds at the very end."""

    norm: Norm | None
    rope: Rope | None
    out_float32: bool


class Described(NamedTuple):
    """The layout of an array that need not exist yet."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @property
    def size(self) -> int:
        """Elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def ndim(self) -> int:
        """Axes."""
        return len(self.shape)


def dense(shape: tuple[int, ...], itemsize: int) -> Described:
    """A contiguous array."""
    strides, step = [], itemsize
    for length in reversed(shape):
        strides.append(step)
        step *= length
    return Described(shape, tuple(reversed(strides)), itemsize)


class Block(NamedTuple):
    """The arrays of one launch, or their layouts. q, k, v: [..., heads, D]; ``to`` of k and v is [slots, heads, D] with slots.

    move_v : v goes from ``source`` to ``target``; without, it is at its place already.
    """

    source: tuple[Any, Any, Any]
    target: tuple[Any, Any, Any]
    q_weight: Any
    k_weight: Any
    cos: Any
    sin: Any
    slots: Any
    move_v: bool


Pointers = tuple[int, ...]
"""Addresses of source, target, cos, sin, q_weight, k_weight and slots, in this order; 0 where there is none."""


class Plan:
    """One launch for arrays of fixed layouts."""

    __slots__ = ("_pack", "prepared")

    def __init__(
        self, block: Block, ends: Ends, eps: float, device: int, alignment: int, *, weights_ready: bool, tables_ready: bool
    ) -> None:
        """alignment: the pointers' bits below 16, or-ed. weights_ready, tables_ready: those are written before the kernel in
        front of this one begins. Raises Unsuited where the kernel cannot do it."""
        *leading, heads, dimensions = block.source[0].shape
        kv_heads, tokens = block.source[1].shape[-2], int(np.prod(leading, dtype=np.int64))
        defines = _defines(ends, tokens, heads, kv_heads, dimensions)
        walked = {f"from {name}": array for name, array in zip("qkv", block.source, strict=True)}
        walked |= {f"to {name}": array for name, array in zip("qkv", block.target, strict=True)}
        walked |= {"cos": block.cos, "sin": block.sin}
        if block.slots is not None:
            walked |= {"to k": None, "to v": None}
        if not block.move_v:
            walked |= {"from v": None, "to v": None}
        rows = _walk(tuple(leading), walked)
        arrays = [*block.source, *block.target]
        head_strides = [_layout.element_stride("out", array, -2) for array in arrays]
        inner, outer = list(rows.inner_strides), list(rows.outer_strides)
        if block.slots is not None:
            for index in (4, 5):
                inner[index] = _layout.element_stride("out", arrays[index], 0)
        vector = defines.get("SUM_VECTOR", 0)
        given = [one for one in (*arrays, block.cos, block.sin, block.q_weight, block.k_weight) if one is not None]
        lengths = (dimensions, *head_strides, *inner, *outer)
        possible = _layout.vector_size([alignment] * len(given), [one.itemsize for one in given], lengths)
        if ends.norm is None:
            defines |= _no_sum(possible if block.cos is None else min(possible, dimensions // 2))
        elif vector > possible:
            raise Unsuited(f"packs of {vector}, strides and pointers allow {possible}")
        _require_shape(defines, dimensions)
        if {one.itemsize for one in block.source} != {block.source[0].itemsize}:
            raise Unsuited("projections of two types")
        if {one.itemsize for one in block.target[: 3 if block.move_v else 2]} != {4 if ends.out_float32 else 2}:
            raise Unsuited("outputs of two types")
        wide = {
            "X": block.source[0], "WEIGHT": block.q_weight, "COS": block.cos, "SIN": block.sin
        }  # fmt: skip
        if block.q_weight is not None and block.q_weight.itemsize != block.k_weight.itemsize:
            raise Unsuited("weights of two types")
        float32 = {name: array is not None and array.itemsize == 4 for name, array in wide.items()}
        every = heads + (2 if block.move_v else 1) * kv_heads
        warps = _BUSY_WARPS * launch.multiprocessors(device)
        batch = next((b for b in (4, 2) if tokens * every >= b * warps and heads % b == 0 and kv_heads % b == 0), 1)
        kernel = _kernel(ends, defines, float32, dimensions, block.move_v, batch)
        blocks = ceil_div(every // batch, _WARPS)
        if max(map(abs, lengths)) > _MOST_STRIDE or blocks > _MOST_GRID_Y:
            raise Unsuited("strides beyond 31 bits, or very many heads")
        room = _room(tokens, blocks, device)
        self.prepared = launch.prepare(kernel, device, (tokens, blocks, 1), smem=room, programmatic=_programmatic(device))
        operands = [
            float(mean_operand(ends.norm, tokens * count, dimensions)) if ends.norm is not None else 0.0
            for count in (heads, kv_heads)
        ]
        capacity = block.target[1].shape[0] if block.slots is not None else 0
        strides = [*zip([*head_strides, 0, 0], inner, outer, strict=True)]

        def pack(pointers: Pointers) -> bytes:
            places = [number for pointer, steps in zip(pointers[:8], strides, strict=True) for number in (pointer, *steps)]
            return _ARGUMENTS.pack(
                *places, *pointers[8:], capacity, rows.inner, tokens, heads, kv_heads, *operands, float(np.float32(eps)),
                weights_ready, tables_ready,
            )  # fmt: skip

        self._pack: Callable[[Pointers], bytes] = pack

    def launches(self, pointers: Pointers) -> list[tuple[Any, bytes]]:
        """What to launch, with these addresses."""
        return [(self.prepared, self._pack(pointers))]


class Unsuited(ValueError):
    """The kernel cannot do it; another way has to be taken."""


def _room(tokens: int, blocks: int, device: int) -> int:
    """Shared memory that a block asks for and does not use, so that all multiprocessors get the same number of blocks: those
    that are free first, when a projection ends, would take as many as they can hold. After few tokens all end together."""
    share = ceil_div(tokens * blocks, launch.multiprocessors(device))
    if tokens <= _FEW_TOKENS or share > _MOST_BLOCKS or not _programmatic(device):
        return 0
    whole = compiler.shared_memory_limit(launch.capability(device)) + _RESERVED
    return (whole // share - _RESERVED) // 128 * 128


def _programmatic(device: int) -> bool:
    return launch.capability(device) >= 90


def _walk(leading: tuple[int, ...], arrays: dict[str, Any]) -> _layout.Walk:
    try:
        return _layout.walk(leading, arrays)
    except ValueError as error:
        raise Unsuited(str(error)) from error


def _defines(ends: Ends, tokens: int, heads: int, kv_heads: int, dimensions: int) -> dict[str, int]:
    """The sum's macros, the same for q and k."""
    if ends.norm is None:
        return {}
    found = [order_defines(ends.norm.sum_order, tokens * count, dimensions) for count in (heads, kv_heads)]
    sums = found[0]
    if found[1] != sums:
        raise Unsuited("q and k have sums of two orders")
    if sums["SUM_CHAINS"] not in (*_ONE_CHAIN, _BY_POSITION) or sums["SUM_EDGES"]:
        raise Unsuited("chains over more than whole vectors")
    threads, vector = sums["SUM_THREADS"], sums["SUM_VECTOR"]
    if threads > _LANES or dimensions % vector or (threads < _LANES and dimensions > threads * vector):
        raise Unsuited(f"{threads} simulated threads, vectors of {vector}")
    return sums


def _no_sum(vector: int) -> dict[str, int]:
    return {"SUM_THREADS": _LANES, "SUM_WIDTH": _LANES, "SUM_VECTOR": vector, "SUM_CHAINS": 0, "SUM_EDGES": 0, "SUM_TREE": 0}


def _require_shape(defines: dict[str, int], dimensions: int) -> None:
    chunks = dimensions // defines["SUM_VECTOR"]
    if dimensions & (dimensions - 1) or chunks < 2:
        raise Unsuited(f"heads of {dimensions}: needed is a power of two, of two vectors at least")


def _kernel(ends: Ends, sums: dict[str, int], float32: dict[str, bool], dimensions: int, move_v: bool, batch: int) -> Kernel:
    norm, rope = ends.norm, ends.rope
    defines: dict[str, int | str] = {"COLUMNS": dimensions, **sums, "GROUP": _LANES, "WARPS": _WARPS, "BATCH": batch}
    defines |= {f"{name}_FLOAT32": int(one) for name, one in float32.items()} | {"OUT_FLOAT32": int(ends.out_float32)}
    defines |= {"MOVE_V": int(move_v), "HEAD_NORM": int(norm is not None), "ROTATE": int(rope is not None)}
    defines |= {
        "ROUND_WEIGHTED": int(norm is not None and norm.round_weighted),
        "ROUND_TABLES": int(rope is not None and rope.tables == "bfloat16" and (float32["COS"] or float32["SIN"])),
        "ROUND_PRODUCTS": int(rope is not None and rope.round_products),
        "CONTRACT_ROTATION": int(rope is not None and rope.contract),
    }
    no_norm = {"CONTRACT": 0, "MEAN_DIVIDE": 0, "RSQRT_CORRECT": 0, "ROUND_NORMALISED": 0}
    defines |= no_norm if norm is None else point_defines(norm)
    order = "no norm" if norm is None else f"{norm.sum_order} {sums['SUM_THREADS']}"
    kinds = ", ".join(f"{name.lower()} float32" for name, one in float32.items() if one)
    flags = ("MOVE_V", "ROTATE", "ROUND_WEIGHTED", "ROUND_TABLES", "ROUND_PRODUCTS", "CONTRACT_ROTATION")
    words = [] if norm is None else point_names(norm)
    points = ", ".join(words + [name.lower().replace("_", " ") for name in flags if defines[name]])
    out = "float32" if ends.out_float32 else "bfloat16"
    vector = sums["SUM_VECTOR"]
    name = f"heads D {dimensions}, {order}, {kinds or 'bfloat16'} -> {out}, {points or 'plain'}, by {vector}, {batch} heads"
    return Kernel(name, "heads.cu", "heads", tuple(defines.items()), _LANES * _WARPS)


def ends(recipe: Recipe, head_norm: bool, rotation: bool) -> Ends:
    """What follows q's and k's projection under a recipe."""
    out_float32 = recipe.output(head_norm=head_norm, rotation=rotation) == "float32"
    return Ends(recipe.head_norm if head_norm else None, recipe.rope if rotation else None, out_float32)


def _kernels() -> tuple[Kernel, ...]:
    """A choice for compile tests and tables: every named recipe's heads of 128, few and many tokens; bare scattering."""
    found: dict[str, Kernel] = {}

    def add(last: Ends, sums: dict[str, int], wide: bool, tables: bool, batch: int, move_v: bool = True) -> None:
        float32 = {"X": wide, "WEIGHT": False, "COS": tables, "SIN": tables}
        kernel = _kernel(last, sums, float32, 128, move_v, batch)
        found.setdefault(kernel.name, kernel)

    for recipe in RECIPES.values():
        last = ends(recipe, True, True)
        try:
            sums = _defines(last, 64, 32, 8, 128)
        except Unsuited:
            continue
        for batch in (1, 4):
            add(last, sums, recipe.gemm.output == "float32", recipe.rope.tables == "float32", batch)
    torch = RECIPES["torch"]
    add(ends(torch, True, False), _defines(ends(torch, True, False), 64, 32, 8, 128), False, False, 1)
    add(ends(torch, False, True), _no_sum(8), False, False, 1, move_v=False)
    add(ends(torch, False, False), _no_sum(8), False, False, 1)
    return tuple(found.values())


KERNELS: Final = _kernels()
