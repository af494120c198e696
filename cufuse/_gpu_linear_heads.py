"""A packed projection of many rows with head norm, rotation and placing in its shadow, on Hopper: kernels/linear_heads_sm90.cu."""

import struct
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from cufuse import _driver, _layout, launch
from cufuse import _linear_tiles as tiles
from cufuse._gpu_heads import Block, Ends, Unsuited, ends
from cufuse._linear_problem import Problem, ceil_div
from cufuse._norm_kernels import mean_operand, order_defines, point_defines, point_names
from cufuse.compiler import Kernel
from cufuse.named_recipes import RECIPES
from cufuse.recipe import Norm, Rope

_HEAD: Final = 128
_TILE_M: Final = 128
_WIDTHS: Final = (256, 128)
_LINE: Final = 64
_THREADS: Final = 384
_BUFFER_BYTES: Final = 8 * 2048
"""Of each warp that multiplies: a quarter of each head of 16 rows."""
_TABLES_BYTES: Final = 2 * _TILE_M * _HEAD // 4 * 2
"""A quarter of the columns of cos and of sin."""
_WEIGHT_BYTES: Final = 2 * 2 * _HEAD
_LEAST_DEPTH, _MOST_DEPTH = 3, 32
"""Stages of the ring: behind the last of them it takes three quarters of the tables."""
_GROUP_ROWS: Final = 16
"""As in linear_sm90: tiles one above the other that run together."""
_LEAST_EPS: Final = 2.0**-80
"""Below it a sum of squares of tiny elements may show whether they were rounded (head_fragment.cuh)."""
_LEAST_ROWS: Final = 65
_ARGUMENTS: Final = struct.Struct("8i3f5iPP48x")
_NO_SUM: Final = {"SUM_THREADS": 32, "SUM_WIDTH": 32, "SUM_VECTOR": 4, "SUM_CHAINS": 0, "SUM_EDGES": 0, "SUM_TREE": 0}
_NO_NORM: Final = {"CONTRACT": 0, "MEAN_DIVIDE": 0, "RSQRT_CORRECT": 0, "ROUND_NORMALISED": 0}
_TAIL_CYCLES: Final = 6000
"""Of the last tile's heads, which nothing covers, by a count of instructions."""
_ROUNDING_CYCLES: Final = 600
"""Of a tile's accumulators, and of the tensor cores' start."""
_CYCLES_A_SECOND: Final = 1.7e9
_HEADS_BYTES_A_SECOND: Final = 3.0e12
_HEADS_SECONDS: Final = 1e-6
"""kernels/heads.cu on an H200: what it moves, and its launch (0.6B, 384 rows: 11.0 us in one launch, 11.2 in two; 14B, 2048 rows:
277 and 254)."""


