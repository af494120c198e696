"""The macros that tell a kernel the order of a sum, read as kernels/sums.cuh explains them, give the emulation's bits.

The reading is done here one simulated thread and one np.float32 at a time, from the words at the head of that file: neither the
kernel, which tests on the host and on a GPU run, nor the emulation's arrays take part in it.
"""

import numpy as np
import pytest

from cufuse.emulation.sums import SUM_ORDERS, sum_of_squares
from cufuse.emulation.sums_kernel import sum_defines
from cufuse.emulation.sums_torch import reduce_config
from tests.sum_witnesses import AtenReduce

F = np.float32
ONE, PAIRS, BY_POSITION, BY_STEP, MOMENTS = range(5)
HALVE, LINES_FIRST, WARPS_IN_ORDER = range(3)

COLUMNS = (1, 2, 3, 5, 8, 31, 33, 40, 64, 96, 100, 127, 128, 129, 130, 257, 272, 1023, 1024, 1030, 2048, 2056)
WIDE = (8160, 8161, 8168)
ROWS = (1, 2, 3, 5, 8, 16, 255, 256)
ORDERS = [name for name in SUM_ORDERS if name != "llama.cpp-cpu"]


def halved(values: list) -> list:
    """Lists of a power of two elements: i += i + half, and so on, down to one."""
    while len(values) > 1:
        half = len(values) // 2
        values = [a + b for a, b in zip(values[:half], values[half:], strict=True)]
    return values


def paired(values: list) -> F:
    """i += i + 1, then i + 2, 4, ...: neighbours first."""
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def filled(values: list) -> list:
    """Zeros behind, up to a power of two."""
    return values + [F(0)] * ((1 << (len(values) - 1).bit_length()) - len(values))


def read(macros: dict[str, int], row: list, index: int) -> F:
    """The sum of squares of row number ``index`` of contiguous rows, as the macros say."""
    threads, width, vector, chains, edges, tree = (
        macros[f"SUM_{name}"] for name in ("THREADS", "WIDTH", "VECTOR", "CHAINS", "EDGES", "TREE")
    )
    accumulators = [[F(0)] * 4 for _ in range(threads)]
    misplaced = index * len(row) % 4 if edges else 0
    head = row[: (4 - misplaced) % 4]
    for place, x in enumerate(head):
        accumulators[misplaced + place][0] += x * x
    body = row[len(head) :]
    tail = body[len(body) - len(body) % vector :] if edges else []
    vectors = [body[start : start + vector] for start in range(0, len(body) - len(tail), vector)]
    for number, elements in enumerate(vectors):
        held = accumulators[number % threads]
        if chains == PAIRS:
            pairs = [elements[i] * elements[i] + elements[i + 1] * elements[i + 1] for i in (0, 2, 4, 6)]
            held[0] += ((pairs[0] + pairs[1]) + pairs[2]) + pairs[3]
            continue
        for place, x in enumerate(elements):
            chain = {ONE: 0, BY_POSITION: place, BY_STEP: number // threads % 4}[chains]
            held[chain] += x * x
    for place, x in enumerate(tail):
        accumulators[place][0] += x * x
    sums = [((a + b) + c) + d for a, b, c, d in accumulators]
    sums += [F(0)] * (-len(sums) % width)
    lines = [sums[start : start + width] for start in range(0, len(sums), width)]
    if tree == HALVE:
        return halved(filled([halved(line)[0] for line in lines]))[0]
    if tree == LINES_FIRST:
        (line,) = halved([np.array(line) for line in filled_lines(lines)])
        while len(line) > 32:
            line = line[: len(line) // 2] + line[len(line) // 2 :]
        return paired(list(line))
    total, *others = [paired(line) for line in lines]
    for one in others:
        total = total + one
    return total


def filled_lines(lines: list) -> list:
    assert len(lines) & (len(lines) - 1) == 0, "ATen's lines are a power of two"
    return lines


def values(rows: int, columns: int) -> np.ndarray:
    return np.random.default_rng((rows, columns)).standard_normal((rows, columns)).astype(F)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rows", ROWS)
def test_the_macros_describe_the_emulation(order: str, rows: int) -> None:
    for columns in (*COLUMNS, *(WIDE if rows in (1, 8) and order.startswith("torch-mean") else ())):
        macros = sum_defines(order, rows, columns)
        assert list(macros) == ["SUM_THREADS", "SUM_WIDTH", "SUM_VECTOR", "SUM_CHAINS", "SUM_EDGES", "SUM_TREE"]
        assert macros["SUM_THREADS"] <= 1024
        assert columns % macros["SUM_VECTOR"] == 0 or macros["SUM_CHAINS"] == BY_POSITION
        if macros["SUM_CHAINS"] == MOMENTS:
            assert order == "torch-rms-norm" and columns % 4 and macros == {
                "SUM_THREADS": 512, "SUM_WIDTH": 32, "SUM_VECTOR": 1, "SUM_CHAINS": MOMENTS, "SUM_EDGES": 0, "SUM_TREE": HALVE,
            }  # fmt: skip
            continue
        x = values(rows, columns)
        found = sum_of_squares(x, order)
        for index in {0, rows // 2, rows - 1}:
            expected = read(macros, list(x[index]), index)
            assert found[index].tobytes() == expected.tobytes(), f"{order}, row {index} of {rows}x{columns}: {macros}"


def test_one_row_of_many() -> None:
    """vLLM's kernels have 1024 threads a row, 256 from 256 rows on: seen from 257 vectors of a row on."""
    for order in ("vllm", "vllm-add"):
        found = {}
        for rows in (255, 256):
            x = np.resize(values(4, 2056), (rows, 2056))
            found[rows] = sum_of_squares(x, order)[:4].tolist()
            assert sum_defines(order, rows, 2056)["SUM_THREADS"] == {255: 257 if order == "vllm" else 1024, 256: 256}[rows]
            assert found[rows] == [read(sum_defines(order, rows, 2056), list(x[index]), index) for index in range(4)]
        assert found[255] != found[256]


@pytest.mark.parametrize("old", [False, True])
def test_launches_of_any_size(old: bool) -> None:
    """ATen's configuration as its source computes it, thread blocks that share a row included."""
    sizes = [1, 3, 31, 32, 64, 127, 128, 129, 511, 512, 516, 2047, 2048, 8159, 8160, 8161, 16384, 65536, 130560, 130561, 140001,
             131072, 262144, 524289, 1 << 20, (1 << 20) + 4096, 3_000_000, 1 << 22, 10_000_001, 1 << 25]  # fmt: skip
    rows = (*range(1, 36), 63, 64, 100, 131, 132, 133, 263, 264, 265, 511, 512, 527, 528, 529, 1000, 4096)
    for columns in sizes:
        for count in rows:
            expected = AtenReduce(count, columns, old)
            found = reduce_config(count, columns, vectorised_from=129 if old else 128)
            told = (expected.vectorize, expected.bw, expected.bh, expected.split, expected.ctas)
            assert found == told, f"{count} rows of {columns}"
            assert found.lines == (expected.bh if expected.split else 1) * expected.ctas


def test_what_no_kernel_does() -> None:
    with pytest.raises(ValueError, match=r"order is 'llama.cpp-cpu', which no kernel adds in"):
        sum_defines("llama.cpp-cpu", 1, 64)
    for order in ("torch-mean", "torch-mean-2.9"):
        assert sum_defines(order, 1, 130560)["SUM_THREADS"] == 512
        with pytest.raises(ValueError, match=r"joins the sums of \d+ thread blocks for 1 rows of 130561 columns.*at most 130560"):
            sum_defines(order, 1, 130561)
