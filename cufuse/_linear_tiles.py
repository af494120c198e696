"""Many rows of x, and everything that no other kernel takes: kernels/linear_sm90.cu and kernels/linear_sm80.cu."""

import struct
from dataclasses import dataclass
from typing import Final

from cufuse import _driver
from cufuse._linear_problem import Launch, Problem, ceil_div
from cufuse.compiler import Kernel

_WIDTHS: Final = (8, 16, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 224, 256)
"""Columns of linear_sm90's tiles: where work is scarce, one of them gives every multiprocessor the same share."""
_WIDEST_OF_FEW_ROWS: Final = 128
_BUFFER_BYTES: Final = 2 * 2048
"""Of one consumer warp, for boxes on their way out."""
_MAX_DEPTH: Final = 32
_LONG_STAGE_BYTES: Final = 56 * 1024
"""A fourth of the shared memory."""
_OWN_STORES: Final = 50
"""Cycles of a column whose values the threads store themselves."""
_GROUP_ROWS: Final = 16
"""Tiles one above the other that run together: their rows of x and the weights of all columns in flight fit into the L2 cache."""

_WARPGROUP_ARGUMENTS: Final = struct.Struct("15i4xP56x")
_MMA_ARGUMENTS: Final = struct.Struct("PPPqq4i2i2i")


_View = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Of a tensor map: shape, strides and box."""


@dataclass(frozen=True)
class WarpgroupConfiguration:
    """linear_sm90's macros: warpgroups that multiply (64 rows of x each), columns of a tile, height and width of a cluster in
    tiles, whether boxes leave through staging buffers, k of a stage (slices must be whole stages)."""

    consumers: int
    tile_n: int
    cluster_m: int = 1
    cluster_n: int = 1
    box_store: bool = False
    tile_k: int = 64

    @property
    def tile_m(self) -> int:
        """Rows of a tile."""
        return 64 * self.consumers

    @property
    def deep(self) -> bool:
        """Whether a stage of an operand is one box of several lines of 64 k."""
        return self.consumers == 1

    @property
    def kernel(self) -> Kernel:
        """Its entry in the table of kernels. Shared memory is given by the plan: as much as the device has."""
        boxes = " boxes" if self.box_store else ""
        name = f"linear_sm90 {self.tile_m}x{self.tile_n} k{self.tile_k} cluster {self.cluster_m}x{self.cluster_n}{boxes}"
        defines = {
            "CONSUMERS": self.consumers, "TILE_N": self.tile_n, "TILE_K": self.tile_k, "CLUSTER_M": self.cluster_m,
            "CLUSTER_N": self.cluster_n, "BOX_STORE": int(self.box_store),
        }  # fmt: skip
        threads = 128 * (1 + self.consumers)
        return Kernel(name, "linear_sm90.cu", "linear_sm90", tuple(defines.items()), threads, capability=90, last=90)


@dataclass(frozen=True)
class MmaConfiguration:
    """linear_sm80's macros: the tile, how warps divide it, stages, 16-byte loads or single ones, parts of an x."""

    tile_m: int
    tile_n: int
    warps_m: int
    warps_n: int
    stages: int
    vector: bool
    parts: int = 1

    @property
    def kernel(self) -> Kernel:
        """Its entry in the table of kernels."""
        name = f"linear_sm80 {self.tile_m}x{self.tile_n}{'' if self.vector else ' any alignment'}"
        defines = {
            "TILE_M": self.tile_m, "TILE_N": self.tile_n, "WARPS_M": self.warps_m, "WARPS_N": self.warps_n,
            "STAGES": self.stages, "VECTOR": int(self.vector), "PARTS": self.parts,
        }  # fmt: skip
        smem = self.stages * (self.tile_m * self.parts + self.tile_n) * 128
        threads = 32 * self.warps_m * self.warps_n
        name += " float32" if self.parts > 1 else ""
        return Kernel(name, "linear_sm80.cu", "linear_sm80", tuple(defines.items()), threads, smem)


WARPGROUP: Final = tuple(
    [
        WarpgroupConfiguration(1, tile_n, tile_k=tile_k)
        for tile_n in _WIDTHS
        if tile_n <= _WIDEST_OF_FEW_ROWS
        for tile_k in (128, 256)
    ]
    + [
        WarpgroupConfiguration(2, tile_n, box_store=box_store)
        for tile_n in _WIDTHS
        if tile_n >= 48
        for box_store in ((False, True) if tile_n % 32 == 0 else (False,))
    ]
)
MMA: Final = (
    MmaConfiguration(128, 128, 2, 4, 3, True),
    MmaConfiguration(64, 64, 2, 2, 4, True),
    MmaConfiguration(16, 64, 1, 4, 6, True),
    MmaConfiguration(64, 64, 2, 2, 4, False),
    MmaConfiguration(64, 64, 2, 2, 3, True, 3),
    MmaConfiguration(16, 64, 1, 4, 4, True, 3),
    MmaConfiguration(64, 64, 2, 2, 3, False, 3),
)


