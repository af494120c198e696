"""RMSNorm of a few rows and their projection in one launch, on Hopper: kernels/rms_norm_linear_sm90.cu."""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from cufuse import _driver, launch
from cufuse import _linear_tiles as tiles
from cufuse._gpu_heads import Unsuited
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
_ROOM: Final = 12 * 1024
"""Shared memory of a multiprocessor that is left to the small kernels of the chain."""


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


class Plan:
    """The launch for rows and a projection of fixed layouts. Raises Unsuited where the kernel cannot do it."""

    __slots__ = ("_pack", "prepared")

    def __init__(self, rows: Rows, problem: Problem, eps: float, device: int, *, weights_ready: bool) -> None:
        p, recipe = problem, rows.recipe
        _require(rows, p)
        local = rows.count == 1
        tile_n = _tile_width(p)
        x_rows = ceil_div(rows.count, 8) * 8
        y_bytes = rows.columns * 2 + 2048 if local else 16
        row_bytes = ceil_div(4 * scratch_floats(_sums(rows)) + rows.columns * rows.z_bytes + 16, 16) * 16
        room = p.shared_memory - _ROOM - row_bytes - y_bytes - 16 * _MOST_DEPTH
        line_bytes = 128 * (tile_n + (0 if local else x_rows))
        # a long stage costs less, as long as four of them fit
        tile_k = 256 if room // (4 * line_bytes) >= 4 else 128
        stage = line_bytes * tile_k // _LINE
        depth = min(room // stage, _MOST_DEPTH)
        if depth < 2:
            raise Unsuited("the shared memory does not hold two stages")
        first = min(depth, max(1, min(_FIRST_BYTES, rows.columns * line_bytes // _LINE // 2) // stage))
        early = max(1, first // 2) if weights_ready else 0
        # products read 64 rows of y, of which the ring has x_rows
        behind = 0 if local else max(0, 64 * 128 - x_rows * 128 - tile_k * 2 * tile_n)
        barriers_at = depth * stage
        row_at = barriers_at + 16 * depth
        y_at = row_at + row_bytes
        size = max(y_at + y_bytes, barriers_at + behind)
        tile_count = ceil_div(p.n, tile_n)
        grid = min(tile_count, p.multiprocessors)
        self.prepared = launch.prepare(_kernel(rows, tile_n, tile_k), device, grid, threads=_THREADS, smem=size, programmatic=True)
        weight_view = ((_LINE, p.n, p.k // _LINE), (p.weight_stride * 2, 128), (_LINE, tile_n, tile_k // _LINE))
        y_view = ((_LINE, p.m, p.k // _LINE), (p.k * 2, 128), (_LINE, x_rows, tile_k // _LINE))
        numbers = (
            *rows.strides, float(mean_operand(recipe.norm, rows.count, rows.columns)), float(np.float32(eps)), p.m, p.n,
            tile_count, x_rows, depth, p.pairs, early, first, 0, barriers_at, row_at, y_at,
        )  # fmt: skip

        def pack(pointers: tuple[int, ...]) -> bytes:
            x, residual, norm_weight, normalised, total, ready, weight, out = pointers
            weight_map = _driver.tensor_map(weight, *weight_view)
            y_map = bytes(128) if local else _driver.tensor_map(normalised, *y_view)
            return _ARGUMENTS.pack(x, residual, norm_weight, normalised, total, ready, out, *numbers) + weight_map + y_map

        self._pack: Callable[[tuple[int, ...]], bytes] = pack

    def launches(self, pointers: tuple[int, ...]) -> list[tuple[Any, bytes]]:
        """What to launch. pointers: x, residual, the norm's weight, normalised [M, K], total, two zeroed words, weight, out."""
        return [(self.prepared, self._pack(pointers))]


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


def _tile_width(p: Problem) -> int:
    """The width that gives every multiprocessor the same share, as for linear_sm90."""
    return min(_WIDTHS, key=lambda width: (tiles.cycles(p, tiles.WarpgroupConfiguration(1, width, tile_k=256)), -width))


def _sums(rows: Rows) -> dict[str, int]:
    return order_defines(order_of(rows.recipe.norm, rows.residual_sum), rows.count, rows.columns)


def _kernel(rows: Rows, tile_n: int, tile_k: int) -> Kernel:
    norm = rows.recipe.norm
    defines: dict[str, int | str] = {"COLUMNS": rows.columns, **_sums(rows), **point_defines(norm)}
    defines |= {"X_FLOAT32": 0, "RESIDUAL": RESIDUAL[rows.residual_sum], "RESIDUAL_FLOAT32": int(rows.residual_float32)}
    defines |= {"WEIGHT_FLOAT32": int(rows.weight_float32), "GROUP": _GROUP, "LOCAL": int(rows.count == 1)}
    defines |= {"TILE_N": tile_n, "TILE_K": tile_k}
    order = f"{order_of(norm, rows.residual_sum)} {defines['SUM_THREADS']}"
    points = point_names(norm)
    points += [f"residual {'float32 ' if rows.residual_float32 else ''}{rows.residual_sum}"] if rows.residual_sum else []
    points += ["float32 w"] if rows.weight_float32 else []
    many = "one row" if rows.count == 1 else "rows"
    name = f"rms_norm_linear_sm90 {order}, K {rows.columns}, {', '.join(points) or 'plain'}, {many}, {tile_n} k{tile_k}"
    source, entry = "rms_norm_linear_sm90.cu", "rms_norm_linear_sm90"
    return Kernel(name, source, entry, tuple(defines.items()), _THREADS, capability=90, last=90)


def _kernels() -> tuple[Kernel, ...]:
    """A choice for compile tests and tables: Qwen3's hidden sizes and widths, and every named recipe that it serves."""
    found: dict[str, Kernel] = {}

    def add(recipe: Recipe, count: int, columns: int, residual: bool, tile_n: int, tile_k: int) -> None:
        rows = Rows(recipe, count, columns, recipe.residual_sum if residual else None, False, False, (0, 0, 0))
        kernel = _kernel(rows, tile_n, tile_k)
        found.setdefault(kernel.name, kernel)

    torch = RECIPES["torch"]
    for columns, tile_n in ((1024, 32), (2560, 48), (4096, 48), (5120, 80)):
        for count in (1, 16):
            add(torch, count, columns, False, tile_n, 256)
    for recipe in (RECIPES[name] for name in ("torch-rms-norm", "vllm-0.19", "flashinfer", "gemma", "nano-vllm")):
        add(recipe, 16, 4096, True, 64, 128)
    return tuple(found.values())


KERNELS: Final = _kernels()
