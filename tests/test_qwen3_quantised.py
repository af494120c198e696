"""A Qwen3 with quantised projections without a GPU: decoded weights are a plain model's, and errors."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cufuse.bf16 import bfloat16
from cufuse.quantised import dequantise, quantise
from cufuse.qwen3 import Qwen3
from cufuse.qwen3.weights import PROJECTIONS
from tests.golden import small_model
from tests.small_qwen3 import small_qwen3
from tests.witnesses import demand_bits

pytestmark = pytest.mark.filterwarnings("ignore::cufuse.AssumedSlicesWarning")


def test_decoded_projections_are_a_plain_model() -> None:
    """Under "torch" a quantised weight is its values, rounded to bfloat16: the model made of those."""
    model, ids = small_qwen3(), small_model.prompt(7)

    def decoded(layer: Any) -> Any:
        return replace(
            layer, **{name: dequantise(quantise(np.asarray(getattr(layer, name)), "Q4_0"), dtype=bfloat16) for name in PROJECTIONS}
        )

    plain = Qwen3(replace(model.weights, layers=tuple(map(decoded, model.weights.layers))))
    found = model.quantised("Q4_0").forward(ids)
    demand_bits(found, plain.forward(ids), "logits")
    assert found.view(np.uint16).tolist() != model.forward(ids).view(np.uint16).tolist()


def test_block_scaled_is_not_decoded() -> None:
    model, ids = small_qwen3().quantised("Q8_0"), small_model.prompt(2)
    decoded = model.forward(ids).astype(np.float32)
    scaled = model.forward(ids, recipe="block-scaled").astype(np.float32)
    assert (decoded != scaled).any()
    assert np.abs(decoded - scaled).max() < 0.1 * np.abs(decoded).max()


def test_errors() -> None:
    model = small_qwen3()
    with pytest.raises(ValueError, match="Q5"):
        model.quantised("Q5")
    with pytest.raises(TypeError, match="quantised already"):
        model.quantised("Q4_0").quantised("Q4_0")
