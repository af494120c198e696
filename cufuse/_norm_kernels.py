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
_WARP_COLUMNS: Final = 2048
"""Longest row that one warp normalises alone: beyond, its few loads under way cost more than a block's barriers."""
_ROOMY_SMEM: Final = 1 << 16


class Types(NamedTuple):
    """Which arrays are float32 (bfloat16 otherwise)."""

    x: bool = False
    residual: bool = False
    weight: bool = False
    out: bool = False


class Configuration(NamedTuple):
    """A kernel, the rows that one of its blocks normalises, its dynamic shared memory, and what the mean is formed with."""

    kernel: Kernel
    rows_per_block: int
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
) -> Configuration:
    """The kernel for [rows, columns].

    chunk : elements of a global access that all pointers and strides allow. residual_sum : the recipe's, None without a
    residual. multiprocessors : of the device; few rows are spread over more threads. direct : None chooses the schedule, True
    and False demand one (for measurements; True only where the row fits the registers).
    Raises ValueError for orders and sizes that no kernel has.
    """
    order = order_of(norm, residual_sum)
    sums = order_defines(order, rows, columns)
    wide = types.x if residual_sum is None else residual_sum != "rounded"
    possible = _fits_registers(sums, columns, chunk, wide)
    if direct is None:
        direct = possible and (sums["SUM_THREADS"] > 64 or columns <= _WARP_COLUMNS)
    elif direct and not possible:
        raise ValueError(f"a thread cannot hold its part of {columns} columns in registers (order {order!r}, chunk {chunk})")
    smem = 4 * scratch_floats(sums)
    if direct:
        chunk, group = sums["SUM_VECTOR"], -(-sums["SUM_THREADS"] // 32) * 32
        rows_per_block = 1 if group > 32 else 8 if columns <= 512 else 4
        smem = smem if group > 32 else 0
    else:
        smem += -(-columns * (4 if wide else 2) // 16) * 16
        few = rows <= multiprocessors or smem > _ROOMY_SMEM
        group, rows_per_block = min(512 if few else 256, -(-columns // chunk // 32) * 32 or 32), 1
    defines: dict[str, int | str] = {"COLUMNS": columns, **sums}
    defines |= {"GROUP": group, "ROWS": rows_per_block, "CHUNK": chunk, "DIRECT": int(direct)}
    defines |= point_defines(norm)
    defines |= {"X_FLOAT32": int(types.x), "RESIDUAL": RESIDUAL[residual_sum], "RESIDUAL_FLOAT32": int(types.residual)}
    defines |= {"WEIGHT_FLOAT32": int(types.weight), "OUT_FLOAT32": int(types.out)}
    name = _name(order, point_names(norm), defines)
    kernel = Kernel(name, "rms_norm.cu", "rms_norm", tuple(defines.items()), group * rows_per_block, smem)
    return Configuration(kernel, rows_per_block, mean_operand(norm, rows, columns))


def _fits_registers(sums: dict[str, int], columns: int, chunk: int, wide: bool) -> bool:
    """Whether the schedule DIRECT 1 exists: each thread is a simulated one and keeps its vectors in registers."""
    threads, vector = sums["SUM_THREADS"], sums["SUM_VECTOR"]
    whole = columns % vector == 0 and not sums["SUM_EDGES"]
    chains = sums["SUM_CHAINS"] in (_CHAIN_ONE, _CHAIN_PAIRS, _CHAIN_BY_POSITION)
    # physical threads are whole warps: where the simulated ones are not, they may not take a second vector
    stepping = threads % 32 == 0 or columns <= threads * vector
    group = -(-threads // 32) * 32
    held = -(-columns // (vector * group)) * vector * (4 if wide else 2)
    small = held <= min(_REGISTER_BYTES, _BLOCK_BYTES // group)
    return whole and chains and stepping and 4 <= vector <= chunk and small


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
    schedule = f"{defines['GROUP']}x{defines['ROWS']} {'registers' if defines['DIRECT'] else 'shared'} by {defines['CHUNK']}"
    return (
        f"rms_norm {order} {defines['SUM_THREADS']}, K {defines['COLUMNS']}, {x}{added}, {weight} w -> {out}, "
        f"{', '.join(points) or 'plain'}, {schedule}"
    )
