"""``linear`` on a GPU: bits of F.linear, of cuBLAS through CuPy, of the emulation; every configuration; and the launch itself."""

import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_linear, compiler, cublaslt, launch
from cufuse import _linear_small_m as small_m
from cufuse import _linear_tiles as tiles
from cufuse.bf16 import bfloat16
from cufuse.compiler import Kernel
from cufuse.emulation import tensor_core
from tests import gpu_support
from tests.golden import inputs
from tests.gpu_support import Case, Guarded, captured, codes, demand_cases, demand_same, given_by, to_gpu, to_host, values

pytestmark = gpu_support.MARKS

PACKED = ((1024, 4096), (2048, 4096), (2560, 6144), (4096, 6144), (5120, 7168), (5120, 10240))
OTHERS = ((4096, 4096), (4096, 1024), (5120, 1024), (12288, 4096), (8192, 1024), (128, 4096), (4096, 24576))
ROWS = (1, 2, 3, 7, 8, 9, 16, 17, 24, 32, 33, 64, 65, 100, 128, 129, 200, 256, 512, 777, 2048)
RAGGED = ((1000, 8), (1000, 777), (72, 40), (1032, 130), (999, 33), (4096, 4099), (64, 8), (8, 8), (1, 1))

CONFIGURATIONS = (*small_m.CONFIGURATIONS, *tiles.WARPGROUP, *tiles.MMA)
EXPERIMENTS = (
    small_m.Configuration(8, 16, 256, True, boxes=False),
    small_m.Configuration(64, 16, 256, False, cluster=4),
    tiles.WarpgroupConfiguration(2, 128, 2, 2, True),
)


def f_linear(x: Any, weight: Any) -> Any:
    """torch.nn.functional.linear."""
    return given_by(gpu_support.torch().nn.functional.linear, x, weight)


def by_cublas(x: Any, weight: Any) -> Any:
    """The same from CuPy's cuBLAS: column-major out^T = op_T(weight^T) x^T."""
    gpu = gpu_support.cupy()
    (m, k), n = x.shape, weight.shape[0]
    out = gpu.empty((m, n), bfloat16)
    one, zero = np.array(1, np.float32), np.array(0, np.float32)
    gpu.cuda.cublas.gemmEx(
        gpu.cuda.device.get_cublas_handle(), gpu.cuda.cublas.CUBLAS_OP_T, gpu.cuda.cublas.CUBLAS_OP_N, n, m, k,
        one.ctypes.data, weight.data.ptr, 14, k, x.data.ptr, 14, k, zero.ctypes.data, out.data.ptr, 14, n, 68, -1,
    )  # fmt: skip
    return out


def product(x: Any, weight: Any, k_slices: int = 1, dtype: Any = bfloat16, **options: Any) -> Any:
    """_gpu_linear into poisoned memory."""
    guarded = Guarded((len(x), len(weight)), dtype)
    _gpu_linear.linear(x, weight, guarded.out, k_slices, **options)
    guarded.demand_intact("product")
    return guarded.out


@pytest.mark.parametrize("shape", PACKED + OTHERS)
def test_f_linear(shape: tuple[int, int]) -> None:
    k, n = shape
    weight = values((n, k), n, scale=k**-0.5)
    rows = {m: values((m, k), m) for m in ROWS}
    cases = []
    for m, x in rows.items():
        what = f"M {m}, K {k}, N {n}, {cublaslt.k_slices(m, n, k)} slices"
        cases.append(Case(what, partial(cufuse.linear, x, weight), partial(f_linear, x, weight)))
    demand_cases("projection, F.linear", cases)


@pytest.mark.parametrize("shape", RAGGED)
def test_ragged_shapes(shape: tuple[int, int]) -> None:
    """One slice, whatever cuBLAS would take: against the emulation where it is quick, else against the plainest kernel."""
    k, n = shape
    weight = values((n, k), n)
    for m in (1, 5, 40, 131, 777):
        x = values((m, k), m)
        for dtype in (bfloat16, np.float32):
            found = product(x, weight, dtype=dtype)
            plain = product(x, weight, dtype=dtype, configuration=next(c for c in tiles.MMA if not c.vector and c.parts == 1))
            demand_same("projection, ragged", found, plain, f"M {m}, K {k}, N {n}, {dtype}")
            if m * n * k < 2e7:
                expected = tensor_core.matmul(to_host(x), to_host(weight))
                expected = expected if dtype == np.float32 else cufuse.round_to_bf16(expected)
                demand_same("projection, emulation", found, expected, f"M {m}, K {k}, N {n}, {dtype}, emulation")


@pytest.fixture(scope="module")
def _compiled() -> None:
    """Every configuration's machine code, made on all cores."""
    x, wide, weight = values((8, 512), 1), values((8, 512), 1, dtype=np.float32), values((64, 512), 2)
    out = gpu_support.cupy().empty((8, 64), bfloat16)

    def call(configuration: Any) -> None:
        parts = isinstance(configuration, tiles.MmaConfiguration) and configuration.parts > 1
        _gpu_linear.linear(wide if parts else x, weight, out, configuration=configuration)

    gpu_support.rehearse(partial(call, configuration) for configuration in CONFIGURATIONS + EXPERIMENTS)


