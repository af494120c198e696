"""The text of the decoder's kernels, run on the host (linear_on_host.py), against the emulation: attention, softmax, SwiGLU, sums.

The exponential is float64's, rounded, on both sides here: CUDA's own is compared on a GPU.
"""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_decoder, mlp
from cufuse.attention import stages
from cufuse.bf16 import round_to_bf16 as bf16
from cufuse.emulation import attention_products
from cufuse.emulation.attention_products import Order, multiply
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


# among them an incomplete tile first, blocks of 8, scores by lanes (the last three: 128 and 256 products)
ATTENTION_SHAPES = [
    (1, 7, 7), (1, 13, 40), (2, 19, 33), (1, 2, 130), (4, 2, 259), (4, 13, 301), (32, 13, 13), (32, 15, 15), (64, 9, 9),
]  # fmt: skip


def products(batch: int, queries: int, keys: int, heads: tuple[int, int], size: int) -> tuple[np.ndarray, ...]:
    return tuple(
        random_bf16(seed, batch, n, h, size, scale=2)
        for seed, (n, h) in enumerate(((queries, heads[0]), (keys, heads[1]), (keys, heads[1])))
    )


def buffers(numerics: Any, rows: int, row: int, out: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, weights (the same memory where they may be) and attended."""
    scores = np.full((rows, row), np.nan, np.float32) if not numerics.round_scaled else np.full((rows, row), 0x7FC0, np.uint16)
    weights = scores if scores.itemsize == 2 else np.full(scores.shape, 0x7FC0, np.uint16)
    return scores, weights, np.empty(out, cufuse.bfloat16 if numerics.round_output else np.float32)


@pytest.mark.parametrize("recipe", [EXACT, EXACT32], ids=lambda one: one.name)
@pytest.mark.parametrize(("batch", "queries", "keys"), ATTENTION_SHAPES)
def test_attention_of_several_queries(gpu: HostGpu, recipe: Any, batch: int, queries: int, keys: int) -> None:
    q, k, v = products(batch, queries, keys, (4, 2), 64)
    expected = stages(q, k, v, 0.125, True, recipe, keep=True)
    scores, weights, out = buffers(recipe.attention, batch * 4 * queries, -(-keys // 8) * 8 + 8, q.shape)
    both = _gpu_decoder.order_codes(recipe.attention, batch * 4, queries, keys)
    arrays = [Array(one) for one in (q, k, v, scores, weights, out)]
    _gpu_decoder.run_attention(*arrays, keys, 0.125, True, recipe.attention, 0, both)
    by_rows = np.ascontiguousarray(expected["weights"].swapaxes(1, 2)).reshape(-1, keys)
    demand_bits(np.ascontiguousarray(weights[:, :keys]).view(cufuse.bfloat16), by_rows, "weights")
    demand_bits(out, expected["attended"], "attended")


def decoded(gpu: HostGpu, recipe: Any, q: np.ndarray, k: np.ndarray, v: np.ndarray, fused: bool, room: int) -> np.ndarray:
    """Attention of one query a sequence over a cache with some room behind the last key, orders from a table."""
    (batch, _, heads, size), (keys, kv_heads) = q.shape, k.shape[1:3]
    row = -(-(keys + room) // 8) * 8
    scores, weights, out = buffers(recipe.attention, batch * heads, row, q.shape)
    capacity = np.full((2, batch, keys + room, kv_heads, size), 0x7FC0, np.uint16)
    capacity[0, :, :keys], capacity[1, :, :keys] = k.view(np.uint16), v.view(np.uint16)
    before = np.array([keys - 1], np.int32)
    table = np.array([_gpu_decoder.order_codes(recipe.attention, batch * heads, 1, max(n, 1)) for n in range(keys + 1)], np.int32)
    arrays = [Array(one) for one in (q, *(cache.view(cufuse.bfloat16) for cache in capacity), scores)]
    given = (None if fused else Array(weights), Array(out))
    addresses = (before.ctypes.data, table.ctypes.data)
    _gpu_decoder.run_decode(*arrays, *given, 0, 0.125, recipe.attention, 0, (0, 0), *addresses, True)
    return out


# among them every kind of order: lanes of vectors, parts, strided lanes, added ascending and by halving, and blocks
@pytest.mark.parametrize("recipe", [EXACT, EXACT32], ids=lambda one: one.name)
@pytest.mark.parametrize(
    ("batch", "keys", "heads", "size"),
    [
        (1, 1, (4, 2), 64), (1, 37, (4, 2), 128), (2, 16, (4, 2), 64), (1, 513, (4, 2), 128), (4, 41, (4, 2), 64),
        (4, 258, (4, 2), 64), (32, 9, (4, 2), 64), (32, 66, (4, 2), 64), (1, 195, (3, 1), 64), (4, 640, (4, 4), 64),
        (1, 50, (11, 1), 64), (1, 513, (16, 8), 64), (1, 1029, (4, 2), 64),
    ],
)  # fmt: skip
def test_attention_of_one_query(gpu: HostGpu, recipe: Any, batch: int, keys: int, heads: tuple[int, int], size: int) -> None:
    q, k, v = products(batch, 1, keys, heads, size)
    expected = stages(q, k, v, 0.125, True, recipe, keep=True)["attended"]
    demand_bits(decoded(gpu, recipe, q, k, v, True, 5), expected, "softmax in the same launch")
    demand_bits(decoded(gpu, recipe, q, k, v, False, 5), expected, "softmax apart")
    scores, weights, out = buffers(recipe.attention, batch * heads[0], -(-keys // 8) * 8, q.shape)
    both = _gpu_decoder.order_codes(recipe.attention, batch * heads[0], 1, keys)
    arrays = [Array(one) for one in (q, k, v, scores)]
    for given in (None, Array(weights)):
        _gpu_decoder.run_attention(*arrays, given, Array(out), keys, 0.125, True, recipe.attention, 0, both)
        demand_bits(out, expected, "without a cache")


@pytest.mark.parametrize(
    "order",
    [
        Order(lanes, vector, ascending)
        for lanes, vector, ascending in (
            (1, 1, False), (2, 0, True), (4, 0, False), (8, 1, False), (16, 8, False), (16, 1, True), (32, 16, False),
            (64, 2, True), (128, 4, False), (128, 16, True),
        )
    ],
    ids=str,
)  # fmt: skip
def test_any_order_of_lanes(gpu: HostGpu, order: Order) -> None:
    """Orders that no record has yet, three chunks of values, weights with zeros and values that cancel."""
    keys = 1100
    q, k, v = products(1, 1, keys, (2, 1), 64)
    v[0, 1::2] = -v[0, ::2]
    scores, weights, out = buffers(EXACT.attention, 2, 1104, q.shape)
    code = order.lanes | order.vector << 8 | order.ascending << 16
    arrays = [Array(one) for one in (q, k, v, scores, weights, out)]
    with np.errstate(all="ignore"):
        _gpu_decoder.run_attention(*arrays, keys, 0.125, True, EXACT.attention, 0, (code, code))
        raw = bf16(multiply(q[0, 0], k[0, :, 0], order, "sm_90"))
        scaled = bf16(raw.astype(np.float32) * np.float32(0.125))
        shares = softmax(scaled, recipe=EXACT)
        expected = bf16(multiply(shares, np.ascontiguousarray(v[0, :, 0].T), order, "sm_90"))
    demand_bits(np.ascontiguousarray(weights[:, :keys]).view(cufuse.bfloat16), shares, "weights")
    demand_bits(out[0, 0], expected, "attended")


@pytest.mark.parametrize(
    "order",
    [
        Order(lanes, vector, ascending)
        for lanes, vector, ascending in (
            (1, 1, False), (2, 0, True), (8, 4, False), (16, 1, True), (32, 4, False), (64, 1, True), (128, 2, False),
        )
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_scores_of_several_queries_in_any_order_of_lanes(gpu: HostGpu, order: Order, causal: bool) -> None:
    """Three tiles of rows, the last one short, and two blocks of keys; terms that cancel; nothing beside the scores is written."""
    queries, keys, row, numerics = 11, 45, 56, EXACT.attention
    q, k, v = products(2, queries, keys, (6, 2), 64)
    k[:, :, :, 1::2] = -k[:, :, :, ::2]
    q[:, :, :, 1::2] = bf16(q[:, :, :, ::2].astype(np.float32) * np.float32(1.01))
    scores, weights, out = buffers(numerics, 2 * 6 * queries, row, q.shape)
    weights = np.full_like(scores, 0x7FC0)
    code = order.lanes | order.vector << 8 | order.ascending << 16
    arrays = [Array(one) for one in (q, k, v, scores, weights, out)]
    _gpu_decoder.run_attention(*arrays, keys, 0.125, causal, numerics, 0, (code, 0))
    found = scores.view(cufuse.bfloat16).reshape(2, 6, queries, row)
    seen = np.arange(keys) <= keys - queries + np.arange(queries)[:, None] if causal else np.ones((queries, keys), bool)
    lowest = np.array(0xFF7F, np.uint16).view(cufuse.bfloat16).astype(np.float32)
    for entry, head in np.ndindex(2, 6):
        raw = bf16(multiply(q[entry, :, head], k[entry, :, head // 3], order, "sm_90"))
        scaled = bf16(raw.astype(np.float32) * np.float32(0.125)).astype(np.float32)
        expected = bf16(scaled + np.where(seen, np.float32(0), lowest))
        demand_bits(np.ascontiguousarray(found[entry, head, :, :keys]), expected, f"entry {entry}, head {head}")
    assert (scores[:, keys:] == 0x7FC0).all()


def test_orders_that_are_recorded_have_powers_of_two() -> None:
    """As the kernels want them; and they have the values of several queries in blocks alone."""
    for count, queries in itertools.product((1, 4, 16, 64, 128, 256, 512), (1, 2)):
        for keys in range(1, 3000):
            scores, values = attention_products.orders(count, queries, keys)
            for order in (scores, values):
                assert order.lanes <= 128 and order.lanes & (order.lanes - 1) == 0
                assert order.vector & (order.vector - 1) == 0
            assert scores.tile == 0
            assert (values.tile, values.block) == (0, 16) if queries == 1 else values.lanes == 0


def test_prompts_whose_scores_are_summed_in_lanes() -> None:
    """As recorded: 16 lanes, added one after the other, for these alone of the measured sizes."""
    lanes = Order(16, 1, True)
    for count in (4, 8, 16, 32, 64, 128, 256):
        found = [keys for keys in range(2, 2400) if attention_products.orders(count, keys, keys)[0].lanes]
        assert found == {128: [13, 15], 256: [9]}.get(count, [])
    assert {attention_products.orders(count, keys, keys)[0] for count, keys in ((128, 13), (128, 15), (256, 9))} == {lanes}


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

    logits = random_bf16(5, 4, 4500)
    logits[1, 4100] = logits[1, 900] = logits[1, 77] = 9  # a tie: the first
    logits[2, [5, 1400, 4400]] = np.nan  # NaN before all
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
