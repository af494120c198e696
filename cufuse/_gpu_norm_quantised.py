"""RMSNorm of a few rows and their product with a quantised weight in one launch (sm_90 on): kernels/quantised_row_sm90.cu."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from cufuse import compiler, launch
from cufuse._gpu_head_parts import HeadParts, cluster_size
from cufuse._gpu_heads import Block, Unsuited, dense, ends
from cufuse._gpu_norm_linear import Rows
from cufuse._linear_problem import ceil_div
from cufuse._linear_quantised import MOST_SLICES, Product
from cufuse._norm_kernels import RESIDUAL, mean_operand, order_defines, order_of, point_defines, point_names, scratch_floats
from cufuse.compiler import Kernel
from cufuse.named_recipes import RECIPES
from cufuse.quantised import tiles
from cufuse.quantised.formats import FORMATS, Format

MOST_ROWS: Final = 16
_MOST_Y_BYTES: Final = 144 * 1024
"""Of more than 8 rows. On an H200 16 rows of 4096 (129 KB) in every CTA take 8 % less time (Q4_0; Q8_0 the same) than a norm, a
product and the heads one after the other, 16 of 5120 (161 KB) 2 to 20 % more."""
_MOST_THREADS: Final = 1024
_GROUPS: Final = (512, 256)
"""Threads that normalise one row. More hold less of it each."""
_ARGUMENTS: Final = struct.Struct("6P3q2f8i")
_PACK: Final = 8
_CAPABILITY: Final = 90
_BY_POSITION: Final = 2
_ONE_CHAIN: Final = (0, 1)
_WHOLE_VECTORS: Final = (*_ONE_CHAIN, _BY_POSITION)  # SUM_CHAINS of sums.cuh
_LINES_FIRST: Final = 1  # SUM_TREE
_NUMBERS: Final = {"Q4_0": 0, "Q8_0": 1, "Q4_K": 2, "Q6_K": 3}
_STAGE_PIECES: Final = {"Q4_0": 2, "Q8_0": 1, "Q4_K": 1, "Q6_K": 1}
_MOST_WARPS: Final = 24
_MOST_DEPTH: Final = 9
_BARRIER_BYTES: Final = 2048
_BEHIND_Y: Final = 64
"""Bytes behind y that may be read with its last values."""
_ROOM: Final = 12 * 1024
"""Shared memory of a multiprocessor that is left to the small kernels of a chain."""
_IN_FLIGHT: Final = 112 * 1024
"""Bytes of the weight that a multiprocessor asks for ahead. H200, one row, K = 4096, Q8_0: 84 KB 9.0 us, 112 KB 8.4, 224 KB 8.8."""
_EARLY_BYTES: Final = 28 * 1024
"""Of these, asked for while the kernel in front runs, for x waits behind them. H200, one row, 10240 columns, K = 5120, Q4_0: with
112 KB 11.6 us, with 56 KB 10.3, with 28 KB 9.7, with none 10.3."""
_WITH_HEADS: Final = 1
"""Most rows whose heads the same launch finishes. H200: 5 % less at K = 1024 and one row, nothing at 8 rows."""
_PAIR: Final = 2
_IN_CLUSTERS: Final = 10 / 11
"""Of the multiprocessors, in clusters of 4 and 8: the ends of GPCs are left over. An H200: 120 of 132."""
_MOST_FINISHED: Final = 64 * 1024
"""Bytes of the weight of a CTA whose heads the same launch finishes: while they are finished in a launch of their own, the next
block's weight is on its way. H200, one row, Q4_0: finished 2.77 us at K = 1024 and 3.79 at 2048 (a launch of their own: 3.11 and
4.38), but 5.45 and 7.3 at K = 2560 and 4096 of 6144 columns (5.27 and 6.41)."""
_LEAST_BRINGERS: Final = 8
"""Warps that fill the rings of several rows at a pace (the macro PACED), where none is refilled. H200, Q4_0: 8 rows of 4096 take
1.4 us less; with two such warps it took longer (8 rows of 1024: 0.9 us). One row: 0.1 us longer at K = 2560 and 4096."""
_HEAD_BYTES: Final = 120


@dataclass(frozen=True)
class _Deal:
    """Work and shared memory of a launch: CTAs, most tiles of one, tiles that it works on at a time, rounds, stages of a ring, CTAs
    of a cluster (0: none), threads, whether rings are filled at a pace, and places."""

    grid: int
    each: int
    tiles: int
    rounds: int
    depth: int
    cluster: int
    threads: int
    paced: bool
    y_at: int
    row_at: int
    sums_at: int
    heads_at: int
    size: int


class Plan:
    """The launch for a row and a product. Raises Unsuited where the kernel cannot do it."""

    __slots__ = ("_arguments", "prepared")

    def __init__(
        self, rows: Rows, product: Product, eps: float, device: int, *, weights_ready: bool, heads: HeadParts | None = None
    ) -> None:
        """heads: finished in the same launch; None: the projection is written."""
        capability = launch.capability(device)
        _require(rows, product, capability)
        deal = _deal_out(rows, product, launch.multiprocessors(device), compiler.shared_memory_limit(capability), heads)
        stage = _stage_bytes(product.form) * deal.tiles * product.slices
        early = min(deal.depth, max(1, _EARLY_BYTES // stage)) if weights_ready else 0
        numbers = (
            *rows.strides, float(mean_operand(rows.recipe.norm, rows.count, rows.columns)), float(np.float32(eps)), product.n,
            weights_ready, early, product.out_float32, _BARRIER_BYTES, deal.y_at, deal.row_at, deal.sums_at,
        )  # fmt: skip
        kernel = _kernel(rows, product.form, product.slices, product.slice_pieces, deal, heads)
        self.prepared = launch.prepare(kernel, device, deal.grid, smem=deal.size, cluster=max(1, deal.cluster), programmatic=True)
        if deal.cluster and self.prepared.clusters_at_once() * deal.cluster < deal.grid:
            raise Unsuited("clusters that do not all run at the same time")

        def arguments(x: int, residual: int, norm_weight: int, total: int, weight: int, out: int, *ends: int) -> bytes:
            packed = _ARGUMENTS.pack(weight, x, residual, norm_weight, total, out, *numbers)
            return packed + heads.pack(ends, deal.heads_at)[:_HEAD_BYTES] if heads is not None else packed

        self._arguments: Callable[..., bytes] = arguments

    def launches(self, *pointers: int) -> list[tuple[Any, bytes]]:
        """What to launch. pointers: x, residual, the norm's weight, the new residual, weight, out; with heads q, k, v, cos, sin,
        their norms' weights and slots."""
        return [(self.prepared, self._arguments(*pointers))]


