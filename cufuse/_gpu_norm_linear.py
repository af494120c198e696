"""RMSNorm of a few rows and their projection in one launch, on Hopper: kernels/rms_norm_linear_sm90.cu."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from cufuse import _driver, launch
from cufuse import _linear_tiles as tiles
from cufuse._gpu_head_parts import HeadParts, cluster_size
from cufuse._gpu_heads import Block, Unsuited, dense, ends
from cufuse._linear_problem import Problem, ceil_div
from cufuse._norm_kernels import RESIDUAL, mean_operand, order_defines, order_of, point_defines, point_names, scratch_floats
from cufuse.compiler import Kernel
from cufuse.named_recipes import RECIPES
from cufuse.recipe import Recipe

MOST_ROWS: Final = 64
_GROUP: Final = 256
_THREADS: Final = _GROUP + 32
_LINE: Final = 64
_WIDTHS: Final = (16, 24, 32, 40, 48, 64, 80, 96, 128)
_MOST_DEPTH: Final = 32
_ARGUMENTS: Final = struct.Struct("7P3q2f12i56x")
_FIRST_BYTES: Final = 110 * 1024
"""Of the ring, asked for before the normalised rows are there, and no more than half a tile: about what memory delivers in the
meantime (H200: more delays the rows, less leaves the memory idle). Half of it may be asked for while the kernel in front runs."""
_STATIC_FIRST: Final = 140 * 1024
"""The same for rows that CTAs share and static weights (H200, K = 4096, N = 6144: 15.7 us against 16.0 with 16 rows, 16.9 against
17.5 with 64)."""
_CACHED_BYTES: Final = 24 * 1024
"""Of the weights that no CTA may have yet, asked for into the L2 cache while the kernels in front still run, one stage at least.
H200, K = 4096 and N = 6144, blocks one behind the other: 14.7 us against 15.4 with one row, 16.0 against 16.7 with 16, 16.9
against 17.4 with 64. Twice as much is no better; with four times as much, or with the cache ahead of the ring all the way, it takes
longer than without. Why has not been measured."""
_LARGE_TILE: Final = 256 * 1024
"""Bytes that a CTA brings for its tile, weights and shared rows, beyond which asking so early gains with static weights too (16
rows: 15.8 us against 16.5 at K = 4096; at K = 2560, where each CTA has the rows, 11.4 against 11.1)."""
_EARLY_TILE: Final = 64 * 1024
"""For one row with static weights all of the ring is asked for (H200, blocks one behind the other: 3.95 us against 4.18 at K = 1024
and N = 4096, 14.2 against 14.6 at K = 4096, N = 6144), and tiles of so many bytes as a whole while the kernel in front runs (3.42
at K = 1024; longer ones get slower by it: 15.8 at K = 4096)."""
_STAGES: Final = ((256, 4), (128, 3))
"""Values of k in a stage where so many stages fit; otherwise 64."""
_SIXTEEN_STAGES: Final = _STAGES[1:]
"""The same where 9 to 16 rows lie beside the ring (H200, 16 rows: 4.71 us against 4.83 at K = 1024, 11.25 against 11.45 at
K = 2560)."""
_RESIDENT_ROWS: Final = 16
"""Most rows that every CTA normalises for itself instead of sharing the work; 0: one at most."""
_RESIDENT_RING: Final = 96 * 1024
"""Least bytes of the ring beside them, or a whole tile. On an H200 sharing is quicker where the rows leave 72 KB (K = 4096, 16
rows: 16.6 us against 19.0), and this is where they leave 120 KB (the same K, 8 rows: 16.0 against 16.3)."""
_RESIDENT_FIRST: Final = 110 * 1024
"""Bytes of the ring asked for before these rows have come."""
_AHEAD: Final = 0.25
"""Of these, bytes asked for before the rows, to each byte of the rows: what memory delivers while the L2 does. (0, 0.25 and 0.5
were alike within 1 % at K = 4096 and 8 rows.)"""
_PIECES: Final = 4
"""In which they come (the kernel's PIECES)."""
_REGISTER_BYTES: Final = 640
"""Most bytes of a row, its residual and its sum that a thread of such a kernel holds."""
_BY_POSITION: Final = 2
_WHOLE_VECTORS: Final = (0, 1, _BY_POSITION)  # SUM_CHAINS of sums.cuh
_ROOM: Final = 12 * 1024
"""Shared memory of a multiprocessor that is left to the small kernels of the chain."""
_WITH_HEADS: Final = 64
"""Most rows whose heads the same launch finishes. It does so where the CTAs of the next such launch fit beside its own: on an H200
one launch then takes 4.8 us where two take 5.9 (K = 1024, N = 4096, 16 rows), but 18.2 against 16.5 where they do not (K = 4096,
N = 6144)."""
_HEADS_WIDTHS: Final = (64, 128)
"""Widths of its tiles: halves of heads, for clusters of two. Of these 66 run at once on an H200, but of four 30 and of eight 15,
less than a tile for each multiprocessor would need."""


@dataclass(frozen=True)
class Rows:
    """What is normalised: recipe, number and length of rows, types, and the strides of x, residual and its sum in elements."""

    recipe: Recipe
    count: int
    columns: int
    residual_sum: str | None
    weight_float32: bool
    residual_float32: bool
    strides: tuple[int, int, int]

    @property
    def z_bytes(self) -> int:
        """Of an element that is normalised, in shared memory."""
        return 4 if self.residual_sum in ("stored rounded", "float32") else 2


@dataclass(frozen=True)
class _Memory:
    """Shared memory of a CTA: rows of y there (the macro ROWS), k of a stage, stages in the ring, their bytes, and places."""

    resident: int
    tile_k: int
    depth: int
    stage: int
    barriers_at: int
    row_at: int
    y_at: int
    heads_at: int
    size: int


class Plan:
    """The launch for rows and a projection of fixed layouts. Raises Unsuited where the kernel cannot do it."""

    __slots__ = ("_pack", "prepared")

    def __init__(
        self, rows: Rows, problem: Problem, eps: float, device: int, *, weights_ready: bool, heads: HeadParts | None = None
    ) -> None:
        """heads: finished in the same launch; None: the projection is written."""
        p, recipe = problem, rows.recipe
        _require(rows, p)
        tile_n = _tile_width(p, _WIDTHS if heads is None else _HEADS_WIDTHS)
        tile_count = ceil_div(p.n, tile_n)
        grid = min(tile_count, p.multiprocessors)
        cluster = 0
        if heads is not None:
            if not tile_count * tile_n == p.n == heads.columns or 2 * grid > p.multiprocessors or rows.count > _WITH_HEADS:
                raise Unsuited("tiles that are not whole heads, or that leave no room for the next launch")
            cluster = cluster_size(tile_n)
            if tile_count % cluster:
                raise Unsuited(f"clusters of {cluster} for {tile_count} tiles of {tile_n} rows")
        memory = _memory(rows, p, tile_n, heads.smem(cluster, tile_n) if heads is not None else 0)
        resident, depth = memory.resident, memory.depth
        x_rows = ceil_div(rows.count, 8) * 8
        tile_bytes = rows.columns // _LINE * 128 * (tile_n + (0 if resident else x_rows))
        wanted = _STATIC_FIRST if weights_ready and not resident else _FIRST_BYTES
        some = min(depth, max(1, min(wanted, tile_bytes // 2) // memory.stage))
        if resident == 1 and weights_ready:
            some = min(depth, tile_bytes // memory.stage)
        early = max(1, some // 2) if weights_ready else 0
        if resident == 1 and weights_ready and tile_bytes <= _EARLY_TILE:
            early = some
        first, ahead = some, 0
        if resident > 1:
            ahead = min(depth, int(_AHEAD * resident * rows.columns * 2) // memory.stage)
            first = min(depth, max(1, early, ahead, _RESIDENT_FIRST // memory.stage))
        cached = 0
        if not weights_ready or tile_bytes > _LARGE_TILE:
            cached = max(1, _CACHED_BYTES // (memory.tile_k * tile_n * 2))
        kernel = _kernel(rows, resident, tile_n, memory.tile_k, cluster, heads)
        self.prepared = launch.prepare(kernel, device, grid, smem=memory.size, cluster=max(cluster, 1), programmatic=True)
        if cluster and self.prepared.clusters_at_once() * cluster < grid:
            raise Unsuited("clusters that do not all run at the same time")
        lines, pieces = memory.tile_k // _LINE, p.k // _LINE
        weight_view = ((_LINE, p.n, pieces), (p.weight_stride * 2, 128), (_LINE, tile_n, lines))
        x_view = ((_LINE, p.m, pieces), (p.k * 2, 128), (_LINE, x_rows, lines))
        if resident > 1:
            x_view = ((_LINE, p.m, pieces), (rows.strides[0] * 2, 128), (_LINE, x_rows, ceil_div(pieces, _PIECES)))
        numbers = (
            *rows.strides, float(mean_operand(recipe.norm, rows.count, rows.columns)), float(np.float32(eps)), p.m, p.n,
            tile_count, depth, p.pairs, early, early + cached, first, ahead, memory.barriers_at, memory.row_at, memory.y_at,
        )  # fmt: skip

        def pack(pointers: tuple[int, ...]) -> bytes:
            x, residual, norm_weight, normalised, total, ready, weight, out = pointers[:8]
            maps = _driver.tensor_map(weight, *weight_view)
            maps += bytes(128) if resident == 1 else _driver.tensor_map(x if resident else normalised, *x_view)
            packed = _ARGUMENTS.pack(x, residual, norm_weight, normalised, total, ready, out, *numbers) + maps
            return packed + heads.pack(pointers[8:], memory.heads_at) if heads is not None else packed

        self._pack: Callable[[tuple[int, ...]], bytes] = pack

    def launches(self, pointers: tuple[int, ...]) -> list[tuple[Any, bytes]]:
        """What to launch. pointers: x, residual, the norm's weight, normalised [M, K], total, two zeroed words, weight, out; with
        heads then q, k, v, cos, sin, their norms' weights and slots."""
        return [(self.prepared, self._pack(pointers))]


def _memory(rows: Rows, p: Problem, tile_n: int, heads: int) -> _Memory:
    """All rows in every CTA where the ring keeps room enough beside them; otherwise one row, or rows that are shared."""
    if _suits_warps(rows):
        found = _divided(rows, p, tile_n, heads, ceil_div(rows.count, 8) * 8)
        whole = rows.columns // _LINE * 128 * tile_n
        if found is not None and found.depth >= 3 and found.depth * found.stage >= min(_RESIDENT_RING, whole):
            return found
    found = _divided(rows, p, tile_n, heads, int(rows.count == 1))
    if found is None:
        raise Unsuited("the shared memory does not hold two stages")
    return found


def _divided(rows: Rows, p: Problem, tile_n: int, heads: int, resident: int) -> _Memory | None:
    """Shared memory divided for so many rows of y in it and bytes of heads; None where the ring gets no two stages."""
    pieces = rows.columns // _LINE
    x_rows = 0 if resident else ceil_div(rows.count, 8) * 8
    in_front = y_bytes = row_bytes = 0
    if resident > 1:
        length = ceil_div(pieces, _PIECES)
        in_front = ceil_div(pieces, length) * length * resident * 128
        row_bytes = rows.columns * (4 if rows.weight_float32 else 2)
    else:
        y_bytes = rows.columns * 2 + 2048 if resident else 16
        row_bytes = ceil_div(4 * scratch_floats(_sums(rows)) + rows.columns * rows.z_bytes + 16, 16) * 16
    barriers = ceil_div(16 * _MOST_DEPTH + 8 * (_PIECES + 1), 16) * 16
    room = p.shared_memory - _ROOM - in_front - row_bytes - y_bytes - barriers - heads
    line_bytes = 128 * (tile_n + x_rows)
    # a long stage costs less, as long as four of them fit
    stages = _SIXTEEN_STAGES if resident > 8 else _STAGES
    tile_k = next((k for k, least in stages if room // (k // _LINE * line_bytes) >= least), _LINE)
    stage = line_bytes * tile_k // _LINE
    depth = min(room // stage, _MOST_DEPTH)
    if depth < 2:
        return None
    # products read 64 rows of y: behind those that are there lies the ring, or in its last stage what follows it
    behind = 0 if resident else max(0, 64 * 128 - x_rows * 128 - tile_k * 2 * tile_n)
    barriers_at = in_front + depth * stage
    row_at = barriers_at + barriers
    y_at = 0 if resident > 1 else row_at + row_bytes
    heads_at = row_at + row_bytes + y_bytes
    size = max(heads_at + heads, barriers_at + behind)
    return _Memory(resident, tile_k, depth, stage, barriers_at, row_at, y_at, heads_at, size)


def _suits_warps(rows: Rows) -> bool:
    """Whether each row can be summed by one warp that holds it in registers (SumByWarp of kernels/sums.cuh)."""
    if not 1 < rows.count <= _RESIDENT_ROWS or rows.strides[0] <= 0:
        return False
    sums = _sums(rows)
    threads, vector, chains = sums["SUM_THREADS"], sums["SUM_VECTOR"], sums["SUM_CHAINS"]
    whole = vector >= 4 and chains in _WHOLE_VECTORS and not sums["SUM_EDGES"]
    return whole and (threads % 32 == 0 or rows.columns <= threads * vector) and _held(rows) <= _REGISTER_BYTES


def _held(rows: Rows) -> int:
    """Bytes of a row, its residual and its sum that a thread of the one warp holds."""
    sums = _sums(rows)
    held = rows.columns // 32 * (rows.z_bytes + (0 if rows.residual_sum is None else 4 if rows.residual_float32 else 2))
    return held + ceil_div(sums["SUM_THREADS"], 32) * (16 if sums["SUM_CHAINS"] == _BY_POSITION else 4)


def _require(rows: Rows, p: Problem) -> None:
    reasons = {
        "it needs Hopper": p.capability != 90,
        "more than 64 rows": rows.count > MOST_ROWS,
        "K is no multiple of 64": rows.columns % _LINE != 0,
        "slices of K": p.slices != 1,
        "float32 in or out": p.float32_x or p.out_float32 or not rows.recipe.norm.round_weighted,
        "strides or alignment of the weight": not p.maps,
        "strides or alignment of the rows": any(stride % 8 for stride in rows.strides),
    }
    for reason, holds in reasons.items():
        if holds:
            raise Unsuited(reason)


def _tile_width(p: Problem, widths: tuple[int, ...]) -> int:
    """The width that gives every multiprocessor the same share, as for linear_sm90."""
    return min(widths, key=lambda width: (tiles.cycles(p, tiles.WarpgroupConfiguration(1, width, tile_k=256)), -width))


def _sums(rows: Rows) -> dict[str, int]:
    return order_defines(order_of(rows.recipe.norm, rows.residual_sum), rows.count, rows.columns)


def _kernel(rows: Rows, resident: int, tile_n: int, tile_k: int, cluster: int, heads: HeadParts | None) -> Kernel:
    norm = rows.recipe.norm
    defines: dict[str, int | str] = {"COLUMNS": rows.columns, **_sums(rows), **point_defines(norm)}
    defines |= {"X_FLOAT32": 0, "RESIDUAL": RESIDUAL[rows.residual_sum], "RESIDUAL_FLOAT32": int(rows.residual_float32)}
    x_rows = 0 if resident else ceil_div(rows.count, 8) * 8
    defines |= {"WEIGHT_FLOAT32": int(rows.weight_float32), "GROUP": _GROUP, "ROWS": resident}
    defines |= {"TILE_N": tile_n, "TILE_K": tile_k, "X_ROWS": x_rows, "CLUSTER": cluster}
    defines |= heads.defines if heads is not None else {}
    order = f"{order_of(norm, rows.residual_sum)} {defines['SUM_THREADS']}"
    points = point_names(norm)
    points += [f"residual {'float32 ' if rows.residual_float32 else ''}{rows.residual_sum}"] if rows.residual_sum else []
    points += ["float32 w"] if rows.weight_float32 else []
    points += [f"{heads.words} by {cluster}"] if heads is not None else []
    many = "one row" if resident == 1 else f"{resident} rows in each CTA" if resident else f"{x_rows} rows"
    name = f"rms_norm_linear_sm90 {order}, K {rows.columns}, {', '.join(points) or 'plain'}, {many}, {tile_n} k{tile_k}"
    source, entry = "rms_norm_linear_sm90.cu", "rms_norm_linear_sm90"
    return Kernel(name, source, entry, tuple(defines.items()), _THREADS, capability=90, last=90)


def _head_parts(recipe: Recipe, count: int) -> HeadParts:
    q, k = dense((count, 32, 128), 2), dense((count, 8, 128), 2)
    weight, table = dense((128,), 2), dense((count, 128), 2)
    block = Block((q, k, k), (q, k, k), weight, weight, table, table, None, move_v=True)
    return HeadParts(block, ends(recipe, head_norm=True, rotation=True), recipe.norm, 1e-6, 0)


def _kernels() -> tuple[Kernel, ...]:
    """A choice for compile tests and tables: Qwen3's hidden sizes and widths, and every named recipe that it serves."""
    found: dict[str, Kernel] = {}

    def add(
        recipe: Recipe, count: int, columns: int, residual: bool, resident: int, tile_n: int, tile_k: int, cluster: int = 0
    ) -> None:
        rows = Rows(recipe, count, columns, recipe.residual_sum if residual else None, False, False, (1, 0, 0))
        resident = resident if resident < 2 or _suits_warps(rows) else 0
        kernel = _kernel(rows, resident, tile_n, tile_k, cluster, _head_parts(recipe, count) if cluster else None)
        found.setdefault(kernel.name, kernel)

    torch = RECIPES["torch"]
    for columns, tile_n in ((1024, 32), (2560, 48), (4096, 48), (5120, 80)):
        for count, resident in ((1, 1), (2, 8), (16, 16), (16, 0)):
            add(torch, count, columns, False, resident, tile_n, 256)
            add(torch, count, columns, False, resident, 128 if tile_n == 80 else 64, 128, cluster=2)
    for recipe in (RECIPES[name] for name in ("torch-rms-norm", "vllm-0.19", "flashinfer", "gemma", "nano-vllm")):
        for resident in (0, 16):
            add(recipe, 16, 4096, True, resident, 64, 128)
    return tuple(found.values())


KERNELS: Final = _kernels()
