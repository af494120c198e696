"""What mutation testing found untold: defaults and keywords, recorded tables, edges of formats and tiles."""

import inspect
import json
import math
from fractions import Fraction
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import cufuse
from cufuse import bf16, oracle, recipe
from cufuse.emulation import _tiles, cublas, floats, rotary, rsqrt, sums, sums_parts, tensor_core
from tests.sum_witnesses import round_to_float32

F = np.float32
KEYWORDS = {
    bf16.round_to_bf16: ("x", {"mode": "nearest_even", "random_bits": None, "out": None}),
    oracle.rms_norm: ("x weight", {"eps": 1e-6, "residual": None, "weight_offset": 0.0, "exact": False}),
    oracle.linear: ("x weight", {"exact": False}),
    oracle.rope_angles: ("positions head_dim", {"base": 1e6}),
    oracle.rope: ("x cos sin", {}),
    oracle.qkv_stages: ("x norm_weight weights q_norm_weight k_norm_weight head_dim",
                        {"eps": 1e-6, "cos": None, "sin": None, "weight_offset": 0.0}),
    tensor_core.matmul: ("a b", {"core": "sm_90", "k_slices": 1, "progress": None, "threads": None, "engine": None}),
    tensor_core.reference_block: ("a_bits b_bits c_bits", {"core": inspect.Parameter.empty, "dtype": "bfloat16"}),
    tensor_core.block: ("a b c", {"core": inspect.Parameter.empty}),
    sums.sum_of_squares: ("x order", {"contract": False}),
    sums.mean_of_squares: ("x order", {"contract": False, "mean": None}),
}  # fmt: skip


@pytest.mark.parametrize("function", KEYWORDS, ids=lambda function: function.__qualname__)
def test_arguments_and_defaults(function: object) -> None:
    """Arrays by position or name, options by name alone."""
    arrays, options = KEYWORDS[function]
    parameters = inspect.signature(function).parameters.values()
    assert [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD] == arrays.split()
    assert {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY} == options
    assert len(parameters) == len(arrays.split()) + len(options)


@pytest.mark.parametrize("part", [recipe.Norm, recipe.Gemm, recipe.Rope, recipe.Recipe])
def test_fields_by_name_alone(part: type) -> None:
    assert all(one.kind is one.KEYWORD_ONLY for one in inspect.signature(part).parameters.values())


@pytest.mark.parametrize("thing", [_tiles.FORMATS["bfloat16"], tensor_core.TENSOR_CORES["sm_90"],
                                   sums.SUM_ORDERS["vllm"], cufuse.recipes["torch"].norm])  # fmt: skip
def test_constants_stay(thing: object) -> None:
    with pytest.raises(AttributeError):
        thing.name = thing.bias = 1


# the oracle


def test_exact_is_another_sum() -> None:
    """fsum where it is asked for, NumPy's sum where it is not: seen where the two differ."""
    rng = np.random.default_rng(3)
    x = np.ldexp(rng.standard_normal((40, 2, 301)), rng.integers(-20, 20, (40, 2, 301)))
    squares = [sum(Fraction(v * v) for v in row) for row in x.reshape(80, 301).tolist()]  # of the squares as float64 has them
    ones = np.ones(301)
    plain, exact = (oracle.rms_norm(x, ones, eps=0.0, exact=flag) for flag in (False, True))
    assert plain.shape == exact.shape == x.shape
    assert np.array_equal(plain, x / np.sqrt(np.sum(x * x, -1, keepdims=True) / 301))
    roots = np.array([math.sqrt(float(round_fraction(s)) / 301) for s in squares]).reshape(40, 2, 1)
    assert np.array_equal(exact, x / roots)
    assert (plain != exact).any()
    w = np.ldexp(rng.standard_normal((3, 301)), rng.integers(-20, 20, (3, 301))).astype(F)
    wide = x.astype(F)
    products = oracle.linear(wide, w, exact=True)
    assert products.shape == (40, 2, 3)
    assert np.array_equal(oracle.linear(wide, w), wide.astype(np.float64) @ w.astype(np.float64).T)
    expected = [[float(sum(Fraction(a) * Fraction(b) for a, b in zip(row, column, strict=True))) for column in w.tolist()]
                for row in wide.reshape(80, 301)[:5].tolist()]  # fmt: skip
    assert np.array_equal(products.reshape(80, 3)[:5], expected)


