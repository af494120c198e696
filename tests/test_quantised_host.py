"""The kernels for quantised weights on the CPU (kernels_on_host/), bit for bit against the emulation; and planted faults."""

import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cufuse import _gpu_quantised, quantised
from cufuse._linear_quantised import Streamed
from cufuse._linear_quantised_wgmma import Warpgroups
from cufuse.bf16 import bfloat16
from cufuse.emulation.tensor_core import NAN_BITS
from cufuse.quantised import FORMATS, QuantisedWeight
from cufuse.recipe import Gemm
from tests.host_gpu import Array, empty
from tests.linear_on_host import COMPILER, HostGpu, demand_noticed
from tests.quantised_weights import random_weight
from tests.test_linear_host import aligned
from tests.witnesses import bits, demand_bits, same_bits

pytestmark = pytest.mark.skipif(COMPILER is None, reason="g++ is needed to run a kernel's text on the host")


@dataclass(frozen=True)
class Case:
    """A product; pad, offset: how rows of x lie in memory."""

    form: str
    m: int
    n: int
    k: int
    k_slices: int = 8
    x_dtype: Any = bfloat16
    out_dtype: Any = np.float32
    pad: int = 0
    offset: int = 0
    capability: int = 90
    configuration: Any = None
    multiprocessors: int = 4
    programmatic: bool = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantised_on_host")


@pytest.fixture
def gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HostGpu]:
    machine = HostGpu(folder)
    machine.install(monkeypatch)
    monkeypatch.setattr(_gpu_quantised, "_plans", {})
    cupy = types.ModuleType("cupy")
    cupy.ndarray, cupy.empty = Array, empty  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return machine


def on_device(weight: QuantisedWeight) -> QuantisedWeight:
    """As QuantisedWeight.on_gpu: packed, on the pretended device, where a multiple of 256 bytes begins."""
    packed = weight.packed()
    raw = np.empty(packed.data.nbytes + 256, np.uint8)
    begin = -raw.ctypes.data % 256
    data = raw[begin : begin + packed.data.nbytes].reshape(packed.data.shape)
    data[...] = packed.data
    return QuantisedWeight(Array(data), packed.format, packed.shape, packed.layout)


