"""A projection with head norm and rotation in its shadow (kernels/linear_heads_sm90.cu) on the CPU, bit for bit the emulation.

Threads run in random order, copies arrive and products read shared memory at random times (kernels_on_host/), so that the sharing
of the ring between stages and tables, and of registers between two tiles, is tested as well as indices and roundings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_heads, _gpu_linear, _gpu_linear_heads, compiler
from cufuse._gpu_heads import Block, dense
from cufuse._linear_problem import Problem
from cufuse.bf16 import bfloat16, nearest
from cufuse.emulation import tensor_core
from cufuse.emulation.rsqrt import rsqrt
from cufuse.emulation.sums import mean_of_squares
from cufuse.norm import normalise, reciprocal_rms
from cufuse.rope import rotate
from tests.golden import inputs
from tests.linear_on_host import COMPILER, HostGpu, KernelFailure, demand_noticed
from tests.test_device_path import RECIPES
from tests.test_linear_host import aligned
from tests.witnesses import demand_bits, same_bits

D = 128
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="g++ is needed to run a kernel's text on the host")


@dataclass(frozen=True)
class Case:
    """A block on a machine of some multiprocessors.

    gap : elements between q, k and v in one buffer; None for three arrays.
    touchy : every head shows whether its sum is taken in order, or in this other one.
    """

    m: int
    heads: int
    kv_heads: int
    k: int
    tile_n: int
    recipe: str = "torch"
    head_norm: bool = True
    rotation: bool = True
    gap: int | None = None
    pad: int = 0
    multiprocessors: int = 3
    weights_ready: bool = True
    eps: float | None = None
    touchy: str | None = None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels_on_host")


@pytest.fixture
def gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostGpu]:
    machine = HostGpu(folder)
    machine.install(monkeypatch)
    return machine


def copied(values: np.ndarray, pad: int = 0) -> np.ndarray:
    """The same at a multiple of 16 bytes, rows ``pad`` elements further apart than they are long."""
    rows = values.reshape(-1, values.shape[-1])
    result = aligned(rows.shape, bfloat16, pad)
    result[...] = rows
    return result


# columns of a head in other orders: within a vector of four, and vectors
_COLUMNS = np.arange(D).reshape(32, 4)
OTHER_ORDERS = {
    "neighbours": _COLUMNS[:, [1, 0, 3, 2]],
    "pairs": _COLUMNS[:, [2, 3, 0, 1]],
    "vectors": _COLUMNS.reshape(2, 2, 2, 2, 2, 4).transpose(4, 3, 2, 1, 0, 5),
}


def touchy_head(order: str) -> tuple[np.ndarray, float]:
    """A head [D] and an eps: the factor r lies next to the middle between two bfloat16, and on its other side as soon as the sum of
    squares is a little larger, as it is in one of OTHER_ORDERS."""
    rng = np.random.default_rng(1)
    while True:
        # one vector outweighs the others, so that the order in it shows too
        powers = rng.integers(0, 6, D) + 6 * (np.arange(D) // 4 != 5)
        head = nearest(np.ldexp(rng.standard_normal(D), -powers).astype(np.float32)).astype(np.float32)
        head[::32] = 2.0**-8  # shows r as it is
        rows = np.stack([head, head[OTHER_ORDERS[order].reshape(-1)]])
        mean, other = mean_of_squares(rows, "torch-mean", mean="reciprocal")
        if other > mean and np.frexp(mean)[0] < 0.9:
            break
    variance = mean + np.spacing(mean) * np.arange(1 << 18, dtype=np.float32)
    sides = nearest(rsqrt(variance, "correct")).view(np.uint16)
    at = int(np.flatnonzero(sides[1:] != sides[:-1])[0])
    return head.astype(bfloat16), float(variance[at] - mean)


def make(case: Case, seed: int) -> dict[str, Any]:
    """Inputs: rows and weights of every size, so that heads are."""
    columns = (case.heads + 2 * case.kv_heads) * D
    cos, sin = cufuse.rope_tables(np.arange(case.m), D)
    # halves of a table need not be alike
    sin[:, D // 2 :] = cufuse.rope_tables(np.arange(case.m) + 5, D)[1][:, D // 2 :]
    x = inputs.heavy((case.m, case.k), seed)
    x[3 % case.m] = 0
    x[case.m // 2] *= bfloat16(2.0**-125)
    weight = inputs.bell((columns, case.k), seed + 1, 0.05)
    eps = 1e-6
    if case.touchy is not None:  # each row of x chooses a column of the weight
        head, eps = touchy_head(case.touchy)
        x[...] = np.eye(case.m, case.k)
        weight.reshape(-1, D, case.k)[...] = head[:, None]
    return {
        "eps": case.eps or eps,
        "x": copied(x, case.pad),
        "weight": copied(weight, case.pad),
        "q_weight": copied(inputs.norm_weight(D, seed + 2, 6.0)[None])[0] if case.head_norm else None,
        "k_weight": copied(inputs.norm_weight(D, seed + 3, 96.5)[None])[0] if case.head_norm else None,
        "cos": copied(cos, case.pad) if case.rotation else None,
        "sin": copied(sin, case.pad) if case.rotation else None,
    }


def outputs(case: Case) -> tuple[np.ndarray, list[np.ndarray]]:
    """The memory, and q, k and v in it."""
    counts = [case.heads, case.kv_heads, case.kv_heads]
    if case.gap is None:
        buffers = [aligned((case.m, count * D), bfloat16) for count in counts]
        return buffers[0], [buffer.reshape(case.m, -1, D) for buffer in buffers]
    buffer = aligned((case.m, sum(counts) * D + 3 * case.gap), bfloat16)
    at, views = 0, []
    for count in counts:
        views.append(buffer[:, at : at + count * D].reshape(case.m, count, D))
        assert np.shares_memory(views[-1], buffer)
        at += count * D + case.gap
    return buffer, views


def problem_of(given: dict[str, Any], multiprocessors: int, weights_ready: bool = True) -> Problem:
    x, weight = given["x"], given["weight"]
    whole = dense((len(x), len(weight)), 2)
    problem = _gpu_linear.describe(x, weight, whole, (0, 0, 0), 1, 0, weights_ready=weights_ready)
    assert problem.multiprocessors == multiprocessors
    return problem


def pointer(array: np.ndarray | None) -> int:
    return 0 if array is None else array.ctypes.data


def on_kernel(gpu: HostGpu, case: Case, given: dict[str, Any], seed: int) -> list[np.ndarray]:
    gpu.multiprocessors, gpu.seed = case.multiprocessors, seed
    buffer, outs = outputs(case)
    names = ("q_weight", "k_weight", "cos", "sin")
    source = tuple(dense(out.shape, 2) for out in outs)
    block = Block(source, tuple(outs), *(given[name] for name in names), slots=None, move_v=True)  # type: ignore[arg-type]
    last = _gpu_heads.ends(RECIPES[case.recipe], case.head_norm, case.rotation)
    problem = problem_of(given, case.multiprocessors, case.weights_ready)
    plan = _gpu_linear_heads.Plan(block, last, problem, given["eps"], 0, 0, case.tile_n)
    between = [slice(0, 0)]
    if case.gap:
        ends = np.cumsum([(count * D + case.gap) for count in (case.heads, case.kv_heads, case.kv_heads)])
        between = [slice(end - case.gap, end) for end in ends]
    arrays = [given["x"], given["weight"], *outs, given["cos"], given["sin"], given["q_weight"], given["k_weight"]]
    for prepared, arguments in plan.launches(tuple(map(pointer, arrays))):
        prepared(arguments)
    assert all((buffer[:, gap].view(np.uint16) == 0xA5A5).all() for gap in between), "written beside the outputs"
    return outs


def emulated(case: Case, given: dict[str, Any]) -> list[np.ndarray]:
    """The operations one by one."""
    numerics = RECIPES[case.recipe]
    whole = nearest(tensor_core.matmul(np.ascontiguousarray(given["x"]), np.ascontiguousarray(given["weight"])))
    parts = np.split(whole, np.cumsum([case.heads, case.kv_heads]) * D, axis=1)
    results = [np.ascontiguousarray(part).reshape(case.m, -1, D) for part in parts]
    for index, name in enumerate(("q_weight", "k_weight")):
        if case.head_norm:
            rows = results[index].reshape(-1, D).astype(np.float32)
            results[index] = normalise(rows, given[name], given["eps"], numerics.head_norm).reshape(results[index].shape)
        if case.rotation:
            results[index] = rotate(results[index], given["cos"], given["sin"], numerics.rope)
    return results


def demand_case(gpu: HostGpu, case: Case, seed: int = 1, change: Any = None) -> None:
    given = make(case, seed)
    if change is not None:
        change(given)
    for name, found, expected in zip("qkv", on_kernel(gpu, case, given, seed), emulated(case, given), strict=True):
        demand_bits(found, expected, f"{case}, {name}")


CASES = [
    # a tile straddles q and k, k and v; the last tile of 256 has one head
    Case(130, 3, 1, 1032, 256),
    Case(130, 3, 1, 960, 256),  # as many stages as its heads need, quarters two apart
    Case(130, 3, 1, 1096, 256),  # the same with quarters three apart
    Case(260, 2, 1, 904, 128, pad=8),
    Case(300, 1, 1, 776, 256, rotation=False, gap=8),
    Case(65, 3, 1, 648, 128, pad=8),
    Case(130, 2, 1, 712, 128, weights_ready=False, gap=0),
    Case(256, 1, 2, 712, 128, multiprocessors=2),  # whole tiles; heads without tables between others, and last
    Case(300, 1, 1, 456, 128, rotation=False),
    Case(130, 1, 1, 968, 256, head_norm=False, multiprocessors=1),
    Case(65, 2, 2, 776, 256, head_norm=False, rotation=False, multiprocessors=2),
    Case(130, 2, 1, 968, 256, recipe="torch-rms-norm", multiprocessors=2),
    Case(130, 1, 1, 648, 128, recipe="batch-invariant", multiprocessors=1),
    Case(130, 1, 1, 648, 128, recipe="gemma", multiprocessors=1, eps=2.0**-80),
    *(Case(65, 1, 1, 456, 128, rotation=False, touchy=order) for order in OTHER_ORDERS),
]


WIDE, LAST_ROTATED, NARROW, TOUCHY = CASES[0], CASES[5], CASES[6], CASES[-3:]


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=str)
def test_bits_of_the_emulation(gpu: HostGpu, case: Case) -> None:
    demand_case(gpu, case)


@needs_compiler
def test_rows_that_fill_their_groups(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last tile there is no other, nor rows that a group of tiles could have."""
    monkeypatch.setattr(_gpu_linear_heads, "_GROUP_ROWS", 1)
    demand_case(gpu, NARROW)