@pytest.mark.usefixtures("_compiled")
@pytest.mark.parametrize("configuration", CONFIGURATIONS + EXPERIMENTS, ids=lambda c: c.kernel.name)
def test_every_configuration(configuration: Any) -> None:
    """Against the plainest kernel; several times, since a race would change its bits."""
    compared = 0
    for m, n, k, slices in (
        (1, 4096, 1024, 1), (7, 1000, 4096, 1), (16, 6144, 2560, 1), (29, 1024, 4096, 3), (64, 10240, 5120, 1), (61, 4104, 832, 2),
        (128, 6144, 4096, 1), (257, 3000, 1032, 1), (777, 1024, 8192, 3), (2048, 4096, 1024, 1),
    ):  # fmt: skip
        wide = isinstance(configuration, tiles.MmaConfiguration) and configuration.parts > 1
        x, weight = values((m, k), m, dtype=np.float32 if wide else bfloat16), values((n, k), n)
        plain = next(c for c in tiles.MMA if not c.vector and (c.parts > 1) == wide)
        try:
            first = product(x, weight, slices, configuration=configuration)
        except ValueError:
            continue
        what = f"{m, n, k, slices}"
        demand_same("projection, configurations", first, product(x, weight, slices, configuration=plain), what)
        for _ in range(5):
            again = product(x, weight, slices, configuration=configuration)
            demand_same("projection, repeated", again, first, what)
        compared += 1
    assert compared


def test_slices_against_the_emulation() -> None:
    for m, n, k, slices in ((1, 96, 4096, 2), (20, 72, 4096, 3), (70, 64, 1088, 4), (3, 40, 1000, 3), (2, 33, 200, 9)):
        x, weight = values((m, k), m), values((n, k), n)
        expected = tensor_core.matmul(to_host(x), to_host(weight), k_slices=slices)
        demand_same("projection, slices", product(x, weight, slices, np.float32), expected, f"{m, n, k, slices}")


def test_float32_activations_against_the_emulation() -> None:
    for m, n, k, slices in ((1, 64, 256, 1), (40, 72, 1000, 1), (130, 64, 320, 2)):
        x, weight = values((m, k), m, dtype=np.float32), values((n, k), n)
        parts = tensor_core.split_float32(to_host(x))
        expected = tensor_core.matmul(parts, to_host(weight), k_slices=slices)
        demand_same("projection, float32", product(x, weight, slices, np.float32), expected, f"{m, n, k, slices}")


def test_cublas_through_cupy() -> None:
    """Needs no PyTorch."""
    for m, n, k in ((1, 6144, 4096), (33, 4096, 4096), (200, 4096, 1024)):
        x, weight = (to_gpu(inputs.heavy(shape, seed)) for seed, shape in enumerate(((m, k), (n, k))))
        demand_same("projection, gemmEx", cufuse.linear(x, weight), by_cublas(x, weight), f"{m, n, k}")


