"""Quantised weights on a GPU: bits of the emulation and of gguf, every configuration, capture, and what is refused."""

from functools import partial
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_quantised, _linear_quantised, compiler, launch, quantised
from cufuse._linear_quantised_wgmma import WGMMA
from cufuse.bf16 import bfloat16
from cufuse.quantised import FORMATS, QuantisedWeight, projection, quantised_linear, tiles
from cufuse.recipe import Gemm
from tests import gpu_support
from tests.gpu_support import Case, Guarded, captured, cupy, demand_cases, demand_same, to_gpu, to_host
from tests.quantised_weights import random_weight
from tests.witnesses import demand_bits, random_bf16

pytestmark = gpu_support.MARKS

SIZES = ((1024, 4096), (2048, 4096), (2560, 6144), (4096, 6144), (5120, 7168), (5120, 10240))
ROWS = (1, 2, 4, 8, 16, 64)
SCALED = Gemm(input="float32", k_slices=1, output="float32", quantised="block-scaled")


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """All kernels at once, on all cores."""
    capability = launch.capability(0)
    wanted = [kernel for kernel in _gpu_quantised.KERNELS if kernel.runs_on(capability)]
    targets = [compiler.architecture(capability)] * len(wanted)
    list(gpu_support._compilers().map(gpu_support._compile, wanted, targets))


def on_gpu(weight: QuantisedWeight, packed: bool = True) -> QuantisedWeight:
    """A copy on the GPU, in its layout or packed."""
    chosen = weight.packed() if packed else weight
    return QuantisedWeight(to_gpu(chosen.data), chosen.format, chosen.shape, chosen.layout)


def bell(rows: int, columns: int, seed: int, dtype: Any = bfloat16) -> np.ndarray:
    """Activations as a norm leaves them."""
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32).astype(dtype)


@pytest.mark.parametrize("name", FORMATS)
def test_dequantise_has_every_bit_for_every_scale(name: str) -> None:
    """All 2^16 float16 scales, NaN and infinities among them; float32 NaN with their bits."""
    form = FORMATS[name]
    halves = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(-1, 2)
    rng = np.random.default_rng(1)
    for place in {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}[name]:
        blocks = rng.integers(0, 256, (1 << 16, form.size), np.uint8)
        blocks[:, place : place + 2] = halves
        weight = QuantisedWeight(blocks, form, (1 << 16, form.values))
        for dtype in (np.float32, bfloat16):
            expected = quantised.dequantise(weight, dtype=dtype)
            for packed in (False, True):
                found = quantised.dequantise(on_gpu(weight, packed), dtype=dtype)
                demand_bits(to_host(found), expected, f"{name} {dtype} packed {packed}")
                gpu_support.COMPARED["dequantise"] += found.size


@pytest.mark.parametrize("name", FORMATS)
def test_packing_on_the_gpu_is_packing_on_the_cpu(name: str) -> None:
    weight = random_weight(name, 37, 768)
    device = on_gpu(weight, packed=False)
    demand_same("packing", device.packed().data, weight.packed().data, name)
    demand_same("packing", device.packed().unpacked().data, weight.data, name)
    demand_same("packing", weight.on_gpu().data, weight.packed().data, name)
    demand_bits(weight.on_gpu().on_cpu().data, weight.data)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("k", "n"), SIZES, ids=str)
def test_qwen3_projections(name: str, k: int, n: int) -> None:
    """A row's bits do not depend on how many rows there are, so one emulation serves all M."""
    weight = random_weight(name, n, k, k + n)
    x = bell(max(ROWS), k, n)
    expected = to_gpu(quantised_linear(x, weight))
    device, rows = on_gpu(weight), to_gpu(x)
    demand_cases(
        "quantised_linear",
        [Case(f"{name} {m}x{n}x{k}", partial(quantised_linear, rows[:m], device), lambda m=m: expected[:m]) for m in ROWS],
    )


