"""Find out in which order cuBLAS adds up attention's products: python3 -m tests.golden.record_orders --out FOLDER

Nothing of cufuse takes part. A sum of ones to which +2**40 is added as term i and -2**40 as term j keeps just those ones that
enter after the two have met: how many, for all pairs (i, j), gives away the tree of additions (as FPRev does, arXiv 2411.00442).
Probed are

- scores, q k^T over the 128 elements of a head, for one query (decoding) and for as many queries as keys (a prompt);
- weights times V over the keys, likewise;
- projections of the small model (small_model.py) and of Qwen3-0.6B: in which of K's slices a term lies.

orders.xz holds the different counts once each, one byte a pair; orders.json which shape gave which; kernels.json names the kernels.
attention.safetensors: products of random numbers, one digest a head, to compare an emulation with.
"""

import argparse
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from . import inputs
from .record import DEVICE, to_gpu, to_numpy, versions

HEAD_DIM = 128
LARGE = 2.0**40
DECODE_KEYS = {
    (1, 4): (*range(1, 161), 191, 192, 193, 255, 256, 257, 300, 384, 511, 512, 513, 1024, 1025),
    (4, 4): (*range(1, 81), 96, 127, 128, 129, 160, 192, 256, 257, 300, 512, 513),
    (1, 16): (*range(1, 41), 48, 63, 64, 65, 100, 127, 128, 129, 256, 257, 512, 513, 1024, 1025, 2048),
    (8, 16): (*range(1, 21), 32, 48, 64, 65, 100, 128, 129, 256, 257, 512, 513, 1024, 1025),
}
"""Numbers of keys by (batch, query heads)."""
PROMPTS = {
    (1, 4): (
        *range(2, 41), 47, 48, 49, 63, 64, 65, 72, 96, 97, 100, 104, 112, 120, 127, 128, 129, 130, 136, 192, 200, 256, 257, 300,
        512,
    ),
    (4, 4): (*range(2, 21), 32, 48, 64, 65, 100, 128, 129),
    (1, 16): (2, 3, 7, 8, 9, 13, 16, 17, 33, 48, 64, 65, 100, 128, 129, 256, 257, 512, 1024, 1025, 2048),
}  # fmt: skip
SMALL = ((512, 256), (256, 256), (256, 512), (768, 256), (256, 768))
BIG = ((2048, 1024), (1024, 1024), (1024, 2048), (3072, 1024), (1024, 3072), (151936, 1024))
SMALL_ROWS = (*range(1, 34), 44, 48, 52, 64, 100, 128, 129, 130, 256, 512)
BIG_ROWS = (*range(1, 18), 32, 48, 64, 100, 128, 129, 256, 512, 1024, 2048)
RANDOM_KEYS = (1, 2, 3, 7, 8, 13, 16, 31, 32, 33, 48, 64, 65, 100, 129, 200, 256, 300, 513, 1025)


class Kernels:
    """Names of the kernels of each probed shape, through the profiler: a fill before each product marks where it begins."""

    def __init__(self) -> None:
        self.marker = torch.empty(1, device=DEVICE)
        self.labels: list[str] = []
        self.calls: list[Callable[[], Any]] = []

    def add(self, label: str, call: Callable[[], Any]) -> None:
        self.labels.append(label)
        self.calls.append(call)

    def names(self) -> dict[str, list[str]]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
            for call in self.calls:
                self.marker.fill_(0)
                call()
            torch.cuda.synchronize()
        events = [event for event in recorded.events() if "cuda" in str(event.device_type).lower() and event.name]
        events.sort(key=lambda event: event.time_range.start)
        groups: list[list[str]] = []
        for event in events:
            if "FillFunctor" in event.name:
                groups.append([])
            elif groups and "memcpy" not in event.name.lower() and "memset" not in event.name.lower():
                groups[-1].append(event.name[:120])
        return dict(zip(self.labels, groups, strict=False)) | {"shapes, groups": [str(len(self.labels)), str(len(groups))]}