def run(gpu: HostGpu, case: Case, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """What the kernels give, and what the emulation says."""
    rng = np.random.default_rng(seed)
    x = aligned((case.m, case.k), case.x_dtype, case.pad, case.offset)
    x[...] = rng.standard_normal(x.shape).astype(case.x_dtype)
    weight = random_weight(case.form, case.n, case.k, seed)
    out = aligned((case.m, case.n), case.out_dtype)
    gpu.seed, gpu.capability = seed, case.capability
    gemm = Gemm(
        input="float32", k_slices=1, output="bfloat16" if case.out_dtype == bfloat16 else "float32", quantised="block-scaled"
    )
    gpu.multiprocessors = case.multiprocessors
    options = {"configuration": case.configuration, "programmatic": case.programmatic}
    if case.configuration is None:
        _gpu_quantised.linear(Array(x), on_device(weight), gemm, case.k_slices, Array(out))
    else:
        _gpu_quantised.multiply(Array(x), on_device(weight), Array(out), case.k_slices, **options)
    many = "quantised_wgmma_sm90.cu" if case.m > 16 else "quantised_linear_sm90.cu"
    expected = many if case.capability >= 90 else "quantised_linear.cu"
    if case.configuration is not None:
        expected = case.configuration.kernel.source
    assert expected in {kernel.source for kernel in gpu.launched}
    return out, quantised.projection.project(np.ascontiguousarray(x), weight, gemm, case.k_slices)


STREAMED = [
    *(Case(form, 3, 100, 1024, multiprocessors=2) for form in FORMATS),
    *(Case(form, 1, 40, 768, x_dtype=np.float32) for form in FORMATS),
    Case("Q4_0", 1, 700, 640, multiprocessors=3, pad=8, out_dtype=bfloat16),  # several rounds, slices of unequal length
    Case("Q8_0", 8, 33, 96, k_slices=3, pad=3, offset=2),
    Case("Q4_0", 8, 130, 1024, configuration=Streamed("Q4_0", 8, 1, True), programmatic=True, k_slices=5),
    Case("Q4_0", 13, 50, 512, configuration=Streamed("Q4_0", 16, 1, False)),
    Case("Q6_K", 16, 50, 1024, configuration=Streamed("Q6_K", 16, 1, False)),
    Case("Q4_0", 33, 300, 640, configuration=Streamed("Q4_0", 32, 1, False, 2), out_dtype=bfloat16),
    Case("Q4_K", 20, 70, 512, configuration=Streamed("Q4_K", 32, 1, False), k_slices=1),
    Case("Q8_0", 20, 70, 256, x_dtype=np.float32, configuration=Streamed("Q8_0", 32, 3, False, 2)),
    Case("Q4_0", 2, 800, 1024, k_slices=1, multiprocessors=1),  # rings come round
    Case("Q6_K", 1, 600, 512, k_slices=1, multiprocessors=1),
]
WGMMA = [
    Case("Q4_0", 9, 100, 960, configuration=Warpgroups("Q4_0", 32, 4), programmatic=True),
    Case("Q8_0", 16, 150, 512, k_slices=3, configuration=Warpgroups("Q8_0", 32, 2), out_dtype=bfloat16),
    Case("Q4_0", 33, 200, 960, configuration=Warpgroups("Q4_0", 32, 4), out_dtype=bfloat16, pad=8),
    Case("Q8_0", 32, 270, 1280, k_slices=5, configuration=Warpgroups("Q8_0", 32, 2)),
    Case("Q4_0", 64, 70, 2048, configuration=Warpgroups("Q4_0", 64, 4)),  # rings come round
    Case("Q4_0", 65, 100, 576, configuration=Warpgroups("Q4_0", 64, 3), out_dtype=bfloat16),
    Case("Q8_0", 100, 130, 320, configuration=Warpgroups("Q8_0", 64, 4)),
    Case("Q4_0", 64, 300, 640, configuration=Warpgroups("Q4_0", 64, 2), out_dtype=bfloat16),
    Case("Q8_0", 17, 70, 512, x_dtype=bfloat16, pad=3, offset=2, configuration=Warpgroups("Q8_0", 64, 2)),
    Case("Q4_K", 16, 100, 2048, configuration=Warpgroups("Q4_K", 32, 2), out_dtype=bfloat16),
    Case("Q4_K", 40, 200, 768, configuration=Warpgroups("Q4_K", 64, 2), k_slices=2),
    Case("Q4_0", 64, 64, 512, configuration=Warpgroups("Q4_0", 64, 2)),
    Case("Q4_0", 70, 600, 1088, configuration=Warpgroups("Q4_0", 64, 2)),
    Case("Q8_0", 40, 90, 1088, configuration=Warpgroups("Q8_0", 64, 2)),
    Case("Q4_0", 69, 130, 960, configuration=Warpgroups("Q4_0", 64, 2)),  # slices of three pieces: of their last stages one is read
    Case("Q4_0", 20, 40, 64, k_slices=1, configuration=Warpgroups("Q4_0", 32, 4)),  # shares without slices, rings of one stage
    Case("Q8_0", 40, 129, 448, k_slices=2, configuration=Warpgroups("Q8_0", 32, 4)),
    Case("Q4_0", 33, 70, 1088),
    Case("Q8_0", 20, 70, 1088),
]
CASES = [
    *(Case(form, 3, 40, 1024, capability=80) for form in FORMATS),
    *(Case(form, 1, 16, 512, x_dtype=np.float32, capability=80) for form in FORMATS),
    Case("Q4_0", 9, 33, 96, out_dtype=bfloat16, pad=3, offset=2, capability=80),
    Case("Q8_0", 70, 18, 320, k_slices=3, out_dtype=bfloat16, capability=80),
    Case("Q4_K", 5, 7, 768, k_slices=2, pad=8, capability=80),
    Case("Q6_K", 66, 16, 256, x_dtype=np.float32, k_slices=1, capability=80),
]


@pytest.mark.parametrize("case", CASES + STREAMED + WGMMA, ids=str)
def test_bits_of_the_emulation(gpu: HostGpu, case: Case) -> None:
    demand_bits(*run(gpu, case))


@pytest.mark.parametrize("form", FORMATS)
def test_q8_1_has_the_emulation_s_bits(gpu: HostGpu, form: str) -> None:
    gemm = Gemm(input="float32", k_slices=1, output="float32", quantised="q8_1")
    for m, k, dtype in ((1, 4352, np.float32), (3, 512, bfloat16), (13, 256, np.float32)):
        weight = random_weight(form, 3, k, m)
        x = aligned((m, k), dtype, pad=8)
        x[...] = np.random.default_rng(m).standard_normal((m, k)).astype(dtype) * dtype(3)
        if k == 256:
            x[1], x[2, 5], x[3, 100:164] = 0, np.inf, np.nan
        out = aligned((m, 3), np.float32)
        blocks = QuantisedWeight(Array(weight.data), weight.format, weight.shape)
        _gpu_quantised.linear(Array(x), blocks, gemm, None, Array(out))
        demand_bits(out, quantised.projection.project(np.ascontiguousarray(x), weight, gemm, 1), f"{form} {m}x{k}")


def test_special_scales_and_activations(gpu: HostGpu) -> None:
    """NaN and infinities reach their own outputs and no others."""
    for form in FORMATS:
        weight = random_weight(form, 32, 512, 3)
        place = 208 if form == "Q6_K" else 0
        weight.data[5, place : place + 2] = np.array([0x7E00], "<u2").view(np.uint8)
        weight.data[17, place : place + 2] = np.array([0x7C00], "<u2").view(np.uint8)
        x = aligned((4, 512), bfloat16)
        x[...] = bfloat16(0.5)
        x[2, 77] = bfloat16(np.inf)
        out = aligned((4, 32), np.float32)
        gemm = Gemm(output="float32", quantised="block-scaled")
        _gpu_quantised.linear(Array(x), on_device(weight), gemm, None, Array(out))
        expected = quantised.projection.project(x, weight, gemm, 8)
        nan = np.isnan(expected)
        assert nan[:, 5].all()
        assert not nan[[0, 1, 3]][:, [*range(5), *range(6, 17), *range(18, 32)]].any()
        assert (bits(expected)[nan] == NAN_BITS).all()
        assert (nan == np.isnan(out)).all()
        demand_bits(np.where(nan, 0, out), np.where(nan, 0, expected), form)


def test_dequantise_has_every_bit(gpu: HostGpu) -> None:
    """All scales, NaN and infinities among them, with random integers."""
    rng = np.random.default_rng(5)
    scales = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    for form in FORMATS.values():
        blocks = rng.integers(0, 256, (1 << 16, form.size), np.uint8)
        place = 208 if form.name == "Q6_K" else 0
        blocks[:, place : place + 2] = scales
        if form.name == "Q4_K":
            blocks[:, 2:4] = rng.permutation(scales)
        weight = QuantisedWeight(blocks, form, (1 << 16, form.values))
        for dtype in (np.float32, bfloat16):
            out = aligned(weight.shape, dtype)
            on_gpu = QuantisedWeight(Array(blocks), form, weight.shape)
            _gpu_quantised.dequantise(on_gpu, Array(out))
            demand_bits(out, quantised.dequantise(weight, dtype=dtype), f"{form.name} {dtype}")


# what is planted, in which case, and the text that it replaces
FAULTS = {
    "another order of slices": (CASES[0], "slice = 1; slice < slices; ++slice", "slice = slices - 1; slice > 0; --slice"),
    "slices not waited for": (CASES[0], "__syncthreads();", ""),
    "sums not waited for": (STREAMED[0], "sync_threads(1 + group, a.slices * 32);", ";"),
    "sums overwritten": (STREAMED[8], "if (round + 1 < a.rounds) sync_threads", "if (false) sync_threads"),
    "weights not waited for": (STREAMED[0], "barrier_wait(stream.barriers + place.slot * 8, place.parity);", ";"),
    "a stage overwritten": (STREAMED[16], "stream.copy_stage(a, place.slot, lane)", "stream.copy_stage(a, !place.slot, lane)"),
    "x not waited for": (STREAMED[13], "barrier_wait(x_full + x_place.slot * 8, x_place.parity);", ""),
    "a share's sums not waited for": (WGMMA[0], "barrier_wait(shared + SUM_FULL + from * 8, round & 1);", ""),
    "a share's sums overwritten": (WGMMA[0], "if (round > 0) barrier_wait(shared + SUM_EMPTY + warp * 8, round - 1 & 1);", ""),
    "last sums not waited for": (WGMMA[0], "sync_threads(2, WARPS * 32);", ""),
    "another order of the last": (WGMMA[0], "kept[other * SHARE_UNITS]", "kept[(4 - other) * SHARE_UNITS]"),
    "another order of shares": (WGMMA[0], "add_kept(acc, sums + other * SHARE", "add_kept(acc, sums + (4 - other) * SHARE"),
    "products not waited for": (WGMMA[3], "wait_for_products<0>();", ""),
    "a share's stage not waited for": (WGMMA[4], "barrier_wait(full, parity);", ""),
    "a share's stage overwritten": (WGMMA[4], "barrier_wait(bringer.barriers", "barrier_completed(bringer.barriers"),
    "x brought to another stage": (WGMMA[4], "copy_box(ring + at.place.slot", "copy_box(ring + !at.place.slot"),
    "a full ring refilled": (STREAMED[13], "barrier_wait(empty + place.slot * 8, place.parity);", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(gpu: HostGpu, fault: str) -> None:
    case, right, wrong = FAULTS[fault]
    demand_noticed(gpu, right, wrong, lambda seed: same_bits(*run(gpu, case, seed)))