@pytest.mark.parametrize("name", FORMATS)
def test_float32_activations(name: str) -> None:
    """The recipes with float32 activations: three parts."""
    weight = random_weight(name, 1000, 2560)
    x = bell(100, 2560, 3, np.float32) * np.float32(3)
    expected = to_gpu(quantised_linear(x, weight, recipe="llama.cpp"))
    device, rows = on_gpu(weight), to_gpu(x)
    call = partial(quantised_linear, recipe="llama.cpp")
    demand_cases(
        "quantised_linear",
        [Case(f"{name} float32 {m}", partial(call, rows[:m], device), lambda m=m: expected[:m]) for m in (1, 3, 8, 9, 33, 100)],
    )


@pytest.mark.parametrize("name", FORMATS)
def test_other_roads(name: str) -> None:
    """Decoded to bfloat16, and llama.cpp's integer dot products, packed and not."""
    weight = random_weight(name, 1024, 4096)
    x = bell(16, 4096, 4)
    cases = []
    for recipe, options in (("torch", {"k_slices": 2}), ("llama.cpp-q8_1", {})):
        for m in (1, 4, 5, 8, 16):
            given = x[:m] if recipe == "torch" else x[:m].astype(np.float32)
            for packed in (True, False):
                call = partial(quantised_linear, to_gpu(given), on_gpu(weight, packed), recipe=recipe, **options)
                expected = partial(quantised_linear, given, weight, recipe=recipe, **options)
                cases.append(Case(f"{name} {recipe} {m}", call, expected))
    demand_cases("quantised_linear", cases)


@pytest.mark.parametrize("configuration", [*_linear_quantised.ANYWHERE, *_linear_quantised.STREAMED], ids=str)
def test_every_configuration(configuration: Any) -> None:
    """Awkward sizes: rows that fill no tile, slices of unequal length, several rounds."""
    if not configuration.kernel.runs_on(launch.capability(0)):
        pytest.skip("not for this GPU")
    compared = 0
    for m, n, k in ((min(configuration.tokens, 13), 5003, 1280), (1, 24, 256), (configuration.tokens, 7003, 512)):
        weight = random_weight(configuration.form, n, k, m)
        x = bell(m, k, n, np.float32 if configuration.parts == 3 else bfloat16)
        out = cupy().empty((m, n), np.float32)
        for slices in (8, 3):
            out.view(np.uint32)[...] = 0x7FC0DEAD
            try:
                _gpu_quantised.multiply(to_gpu(x), on_gpu(weight), out, slices, configuration=configuration)
            except ValueError as error:
                if "cannot take" not in str(error):
                    raise
                continue  # its shared memory does not do
            expected = projection.project(x, weight, SCALED, slices)
            demand_same("quantised_linear", out, expected, f"{configuration} {m}x{n}x{k} / {slices}")
            compared += 1
    assert compared >= 4


@pytest.mark.parametrize("configuration", WGMMA, ids=str)
def test_every_configuration_of_warpgroups(configuration: Any) -> None:
    """Rows that fill no tile, columns that fill no block, slices of unequal length, fewer than there are shares."""
    if not configuration.kernel.runs_on(launch.capability(0)):
        pytest.skip("not for this GPU")
    piece, tokens = tiles.piece_columns(FORMATS[configuration.form]), configuration.tokens
    for m, n, pieces, slices in ((tokens, 333, 8, 8), (tokens + 5, 7003, 15, 8), (3, 20003, 9, 3), (1, 40, 1, 1)):
        weight, x = random_weight(configuration.form, n, piece * pieces, m), bell(m, piece * pieces, n)
        out = cupy().empty((m, n), np.float32)
        out.view(np.uint32)[...] = 0x7FC0DEAD
        _gpu_quantised.multiply(to_gpu(x), on_gpu(weight), out, slices, configuration=configuration)
        demand_same("quantised_linear", out, projection.project(x, weight, SCALED, slices), f"{m}x{n}x{piece * pieces} / {slices}")


def test_unaligned_rows_and_guarded_outputs() -> None:
    weight = random_weight("Q4_0", 333, 96)
    device = on_gpu(weight)
    wide = bell(40, 128, 5)
    for m, first in ((1, 3), (7, 1), (40, 0)):
        x = wide[:m, first : first + 96]
        guarded = Guarded((m, 333), bfloat16, misplaced=1)
        quantised_linear(to_gpu(wide)[:m, first : first + 96], device, out=guarded.out)
        guarded.demand_intact(f"{m} rows")
        demand_same("quantised_linear", guarded.out, quantised_linear(np.ascontiguousarray(x), weight), f"{m} rows")


