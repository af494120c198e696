"""Which order cuBLAS takes for attention's products of each size: python3 -m tests.golden.record_attention --out FOLDER

Nothing of cufuse takes part. record_orders.py found the kinds of orders, by probing every pair of terms; here a few pairs tell
them apart for every number of keys up to 2,400 (one query) and for prompts, at 4 to 256 products (batch times heads). An order of
none of the known kinds is listed by name and counts as tensor-core blocks.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .record import DEVICE, versions

HEAD_DIM, LARGE = 128, 2.0**40
PRODUCTS = (4, 8, 16, 32, 64, 128, 256)
KEYS = range(1, 2401)
PROMPTS = (*range(2, 301), *range(301, 2400, 31), *range(302, 2400, 62), 1023, 1025, 1026, 2047, 2049, 2050)
# lanes, vector, ascending, tile, block: as cufuse.emulation.attention_products.Order; the first that explains the counts is taken
LANES = tuple(
    (*lanes, 0, 16)
    for lanes in (
        (32, 4, False), (16, 8, False), (32, 1, False), (32, 16, False), (16, 1, True), (8, 1, False), (16, 1, False),
        (2, 0, True), (4, 1, False), (64, 1, False), (32, 8, False), (32, 2, False), (64, 4, False), (128, 1, False),
        (16, 4, False), (8, 4, False), (32, 0, False), (8, 0, False), (8, 64, False), (4, 0, False), (4, 64, False),
        (4, 0, True), (2, 1, True),
    )
)  # fmt: skip
BLOCKS = tuple((0, 0, False, *blocks) for blocks in ((32, 16), (64, 16), (128, 16), (256, 16), (32, 8), (0, 16), (0, 8), (16, 16)))


def orders_of(kind: str, queries: int) -> tuple[tuple[Any, ...], ...]:
    """What is looked for: 128 terms have no incomplete first tile; several rows of weights are added by lanes nowhere in cufuse."""
    blocks = tuple(one for one in BLOCKS if kind == "values" or not one[3])
    if queries == 1:
        return (*LANES, *blocks)
    return (*blocks, *LANES) if kind == "scores" else blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--products", type=int, nargs="*", default=PRODUCTS)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    unknown: Unknown = []
    tables: dict[str, dict[str, Any]] = {"single_query": {}, "several_queries": {}}
    for products in arguments.products:
        for name, sizes in (("single_query", KEYS), ("several_queries", sorted(set(PROMPTS)))):
            runs = tables[name][str(products)] = {kind: {one: [] for one in CLASSES} for kind in ("scores", "values")}
            for keys in sizes:
                queries = 1 if name == "single_query" else keys
                if keys % 8 == 0 or products * queries * keys >= 3e8:
                    continue
                for kind in ("scores", "values"):
                    label = f"{kind}, {products} products, {'one query' if queries == 1 else 'prompts'}"
                    found = explains(kind, products, queries, keys)
                    append(runs[kind][class_of(keys)], keys, orders_of(kind, queries), found, unknown, label)
            print(f"{products} products, {name}: {time.time() - start:.1f} s", flush=True)
    record: dict[str, Any] = versions() | {
        "script": "tests/golden/record_attention.py",
        "meaning": "products -> scores or values -> class of the number of keys (odd, even, four: divisible by 4) -> [first number "
        "of keys, order] up to the next entry's; order: [lanes, vector, ascending, tile, block]; multiples of 8 take blocks of 16. "
        "one_slice: see record_orders.py",
        **tables,
        "one_slice": ["512x256", "256x256", "256x512", "768x256", "256x768", "151936x1024"],
        "not_described": in_runs(unknown),
    }
    (arguments.out / "attention_orders.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    print(f"{len(unknown)} shapes have an order of no known kind: {record['not_described']}", flush=True)


CLASSES = ("odd", "even", "four")


def class_of(keys: int) -> str:
    return "odd" if keys % 2 else "four" if keys % 4 == 0 else "even"


Matches = Callable[[tuple[Any, ...]], bool]
Unknown = list[tuple[str, int]]


def append(runs: list[Any], keys: int, orders: Iterable[tuple[Any, ...]], matches: Matches, unknown: Unknown, label: str) -> None:
    """A new run where the last one's order does not explain the counts any more."""
    if runs and matches(tuple(runs[-1][1])):
        return
    found = next((order for order in orders if matches(order)), None)
    if found is None:
        unknown.append((label, keys))
    else:
        runs.append([keys, list(found)])