@needs_compiler
def test_every_order_of_events_gives_the_same_bits(gpu: HostGpu) -> None:
    for seed in (2, 3, 4):
        demand_case(gpu, WIDE if seed == 2 else NARROW, seed)


@needs_compiler
def test_special_values_stay_in_their_rows(gpu: HostGpu) -> None:
    """NaN, infinities, values beyond bfloat16's range and rows of subnormals, in rows of both of a lane's halves."""

    def special(given: dict[str, Any]) -> None:
        x, weight = given["x"], given["weight"]
        x[1, 7], x[9, 8], x[17, 9] = bfloat16(np.nan), bfloat16(np.inf), bfloat16(-np.inf)
        x[18:22] = bfloat16(1e-38)
        x[22] = bfloat16(3e38)
        weight[::2] = np.abs(weight[::2])
        weight[5, 8] = 0
        given["cos"][30, 3], given["sin"][31, 70] = bfloat16(np.nan), bfloat16(np.inf)

    demand_case(gpu, WIDE, 5, special)


def test_one_order_is_three() -> None:
    """Of 128 bfloat16 values torch's mean, F.rms_norm and either contracted have one sum, unless eps is below 2**-80."""
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << 16, (4000, D), np.uint16)
    # exponents of a row near each other, from the smallest subnormals up
    shifted = (bits & 0x9FF) + (rng.integers(0, 14, (4000, 1), np.uint16) << np.uint16(11))
    rows = np.concatenate([shifted.astype(np.uint16).view(bfloat16), inputs.heavy((500, D), 2), inputs.special_rows(D)])
    # an odd number of 2**-149, and half of one
    tie = np.tile(np.float32([3 * 2.0**-76, 2.0**-75, 0, 0]), 32)
    tie[:4] = np.float32([2.0**-71, 2.0**-73, 2.0**-73, 0])
    rows = np.concatenate([rows.astype(np.float32), tie[None]])
    base = RECIPES["torch"].head_norm
    orders = [
        RECIPES["torch"].derive("one", head_norm={"sum_order": order, "contract": contract}).head_norm
        for order in ("torch-mean", "torch-rms-norm", "nano-vllm")
        for contract in (False, True)
    ]
    for eps in (1e-6, 2.0**-80):
        first = reciprocal_rms(rows, eps, base)
        for other in orders:
            demand_bits(reciprocal_rms(rows, eps, other), first, f"{other.sum_order}, contract {other.contract}, eps {eps}")
    last = [reciprocal_rms(rows[-1:], 0.0, other) for other in orders[2:4]]
    assert last[0] != last[1]


