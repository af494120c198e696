"""From a norm of a recipe and the sizes of a call to one configuration of kernels/rms_norm.cu: macros, block, shared memory.

Nothing here needs a GPU; ``_gpu_norm`` adds devices, arrays and launches.
"""

from typing import Final, NamedTuple

import numpy as np

from cufuse.compiler import Kernel
from cufuse.emulation.sums import torch_mean_factor
from cufuse.emulation.sums_kernel import sum_defines
from cufuse.recipe import Norm

_CHAIN_ONE, _CHAIN_PAIRS, _CHAIN_BY_POSITION, _, _CHAIN_MOMENTS = range(5)  # sums.cuh
RESIDUAL: Final = {None: 0, "rounded": 1, "stored rounded": 2, "float32": 3}
"""The macro of kernels/residual.cuh for a recipe's residual sum."""
_REGISTER_BYTES: Final = 320
"""Most bytes of a row that a thread of the schedule DIRECT 1 holds (rms_norm.cu asserts it)."""
_BLOCK_BYTES: Final = 100_000
"""Most bytes of rows in all threads of a block: 40 % of the registers, beyond which some are spilled."""
_WARP_COLUMNS: Final = 1024
"""Longest row that one warp normalises alone: beyond, a block is quicker (H200, K = 2048: 1.5 against 3.9 us at 64 rows, 5.6
against 7.2 at 2048)."""
_LIGHT_COLUMNS: Final = 8192
"""Longest row of bfloat16 for which 32 registers suffice to each thread of the schedule DIRECT 0."""
_ROOMY_SMEM: Final = 1 << 16
_MANY_ROWS: Final = 8
"""Of bfloat16 for each multiprocessor, from which they go through shared memory where 256 or 512 threads take two whole packs each
(H200, `torch-rms-norm`, against registers: 2048 x 4096 10.2 us and 10.9, 4096 x 8192 36.9 and 39.0; `torch` 39.6 and 43.6;
``python3 -m tests.gpu_bench_norm`` times the choice)."""


class Types(NamedTuple):
    """Which arrays are float32 (bfloat16 otherwise)."""

    x: bool = False
    residual: bool = False
    weight: bool = False
    out: bool = False


class Configuration(NamedTuple):
    """A kernel, the blocks of its grid, and what the mean is formed with."""

    kernel: Kernel
    blocks: int
    mean_operand: np.float32


