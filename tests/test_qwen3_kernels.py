"""The kernels that Qwen3's sizes take on an H200 compile within its limits, whichever of the listed configurations they are."""

import pytest

from cufuse import compiler, launch
from tests import qwen3_kernels
from tests.test_kernels_compile import EVERYTHING

SOME = 11  # one in so many, where not everything is to be compiled


@pytest.fixture(scope="module")
def taken() -> list[qwen3_kernels.Taken]:
    with pytest.MonkeyPatch.context() as patch:
        return qwen3_kernels.taken(patch, qwen3_kernels.qwen3_calls())


def test_launches_fit_the_device(taken: list[qwen3_kernels.Taken]) -> None:
    """Registers, shared memory; nothing spilled."""
    chosen = taken if EVERYTHING else taken[::SOME]
    limit = compiler.shared_memory_limit(90)
    for kernel, threads, smem in chosen:
        assert kernel.runs_on(90), kernel.name
        (row,) = launch.resource_table(["sm_90a"], [kernel])
        what = f"{kernel.name}, {threads} threads, {smem} bytes: {row}"
        assert row.stack == row.spills == 0, what
        assert threads <= kernel.threads, what
        assert 0 < -(-row.registers // 8) * 8 * threads <= compiler.REGISTERS_PER_BLOCK, what
        assert 0 <= row.static_smem + smem <= limit, what
        print(f"{kernel.name:100} {row.registers:4} registers {threads:5} threads {row.static_smem + smem:7} bytes of memory")
    listed = {kernel.name for kernel in launch.kernels()}
    names = {one.kernel.name for one in chosen}
    print(f"{len(names)} kernels, {len(names - listed)} of them for these sizes alone, in {len(chosen)} kinds of launches")


def test_every_road_is_taken(taken: list[qwen3_kernels.Taken]) -> None:
    """One launch for few rows, the norm's and the projection's for more, the heads' in the projection's shadow for many."""
    sources = {one.kernel.source for one in taken}
    assert {"rms_norm.cu", "heads.cu", "linear_sm90.cu", "linear_heads_sm90.cu", "rms_norm_linear_sm90.cu"} <= sources
    assert any(source.startswith("quantised_") for source in sources)