def inlined(source: str) -> str:
    """With its own header's text, so that faults can be planted there."""
    header = (compiler.source_folder() / "head_fragment.cuh").read_text(encoding="utf-8").replace("#pragma once", "")
    return source.replace('#include "head_fragment.cuh"', header)


# the case, and the text that is replaced
FAULTS = {
    "tables not waited for": (NARROW, "barrier_wait(ring.tables_full, quarter & 1);", ""),
    "the last tables not waited for": (
        LAST_ROTATED,
        "barrier_wait(ring.full + place.slot * 8, place.parity);\n                table =",
        "table =",
    ),
    "tables freed too early": (
        NARROW,
        "barrier_wait(ring.tables_full, quarter & 1);",
        "barrier_wait(ring.tables_full, quarter & 1); if (lane() == 0) barrier_arrive(ring.tables_empty);",
    ),
    "tables freed twice": (NARROW, "lane() == 0) barrier_arrive(ring.tables", "lane() < 2) barrier_arrive(ring.tables"),
    "tables never freed": (NARROW, "if (takes_tables && !LAST && lane() == 0) barrier_arrive(ring.tables_empty);", ""),
    "full tables brought again": (NARROW, "barrier_wait(ring.tables_empty, quarter & 1 ^ 1);", ""),
    "tables of the next tile": (
        NARROW,
        "bring_table(false, tile, quarter, ring.tables,",
        "bring_table(false, Tile(a, index + gridDim.x), quarter, ring.tables,",
    ),
    "the last tables over stages in use": (
        LAST_ROTATED,
        "barrier_wait(ring.empty + place.slot * 8, place.parity);\n            barrier_arrive_expecting(barrier, TABLE_BYTES);",
        "barrier_arrive_expecting(barrier, TABLE_BYTES);",
    ),
    "bytes of rows that are not there": (NARROW, "whole ? X_BYTES : a.last_rows * 128", "X_BYTES"),
    "a full ring refilled": (NARROW, "barrier_wait(ring.empty + place.slot * 8, place.parity);", ""),
    "a stage freed too early": (NARROW, "wait_for_products<1>();", "wait_for_products<2>();"),
    "accumulators read too early": (NARROW, "wait_for_products<0>();", ""),
    "buffers written too early": (WIDE, "wait_for_store_reads<0>();", ";"),
    "left before the stores": (NARROW, "if (lane() == 0) wait_for_stores();", ""),
    "the next tile's heads": (NARROW, "finish<false>(step, last, pairs);", "finish<false>(step, Tile(a, index), pairs);"),
    "vectors in another order": (
        TOUCHY[2],
        "return squares(pairs, J);",
        "return squares(pairs, J % 2 * 8 + J / 2 % 2 * 4 + J / 4 % 2 * 2 + J / 8);",
    ),
    "squares in another order": (
        TOUCHY[0],
        "first = odd ? got : kept, second = odd ? kept : got;",
        "first = odd ? kept : got, second = odd ? got : kept;",
    ),
    "the other row's sum": (TOUCHY[1], "{odd ? other : own_factor, odd ? own_factor : other}", "{own_factor, other}"),
    "the wrong half of the sum": (TOUCHY[2], "own.joined(sum, own.tree<1, 2>(pairs))", "own.joined(sum, own.tree<0, 2>(pairs))"),
    "the other half's sign": (NARROW, "upper ? sin : sin ^ 0x80008000u", "upper ? sin ^ 0x80008000u : sin"),
    "the last tile's heads left out": (NARROW, "step < STEPS; ++step) finish<true>(", "step < FIRST_SEND; ++step) finish<true>("),
    "warps in one buffer": (WIDE, "a.buffers_at + warp() * BUFFER_BYTES", "a.buffers_at + warp() / 2 * BUFFER_BYTES"),
    "another swizzle of the tables": (
        NARROW,
        "* 64 + (unit ^ (line / 2 & 3)) * 16;\n            //",
        "* 64 + (unit ^ (line & 3)) * 16;\n            //",
    ),
    "another swizzle": (NARROW, "line * 64 + (unit ^ (line / 2 & 3)) * 16", "line * 64 + (unit ^ (line & 3)) * 16"),
    "q's weight for k": (NARROW, "a.weights_at + which * WEIGHT_BYTES", "a.weights_at"),
}


@needs_compiler
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(gpu: HostGpu, fault: str) -> None:
    case, right, wrong = FAULTS[fault]

    def same(seed: int) -> bool:
        given = make(case, seed)
        return all(map(same_bits, on_kernel(gpu, case, given, seed), emulated(case, given)))

    demand_noticed(gpu, right, wrong, same, inlined)


@needs_compiler
def test_tables_freed_before_their_loads_are_used(gpu: HostGpu) -> None:
    """The bits are right on the host, where a load reads at once; on an H200 up to 902 outputs of ten calls were not."""
    behind_use = "if (takes_tables && !LAST && lane() == 0) barrier_arrive(ring.tables_empty);"
    loads = "load_matrices(sin[i], (table ^ (32 * i)) + TABLE_BYTES);\n            }\n"

    def moved(source: str) -> str:
        assert source.count(behind_use) == source.count(loads) == 1
        return source.replace(behind_use, "").replace(loads, f"{loads}{behind_use}\n")

    gpu.change = moved
    for seed in (1, 2, 3):
        with pytest.raises(KernelFailure, match="may overtake an ldmatrix"):
            on_kernel(gpu, NARROW, make(NARROW, seed), seed)
