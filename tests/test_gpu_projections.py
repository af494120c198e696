"""``linear`` on a GPU against ``F.linear``: every projection of every Qwen3, and shapes that fit no tile, at every number of rows.

Operands are made on the GPU, and results are compared where they are.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

import cufuse
from cufuse import cublaslt
from cufuse.bf16 import bfloat16
from tests import gpu_support
from tests.gpu_support import COMPARED, codes, given_by, rehearse, values

pytestmark = gpu_support.MARKS

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 777, 2048, 4096)

HEAD = 128
KEY_VALUE_HEADS = 8
MODELS = {
    "0.6B": (1024, 16, 3072),
    "1.7B": (2048, 16, 6144),
    "4B": (2560, 32, 9728),
    "8B": (4096, 32, 12288),
    "14B": (5120, 40, 17408),
    "32B": (5120, 64, 25600),
}
"""Hidden size, query heads, size between the projections of the MLP: Qwen3's config.json on Hugging Face."""


def projections(hidden: int, heads: int, between: int) -> dict[str, tuple[int, int]]:
    """(K, N) of every projection of a layer; k and v are alike, and so are gate and up."""
    queries, keys = heads * HEAD, KEY_VALUE_HEADS * HEAD
    return {
        "q": (hidden, queries),
        "k, v": (hidden, keys),
        "packed q, k, v": (hidden, queries + 2 * keys),
        "o": (queries, hidden),
        "gate, up": (hidden, between),
        "down": (between, hidden),
    }


PROJECTIONS = sorted({shape for model in MODELS.values() for shape in projections(*model).values()})

ODD = (
    (1000, 8), (1000, 1000), (1000, 1024), (1000, 4096), (4096, 1000), (1024, 1000), (5120, 1000),
    (1024, 8), (4096, 8), (5120, 8), (12288, 8), (96, 8), (96, 96), (96, 1000), (96, 1024), (96, 4096),
)  # fmt: skip
"""(K, N): K = 1000, N = 8, N = 1000 and K = 96 with usual counterparts and with each other. All are multiples of 8."""

UNALIGNED = ((1, 8), (1, 1024), (1, 1), (7, 5), (4096, 1), (1000, 1), (4096, 33), (1001, 33))
"""(K, N) whose rows do not all begin at multiples of 16 bytes: cuBLAS has kernels of their own for them."""

WINDOWS = 256
"""So many blocks of rows, at most, are compared for every M of an unaligned shape: small products have few outputs each."""

# The orders of those kernels, found by masking (Xie et al., FPRev, 2024) with torch 2.11 and cuBLAS 13.1 on an H200
DOT = (
    "dot_kernel, reduce_1Block_kernel: float32 additions; in 256 of K thread t of 128 adds k = 2t and 2t + 1, then thread t takes "
    "t + 64, t + 32, ... t + 1; the 256 are added by their number modulo 4, upward, then these four, upward"
)
SMALL = (
    "gemmSN_TN_kernel: float32 additions; in 256 of K lane l of 16 adds k = l, l + 16, ... upward, and the sum to that of the 256 "
    "before; then lanes 0 to 15, upward"
)
VECTOR = (
    "gemvx::kernel: float32 additions; lane l of 32 adds k = l, l + 32, ... upward, "
    "then lane l takes l + 16, l + 8, l + 4, l + 2, l + 1"
)
STEPS_OF_8 = (
    "cutlass_75_tensorop_s1688gemm align1, splitKreduce_kernel: tensor-core steps of 8, not 16, and slices of 16 (K 1001, M 2) or "
    "64 (K 4096, M 2), where ours are multiples of 64"
)

KNOWN_DIFFERENT: dict[tuple[int, int], dict[int, str]] = {
    (1001, 33): {1: DOT, 8: SMALL, 16: SMALL, **dict.fromkeys((2, 4, 32, 64, 128, 256, 777, 2048, 4096), STEPS_OF_8)},
    (4096, 33): {1: DOT, 8: SMALL, 16: SMALL, **dict.fromkeys((2, 4, 32, 64, 128, 256, 777, 2048, 4096), STEPS_OF_8)},
    (4096, 1): {**dict.fromkeys((1, 2, 4), DOT), 777: VECTOR},
    (1000, 1): {**dict.fromkeys((1, 2, 4), DOT), 777: VECTOR},
    (7, 5): dict.fromkeys((8, 16), SMALL),
}
"""(K, N) -> M -> why F.linear has other bits there. One that has come to be equal fails too."""

MAY_BE_EQUAL: dict[tuple[int, int], dict[int, str]] = {
    (7, 5): {1: "a float32 sum of 7 products has other bits than a tensor-core step in about 4 of 10,000 outputs"},
}
"""(K, N) -> M -> why F.linear's order may be another without a difference in what is compared: counted, not demanded."""


@pytest.fixture(scope="module")
def _compiled() -> Iterator[None]:
    """Every kernel's machine code, made on all cores; at the end the memory is given back."""
    gpu = gpu_support.cupy()

    def product(m: int, n: int, k: int) -> None:
        cufuse.linear(gpu.empty((m, k), bfloat16), gpu.empty((n, k), bfloat16))

    rehearse(partial(product, m, n, k) for k, n in (*PROJECTIONS, *ODD, *UNALIGNED) for m in ROWS)
    yield
    gpu.get_default_memory_pool().free_all_blocks()
    gpu_support.torch().cuda.empty_cache()


