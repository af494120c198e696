"""What is known to deviate, of ours and of the libraries beside us. Each test fails where the deviation appears elsewhere and where
it has vanished: then a text, a workaround or a reason has to go. tests/test_gpu_known_deviations.py has those that need a GPU."""

import io
import json
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis.errors import InvalidArgument
from hypothesis.extra import numpy as hnp

import cufuse
from cufuse import bf16, testing
from cufuse.emulation import rotary
from cufuse.emulation.rsqrt import rsqrt
from cufuse.emulation.tensor_core import split_float32
from tests.deviations import demand_exactly, near_ties, rounded_twice
from tests.totals import count
from tests.witnesses import bits, from_codes, random_bf16

F32 = np.float32
BF16 = cufuse.bfloat16


def counted(x: np.ndarray) -> None:
    count("known deviations", inputs=x.size, outputs=x.size)


def every_nan() -> np.ndarray:
    """float32 NaN codes: each payload bit, every 4,099th payload, both signs."""
    payloads = np.unique(np.concatenate([1 << np.arange(23), np.arange(1, 1 << 23, 4099), [(1 << 23) - 1]])).astype(np.uint32)
    return np.concatenate([payloads | np.uint32(0x7F800000), payloads | np.uint32(0xFF800000)]).view(F32)


# cufuse


def test_cufuse_loses_the_sign_of_nan() -> None:
    """As CUDA does: every NaN becomes 0x7FFF; no other value loses its sign."""
    assert set(bits(cufuse.round_to_bf16(every_nan())).tolist()) == {0x7FFF}
    x = np.arange(0, 2**32, 997, dtype=np.uint64).astype(np.uint32).view(F32)
    found = cufuse.round_to_bf16(x)
    demand_exactly(np.signbit(found) != np.signbit(x), np.isnan(x) & np.signbit(x), "sign lost")
    counted(x)


