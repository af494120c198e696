"""What the machine of tests.linear_on_host promises to the kernels that run on it, where no kernel of ours would show it."""

import struct
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


def _folder(folders: pytest.TempPathFactory) -> Path:
    """One for all seeds: what is compiled stays."""
    folder = folders.getbasetemp() / "host_machine"
    folder.mkdir(exist_ok=True)
    return folder
