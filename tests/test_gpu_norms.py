"""``rms_norm`` and ``add_rms_norm`` on a GPU: bits of Hugging Face, of ``F.rms_norm`` and of the emulation."""

import gc
import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_norm
from cufuse.bf16 import bfloat16, nearest
from cufuse.emulation.rsqrt import rsqrt
from cufuse.emulation.sums import SUM_ORDERS, torch_mean_factor
from cufuse.recipe import Norm, Recipe
from tests import gpu_support
from tests.golden import inputs
from tests.gpu_support import (
    EPS,
    Case,
    Guarded,
    against_numpy,
    demand_cases,
    demand_same,
    given_by,
    rehearse,
    to_gpu,
    to_host,
    values,
)

pytestmark = gpu_support.MARKS

COLUMNS = (1, 2, 7, 64, 100, 128, 896, 1000, 1024, 2048, 2560, 4096, 5120, 8192, 16384, 65536)
ROWS = (1, 2, 3, 5, 8, 16, 17, 64, 1000, 8192)
EMULATED = 1 << 17
"""Elements of a case that the emulation goes through: of larger ones the first and the last rows."""


def _recipes() -> dict[str, Recipe]:
    """Recipes whose norms differ, and orders and roots that no named recipe has."""
    torch = cufuse.recipes["torch"]
    found = {recipe.norm: recipe for recipe in cufuse.recipes.values()}
    derived = [
        torch.derive("torch 2.9", norm={"sum_order": "torch-mean-2.9"}),
        torch.derive("correct rsqrt", norm={"rsqrt": "correct"}),
        torch.derive("vllm-add alone", norm={"sum_order": "vllm-add"}),
        torch.derive("offset", norm={"weight_offset": -0.3, "round_normalised": False}),
    ]
    return {recipe.name: recipe for recipe in (*found.values(), *derived)}


RECIPES = _recipes()


def weight_of(columns: int) -> np.ndarray:
    return inputs.norm_weight(columns, 5 + columns, 96.5)


@pytest.mark.parametrize("columns", [*COLUMNS, 33, 129, 1001, 4099])
def test_hugging_face_and_functional(columns: int) -> None:
    """Qwen3RMSNorm (eager) and torch.nn.functional.rms_norm on the same memory."""
    torch = gpu_support.torch()
    rows = (*ROWS, 4099) if columns == 4099 else ROWS  # 4099 * 4099 is no float32: PyTorch's factor is not float32(1 / K)
    base, weight = values((max(rows), columns), columns), to_gpu(weight_of(columns))
    module = hugging_face(weight)

    def fused(tensor: Any) -> Any:
        return torch.nn.functional.rms_norm(tensor, (columns,), module.weight, eps=EPS)

    for area, recipe, peer in (("norm, Hugging Face", "torch", module), ("norm, F.rms_norm", "torch-rms-norm", fused)):
        norm = partial(cufuse.rms_norm, eps=EPS, recipe=recipe)
        shapes = [base[:count] for count in rows]
        demand_cases(
            area, [Case(f"{recipe}, {len(x)}x{columns}", partial(norm, x, weight), partial(given_by, peer, x)) for x in shapes]
        )


def hugging_face(weight: Any) -> Any:
    """transformers' norm with a CuPy array as its weight."""
    torch = gpu_support.torch()
    module = gpu_support.qwen3().Qwen3RMSNorm(weight.shape[0], eps=EPS).to("cuda")
    module.weight = torch.nn.Parameter(gpu_support.to_torch(weight), requires_grad=False)
    return module