def test_cufuse_s_rsqrt_is_the_chip_s() -> None:
    """Up to two units below and one above the correctly rounded root, so often over [1, 4), and so in every pair of binades."""
    x = np.arange(0x3F800000, 0x40800000, dtype=np.uint32).view(F32)
    difference = bits(rsqrt(x)).astype(np.int64) - bits(rsqrt(x, "correct")).astype(np.int64)
    assert dict(zip(*(one.tolist() for one in np.unique(difference, return_counts=True)), strict=True)) == {
        -2: 8, -1: 2_344_391, 0: 13_143_086, 1: 1_289_731,
    }  # fmt: skip
    some = x[::997]
    for power in (-148, -126, -64, -2, 2, 60, 124):
        scaled = np.ldexp(some, power)
        exact = np.ldexp(scaled, -power) == some  # no bit lost among the subnormals
        testing.assert_bits_equal(np.ldexp(rsqrt(scaled[exact]), power // 2), rsqrt(some[exact]))
    counted(x)


def test_cufuse_s_rotary_tables_have_192_exceptions() -> None:
    """Of 18,350,080 recorded entries, those of the data file alone differ from the formula: by one step, but for four cosines near
    zero at the one frequency that PyTorch's power misses by an ulp."""
    record = json.loads(resources.files("cufuse.emulation").joinpath("data/rope.json").read_text())
    tried, distances = 0, []
    for head_dim in (64, 128, 256):
        positions = np.arange(rotary.RECORDED_POSITIONS)
        half = head_dim // 2
        angle = positions.astype(F32)[:, None] * rotary.inverse_frequencies(head_dim)[None, :]
        tables = cufuse.rope_tables(positions, head_dim)
        known = {(which, position, index) for which, position, index, _ in record["exceptions"].get(str(head_dim), [])}
        for which, (table, function) in enumerate(zip(tables, (np.cos, np.sin), strict=True)):
            formula = cufuse.round_to_bf16(function(angle.astype(np.float64)).astype(F32))
            other = np.argwhere(bits(formula) != bits(np.ascontiguousarray(table[:, :half])))
            assert {(which, *place) for place in other.tolist()} == {one for one in known if one[0] == which}
            tried += formula.size
            distances += bf16.ulp_distance(formula[tuple(other.T)], table[tuple(other.T)]).tolist()
    assert tried == 18_350_080
    assert sorted(distances) == [1] * 188 + [2, 2, 21, 21]
    counted(np.empty(tried, np.bool_))


def test_cufuse_s_three_parts_lose_what_lies_below_the_smallest_bfloat16() -> None:
    """float32 activations are split exactly, but for multiples of less than 2**-133: those lose at most 2**-134."""
    rng = np.random.default_rng(1)
    x = np.concatenate([np.arange(1, 1 << 25, 997, dtype=np.uint32), rng.integers(0, 0x7F800000, 200_000, np.uint32)]).view(F32)
    lost = np.abs(sum(part.astype(np.float64) for part in split_float32(x)) - x)
    finer = np.ldexp(x.astype(np.float64), 133) % 1 != 0
    demand_exactly(lost != 0, finer, "lost by the split")
    assert lost.max() <= 2.0**-134
    assert (np.abs(x[finer]) < 2.0**-110).all()
    counted(x)


def test_cufuse_s_stochastic_float64_cuts_the_fraction_to_32_bits() -> None:
    """Of 2**32 words, floor(fraction * 2**32) round up: too few by less than one, and only where the fraction is finer."""
    step = 2.0**-7
    fractions = np.array([0.0, 2.0**-32, 0.5, 0.75, 1 - 2.0**-32, 2.0**-33, 0.5 + 2.0**-40, 1 - 2.0**-45])
    for fraction in fractions.tolist():
        carrying = int(fraction * 2**32)
        words = np.array([2**32 - 1 - carrying, min(2**32 - carrying, 2**32 - 1)], np.uint32)
        x = np.full(2, 1 + fraction * step)
        up = bits(cufuse.round_to_bf16(x, mode="stochastic", random_bits=words)) == 0x3F81
        assert up.tolist() == [False, carrying > 0]
        missing = Fraction(fraction) * 2**32 - carrying
        assert (0 < missing < 1) == (fraction * 2**32 % 1 != 0)
    counted(fractions)


def test_torch_s_norm_has_five_orders() -> None:
    """1, 2-3, 4-7, 8-15 and more rows: inside of a class a row keeps its bits, between classes some row does not."""
    x = random_bf16(8, 48, 1024, binades=12)
    weight = np.ones(1024, BF16)
    alone: dict[int, bytes] = {}
    for rows in range(1, 49):
        first = cufuse.rms_norm(np.repeat(x[:16], 3, axis=0)[np.arange(rows) % 3], weight, recipe="float32")[0]
        alone[rows] = first.tobytes()
    classes = [range(1, 2), range(2, 4), range(4, 8), range(8, 16), range(16, 49)]
    for members in classes:
        assert len({alone[rows] for rows in members}) == 1
    factors = [cufuse.rms_norm(np.resize(x, (members[0], 1024)), weight, recipe="float32")[0] for members in classes]
    assert len({one.tobytes() for one in factors}) >= 2


# ml_dtypes, NumPy, Hypothesis


def test_ml_dtypes_rounds_float64_twice() -> None:
    x = near_ties()
    wrong = bits(x.astype(ml_dtypes.bfloat16)) != bits(cufuse.round_to_bf16(x))
    demand_exactly(wrong, rounded_twice(x), "ml_dtypes, float64 to bfloat16")
    counted(x)


def test_ml_dtypes_keeps_the_sign_of_nan() -> None:
    """0x7FC0 and 0xFFC0; everything else from float32 agrees."""
    x = np.concatenate([every_nan(), np.arange(0, 2**32, 997, dtype=np.uint64).astype(np.uint32).view(F32)])
    with np.errstate(invalid="ignore", over="ignore"):
        found = x.astype(ml_dtypes.bfloat16)
    demand_exactly(bits(found) != bits(cufuse.round_to_bf16(x)), np.isnan(x), "ml_dtypes, float32 to bfloat16")
    nan = np.isnan(x)
    assert (bits(found)[nan] == np.where(np.signbit(x[nan]), 0xFFC0, 0x7FC0)).all()
    counted(x)


@pytest.mark.parametrize("operation", [np.add, np.subtract, np.multiply, np.divide], ids=lambda one: one.__name__)
def test_ml_dtypes_arithmetic_does_not_deviate(operation: Any) -> None:
    rng = np.random.default_rng(2)
    a, b = (from_codes(rng.integers(0, 65536, 200_000).astype(np.uint16)) for _ in range(2))
    with np.errstate(all="ignore"):
        found = operation(a, b)
        expected = cufuse.round_to_bf16(operation(a.astype(F32), b.astype(F32)))
    testing.assert_bits_equal(found, expected, nan="any")
    counted(a)


def test_numpy_knows_bfloat16_by_halves() -> None:
    """Why bits cross every border as uint16 here."""
    ones = np.ones((2, 3), BF16)
    kept = io.BytesIO()
    np.save(kept, ones)
    kept.seek(0)
    assert np.load(kept).dtype == np.dtype("V2")
    with pytest.raises(ValueError, match="buffer"):
        memoryview(ones)
    with pytest.raises(BufferError, match="DLPack"):
        np.from_dlpack(ones)
    assert (ones * 2.0).dtype == np.float32
    assert (ones * ones).dtype == BF16
    nan = np.array([np.nan], BF16)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(nan, nan)
    testing.assert_bits_equal(nan, nan)


def test_hypothesis_has_no_strategy_for_bfloat16() -> None:
    @settings(database=None)
    @given(hnp.from_dtype(np.dtype(BF16)))
    def look(_: Any) -> None:
        """Nothing to demand."""

    with pytest.raises(InvalidArgument, match="bfloat16"):
        look()


# safetensors


def test_safetensors_ignores_strides_when_it_writes() -> None:
    """The memory is taken as it lies, so that transposed and strided arrays come back in another order; contiguous ones do not."""
    x = np.arange(6, dtype=F32).reshape(2, 3)
    every_second = np.arange(12, dtype=F32)[::2]
    for name, array, wrong in (("contiguous", x, False), ("Fortran", np.asfortranarray(x), True), ("transposed", x.T, True),
                               ("strided", every_second, True), ("copied", np.ascontiguousarray(x.T), False)):  # fmt: skip
        back = safetensors.numpy.load(safetensors.numpy.save({"a": array}))["a"]
        assert (not np.array_equal(back, array)) == wrong, name


def test_safetensors_reads_bfloat16_from_files_alone(tmp_path: Path) -> None:
    x = random_bf16(1, 3, 4)
    raw = safetensors.numpy.save({"a": x})
    with pytest.raises(KeyError, match="BF16"):
        safetensors.numpy.load(raw)
    (tmp_path / "a.safetensors").write_bytes(raw)
    testing.assert_bits_equal(safetensors.numpy.load_file(tmp_path / "a.safetensors")["a"], x)


# PyTorch, where it is installed


@pytest.mark.filterwarnings("ignore")
def test_pytorch_s_cast_on_a_cpu() -> None:
    """NaN is neither CUDA's 0x7FFF nor one code on every processor; the rest of float32 agrees; float64 is rounded twice."""
    torch = pytest.importorskip("torch")

    def cast(x: np.ndarray) -> np.ndarray:
        return np.asarray(torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy()).view(np.uint16)

    x = np.arange(0, 2**32, 997, dtype=np.uint64).astype(np.uint32).view(F32)
    demand_exactly(cast(x) != bits(cufuse.round_to_bf16(x)), np.isnan(x), "PyTorch on a CPU, float32 to bfloat16")
    assert (cast(every_nan()) & 0x7FFF > 0x7F80).all()
    wide = near_ties()
    demand_exactly(cast(wide) != bits(cufuse.round_to_bf16(wide)), rounded_twice(wide), "PyTorch on a CPU, float64 to bfloat16")


def test_the_rule_of_double_rounding_is_not_idle() -> None:
    """The rule itself against the definition: two roundings by this package's own casts."""
    x = near_ties()
    with np.errstate(over="ignore"):
        twice = cufuse.round_to_bf16(x.astype(F32))
    demand_exactly(bits(twice) != bits(cufuse.round_to_bf16(x)), rounded_twice(x), "two roundings")
    assert bf16.ulp_distance(twice, cufuse.round_to_bf16(x)).max() == 1
