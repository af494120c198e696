"""``rms_norm_qkv`` with quantised weights as a chain of kernels run on the host, bit for bit the emulation."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_qkv_chain, _gpu_qkv_steps, _gpu_quantised, _gpu_quantised_qkv, quantised
from cufuse.bf16 import bfloat16
from cufuse.quantised import QuantisedWeight
from tests import host_gpu, linear_on_host
from tests.host_gpu import Array, HostGpu
from tests.quantised_weights import random_weight
from tests.test_block_on_host import HEADS, KV_HEADS, block, demand_block, on_gpu
from tests.test_device_path import RECIPES
from tests.test_quantised_host import on_device
from tests.witnesses import demand_bits

pytestmark = pytest.mark.skipif(linear_on_host.COMPILER is None, reason="g++ is needed to run a kernel's text on the host")

D = 128


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> HostGpu:
    return host_gpu.with_tensor_cores(tmp_path_factory)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, machines: HostGpu) -> Iterator[HostGpu]:
    monkeypatch.setattr(_gpu_quantised, "_plans", {})
    monkeypatch.setattr(_gpu_quantised_qkv, "_calls", {})
    yield from host_gpu.installed_with_tensor_cores(monkeypatch, machines)


def bring(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(bring(one) for one in value)
    return on_device(value) if isinstance(value, QuantisedWeight) else on_gpu(value)


def weights(*forms: str, hidden: int) -> tuple[QuantisedWeight, ...]:
    return tuple(
        random_weight(form, heads * D, hidden, seed)
        for seed, (form, heads) in enumerate(zip(forms, (HEADS, KV_HEADS, KV_HEADS), strict=True))
    )


@pytest.mark.parametrize("name", ["block-scaled", "separate-k-norm"])
def test_chain(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """One packed weight, and three with formats as Q4_K_M files mix them; again with other addresses."""

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the operations were called one by one")

    monkeypatch.setattr(_gpu_qkv_steps, "rms_norm_qkv", refuse)
    given = block(RECIPES[name], tokens=(2, 3), dimensions=D, hidden=256) | {"k_slices": None}
    packed = quantised.concatenate(weights("Q4_0", "Q4_0", "Q4_0", hidden=256))
    for turn in range(2):
        demand_block(given | {"qkv_weight": packed, "static_weights": turn == 1}, "packed", bring)
    mixed = weights("Q4_K", "Q4_K", "Q6_K", hidden=256)
    demand_block(given | {"qkv_weight": mixed, "residual": None, "heads": None}, "three", bring)
    # rows of 96 are padded on the way
    narrow = block(RECIPES[name], tokens=(9,), dimensions=D, hidden=96) | {"k_slices": None}
    demand_block(narrow | {"qkv_weight": quantised.concatenate(weights("Q8_0", "Q8_0", "Q8_0", hidden=96))}, "narrow", bring)
    assert {kernel.source for kernel in gpu.launched} == {"rms_norm.cu", "heads.cu"}


@pytest.mark.parametrize("form", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_one_row_is_normalised_by_the_projection(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """In every CTA; the new residual is stored by one of them."""
    monkeypatch.setattr(_gpu_qkv_chain.Chain, "_norm", lambda *arguments: pytest.fail("a kernel for the norm alone"))
    given = block(RECIPES["block-scaled"], tokens=(1, 1), dimensions=D, hidden=1024) | {"k_slices": None}
    packed = quantised.concatenate(weights(form, form, form, hidden=1024))
    for static in (False, True):
        demand_block(given | {"qkv_weight": packed, "static_weights": static}, "a residual", bring)
    demand_block(given | {"qkv_weight": packed, "residual": None}, "no residual", bring)


def test_one_by_one(gpu: HostGpu) -> None:
    """What the chain does not take: integer dot products of raw blocks."""
    given = block(RECIPES["llama.cpp-q8_1"], tokens=(3,), dimensions=D, hidden=256) | {"k_slices": None}
    whole = quantised.concatenate(weights("Q8_0", "Q8_0", "Q8_0", hidden=256))
    expected = cufuse.rms_norm_qkv(**given | {"qkv_weight": whole})
    raw = QuantisedWeight(Array(whole.data), whole.format, whole.shape)
    found = cufuse.rms_norm_qkv(**{name: bring(value) for name, value in given.items()} | {"qkv_weight": raw})
    for one, other in zip(found, expected, strict=True):
        demand_bits(one.host, other)
    caches = [Array(np.empty((8, KV_HEADS, D), np.float32)) for _ in "kv"]
    query = Array(np.empty((3, HEADS, D), np.float32))
    options = {"cache_slots": Array(np.arange(3)), "out": (query, *caches, None), "qkv_weight": raw}
    with pytest.raises(ValueError, match="cache_slots is served for packed weights"):
        cufuse.rms_norm_qkv(**{name: bring(value) for name, value in given.items()} | options)


def test_a_mistake_in_the_chain_is_not_hidden(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what nothing can do: it is refused before anything is written."""
    whole = quantised.concatenate(weights("Q4_0", "Q4_0", "Q4_0", hidden=1024))
    given = block(RECIPES["block-scaled"], tokens=(3,), dimensions=D, hidden=1024) | {"k_slices": None, "qkv_weight": whole}
    named = {name: bring(value) for name, value in given.items()}
    shapes = ((3, HEADS, D), (3, KV_HEADS, D), (3, KV_HEADS, D))
    outs = tuple(host_gpu.empty(shape, bfloat16) for shape in (*shapes, (3, 1024)))
    with pytest.raises(ValueError, match="k_slices is 16; the kernels take 8 slices of K at most"):
        cufuse.rms_norm_qkv(**named | {"k_slices": 16}, out=outs)
    monkeypatch.setattr(_gpu_qkv_chain.Chain, "_heads", lambda *arguments: int("planted"))
    with pytest.raises(ValueError, match="planted"):
        cufuse.rms_norm_qkv(**named, out=outs)
    for one in outs:
        assert (one.host.view(np.uint8) == 0xA5).all()
