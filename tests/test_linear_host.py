"""The kernels of ``linear`` on the CPU (kernels_on_host/), bit for bit against the emulation; and that this finds faults.

Threads run in random order, copies arrive and products read shared memory at random times, so that waits, phases and
reuse of memory are tested as well as indices. Not tested: the machine's own arithmetic and speed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cufuse import _gpu_linear
from cufuse._linear_small_m import Configuration as SmallM
from cufuse._linear_tiles import MMA, WarpgroupConfiguration
from cufuse.bf16 import bfloat16, nearest
from cufuse.emulation import tensor_core
from tests.host_gpu import Array
from tests.linear_on_host import COMPILER, HostGpu, demand_noticed
from tests.witnesses import demand_bits, same_bits

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is needed to run a kernel's text on the host")


@dataclass(frozen=True)
class Case:
    """A product on a machine of some multiprocessors; configuration None: as chosen."""

    m: int
    n: int
    k: int
    configuration: Any = None
    k_slices: int = 1
    multiprocessors: int = 4
    pad: int = 0
    offset: int = 0
    x_dtype: Any = bfloat16
    out_dtype: Any = bfloat16
    weights_ready: bool = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels_on_host")


@pytest.fixture
def gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostGpu]:
    machine = HostGpu(folder)
    machine.install(monkeypatch)
    return machine


def aligned(shape: tuple[int, int], dtype: Any, pad: int = 0, offset: int = 0) -> np.ndarray:
    """An array that begins ``offset`` bytes behind a multiple of 16, its rows ``pad`` elements further apart than they are long."""
    itemsize = np.dtype(dtype).itemsize
    size = shape[0] * (shape[1] + pad) * itemsize
    raw = np.full(size + 64, 0xA5, np.uint8)
    begin = -raw.ctypes.data % 16 + offset
    return raw[begin : begin + size].view(dtype).reshape(shape[0], shape[1] + pad)[:, : shape[1]]


def run(gpu: HostGpu, case: Case, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """What the kernels give, and what the emulation says."""
    rng = np.random.default_rng(seed)
    x, weight = aligned((case.m, case.k), case.x_dtype, case.pad, case.offset), aligned((case.n, case.k), bfloat16)
    x[...] = rng.standard_normal(x.shape).astype(case.x_dtype)
    weight[...] = rng.standard_normal(weight.shape).astype(bfloat16)
    out = aligned((case.m, case.n), case.out_dtype)
    gpu.multiprocessors, gpu.seed = case.multiprocessors, seed
    _gpu_linear.linear(
        Array(x), Array(weight), Array(out), case.k_slices, configuration=case.configuration, weights_ready=case.weights_ready
    )
    dense = np.ascontiguousarray(x)
    operand = dense if case.x_dtype == bfloat16 else tensor_core.split_float32(dense)
    expected = tensor_core.matmul(operand, weight, k_slices=case.k_slices)
    return out, expected if case.out_dtype == np.float32 else nearest(expected)


SMALL = SmallM(8, 16, 256, True)
WEIGHTS_ONCE = [
    Case(1, 100, 256, SMALL),
    Case(8, 333, 320, SMALL, multiprocessors=3, pad=8),
    Case(5, 1000, 512, k_slices=2, multiprocessors=2, out_dtype=np.float32),  # a warp walks both slices
    Case(3, 60, 576, k_slices=3),  # slices in warps of their own
    Case(4, 130, 512, SMALL, weights_ready=True, multiprocessors=3),
    Case(2, 80, 640, SmallM(8, 16, 256, True, boxes=False)),
    Case(30, 300, 3072, SmallM(32, 16, 256, False, cluster=2), multiprocessors=2),  # x's ring comes round, in a cluster
    Case(64, 400, 1216, SmallM(64, 16, 256, False, cluster=4)),
    Case(13, 300, 576, SmallM(16, 8, 256, False), k_slices=3, multiprocessors=2),
]
WARPGROUPS = [
    Case(5, 333, 1088, WarpgroupConfiguration(1, 24, tile_k=256), multiprocessors=3),
    Case(20, 333, 4160, WarpgroupConfiguration(1, 40, 1, 2, tile_k=128), weights_ready=True, multiprocessors=2),
    Case(130, 72, 136),
    Case(300, 520, 264, WarpgroupConfiguration(2, 256, 2, 1, True)),
    Case(300, 400, 320, WarpgroupConfiguration(2, 64, 2, 2), out_dtype=np.float32),
    Case(257, 200, 512, WarpgroupConfiguration(2, 64, 1, 1, True), pad=8, multiprocessors=3),  # tiles of one box
    Case(129, 321, 512, WarpgroupConfiguration(2, 160, 1, 2), k_slices=3),
    Case(300, 328, 328, WarpgroupConfiguration(2, 160, 1, 1, True), multiprocessors=2),  # boxes of 32 columns
    Case(290, 456, 456, WarpgroupConfiguration(2, 224, 1, 1, True), multiprocessors=2),
    Case(257, 200, 264, WarpgroupConfiguration(2, 96, 2, 1, True), multiprocessors=2),  # a pair without a lower tile
    Case(200, 330, 256, WarpgroupConfiguration(2, 64, 2, 1)),
]
ANYTHING = [
    Case(1, 1, 1),
    Case(9, 33, 77, offset=2, pad=1),
    Case(140, 130, 264, MMA[0]),
    Case(33, 72, 200, MMA[2], pad=8, k_slices=2),
    Case(20, 80, 100, x_dtype=np.float32, out_dtype=np.float32),
    Case(70, 80, 160, k_slices=2, x_dtype=np.float32),
]


@pytest.mark.parametrize("case", WEIGHTS_ONCE + WARPGROUPS + ANYTHING, ids=str)
def test_bits_of_the_emulation(gpu: HostGpu, case: Case) -> None:
    demand_bits(*run(gpu, case))


def test_launches_are_remembered_by_their_addresses(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weights in turn, as layers have them, through one plan; and no more addresses than allowed."""
    monkeypatch.setattr(_gpu_linear, "_plans", {})
    monkeypatch.setattr(_gpu_linear, "_MOST_ADDRESSES", 2)
    rng = np.random.default_rng(3)
    x, weights = aligned((20, 256), bfloat16), [aligned((72, 256), bfloat16) for _ in range(3)]
    x[...] = rng.standard_normal(x.shape).astype(bfloat16)
    out = aligned((20, 72), bfloat16)
    for weight in weights:
        weight[...] = rng.standard_normal(weight.shape).astype(bfloat16)
    for weight in [*weights, *weights[:2], weights[0]]:
        out[...] = bfloat16(7)
        _gpu_linear.linear(Array(x), Array(weight), Array(out))
        demand_bits(out, nearest(tensor_core.matmul(np.ascontiguousarray(x), weight)))
    (plan,) = _gpu_linear._plans.values()
    assert 1 <= len(plan._known) <= 2
    addresses = (*(array.ctypes.data for array in (x, weights[0], out)), 0)
    assert plan.launches(*addresses) is plan.launches(*addresses)