def emulated(x: np.ndarray, weight: np.ndarray, norm: Norm, first: int, all_rows: int) -> np.ndarray:
    """The emulation of some rows of a larger call, x [rows, K] beginning at row ``first`` of ``all_rows``."""
    order, columns, wide = SUM_ORDERS[norm.sum_order], x.shape[1], x.astype(np.float32)
    with np.errstate(all="ignore"):
        if order.has_own_mean(columns):
            assert order.own_mean is not None
            mean = order.own_mean(wide, all_rows, first, norm.contract)
        else:
            total = order.function(wide, all_rows, first, norm.contract)
            factor = {"factor": torch_mean_factor(all_rows, columns), "reciprocal": np.float32(1) / np.float32(columns)}
            mean = total / np.float32(columns) if norm.mean == "divide" else total * factor[norm.mean]
        h = wide * rsqrt(mean + np.float32(EPS), norm.rsqrt)[:, None]
        if norm.round_normalised:
            h = nearest(h).astype(np.float32)
        y = h * (weight.astype(np.float32) + np.float32(norm.weight_offset))
    promoted = weight.dtype == np.float32 and norm.float32_weight == "promote"
    return nearest(y) if norm.round_weighted and not promoted else y


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_against_the_emulation(name: str) -> None:
    """All rows, or of large arrays the first and the last ones."""
    recipe, gpu = RECIPES[name], gpu_support.cupy()
    for columns in COLUMNS:
        weight, part = weight_of(columns), max(1, EMULATED // columns)
        some = to_gpu(inputs.heavy((min(1000, part), columns), columns).view(np.uint16))
        # the test above has rows of 65536 columns by the thousand
        base = gpu.tile(some, (-(-(max(ROWS) if columns < 65536 else 64) // len(some)), 1)).view(bfloat16)
        shapes = [base[:count] for count in ROWS if count <= len(base)]
        weight_on_gpu = to_gpu(weight)
        rehearse(partial(cufuse.rms_norm, x, weight_on_gpu, eps=EPS, recipe=recipe) for x in shapes)
        for x in shapes:
            found = cufuse.rms_norm(x, weight_on_gpu, eps=EPS, recipe=recipe)
            for first, last in [(0, len(x))] if len(x) <= 2 * part else [(0, part), (len(x) - part, len(x))]:
                expected = emulated(to_host(x[first:last]), weight, recipe.norm, first, len(x))
                what = f"{name}, {len(x)}x{columns}, rows {first} to {last}"
                demand_same("norm, emulation", found[first:last], expected, what)


@pytest.mark.parametrize("name", RECIPES)
def test_special_rows(name: str) -> None:
    """Zeros of both signs, subnormals, the largest values, NaN, infinity; eps 0 too."""
    norm = partial(cufuse.rms_norm, recipe=RECIPES[name])
    cases = [
        against_numpy(f"{name}, K {k}, eps {eps}", norm, inputs.special_rows(k), weight_of(k), eps=eps)
        for k in (64, 128, 1000, 1001, 4096)
        for eps in (EPS, 0.0)
    ]
    demand_cases("norm, special rows", cases)


def test_special_rows_and_float32_weights_against_hugging_face() -> None:
    cases = []
    for columns in (64, 128, 1000, 1024, 4096):
        rows, narrow = to_gpu(inputs.special_rows(columns)), weight_of(columns)
        for weight in (narrow, narrow.astype(np.float32) * np.float32(1.001)):
            on_gpu = to_gpu(weight)
            call = partial(cufuse.rms_norm, rows, on_gpu, eps=EPS)
            cases.append(Case(f"{weight.dtype} weight, K {columns}", call, partial(given_by, hugging_face(on_gpu), rows)))
    demand_cases("norm, Hugging Face", cases)


@pytest.mark.parametrize("name", [name for name, one in RECIPES.items() if one.norm.float32_weight != "refuse"])
def test_float32_weights_and_activations(name: str) -> None:
    recipe, rng = RECIPES[name], np.random.default_rng(7)
    cases = []
    for columns in (7, 100, 128, 1000, 4096):
        narrow_weight = weight_of(columns)
        weights = (narrow_weight.astype(np.float32) * np.float32(1.001), narrow_weight)
        for count in (1, 5, 17, 600):
            narrow = inputs.heavy((count, columns), columns + count)
            both = [narrow, rng.standard_normal(narrow.shape, np.float32)] if recipe.float32_activations else [narrow]
            for x, weight in itertools.product(both, weights):
                what = f"{name}, {count}x{columns}, {x.dtype}, weight {weight.dtype}"
                cases.append(against_numpy(what, cufuse.rms_norm, x, weight, eps=EPS, recipe=recipe))
    demand_cases("norm, float32", cases)


def residual_pair(recipe: Recipe, count: int, columns: int) -> list[np.ndarray]:
    pair = [inputs.heavy((count, columns), columns + count), inputs.heavy((count, columns), 2 * columns + count, 3.0)]
    if recipe.residual_sum == "float32":
        pair[1] = pair[1].astype(np.float32) * np.float32(1 + 2.0**-12)
    return pair


@pytest.mark.parametrize("name", cufuse.recipes)
def test_residual_sum(name: str) -> None:
    cases = [
        against_numpy(
            f"{name}, {m}x{k}", cufuse.add_rms_norm, *residual_pair(cufuse.recipes[name], m, k), weight_of(k), eps=EPS, recipe=name
        )
        for k in (100, 128, 1000, 1001, 4096, 5120)
        for m in (1, 3, 17, 300)
    ]
    demand_cases("norm of a residual sum", cases)


def test_residual_sum_against_hugging_face() -> None:
    def peer(module: Any, x: Any, residual: Any) -> tuple[Any, Any]:
        total = given_by(lambda a, b: a + b, x, residual)
        return given_by(module, total), total

    cases = []
    for count, columns in ((1, 1024), (16, 2560), (1000, 4096), (8192, 5120)):
        x, residual, weight = values((count, columns), 1), values((count, columns), 2, scale=3.0), to_gpu(weight_of(columns))
        call = partial(cufuse.add_rms_norm, x, residual, weight, eps=EPS)
        cases.append(Case(f"residual sum, {count}x{columns}", call, partial(peer, hugging_face(weight), x, residual)))
    demand_cases("norm, Hugging Face", cases)


LAYOUTS = {
    "heads of a packed projection": lambda x: x.reshape(6, 5, 8, -1)[:, :, 2:6],
    "every second row": lambda x: x[::2],
    "rows backwards": lambda x: x[::-1],
    "columns 4 to the end": lambda x: x[:, 4:],
    "columns 1 to the end": lambda x: x[:, 1:],
    "transposed batch": lambda x: x.reshape(6, 40, -1).transpose(1, 0, 2),
    "one row many times": lambda x: gpu_support.cupy().broadcast_to(x[3], (9, x.shape[1])),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_where_they_lie(layout: str) -> None:
    """Strided inputs without a copy, strided and misplaced outputs, nothing written beside them."""
    guards: list[tuple[str, Guarded]] = []
    cases = []
    for columns, name in itertools.product((128, 1004, 4096), ("torch", "torch-rms-norm", "flashinfer", "llama.cpp")):
        x = LAYOUTS[layout](to_gpu(inputs.heavy((240, columns), columns)))
        host, weight = to_host(x), weight_of(x.shape[-1])
        dtype = bfloat16 if cufuse.recipes[name].norm.round_weighted else np.float32
        expected = partial(cufuse.rms_norm, host, weight, recipe=name)
        for gap, misplaced in ((0, 0), (8, 0), (3, 1)):
            what = f"{name}, {layout}, K {columns}, gap {gap}, misplaced {misplaced}"
            guards.append((what, Guarded(x.shape, dtype, gap=gap, misplaced=misplaced)))
            call = partial(cufuse.rms_norm, x, to_gpu(weight), recipe=name, out=guards[-1][1].out)
            cases.append(Case(what, call, expected))
    demand_cases("norm, strided", cases)
    for what, guard in guards:
        guard.demand_intact(what)


@pytest.mark.parametrize("name", ["torch", "torch-rms-norm", "vllm-0.19", "nano-vllm", "float32"])
def test_nothing_beside_the_outputs_is_written(name: str) -> None:
    recipe = cufuse.recipes[name]
    kinds = [bfloat16 if rounded else np.float32 for rounded in (recipe.norm.round_weighted, recipe.residual_sum != "float32")]
    guards: list[tuple[str, Guarded]] = []
    cases = []
    for columns, count in itertools.product((1, 7, 100, 128, 1000, 1024, 4096, 8192), (1, 9, 67)):
        arrays = (*residual_pair(recipe, count, columns), weight_of(columns))
        what = f"{name}, guarded, {count}x{columns}"
        pair = [Guarded((count, columns), kind, misplaced=shift) for kind, shift in zip(kinds, (0, 2), strict=True)]
        guards += [(what, guard) for guard in pair]
        call = partial(cufuse.add_rms_norm, *map(to_gpu, arrays), recipe=name, out=tuple(guard.out for guard in pair))
        cases.append(Case(what, call, partial(cufuse.add_rms_norm, *arrays, recipe=name)))
    demand_cases("norm of a residual sum", cases)
    for what, guard in guards:
        guard.demand_intact(what)


@pytest.mark.parametrize(("name", "count", "columns"), [("torch", 1, 4096), ("torch", 700, 2560), ("flashinfer", 33, 5120)])
def test_repeated_concurrent_and_replayed(name: str, count: int, columns: int) -> None:
    """A hundred runs, four streams at once and replays of a graph give the same bits; no run allocates."""
    gpu = gpu_support.cupy()
    x, weight = to_gpu(inputs.heavy((count, columns), 3)), to_gpu(weight_of(columns))
    first = cufuse.rms_norm(x, weight, recipe=name)
    results = gpu.zeros((100, count, columns), np.uint16).view(bfloat16)
    gc.collect()
    before = gpu.get_default_memory_pool().used_bytes()
    for result in results:
        cufuse.rms_norm(x, weight, recipe=name, out=result)
    assert gpu.get_default_memory_pool().used_bytes() <= before
    demand_same("norm, repeated", results, gpu.broadcast_to(first, results.shape), f"{name}, in turn")

    results.view(np.uint16)[...] = 0
    gpu.cuda.Device().synchronize()
    streams = [gpu.cuda.Stream(non_blocking=True) for _ in range(4)]
    for index, result in enumerate(results):
        with streams[index % 4]:
            cufuse.rms_norm(x, weight, recipe=name, out=result)
    gpu.cuda.Device().synchronize()
    demand_same("norm, repeated", results, gpu.broadcast_to(first, results.shape), f"{name}, four streams")

    out = results[0]
    graph, stream = gpu_support.captured(lambda: cufuse.rms_norm(x, weight, recipe=name, out=out))
    for turn in range(3):
        out.view(np.uint16)[...] = 0
        x.view(np.uint16)[...] = codes_of_turn(count, columns, turn)
        gpu.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        expected = cufuse.rms_norm(x.copy(), weight, recipe=name)
        demand_same("norm, repeated", out, expected, f"{name}, replay {turn}")


def codes_of_turn(count: int, columns: int, turn: int) -> Any:
    return gpu_support.cupy().asarray(inputs.heavy((count, columns), 100 + turn).view(np.uint16))


def test_misuse() -> None:
    gpu = gpu_support.cupy()
    x, weight = values((8, 64), 1), to_gpu(weight_of(64))
    with pytest.raises(ValueError, match=r"out overlaps x in memory"):
        cufuse.rms_norm(x[:4], weight, out=x[3:7])
    with pytest.raises(ValueError, match=r"x has a stride of 4 bytes along its last axis.*ascontiguousarray\(x\)"):
        cufuse.rms_norm(x[:, ::2], weight[:32])
    with pytest.raises(ValueError, match=r"weight has a stride"):
        cufuse.rms_norm(x[:, :32], weight[::2])
    with pytest.raises(ValueError, match=r"x has shape .* levels of strides.*ascontiguousarray"):
        cufuse.rms_norm(values((4, 5, 6, 64), 1).transpose(2, 1, 0, 3), weight)
    with pytest.raises(ValueError, match=r"x has 200000 columns"):
        cufuse.rms_norm(values((1, 200000), 1), to_gpu(weight_of(200000)), recipe="torch-rms-norm")
    with pytest.raises(TypeError, match=r"arrays of two libraries"):
        cufuse.rms_norm(x, weight_of(64))
    assert cufuse.rms_norm(x[:0], weight).shape == (0, 64)
    # parts of one buffer interleave without sharing an element
    packed = gpu.concatenate([x.view(np.uint16)] * 2, axis=1).view(bfloat16)
    found = cufuse.rms_norm(packed[:, :64], weight, out=packed[:, 64:])
    demand_same("norm, strided", found, cufuse.rms_norm(x, weight), "one half into the other")


def test_the_gpu_that_holds_the_arrays_computes() -> None:
    """On a machine with several GPUs, whichever is current."""
    gpu = gpu_support.cupy()
    last = gpu.cuda.runtime.getDeviceCount() - 1
    expected = cufuse.rms_norm(inputs.heavy((5, 256), 1), weight_of(256))
    with gpu.cuda.Device(last):
        x, weight = to_gpu(inputs.heavy((5, 256), 1)), to_gpu(weight_of(256))
    found = cufuse.rms_norm(x, weight)
    assert found.device.id == last
    with gpu.cuda.Device(last):
        demand_same("norm, emulation", found, expected, f"device {last}")
    if last:
        with pytest.raises(ValueError, match=r"x is on device 0, weight is on device"):
            cufuse.rms_norm(to_gpu(inputs.heavy((5, 256), 1)), weight)


def test_plans_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_gpu_norm, "_MOST_PLANS", 3)
    monkeypatch.setattr(_gpu_norm, "_plans", {})
    weight = to_gpu(weight_of(64))
    base = values((20, 64), 1)
    for count in range(1, 20):
        cufuse.rms_norm(base[:count], weight)
        assert len(_gpu_norm._plans) <= 3
