"""Calls like one that was checked before skip the checks: the same bits, nothing prepared again, and still every error."""

import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_cast
from cufuse.bf16 import bfloat16
from tests import host_gpu
from tests.golden import inputs
from tests.host_gpu import Array, HostGpu
from tests.witnesses import demand_bits

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to run a kernel's text on the host")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> HostGpu:
    return HostGpu(tmp_path_factory.mktemp("host"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, compiled: HostGpu) -> Iterator[HostGpu]:
    monkeypatch.setattr(_gpu_cast, "_plans", {})
    yield from host_gpu.installed(monkeypatch, compiled)


def rotation(seed: int, device: int = 0) -> tuple[tuple[np.ndarray, ...], tuple[Array, ...], tuple[Array, Array]]:
    """q, k, cos, sin as NumPy arrays and on the GPU, and outputs."""
    q, k = inputs.heavy((3, 4, 64), seed), inputs.heavy((3, 2, 64), seed + 1)
    arrays = (q, k, *cufuse.rope_tables(np.arange(seed, seed + 3), 64))
    outs = tuple(Array(host_gpu.empty(one.shape, bfloat16).host, device) for one in (q, k))
    return arrays, tuple(Array(one.copy(), device) for one in arrays), outs  # type: ignore[return-value]


def demand_rotated(seed: int) -> None:
    arrays, given, outs = rotation(seed)
    found = cufuse.rope(*given, out=outs)
    assert found[0] is outs[0]
    assert found[1] is outs[1]
    for one, other in zip(found, cufuse.rope(*arrays), strict=True):
        demand_bits(one.host, other)


def test_rope_again(gpu: HostGpu) -> None:
    demand_rotated(1)
    prepared = len(gpu.launched)
    for seed in range(2, 12):
        demand_rotated(seed)
    assert len(gpu.launched) == prepared


def test_rope_after_a_good_call_refuses_what_it_refused_before(gpu: HostGpu) -> None:
    _, (q, k, cos, sin), outs = rotation(1)
    cufuse.rope(q, k, cos, sin, out=outs)
    with pytest.raises(ValueError, match=r"out\[0\] overlaps q in memory"):
        cufuse.rope(q, k, cos, sin, out=(q, outs[1]))
    with pytest.raises(ValueError, match=r"out\[0\] overlaps out\[1\] in memory"):
        cufuse.rope(q, q, cos, sin, out=(outs[0], outs[0]))
    with pytest.raises(ValueError, match=r"cos has shape \(2, 64\)"):
        cufuse.rope(q, k, cos[:2], sin, out=outs)
    with pytest.raises(ValueError, match=r"q is on device 0.* k is on device 1"):
        cufuse.rope(q, Array(k.host, 1), cos, sin, out=outs)
    with pytest.raises(TypeError, match="two libraries"):
        cufuse.rope(q, k, cos.host, sin, out=outs)
    with pytest.raises(TypeError, match=r"out\[0\] has dtype float16"):
        cufuse.rope(q, k, cos, sin, out=(outs[0].view(np.float16), outs[1]))
    with pytest.raises(ValueError, match="recipe is 'none'"):
        cufuse.rope(q, k, cos, sin, recipe="none", out=outs)


def test_what_one_recipe_took_another_refuses(gpu: HostGpu) -> None:
    """Both rotate alike; the one's head norm leaves float32, the other's does not."""
    wide = cufuse.recipes["torch"].derive("wide", head_norm={"round_weighted": False}, rope={"round_products": False})
    narrow = wide.derive("narrow", head_norm={"round_weighted": True})
    assert wide.rope == narrow.rope
    _, (_, k, cos, sin), outs = rotation(1)
    q: Any = Array(np.random.default_rng(1).standard_normal((3, 4, 64), np.float32))
    for _ in range(2):
        cufuse.rope(q, k, cos, sin, recipe=wide, out=outs)
        with pytest.raises(TypeError, match=r"q has dtype float32; the rotation of recipe 'narrow'"):
            cufuse.rope(q, k, cos, sin, recipe=narrow, out=outs)


@pytest.mark.parametrize("mode", ["nearest_even", "up", "stochastic"])
def test_round_to_bf16_again(gpu: HostGpu, mode: str) -> None:
    for seed in range(4):
        rng = np.random.default_rng(seed)
        for dtype, unsigned in ((np.float32, np.uint16), (np.float64, np.uint32)):
            x = rng.standard_normal((5, 7)).astype(dtype)
            bits = {"random_bits": rng.integers(0, 2**16, x.shape, unsigned)} if mode == "stochastic" else {}
            out = host_gpu.empty(x.shape, bfloat16)
            named = {name: Array(value) for name, value in bits.items()}
            assert cufuse.round_to_bf16(Array(x), mode=mode, out=out, **named) is out
            demand_bits(out.host, cufuse.round_to_bf16(x, mode=mode, **bits))
    assert len(gpu.launched) == 2


def test_round_to_bf16_after_a_good_call_refuses_what_it_refused_before(gpu: HostGpu) -> None:
    x, out = Array(np.ones((4, 4), np.float32)), host_gpu.empty((4, 4), bfloat16)
    cufuse.round_to_bf16(x, out=out)
    with pytest.raises(ValueError, match="mode is 'nearest'"):
        cufuse.round_to_bf16(x, mode="nearest", out=out)
    with pytest.raises(ValueError, match=r"mode is \['up'\]"):
        cufuse.round_to_bf16(x, mode=["up"], out=out)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs random_bits"):
        cufuse.round_to_bf16(x, mode="stochastic", out=out)
    with pytest.raises(ValueError, match="only mode 'stochastic' takes them"):
        cufuse.round_to_bf16(x, random_bits=Array(np.ones((4, 4), np.uint16)), out=out)
    with pytest.raises(TypeError, match="x has dtype int32"):
        cufuse.round_to_bf16(x.view(np.int32), out=out)
    with pytest.raises(ValueError, match="out has shape"):
        cufuse.round_to_bf16(x, out=out[:2])
    with pytest.raises(ValueError, match="x is on device 0, out is on device 1"):
        cufuse.round_to_bf16(x, out=Array(out.host, 1))


def test_round_to_bf16_refuses_an_overlapping_out(gpu: HostGpu) -> None:
    """A first call and one like an earlier one, an input's own memory and the random bits'."""
    memory = np.zeros(64, np.float32)
    x, apart = Array(memory[:16]), Array(np.zeros(16, bfloat16))
    inside = Array(memory.view(bfloat16)[8:24])
    for _ in range(2):
        with pytest.raises(ValueError, match="out overlaps x in memory; give an array of its own"):
            cufuse.round_to_bf16(x, out=inside)
        cufuse.round_to_bf16(x, out=apart)
    bits = Array(apart.host.view(np.uint16))
    with pytest.raises(ValueError, match="out overlaps random_bits in memory"):
        cufuse.round_to_bf16(x, mode="stochastic", random_bits=bits, out=apart)
