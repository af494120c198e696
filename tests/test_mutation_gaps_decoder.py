"""What mutation testing found untold of the decoder's and the quantised weights' emulation: records, edges, tiles, fields."""

import json
import math
import os
from dataclasses import FrozenInstanceError
from fractions import Fraction
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cufuse.emulation import attention_products, block_scaled, exponential, q8_1, tensor_core
from cufuse.emulation.attention_products import BLOCKS, Order, multiply, orders
from tests.witnesses import bits, demand_bits, random_bf16, round_to_float32

F = np.float32


@pytest.mark.parametrize("thing", [BLOCKS, block_scaled.Weights(*[np.zeros((1, 1), np.int8)] * 3, group=32, piece=64)])
def test_fields_stay(thing: Any) -> None:
    with pytest.raises(FrozenInstanceError):
        thing.tile = thing.group = 1


# the orders of attention's products


def test_the_plain_order() -> None:
    """Blocks of 16 from the first term on: what numbers of keys that 8 divides take, for any number of products and queries."""
    assert Order() == BLOCKS == Order(lanes=0, vector=0, ascending=False, tile=0, block=16)
    assert BLOCKS.ascending is False
    for keys in range(8, 3000, 8):
        for queries in (1, 2, keys):
            assert orders(32, queries, keys) == (BLOCKS, BLOCKS)


def test_every_recorded_order() -> None:
    """Of the record's runs the one that holds for each number of keys, found by walking upward from one key."""
    record = json.loads((Path(attention_products.__file__).parent / "data/attention_orders.json").read_text())
    for kind, queries in (("single_query", 1), ("several_queries", 2), ("several_queries", 77)):
        measured = list(record[kind])
        below = {4: "4", 3: "4", 1: "4", 7: "4", 8: "8", 9: "8", 100: "64", int(measured[-1]) + 1: measured[-1]}
        for products, count in ({int(one): one for one in measured} | below).items():
            for name, rest in (("odd", (1, 3, 5, 7)), ("even", (2, 6)), ("four", (4,))):
                both = [[*record[kind][count][product][name]] for product in ("scores", "values")]
                now = [runs[0][1] for runs in both]
                starts = {first for runs in both for first, _ in runs}
                for keys in range(1, 2000):
                    for place, runs in enumerate(both):
                        if runs and runs[0][0] == keys:
                            now[place] = runs.pop(0)[1]
                    if keys % 8 in rest and (keys < 40 or starts & {keys - 8, keys - 2, keys, keys + 2}):
                        assert orders(products, queries, keys) == tuple(Order(*one) for one in now), (kind, products, keys)


def test_orders_seen_on_an_h200() -> None:
    """Four heads, one query or several: literal, not read from the record."""
    lanes = {1: (Order(16, 8), Order(32, 4)), 164: (Order(32, 4), Order(32, 4)), 903: (Order(16, 1, True), Order(32)),
             908: (Order(16, 1, True), Order(32, 1)), 908 + 1: (Order(16, 1, True), Order(32, 1)),
             906: (Order(16, 1, True), Order(32)), 962: (Order(16, 1), Order(32, 1))}  # fmt: skip
    assert {keys: orders(4, 1, keys) for keys in lanes} == lanes
    tiles = {3: (BLOCKS, Order(tile=32)), 74: (BLOCKS, Order(tile=32)), 76: (BLOCKS, Order(tile=128)),
             78: (BLOCKS, Order(tile=128)), 611: (Order(block=8), Order(tile=32, block=8)), 798: (BLOCKS, BLOCKS)}  # fmt: skip
    for queries in (2, 3, 500):
        assert {keys: orders(4, queries, keys) for keys in tiles} == tiles


def test_the_record_is_read_once() -> None:
    for read in (attention_products._record, exponential._rule, exponential._table, exponential._recorded):
        assert read() is read()
    assert exponential._powers(3, 2) is exponential._powers(3, 2)


def blocks_by_integers(a: np.ndarray, b: np.ndarray, order: Order, terms: int, core: str) -> int:
    """One sum in blocks, in Python's integers: the first depth mod tile terms in blocks of their own, then the others."""
    codes = [row.view(np.uint16).tolist() for row in (a, b)]
    first = len(a) % order.tile if order.tile else 0
    c, length = 0, min(order.block, terms)
    for start, end in ((0, first), (first, len(a))):
        for k in range(start, end, length):
            parts = [code[k : min(k + length, end)] for code in codes]
            c = tensor_core.reference_block(*(part + [0] * (terms - len(part)) for part in parts), c, core=core)
    return c


