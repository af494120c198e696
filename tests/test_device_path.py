"""From public operations on (pretended) CuPy arrays to kernels run on the host: bit for bit what NumPy arrays give.

What the kernels read and write, where, and how the recipes become macros is checked here without a GPU.
"""

import itertools
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_cast, _gpu_linear, _gpu_norm, _gpu_qkv, _gpu_rope, _norm_kernels, compiler, gemm, launch
from cufuse._gpu_heads import Unsuited
from cufuse.bf16 import bfloat16
from cufuse.recipe import Recipe
from tests import host_gpu
from tests.golden import inputs
from tests.host_gpu import Array, HostGpu
from tests.witnesses import demand_bits

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to run a kernel's text on the host")


# the host's rsqrt is correctly rounded
def with_correct_roots(recipe: Recipe) -> Recipe:
    return recipe.derive(recipe.name, norm={"rsqrt": "correct"}, head_norm={"rsqrt": "correct"})


RECIPES = {name: with_correct_roots(recipe) for name, recipe in cufuse.recipes.items()}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> HostGpu:
    return HostGpu(tmp_path_factory.mktemp("host"))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, compiled: HostGpu) -> Iterator[HostGpu]:
    yield from host_gpu.installed(monkeypatch, compiled)


def on_gpu(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(on_gpu, value))
    return Array(value) if isinstance(value, np.ndarray) else value


def demand_same(what: str, function: Any, *arrays: Any, **options: Any) -> None:
    """The call with pretended CuPy arrays against the call with NumPy arrays."""
    expected = function(*arrays, **options)
    found = function(*map(on_gpu, arrays), **{name: on_gpu(value) for name, value in options.items()})
    if not isinstance(expected, tuple):
        expected, found = (expected,), (found,)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        demand_bits(one.host, other, f"{what}, result {index}")


@pytest.mark.parametrize("name", RECIPES)
def test_norms_of_every_recipe(gpu: HostGpu, name: str) -> None:
    """Heads of q inside a packed projection, and a residual sum."""
    heads = inputs.heavy((5, 3, 6 * 64), 1).reshape(5, 3, 6, 64)[:, :, 1:5]
    demand_same(f"{name}, heads", cufuse.rms_norm, heads, inputs.norm_weight(64, 2, 96.5), recipe=RECIPES[name])
    x, residual = inputs.heavy((17, 256), 3), inputs.heavy((17, 256), 4, 3.0)
    demand_same(f"{name}, residual", cufuse.add_rms_norm, x, residual, inputs.norm_weight(256, 5, 8.0), recipe=RECIPES[name])


@pytest.mark.parametrize(
    ("rows", "columns", "cut"),
    [(1, 512, 0), (3, 512, 4), (20, 512, 1), (20, 2568, 0), (6, 101, 0), (300, 128, 0), (9, 36, 4), (2, 1, 0)],
)
def test_norms_of_many_shapes(gpu: HostGpu, rows: int, columns: int, cut: int) -> None:
    """Aligned and misaligned, in registers and in shared memory, the number of rows deciding the order."""
    x = inputs.heavy((rows, columns + cut), 1)[:, cut:]
    demand_same(f"{rows}x{columns}, cut {cut}", cufuse.rms_norm, x, inputs.norm_weight(columns, 2, 96.5), recipe=RECIPES["torch"])


def test_norms_with_float32(gpu: HostGpu) -> None:
    wide = np.random.default_rng(1).standard_normal((5, 200), np.float32)
    weight = inputs.norm_weight(200, 2, 96.5)
    for name, x in itertools.product(("float32", "llama.cpp", "torch"), (wide, inputs.heavy((5, 200), 3))):
        if name == "torch" and x is wide:
            continue
        demand_same(f"{name}, {x.dtype}", cufuse.rms_norm, x, weight.astype(np.float32) * np.float32(1.01), recipe=RECIPES[name])
    negative = RECIPES["gemma"].derive("offset", norm={"weight_offset": -0.1})
    demand_same("offset", cufuse.rms_norm, inputs.heavy((5, 200), 4), weight, recipe=negative)