def test_special_values() -> None:
    """NaN, infinities of both signs, subnormals and huge values, in x and in the weight, in every kernel."""
    rng = np.random.default_rng(8)
    hosts = []
    for rows in (64, 96):
        bits = rng.integers(0, 2**16, (rows, 512), np.uint16)
        bits[: rows // 2] &= 0x807F  # subnormals
        bits[rows // 2 : -4] = (bits[rows // 2 : -4] & 0x80FF) | 0x7E80  # finite, near the top
        hosts.append(bits.view(bfloat16))
    x, weight = map(to_gpu, hosts)
    expected = tensor_core.matmul(*hosts)
    warpgroups = tiles.WarpgroupConfiguration(2, 64), tiles.WarpgroupConfiguration(1, 48)
    for configuration in (None, tiles.MMA[1], tiles.MMA[3], *warpgroups):
        found = product(x, weight, 1, np.float32, configuration=configuration)
        demand_same("projection, special values", found, expected, str(configuration))


def test_layouts() -> None:
    """Rows apart from each other, backwards, repeated, and addresses that are not aligned."""
    gpu = gpu_support.cupy()
    weight = values((640, 512), 1)
    dense = values((80, 1024), 2)
    flat = values((1, 80 * 512 + 8), 3)[0]
    views = {
        "left half": dense[:, :512],
        "every other row": dense[::2, :512],
        "backwards": dense[::-1, 8:520],
        "shifted": dense[:, 3:515],
        "unaligned": flat[1 : 1 + 80 * 512].reshape(80, 512),
        "one row repeated": gpu.broadcast_to(dense[:1, :512], (80, 512)),
        "one row": dense[5:6, 512:],
    }
    for name, x in views.items():
        for rows in (len(x), min(len(x), 4)):
            copy = gpu.ascontiguousarray(codes(x[:rows])).view(bfloat16)
            demand_same("projection, layouts", product(x[:rows], weight), product(copy, weight), name)
    columns = values((640, 1000), 4)[:, 8:520]
    copy = gpu.ascontiguousarray(codes(columns)).view(bfloat16)
    demand_same("projection, layouts", product(dense[:, :512], columns), product(dense[:, :512], copy), "weight apart")


def test_graph_and_stream() -> None:
    """A captured call allocates and waits for nothing, also with slices, whose sums take a workspace."""
    gpu = gpu_support.cupy()
    for m, n, k, slices in ((1, 6144, 4096, 1), (1, 4096, 4096, 2), (100, 1024, 4096, 3), (300, 4096, 1024, 1)):
        x, weight, out = values((m, k), m), values((n, k), n), gpu.empty((m, n), bfloat16)
        graph, stream = captured(lambda x=x, weight=weight, out=out, slices=slices: _gpu_linear.linear(x, weight, out, slices))
        x[...] = values((m, k), m + 1)
        codes(out).fill(0)
        gpu.cuda.Device().synchronize()
        for _ in range(3):
            graph.launch(stream)
        stream.synchronize()
        demand_same("projection, graphs", out, product(x, weight, slices), f"{m, n, k, slices}")


def test_programmatic_launches() -> None:
    """A chain in which each product begins before the one that writes its x has ended, with weights read early or not."""
    gpu = gpu_support.cupy()
    for m in (1, 8, 40, 128):
        weights = [values((4096, 4096), seed, scale=1 / 64) for seed in range(6)]
        chains = []
        for apart, early in ((True, False), (False, False), (False, True)):
            buffers = [values((m, 4096), m), *(gpu.zeros((m, 4096), np.uint16).view(bfloat16) for _ in weights)]
            for _ in range(1 if apart else 20):
                for index, weight in enumerate(weights):
                    _gpu_linear.linear(buffers[index], weight, buffers[index + 1], weights_ready=early)
                    if apart:
                        gpu.cuda.Device().synchronize()
            chains.append(buffers[-1])
        for chain, what in zip(chains[1:], ("in a row", "weights early"), strict=True):
            demand_same("projection, dependent launches", chain, chains[0], f"M {m}, {what}")


def test_product_of_what_the_kernel_in_front_writes() -> None:
    """x, and the weight itself, written by the kernel in front of the product."""
    gpu = gpu_support.cupy()
    for m in (1, 8, 40, 128):
        x, weight = values((m, 4096), m), values((4096, 4096), 9, scale=1 / 64)
        expected = product(x, weight)
        given, copied = gpu.empty_like(x), gpu.empty_like(weight)
        for _ in range(10):
            codes(given).fill(0x7FC0)
            codes(copied).fill(0x7FC0)
            out = gpu.empty((m, 4096), bfloat16)
            codes(copied)[...] = codes(weight)
            codes(given)[...] = codes(x)
            _gpu_linear.linear(given, copied, out)
            demand_same("projection, dependent launches", out, expected, f"M {m}, operands just written")


def test_thread_that_has_not_used_the_gpu() -> None:
    x, weight = values((3, 512), 1), values((64, 512), 2)
    expected, found = product(x, weight), gpu_support.cupy().empty((3, 64), bfloat16)
    gpu_support.cupy().cuda.Device().synchronize()
    worker = threading.Thread(target=_gpu_linear.linear, args=(x, weight, found))
    worker.start()
    worker.join()
    gpu_support.cupy().cuda.Device().synchronize()
    demand_same("projection, threads", found, expected, "another thread")


CVT = """
#include "mma.cuh"
struct Arguments { unsigned long long* differing; };
extern "C" __global__ void compare(const __grid_constant__ Arguments a) {
    for (u64 i = blockIdx.x * 256ull + threadIdx.x; i < 1ull << 32; i += gridDim.x * 256ull) {
        const u32 expected = round_nearest_even((u32)i) | (u32)round_nearest_even((u32)~i) << 16;
        if (pack_bf16(__uint_as_float((u32)i), __uint_as_float((u32)~i)) != expected) atomicAdd(a.differing, 1ull);
    }
}
"""


def test_conversion_instruction_on_all_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cvt.rn.bf16x2.f32, which the products' epilogues use, against the integer rounding, in both halves."""
    for header in compiler.source_folder().glob("*.cuh"):
        shutil.copy(header, tmp_path)
    (tmp_path / "compare.cu").write_text(CVT)
    monkeypatch.setattr(compiler, "source_folder", lambda: tmp_path)
    count = gpu_support.cupy().zeros(1, np.uint64)
    launch.prepare(Kernel("compare", "compare.cu", "compare", (), 256), count.device.id, 4096)(count.data.ptr.to_bytes(8, "little"))
    assert int(count[0]) == 0
