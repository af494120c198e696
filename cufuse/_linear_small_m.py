"""Few rows of x: kernels/linear_small_m.cu, its configurations and how work is dealt out to the multiprocessors."""

import struct
from dataclasses import dataclass
from typing import Final

from cufuse import _driver
from cufuse._linear_problem import Launch, Problem, ceil_div
from cufuse.compiler import Kernel

MOST_ROWS: Final = 64
"""Most rows of x."""

_LAST_WITH_MULTICAST: Final = 119
"""sm_120 has no copy to several CTAs of a cluster."""
_MAX_THREADS: Final = 384
_MAX_DEPTH: Final = 16
_MAX_X_DEPTH: Final = 6
_GOOD_DEPTH: Final = 3
"""Stages that a warp's ring should have at least."""
_BARRIER_BYTES: Final = 2048
_X_BUDGET: Final = 98304
"""Shared memory that x may take; the rings of the weight want the rest."""

_ARGUMENTS: Final = struct.Struct("15i4xPPPqq24x")


@dataclass(frozen=True)
class Configuration:
    """The kernel's macros: columns of the tensor core's N, rows of the weight a tile, k of a stage, whether x is resident,
    whether the weight comes by boxes (or by rows), CTAs of a cluster."""

    tokens: int
    rows: int
    stage_k: int
    resident: bool
    boxes: bool = True
    cluster: int = 1

    @property
    def kernel(self) -> Kernel:
        """Its entry in the table of kernels. Shared memory is given by the plan: as much as the device has."""
        where = "resident" if self.resident else f"streamed by {self.cluster}"
        name = f"linear_small_m {self.tokens}x{self.rows} k{self.stage_k} {where}{'' if self.boxes else ' by rows'}"
        defines = {
            "TOKENS": self.tokens, "ROWS": self.rows, "STAGE_K": self.stage_k, "RESIDENT": int(self.resident),
            "TENSOR_COPY": int(self.boxes), "CLUSTER": self.cluster, "MAX_THREADS": _MAX_THREADS,
        }  # fmt: skip
        last = 999 if self.cluster == 1 else _LAST_WITH_MULTICAST
        return Kernel(name, "linear_small_m.cu", "linear_small_m", tuple(defines.items()), _MAX_THREADS, capability=90, last=last)

    @property
    def stage_bytes(self) -> int:
        """Of a warp's ring."""
        return self.rows * (self.stage_k * 2 + (0 if self.boxes else 16))

    @property
    def x_stage_bytes(self) -> int:
        """Of the ring of x, for one slice."""
        return self.tokens * self.stage_k * 2


CONFIGURATIONS: Final = tuple(
    [Configuration(8, rows, 256, True) for rows in (16, 8)]
    + [Configuration(tokens, rows, 256, False) for tokens in (8, 16) for rows in (16, 8)]
    + [
        Configuration(tokens, rows, stage_k, False, cluster=cluster)
        for tokens in (32, 64)
        for stage_k in (256, 128)
        for cluster in (1, 2)
        for rows in (16, 8)
    ]
)
"""What ``choose`` picks from."""


def suits(problem: Problem) -> bool:
    """Whether the kernel can do it at all: few rows, whole lines of 64 k, 16-byte copies, a copy engine."""
    return problem.m <= MOST_ROWS and problem.capability >= 90 and problem.k % 64 == 0 and problem.maps


def beats_warpgroups(problem: Problem) -> bool:
    """Whether it is quicker than linear_sm90 where both suit: it adds slices without another launch. With one slice it is not,
    for any of 1 to 64 rows (H200, tests/gpu_bench_linear.py)."""
    return problem.slices > 1


def choose(problem: Problem) -> Configuration:
    """The configuration for a problem that suits."""
    tokens = next(t for t in (8, 16, 32, 64) if t >= problem.m)
    resident = tokens == 8 and _resident_bytes(problem) <= _X_BUDGET
    # sixteen rows use the tensor core better, eight give every multiprocessor a tile where there are few
    rows = 16 if ceil_div(problem.n, 16) >= problem.multiprocessors else 8
    # slices at once multiply the shared memory that x takes
    stage_k = 128 if tokens >= 32 and _slices_at_once(problem) > 1 else 256
    cluster = 2 if tokens >= 32 and problem.capability <= _LAST_WITH_MULTICAST else 1
    return Configuration(tokens, rows, stage_k, resident, cluster=cluster)