def test_special_rows(gpu: HostGpu) -> None:
    for eps in (1e-6, 0.0):
        rows = inputs.special_rows(128)
        demand_same(f"eps {eps}", cufuse.rms_norm, rows, inputs.norm_weight(128, 2, 96.5), eps=eps, recipe=RECIPES["torch"])


def test_outputs_that_are_views(gpu: HostGpu) -> None:
    """Nothing beside the view is written."""
    x, weight = inputs.heavy((6, 4, 64), 1), inputs.norm_weight(64, 2, 96.5)
    expected = cufuse.rms_norm(x, weight, recipe=RECIPES["torch"])
    for first, gap in ((0, 0), (8, 8), (3, 5)):
        buffer = host_gpu.empty((6, 5, 64 + first + gap), bfloat16)
        before = buffer.host.copy()
        view = buffer[:, 1:, first : first + 64]
        assert cufuse.rms_norm(Array(x), Array(weight), recipe=RECIPES["torch"], out=view) is view
        demand_bits(view.host, expected)
        view.host[...] = before[:, 1:, first : first + 64]
        demand_bits(buffer.host, before, "beside the output")


@pytest.mark.parametrize("name", RECIPES)
def test_rotations_of_every_recipe(gpu: HostGpu, name: str) -> None:
    """q and k as parts of one buffer; tables of both types, in a batch that shares them."""
    recipe = RECIPES[name]
    both = inputs.heavy((2, 7, 6, 40), 1)
    cos, sin = cufuse.rope_tables(np.arange(7), 40, dtype=np.float32)
    tables = [(cos, sin)]
    if recipe.rope.tables == "bfloat16":
        tables.append((cufuse.round_to_bf16(cos), cufuse.round_to_bf16(sin)))
    for pair in tables:
        batch = [np.broadcast_to(table, (2, 7, 40)) for table in pair]
        demand_same(f"{name}, {pair[0].dtype}", cufuse.rope, both[:, :, :4], both[:, :, 4:], *batch, recipe=recipe)
    if not recipe.head_norm.round_weighted:
        wide = np.random.default_rng(1).standard_normal(both.shape, np.float32)
        demand_same(f"{name}, float32 q", cufuse.rope, wide[:, :, :4], both[:, :, 4:], *batch, recipe=recipe)


def test_rotation_of_one_pair_and_of_nothing(gpu: HostGpu) -> None:
    q, k = inputs.heavy((3, 2, 2), 1), inputs.heavy((3, 1, 2), 2)
    tables = cufuse.rope_tables(np.arange(3), 2)
    demand_same("D = 2", cufuse.rope, q, k, *tables)
    demand_same("no token", cufuse.rope, q[:0], k[:0], *(table[:0] for table in tables))
    demand_same("no key", cufuse.rope, q, k[:, :0], *tables)


def product(x: Array, weight: Array, out: Array, k_slices: int = 1, *, call: None = None) -> Array:
    """_gpu_linear.linear by the emulation: its kernels have a test of their own on the host."""
    kinds = ["float32" if array.itemsize == 4 else "bfloat16" for array in (x, out)]
    out.host[...] = gemm.project(x.host, weight.host, gemm.Gemm(input=kinds[0], output=kinds[1]), k_slices)  # type: ignore[arg-type]
    return out


def cast(x: Array, mode: str, random_bits: None, out: Array) -> None:
    cufuse.round_to_bf16(x.host, mode=mode, out=out.host)


