"""silu, SwiGLU and the residual sum."""

from pathlib import Path

import numpy as np
import pytest
import safetensors

import cufuse
from cufuse import oracle
from cufuse.mlp import silu, swiglu
from cufuse.residual import add
from tests.witnesses import bits, demand_bits, exact, from_codes, random_bf16, round_to_bf16

GOLDEN = Path(__file__).parent / "golden" / "functions.safetensors"


@pytest.mark.skipif(not GOLDEN.exists(), reason="not recorded: python3 -m tests.golden.record_functions on a GPU")
def test_silu_of_every_bfloat16_has_the_bits_of_pytorch() -> None:
    every = from_codes(np.arange(65536))
    with safetensors.safe_open(GOLDEN, "numpy") as file:
        expected = file.get_tensor("silu")
    differ = np.flatnonzero(bits(silu(every)) != expected)
    assert differ.size == 0, f"{differ.size} of 65,536 differ, first {hex(differ[0])}"


def test_silu_is_near_the_truth_everywhere() -> None:
    every = from_codes(np.arange(65536))
    finite = every[np.isfinite(every.astype(np.float32))]
    found, expected = silu(finite).astype(np.float64), oracle.silu(finite)
    normal = np.abs(expected) >= 2.0**-120
    assert (np.abs(found - expected)[normal] <= 2.0**-8 * np.abs(expected[normal])).all()


def test_swiglu_is_silu_then_a_rounded_product() -> None:
    gate, up = random_bf16(0, 7, 33, scale=3), random_bf16(1, 7, 33)
    activated = silu(gate)
    expected = [round_to_bf16(a * u) for a, u in zip(exact(activated.reshape(-1)), exact(up.reshape(-1)), strict=True)]
    found = bits(swiglu(gate, up)).reshape(-1)
    zero = (found & 0x7FFF) == 0  # the witness gives +0 for every zero
    assert (found == expected)[~zero].all() and (np.array(expected)[zero] == 0).all()
    float32 = swiglu(gate, up, recipe="float32")
    assert float32.dtype == np.float32
    demand_bits(swiglu(gate, up, recipe="nano-vllm"), cufuse.round_to_bf16(float32))


def test_add_is_correctly_rounded() -> None:
    x, residual = random_bf16(2, 5, 40, binades=8), random_bf16(3, 5, 40, binades=8)
    expected = [round_to_bf16(a + b) for a, b in zip(exact(x.reshape(-1)), exact(residual.reshape(-1)), strict=True)]
    assert bits(add(x, residual)).reshape(-1).tolist() == expected
    demand_bits(add(x, residual), cufuse.add_rms_norm(x, residual, x[0])[1])
    # the oracle's sum of numbers 16 binades apart at most is exact
    demand_bits(add(x, residual, recipe="float32"), oracle.add(x, residual).astype(np.float32))


def test_special_values() -> None:
    x = from_codes([0x7F80, 0xFF80, 0x7FC0, 0x8000])
    assert bits(silu(x)).tolist() == [0x7F80, 0x7FFF, 0x7FFF, 0x8000]


def test_errors() -> None:
    x = random_bf16(4, 2, 4)
    for call in (lambda y: silu(y), lambda y: swiglu(y, y), lambda y: add(y, y)):
        with pytest.raises(TypeError, match="float32"):
            call(x.astype(np.float32))
    with pytest.raises(ValueError, match="up has shape"):
        swiglu(x, x[:, :2])
    with pytest.raises(ValueError, match="residual has shape"):
        add(x, x[:1])
    for call in (lambda: silu(x, out=x), lambda: swiglu(x, x.copy(), out=x), lambda: add(x, x.copy(), out=x)):
        with pytest.raises(ValueError, match="overlaps"):
            call()
    assert silu(x[:0]).shape == (0, 4) and swiglu(x[:0], x[:0]).shape == (0, 4) and add(x[:0], x[:0]).shape == (0, 4)