def round_fraction(value: Fraction) -> float:
    return float(value)  # Python divides integers with one rounding


def test_three_weights_and_no_fourth() -> None:
    x, norm, w = np.ones((2, 8)), np.ones(8), np.ones((4, 8))
    stages = oracle.qkv_stages(x, norm, (w, w, w), None, None, 4)
    assert list(stages) == ["normalised", "q", "k", "v"] and stages["v"].shape == (2, 1, 4)
    for weights in ((w, w), (w, w, w, w)):
        with pytest.raises(ValueError, match="zip"):
            oracle.qkv_stages(x, norm, weights, None, None, 4)


# bfloat16


def test_distances_are_those_on_the_number_line() -> None:
    codes = np.array([0x0000, 0x8000, 0x0001, 0x8001, 0x7F80, 0xFF80, 0x3F80, 0xBF80, 0x7F7F], np.uint16)
    place = [0, 0, 1, -1, 0x7F80, -0x7F80, 0x3F80, -0x3F80, 0x7F7F]
    x = codes.view(cufuse.bfloat16)
    for i, code in enumerate(place):
        found = bf16.ulp_distance(np.full(len(codes), x[i]), x)
        assert found.tolist() == [abs(code - other) for other in place]


# the reciprocal square root


def test_the_table_is_the_one_measured() -> None:
    """Over all float32 of [1, 4) an H200 differs from the correctly rounded root by so many units so many times."""
    counts = dict.fromkeys((-2, -1, 0, 1), 0)
    for start in range(0x3F800000, 0x40800000, 1 << 22):
        x = np.arange(start, start + (1 << 22), dtype=np.uint32).view(F)
        correct = (1 / np.sqrt(x.astype(np.float64))).astype(F)
        difference = rsqrt.rsqrt(x).view(np.int32) - correct.view(np.int32)
        for unit in counts:
            counts[unit] += int(np.count_nonzero(difference == unit))
    assert counts == {-2: 8, -1: 2_344_391, 0: 13_143_086, 1: 1_289_731}


def test_the_ends_of_the_table() -> None:
    """As the H200 gave them: 1 exactly, the next and the last but one a unit below the correct root, the last exactly."""
    codes = np.array([0x3F800000, 0x3F800001, 0x407FFFFE, 0x407FFFFF], np.uint32)
    assert rsqrt.rsqrt(codes.view(F)).view(np.uint32).tolist() == [0x3F800000, 0x3F7FFFFE, 0x3F000000, 0x3F000000]


def test_binades_repeat_by_powers_of_four() -> None:
    x = np.arange(0x3F800000, 0x40800000, 4001, dtype=np.uint32).view(F)
    first = rsqrt.rsqrt(x)
    for half in (-60, -20, -1, 1, 3, 62):
        assert np.array_equal(rsqrt.rsqrt(np.ldexp(x, 2 * half)), np.ldexp(first, -half))
    subnormal = np.array([1, 2, 3, 5, 0x7FFFFF], np.uint32).view(F)
    scaled = np.ldexp(subnormal, 100)
    assert np.array_equal(rsqrt.rsqrt(subnormal), np.ldexp(rsqrt.rsqrt(scaled), 50))


