"""The whole decoder against transformers on an H200 (tests/golden/record_model.py): every intermediate, logits, greedy tokens."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from tests.golden import inputs, small_model
from tests.small_qwen3 import small_qwen3

GOLDEN = Path(__file__).parent / "golden" / "model.safetensors"
COMPARED: Counter[str] = Counter()

pytestmark = [
    pytest.mark.skipif(not GOLDEN.exists(), reason="not recorded: python3 -m tests.golden.record_model on a GPU"),
    pytest.mark.filterwarnings("ignore::cufuse.AssumedSlicesWarning"),
]


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with safetensors.safe_open(GOLDEN, "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def demand(found: dict[str, Any], digests: np.ndarray, rows: int, what: str) -> None:
    """Every row of every intermediate has the recorded digest; the first differing one is named."""
    for name, expected in zip(small_model.names(), digests, strict=False):
        values = small_model.as_rows(found[name], rows)
        differ = np.flatnonzero(inputs.row_digests(values) != expected)
        COMPARED[what.split(",")[0]] += values.size
        assert differ.size == 0, f"{what}: {name} differs in {differ.size} of {rows} rows, first {differ[:5]}"


def demand_bits(found: Any, expected: np.ndarray, what: str) -> None:
    codes = small_model.as_rows(found, len(expected)).view(np.uint16)
    differ = np.argwhere(codes != expected.reshape(codes.shape))
    assert len(differ) == 0, f"{what}: {len(differ)} of {codes.size} differ, first at {differ[0]}"


@pytest.mark.parametrize("length", small_model.PROMPTS)
def test_prompt(golden: dict[str, np.ndarray], length: int) -> None:
    base = f"prompt{length}"
    prompt = small_model.prompt(length)
    assert (golden[f"{base}/tokens"] == prompt).all(), "the seeded prompt is not that of the recording"
    found: dict[str, Any] = {}
    logits = small_qwen3().forward(prompt, intermediates=found)
    assert list(found) == small_model.names()
    for key, value in golden.items():  # whole arrays first: they name the place
        if key.startswith(base + "/layers."):
            demand_bits(found[key.removeprefix(base + "/")], value, key)
    demand(found, golden[f"{base}/digests"], length, f"prompts, {length} tokens")
    demand_bits(logits, golden[f"{base}/logits"], f"{base}, logits")


@pytest.mark.parametrize("batch", small_model.BATCHES)
def test_decoding(golden: dict[str, np.ndarray], batch: int) -> None:
    base = f"decode{batch}"
    steps: list[dict[str, Any]] = []
    generation = small_qwen3().generate(small_model.decode_prompts(batch), small_model.NEW_TOKENS, intermediates=steps)
    demand(steps[0], golden[f"{base}/first_digests"], batch * small_model.DECODE_PROMPT, f"decoding, batch {batch}, prompt")
    for key, value in golden.items():
        if key.startswith(base + "/step"):
            _, step, name = key.split("/")
            demand_bits(steps[int(step.removeprefix("step"))][name], value, key)
    for step, digests in enumerate(golden[f"{base}/digests"], 1):
        demand(steps[step], digests, batch, f"decoding, batch {batch}, step {step}")
    assert (generation.tokens == golden[f"{base}/tokens"]).all()
    for row, (found, expected) in enumerate(zip(generation.logits, golden[f"{base}/logits"], strict=True)):
        demand_bits(found, expected, f"batch {batch}, row {row}, logits")


def test_what_was_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, for the README; alone this test says so."""
    if not COMPARED:
        pytest.skip("the other tests of this file did not run in this process")
    with capsys.disabled():
        for area, count in sorted(COMPARED.items()):
            print(f"\n{area}: {count:,} values equal to transformers' in every bit", end="")
    assert sum(COMPARED.values()) > 4_000_000