class Orders:
    """The different lists of counts, each once."""

    def __init__(self) -> None:
        self.known: dict[bytes, int] = {}
        self.blobs: list[bytes] = []

    def number(self, counts: np.ndarray) -> int:
        data = np.ascontiguousarray(counts, np.uint8).tobytes()
        if data not in self.known:
            self.known[data] = len(self.blobs)
            self.blobs.append(data)
        return self.known[data]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    orders, kernels, shapes = Orders(), Kernels(), {}
    for kind, table in (("decode", DECODE_KEYS), ("prompt", PROMPTS)):
        for (batch, heads), lengths in table.items():
            for keys in lengths:
                queries = 1 if kind == "decode" else keys
                label = f"{kind}, batch {batch}, heads {heads}, keys {keys}"
                shapes[label] = attention(batch, heads, queries, keys, orders, kernels, label)
            print(f"{kind}, batch {batch}, heads {heads}: {len(orders.blobs)} orders, {time.time() - start:.1f} s", flush=True)
    for name, sizes, rows in (("small", SMALL, SMALL_ROWS), ("0.6b", BIG, BIG_ROWS)):
        for n, k in sizes:
            for m in rows:
                shapes[f"linear, {m} x {k} x {n}"] = linear(m, n, k, orders, kernels)
        print(f"projections, {name}: {len(orders.blobs)} orders, {time.time() - start:.1f} s", flush=True)
    digests = random_products()
    safetensors.numpy.save_file(digests, arguments.out / "attention.safetensors", metadata=versions())
    print(f"random products: {time.time() - start:.1f} s", flush=True)
    (arguments.out / "orders.xz").write_bytes(lzma.compress(b"".join(orders.blobs), preset=6))
    record: dict[str, Any] = versions() | {"script": "tests/golden/record_orders.py", "sizes": [len(b) for b in orders.blobs]}
    record["shapes"] = shapes
    (arguments.out / "orders.json").write_text(json.dumps(record, separators=(",", ":")) + "\n")
    (arguments.out / "kernels.json").write_text(json.dumps(kernels.names(), indent=1) + "\n")
    print(f"{len(orders.blobs)} orders, {sum(record['sizes'])} counts, {time.time() - start:.1f} s", flush=True)


