"""Blocks drawn by Hypothesis through the kernels' texts on the host: any shape, recipe, format and number of multiprocessors.

Which kernels a call takes, and how they divide its work, follows from all of these: here combinations meet that nobody thought of.
A machine of few multiprocessors gives each CTA several tiles; one of many leaves some without any.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cufuse import launch
from cufuse.quantised import FORMATS
from tests import host_gpu, linear_on_host
from tests.golden import inputs
from tests.host_gpu import HostGpu
from tests.quantised_weights import random_weight
from tests.test_block_on_host import block, demand_block
from tests.test_device_path import RECIPES
from tests.test_quantised_block_host import bring
from tests.totals import count

pytestmark = pytest.mark.skipif(linear_on_host.COMPILER is None, reason="g++ is needed to run a kernel's text on the host")

PLAIN = ("torch", "torch-rms-norm", "batch-invariant", "late-rounding", "vllm-0.20", "gemma", "nano-vllm", "flashinfer")
QUANTISED = ("block-scaled", "llama.cpp", "separate-k-norm")
TOKENS = (1, 2, 3, 5, 8, 9, 15, 16, 17, 31, 33, 48, 64, 65, 100, 130)  # on both sides of where orders and kernels change
HIDDEN = (64, 128, 192, 200, 256, 320, 576, 832, 960, 1000, 1024, 1088, 1280)
# a kernel's text is compiled for each example: some seconds
EXAMPLES = max(4, settings().max_examples // 200)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> HostGpu:
    return host_gpu.with_tensor_cores(tmp_path_factory)


@pytest.fixture(scope="module")
def gpu(machines: HostGpu) -> Iterator[HostGpu]:
    with pytest.MonkeyPatch.context() as patch:
        yield from host_gpu.installed_with_tensor_cores(patch, machines)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of rms_norm_qkv."""
    form = draw(st.sampled_from((None, *FORMATS)))
    recipe = RECIPES[draw(st.sampled_from(PLAIN if form is None else QUANTISED))]
    step = 1 if form is None else FORMATS[form].values
    hidden = -(-draw(st.sampled_from(HIDDEN)) // step) * step
    tokens, dimensions = draw(st.sampled_from(TOKENS)), draw(st.sampled_from((128, 128, 128, 64, 256)))
    kv_heads = draw(st.sampled_from((1, 2, 3)))
    heads = kv_heads * draw(st.sampled_from((1, 2, 4)))
    seed = draw(st.integers(1, 1000))
    arguments = block(recipe, tokens=(tokens,), dimensions=dimensions, seed=seed, hidden=hidden) | {"heads": heads}
    rows = (heads + 2 * kv_heads) * dimensions
    if form is None:
        arguments["qkv_weight"] = inputs.bell((rows, hidden), seed + 2, 0.05)
    else:
        arguments |= {"qkv_weight": random_weight(form, rows, hidden, seed), "k_slices": None}
    for left_out in draw(st.sets(st.sampled_from((("residual",), ("cos", "sin"), ("q_norm_weight", "k_norm_weight"))))):
        arguments |= dict.fromkeys(left_out)
    return arguments | {"static_weights": draw(st.booleans())}


@settings(max_examples=EXAMPLES, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(arguments=calls(), multiprocessors=st.sampled_from((2, 4, 8, 20, 33, 64, 132)), seed=st.integers(1, 1000))
def test_any_block_has_the_bits_of_the_emulation(
    gpu: HostGpu, arguments: dict[str, Any], multiprocessors: int, seed: int
) -> None:
    """seed: of the order in which the pretended machine lets things happen."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
        host_gpu.forget_plans(patch)
        patch.setattr(gpu.tensor_cores, "seed", seed)
        demand_block(arguments, f"{multiprocessors} multiprocessors", bring)
    weight = arguments["qkv_weight"]
    count("blocks on the host", inputs=1, outputs=arguments["x"].shape[0] * weight.shape[0])
