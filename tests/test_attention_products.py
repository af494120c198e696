"""The orders of attention's products against what probes on an H200 gave away (tests/golden/record_orders.py), and by loops."""

import json
import lzma
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

import cufuse
from cufuse.attention import attention
from cufuse.emulation.attention_products import BLOCKS, Order, multiply, one_slice, orders
from cufuse.emulation.cublas import recorded_slices
from tests.golden import inputs
from tests.witnesses import bits, random_bf16

GOLDEN = Path(__file__).parent / "golden"
HEAD_DIM, LARGE = 128, 2.0**40
PROBES = 64

pytestmark = pytest.mark.skipif(
    not (GOLDEN / "orders.json").exists(), reason="not recorded: python3 -m tests.golden.record_orders on a GPU"
)


def pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The probed pairs in the order of the recording (record_orders.pairs)."""
    i, j = np.triu_indices(n, 1)
    if n > 200:
        kept = np.isin(i, (0, 1, 2, 8, 16, 64, n // 2))
        i, j = i[kept], j[kept]
    return i, j


@pytest.fixture(scope="module")
def recorded() -> tuple[dict[str, Any], list[np.ndarray]]:
    record = json.loads((GOLDEN / "orders.json").read_text())
    data = lzma.decompress((GOLDEN / "orders.xz").read_bytes())
    ends = np.cumsum(record["sizes"])
    return record, [np.frombuffer(data[end - size : end], np.uint8) for size, end in zip(record["sizes"], ends, strict=True)]


def survivors(order: Order, n: int, chosen: np.ndarray) -> np.ndarray:
    """What the emulation makes of the probes: how many ones outlast +LARGE as term i and -LARGE as term j."""
    i, j = (one[chosen] for one in pairs(n))
    rows = np.zeros((len(chosen), n), np.float32)
    rows[:, :: -(-n // 256)] = 1
    rows[np.arange(len(chosen)), i], rows[np.arange(len(chosen)), j] = LARGE, -LARGE
    return multiply(np.ones((1, n), cufuse.bfloat16), rows.astype(cufuse.bfloat16), order, "sm_90")[0]


def test_every_probed_shape_has_the_emulated_order(recorded: tuple[dict[str, Any], list[np.ndarray]]) -> None:
    record, blobs = recorded
    checked: dict[tuple[int, Order, int], bool] = {}
    wrong, shapes = [], 0
    for label, found in record["shapes"].items():
        if label.startswith("linear"):
            continue
        kind = label.split(",")[0]
        batch, heads, keys = map(int, re.findall(r"\d+", label))
        both = orders(batch * heads, 1 if kind == "decode" else keys, keys)
        for name, order, n in (("scores", both[0], HEAD_DIM), ("values", both[1], keys)):
            if name not in found:
                continue
            number, alike = found[name]
            assert alike is True, f"{label}: rows of one product differ"
            key = (number, order, n)
            if key not in checked:
                chosen = np.random.default_rng(number).permutation(len(blobs[number]))[:PROBES]
                checked[key] = bool((survivors(order, n, chosen) == blobs[number][chosen]).all())
            shapes += 1
            if not checked[key]:
                wrong.append(f"{label}, {name}: {order}")
    assert not wrong, f"{len(wrong)} of {shapes} differ from the probes: {wrong[:5]}"
    assert shapes > 900


def test_projections_of_the_small_model_and_the_head_take_one_slice(
    recorded: tuple[dict[str, Any], list[np.ndarray]],
) -> None:
    """Term 0 against term j: ones behind j's block survive, or, where j lies in a later slice, those of the slices behind it."""
    record, blobs = recorded
    seen = set()
    for label, number in record["shapes"].items():
        if not label.startswith("linear"):
            continue
        m, k, n = map(int, re.findall(r"\d+", label))
        j = np.unique(np.concatenate([[1, 2, 3, 7], np.arange(8, k, 16)]))
        ones = np.zeros(k + 1, int)
        ones[:k:] = np.arange(k) % -(-k // 256) == 0
        before = np.concatenate([[0], np.cumsum(ones[:k])])
        slices = 1 if one_slice(n, k) else recorded_slices(m, n, k)
        assert slices is not None, label
        length = -(-k // 64 // slices) * 64
        ends = np.where(j < length, np.minimum(j // 16 * 16 + 16, k), np.minimum(j // length * length + length, k))
        assert (before[k] - before[ends] == blobs[number]).all(), f"{label}: not {slices} slices"
        seen.add((n, k))
    assert len(seen) == 11


def test_random_products_have_the_bits_of_pytorch() -> None:
    """One head's scores and attended values of heavy-tailed operands, for every recorded batch and number of keys."""
    with safetensors.safe_open(GOLDEN / "attention.safetensors", "numpy") as file:
        names = [name for name in file.keys() if name.endswith("/digest")]  # noqa: SIM118 (safe_open is no mapping)
        stored = {name: file.get_tensor(name) for name in names}
    compared = 0
    for name, digests in stored.items():
        kind, shape = name.split("/")[:2]
        batch, heads, keys = map(int, re.findall(r"\d+", shape))
        if batch * heads * keys > 3000:
            continue
        seed = inputs.seed_of("attention", batch, heads, 1, keys)
        q = inputs.heavy((batch, heads, 1, HEAD_DIM), seed)
        k = inputs.heavy((batch, heads, keys, HEAD_DIM), seed + 1)
        weights = inputs.bell((batch, heads, 1, keys), seed + 2, 0.1)
        v = inputs.heavy((batch, heads, keys, HEAD_DIM), seed + 3)
        scores, values = orders(batch * heads, 1, keys)
        a, b, order = (q, k, scores) if kind == "scores" else (weights, v.swapaxes(-1, -2), values)
        rows = [
            cufuse.round_to_bf16(multiply(a[i, h], b[i, h], order, "sm_90"))[0] for i in range(batch) for h in range(heads)
        ]
        differ = np.flatnonzero(inputs.row_digests(np.stack(rows)) != digests)
        assert differ.size == 0, f"{name}: heads {differ[:5]} of {len(rows)} differ ({order})"
        compared += len(rows) * len(rows[0])
    assert compared > 50_000


@pytest.mark.parametrize("order", [Order(16, 8), Order(16, 1, True), Order(2, 0, True), Order(8, 1), Order(32, 16)])
@pytest.mark.parametrize("depth", [1, 5, 33, 128, 300])
def test_lanes_by_a_loop(order: Order, depth: int) -> None:
    a, b = random_bf16(depth, 1, depth, binades=6), random_bf16(depth + 1, 3, depth, binades=6)
    vector = order.vector or -(-depth // order.lanes)
    for column in range(3):
        lanes = [np.float32(0)] * order.lanes
        for k in range(depth):
            lane = k // vector % order.lanes
            lanes[lane] = np.float32(lanes[lane] + np.float32(a[0, k]) * np.float32(b[column, k]))
        while len(lanes) > 1 and not order.ascending:
            half = len(lanes) // 2
            lanes = [np.float32(lanes[i] + lanes[i + half]) for i in range(half)]
        total = lanes[0]
        for other in lanes[1:]:
            total = np.float32(total + other)
        assert bits(multiply(a, b, order, "sm_90"))[0, column] == total.view(np.uint32)


def test_incomplete_tile_comes_first() -> None:
    a, b = random_bf16(0, 2, 41, binades=8), random_bf16(1, 4, 41, binades=8)
    first = multiply(a[:, :9], b[:, :9], BLOCKS, "sm_90")
    assert first.shape == (2, 4)
    padded = [np.concatenate([x[:, :9], np.zeros((len(x), 7), x.dtype), x[:, 9:]], axis=1) for x in (a, b)]
    expected = multiply(*padded, BLOCKS, "sm_90")
    assert (bits(multiply(a, b, Order(tile=32), "sm_90")) == bits(expected)).all()
    assert (bits(expected) != bits(multiply(a, b, BLOCKS, "sm_90"))).any()


def test_recipes_with_blocks_do_not_depend_on_the_number_of_queries() -> None:
    q, k, v = (random_bf16(seed, 1, 9, heads, 32, scale=2) for seed, heads in enumerate((4, 2, 2)))
    for start in (0, 3, 8):
        whole = attention(q, k, v, recipe="batch-invariant")[:, start:]
        assert (bits(attention(q[:, start:], k, v, recipe="batch-invariant")) == bits(whole)).all()