def pairs(n: int) -> np.ndarray:
    """Probed pairs (i, j), i < j, in order: all up to 200 terms, beyond those with one of a few first terms."""
    i, j = np.triu_indices(n, 1)
    if n > 200:
        kept = np.isin(i, (0, 1, 2, 8, 16, 64, n // 2))
        i, j = i[kept], j[kept]
    return np.stack([i, j], axis=1)


def ones(n: int) -> torch.Tensor:
    """At most 256 ones, evenly spread, so that bfloat16 can count them; zeros elsewhere."""
    row = torch.zeros(n, dtype=torch.bfloat16, device=DEVICE)
    row[:: -(-n // 256)] = 1
    return row


def probes(n: int, chosen: np.ndarray, at_least: int) -> torch.Tensor:
    """One row of n terms for each pair, the last repeated up to a multiple of ``at_least`` rows."""
    count = -(-len(chosen) // at_least) * at_least
    index = torch.from_numpy(chosen[np.minimum(np.arange(count), len(chosen) - 1)]).to(DEVICE)
    rows = ones(n).repeat(count, 1)
    rows.scatter_(1, index[:, :1], LARGE)
    rows.scatter_(1, index[:, 1:], -LARGE)
    return rows


def attention(batch: int, heads: int, queries: int, keys: int, orders: Orders, kernels: Kernels, label: str) -> dict[str, Any]:
    """Numbers of the orders of scores and of weights times V; whether all rows of queries agree."""
    found: dict[str, Any] = {}
    # laid out as transformers lays them out: queries as a transposed view, keys and values contiguous
    q = ones(HEAD_DIM).repeat(batch, queries, heads, 1).transpose(1, 2)
    q.fill_(1)
    rows = probes(HEAD_DIM, pairs(HEAD_DIM), batch * heads * keys).view(-1, batch, heads, keys, HEAD_DIM)
    products = [torch.matmul(q, one.transpose(2, 3)) for one in rows]  # each [batch, heads, queries, keys]
    found["scores"] = summary(torch.stack(products), len(pairs(HEAD_DIM)), orders)
    kernels.add(f"scores, {label}", lambda: torch.matmul(q, rows[0].transpose(2, 3)))
    if keys > 1:
        weights = torch.ones(batch, heads, queries, keys, dtype=torch.bfloat16, device=DEVICE)
        columns = probes(keys, pairs(keys), batch * heads * HEAD_DIM).view(-1, batch, heads, HEAD_DIM, keys)
        values = columns.transpose(3, 4).contiguous()
        products = [torch.matmul(weights, one) for one in values]
        found["values"] = summary(torch.stack(products), len(pairs(keys)), orders)
        kernels.add(f"values, {label}", lambda: torch.matmul(weights, values[0]))
    return found


def summary(products: torch.Tensor, count: int, orders: Orders) -> list[Any]:
    """The order's number, and whether every query's row shows the same."""
    alike = bool((products == products[..., :1, :]).all())
    counts = products[..., 0, :].reshape(-1)[:count].float().cpu().numpy()
    if not ((counts >= 0) & (counts <= 255) & (counts == np.floor(counts))).all():
        return ["no counts", sorted(set(counts.tolist()))[:20]]
    return [orders.number(counts), alike]


def linear(m: int, n: int, k: int, orders: Orders, kernels: Kernels) -> int:
    """Term 0 against every 16th term and a few others: the counts fall where a slice of K ends."""
    j = np.unique(np.concatenate([[1, 2, 3, 7], np.arange(8, k, 16)]))
    chosen = np.stack([np.zeros_like(j), j], axis=1)
    weight = torch.ones(n, k, dtype=torch.bfloat16, device=DEVICE)
    rows = probes(k, chosen, m).view(-1, m, k)
    products = torch.stack([torch.nn.functional.linear(one, weight)[:, 0] for one in rows])
    kernels.add(f"linear, {m} x {k} x {n}", lambda: torch.nn.functional.linear(rows[0], weight))
    return orders.number(products.reshape(-1)[: len(chosen)].float().cpu().numpy())


def random_operands(batch: int, heads: int, queries: int, keys: int) -> dict[str, np.ndarray]:
    seed = inputs.seed_of("attention", batch, heads, queries, keys)
    return {
        "q": inputs.heavy((batch, heads, queries, HEAD_DIM), seed),
        "k": inputs.heavy((batch, heads, keys, HEAD_DIM), seed + 1),
        "weights": inputs.bell((batch, heads, queries, keys), seed + 2, 0.1),
        "v": inputs.heavy((batch, heads, keys, HEAD_DIM), seed + 3),
    }


def random_products() -> dict[str, np.ndarray]:
    """Scores and attended values of random operands: one digest for each batch and head; and all bits of the first head."""
    found = {}
    for batch, heads in DECODE_KEYS:
        for keys in RANDOM_KEYS:
            if batch * heads * keys > 9000:
                continue
            given = {name: to_gpu(value) for name, value in random_operands(batch, heads, 1, keys).items()}
            scores = torch.matmul(given["q"], given["k"].transpose(2, 3))
            attended = torch.matmul(given["weights"], given["v"])
            for name, value in (("scores", scores), ("attended", attended)):
                rows = to_numpy(value).reshape(batch * heads, -1)
                key = f"{name}/batch{batch}_heads{heads}_keys{keys}"
                found[f"{key}/digest"] = inputs.row_digests(rows)
                found[f"{key}/first"] = rows[0].view(np.uint16)
    return found


if __name__ == "__main__":
    main()
