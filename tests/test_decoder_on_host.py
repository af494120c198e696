"""The text of the decoder's kernels, run on the host (linear_on_host.py), against the emulation: attention, softmax, SwiGLU, sums.

The exponential is float64's, rounded, on both sides here: CUDA's own is compared on a GPU.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_decoder, mlp
from cufuse.attention import stages
from cufuse.qwen3.decoder import greedy
from cufuse.residual import add
from cufuse.softmax import softmax
from tests.linear_on_host import COMPILER, HostGpu
from tests.witnesses import bits, demand_bits, random_bf16

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no g++")
EXACT = cufuse.recipes["torch"].derive("exact", attention={"exponential": "correct"}, mlp={"exponential": "correct"})
EXACT32 = cufuse.recipes["float32"].derive("exact32", attention={"exponential": "correct"}, mlp={"exponential": "correct"})


class Array:
    """As much of a CuPy array as the launches look at, over host memory."""

    def __init__(self, host: np.ndarray) -> None:
        self.host = host
        for name in ("shape", "strides", "itemsize", "size", "dtype", "ndim", "flags"):
            setattr(self, name, getattr(host, name))
        self.data = type("Pointer", (), {"ptr": host.ctypes.data})()
        self.device = type("Device", (), {"id": 0})()

    def __len__(self) -> int:
        return len(self.host)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decoder")


@pytest.fixture
def gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> HostGpu:
    found = HostGpu(folder)
    found.install(monkeypatch)
    return found


# among them every kind of order: lanes of vectors, parts, strided lanes, an incomplete tile first, blocks of 8
ATTENTION_SHAPES = [
    (1, 1, 1), (1, 1, 37), (2, 1, 16), (1, 7, 7), (1, 13, 40), (2, 19, 33), (1, 1, 513), (4, 1, 41), (4, 1, 258), (32, 1, 9),
    (32, 1, 66), (1, 2, 130), (4, 2, 259),
]  # fmt: skip


@pytest.mark.parametrize("recipe", [EXACT, EXACT32], ids=lambda one: one.name)
@pytest.mark.parametrize(("batch", "queries", "keys"), ATTENTION_SHAPES)
def test_attention(gpu: HostGpu, recipe: Any, batch: int, queries: int, keys: int) -> None:
    q, k, v = (random_bf16(seed, batch, n, h, 64, scale=2) for seed, (n, h) in enumerate(((queries, 4), (keys, 2), (keys, 2))))
    numerics = recipe.attention
    expected = stages(q, k, v, 0.125, True, recipe, keep=True)
    row = -(-keys // 8) * 8 + 8  # a cache with room behind the last key
    scores = np.full((batch * 4 * queries, row), 0x7FC0, np.uint16)
    if not numerics.round_scaled:
        scores = np.full(scores.shape, np.nan, np.float32)
    weights = scores if scores.itemsize == 2 else np.full(scores.shape, 0x7FC0, np.uint16)
    out = np.empty((batch, queries, 4, 64), cufuse.bfloat16 if numerics.round_output else np.float32)
    before = np.array([keys - queries], np.int32)
    capacity = np.full((2, batch, row, 2, 64), 0x7FC0, np.uint16)
    capacity[0, :, :keys], capacity[1, :, :keys] = k.view(np.uint16), v.view(np.uint16)
    arrays = [Array(one) for one in (q, *(cache.view(cufuse.bfloat16) for cache in capacity), scores, weights, out)]
    table = np.array([_gpu_decoder.order_codes(numerics, batch * 4, queries, max(n, 1)) for n in range(keys + 1)], np.int32)
    _gpu_decoder.run_attention(*arrays, keys, 0.125, True, numerics, 0, (0, 0), before.ctypes.data, table.ctypes.data)
    by_rows = np.ascontiguousarray(expected["weights"].swapaxes(1, 2)).reshape(-1, keys)
    demand_bits(np.ascontiguousarray(weights[:, :keys]).view(cufuse.bfloat16), by_rows, "weights")
    demand_bits(out, expected["attended"], "attended")
    plain = np.empty_like(out)
    scores[...] = 0
    arrays = [Array(one) for one in (q, k, v, scores, weights, plain)]
    both = _gpu_decoder.order_codes(numerics, batch * 4, queries, keys)
    _gpu_decoder.run_attention(*arrays, keys, 0.125, True, numerics, 0, both)
    demand_bits(plain, out, "without a cache")


@pytest.mark.parametrize("columns", [1, 31, 33, 1024, 2048, 2049, 9216, 9217, 9220, 12256])
def test_softmax(gpu: HostGpu, columns: int) -> None:
    x = random_bf16(columns, 3, columns, scale=3)
    expected = softmax(x, recipe=EXACT)
    for given in (x, x.astype(np.float32)):
        found = np.empty((3, columns), cufuse.bfloat16)
        _gpu_decoder.softmax(Array(given), EXACT.attention, Array(found))
        demand_bits(found, expected, f"{columns} columns, {given.dtype}")


@pytest.mark.parametrize("recipe", [EXACT, EXACT32], ids=lambda one: one.name)
def test_swiglu_and_silu(gpu: HostGpu, recipe: Any) -> None:
    gate, up = random_bf16(0, 5, 77, scale=4), random_bf16(1, 5, 77)
    found = np.empty(gate.shape, cufuse.bfloat16 if recipe.mlp.round_gated else np.float32)
    _gpu_decoder.swiglu(Array(gate), Array(up), recipe.mlp, Array(found))
    demand_bits(found, mlp.swiglu(gate, up, recipe=recipe))
    _gpu_decoder.swiglu(Array(gate), None, recipe.mlp, Array(found))
    demand_bits(found, mlp.silu(gate, recipe=recipe))


def test_add(gpu: HostGpu) -> None:
    x, residual = random_bf16(2, 9, 30), random_bf16(3, 9, 30)
    for recipe in ("torch", "float32"):
        expected = add(x, residual, recipe=recipe)
        found = np.empty_like(expected)
        _gpu_decoder.add(Array(x), Array(residual), Array(found))
        demand_bits(found, expected)


def test_gather_and_argmax(gpu: HostGpu) -> None:
    table = random_bf16(4, 20, 48)
    ids = np.array([19, 0, 7, 7])
    rows = np.empty((4, 48), cufuse.bfloat16)
    _gpu_decoder.gather(Array(table), Array(ids), Array(rows))
    demand_bits(rows, table[ids])

    logits = random_bf16(5, 4, 1500)
    logits[1, 900] = logits[1, 77] = 9  # a tie: the first
    logits[2, [5, 1400]] = np.nan  # NaN before all
    logits[3] = -np.inf
    for given in (logits, logits.astype(np.float32)):
        chosen = np.zeros(4, np.int64)
        log = np.zeros((4, 3), np.int64)
        steps, positions, slots = (np.array([start] * 4, np.int64) for start in (1, 6, 100))
        before = np.array([6], np.int32)
        _gpu_decoder.argmax(Array(given), Array(chosen), tuple(map(Array, (log, steps, positions, slots, before))))
        assert chosen.tolist() == greedy(logits).tolist() == [int(greedy(logits)[0]), 77, 5, 0]
        assert log[:, 1].tolist() == chosen.tolist() and not log[:, [0, 2]].any()
        assert (steps.tolist(), positions.tolist(), slots.tolist(), before.tolist()) == ([2] * 4, [7] * 4, [101] * 4, [7])
        _gpu_decoder.argmax(Array(given), Array(chosen))
    assert bits(logits).dtype == np.uint16