def test_special_values() -> None:
    for name in FORMATS:
        weight = random_weight(name, 64, 512)
        place = 208 if name == "Q6_K" else 0
        weight.data[3, place : place + 2] = np.array([np.nan], "<f2").view(np.uint8)
        weight.data[9, place : place + 2] = np.array([-np.inf], "<f2").view(np.uint8)
        x = bell(5, 512, 6)
        x[1, 7], x[2, 300], x[4, 0] = bfloat16(np.inf), bfloat16(np.nan), bfloat16(1e-39)
        for recipe in ("block-scaled", "llama.cpp", "llama.cpp-q8_1"):
            found = quantised_linear(to_gpu(x), on_gpu(weight), recipe=recipe)
            demand_same("quantised_linear", found, quantised_linear(x, weight, recipe=recipe), f"{name} {recipe}")


@pytest.mark.parametrize("recipe", ["block-scaled", "llama.cpp", "llama.cpp-q8_1", "torch"])
def test_rms_norm_qkv(recipe: str) -> None:
    """Formats mixed, with rotation; and one packed weight."""
    parts = (random_weight("Q4_K", 512, 1024), random_weight("Q4_K", 256, 1024, 1), random_weight("Q6_K", 256, 1024, 2))
    norms = [random_bf16(seed, size, scale=scale) for seed, size, scale in ((1, 1024, 1.0), (2, 128, 3.0), (3, 128, 40.0))]
    if recipe.startswith("llama"):
        norms = [norm.astype(np.float32) for norm in norms]
    dtype = np.float32 if cufuse.recipes[recipe].rope.tables == "float32" else bfloat16
    cos, sin = cufuse.rope_tables(np.arange(5), 128, dtype=dtype)
    x = bell(5, 1024, 7)
    packed = quantised.concatenate([random_weight("Q4_0", rows, 1024, rows) for rows in (512, 256, 256)])
    for weights, options in ((parts, {}), (packed, {"heads": 4})):
        device: Any = tuple(map(on_gpu, weights)) if isinstance(weights, tuple) else on_gpu(weights)
        tables, given = {"cos": cos, "sin": sin}, {"recipe": recipe, "k_slices": 1 if recipe == "torch" else None, **options}
        expected = cufuse.rms_norm_qkv(x, norms[0], weights, norms[1], norms[2], **tables, **given)
        on_device = {name: to_gpu(table) for name, table in tables.items()}
        first, *heads = map(to_gpu, norms)
        found = cufuse.rms_norm_qkv(to_gpu(x), first, device, *heads, **on_device, **given)
        for name, one, other in zip("qkv", found, expected, strict=True):
            demand_same("rms_norm_qkv, quantised", one, other, f"{recipe} {name}")


def test_capture() -> None:
    weight = random_weight("Q4_0", 4096, 1024)
    device, x = on_gpu(weight), to_gpu(bell(1, 1024, 8))
    out = cupy().empty((1, 4096), bfloat16)
    graph, stream = captured(lambda: quantised_linear(x, device, out=out))
    out.view(np.uint16)[...] = 0x7FC0
    graph.launch(stream)
    stream.synchronize()
    demand_same("quantised_linear", out, quantised_linear(to_host(x), weight), "captured")


def test_misuse() -> None:
    weight = random_weight("Q4_0", 16, 640)
    x = bell(2, 640, 9)
    with pytest.raises(TypeError, match="arrays of two libraries"):
        quantised_linear(to_gpu(x), weight)
    with pytest.raises(ValueError, match="for 2 rows the kernels take at most 8"):
        quantised_linear(to_gpu(x), on_gpu(weight), k_slices=10)
    shared = to_gpu(bell(1, 640, 1))
    with pytest.raises(ValueError, match="overlaps"):
        quantised_linear(shared, on_gpu(weight), out=shared[:, :16])
