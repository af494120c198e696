"""CUDA's expf in NumPy: against PyTorch's recorded bits, and step by step against rational arithmetic."""

import decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import safetensors

from cufuse.emulation import exponential
from cufuse.emulation.exponential import ex2, ex2_reference, expf
from tests.golden import inputs
from tests.witnesses import bits, round_to_float32

GOLDEN = Path(__file__).parent / "golden" / "functions.safetensors"
needs_recording = pytest.mark.skipif(
    not GOLDEN.exists(), reason="functions.safetensors is not recorded: python3 -m tests.golden.record_functions on a GPU"
)

needs_table = pytest.mark.skipif(not exponential._recorded(), reason="ex2 is not recorded: likewise")


def sample() -> np.ndarray:
    """The inputs of the recording (record_functions.py says which)."""
    first, last = (int(np.float32(x).view(np.uint32)) for x in (2.0**-30, 110.0))
    magnitudes = np.arange(first, last, 2731, dtype=np.uint32)
    every = np.arange(first >> 16, last >> 16, dtype=np.uint32) << np.uint32(16)
    both = np.concatenate([magnitudes, every])
    both = np.concatenate([both, both | np.uint32(0x80000000)])
    return both[: len(both) // 256 * 256].view(np.float32)


@needs_recording
def test_expf_has_the_bits_of_cuda() -> None:
    with safetensors.safe_open(GOLDEN, "numpy") as file:
        expected = file.get_tensor("exp/digest")
    differ = np.flatnonzero(inputs.row_digests(expf(sample()).reshape(256, -1)) != expected)
    assert differ.size == 0, f"{differ.size} of 256 rows differ, first {differ[:5]}"


@needs_table
def test_reduction_by_rational_arithmetic() -> None:
    """The argument of ex2 and the scale, from fractions alone; ex2 itself is the function under test here."""
    constants = [Fraction(float(np.uint32(code).view(np.float32))) for code in (0x3BBB989D, 0x3FB8AA3B, 0x32A57060)]
    rng = np.random.default_rng(0)
    # results below 2**-126 are rounded once more, by the product with the scale
    xs = np.concatenate([rng.uniform(-104, 89, 200), rng.uniform(-1, 1, 100), [0.0, -0.0, 1e-30, -1e-30, 88.72, 89.5, -87.5, -150]])
    for x in xs.astype(np.float32):
        exact = Fraction(float(x))
        inner = Fraction(float(round_to_float32(exact * constants[0] + Fraction(1, 2))))
        steps = int(min(max(inner, Fraction(0)), Fraction(1)) * 252)
        high = Fraction(float(round_to_float32(exact * constants[1] - (steps - 126))))
        fraction = np.array([round_to_float32(exact * constants[2] + high)])
        power = Fraction(2) ** (steps - 126)
        expected = round_to_float32(Fraction(float(ex2(fraction)[0])) * power) if np.isfinite(ex2(fraction)[0]) else np.inf
        assert bits(expf(np.array([x])))[0] == np.float32(expected).view(np.uint32), x


def test_correct_mode_is_correctly_rounded() -> None:
    decimal.getcontext().prec = 60
    xs = np.random.default_rng(1).uniform(-100, 88, 300).astype(np.float32)
    for x, found in zip(xs, expf(xs, "correct"), strict=True):
        assert found == round_to_float32(Fraction(decimal.Decimal(float(x)).exp())), x


@needs_table
def test_hardware_is_within_two_units_of_the_correct_result() -> None:
    x = np.random.default_rng(2).uniform(-87, 88, 100_000).astype(np.float32)
    distance = np.abs(bits(expf(x)).astype(np.int64) - bits(expf(x, "correct")).astype(np.int64))
    assert distance.max() <= 2


def test_reference_is_the_power_of_two() -> None:
    q = np.arange(1 << 12)
    decimal.getcontext().prec = 60
    for bits_ in (12, 23):
        for index in q[:: 97 if bits_ == 12 else 131]:
            exact = decimal.Decimal(2) ** (decimal.Decimal(int(index)) / 2**bits_)
            assert ex2_reference(np.array([index]), bits_)[0] == round_to_float32(Fraction(exact))


def test_special_values() -> None:
    x = np.array([np.inf, -np.inf, np.nan, -np.nan, 0, -0.0, 200, -200], np.float32)
    for mode in ("hardware", "correct"):
        found = expf(x, mode)
        assert bits(found).tolist() == [0x7F800000, 0, 0x7FFFFFFF, 0x7FFFFFFF, 0x3F800000, 0x3F800000, 0x7F800000, 0]
    subnormal = expf(np.array([-90, -100], np.float32))
    assert ((subnormal > 0) & (subnormal < np.finfo(np.float32).tiny)).all()


def test_errors() -> None:
    with pytest.raises(TypeError, match="float64"):
        expf(np.zeros(1))
    with pytest.raises(ValueError, match="'quick'"):
        expf(np.zeros(1, np.float32), "quick")


@needs_table
def test_the_record_states_what_was_measured() -> None:
    record = exponential.provenance()
    assert record["expf"]["expf_differs_from_reduction"] == 0
    assert record["expf"]["torch.exp_differs_from_expf"] == 0
    assert record.get("contradictions", 0) == 0, "the rule does not describe on which bits of its operand ex2 depends"
    assert sum(record["counts"].values()) == 1 << record["table_bits"]


@needs_table
def test_operand_is_cut_to_23_fraction_bits() -> None:
    """By Python integers: the magnitude's bits below 2**-23 do not count; negative operands take the one's complement, but for
    whole ones."""
    rng = np.random.default_rng(3)
    for x in np.concatenate([rng.uniform(-26, 4, 300), -np.arange(0, 26.0), -(2.0 ** -np.arange(1, 40.0))]).astype(np.float32):
        magnitude = abs(Fraction(float(x))) * 2**23 // 1
        cut = int(magnitude) if x >= 0 else -int(magnitude) - (magnitude % 2**23 != 0)
        whole, fraction = divmod(cut, 2**23)
        table = ex2(np.array([fraction / 2**23], np.float32))
        assert ex2(np.array([x]))[0] == np.ldexp(table, whole)[0], x
    assert (ex2(-np.arange(26, dtype=np.float32)) == 2.0 ** -np.arange(26)).all()
