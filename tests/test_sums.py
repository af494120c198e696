"""The orders of summation, bit for bit against literal simulations of the kernels, and against exact sums."""

from fractions import Fraction
from functools import cache
from math import gcd

import ml_dtypes
import numpy as np
import pytest

from cufuse.emulation import sums, sums_torch
from cufuse.emulation.floats import fma32
from cufuse.emulation.sums import SUM_ORDERS, mean_of_squares, sum_of_squares, torch_mean_factor
from tests import sum_witnesses as witness

COLUMNS = (1, 2, 3, 7, 31, 33, 64, 100, 127, 128, 129, 130, 896, 1000, 1001,
           1024, 2560, 4096, 5120, 8192, 10000, 16384, 65536)
ROWS = (1, 2, 3, 5, 8, 16, 17, 64)
ENGINES = {name: getattr(witness, name.replace("-", "_").replace(".", "_"))
           for name in ("vllm", "vllm-add", "flashinfer", "llama.cpp", "nano-vllm", "sequential")}


def values(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """float32 of very different sizes with 24 significant bits: every rounding of every addition counts."""
    rng = np.random.default_rng([seed, rows, columns])
    x = rng.standard_normal((rows, columns), np.float32)
    return np.ldexp(x, rng.integers(-6, 3, x.shape)).astype(np.float32)


def scalars(row: np.ndarray) -> list:
    return [np.float32(v) for v in row]


def assert_bits(got: np.ndarray, expected: list, context: object) -> None:
    codes = np.array(expected, np.float32).view(np.uint32)
    assert (got.view(np.uint32) == codes).all(), (context, got, expected)


def chosen_rows(rows: int, columns: int) -> list[int]:
    """The last row, and where rows start at different places relative to 16 bytes, one of each kind."""
    if columns % 4 == 0 or columns < 128:
        return [rows - 1]
    return sorted({rows - 1, *range(min(rows, 4))})


@pytest.mark.parametrize("order", ["torch-mean", "torch-mean-2.9"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_torch_mean_equals_the_simulated_kernel(order, columns):
    for rows in ROWS if columns <= 16384 else (1, 2, 8, 17):
        x = values(rows, columns)
        kernel = witness.AtenReduce(rows, columns, old=order.endswith("2.9"))
        some = chosen_rows(rows, columns)
        got = sum_of_squares(x, order)[some]
        assert_bits(got, [kernel.row_sum(scalars(x[m]), m, witness.add_square) for m in some], (rows, columns))


@pytest.mark.parametrize("order", ["torch-mean", "torch-mean-2.9"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 130_561), (3, 140_002), (20, 131_073)])
def test_torch_mean_over_several_thread_blocks(order, rows, columns):
    config = sums_torch.reduce_config(rows, columns)
    assert config.blocks > 1
    assert sums_torch.reduce_config(rows, 130_560).blocks == 1
    x = values(rows, columns)
    kernel = witness.AtenReduce(rows, columns, old=order.endswith("2.9"))
    assert kernel.ctas == config.blocks
    m = rows - 1
    assert_bits(sum_of_squares(x, order)[[m]], [kernel.row_sum(scalars(x[m]), m, witness.add_square)], (rows, columns))


@pytest.mark.parametrize("columns", [k for k in COLUMNS if k % 4 == 0])
def test_torch_rms_norm_equals_the_simulated_kernel(columns):
    x = values(3, columns)
    assert_bits(sum_of_squares(x, "torch-rms-norm"),
                [witness.torch_rms_norm(scalars(row), witness.add_square) for row in x], columns)


@pytest.mark.parametrize("columns", [k for k in COLUMNS if k % 4])
def test_torch_rms_norm_takes_moments_where_columns_are_no_multiple_of_4(columns):
    x = values(2, columns)
    got = mean_of_squares(x, "torch-rms-norm", contract=True)
    assert_bits(got, [witness.torch_rms_norm_moments(scalars(row)) for row in x], columns)
    exact = np.array([float(sum(Fraction(float(v)) ** 2 for v in row) / columns) for row in x])
    assert np.abs(got - exact).max() <= 1e-5 * exact.max()
    with pytest.raises(ValueError, match="mean_of_squares"):
        sum_of_squares(x, "torch-rms-norm")
    with pytest.raises(ValueError, match="leave mean out"):
        mean_of_squares(x, "torch-rms-norm", mean="divide")


@pytest.mark.parametrize("order", ENGINES)
@pytest.mark.parametrize("columns", COLUMNS)
def test_engines_equal_the_simulated_kernels(order, columns):
    for rows in (2, 256) if SUM_ORDERS[order].depends_on_rows and columns <= 16384 else (2,):
        x = np.resize(values(2, columns), (rows, columns))
        got = sum_of_squares(x, order)
        expected = [ENGINES[order](scalars(row), rows, witness.add_square) for row in x[:2]]
        assert_bits(got[:2], expected, (rows, columns))
        assert (got.reshape(-1, 2) == got[:2]).all()


@pytest.mark.parametrize("columns", [1, 3, 64, 130, 1001, 4096])
def test_contraction_equals_exact_fused_additions(columns):
    x = values(2, columns, seed=1)
    fused = witness.add_square_fused
    for order, simulate in ENGINES.items():
        assert_bits(sum_of_squares(x, order, contract=True), [simulate(scalars(row), 2, fused) for row in x], order)
    for order, old in (("torch-mean", False), ("torch-mean-2.9", True)):
        kernel = witness.AtenReduce(2, columns, old)
        expected = [kernel.row_sum(scalars(row), m, fused) for m, row in enumerate(x)]
        assert_bits(sum_of_squares(x, order, contract=True), expected, order)
    if columns % 4 == 0:
        expected = [witness.torch_rms_norm(scalars(row), fused) for row in x]
        assert_bits(sum_of_squares(x, "torch-rms-norm", contract=True), expected, "torch-rms-norm")


def test_contraction_cannot_be_seen_for_bfloat16_values():
    x = values(9, 1536).astype(ml_dtypes.bfloat16)
    tiny = (np.ones((1, 1536)) * 2.0**-70).astype(ml_dtypes.bfloat16)  # squares underflow: 0 or 2**-140, exact
    for order in SUM_ORDERS:
        a, b = (sum_of_squares(x, order, contract=c) for c in (False, True))
        assert_bits(a, list(b), order)
        assert (sum_of_squares(x.astype(np.float32), order) == a).all()
        assert sum_of_squares(tiny, order, contract=True)[0] == np.float32(1536 * 2.0**-140)


def longest_chain(order: str, rows: int, columns: int) -> int:
    """An upper bound of the additions that one square goes through."""
    up = lambda n, d: -(-n // d)  # noqa: E731
    vector = gcd(8, columns)
    if order.startswith("torch-mean"):
        config = sums_torch.reduce_config(rows, columns)
        return up(columns, 4 * config.width * config.lines) * (1 if columns > 128 else 4) + 5 + 3 + 9 + 4
    return {
        "torch-rms-norm": 4 * up(columns, 512) + 7,
        "vllm": vector * up(columns, vector * min(columns // vector, 1024 if rows < 256 else 256)) + 5 + 32,
        "vllm-add": up(columns, min(columns, 1024 if rows < 256 else 256)) + 5 + 5 + 32,
        "flashinfer": vector * up(columns, vector * min(columns // vector, 1024)) + 10,
        "llama.cpp": up(columns, 256 if columns < 1024 else 1024) + 10,
        "llama.cpp-cpu": 2,
        "nano-vllm": up(columns, min(columns, 2048)) + 3 + 10,
        "sequential": columns,
    }[order] + 1  # the square's own rounding


@cache
def exact_sums(rows: int, columns: int) -> list[Fraction]:
    """Of the first three rows, by integers: every value is a multiple of 2**-200 here."""
    x = values(rows, columns, seed=2)[:3].astype(np.float64)
    return [Fraction(sum(int(v) ** 2 for v in np.ldexp(row, 200)), 2**400) for row in x]


def test_the_launch_is_the_one_measured_on_an_h200():
    """The formulas fitted to 77 pairs of rows and columns, before the source was read."""

    def power(n):
        return min(2 ** (n.bit_length() - 1), 512)

    for columns in (64, 128, 896, 1024, 1536, 2560, 3584, 4096, 5120, 7168):
        for rows in (1, 2, 3, 4, 7, 8, 15, 16, 130, 2048, 5000):
            vectors = columns // 4 if columns >= 128 else columns
            width = min(power(vectors), 32)
            height = min(power(rows), 512 // width)
            width = min(power(vectors), 512 // height)
            split = -(-columns // width) >= min(16 * height, 256)
            assert sums_torch.reduce_config(rows, columns) == (columns >= 128, width, height, split, 1)


@pytest.mark.parametrize("order", SUM_ORDERS)
def test_the_error_stays_below_that_of_the_longest_chain(order):
    for rows, columns in ((1, 1), (2, 130), (17, 2560), (300, 1001), (3, 65536)):
        if SUM_ORDERS[order].has_own_mean(columns) and order == "torch-rms-norm":
            continue
        x = values(rows, columns, seed=2)
        bound = Fraction((1 + 2.0**-24) ** longest_chain(order, rows, columns) - 1) * Fraction(1000001, 1000000)
        for got, true in zip(sum_of_squares(x, order), exact_sums(rows, columns), strict=False):
            assert abs(Fraction(float(got)) - true) <= bound * true, (rows, columns)


def test_orders_can_be_told_apart():
    """Otherwise equality with a simulation would say little."""
    x = values(400, 4096, seed=3)
    sums_by_order = {order: sum_of_squares(x, order) for order in SUM_ORDERS}
    sums_by_order["torch-mean, one row"] = np.concatenate([sum_of_squares(row[None], "torch-mean") for row in x])
    sums_by_order["vllm, few rows"] = np.concatenate([sum_of_squares(half, "vllm") for half in np.split(x, 2)])
    names = list(sums_by_order)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            # with K = 4096, nano-vllm's tree and FlashInfer's differ like all others
            assert (sums_by_order[a] != sums_by_order[b]).any(), (a, b)


@pytest.mark.parametrize("order", SUM_ORDERS)
def test_blocks_of_rows_strides_and_dtypes_change_nothing(order, monkeypatch):
    for columns in (100, 1002 if order != "torch-rms-norm" else 1004):
        x = values(37, columns)
        whole = sum_of_squares(x, order)
        wide = np.zeros((37, 2 * columns), np.float32)
        wide[:, ::2] = x
        assert_bits(sum_of_squares(wide[:, ::2], order), list(whole), "stride 2")
        assert_bits(sum_of_squares(np.asfortranarray(x), order, contract=True),
                    list(sum_of_squares(x, order, contract=True)), "Fortran order")
        monkeypatch.setattr(sums, "_ELEMENTS_AT_A_TIME", 3 * columns)
        assert_bits(sum_of_squares(x, order), list(whole), "blocks of three rows")
        monkeypatch.undo()


def test_special_values():
    for order in SUM_ORDERS:
        x = np.ones((4, 132), np.float32)
        x[0, 131], x[1, 5], x[2, 7] = np.nan, np.inf, 2.0**70
        for contract in (False, True):
            got = sum_of_squares(x, order, contract=contract)
            assert str(got.tolist()) == "[nan, inf, inf, 132.0]", order
        assert (sum_of_squares(np.zeros((3, 8), np.float32), order).view(np.uint32) == 0).all()
        assert sum_of_squares(np.zeros((0, 8), np.float32), order).shape == (0,)


def test_the_mean_follows_the_implementation():
    x = values(5, 1536)
    s = sum_of_squares(x, "torch-mean")
    assert_bits(mean_of_squares(x, "torch-mean"), list(s * np.float32(1 / 1536)), "factor")
    assert_bits(mean_of_squares(x, "torch-mean", mean="divide"), list(s / np.float32(1536)), "divide")
    s = sum_of_squares(x, "vllm")
    assert_bits(mean_of_squares(x, "vllm"), list(s / np.float32(1536)), "vllm divides")
    exact = [np.add.accumulate((row * row).astype(np.float64))[-1] / 1536 for row in x]
    assert_bits(mean_of_squares(x, "llama.cpp-cpu"), [np.float32(v) for v in exact], "in float64")
    for order in SUM_ORDERS:
        column = values(6, 1)
        assert_bits(mean_of_squares(column, order), list((column * column)[:, 0]), (order, "one column"))


def test_torch_mean_factor_depends_on_the_batch_beyond_2_to_the_24_elements():
    def exact(rows, columns):
        counted = Fraction(float(witness.round_to_float32(Fraction(rows * columns))))
        return witness.round_to_float32(Fraction(float(witness.round_to_float32(Fraction(rows)))) / counted)

    pairs = [(rows, columns) for rows in (1, 3, 16, 4097, 30_001) for columns in (1, 7, 896, 1001, 5120, 10_001)]
    assert_bits(np.array([torch_mean_factor(*p) for p in pairs]), [exact(*p) for p in pairs], "factor")
    assert len({float(torch_mean_factor(rows, 10_001)) for rows in range(16_000, 16_200)}) > 1
    assert {float(torch_mean_factor(rows, 5120)) for rows in range(1, 20_000, 7)} == {float(np.float32(1 / 5120))}


def test_fma32_is_correctly_rounded():
    rng = np.random.default_rng(5)
    n = 3000
    a, b, c = rng.integers(0, 2**32, (3, n), np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        c[: n // 3] = -(a * b)[: n // 3]  # cancellation
    # a tie of float32 that only the product's far end breaks, beyond float64: a * b = 2**-24 * (1 +- 2**-36 or 2**-46)
    ties = slice(n // 3, 2 * n // 3)
    up = rng.integers(0, 2, n)[ties] == 1
    small = rng.integers(0, 4, n)[ties] == 0  # subnormal results, whose ties lie elsewhere
    exponent = np.where(small, rng.integers(-129, -125, n)[ties], rng.integers(-100, 60, n)[ties])
    half = np.maximum(exponent, -126) - 24  # the product's exponent: half an ulp of c
    a[ties] = np.ldexp(np.where(up, 1 + 2.0**-12, 1 + 2.0**-23), half // 2)
    b[ties] = np.ldexp(np.where(up, 1 - 2.0**-12 + 2.0**-24, 1 - 2.0**-23), half - half // 2)
    c[ties] = np.ldexp(1 + rng.integers(0, 2**23, n)[ties] * 2.0**-23, exponent)
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    a, b, c = a[finite], b[finite], c[finite]
    expected = np.array([witness.round_to_float32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
                         for x, y, z in zip(a, b, c, strict=True)])
    got = fma32(a, b, c)
    assert (got == expected).all()
    with np.errstate(over="ignore"):
        twice_rounded = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (twice_rounded != expected).sum() > 200  # the test can fail
    assert (np.abs(got) < np.finfo(np.float32).tiny).sum() > 10


def test_fma32_at_the_edges():
    f = np.float32
    tie, below = f(1 + 2.0**-23), f(2.0**-24)
    tiny = f(2.0**-149)
    cases = [  # a, b, c, result
        (below, f(1), f(1), f(1)),  # a tie goes to even
        (f(2.0**-24 + 2.0**-47), f(1), f(1), tie),  # just above it
        (tie, tie, f(-1) - 2 * (tie - 1), f(2.0**-46)),  # the product's last bit
        (f(2.0**-75), f(2.0**-75), f(0), f(0)),  # half the least subnormal: to even
        (f(2.0**-75), f(2.0**-75), tiny, f(2.0**-148)),  # one and a half of it: to even
        (f(2.0**-80), f(2.0**-80), f(1.5 * 2.0**-126), f(1.5 * 2.0**-126)),
        (f(1 + 2.0**-12), f((1 - 2.0**-12 + 2.0**-24) * 2.0**-24), f(1), tie),  # 2**-60 breaks the tie upward
        (tie, f((1 - 2.0**-23) * 2.0**-24), tie, tie),  # -2**-70 breaks it downward
        (tie, f((1 - 2.0**-23) * 2.0**-24), f(-1), f(-1 + 2.0**-24)),
        (f(2.0**64), f(2.0**63), f(2.0**127), f("inf")),
        (f(2.0**64), f(2.0**64), f(-(2.0**127)), f(2.0**127)),
        (f("inf"), f(0), f(1), f("nan")),
        (f("inf"), f(1), f("-inf"), f("nan")),
        (f("inf"), f(1), f(1), f("inf")),
        (f(1), f(1), f(-1), f(0)),
        (f(-0.0), f(1), f(-0.0), f(-0.0)),
        (f(-0.0), f(1), f(0), f(0)),
    ]
    a, b, c, expected = (np.array(column, np.float32) for column in zip(*cases, strict=True))
    got = fma32(a, b, c)
    same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(expected))
    assert same.all(), [case for case, ok in zip(cases, same, strict=True) if not ok]
    assert fma32(np.float32(3), np.float32(4), np.array(5, np.float32)) == 17
    with pytest.raises(TypeError, match="b has dtype float64"):
        fma32(a, b.astype(np.float64), c)


def test_errors_name_the_remedy():
    x = np.ones((2, 8), np.float32)
    with pytest.raises(ValueError, match="one of torch-mean"):
        sum_of_squares(x, "torch")
    with pytest.raises(ValueError, match="reshape"):
        sum_of_squares(x[0], "vllm")
    with pytest.raises(ValueError, match="at least one column"):
        mean_of_squares(x[:, :0], "vllm")
    with pytest.raises(TypeError, match="float64"):
        sum_of_squares(x.astype(np.float64), "vllm")
    with pytest.raises(TypeError, match="list"):
        sum_of_squares([[1.0]], "vllm")
    with pytest.raises(ValueError, match="'factor'"):
        mean_of_squares(x, "vllm", mean="exact")