def _require(rows: Rows, p: Product, capability: int) -> None:
    reasons = {
        "it needs Hopper's copies": capability < _CAPABILITY,
        "more than 16 rows": rows.count > MOST_ROWS,
        "rows that lie nowhere near": rows.count > 1 and any(stride % _PACK for stride in rows.strides),
        "an order that is not a thread's own vectors": rows.count > 1 and not _suits_threads(rows),
        "float32 between norm and product, or a padded row": not p.direct,
        "rows are no whole packs": rows.columns % _PACK != 0,
        "more slices than warps of a tile": p.slices > MOST_SLICES,
    }
    for reason, holds in reasons.items():
        if holds:
            raise Unsuited(reason)


def _stage_bytes(form: Format) -> int:
    return _STAGE_PIECES[form.name] * tiles.piece_bytes(form)


def _deal_out(rows: Rows, p: Product, multiprocessors: int, shared_memory: int, heads: HeadParts | None = None) -> _Deal:
    """A CTA for each multiprocessor at most, and as many tiles at a time as there are warps and shared memory for."""
    high = ceil_div(p.n, tiles.ROWS)
    grid = min(high, multiprocessors)
    each, cluster = ceil_div(high, grid), 0
    if heads is not None:
        if rows.count > _WITH_HEADS or heads.columns != p.n or p.out_float32:
            raise Unsuited("several rows, or columns that are not the heads'")
        each, cluster = _whole_heads(high, multiprocessors)
        grid = ceil_div(high, each * cluster) * cluster
        if each * p.pieces * tiles.piece_bytes(p.form) > _MOST_FINISHED:
            raise Unsuited("so much weight that the next launch has to ask for its own early")
    for at_once in range(max(1, min(_MOST_WARPS // p.slices, each)), 0, -1):
        rounds = ceil_div(each, at_once)
        found = _laid_out(rows, p, (grid, each, ceil_div(each, rounds), rounds), cluster, shared_memory, heads)
        if found is not None:
            return found
    raise Unsuited("shared memory, or too few warps")


def _whole_heads(high: int, multiprocessors: int) -> tuple[int, int]:
    """Tiles of a CTA and CTAs of a cluster for ``high`` tiles of whole heads, a CTA to a multiprocessor."""
    for each in range(ceil_div(high, multiprocessors), high + 1):
        cluster = cluster_size(tiles.ROWS * each)
        room = multiprocessors if cluster == _PAIR else int(multiprocessors * _IN_CLUSTERS)
        if ceil_div(high, each * cluster) * cluster <= room:
            return each, cluster
    raise Unsuited("fewer multiprocessors than a cluster has CTAs")


def _laid_out(
    rows: Rows, p: Product, work: tuple[int, int, int, int], cluster: int, shared_memory: int, heads: HeadParts | None
) -> _Deal | None:
    """Threads and shared memory: barriers, rings, y, what the norm needs, the slices' sums and the heads; None where that fails."""
    _, each, at_once, rounds = work
    warps = at_once * p.slices
    readers = _group(_sums(rows), 32 * warps) if rows.count == 1 else _readers(rows)
    threads = max(32 * warps, readers + (128 if cluster else 0))
    if threads > _MOST_THREADS:
        return None
    stage, stages = warps * _stage_bytes(p.form), ceil_div(p.slice_pieces, _STAGE_PIECES[p.form.name]) * rounds
    steps = ceil_div(rows.count, 8)
    y_bytes = (rows.count if steps == 1 else 8 * steps) * (rows.columns * 2 + 16) + _BEHIND_Y
    if steps > 1 and y_bytes > _MOST_Y_BYTES:
        return None
    row_bytes = 4 * readers + rows.columns * (4 if rows.weight_float32 else 2)
    if rows.count == 1:
        z_bytes = 0 if _in_registers(_sums(rows), rows.columns, readers) else rows.columns * rows.z_bytes
        row_bytes = ceil_div(4 * scratch_floats(_sums(rows)), 16) * 16 + z_bytes
    sums_bytes = min(rounds, 2) * warps * (64 if rows.count == 1 else 512 * steps)
    heads_bytes = heads.smem(cluster, tiles.ROWS * each) if heads is not None else 0
    left = shared_memory - _ROOM - _BARRIER_BYTES - y_bytes - row_bytes - sums_bytes - heads_bytes - 1024
    depth = min(left // stage, _MOST_DEPTH, stages, max(2, _IN_FLIGHT // stage))
    if depth < min(2, stages):
        return None
    paced = rows.count > 1 and 1 < depth == stages and (threads - readers) // 32 >= _LEAST_BRINGERS
    y_at = ceil_div(_BARRIER_BYTES + depth * stage, 128) * 128
    row_at = ceil_div(y_at + y_bytes, 16) * 16
    sums_at = ceil_div(row_at + row_bytes, 16) * 16
    heads_at = ceil_div(sums_at + sums_bytes, 16) * 16
    return _Deal(*work, depth, cluster, threads, paced, y_at, row_at, sums_at, heads_at, heads_at + heads_bytes)


def _sums(rows: Rows) -> dict[str, int]:
    return order_defines(order_of(rows.recipe.norm, rows.residual_sum), rows.count, rows.columns)


def _readers(rows: Rows) -> int:
    """Threads that normalise several rows: as many to each as its sum has, in whole warps."""
    return rows.count * ceil_div(_sums(rows)["SUM_THREADS"], 32) * 32


def _suits_threads(rows: Rows) -> bool:
    """Whether kernels/few_rows.cuh adds in the rows' order."""
    sums = _sums(rows)
    threads, vector, width = sums["SUM_THREADS"], sums["SUM_VECTOR"], sums["SUM_WIDTH"]
    whole = vector >= 4 and sums["SUM_CHAINS"] in _WHOLE_VECTORS and not sums["SUM_EDGES"]
    tree = threads == width or (width == 32 and sums["SUM_TREE"] != _LINES_FIRST)
    stepping = threads % 32 == 0 or rows.columns <= threads * vector
    return whole and tree and stepping and rows.z_bytes == 2 and _readers(rows) + 64 <= _MOST_THREADS


def _group(sums: dict[str, int], threads: int) -> int:
    """Of one row: as many as the sum has simulated threads, where each of these is one (IN_QUARTERS of kernels/one_row.cuh)."""
    one_each = sums["SUM_CHAINS"] == _BY_POSITION and sums["SUM_WIDTH"] == sums["SUM_THREADS"] == _GROUPS[0]
    return _GROUPS[0] if one_each and not sums["SUM_EDGES"] and threads > _GROUPS[0] else _GROUPS[1]


def _in_registers(sums: dict[str, int], columns: int, group: int) -> bool:
    """SUM_IN_REGISTERS of kernels/one_row.cuh, which asserts that nothing is said to be so that is not."""
    vector, step = sums["SUM_VECTOR"], sums["SUM_THREADS"] * sums["SUM_VECTOR"]
    one_chain = sums["SUM_CHAINS"] in _ONE_CHAIN
    pack = 4 if (vector == 4 if one_chain else step == 4 * group) else 8
    whole = vector >= 4 and sums["SUM_CHAINS"] in _WHOLE_VECTORS and not sums["SUM_EDGES"]
    own = step % (group * pack) == 0 or step == group // 2 * pack or columns <= step
    return whole and own and (not one_chain or pack == vector)


def _kernel(rows: Rows, form: Format, slices: int, slice_pieces: int, deal: _Deal, heads: HeadParts | None = None) -> Kernel:
    norm, sums = rows.recipe.norm, _sums(rows)
    group = _group(sums, 32 * deal.tiles * slices) if rows.count == 1 else _readers(rows) // rows.count
    defines: dict[str, int | str] = {
        "FORMAT": _NUMBERS[form.name], "SLICES": slices, "SLICE_PIECES": slice_pieces, "STAGE_PIECES": _STAGE_PIECES[form.name],
        "TILES": deal.tiles, "ROUNDS": deal.rounds, "DEPTH": deal.depth, "COLUMNS": rows.columns, "GROUP": group,
        "ROWS": rows.count, "EACH": deal.each if deal.cluster else 0, "CLUSTER": deal.cluster, "PACED": int(deal.paced),
    }  # fmt: skip
    defines |= heads.defines if heads is not None else {}
    defines |= {**sums, **point_defines(norm), "X_FLOAT32": 0, "WEIGHT_FLOAT32": int(rows.weight_float32)}
    defines |= {"Z_IN_MEMORY": int(rows.count == 1 and not _in_registers(sums, rows.columns, group))}
    defines |= {"RESIDUAL": RESIDUAL[rows.residual_sum], "RESIDUAL_FLOAT32": int(rows.residual_float32)}
    points = point_names(norm)
    points += [f"residual {'float32 ' if rows.residual_float32 else ''}{rows.residual_sum}"] if rows.residual_sum else []
    points += ["float32 w"] if rows.weight_float32 else []
    points += [f"{heads.words} by {deal.cluster} of {deal.each} tiles"] if heads is not None else []
    order = f"{order_of(norm, rows.residual_sum)} {defines['SUM_THREADS']}"
    schedule = f"{deal.tiles} tiles of {slices} slices of {slice_pieces}, {deal.rounds} rounds, {deal.depth} stages"
    schedule += " at a pace" if deal.paced else ""
    source = "quantised_row_sm90"
    name = f"{source} {form.name}, {rows.count} of {rows.columns}, {order}, {', '.join(points) or 'plain'}, {schedule}"
    return Kernel(name, f"{source}.cu", source, tuple(defines.items()), deal.threads, capability=_CAPABILITY, last=999)


def _kernels() -> tuple[Kernel, ...]:
    """A choice for compile tests and tables: Qwen3's hidden sizes and widths on an H200."""
    recipe, found = RECIPES["block-scaled"], []
    for form, count, columns, n, residual in (
        ("Q4_0", 1, 1024, 4096, False), ("Q4_0", 1, 2560, 6144, False), ("Q4_0", 1, 4096, 6144, True),
        ("Q8_0", 1, 4096, 6144, False), ("Q4_0", 1, 5120, 10240, False), ("Q8_0", 1, 5120, 10240, True),
        ("Q4_K", 1, 4096, 6144, False), ("Q6_K", 1, 4096, 6144, False), ("Q4_0", 8, 1024, 4096, False),
        ("Q4_0", 7, 1024, 4096, True), ("Q4_0", 2, 4096, 6144, False), ("Q8_0", 3, 5120, 10240, True),
        ("Q4_0", 8, 5120, 10240, True), ("Q4_K", 8, 2560, 6144, False), ("Q6_K", 8, 4096, 6144, False),
        ("Q4_0", 16, 1024, 4096, False), ("Q8_0", 9, 2560, 6144, True),
    ):  # fmt: skip
        rows = Rows(recipe, count, columns, recipe.residual_sum if residual else None, True, False, (0, 0, 0))
        product = Product(FORMATS[form], count, n, columns, MOST_SLICES, 1, columns, True, False, True)
        deal = _deal_out(rows, product, 132, compiler.shared_memory_limit(_CAPABILITY))
        found.append(_kernel(rows, product.form, product.slices, product.slice_pieces, deal))
    q, k, row = dense((1, 16, 128), 2), dense((1, 8, 128), 2), dense((128,), 2)
    block = Block((q, k, k), (q, k, k), row, row, dense((1, 128), 2), dense((1, 128), 2), None, move_v=True)
    heads = HeadParts(block, ends(recipe, head_norm=True, rotation=True), recipe.norm, 1e-6, 0)
    for form in ("Q4_0", "Q8_0"):
        rows = Rows(recipe, 1, 1024, None, False, False, (0, 0, 0))
        product = Product(FORMATS[form], 1, 4096, 1024, MOST_SLICES, 1, 1024, True, False, True)
        deal = _deal_out(rows, product, 132, compiler.shared_memory_limit(_CAPABILITY), heads)
        found.append(_kernel(rows, product.form, product.slices, product.slice_pieces, deal, heads))
    return tuple(found)


KERNELS: Final = _kernels()