def test_every_order_of_events_gives_the_same_bits(gpu: HostGpu) -> None:
    for case in (WEIGHTS_ONCE[6], WARPGROUPS[1], WARPGROUPS[3]):
        for seed in range(2, 6):
            demand_bits(*run(gpu, case, seed))


def test_special_values_stay_in_their_rows_and_columns(gpu: HostGpu) -> None:
    """NaN and infinities reach their own outputs and no others, also from rows past the end of a tile."""
    for configuration in (SMALL, WarpgroupConfiguration(1, 24, tile_k=128), MMA[2]):
        x, weight = aligned((5, 320), bfloat16), aligned((40, 320), bfloat16)
        x[...], weight[...] = bfloat16(1), bfloat16(0.5)
        x[2, 7], weight[11, 300] = bfloat16(np.nan), bfloat16(np.inf)
        out = aligned((5, 40), bfloat16)
        _gpu_linear.linear(Array(x), Array(weight), Array(out), configuration=configuration)
        expected = np.full((5, 40), 160, bfloat16)
        expected[:, 11] = bfloat16(np.inf)
        expected[2] = np.uint16(0x7FFF).view(bfloat16)
        demand_bits(out, expected)


# what is planted, in which case, and the text that it replaces
FAULTS = {
    "one staging buffer": (WARPGROUPS[5], "turn = (turn + 1) % BUFFERS;", ""),
    "boxes of the next tile": (
        WARPGROUPS[5],
        "box * BOX_PAIRS, row, column + box * BOX_COLUMNS);\n            }",
        "box * BOX_PAIRS, work.tile_m, column);\n            }",
    ),
    "a stage freed too early": (WARPGROUPS[3], "wait_for_products<1>();", "wait_for_products<2>();"),
    "accumulators read too early": (WARPGROUPS[3], "wait_for_products<0>();", ""),
    "others' weights cached": (
        WARPGROUPS[0],
        "const int row = work.tile_n + rank.m * SHARE_N;\n        if",
        "const int row = SHARE_N;\n        if",
    ),
    "bytes of rows that are not there": (WARPGROUPS[8], "128 * x_rows(work)", "128 * a.x_rows"),
    "bytes of weights that are not there": (WARPGROUPS[8], "128 * weight_rows(work)", "128 * TILE_N"),
    "rows of a tile that is not there": (WARPGROUPS[9], "a.m - work.tile_m, a.x_rows", "max(8, a.m - work.tile_m), a.x_rows"),
    "another swizzle of narrow boxes": (WARPGROUPS[7], "line & 7 : line / 2 & 3", "line & 7 : line & 3"),
    "another order of k": (WARPGROUPS[3], "x + 2 * step, weight + 2 * step", "x + 2 * (3 - step), weight + 2 * (3 - step)"),
    "the wrong sender": (WARPGROUPS[1], "other < n ? other : other + 1", "other"),
    "left before the others": (WARPGROUPS[1], "CLUSTER > 1 && slot < ring.depth", "false"),
    "x not waited for": (WEIGHTS_ONCE[6], "if (!RESIDENT) barrier_wait(x_full + x_place.slot * 8, x_place.parity);", ""),
    "weights not waited for": (WEIGHTS_ONCE[6], "barrier_wait(stream.barriers + place.slot * 8, place.parity);", ""),
    "a full ring refilled": (WEIGHTS_ONCE[6], "barrier_wait(empty + place.slot * 8, place.parity);", ""),
    "no barrier in the ring": (ANYTHING[3], "__syncthreads();  // this stage", "//"),
    "copies not waited for": (ANYTHING[3], "wait_for_copies<STAGES - 2>();", "wait_for_copies<STAGES - 1>();"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(gpu: HostGpu, fault: str) -> None:
    case, right, wrong = FAULTS[fault]
    demand_noticed(gpu, right, wrong, lambda seed: same_bits(*run(gpu, case, seed)))
