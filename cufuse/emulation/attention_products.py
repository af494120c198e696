"""The order of the sums in attention's two products as cuBLAS takes them on an H200, and those sums.

The products go to kernels of three kinds, told apart by probes that give away the tree of additions
(tests/golden/record_orders.py):

- tensor-core blocks of 16, K ascending (nvjet kernels; every product whose sizes are multiples of 8);
- the same with the incomplete tile of K first (CUTLASS kernels, other numbers of keys, two queries or more): the first K mod tile
  terms in blocks of their own, then the others; for large odd numbers of keys the blocks have 8 terms;
- for a single query and a number of keys that 8 does not divide, and for the scores of a few small prompts, matrix-vector kernels
  on float32 units: each of some lanes adds its terms in order by fused multiply-add (bfloat16 products are exact), then the
  lanes are added.
"""

import functools
import json
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import numpy as np

from cufuse.bf16 import bfloat16
from cufuse.emulation import tensor_core
from cufuse.emulation.floats import Float32Array
from cufuse.emulation.sums_parts import halve, in_order

_ONE_THREAD = 1 << 20  # multiply-adds below which threads cost more than they save
_ELEMENTS_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class Order:
    """One order of a sum over k.

    lanes 0: tensor-core blocks of ``block`` terms, the first ``k mod tile`` terms (tile 0: none) in blocks of their own before the
    others.
    lanes T: lane t adds vectors of ``vector`` terms t, t + T, ...; vector 0: t-th of T contiguous parts. The lanes are added by
    halving (T/2, T/4, ... apart), or with ``ascending`` one after the other.
    """

    lanes: int = 0
    vector: int = 0
    ascending: bool = False
    tile: int = 0
    block: int = 16


BLOCKS = Order()


def orders(products: int, queries: int, keys: int) -> tuple[Order, Order]:
    """The orders of q k^T and of weights times V for ``products`` products (batch times query heads) in one call.

    Measured for some numbers of products, told apart by the numbers of keys (odd, even, divisible by 4), as
    ``data/attention_orders.json`` says; between measured sizes the nearest measured one below is taken.
    Several queries were measured as prompts, as many as keys.
    """
    if keys % 8 == 0:
        return BLOCKS, BLOCKS
    table = _record()["several_queries" if queries > 1 else "single_query"]
    counts = sorted(map(int, table))
    runs = table[str(max((count for count in counts if count <= products), default=counts[0]))]
    name = "odd" if keys % 2 else "four" if keys % 4 == 0 else "even"
    scores, values = (Order(*_run(runs[kind][name], keys)) for kind in ("scores", "values"))
    return scores, values


def one_slice(n: int, k: int) -> bool:
    """Whether cuBLAS was found to take one slice of K for this projection at every measured number of rows (up to 512 or 2,048)."""
    return f"{n}x{k}" in _record()["one_slice"]


def multiply(a: np.ndarray, b: np.ndarray, order: Order, core: str) -> Float32Array:
    """a b^T of bfloat16 a [M, K] and b [N, K] in this order, float32, not rounded."""
    depth = a.shape[1]
    if order.lanes:
        return _by_lanes(a, b, order)
    if order.tile and depth % order.tile:
        a, b = (_first_tile_padded(x, depth % order.tile) for x in (a, b))
    threads = 1 if a.size * len(b) < _ONE_THREAD else None
    chosen = tensor_core.TENSOR_CORES[core]
    if order.block < chosen.terms:
        chosen = replace(chosen, name=f"{core}, blocks of {order.block}", terms=order.block)
    return tensor_core.matmul(a, b, core=chosen, threads=threads)


def _first_tile_padded(x: np.ndarray, first: int) -> np.ndarray:
    """Zeros behind the first terms up to a multiple of 16: a block of zeros, or zeros in a block, changes no accumulator."""
    padded = np.zeros((len(x), x.shape[1] + -first % 16), bfloat16)
    padded[:, :first] = x[:, :first]
    padded[:, first + -first % 16 :] = x[:, first:]
    return padded


def _by_lanes(a: np.ndarray, b: np.ndarray, order: Order) -> Float32Array:
    result = np.empty((len(a), len(b)), np.float32)
    depth = a.shape[1]
    vector = order.vector or -(-depth // order.lanes)
    steps = -(-depth // (order.lanes * vector))
    rows = max(1, _ELEMENTS_AT_A_TIME // max(1, depth))
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for row, left in enumerate(a.astype(np.float32)):
            for start in range(0, len(b), rows):
                part = b[start : start + rows].astype(np.float32)
                terms = np.zeros((len(part), steps * order.lanes * vector), np.float32)
                np.multiply(part, left, out=terms[:, :depth])  # exact: a fused multiply-add rounds the sum alone
                by_lane = terms.reshape(len(part), steps, order.lanes, vector).swapaxes(1, 2)
                sums = in_order(np.zeros((), np.float32) + by_lane.reshape(len(part), order.lanes, -1))
                result[row, start : start + rows] = in_order(sums) if order.ascending else halve(sums)[:, 0]
    return result


def _run(runs: list[list[Any]], keys: int) -> tuple[Any, ...]:
    """The order of the last run that begins at or below this number of keys, of the first one if none does; blocks without runs."""
    return next((tuple(order) for first, order in reversed(runs) if first <= keys), tuple(runs[0][1]) if runs else ())


@functools.cache
def _record() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(resources.files("cufuse.emulation").joinpath("data/attention_orders.json").read_text())
    return record