def plan(problem: Problem, configuration: Configuration) -> Launch | None:
    """The launch, or None where the shared memory does not hold two stages a warp."""
    work = _deal(problem, configuration)
    memory = _lay_out(problem, configuration, work)
    if memory is None:
        return None
    c, p = configuration, problem
    pieces = c.stage_k // 64
    weight_shape, weight_strides = (64, p.n, p.k // 64), (p.weight_stride * 2, 128)
    x_shape, x_strides = (64, p.m, p.k // 64), (p.x_stride * 2, 128)

    numbers = (
        p.m, p.n, p.k, p.slice_k, work.slice_warps, work.warps, work.rounds, memory.depth, memory.x_depth, memory.rings_at,
        memory.x_at, _BARRIER_BYTES, p.out_float32, p.pairs, p.weights_ready,
    )  # fmt: skip

    def arguments(x: int, weight: int, out: int) -> bytes:
        no_map = bytes(128)
        weight_map = _driver.tensor_map(weight, weight_shape, weight_strides, (64, c.rows, pieces)) if c.boxes else no_map
        x_map = no_map if c.resident else _driver.tensor_map(x, x_shape, x_strides, (64, c.tokens, pieces // c.cluster))
        return _ARGUMENTS.pack(*numbers, x, weight, out, p.x_stride, p.weight_stride) + weight_map + x_map

    threads = 32 * (work.warps + (0 if c.resident else 1))
    return Launch(c.kernel, (work.grid, 1, 1), arguments, threads, memory.size, c.cluster, programmatic=p.programmatic)


@dataclass(frozen=True)
class _Work:
    warps: int
    slice_warps: int
    rounds: int
    grid: int


def _slices_at_once(problem: Problem) -> int:
    """Slices of a tile that run in warps of their own: all where tiles are few, else a warp walks all of them."""
    tiles = ceil_div(ceil_div(problem.n, 16), problem.multiprocessors)
    return problem.slices if problem.slices > 1 and tiles * problem.slices <= 8 else 1


def _deal(problem: Problem, configuration: Configuration) -> _Work:
    """Tiles to warps: as many CTAs as multiprocessors at most, every warp the same number of tiles but for the end."""
    c = configuration
    at_once = _slices_at_once(problem)
    tiles = ceil_div(problem.n, c.rows)
    blocks = problem.multiprocessors // c.cluster * c.cluster
    # no more warps than have rings of some depth
    room = problem.shared_memory - _BARRIER_BYTES - 2048 - _x_bytes(problem, c, at_once)
    warps = min(_MAX_THREADS // 32 - (0 if c.resident else 1), max(room // (_GOOD_DEPTH * c.stage_bytes), 1))
    each = ceil_div(tiles, blocks)
    rounds = ceil_div(each, max(warps // at_once, 1))
    groups = ceil_div(each, rounds)
    grid = ceil_div(ceil_div(tiles, groups * rounds), c.cluster) * c.cluster
    return _Work(groups * at_once, at_once, rounds, grid)


def _x_depth(problem: Problem, configuration: Configuration, slice_warps: int) -> int:
    """Stages of x's ring: no more than there are in one round."""
    stages = ceil_div(problem.slice_k if slice_warps > 1 else problem.k, configuration.stage_k)
    return min(max(_X_BUDGET // (configuration.x_stage_bytes * slice_warps), 2), _MAX_X_DEPTH, stages)


def _x_bytes(problem: Problem, configuration: Configuration, slice_warps: int) -> int:
    if configuration.resident:
        return _resident_bytes(problem)
    return _x_depth(problem, configuration, slice_warps) * slice_warps * configuration.x_stage_bytes


@dataclass(frozen=True)
class _Memory:
    depth: int
    x_depth: int
    rings_at: int
    x_at: int
    size: int


def _lay_out(problem: Problem, configuration: Configuration, work: _Work) -> _Memory | None:
    """Barriers, sums of slices, rings (from multiples of 1024 bytes on), x."""
    c = configuration
    sums = work.warps * c.tokens * 64 if work.slice_warps > 1 else 0
    rings_at = ceil_div(_BARRIER_BYTES + sums, 1024) * 1024
    length = problem.slice_k if work.slice_warps > 1 else problem.k
    stages = ceil_div(length, c.stage_k) * work.rounds
    x_depth = 1 if c.resident else _x_depth(problem, c, work.slice_warps)
    x_bytes = _x_bytes(problem, c, work.slice_warps)
    left = problem.shared_memory - rings_at - x_bytes - 1024
    depth = min(left // (work.warps * c.stage_bytes), _MAX_DEPTH, stages)
    if depth < min(2, stages):
        return None
    x_at = ceil_div(rings_at + work.warps * depth * c.stage_bytes, 1024) * 1024
    return _Memory(depth, x_depth, rings_at, x_at, x_at + x_bytes)


def _resident_bytes(problem: Problem) -> int:
    return problem.m * (problem.k * 2 + 16)
