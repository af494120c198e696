"""``rms_norm_qkv`` with quantised weights as a chain of kernels run on the host, bit for bit the emulation."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import (
    _gpu_qkv_chain,
    _gpu_qkv_steps,
    _gpu_quantised,
    _gpu_quantised_qkv,
    compiler,
    launch,
    quantised,
)
from cufuse.bf16 import bfloat16
from cufuse.quantised import QuantisedWeight
from tests import host_gpu, linear_on_host
from tests.host_gpu import Array, HostGpu
from tests.linear_on_host import demand_noticed
from tests.quantised_weights import random_weight
from tests.test_block_on_host import HEADS, KV_HEADS, block, demand_block, on_gpu
from tests.test_device_path import RECIPES
from tests.test_quantised_host import on_device
from tests.witnesses import demand_bits, same_bits

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


@pytest.mark.parametrize(
    ("form", "tokens", "hidden"), [("Q4_0", 8, 1024), ("Q8_0", 3, 512), ("Q4_K", 2, 1280), ("Q6_K", 7, 512), ("Q4_0", 13, 1024)]
)
def test_few_rows_are_normalised_by_the_projection(
    gpu: HostGpu, monkeypatch: pytest.MonkeyPatch, form: str, tokens: int, hidden: int
) -> None:
    """Each thread one of the sum's; warps that only normalise, and warps that only multiply."""
    monkeypatch.setattr(_gpu_qkv_chain.Chain, "_norm", lambda *arguments: pytest.fail("a kernel for the norm alone"))
    given = block(RECIPES["block-scaled"], tokens=(tokens,), dimensions=D, hidden=hidden) | {"k_slices": None}
    packed = quantised.concatenate(weights(form, form, form, hidden=hidden))
    for static, changed in ((False, {}), (True, {"residual": None})):
        demand_block(given | {"qkv_weight": packed, "static_weights": static} | changed, f"static weights {static}", bring)


@pytest.mark.parametrize(
    ("form", "multiprocessors", "parts"),
    [
        ("Q4_0", 14, "by 4 of 6 tiles"),  # in two rounds; of the last cluster's CTAs one has four tiles and one none
        ("Q8_0", 27, "by 8 of 3 tiles"),  # two heads in the last cluster, three in the others
        ("Q8_0", 36, "by 4 of 2 tiles"),
        ("Q6_K", 16, "by 2 of 4 tiles"),
    ],
)
def test_heads_are_finished_by_the_projection(
    gpu: HostGpu, monkeypatch: pytest.MonkeyPatch, form: str, multiprocessors: int, parts: str
) -> None:
    """By clusters, which send their parts to one of their CTAs."""
    gpu.tensor_cores.launched.clear()
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(_gpu_qkv_chain.Chain, "_heads", lambda *arguments: pytest.fail("a kernel for the heads"))
    given = block(RECIPES["block-scaled"], tokens=(1,), dimensions=D, hidden=1024) | {"k_slices": None}
    packed = quantised.concatenate(weights(form, form, form, hidden=1024))
    for static, changed in ((False, {}), (True, {"residual": None})):
        demand_block(given | {"qkv_weight": packed, "static_weights": static} | changed, f"static weights {static}", bring)
    launched = gpu.tensor_cores.launched
    assert launched and all(parts in kernel.name for kernel in launched)


def test_much_weight_leaves_heads_to_a_launch_of_their_own(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next block's weight may be asked for while they are finished."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 4)
    gpu.launched.clear()
    given = block(RECIPES["block-scaled"], tokens=(1,), dimensions=D, hidden=1024) | {"k_slices": None}
    packed = quantised.concatenate(weights("Q4_0", "Q4_0", "Q4_0", hidden=1024))
    demand_block(given | {"qkv_weight": packed}, "16 tiles a CTA", bring)
    assert {kernel.source for kernel in gpu.launched} == {"heads.cu"}


def test_what_heads_need_is_announced_behind_the_barrier_s_beginning(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever warp comes first: in these orders of events one arrived before there was a barrier."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 71)
    given = block(RECIPES["block-scaled"], tokens=(1,), dimensions=D, seed=445, hidden=1024)
    given |= {"k_slices": None, "qkv_weight": random_weight("Q4_0", 8 * D, 1024, 445), "residual": None, "static_weights": True}
    for seed, changed in ((1, {"q_norm_weight": None, "k_norm_weight": None}), (32, {})):
        monkeypatch.setattr(gpu.tensor_cores, "seed", seed)
        monkeypatch.setattr(_gpu_quantised_qkv, "_calls", {})
        demand_block(given | changed, f"seed {seed}", bring)


def test_rings_are_filled_at_a_pace(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the warps that do not normalise; a stage of each ring until x has come."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 22)
    gpu.tensor_cores.launched.clear()
    given = block(RECIPES["block-scaled"], tokens=(8,), dimensions=D, hidden=1024) | {"k_slices": None}
    packed = quantised.concatenate(weights("Q8_0", "Q8_0", "Q8_0", hidden=1024))
    for static in (False, True):
        gpu.tensor_cores.seed = 1 + static
        demand_block(given | {"qkv_weight": packed, "static_weights": static}, f"static weights {static}", bring)
    launched = gpu.tensor_cores.launched
    assert launched and all(dict(kernel.defines)["PACED"] == 1 for kernel in launched)


FAULTS = {
    "weights not waited for": (1, "barrier_wait(share.barriers + place.slot * 8, place.parity);", ";"),
    "a stage overwritten": (1, "share.copy_stage(place.slot, sends)", "share.copy_stage((place.slot + 1) % DEPTH, sends)"),
    "the row not waited for": (1, "    __syncthreads();\n#if CLUSTER", "#if CLUSTER"),
    "slices not waited for": (1, "sync_threads(barrier, SLICES * 32)", "(void)barrier"),
    "the norm's weight not waited for": (8, "barrier_wait(there, 0)", "(void)there"),
    "sums of others' rows": (8, "scratch + own * ROW_THREADS", "scratch"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    tokens, right, wrong = FAULTS[fault]
    packed = quantised.concatenate(weights("Q4_0", "Q4_0", "Q4_0", hidden=1024))
    given = block(RECIPES["block-scaled"], tokens=(tokens,), dimensions=D, hidden=1024)
    given |= {"k_slices": None, "residual": None, "qkv_weight": packed}
    expected = cufuse.rms_norm_qkv(**given)

    def same(seed: int) -> bool:
        monkeypatch.setattr(_gpu_quantised_qkv, "_calls", {})
        gpu.tensor_cores.seed = seed
        found = cufuse.rms_norm_qkv(**{name: bring(value) for name, value in given.items()})
        return all(same_bits(one.host, other) for one, other in zip(found, expected, strict=True) if other is not None)

    def whole(source: str) -> str:
        header = (compiler.source_folder() / "few_rows.cuh").read_text(encoding="utf-8").replace("#pragma once", "")
        return source.replace('#include "few_rows.cuh"', header)

    monkeypatch.setattr(gpu.tensor_cores, "change", gpu.tensor_cores.change)
    demand_noticed(gpu.tensor_cores, right, wrong, same, whole)


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
    with pytest.raises(ValueError, match="k_slices is 16; for 3 rows the kernels take at most 8"):
        cufuse.rms_norm_qkv(**named | {"k_slices": 16}, out=outs)
    monkeypatch.setattr(_gpu_qkv_chain.Chain, "_heads", lambda *arguments: int("planted"))
    with pytest.raises(ValueError, match="planted"):
        cufuse.rms_norm_qkv(**named, out=outs)
    for one in outs:
        assert (one.host.view(np.uint8) == 0xA5).all()