def suits_warpgroups(problem: Problem) -> bool:
    """Whether linear_sm90 can do it: Hopper, tensor maps over both operands."""
    return problem.capability == 90 and problem.maps


def takes_warpgroups(problem: Problem, c: WarpgroupConfiguration) -> bool:
    """Whether a configuration can do it."""
    return (
        suits_warpgroups(problem)
        and (not c.deep or (problem.m <= c.tile_m and problem.k % 64 == 0))
        and (problem.slices == 1 or problem.slice_k % c.tile_k == 0)
        and (boxes_allowed(problem, c.tile_n) or not c.box_store)
    )


def choose_warpgroups(problem: Problem) -> WarpgroupConfiguration:
    """The tile that takes the fewest cycles by a simple count."""
    if problem.m <= 64 and problem.slices == 1 and problem.k % 64 == 0:
        # longer stages cost less each, as long as four of them fit
        fitting = [c for c in WARPGROUP if c.deep and (c.tile_k == 256) == (_stage_bytes(problem, c.tile_n) <= _LONG_STAGE_BYTES)]
    else:
        fitting = [c for c in WARPGROUP if c.consumers == 2 and c.box_store == boxes_allowed(problem, c.tile_n)]
    return min(fitting, key=lambda c: (cycles(problem, c), -c.tile_n))


def _stage_bytes(problem: Problem, tile_n: int) -> int:
    """Of 256 k, for few rows."""
    return (ceil_div(problem.m, 8) * 8 + tile_n) * 512


