"""``cufuse bench`` on a GPU: a small run is whole and cufuse has PyTorch's bits; the kernel under its floor reads everything."""

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_stream, bench
from cufuse.bench_results import BF16, CUFUSE, EAGER, F_RMS_NORM, GEMM, STATIC
from tests import gpu_support
from tests.gpu_support import COMPARED, demand_same

pytestmark = gpu_support.MARKS


def test_a_small_run() -> None:
    """One size, two numbers of rows, without torch.compile and Liger."""
    gpu_support.qwen3()
    settings = bench.Settings(("0.6b",), (1, 300), (cufuse.recipes["torch"],), repeat=1, peers=False)
    kept: list[int] = []
    results = bench.run(settings, keep=lambda partial: kept.append(len(partial.cells)))
    assert (results.complete, results.failures(), results.notes) == (True, [], [])
    assert kept == [1, 2, 2]
    for cell in results.cells:
        assert set(cell.columns) == {CUFUSE, STATIC, GEMM, EAGER}
        assert F_RMS_NORM in results.absent
        for name in (CUFUSE, STATIC, EAGER):
            assert (cell.columns[name].differing, cell.columns[name].against) == (0, "eager"), f"{name}, {cell.tokens} tokens"
            COMPARED["bench"] += cell.columns[name].outputs
        times = [cell.time(name) for name in (*cell.columns, "floor")]
        assert all(time is not None and 0.5 < time < 1000 for time in times), times
        assert cell.allocated_bytes == 0
        assert cell.host_microseconds is not None


def test_two_recipes_and_quantised_weights() -> None:
    """Columns for the second recipe; formats whose bits are the emulation's, with errors and bytes."""
    recipes = (cufuse.recipes["torch"], cufuse.recipes["batch-invariant"])
    settings = bench.Settings(("0.6b",), (1,), recipes, repeat=1, peers=False, formats=("Q4_0", "Q8_0"))
    results = bench.run(settings)
    assert (results.complete, results.failures(), results.notes) == (True, [], [])
    [cell], [quantised] = results.cells, results.quantised
    for name in (CUFUSE, STATIC):
        price = cell.ratio(f"{name}:batch-invariant", name)
        assert price is not None
        assert 0.5 < price < 10
    assert list(quantised.formats) == [BF16, "Q4_0", "Q8_0"]
    for name, one in quantised.formats.items():
        assert (one.differing, one.against) == (0, "emulation"), name
        COMPARED["bench"] += one.outputs
        assert 0.5 < (one.microseconds or 0) < 1000
    assert [one.bytes for one in quantised.formats.values()] == [4096 * 1024 * 2, 4096 * 1024 // 32 * 18, 4096 * 1024 // 32 * 34]
    errors = [one.error or 0 for one in quantised.formats.values()]
    assert 1e-3 < errors[0] < 0.004 < errors[2] < 0.01 < 0.05 < errors[1] < 0.15


@pytest.mark.parametrize("reader", _gpu_stream.READERS, ids=str)
def test_everything_is_read(reader: _gpu_stream.Reader) -> None:
    gpu = gpu_support.cupy()
    for units in (1, 1000, 1 << 20, (1 << 20) + 12345):
        words = np.random.default_rng(units).integers(0, 2**32, 4 * units, np.uint32)
        joined = gpu.zeros(1, np.uint32)
        _gpu_stream.read(gpu.asarray(words), reader, joined)
        demand_same("bench", joined, np.bitwise_xor.reduce(words, keepdims=True), f"{reader}, {units} units")