@pytest.mark.parametrize("name", ["torch", "float32", "late-rounding", "separate-k-norm", "flashinfer"])
def test_blocks(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Packed and separate, with and without head norms, rotation and residual; outputs new, and views of one buffer."""
    def unsuited(*arguments: Any) -> None:
        raise Unsuited("the operations one by one are looked at here")

    monkeypatch.setattr(_gpu_qkv, "Chain", unsuited)
    monkeypatch.setattr(_gpu_qkv, "_calls", {})
    monkeypatch.setattr(_gpu_linear, "linear", product)
    monkeypatch.setattr(_gpu_cast, "round_to_bf16", cast)
    recipe, (x, residual) = RECIPES[name], (inputs.heavy((2, 3, 128), seed) for seed in (1, 2))
    packed = inputs.bell((6 * 64, 128), 3, 0.05)
    dtype = np.float32 if recipe.rope.tables == "float32" else bfloat16
    tables = dict(zip(("cos", "sin"), cufuse.rope_tables(np.arange(6).reshape(2, 3), 64, dtype=dtype), strict=True))
    norms = inputs.norm_weight(64, 4, 6.0), inputs.norm_weight(64, 5, 96.5)
    separate, nothing, residuals = (packed[:256], packed[256:320], packed[320:]), (None, None), {"residual": residual}
    for weight, heads, rotation, added in (
        (packed, norms, tables, residuals),
        (separate, norms, tables, {}),
        (packed, norms, {}, {}),
        (separate, nothing, tables, residuals),
        (packed, nothing, {}, residuals),
        (separate, nothing, {}, {}),
    ):
        options: dict[str, Any] = {"heads": 4, "head_dim": 64, "k_slices": 1, "recipe": recipe, **rotation, **added}
        given = (x, inputs.norm_weight(128, 6, 8.0), weight, *heads)
        what = f"{name}, {type(weight).__name__}, {[type(one).__name__ for one in heads]}, {[*rotation, *added]}"
        demand_same(what, cufuse.rms_norm_qkv, *given, **options)
        expected = cufuse.rms_norm_qkv(*given, **options)
        if expected[0].dtype == expected[2].dtype:
            buffer = host_gpu.empty((2, 3, 7, 64), expected[0].dtype)
            outs = (buffer[:, :, :4], buffer[:, :, 5:6], buffer[:, :, 6:], *[None] * len(added))
            named = {key: on_gpu(value) for key, value in options.items()}
            found = cufuse.rms_norm_qkv(*map(on_gpu, given), **named, out=outs)
            for one, other in zip(found, expected, strict=True):
                demand_bits(one.host, other, f"{what}, one buffer")
            assert (buffer.host[:, :, 4].view(np.uint8) == 0xA5).all()


def test_refusals(gpu: HostGpu) -> None:
    x, weight = Array(inputs.heavy((8, 64), 1)), Array(inputs.norm_weight(64, 2, 2.0))
    with pytest.raises(ValueError, match=r"out overlaps x in memory; give an array of its own"):
        cufuse.rms_norm(x[:4], weight, out=x[3:7])
    residual = Array(inputs.heavy((8, 64), 3))
    with pytest.raises(ValueError, match=r"out\[1\] overlaps residual in memory"):
        cufuse.add_rms_norm(x, residual, weight, out=(None, residual[::-1]))
    with pytest.raises(ValueError, match=r"x has a stride of 4 bytes along its last axis.*ascontiguousarray\(x\)"):
        cufuse.rms_norm(x[:, ::2], weight[:32])
    with pytest.raises(ValueError, match=r"x is on device 0, weight is on device 1.*bring all to one"):
        cufuse.rms_norm(x, Array(weight.host, device=1))
    with pytest.raises(ValueError, match=r"x has 200000 columns, whose rows take \d+ bytes .* NumPy arrays run the emulation"):
        cufuse.rms_norm(Array(inputs.heavy((1, 200000), 1)), Array(inputs.norm_weight(200000, 2, 2.0)), recipe="torch-rms-norm")
    with pytest.raises(ValueError, match=r"130560 columns"):
        cufuse.rms_norm(Array(inputs.heavy((1, 131000), 1)), Array(inputs.norm_weight(131000, 2, 2.0)))
    own = cufuse.recipes["torch"].derive("cpu", norm={"sum_order": "llama.cpp-cpu"})
    with pytest.raises(ValueError, match=r"no kernel adds in"):
        cufuse.rms_norm(x, weight, recipe=own)
    q, tables = Array(inputs.heavy((3, 2, 64), 1)), [Array(table) for table in cufuse.rope_tables(np.arange(3), 64)]
    with pytest.raises(ValueError, match=r"out\[0\] overlaps q in memory"):
        cufuse.rope(q, q, *tables, out=(q, None))
    with pytest.raises(ValueError, match=r"out\[0\] overlaps out\[1\] in memory"):
        cufuse.rope(q, q, *tables, out=(out := host_gpu.empty((3, 2, 64), bfloat16), out))


@pytest.mark.parametrize("direct", [False, True])
def test_all_schedules_have_the_same_bits(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch, direct: bool) -> None:
    real = _norm_kernels.configuration

    def demanded(*arguments: Any, **options: Any) -> _norm_kernels.Configuration:
        return real(*arguments, **options, direct=direct)

    monkeypatch.setattr(_gpu_norm, "configuration", demanded)
    calls = [("torch", 3), ("torch", 20), ("torch-rms-norm", 3), ("nano-vllm", 3), ("vllm-0.19", 3)]
    for name, rows in calls:
        x, weight = inputs.heavy((rows, 512), rows), inputs.norm_weight(512, 2, 96.5)
        demand_same(f"{name}, direct {direct}", cufuse.rms_norm, x, weight, recipe=RECIPES[name])
        assert dict(gpu.launched[-1].defines)["DIRECT"] == direct
    with pytest.raises(ValueError, match="cannot hold"):
        real(cufuse.recipes["torch"].norm, 20, 8128, 4, _norm_kernels.Types(), direct=True)


def test_names_are_unique_and_follow_the_configuration() -> None:
    kernels = launch.kernels()
    assert len({kernel.name for kernel in kernels}) == len(kernels)
    norm = cufuse.recipes["torch"].norm
    found = [
        _norm_kernels.configuration(norm, rows, columns, chunk, _norm_kernels.Types(weight=weight)).kernel
        for rows, columns, chunk, weight in itertools.product((1, 2, 4, 8, 16, 600), (128, 1000, 4096), (8, 4, 1), (True, False))
    ]
    assert len({kernel.name for kernel in found}) == len(set(found))


@pytest.mark.parametrize("columns", [1, 128, 1001, 8192, 65536])
def test_norm_kernels_compile(columns: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """For lengths that no table of kernels has, with assertions about the schedule in the source."""
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path))
    few = (("torch", 1), ("torch", 64), ("torch-rms-norm", 64), ("vllm-0.19", 300), ("nano-vllm", 5))
    for name, rows in (*few, ("torch-rms-norm", 2048)):
        chunk = np.gcd(8, columns)
        kernel = _norm_kernels.configuration(cufuse.recipes[name].norm, rows, columns, int(chunk), _norm_kernels.Types()).kernel
        cubin = compiler.compile_kernel(kernel, "sm_90a")
        assert cubin.spills == 0, kernel.name
        assert cubin.registers * kernel.threads <= compiler.REGISTERS_PER_BLOCK


@pytest.mark.parametrize(("columns", "rows", "direct"), [(4096, 1055, 1), (4096, 1056, 0), (8192, 1056, 0), (2560, 1056, 1)])
def test_many_rows_go_through_shared_memory(columns: int, rows: int, direct: int) -> None:
    """Of 4096 and 8192, from eight for each multiprocessor on; every thread has two packs of eight then."""
    norm = cufuse.recipes["torch-rms-norm"].norm
    found = _norm_kernels.configuration(norm, rows, columns, 8, _norm_kernels.Types(), multiprocessors=132).kernel
    defines = dict(found.defines)
    assert defines["DIRECT"] == direct
    assert direct or defines["GROUP"] == columns // 16


def test_rotation_kernels_are_named_for_what_they_do() -> None:
    assert [kernel.name for kernel in _gpu_rope.KERNELS if kernel.name.endswith("round products, by 8")]