def cycles(problem: Problem, c: WarpgroupConfiguration) -> int:
    """What a tile costs, for the choice between tiles."""
    _, _, rounds = _rounds(problem, c)
    x_rows = _x_rows(problem, c)
    # 64 k of a tile: the products, or what the L2 cache delivers (some 40 bytes a cycle); then the way out, of threads' own
    # values (on an H200 48 columns take less than 64 in boxes at 128 x 6144 x 2560, more at 128 x 4096 x 1024) or in boxes
    fetched = (x_rows // c.cluster_n + c.tile_n // c.cluster_m) * 128
    stage = max(2 * c.tile_n * c.consumers, fetched // 40)
    column = 8 if c.box_store or c.deep else _OWN_STORES
    return rounds * (ceil_div(min(problem.k, problem.slice_k), 64) * stage + column * c.tile_n + 1000)


def _rounds(problem: Problem, c: WarpgroupConfiguration) -> tuple[int, int, int]:
    """Tiles one above the other and side by side; how many clusters a multiprocessor's share works through."""
    high, wide = ceil_div(problem.m, c.tile_m), ceil_div(problem.n, c.tile_n)
    pieces = ceil_div(high, c.cluster_m) * ceil_div(wide, c.cluster_n) * problem.slices
    return high, wide, ceil_div(pieces, problem.multiprocessors // (c.cluster_m * c.cluster_n))


def _x_rows(problem: Problem, c: WarpgroupConfiguration) -> int:
    unit = 8 if c.deep else 8 * c.cluster_n
    return min(c.tile_m, ceil_div(problem.m, unit) * unit)


def boxes_allowed(problem: Problem, tile_n: int) -> bool:
    """Whether outputs can leave by tensor map, one box during each stage of the next tile."""
    possible = problem.n % 8 == 0 and problem.aligned_out and problem.slices == 1 and not problem.out_float32
    return possible and tile_n % 32 == 0 and tile_n // _box_columns(tile_n) <= ceil_div(problem.k, 64)


def _box_columns(tile_n: int) -> int:
    """Of an output's box: a swizzled line, or half of one."""
    return 64 if tile_n % 64 == 0 else 32


def plan_warpgroups(problem: Problem, configuration: WarpgroupConfiguration) -> Launch:
    """The launch of linear_sm90: a persistent grid."""
    c, p = configuration, problem
    partial, columns = p.slices > 1, _box_columns(c.tile_n)
    tiles_m, tiles_n, _ = _rounds(p, c)
    cluster = c.cluster_m * c.cluster_n
    pieces = ceil_div(tiles_m, c.cluster_m) * ceil_div(tiles_n, c.cluster_n) * p.slices
    grid = min(pieces, p.multiprocessors // cluster) * cluster
    x_rows = _x_rows(p, c)
    # a ring from 0 on, then staging buffers, then two barriers a stage
    stage = c.tile_k * 2 * (x_rows + c.tile_n)
    buffers = 4 * c.consumers * _BUFFER_BYTES if c.box_store else 0
    # where x has fewer rows than a tile, products read as far behind them as a tile's line would reach
    behind = max(0, c.tile_m * 128 - x_rows * 128 - c.tile_k * 2 * c.tile_n)
    depth = min((p.shared_memory - buffers - behind - 16 * _MAX_DEPTH) // stage, _MAX_DEPTH)
    buffers_at, barriers_at = depth * stage, depth * stage + buffers
    size = max(barriers_at + 16 * depth, depth * stage + behind)
    numbers = (
        p.m, p.n, p.k, p.slice_k, tiles_m, tiles_n, p.slices, max(1, _GROUP_ROWS * 128 // (c.tile_m * c.cluster_m)), x_rows, depth,
        p.out_float32 or partial, p.pairs, p.weights_ready, buffers_at, barriers_at,
    )  # fmt: skip
    x_view: _View
    weight_view: _View
    if c.deep:
        pieces_of_k, lines = p.k // 64, c.tile_k // 64
        x_view = ((64, p.m, pieces_of_k), (p.x_stride * 2, 128), (64, x_rows, lines // c.cluster_n))
        weight_view = ((64, p.n, pieces_of_k), (p.weight_stride * 2, 128), (64, c.tile_n, lines))
    else:
        x_view = ((p.k, p.m), (p.x_stride * 2,), (64, x_rows // c.cluster_n))
        weight_view = ((p.k, p.n), (p.weight_stride * 2,), (64, c.tile_n // c.cluster_m))
    last_x_view, last_weight_view = x_view, weight_view
    if not c.deep:
        # boxes of the rows that the last tiles have, but where a cluster shares them
        if c.cluster_n == 1 and p.m % c.tile_m:
            last_x_view = (*x_view[:2], (64, p.m % c.tile_m))
        if c.cluster_m == 1 and p.n % c.tile_n:
            last_weight_view = (*weight_view[:2], (64, p.n % c.tile_n))

    def arguments(x: int, weight: int, out: int) -> bytes:
        x_map, weight_map = _driver.tensor_map(x, *x_view), _driver.tensor_map(weight, *weight_view)
        return (
            _WARPGROUP_ARGUMENTS.pack(*numbers, out)
            + x_map
            + weight_map
            + (_driver.tensor_map(out, (p.n, p.m), (p.n * 2,), (columns, 16)) if c.box_store else bytes(128))
            + (x_map if last_x_view == x_view else _driver.tensor_map(x, *last_x_view))
            + (weight_map if last_weight_view == weight_view else _driver.tensor_map(weight, *last_weight_view))
        )

    return Launch(
        c.kernel, (grid, 1, 1), arguments, smem=size, cluster=cluster, partial_sums=partial, programmatic=p.programmatic
    )


def choose_mma(problem: Problem) -> MmaConfiguration:
    """The largest tile of which there are enough, with the loads that alignment allows."""
    fitting = [c for c in MMA if c.vector == problem.vectors and (c.parts > 1) == problem.float32_x]
    for c in fitting:
        tiles = ceil_div(problem.m, c.tile_m) * ceil_div(problem.n, c.tile_n) * problem.slices
        if problem.m > c.tile_m // 2 and tiles >= problem.multiprocessors:
            return c
    return fitting[-1]


def plan_mma(problem: Problem, configuration: MmaConfiguration) -> Launch:
    """The launch of linear_sm80: a CTA a tile and slice. With parts, x is what split_float32 writes."""
    c, p = configuration, problem
    partial = p.slices > 1
    tiles_m, tiles_n = ceil_div(p.m, c.tile_m), ceil_div(p.n, c.tile_n)
    x_stride = parts_row(p.k) if c.parts > 1 else p.x_stride
    tail = (x_stride, p.weight_stride, p.m, p.n, p.k, p.slice_k, tiles_m, tiles_n, p.out_float32 or partial, p.pairs)

    def arguments(x: int, weight: int, out: int) -> bytes:
        return _MMA_ARGUMENTS.pack(x, weight, out, *tail)

    return Launch(c.kernel, (tiles_m * tiles_n, p.slices, 1), arguments, partial_sums=partial)


def parts_row(k: int) -> int:
    """bfloat16 values that a row of K float32 becomes."""
    return ceil_div(k, 16) * 48