def in_runs(unknown: Unknown) -> dict[str, list[list[int]]]:
    """First and last numbers of keys, by what was multiplied; a run goes on over the multiples of 8 between."""
    found: dict[str, list[list[int]]] = {}
    for label, keys in unknown:
        runs = found.setdefault(label, [])
        if runs and keys - runs[-1][1] <= 2:
            runs[-1][1] = keys
        else:
            runs.append([keys, keys])
    return found


@functools.cache
def probes(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (i, j), and the rows [pairs, n] with +LARGE at i, -LARGE at j and at most 256 ones elsewhere."""
    near = [(0, 1), (0, 2), (0, 3), (0, 4), (0, 8), (0, 16), (0, 32), (0, 64), (0, 128)]
    chosen = [*near, (0, n - 1), (1, n // 2), (3, n - 2), (n // 3, n // 2), (n // 2 - 1, n // 2)]
    if n <= 16:  # few keys leave few differences between orders: every pair
        chosen = [(i, j) for j in range(n) for i in range(j)]
    pairs = np.array(sorted({(min(p), max(p)) for p in chosen if 0 <= min(p) < max(p) < n}))
    rows = np.zeros((len(pairs), n), np.float32)
    rows[:, :: -(-n // 256)] = 1
    rows[np.arange(len(pairs)), pairs[:, 0]], rows[np.arange(len(pairs)), pairs[:, 1]] = LARGE, -LARGE
    return pairs, rows


@functools.cache
def by_lanes(n: int, lanes: int, vector: int, ascending: bool) -> tuple[float, ...]:
    """What an order by lanes makes of the probes."""
    _, rows = probes(n)
    vector = vector or -(-n // lanes)
    steps = -(-n // (lanes * vector))
    terms = np.zeros((len(rows), steps * lanes * vector), np.float32)
    terms[:, :n] = rows
    terms = terms.reshape(len(rows), steps, lanes, vector).swapaxes(1, 2).reshape(len(rows), lanes, -1)
    sums = np.zeros(terms.shape[:-1], np.float32)
    for k in range(terms.shape[-1]):
        sums += terms[..., k]
    if ascending:
        total = sums[:, 0].copy()
        for lane in range(1, lanes):
            total += sums[:, lane]
        return tuple(total.tolist())
    while sums.shape[-1] > 1:
        half = sums.shape[-1] // 2
        sums = sums[:, :half] + sums[:, half:]
    return tuple(sums[:, 0].tolist())


@functools.cache
def by_blocks(n: int, tile: int, block: int) -> tuple[float, ...]:
    """What blocks make of the probes: ones behind the block of the second term."""
    pairs, _ = probes(n)
    first = n % tile if tile else 0
    ends = np.empty(n, int)
    for start, stop in ((0, first), (first, n)):
        for k in range(start, stop, block):
            ends[k : min(k + block, stop)] = min(k + block, stop)
    ones = np.concatenate([[0], np.cumsum(np.arange(n) % -(-n // 256) == 0)])
    return tuple(float(ones[n] - ones[ends[j]]) for _, j in pairs)


def counts(kind: str, products: int, queries: int, keys: int) -> tuple[float, ...]:
    """The probes through torch.matmul: as key rows for scores, as columns of V for weights times V."""
    n = HEAD_DIM if kind == "scores" else keys
    _, rows = probes(n)
    held = torch.from_numpy(rows).to(DEVICE).to(torch.bfloat16)
    if kind == "scores":
        q = torch.ones((1, queries, products, n), dtype=torch.bfloat16, device=DEVICE).transpose(1, 2)
        found: list[float] = []
        for start in range(0, len(rows), keys):
            part = held[start : start + keys]
            k = part.new_ones((1, products, keys, n))
            k[:, :, : len(part)] = part
            found += torch.matmul(q, k.transpose(2, 3))[0, 0, 0, : len(part)].tolist()
        return tuple(found)
    weights = torch.ones((1, products, queries, keys), dtype=torch.bfloat16, device=DEVICE)
    values = torch.ones((1, products, keys, HEAD_DIM), dtype=torch.bfloat16, device=DEVICE)
    values[:, :, :, : len(rows)] = held.T
    return tuple(torch.matmul(weights, values)[0, 0, 0, : len(rows)].tolist())


def explains(kind: str, products: int, queries: int, keys: int) -> Matches:
    """Whether an order gives the counts that are measured here."""
    n = HEAD_DIM if kind == "scores" else keys
    if n == 1:
        return lambda order: True
    measured = counts(kind, products, queries, keys)
    return lambda order: (by_lanes(n, *order[:3]) if order[0] else by_blocks(n, *order[3:])) == measured


if __name__ == "__main__":
    main()
