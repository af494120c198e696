"""What the machine of tests.linear_on_host promises to the kernels that run on it, where no kernel of ours would show it."""

import contextlib
import struct
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from cufuse.compiler import Kernel
from tests import linear_on_host

pytestmark = pytest.mark.skipif(linear_on_host.COMPILER is None, reason="g++ is needed to run a kernel's text on the host")

SHUFFLES = """
struct Arguments { float* out; };
extern "C" __global__ void shuffles(const __grid_constant__ Arguments a) {
    const int thread = threadIdx.x, lane = thread % 32;
    const float own = (float)(thread * thread);
    a.out[thread] = __shfl_sync(0xffffffffu, own, (lane * 7 + 3) % 32);
    a.out[64 + thread] = __shfl_xor_sync(0xffffffffu, own, 1 + lane / 2 % 2 * 4);
    a.out[128 + thread] = __shfl_down_sync(0xffffffffu, own, lane % 3 + 20);
    a.out[192 + thread] = __shfl_sync(0xffffffffu, own, 37);
}
"""


@pytest.mark.parametrize("seed", range(1, 6))
def test_each_lane_of_a_shuffle_names_its_own_source(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """CUDA's programming guide, "Warp shuffle functions": the source is the calling lane's argument, modulo 32; behind lane 31
    the lane keeps its own value. Whichever lane comes last, which the seed decides."""
    gpu = linear_on_host.HostGpu(_folder(tmp_path_factory))
    gpu.seed, gpu.change = seed, lambda source: SHUFFLES
    out = np.full(256, -1, np.float32)
    kernel = Kernel("shuffles", "add.cu", "shuffles", (), 64)
    gpu.prepare(kernel, 0, 1)(struct.pack("P", out.ctypes.data))
    thread = np.arange(64)
    lane, own, first = thread % 32, (thread * thread).astype(np.float32), thread // 32 * 32
    down = lane + lane % 3 + 20
    expected = [
        own[first + (lane * 7 + 3) % 32],
        own[first + (lane ^ 1 + lane // 2 % 2 * 4)],
        own[first + np.where(down < 32, down, lane)],
        own[first + 5],
    ]
    np.testing.assert_array_equal(out.reshape(4, 64), expected)


# One thread of the cluster's first CTA copies stage after stage into the same bytes of all its CTAs, whose warps 1 load them.
TURNS = """
struct Arguments { const unsigned char* in; u32* out; long long cluster; alignas(64) TensorMap map; };
extern "C" __global__ void turns(const __grid_constant__ Arguments a) {
    const u32 shared = shared_address(host::shared_memory()), full = shared + 2048, empty = shared + 2056;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) barrier_init(full, 1), barrier_init(empty, a.cluster);
    sync_cluster();
    if (warp == 0 && cluster_rank() == 0)
        for (u32 stage = 0; stage < 4; ++stage) {
            barrier_wait(empty, stage & 1 ^ 1);
            if (lane == 0) copy_box_to_all(shared, &a.map, 0, stage * 8, full, EVICT_NORMAL, (1u << a.cluster) - 1);
            __syncwarp();
        }
    if (warp == 1) {
        u32 r[4], before[4] = {};
        float c[4] = {};
        const auto release = [&] {
            __syncwarp();
            if (lane == 0) barrier_arrive_at(empty, 0);
        };
        for (u32 stage = 0; stage < 4; ++stage) {
            if (lane == 0) barrier_arrive_expecting(full, 1024);
            barrier_wait(full, stage & 1);
            load_matrices(r, shared + lane * 16);
            multiply_accumulate(c, r, r[0], r[1]);
            release();
            if (lane < 4) a.out[(blockIdx.x * 4 + stage) * 4 + lane] = r[0];
            for (int i = 0; i < 4; ++i) before[i] = r[i];
        }
    }
    sync_cluster();
}
"""
USE, RELEASE, WAIT = "multiply_accumulate(c, r, r[0], r[1]);", "release();", "barrier_wait(empty, stage & 1 ^ 1);"
STORED = "store_matrices(shared + 1024 + lane * 16, r[0], r[1], r[2], r[3]);"
COPY = "copy_box_to_all(shared, &a.map, 0, stage * 8, full, EVICT_NORMAL, (1u << a.cluster) - 1);"
BOX = "copy_box(shared, &a.map, 0, stage * 8, full, EVICT_NORMAL);"
BYTES = "copy_bytes(shared, a.in + stage * 1024, 1024, full, EVICT_NORMAL);"
MEETING = ((WAIT, "if (stage > 0) sync_threads(1, 64);"), (RELEASE, "if (stage < 3) sync_threads(1, 64);"))
HASTE = (f"{USE}\n            {RELEASE}", f"{RELEASE} {USE}")

# the CTAs of a cluster, and what is replaced in the text
SOUND = {
    "product": (1, ()),
    "matrices stored": (1, ((USE, STORED),)),
    "to two CTAs": (2, ()),
    "boxes": (1, ((COPY, BOX),)),
    "bytes": (1, ((COPY, BYTES),)),
    "a barrier of threads": (1, MEETING),
    "the last load not used": (1, ((USE, f"if (stage < 3) {USE}"),)),
}
HASTY = {
    "product": (1, (HASTE,)),
    "matrices stored": (1, (HASTE, (USE, STORED))),
    "in the other CTA": (2, ((RELEASE, f"if (cluster_rank() == 0) {RELEASE}"), (USE, f"if (cluster_rank() == 1) {RELEASE} {USE}"))),
    "boxes": (1, (HASTE, (COPY, BOX))),
    "bytes": (1, (HASTE, (COPY, BYTES))),
    "a barrier of threads": (1, (HASTE, *MEETING)),
    "the load before used": (1, ((USE, "multiply_accumulate(c, before, before[0], before[1]);"),)),
    "a shuffle": (1, ((USE, "c[0] = __shfl_xor_sync(0xffffffffu, __uint_as_float(r[0]), 1);"),)),
    "a fence": (1, ((USE, "fence_shared_for_copies();"),)),
}


def take_turns(gpu: linear_on_host.HostGpu, cluster: int, replaced: Iterable[tuple[str, str]], seed: int) -> None:
    text = TURNS
    for right, wrong in replaced:
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    gpu.seed, gpu.change = seed, lambda source: text
    stages = np.random.default_rng(seed).integers(1, 1 << 32, (4, 256), np.uint32)
    out = np.zeros((2, 4, 4), np.uint32)
    box = linear_on_host.tensor_map(stages.ctypes.data, (64, 32), (128,), (64, 8))
    arguments = struct.pack("PPq40x", stages.ctypes.data, out.ctypes.data, cluster) + box
    gpu.prepare(Kernel("turns", "add.cu", "turns", (), 64), 0, 2, smem=2064, cluster=cluster)(arguments)
    np.testing.assert_array_equal(out, [stages[:, :4]] * 2)


@pytest.mark.parametrize("way", SOUND)
def test_loads_used_before_their_place_is_given_away(tmp_path_factory: pytest.TempPathFactory, way: str) -> None:
    gpu = linear_on_host.HostGpu(_folder(tmp_path_factory))
    for seed in range(1, 6):
        take_turns(gpu, *SOUND[way], seed)


@pytest.mark.parametrize("way", HASTY)
def test_a_copy_that_may_overtake_a_load_is_found(tmp_path_factory: pytest.TempPathFactory, way: str) -> None:
    """In every order of events, although the bits are right in all of them."""
    gpu = linear_on_host.HostGpu(_folder(tmp_path_factory))
    for seed in range(1, 6):
        with pytest.raises(linear_on_host.KernelFailure, match=r"overtake an ldmatrix of row 0 by warp 1 .* \(0, 1023\) in block"):
            take_turns(gpu, *HASTY[way], seed)


def test_loads_of_one_launch_are_not_held_against_the_next(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whether the one before failed or left its last load unused, and in a cluster of another size."""
    gpu = linear_on_host.HostGpu(_folder(tmp_path_factory))
    for seed in range(1, 4):
        for before in (HASTY["product"], HASTY["in the other CTA"], SOUND["the last load not used"]):
            with contextlib.suppress(linear_on_host.KernelFailure):
                take_turns(gpu, *before, seed)
            for after in ("product", "to two CTAs"):
                take_turns(gpu, *SOUND[after], seed)


def _folder(folders: pytest.TempPathFactory) -> Path:
    """One for all seeds: what is compiled stays."""
    folder = folders.getbasetemp() / "host_machine"
    folder.mkdir(exist_ok=True)
    return folder