class Plan:
    """The launch for arrays of fixed layouts. Raises Unsuited where the kernel cannot do it, or another way is quicker."""

    __slots__ = ("_pack", "prepared", "tile_n")

    def __init__(
        self, block: Block, ends: Ends, problem: Problem, eps: float, device: int, alignment: int, tile_n: int | None = None
    ) -> None:
        """block: q, k and v as targets, weights and tables, or their layouts; its source is not looked at. problem: the packed
        projection, of rows that lie in one array. alignment: the bits below 16 of all the block's pointers, or-ed.
        tile_n: rows of the weight in a tile; None chooses, and finds the kernel unsuited where separate launches are quicker."""
        p, out = problem, block.target
        heads, kv_heads, tokens = out[0].shape[-2], out[1].shape[-2], p.m
        _require(block, ends, p, eps, alignment)
        strides = _token_strides(block)
        rotates = ends.rope is not None
        stages = ceil_div(p.k, _LINE)
        widths = [one for one in (_WIDTHS if tile_n is None else (tile_n,)) if stages >= _steps(one, _part_stages(rotates)[-1])]
        if not widths:
            raise Unsuited("fewer stages of K than parts of a tile's heads")
        width = _choose(p, widths, rotates) if tile_n is None else tile_n
        stage_bytes = _LINE * 2 * (_TILE_M + width)
        tables = _TABLES_BYTES if rotates else 0
        depth = min((p.shared_memory - tables - _BUFFER_BYTES - _WEIGHT_BYTES - 16 * (_MOST_DEPTH + 1)) // stage_bytes, _MOST_DEPTH)
        if depth < _LEAST_DEPTH:
            raise Unsuited("the shared memory does not hold three stages")
        tables_at = depth * stage_bytes
        buffers_at = tables_at + tables
        weights_at = buffers_at + _BUFFER_BYTES
        barriers_at = weights_at + _WEIGHT_BYTES
        tiles_m, tiles_n = ceil_div(tokens, _TILE_M), ceil_div(p.n, width)
        grid = min(tiles_m * tiles_n, p.multiprocessors)
        apart = next(one for one in _part_stages(rotates) if stages >= _steps(width, one))
        kernel = _kernel(ends, _sums(ends.norm, tokens, heads, kv_heads), width, apart)
        smem = barriers_at + 16 * (depth + 1)
        self.tile_n = width
        self.prepared = launch.prepare(kernel, device, grid, threads=_THREADS, smem=smem, programmatic=p.programmatic)
        operands = [float(mean_operand(ends.norm, tokens * count, _HEAD)) if ends.norm else 0.0 for count in (heads, kv_heads)]
        numbers = (
            stages, tiles_m, tiles_n, _GROUP_ROWS, depth, p.weights_ready, heads, kv_heads, *operands,
            float(np.float32(eps)), tokens - (tiles_m - 1) * _TILE_M, tables_at, buffers_at, weights_at, barriers_at,
        )  # fmt: skip
        views = [
            ((p.k, tokens), (p.x_stride * 2,), (_LINE, _TILE_M)),
            ((p.k, p.n), (p.weight_stride * 2,), (_LINE, width)),
            *(((_HEAD, tokens), (stride,), (_HEAD // 4, _TILE_M)) for stride in strides[:2]),
            *(
                ((count * _HEAD, tokens), (stride,), (_HEAD // 4, 16))
                for count, stride in zip((heads, kv_heads, kv_heads), strides[2:], strict=True)
            ),
            ((p.k, tokens), (p.x_stride * 2,), (_LINE, (tokens - 1) % _TILE_M + 1)),
        ]

        def pack(pointers: tuple[int, ...]) -> bytes:
            x, weight, q, k, v, cos, sin, q_weight, k_weight = pointers
            mapped = zip((x, weight, cos, sin, q, k, v, x), views, strict=True)
            maps = [_driver.tensor_map(pointer, *view) if pointer else bytes(128) for pointer, view in mapped]
            return _ARGUMENTS.pack(*numbers, q_weight, k_weight) + b"".join(maps)

        self._pack: Callable[[tuple[int, ...]], bytes] = pack

    def launches(self, pointers: tuple[int, ...]) -> list[tuple[Any, bytes]]:
        """What to launch. pointers: x, weight, q, k, v, cos, sin, q_weight, k_weight; 0 where there is none."""
        return [(self.prepared, self._pack(pointers))]


def _require(block: Block, ends: Ends, p: Problem, eps: float, alignment: int) -> None:
    q, k, v = block.target
    rows = q.shape[-2] + k.shape[-2] + v.shape[-2]
    rope = ends.rope
    small = [one for one in (*block.target, block.q_weight, block.k_weight, block.cos, block.sin) if one is not None]
    reasons = {
        "it needs Hopper": p.capability != 90,
        "64 rows or fewer": p.m < _LEAST_ROWS,
        "heads of another size than 128": q.shape[-1] != _HEAD or p.n != rows * _HEAD,
        "slots of a cache, or v at its place": block.slots is not None or not block.move_v,
        "slices of K": p.slices != 1,
        "float32 somewhere": p.float32_x or p.out_float32 or ends.out_float32 or any(one.itemsize != 2 for one in small),
        "strides or alignment of x or the weight": not p.maps,
        "alignment of q, k, v, tables or weights": alignment % 16 != 0,
        "a rotation without PyTorch's rounding points": rope is not None and not _rounds_as_torch(rope),
    }
    for reason, holds in reasons.items():
        if holds:
            raise Unsuited(reason)
    if ends.norm is not None and not (ends.norm.round_weighted and np.float32(eps) >= _LEAST_EPS):
        raise Unsuited(f"a head norm that is not rounded at its end, or eps below {_LEAST_EPS}")


def _rounds_as_torch(rope: Rope) -> bool:
    return rope.tables == "bfloat16" and rope.round_products and rope.round_sum and not rope.contract


def _token_strides(block: Block) -> list[int]:
    """Bytes from token to token of cos, sin, q, k and v, as tensor maps take them; 16 for a table that is absent."""
    leading = block.target[0].shape[:-2]
    arrays = {"cos": block.cos, "sin": block.sin} | dict(zip("qkv", block.target, strict=True))
    try:
        walked = _layout.walk(leading, arrays)
        heads = [_layout.element_stride("out", array, -2) for array in block.target]
    except ValueError as error:
        raise Unsuited(str(error)) from error
    if walked.outer != 1:
        raise Unsuited("tokens at two levels of strides")
    if any(stride not in (0, _HEAD) for stride in heads):
        raise Unsuited("heads of a token that do not lie one behind the other")
    present = [stride for stride, array in zip(walked.inner_strides, arrays.values(), strict=True) if array is not None]
    if any(stride <= 0 or stride % 8 for stride in present):
        raise Unsuited("tokens that are no multiple of 16 bytes apart")
    return [stride * 2 or 16 for stride in walked.inner_strides]


def _choose(p: Problem, widths: list[int], rotates: bool) -> int:
    """The width of the fewest cycles. Raises Unsuited where products and heads in separate launches take fewer."""
    width = min(widths, key=lambda one: (cycles(p, one, rotates), -one))
    plain = tiles.cycles(p, tiles.choose_warpgroups(p))
    heads = _HEADS_SECONDS + p.m * p.n * 4 / _HEADS_BYTES_A_SECOND
    if cycles(p, width, rotates) > plain + heads * _CYCLES_A_SECOND:
        raise Unsuited("too few tiles: separate launches are quicker")
    return width


def cycles(p: Problem, tile_n: int, rotates: bool) -> int:
    """What the launch costs by a simple count, as ``_linear_tiles.cycles`` has it."""
    rounds = ceil_div(ceil_div(p.m, _TILE_M) * ceil_div(p.n, tile_n), p.multiprocessors)
    # 64 k of a tile: the products, or what the L2 cache delivers (some 40 bytes a cycle)
    stage = max(4 * tile_n, (_TILE_M + tile_n) * 128 // 40)
    tables = _TILE_M * _HEAD * 2 * 2 // 40 if rotates else 0
    return rounds * (ceil_div(p.k, 64) * stage + tables + _ROUNDING_CYCLES) + _TAIL_CYCLES * tile_n // 256


def _part_stages(rotates: bool) -> tuple[int, ...]:
    """Stages from one quarter of a tile's heads to the next (PART_STAGES), the best first: tables have to come in between."""
    return (3, 2) if rotates else (1,)


def _steps(tile_n: int, apart: int) -> int:
    """Stages during which the kernel does the parts of a tile's heads: STEPS."""
    return 4 * (tile_n // _HEAD) + 3 * apart + 1


def _sums(norm: Norm | None, tokens: int, heads: int, kv_heads: int) -> dict[str, int]:
    """The sum's macros. Raises Unsuited where a simulated thread is not one vector of four."""
    if norm is None:
        return _NO_SUM
    sums, other = (order_defines(norm.sum_order, tokens * count, _HEAD) for count in (heads, kv_heads))
    chains = sums["SUM_CHAINS"]
    if other != sums or sums | {"SUM_WIDTH": 32, "SUM_CHAINS": 0} != _NO_SUM or chains not in (0, 2):
        raise Unsuited(f"order {norm.sum_order!r} does not give 32 threads four elements each")
    return sums


def _kernel(ends: Ends, sums: dict[str, int], tile_n: int, apart: int) -> Kernel:
    norm = ends.norm
    defines: dict[str, int | str] = {"TILE_N": tile_n, "HEAD_NORM": int(norm is not None), "ROTATE": int(ends.rope is not None)}
    defines |= {"PART_STAGES": apart}
    defines |= {"COLUMNS": _HEAD, "GROUP": 32, **sums, **(_NO_NORM if norm is None else point_defines(norm))}
    words = ["no norm"] if norm is None else [norm.sum_order, *point_names(norm)]
    words += [f"rotation by {apart} stages"] if ends.rope is not None else []
    name = f"linear_heads_sm90 {_TILE_M}x{tile_n}, {', '.join(words)}"
    return Kernel(name, "linear_heads_sm90.cu", "linear_heads_sm90", tuple(defines.items()), _THREADS, capability=90, last=90)


def _kernels() -> tuple[Kernel, ...]:
    """A choice for compile tests and tables: the recipes that it serves, with and without norm and rotation, and narrow tiles."""
    found: dict[str, Kernel] = {}
    for recipe, norm, rotation, tile_n, apart in (
        *((name, True, True, 256, 3) for name in ("torch", "torch-rms-norm", "batch-invariant", "gemma")),
        *(("torch", *parts, 256, 3 if parts[1] else 1) for parts in ((True, False), (False, True), (False, False))),
        *(("torch", True, True, tile_n, apart) for tile_n, apart in ((256, 2), (128, 3), (128, 2))),
    ):
        last = ends(RECIPES[recipe], norm, rotation)
        kernel = _kernel(last, _sums(last.norm, 2048, 32, 8), tile_n, apart)
        found.setdefault(kernel.name, kernel)
    return tuple(found.values())


KERNELS: Final = _kernels()
