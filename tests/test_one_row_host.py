"""kernels/one_row.cuh run on the host, thread by thread, bit for bit against the emulation: each order's sum, and the row."""

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cufuse._norm_kernels import RESIDUAL, mean_operand, order_defines, order_of, point_defines
from cufuse.bf16 import bfloat16, nearest
from cufuse.emulation.sums import sum_of_squares
from cufuse.named_recipes import RECIPES
from cufuse.norm import normalise

ROOT = Path(__file__).resolve().parent.parent
HARNESS = """
#include "host_cuda.hpp"
#define CUFUSE_INLINE static inline
#include "one_row.cuh"
struct Arguments {
    const X* x; const R* residual; const W* weight; Total* total; u16* y; float* sum; float mean_operand, eps;
};
static void one_row(const Arguments& a) {
    unsigned char* memory = (unsigned char*)shared_memory;
    Row row;
    row.read_weight(a.weight);
    row.read(a.x, a.residual);
    row.normalise(a.mean_operand, a.eps, memory, a.total, a.y);
    SUM_BARRIER();
    float sum;
    if constexpr (SUM_IN_REGISTERS) {
        Pack<Z, ROW_PACK> z[ROW_STEPS];
        for (int i = 0; i < ROW_STEPS; ++i)
            if (has_pack(i)) z[i] = add_residual<ROW_PACK>(row.x[i], row.residual[RESIDUAL != 0 ? i : 0], (Total*)nullptr, 0);
        sum = sum_of_packs(z, (float*)memory);
    } else {
        sum = sum_of_row((const Z*)(memory + (SUM_SCRATCH * 4 + 15) / 16 * 16), 0, (float*)memory);
    }
    a.sum[threadIdx.x] = sum;
}
extern "C" int in_registers() { return SUM_IN_REGISTERS; }
extern "C" void run(const Arguments* a) {
    run_grid(1, {GROUP, 1, 1}, [a] { one_row(*a); });
}
"""
# (recipe, rows of the call, columns, with a residual, the residual and the weight in float32, whether registers do, threads)
CASES = [
    ("torch", 1, 1024, True, False, True, True, 256),
    ("torch", 1, 2560, False, False, False, True, 256),
    ("torch", 1, 4096, True, True, True, True, 256),
    ("torch", 1, 5120, True, False, False, True, 256),
    ("torch", 1, 704, False, False, False, False, 256),
    ("torch", 1, 72, False, False, False, False, 256),
    ("torch", 1, 12288, False, False, False, True, 256),
    ("torch", 3, 4096, True, False, False, True, 256),
    ("torch", 6, 4096, True, False, False, False, 256),
    ("torch-rms-norm", 1, 4096, True, False, False, True, 256),
    ("torch-rms-norm", 1, 2568, False, False, True, True, 256),
    ("torch-rms-norm", 1, 200, False, False, True, True, 256),
    ("vllm-0.19", 1, 4096, False, False, False, True, 256),
    ("vllm-0.19", 1, 2560, True, False, False, True, 256),
    ("vllm-0.19", 300, 4096, False, False, False, True, 256),
    ("flashinfer", 1, 5120, True, False, False, True, 256),
    ("flashinfer", 1, 12288, False, False, False, True, 256),
    ("nano-vllm", 1, 5120, True, False, False, True, 256),
    ("nano-vllm", 1, 2048, False, False, False, True, 256),
    ("llama.cpp", 1, 4096, False, False, True, False, 256),
    ("torch", 1, 2048, True, False, True, True, 512),
    ("torch", 1, 4096, False, False, False, True, 512),
    ("torch", 1, 5120, True, True, True, True, 512),
]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to run a kernel's text on the host")


class Arguments(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("x", "residual", "weight", "total", "y", "sum")] + [
        (name, ctypes.c_float) for name in ("mean_operand", "eps")
    ]


def norm_of(name: str) -> Any:
    # the machine's rsqrt.approx is not to be had here
    return replace(RECIPES[name].norm, rsqrt="correct", round_weighted=True, float32_weight="accept")


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[ctypes.CDLL]:
    """Every case compiled, in parallel."""
    folder = tmp_path_factory.mktemp("one_row")
    harness = folder / "harness.cpp"
    harness.write_text(HARNESS)

    def build(number: int) -> ctypes.CDLL:
        name, rows, columns, with_residual, residual_float32, weight_float32, _, threads = CASES[number]
        residual_sum = RECIPES[name].residual_sum if with_residual else None
        order = order_of(norm_of(name), residual_sum)
        defines: dict[str, Any] = {"COLUMNS": columns, "GROUP": threads, "X_FLOAT32": 0, "RESIDUAL_FLOAT32": int(residual_float32)}
        defines |= {"RESIDUAL": RESIDUAL[residual_sum], "WEIGHT_FLOAT32": int(weight_float32)}
        defines |= {**order_defines(order, rows, columns), **point_defines(norm_of(name))}
        library = folder / f"case{number}.so"
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w", f"-I{ROOT / 'kernels'}", f"-I{ROOT / 'tests'}"]
        flags += [f"-D{key}={value}" for key, value in defines.items()]
        subprocess.run(["g++", *flags, str(harness), "-o", str(library)], check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(library))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, range(len(CASES))))


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case[:4])) for case in CASES])
def test_sum_and_row_are_the_emulation_s(number: int, libraries: list[ctypes.CDLL]) -> None:
    name, rows, columns, with_residual, residual_float32, weight_float32, in_registers, threads = CASES[number]
    library, norm = libraries[number], norm_of(name)
    residual_sum = RECIPES[name].residual_sum if with_residual else None
    assert bool(library.in_registers()) == in_registers
    for seed in range(12):  # enough sums for a wrong last bit to show
        rng = np.random.default_rng([number, seed])
        x, residual, weight = (numbers(rng, columns, wide) for wide in (False, residual_float32, weight_float32))
        total = np.zeros(columns, np.float32 if residual_sum == "float32" else bfloat16)
        y, sums = np.zeros(columns, bfloat16), np.zeros(threads, np.float32)
        pointers = [array.ctypes.data for array in (x, residual, weight, total, y, sums)]
        library.run(ctypes.byref(Arguments(*pointers, float(mean_operand(norm, rows, columns)), 1e-6)))
        z = x.astype(np.float32)
        if residual_sum is not None:
            z = z + residual.astype(np.float32)
            kept = z if residual_sum == "float32" else nearest(z)
            assert bits(total).tolist() == bits(kept).tolist()
            z = kept.astype(np.float32) if residual_sum == "rounded" else z
        many = np.zeros((rows, columns), np.float32)  # the number of rows decides on the order
        many[0] = z
        order = order_of(norm, residual_sum)
        expected = np.asarray(sum_of_squares(many, order, contract=norm.contract), np.float32)[0]
        assert bits(sums).tolist() == [int(bits(expected.reshape(1))[0])] * threads
        assert bits(y).tolist() == bits(normalise(many, weight, 1e-6, replace(norm, sum_order=order))[0]).tolist()


def numbers(rng: np.random.Generator, columns: int, float32: bool) -> np.ndarray:
    values = np.ldexp(rng.standard_normal(columns, np.float32), rng.integers(-4, 4, columns)).astype(np.float32)
    # 16-byte accesses
    held = np.zeros(columns + 8, values.dtype if float32 else bfloat16)
    start = -held.ctypes.data % 16 // held.itemsize
    held[start : start + columns] = values if float32 else nearest(values)
    return held[start : start + columns]


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint16 if array.dtype == bfloat16 else np.uint32)