def test_the_correct_root_is_correct() -> None:
    rng = np.random.default_rng(4)
    x = rng.integers(1, 0x7F800000, 300, np.uint32).view(F)
    for value, root in zip(x.tolist(), rsqrt.rsqrt(x, "correct").tolist(), strict=True):
        # 2**-120 times the integer root of 2**240 / value: 120 bits behind the point, an odd last one standing for the rest
        root_bits = 2 * math.isqrt((1 << 240) * Fraction(value).denominator // Fraction(value).numerator) + 1
        assert F(root) == round_to_float32(Fraction(root_bits, 1 << 121))
    special = np.array([0.0, -0.0, np.inf, -1.0, np.nan, -np.inf], F)
    for mode in ("hardware", "correct"):
        codes = rsqrt.rsqrt(special, mode).view(np.uint32).tolist()
        assert codes == [0x7F800000, 0xFF800000, 0, 0x7FFFFFFF, 0x7FFFFFFF, 0x7FFFFFFF]
    assert rsqrt.rsqrt(np.array(4.0, F)).shape == ()


# small tables


def test_recorded_tables_are_read_once() -> None:
    for read in (cublas._record, rotary._exceptions, rsqrt._table):
        assert read() is read()


def test_slices_that_cublas_was_seen_to_take() -> None:
    """On an H200, by M, for [N, K]."""
    seen = {(4096, 12288): {8: 3, 32: 4, 64: 3, 128: 2}, (4096, 4096): {1: 2, 32: 2, 8192: 1}, (1024, 4096): {1: 3, 128: 3, 129: 2},
            (1024, 5120): {128: 3}}  # fmt: skip
    for (n, k), slices in seen.items():
        assert {m: cublas.recorded_slices(m, n, k) for m in slices} == slices
        assert cublas.recorded_slices(0, n, k) is cublas.recorded_slices(8193, n, k) is None
    assert cublas.recorded_slices(1, 7, 7) is None


def test_the_smallest_sums_of_three() -> None:
    """Between the smallest normals and 2**-125 halfway points lie elsewhere: exact, as everywhere."""
    rng = np.random.default_rng(5)
    a = np.ldexp(rng.standard_normal(400).astype(F), rng.integers(-80, -60, 400)).astype(F)
    b = np.ldexp(rng.standard_normal(400).astype(F), rng.integers(-80, -60, 400)).astype(F)
    c = np.ldexp(rng.standard_normal(400).astype(F), rng.integers(-150, -120, 400)).astype(F)
    for one, other, third, found in zip(a.tolist(), b.tolist(), c.tolist(), floats.fma32(a, b, c).tolist(), strict=True):
        assert F(found) == round_to_float32(Fraction(one) * Fraction(other) + Fraction(third))


def test_ties_that_a_tiny_rest_breaks() -> None:
    """a b is half an ulp of c, times 1 - 2**-46 or 1 + 2**-22 + 2**-46: too little to be seen in the float64 sum, or not."""
    one, ulp = F(1), F(2.0**-23)
    cases = []
    for scale in (0, -100, 90):
        for c in (1.0, 1.0 + 2.0**-23, 1.5, 2.0 - 2.0**-23, 1.0 + 2.0**-22):
            for x, y in ((one + ulp, one - ulp), (one + ulp, one + ulp), (one, one), (one - ulp / 2, one - ulp / 2)):
                cases += [(s * x * F(2.0**-24), y * F(2.0**scale), t * F(c) * F(2.0**scale)) for s in (-1, 1) for t in (-1, 1)]
    a, b, c = (np.array(column, F) for column in zip(*cases, strict=True))
    for case, found in zip(cases, floats.fma32(a, b, c), strict=True):
        first, second, third = (Fraction(float(value)) for value in case)
        assert found == round_to_float32(first * second + third), case


def test_sums_beside_a_tie_of_subnormals() -> None:
    """c + a b lies 0.8 units of a float64 above the middle of two float32: the float64 sum is one unit above it, not on it."""
    for count in (0x400001, 0x400003, 0x7FFFFF, 0x400000, 0x400002):
        for sign in (1, -1):
            c = F(sign * count * 2.0**-149)
            a, b = F(2.0**-75) * F(1 + 324 * 2.0**-23), F(-sign * 2.0**-75) * F(1 - 324 * 2.0**-23)
            exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
            found = floats.fma32(np.array([a]), np.array([b]), np.array([c]))[0]
            assert found == round_to_float32(exact)


def test_recorded_exceptions_of_the_rotation() -> None:
    """The bits of an H200 where the file has them; the formula's everywhere else, for another base, and in float32."""
    record = json.loads((Path(rotary.__file__).parent / "data/rope.json").read_text())
    bf = np.dtype(cufuse.bfloat16)
    for head_dim in (64, 128, 256):
        frequencies = F(1) / np.asarray(1e6 ** (np.arange(0, head_dim, 2) / head_dim), F)
        exceptions = record["exceptions"][str(head_dim)]
        assert exceptions
        beside = {place + step for _, place, _, _ in exceptions for step in (-1, 0, 1)}
        positions = np.array(sorted(beside & set(range(rotary.RECORDED_POSITIONS))))
        angles = (positions.astype(F)[:, None] * frequencies[None, :]).astype(np.float64)
        formula = [function(angles).astype(F) for function in (np.cos, np.sin)]
        expected = [bf16.nearest(table).view(np.uint16) for table in formula]
        for which, place, index, code in exceptions:
            row = int(np.searchsorted(positions, place))
            assert expected[which][row, index] != code, "an exception to nothing"
            expected[which][row, index] = code
        found = rotary.tables(positions.reshape(1, -1), head_dim, 1e6, bf)
        wide = rotary.tables(positions, head_dim, 1e6, np.dtype(F))
        for table, codes, floats32, plain in zip(found, expected, wide, formula, strict=True):
            assert table.shape == (1, len(positions), head_dim)
            assert np.array_equal(table.view(np.uint16)[0], np.concatenate([codes, codes], axis=1))
            assert np.array_equal(floats32, np.concatenate([plain, plain], axis=1))
    other = rotary.tables(positions, 256, 999_999.0, bf)
    rates = F(1) / np.asarray(999_999.0 ** (np.arange(0, 256, 2) / 256), F)
    rounded = bf16.nearest(np.cos((positions.astype(F)[:, None] * rates).astype(np.float64)).astype(F)).view(np.uint16)
    assert np.array_equal(other[0].view(np.uint16)[:, :128], rounded)


BATCH_DEPENDENT = {"torch-mean", "torch-mean-2.9", "vllm", "vllm-add"}


def test_which_orders_know_their_batch() -> None:
    """As it is said, and as it is: the first of 1 to 300 rows, some of which luck makes equal in every order."""
    inputs = [np.random.default_rng(seed).standard_normal((300, 2056)).astype(F) for seed in range(6)]
    for name, order in sums.SUM_ORDERS.items():
        batches = {b"".join(sums.mean_of_squares(x[:rows], name)[:1].tobytes() for x in inputs) for rows in (1, 2, 4, 8, 16, 300)}
        assert order.depends_on_rows is (name in BATCH_DEPENDENT), name
        assert (len(batches) > 1) is order.depends_on_rows, name
        own = {columns: order.has_own_mean(columns) for columns in (1, 2, 3, 4, 6, 8, 1004, 1006)}
        assert own == {columns: name == "llama.cpp-cpu" or (name == "torch-rms-norm" and columns % 4 > 0) for columns in own}


def test_when_contraction_cannot_be_seen() -> None:
    """Squares of 12 bits that do not underflow are exact, and the fused form is dropped; any other value keeps it for all."""
    exact = [0.0, 1.0, -1.0, 4095.0, -(2.0**-63), 2.0**-63 * 4095, 0.0]
    for extra, fused in ((0.0, False), (8191.0, True), (4097.0, True), (2.0**-64, True),
                         (-(2.0**-70), True), (2.0**-75, True), (2.0**60, False)):  # fmt: skip
        x = np.array([[*exact, extra]], F)
        found = sums_parts.terms(x, True)
        assert found.fused is fused, extra
        with np.errstate(under="ignore"):
            assert np.array_equal(found.values, x if fused else x * x)
            plain = sums_parts.terms(x, False)
            assert plain.fused is False and np.array_equal(plain.values, x * x)


def test_a_mean_that_does_not_exist() -> None:
    for mean in ("sum", "a", "reciprocals"):
        with pytest.raises(ValueError, match=f"mean is '{mean}'; needed is 'factor', 'reciprocal', 'divide' or None"):
            sums.mean_of_squares(np.ones((2, 4), F), "vllm", mean=mean)


# tiles


@pytest.mark.parametrize("core", ["sm_80", "sm_90"])
def test_zeros_beside_anything(core: str) -> None:
    """A zero factor makes no largest exponent, however large the other factor is; and a zero accumulator none."""
    rng = np.random.default_rng(6)
    terms = tensor_core.TENSOR_CORES[core].terms
    a = np.ldexp(rng.standard_normal((64, 32)), rng.integers(-60, -40, (64, 32))).astype(ml_dtypes.bfloat16)
    b = np.ldexp(rng.standard_normal((64, 32)), rng.integers(-8, 8, (64, 32))).astype(ml_dtypes.bfloat16)
    zero = rng.random((64, 32)) < 0.3
    a[zero] = 0
    b[zero] = ml_dtypes.bfloat16(2.0**90)
    demand_steps(a, b, core, terms)


def demand_steps(a: np.ndarray, b: np.ndarray, core: str, terms: int) -> None:
    """The diagonal of a b^T, one step after the other in Python's integers."""
    found = tensor_core.matmul(a, b, core=core, engine="numpy", threads=1)
    for i in range(len(a)):
        c = 0
        for k in range(0, a.shape[1], terms):
            codes = [row[i, k : k + terms].view(np.uint16).tolist() for row in (a, b)]
            c = tensor_core.reference_block(*codes, c, core=core)
        assert int(found[i, i : i + 1].view(np.uint32)[0]) == c


@pytest.mark.parametrize("core", ["sm_80", "sm_90"])
@pytest.mark.parametrize("most", [0x7F, 0x80, 0x81, 0x200])
def test_subnormals_have_the_exponent_of_the_smallest_normal(core: str, most: int) -> None:
    """No zero among them; alone, and beside the smallest normals."""
    rng = np.random.default_rng(most)
    signs = rng.integers(0, 2, (2, 64, 32)).astype(np.uint16) << 15
    a = (rng.integers(1, most + 1, (64, 32)).astype(np.uint16) | signs[0]).view(ml_dtypes.bfloat16)
    b = (rng.integers(0x7300, 0x7F00, (64, 32)).astype(np.uint16) | signs[1]).view(ml_dtypes.bfloat16)
    terms = tensor_core.TENSOR_CORES[core].terms
    demand_steps(a, b, core, terms)
    demand_steps(b, a, core, terms)


def test_the_published_constants() -> None:
    """Terms, fraction bits and floor of mmasim 2.1.1's table; bfloat16 from sm_80 on."""
    table = {"sm_70": (4, 23, -131), "sm_75": (8, 24, -132)} | dict.fromkeys(("sm_80", "sm_86", "sm_89"), (8, 24, -132))
    table |= dict.fromkeys(("sm_90", "sm_100", "sm_120"), (16, 25, -133))
    assert {name: (one.terms, one.fraction_bits, one.floor) for name, one in tensor_core.TENSOR_CORES.items()} == table
    assert [name for name, one in tensor_core.TENSOR_CORES.items() if "bfloat16" not in one.dtypes] == ["sm_70", "sm_75"]
    for terms, most in ((4, 27), (8, 26), (16, 25)):
        for bits in (1, most):
            assert tensor_core.TensorCore("x", terms, bits, -97, ("bfloat16",), "").fraction_bits == bits
        for bits in (0, most + 1):
            with pytest.raises(ValueError, match=f"needed is 1 to {most} with {terms} terms"):
                tensor_core.TensorCore("x", terms, bits, -97, ("bfloat16",), "")


def test_a_step_needs_its_terms() -> None:
    one = np.ones(16, ml_dtypes.bfloat16)
    for a, b in ((one[0:1].reshape(()), one), (one, one[0:1].reshape(())), (one[:8], one[:8])):
        with pytest.raises(ValueError, match=r"needed is \[..., 16\] for sm_90"):
            tensor_core.block(a, b, np.zeros((), F), core="sm_90")


def test_slices_are_whole_blocks_of_64() -> None:
    assert _tiles.slice_bounds(0, 3) == []
    for depth in range(1, 700):
        for slices in (1, 2, 3, 4, 7, 20):
            length = 64 * math.ceil(math.ceil(depth / 64) / slices)
            expected = [(start, min(start + length, depth)) for start in range(0, depth, length)]
            assert _tiles.slice_bounds(depth, slices) == expected


def test_tiles_cover_everything_once() -> None:
    for m, n, threads in ((1, 1, 1), (1, 5000, 2), (3, 9000, 3), (256, 2048, 4), (257, 1025, 2), (600, 100, 2), (5, 129, 8)):
        seen = np.zeros((m, n), int)
        tiles = list(_tiles._tile_bounds(m, n, threads))
        for rows, columns in tiles:
            seen[rows, columns] += 1
            assert rows.stop - rows.start <= 256 and columns.stop - columns.start <= max(1024, 4096 // m)
        assert (seen == 1).all()
        if m <= 256 and n >= 128 * threads:
            assert len(tiles) % threads == 0, "every thread has its share"
