"""Softmax: PyTorch's recorded bits, the orders of its sums against loops over lanes and warps, and the operation's manners."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors

import cufuse
from cufuse import oracle
from cufuse.emulation.exponential import expf
from cufuse.emulation.softmax_sums import torch_softmax
from cufuse.recipe import Attention
from cufuse.softmax import softmax, weights
from tests.golden import inputs
from tests.witnesses import bits, demand_bits, random_bf16

GOLDEN = Path(__file__).parent / "golden" / "functions.safetensors"
LONG = (
    1025, 1026, 1027, 1028, 1100, 1536, 2000, 2047, 2048, 2049, 2050, 3000, 4095, 4096, 4097, 5000, 8192, 9215, 9216, 9217, 9220,
    10000, 12252, 12256, 12260, 12288, 12289, 16384, 16387, 40000,
)  # fmt: skip


def recorded_input(length: int) -> np.ndarray:
    """The scores of the recording (record_functions.softmax_input)."""
    scores = inputs.bell((3, length), inputs.seed_of("softmax", length), 3.0)
    scores[-1, 1 + length // 2 :] = ml_dtypes.finfo(ml_dtypes.bfloat16).min
    return scores


@pytest.mark.skipif(not GOLDEN.exists(), reason="not recorded: python3 -m tests.golden.record_functions on a GPU")
@pytest.mark.parametrize("kind", ["short", "long"])
def test_softmax_has_the_bits_of_pytorch(kind: str) -> None:
    lengths = range(1, 1025) if kind == "short" else LONG
    with safetensors.safe_open(GOLDEN, "numpy") as file:
        digests, largest = (file.get_tensor(f"softmax_{kind}/{name}") for name in ("digest", "largest"))
    wrong = []
    for length, digest, biggest in zip(lengths, digests, largest, strict=True):
        found = weights(recorded_input(length).astype(np.float32), Attention())
        if (inputs.row_digests(found) != digest).any():
            wrong.append((length, (bits(found.max(axis=1)) != biggest).tolist()))
    assert not wrong, f"{len(wrong)} of {len(lengths)} lengths differ, first (length, whether 1 / sum differs): {wrong[:8]}"


def by_lanes(x: np.ndarray) -> np.float32:
    """One row of at most 2,048 by a loop over the 32 lanes of a warp."""
    lanes = [np.float32(0)] * 32
    for index, value in enumerate(x):
        lanes[index % 32] = np.float32(lanes[index % 32] + value)
    for offset in (16, 8, 4, 2, 1):
        lanes = [np.float32(lanes[lane] + lanes[lane ^ offset]) for lane in range(32)]
    return lanes[0]


def by_threads(x: np.ndarray, first_row_element: int) -> np.float32:
    """One longer row by a loop over 1,024 threads, as the three kernels of SoftMax.cu walk it."""
    count, threads = len(x), [np.float32(0)] * 1024

    def take(thread: int, element: int) -> None:
        threads[thread] = np.float32(threads[thread] + x[element])

    if count <= 9216:
        for element in range(count):
            take(element % 1024, element)
    else:
        start = 0
        shift = first_row_element % 4
        if shift and count % 4:
            for thread in range(shift, 1024):
                take(thread, thread - shift)
            start = 1024 - shift
        whole = (count - start) // 4096 * 4096 if count % 4 or count >= 12256 else count - start
        for offset in range(0, whole, 4):
            for element in range(4):
                take(offset // 4 % 1024, start + offset + element)
        for element in range(start + whole, count):
            take((element - start - whole) % 1024, element)
    warps = [shuffled(threads[warp * 32 : warp * 32 + 32]) for warp in range(32)]
    return shuffled(warps)


def shuffled(values: list[np.float32]) -> np.float32:
    values = list(values)
    for offset in (16, 8, 4, 2, 1):
        for lane in range(offset):
            values[lane] = np.float32(values[lane] + values[lane + offset])
    return values[0]


@pytest.mark.parametrize("columns", [1, 2, 13, 31, 32, 33, 100, 1024, 1025, 2048])
def test_order_of_a_warp(columns: int) -> None:
    x = np.random.default_rng(columns).random((3, columns), np.float32)
    assert torch_softmax(x, 0).tolist() == [by_lanes(row) for row in x]


@pytest.mark.parametrize("columns", [2049, 9216, 9220, 9217, 12256, 12257, 12258])
def test_order_of_a_thread_block(columns: int) -> None:
    x = np.random.default_rng(columns).random((2, columns), np.float32)
    expected = [by_threads(row, (5 + index) * columns) for index, row in enumerate(x)]
    assert torch_softmax(x, 5).tolist() == expected


def test_against_the_oracle() -> None:
    x = random_bf16(0, 4, 6, 300, scale=4)
    found, expected = softmax(x), oracle.softmax(x)
    # half a bfloat16 ulp is at most 2^-8; before it, in float32: x - max of at most 32 rounded (2^-20 in the exponent), 2 ulp of
    # each expf, 15 roundings of a sum of 300, the division
    assert (np.abs(found.astype(np.float64) - expected) <= (2.0**-8 + 48 * 2.0**-23) * expected).all()
    demand_bits(softmax(x.astype(np.float32)), found)


def test_correct_exponential_is_another_recipe() -> None:
    x = random_bf16(1, 50, 200, scale=3)
    recipe = cufuse.recipes["torch"].derive("correct", attention={"exponential": "correct"})
    wide = x.astype(np.float32)
    shifted = wide - wide.max(axis=1, keepdims=True)
    expected = expf(shifted, "correct") / torch_softmax(expf(shifted, "correct"), 0)[:, None]
    demand_bits(softmax(x, recipe=recipe), cufuse.round_to_bf16(expected))


def test_special_values_and_strides() -> None:
    infinite = np.array([[1, -np.inf, 2], [np.inf, 1, 2], [np.nan, 1, 2], [-np.inf] * 3], np.float32)
    found = softmax(infinite).astype(np.float32)
    assert found[0, 1] == 0 and np.isnan(found[1:]).all()
    x = random_bf16(2, 8, 40)
    out = np.empty((4, 40), cufuse.bfloat16)
    assert softmax(x[::2], out=out) is out
    demand_bits(out, softmax(x)[::2])
    assert softmax(x[:0]).shape == (0, 40)


def test_errors() -> None:
    x = random_bf16(3, 2, 4)
    with pytest.raises(TypeError, match="float64"):
        softmax(x.astype(np.float64))
    with pytest.raises(TypeError, match="list"):
        softmax([[1.0]])
    with pytest.raises(ValueError, match="K >= 1"):
        softmax(x[:, :0])
    with pytest.raises(ValueError, match="overlaps"):
        softmax(x, out=x)