def cancel(x: Any, weight: Any) -> None:
    """Make half of the products, in random places, the negatives of the others: an output is then what the roundings on the way
    have left, so that nearly every one shows another order of the sum. On other data about one in a thousand does. Of an odd
    number of products one is 0."""
    torch, k = gpu_support.torch(), x.shape[1]
    order = torch.randperm(k, generator=torch.Generator(device="cuda").manual_seed(k), device="cuda")
    some, others = order[: k // 2], order[k // 2 : k // 2 * 2]
    for array, sign in ((x, 1), (weight, -1)):
        tensor = gpu_support.to_torch(array)
        tensor[:, others] = tensor[:, some] * sign
        if k > 1:
            tensor[:, order[k // 2 * 2 :]] = 0


def deviations(area: str, shape: tuple[int, int], windows: int = 1) -> list[str]:
    """What is not as F.linear's bits or the lists above demand, at every number of rows; what is equal is counted."""
    k, n = shape
    x, weight = values((max(ROWS), k), 1), values((n, k), 2)
    compared = {m: 2 * m * n * min(windows, len(x) // m) for m in ROWS}
    differing = differing_outputs(x, weight, windows)
    cancel(x, weight)
    differing += differing_outputs(x, weight, windows)
    found = []
    for m in ROWS:
        different = KNOWN_DIFFERENT.get(shape, {}).get(m)
        undecided = MAY_BE_EQUAL.get(shape, {}).get(m)
        share = f"K {k}, N {n}, M {m}: {differing[m]:,} of {compared[m]:,} differ"
        if different is not None:
            if not differing[m]:
                found.append(f"{share}, but listed as different: take it off KNOWN_DIFFERENT ({different})")
        elif not differing[m]:
            COMPARED[area] += compared[m]
        elif undecided is not None:
            print(f"{share}, not demanded: {undecided}")
        else:
            found.append(f"{share}; {cublaslt.k_slices(m, n, k)} slices, F.linear ran {kernels_of_f_linear(x[:m], weight)}")
    return found


def differing_outputs(x: Any, weight: Any, windows: int) -> Counter[int]:
    """For every number of rows how many outputs have other bits than F.linear's, over so many blocks of rows as there are, at
    most ``windows``. Results are written to poisoned memory."""
    gpu, count = gpu_support.cupy(), Counter[int]()
    for m in ROWS:
        total = gpu.zeros((), int)
        for first in range(0, len(x) // m * m, m)[:windows]:
            # a copy begins at an aligned address, as the first rows do: cuBLAS asks for that
            rows = x[first : first + m].copy() if first else x[:m]
            out = gpu.empty((m, len(weight)), bfloat16)
            codes(out).fill(0xA5A5)
            cufuse.linear(rows, weight, out=out)
            expected = given_by(gpu_support.torch().nn.functional.linear, rows, weight)
            assert (out.shape, out.dtype) == (expected.shape, expected.dtype)
            total += gpu.count_nonzero(codes(out) != codes(expected))
        count[m] = int(total)
    return count


def kernels_of_f_linear(x: Any, weight: Any) -> str:
    """Names of the kernels that F.linear launches, for a failure's text."""
    torch = gpu_support.torch()
    profiler = torch.profiler
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profiler.profile(activities=[profiler.ProfilerActivity.CPU, profiler.ProfilerActivity.CUDA]) as profile:
            given_by(torch.nn.functional.linear, x, weight)
            torch.cuda.synchronize()
    launched = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return " + ".join(name.removeprefix("void ")[:70] for name in dict.fromkeys(launched)) or "what the profiler did not see"


def demand_none(found: list[str]) -> None:
    if found:
        pytest.fail("linear against F.linear:\n  " + "\n  ".join(found))


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("shape", PROJECTIONS, ids=lambda shape: f"K{shape[0]}-N{shape[1]}")
def test_every_projection_of_qwen3(shape: tuple[int, int]) -> None:
    demand_none(deviations("projection, F.linear", shape))


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("shape", ODD, ids=lambda shape: f"K{shape[0]}-N{shape[1]}")
def test_odd_shapes(shape: tuple[int, int]) -> None:
    demand_none(deviations("projection, odd shapes", shape))


@pytest.mark.usefixtures("_compiled")
def test_unaligned_shapes() -> None:
    """One test: its failure names every shape and number of rows that is not as listed."""
    demand_none([text for shape in UNALIGNED for text in deviations("projection, unaligned shapes", shape, WINDOWS)])


def test_what_is_listed_as_different_is_compared() -> None:
    assert {*KNOWN_DIFFERENT, *MAY_BE_EQUAL} <= {*UNALIGNED}
    assert all(k % 8 == n % 8 == 0 for k, n in (*PROJECTIONS, *ODD))
    for shape in UNALIGNED:
        different, undecided = KNOWN_DIFFERENT.get(shape, {}), MAY_BE_EQUAL.get(shape, {})
        assert {*different, *undecided} <= {*ROWS} and not different.keys() & undecided.keys()