@pytest.mark.parametrize("order", [Order(), Order(tile=32), Order(tile=64, block=8), Order(tile=128), Order(block=8)], ids=str)
@pytest.mark.parametrize(("core", "terms"), [("sm_80", 8), ("sm_90", 16)])
def test_blocks_by_integers(order: Order, core: str, terms: int) -> None:
    seen = False
    for depth in (5, 41, 64, 77, 128, 131, 150):
        a, b = random_bf16(depth, 2, depth, binades=8), random_bf16(depth + 1, 3, depth, binades=8)
        found = bits(multiply(a, b, order, core))
        assert found.tolist() == [[blocks_by_integers(row, column, order, terms, core) for column in b] for row in a], depth
        seen |= bool((found != bits(multiply(a, b, Order(tile=16) if order == BLOCKS else BLOCKS, core))).any())
    assert seen is (order != Order(block=8) or core == "sm_90"), "another order has the same bits"


def lanes_by_loops(a: np.ndarray, b: np.ndarray, order: Order) -> np.float32:
    """One sum by lanes, term after term."""
    vector = order.vector or math.ceil(len(a) / order.lanes)
    lanes = [F(0)] * order.lanes
    for k, (one, other) in enumerate(zip(a.astype(F), b.astype(F), strict=True)):
        lane = k // vector % order.lanes
        lanes[lane] = F(lanes[lane] + one * other)  # the product is exact
    if order.ascending:
        total = lanes[0]
        for lane in lanes[1:]:
            total = F(total + lane)
        return total
    while len(lanes) > 1:
        lanes = [F(one + other) for one, other in zip(lanes[: len(lanes) // 2], lanes[len(lanes) // 2 :], strict=True)]
    return lanes[0]


LANES = [Order(16, 8), Order(16, 1, True), Order(16, 1), Order(2, 0, True), Order(4), Order(32, 4)]


@pytest.mark.parametrize("order", LANES, ids=str)
@pytest.mark.parametrize("at_a_time", [0, 100, 1 << 22])
def test_lanes_by_loops(order: Order, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows of b are taken at a time: one, a few, all."""
    monkeypatch.setattr(attention_products, "_ELEMENTS_AT_A_TIME", at_a_time)
    for depth in (1, 5, 33, 150):
        a, b = random_bf16(depth, 3, depth, binades=6), random_bf16(depth + 1, 7, depth, binades=6)
        expected = np.array([[lanes_by_loops(row, column, order) for column in b] for row in a])
        demand_bits(multiply(a, b, order, "sm_90"), expected)


def test_a_sum_of_negative_zeros_is_positive() -> None:
    zeros, ones = np.full((1, 3), -0.0, ml_dtypes.bfloat16), np.ones((2, 3), ml_dtypes.bfloat16)
    for order in (Order(16, 8), Order(2, 0, True)):
        assert bits(multiply(zeros, ones, order, "sm_90")).tolist() == [[0, 0]]


@pytest.mark.parametrize(("rows", "threads"), [(1023, 1), (1024, None), (1500, None)])
def test_small_products_take_one_thread(rows: int, threads: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 2^20 multiply-adds threads cost more than they save."""
    told: list[Any] = []
    monkeypatch.setattr(tensor_core, "matmul", lambda a, b, **options: told.append(options["threads"]))
    a, b = np.zeros((2, 512), ml_dtypes.bfloat16), np.zeros((rows, 512), ml_dtypes.bfloat16)
    multiply(a, b, BLOCKS, "sm_90")
    assert told == [threads]


# block-scaled products


def groups_by_integers(parts: list[np.ndarray], weights: block_scaled.Weights, slices: int, m: int, n: int) -> np.float32:
    """One output of the formula at the head of the module, in Python's integers and fractions."""
    length = math.ceil(math.ceil(parts[0].shape[1] / weights.piece) / slices) * weights.piece
    integers = weights.integers[n].astype(ml_dtypes.bfloat16).view(np.uint16).tolist()
    ones = [0x3F80] * 16
    total = None
    for first in range(0, len(integers), length):
        acc = F(0)
        for start in range(first, min(first + length, len(integers)), weights.group):
            c = s = 0
            for k in range(start, start + weights.group, 16):
                for part in parts:
                    row = part[m, k : k + 16].view(np.uint16).tolist()
                    c = tensor_core.reference_block(row, integers[k : k + 16], c, core="sm_90")
                    s = tensor_core.reference_block(row, ones, s, core="sm_90")
            group = start // weights.group
            products = [(weights.scales[n, group], c)]
            if weights.offsets is not None:
                products.append((-weights.offsets[n, group], s))
            for factor, code in products:
                exact = Fraction(float(factor)) * Fraction(float(np.uint32(code).view(F))) + Fraction(float(acc))
                acc = round_to_float32(exact)
        total = acc if total is None else F(total + acc)
    assert total is not None
    return total


def random_groups(rows: int, columns: int, group: int, offsets: bool) -> block_scaled.Weights:
    rng = np.random.default_rng(columns)
    scales, others = rng.standard_normal((2, rows, columns // group)).astype(F)
    integers = rng.integers(-128, 128, (rows, columns)).astype(np.int8)
    return block_scaled.Weights(integers, scales, others if offsets else None, group, 64)


@pytest.mark.parametrize(("columns", "slices"), [(384, 2), (224, 3), (320, 1)])
@pytest.mark.parametrize("group", [16, 32])
def test_groups_by_integers(columns: int, slices: int, group: int) -> None:
    """Slices that begin within a stretch of 128 k, and rows so small that the step for any exponent takes them."""
    weights = random_groups(3, columns, group, offsets=group == 32)
    parts = [random_bf16(columns + seed, 3, columns, binades=6) for seed in (0, 1)]
    for part in parts:
        tiny = np.ldexp(part[1:].astype(np.float64), [[-112], [-131]])
        part[1:] = tiny.astype(ml_dtypes.bfloat16)
    weights.scales[...] *= F(2.0**40)
    found = block_scaled.matmul(parts, weights, core="sm_90", k_slices=slices)
    demand_bits(found, np.array([[groups_by_integers(parts, weights, slices, m, n) for n in range(3)] for m in range(3)]))


@pytest.mark.parametrize("rows", [1, 64])
def test_padding_is_zero(rows: int) -> None:
    """96 k in two slices of 64: behind the last k there is no infinity left over from the first slice."""
    weights = random_groups(3, 96, 32, offsets=False)
    weights.integers[:, 40] = 3, -3, 0
    weights.scales[...] = 1
    x = np.zeros((rows, 96), ml_dtypes.bfloat16)
    x[:, 40] = np.inf
    found = block_scaled.matmul([x], weights, core="sm_90", k_slices=2)
    assert bits(found).tolist() == [[0x7F800000, 0xFF800000, 0x7FFFFFFF]] * rows


@pytest.mark.parametrize(("threads", "columns", "jobs"), [(None, 512, 1), (1, 1025, 2), (4, 1300, 4), (8, 384, 3), (8, 1024, 8)])
def test_columns_are_shared_among_threads(threads: int | None, columns: int, jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """128 to 1,024 columns at a time; what is done is told after each."""
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    weights = random_groups(columns, 32, 32, offsets=False)
    told: list[float] = []
    block_scaled.matmul([random_bf16(0, 1, 32)], weights, core="sm_90", k_slices=1, progress=told.append)
    assert told == [done / jobs for done in range(1, jobs + 1)]


# the exponential


def test_the_ends_of_ex2() -> None:
    exact = np.arange(-126, 128)
    assert exponential.ex2(exact.astype(F)).tolist() == [2.0**n for n in exact.tolist()]
    beyond = np.array([-126.00001, -126.5, -127, -127.5, -149, -np.inf, 128, 128.5, np.inf, np.nan, -np.nan], F)
    assert bits(exponential.ex2(beyond)).tolist() == [0] * 6 + [0x7F800000] * 3 + [0x7FFFFFFF] * 2
    near = np.array([-125.9, -125.5, -125.0001, 127.9, 0.9999], F)
    correct = (2.0 ** near.astype(np.float64)).astype(F)
    units = bits(exponential.ex2(near)).astype(np.int64) - bits(correct).astype(np.int64)
    assert np.abs(units).max() <= 1  # what the H200's differ by at the most (data/ex2.json)


def test_where_the_reduction_steps() -> None:
    """Beside the multiples of ln 2, by fractions: how many whole powers of two are taken out."""
    centres = np.array([n * math.log(2) for n in range(-125, 126)], F)
    constant = Fraction(float(np.uint32(0x3BBB989D).view(F)))
    x = np.concatenate([(bits(centres) + np.uint32(step & 0xFFFFFFFF)).view(F) for step in range(-4, 5)])
    x = x[np.abs(x) > 0.1]
    expected = [int(Fraction(float(round_to_float32(Fraction(value) * constant + Fraction(1, 2)))) * 252) for value in x.tolist()]
    assert exponential._steps(x).tolist() == expected


def test_misuse_of_the_exponential() -> None:
    with pytest.raises(TypeError, match="x has dtype float64; needed is float32"):
        exponential.expf(np.zeros(3))
    for mode in ("another", "truncate"):
        with pytest.raises(ValueError, match=f"data/ex2.json states the rule '{mode}'; known is 'complement'"):
            exponential._cut_off(np.zeros(3), exponential._Rule(23, mode))


# llama.cpp's products


def test_more_columns_than_are_taken_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 64)).astype(F)
    content = {"integers": rng.integers(-128, 128, (7, 64)).astype(np.int8), "d": rng.random((7, 2), F)}
    parts = [{name: one[n : n + 1] for name, one in content.items()} for n in range(7)]
    alone = np.concatenate([q8_1.matmul(x, "Q8_0", part) for part in parts], axis=1)
    monkeypatch.setattr(q8_1, "_COLUMNS_AT_A_TIME", 3)
    told: list[float] = []
    demand_bits(q8_1.matmul(x, "Q8_0", content, told.append), alone)
    assert told == [1.0]