def configuration(
    norm: Norm,
    rows: int,
    columns: int,
    chunk: int,
    types: Types,
    residual_sum: str | None = None,
    multiprocessors: int = 132,
    direct: bool | None = None,
    group: int | None = None,
) -> Configuration:
    """The kernel for [rows, columns].

    chunk : elements of a global access that all pointers and strides allow. residual_sum : the recipe's, None without a
    residual. multiprocessors : of the device; few rows are spread over more threads.
    direct, group : None choose the schedule; for measurements they demand one: whether registers hold the row (which it has to
    fit), and the threads of a row that goes through shared memory.
    Raises ValueError for orders and sizes that no kernel has.
    """
    order = order_of(norm, residual_sum)
    sums = order_defines(order, rows, columns)
    wide = types.x if residual_sum is None else residual_sum != "rounded"
    few = rows <= multiprocessors
    plain = not any(types) and residual_sum is None
    if direct is None:
        direct = _schedule(sums, columns, chunk, wide)
        if direct and group is None and plain and chunk == 8 and rows >= _MANY_ROWS * multiprocessors and columns in (4096, 8192):
            direct, group = False, columns // 16
    elif direct and not _fits_registers(sums, columns, chunk, wide):
        raise ValueError(f"a thread cannot hold its part of {columns} columns in registers (order {order!r}, chunk {chunk})")
    smem, resident = 4 * scratch_floats(sums), 1
    if direct:
        chunk, group = sums["SUM_VECTOR"], _group(sums)
        rows_per_block = 1 if group > 32 else 8 if columns <= 512 else 4
        smem = smem if group > 32 else 0
    else:
        smem += -(-columns * (4 if wide else 2) // 16) * 16
        # one row's latency is what counts: 512 threads help it where more than 64 of them sum
        most = group or (512 if smem > _ROOMY_SMEM or (few and sums["SUM_THREADS"] > 64) else 256)
        threads = -(-columns // chunk // 32) * 32 or 32
        if not few and group is None:
            threads = max(-(-columns // chunk // 64) * 32, min(threads, 128))  # two chunks each, where rows keep all threads busy
        group, rows_per_block = min(most, threads), 1
        if not few and plain and columns <= _LIGHT_COLUMNS:
            resident = 2048 // group if group >= 128 else 1
    defines: dict[str, int | str] = {"COLUMNS": columns, **sums}
    defines |= {"GROUP": group, "ROWS": rows_per_block, "CHUNK": chunk, "DIRECT": int(direct)}
    defines |= {"FEW_ROWS": int(few), "BLOCKS": resident}
    defines |= point_defines(norm)
    defines |= {"X_FLOAT32": int(types.x), "RESIDUAL": RESIDUAL[residual_sum], "RESIDUAL_FLOAT32": int(types.residual)}
    defines |= {"WEIGHT_FLOAT32": int(types.weight), "OUT_FLOAT32": int(types.out)}
    name = _name(order, point_names(norm), defines)
    kernel = Kernel(name, "rms_norm.cu", "rms_norm", tuple(defines.items()), group * rows_per_block, smem)
    return Configuration(kernel, -(-rows // rows_per_block), mean_operand(norm, rows, columns))


def _schedule(sums: dict[str, int], columns: int, chunk: int, wide: bool) -> bool:
    """Whether registers hold the row: the macro DIRECT of rms_norm.cu."""
    if columns > _WARP_COLUMNS and sums["SUM_THREADS"] <= 64:
        return False
    return _fits_registers(sums, columns, chunk, wide)


def _fits_registers(sums: dict[str, int], columns: int, chunk: int, wide: bool) -> bool:
    """Whether a schedule exists in which each thread is a simulated one and holds its part of a row."""
    threads, vector = sums["SUM_THREADS"], sums["SUM_VECTOR"]
    whole = columns % vector == 0 and not sums["SUM_EDGES"]
    chains = sums["SUM_CHAINS"] in (_CHAIN_ONE, _CHAIN_PAIRS, _CHAIN_BY_POSITION)
    # physical threads are whole warps: where the simulated ones are not, they may not take a second vector
    stepping = threads % 32 == 0 or columns <= threads * vector
    group = _group(sums)
    held = -(-columns // (vector * group)) * vector * (4 if wide else 2)
    return whole and chains and stepping and 4 <= vector <= chunk and held <= min(_REGISTER_BYTES, _BLOCK_BYTES // group)


def _group(sums: dict[str, int]) -> int:
    """Physical threads of such a row."""
    return -(-sums["SUM_THREADS"] // 32) * 32


def order_of(norm: Norm, residual_sum: str | None) -> str:
    """The order of the sum of squares."""
    after = norm.sum_order_after_residual
    return after if residual_sum is not None and after is not None else norm.sum_order


def order_defines(order: str, rows: int, columns: int) -> dict[str, int]:
    """The macros of kernels/sums.cuh, without threads that have no element: they hold +0, which changes no sum."""
    sums = sum_defines(order, rows, columns)
    if sums["SUM_CHAINS"] in (_CHAIN_ONE, _CHAIN_PAIRS):
        sums["SUM_THREADS"] = min(sums["SUM_THREADS"], -(-columns // sums["SUM_VECTOR"]))
    return sums


def point_defines(norm: Norm) -> dict[str, int | str]:
    """The macros of kernels/norm.cuh: a norm's rounding points."""
    defines: dict[str, int | str] = {
        "CONTRACT": int(norm.contract),
        "MEAN_DIVIDE": int(norm.mean == "divide"),
        "RSQRT_CORRECT": int(norm.rsqrt == "correct"),
        "ROUND_NORMALISED": int(norm.round_normalised),
    }
    if norm.weight_offset != 0:
        defines["WEIGHT_OFFSET"] = f"{float(np.float32(norm.weight_offset)).hex()}f"  # a hexadecimal literal is exact
    return defines


def point_names(norm: Norm) -> list[str]:
    """The same in words, for a kernel's name."""
    words = [
        "h rounded" if norm.round_normalised else "",
        "fma" if norm.contract else "",
        "s / K" if norm.mean == "divide" else "",
        "correct rsqrt" if norm.rsqrt == "correct" else "",
        f"w + {norm.weight_offset:g}" if norm.weight_offset != 0 else "",
    ]
    return [word for word in words if word]


def scratch_floats(sums: dict[str, int]) -> int:
    """SUM_SCRATCH of sums.cuh."""
    if sums["SUM_CHAINS"] == _CHAIN_MOMENTS:
        return 48
    if sums["SUM_CHAINS"] in (_CHAIN_ONE, _CHAIN_PAIRS):
        return 32
    return 32 + -(-sums["SUM_THREADS"] // 32) * 32


def mean_operand(norm: Norm, rows: int, columns: int) -> np.float32:
    """What the sum of squares is multiplied with or divided by."""
    if norm.mean == "factor":
        return torch_mean_factor(rows, columns)
    return np.float32(columns) if norm.mean == "divide" else np.float32(1) / np.float32(columns)


def _name(order: str, points: list[str], defines: dict[str, int | str]) -> str:
    """Unique for a configuration, and readable."""
    kinds = [("bfloat16", "float32")[int(defines[f"{array}_FLOAT32"])] for array in ("X", "RESIDUAL", "WEIGHT", "OUT")]
    x, residual, weight, out = kinds
    added = ("", f" + {residual} rounded", f" + {residual} stored rounded", f" + {residual} float32")[int(defines["RESIDUAL"])]
    where = ("shared", "registers")[int(defines["DIRECT"])]
    schedule = f"{defines['GROUP']}x{defines['ROWS']} {where} by {defines['CHUNK']}"
    schedule += ", few rows" if defines["FEW_ROWS"] else f", {defines['BLOCKS']} blocks" if int(defines["BLOCKS"]) > 1 else ""
    return (
        f"rms_norm {order} {defines['SUM_THREADS']}, K {defines['COLUMNS']}, {x}{added}, {weight} w -> {out}, "
        f"{', '.join(points) or 'plain'}, {schedule}"
    )
