"""kernels/rms_norm.cu and sums.cuh run on the host, thread by thread, bit for bit against the emulation.

Indices, trees and rounding points are checked here without a GPU; rsqrt.approx and cvt.rn.bf16x2 are not.
"""

import ctypes
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from cufuse.bf16 import bfloat16, nearest
from cufuse.emulation.sums import SUM_ORDERS, torch_mean_factor
from cufuse.emulation.sums_kernel import sum_defines
from cufuse.norm import normalise
from cufuse.recipe import Norm

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = {
    "CHUNK": 1, "GROUP": 256, "ROWS": 1, "DIRECT": 0, "FEW_ROWS": 0, "BLOCKS": 1, "X_FLOAT32": 0, "RESIDUAL": 0,
    "RESIDUAL_FLOAT32": 0, "WEIGHT_FLOAT32": 0, "OUT_FLOAT32": 1, "ROUND_NORMALISED": 0, "MEAN_DIVIDE": 1,
    "RSQRT_CORRECT": 1, "CONTRACT": 0,
}  # fmt: skip
HARNESS = """
#include "host_cuda.hpp"
#include "rms_norm.cu"
extern "C" void run(unsigned blocks, const Arguments* a) {
    run_grid(blocks, {GROUP * ROWS, 1, 1}, [a] { rms_norm(*a); });
}
"""

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to run a kernel's text on the host")


class Arguments(ctypes.Structure):
    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("x", "residual", "weight", "y", "total")]
        + [(name, ctypes.c_longlong) for name in ("rows", "inner")]
        + [(f"{name}_{step}", ctypes.c_longlong) for step in ("stride", "outer") for name in ("x", "residual", "y", "total")]
        + [("mean_operand", ctypes.c_float), ("eps", ctypes.c_float)]
        + [("next_begins_early", ctypes.c_int), ("first_blocks", ctypes.c_int)]
    )


# (order, rows, columns, macros beside the order's). Mostly float32 results, which show the last bit of the sum.
MANY_ROWS = {"DIRECT": 1, "GROUP": 32, "ROWS": 4, "CHUNK": 4}
TORCH = {"ROUND_NORMALISED": 1, "MEAN_DIVIDE": 0, "OUT_FLOAT32": 0}
FLOAT32 = {"X_FLOAT32": 1, "WEIGHT_FLOAT32": 1, "CONTRACT": 1}
CASES = [
    ("torch-mean", 1, 4096, {"DIRECT": 1, "GROUP": 512, "CHUNK": 4, "MEAN_DIVIDE": 0}),
    ("torch-mean", 1, 4096, {**TORCH, "DIRECT": 1, "GROUP": 512, "CHUNK": 4}),
    ("torch-mean", 1, 4096, {"CHUNK": 8}),
    ("torch-mean", 5, 1024, {"CHUNK": 8, "RESIDUAL": 1, "MEAN_DIVIDE": 0}),
    ("torch-mean", 17, 4096, {"CHUNK": 8, "GROUP": 512, "FEW_ROWS": 1}),
    ("torch-mean", 17, 5124, {"CHUNK": 4, "GROUP": 128, "MEAN_DIVIDE": 0}),
    ("torch-mean", 8, 3000, {"CHUNK": 8, "X_FLOAT32": 1, "WEIGHT_FLOAT32": 1}),
    ("torch-mean", 5, 1024, {**TORCH, "CHUNK": 8, "RESIDUAL": 1}),
    ("torch-mean", 18, 2560, {"CHUNK": 8, "GROUP": 512, "ROUND_NORMALISED": 1, "WEIGHT_FLOAT32": 1}),
    ("torch-mean", 18, 2560, {"CHUNK": 8, "MEAN_DIVIDE": 0}),
    ("torch-mean", 18, 2560, {**MANY_ROWS, "MEAN_DIVIDE": 0}),
    ("torch-mean", 18, 2560, {**MANY_ROWS, **TORCH}),
    ("torch-mean", 19, 128, {**MANY_ROWS, "ROWS": 8, "WEIGHT_OFFSET": "1.0f"}),
    ("torch-mean", 17, 8192, {"CHUNK": 8}),
    ("torch-mean", 17, 8192, {"DIRECT": 1, "GROUP": 512, "CHUNK": 4}),
    ("torch-mean", 3, 8192, {"CHUNK": 8}),
    ("torch-mean", 6, 1001, {}),
    ("torch-mean", 17, 8190, {"CHUNK": 2, "X_FLOAT32": 1, "CONTRACT": 1}),
    ("torch-mean", 5, 100, {"CHUNK": 4, "GROUP": 32, "X_FLOAT32": 1}),
    ("torch-mean", 20, 7, {"GROUP": 32, "X_FLOAT32": 1}),
    ("torch-mean", 3, 1, {"GROUP": 32}),
    ("torch-mean", 17, 4096, {"CHUNK": 8, "MEAN_DIVIDE": 0}),
    ("torch-mean", 17, 4096, {"CHUNK": 8, **TORCH, "FEW_ROWS": 1}),
    ("torch-mean", 24, 2564, {"CHUNK": 4, "FEW_ROWS": 1}),
    ("torch-mean", 19, 3000, {"CHUNK": 8, "MEAN_DIVIDE": 0, "WEIGHT_FLOAT32": 1}),
    ("torch-mean", 18, 5120, {"CHUNK": 8, "FEW_ROWS": 1, "RESIDUAL": 1}),
    ("torch-mean", 16, 132, {"CHUNK": 4, "GROUP": 64, "FEW_ROWS": 1}),
    ("torch-mean", 9, 4096, {"CHUNK": 8}),
    ("torch-mean", 12, 5120, {"CHUNK": 8, "FEW_ROWS": 1, "RESIDUAL": 1}),
    ("torch-mean", 8, 7000, {"DIRECT": 1, "GROUP": 64, "CHUNK": 4, "FEW_ROWS": 1}),
    ("torch-mean", 2, 4096, {"DIRECT": 1, "GROUP": 256, "CHUNK": 4, "MEAN_DIVIDE": 0}),
    ("torch-mean", 18, 8192, {"DIRECT": 1, "GROUP": 512, "CHUNK": 4, "FEW_ROWS": 1}),
    ("torch-mean-2.9", 17, 4096, {"CHUNK": 8, "FEW_ROWS": 1}),
    ("torch-mean", 17, 5120, {"CHUNK": 8, "GROUP": 128}),  # five whole steps, in batches of four
    ("torch-mean", 9, 12288, {"CHUNK": 8, "FEW_ROWS": 1}),
    ("torch-mean-2.9", 1, 4096, {"CHUNK": 8}),
    ("torch-mean-2.9", 17, 8192, {"CHUNK": 8, "GROUP": 512}),
    ("torch-mean-2.9", 2, 8190, {"CHUNK": 2}),
    ("torch-mean-2.9", 4, 128, {"CHUNK": 8, "GROUP": 32}),
    ("torch-rms-norm", 4, 1536, {"DIRECT": 1, "GROUP": 128, "CHUNK": 4}),
    ("torch-rms-norm", 5, 4096, {"CHUNK": 8, "CONTRACT": 1}),
    ("torch-rms-norm", 5, 5120, {"CHUNK": 8, "GROUP": 128, "CONTRACT": 1, "OUT_FLOAT32": 0}),
    ("torch-rms-norm", 5, 4100, {"CHUNK": 4}),
    ("torch-rms-norm", 8, 4096, {"DIRECT": 1, "GROUP": 128, "CHUNK": 4, "CONTRACT": 1, "FEW_ROWS": 1}),
    ("torch-rms-norm", 7, 1536, {"DIRECT": 1, "GROUP": 128, "CHUNK": 4, "FEW_ROWS": 1, "X_FLOAT32": 1, "RESIDUAL": 2}),
    ("torch-rms-norm", 4, 1536, {"CHUNK": 8, "X_FLOAT32": 1, "RESIDUAL": 2, "CONTRACT": 1}),
    ("torch-rms-norm", 4, 1536, {"CHUNK": 8, "GROUP": 64, "OUT_FLOAT32": 0}),
    ("torch-rms-norm", 3, 1001, {"CONTRACT": 1}),
    ("torch-rms-norm", 3, 250, {"CHUNK": 2, "GROUP": 64, "X_FLOAT32": 1}),
    ("vllm", 3, 5120, {"DIRECT": 1, "GROUP": 640, "CHUNK": 8}),
    ("vllm", 256, 3584, {"DIRECT": 1, "GROUP": 256, "CHUNK": 8, "ROUND_NORMALISED": 1, "OUT_FLOAT32": 0}),
    ("vllm", 5, 128, {"DIRECT": 1, "GROUP": 32, "CHUNK": 8, "ROWS": 4}),
    ("vllm", 256, 2048, {"DIRECT": 1, "GROUP": 256, "CHUNK": 8, "FEW_ROWS": 1}),
    ("vllm", 3, 1001, {}),
    ("vllm-add", 3, 5120, {"CHUNK": 8, "RESIDUAL": 1}),
    ("vllm-add", 3, 1002, {"CHUNK": 2, "RESIDUAL": 1}),
    ("flashinfer", 3, 5120, {"DIRECT": 1, "GROUP": 640, "CHUNK": 8, "RESIDUAL": 2, "CONTRACT": 1, "MEAN_DIVIDE": 0}),
    ("flashinfer", 3, 12288, {"CHUNK": 8, "RESIDUAL": 2, "CONTRACT": 1, "GROUP": 512, "OUT_FLOAT32": 0}),
    ("flashinfer", 6, 4096, {"DIRECT": 1, "GROUP": 512, "CHUNK": 8, "FEW_ROWS": 1, "RESIDUAL": 2, "CONTRACT": 1}),
    ("llama.cpp", 3, 5120, {**FLOAT32, "CHUNK": 4, "RESIDUAL": 3, "RESIDUAL_FLOAT32": 1, "MEAN_DIVIDE": 0}),
    ("llama.cpp", 3, 128, {**FLOAT32, "CHUNK": 4, "GROUP": 32, "MEAN_DIVIDE": 0}),
    ("nano-vllm", 3, 5120, {"CHUNK": 8, "RESIDUAL": 2, "CONTRACT": 1}),
    ("nano-vllm", 9, 5120, {"DIRECT": 1, "GROUP": 512, "CHUNK": 4, "FEW_ROWS": 1, "CONTRACT": 1}),
    ("nano-vllm", 3, 100, {"CHUNK": 4, "GROUP": 32, "X_FLOAT32": 1, "CONTRACT": 1}),
    ("nano-vllm", 3, 2, {"GROUP": 32, "X_FLOAT32": 1}),
    ("sequential", 2, 130, {"GROUP": 64, "X_FLOAT32": 1, "CONTRACT": 1}),
]


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """Every case compiled, in parallel."""
    folder = tmp_path_factory.mktemp("host")
    harness = folder / "harness.cpp"
    harness.write_text(HARNESS)

    def build(numbered):
        number, (order, rows, columns, macros) = numbered
        defines = {"COLUMNS": columns, **DEFAULTS, **sum_defines(order, rows, columns), **macros}
        library = folder / f"case{number}.so"
        flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
        flags += [f"-I{ROOT / 'kernels'}", f"-I{ROOT / 'tests'}", *(f"-D{k}={v}" for k, v in defines.items())]
        command = ["g++", *flags, str(harness), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(library)), defines

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(build, enumerate(CASES)))


def column_vector(rng, shape, float32):
    values = np.ldexp(rng.standard_normal(shape, np.float32), rng.integers(-4, 4, shape)).astype(np.float32)
    return values if float32 else nearest(values)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c[0]}-{c[1]}x{c[2]}-{i}" for i, c in enumerate(CASES)])
def test_the_kernel_equals_the_emulation(number, libraries):
    rows = CASES[number][1]
    for seed in range(max(1, 24 // rows)):  # enough rows for a wrong last bit of the sum to show in some
        check(number, *libraries[number], np.random.default_rng([number, seed]))


def check(number, library, defines, rng):
    order, rows, columns, _ = CASES[number]
    x = column_vector(rng, (rows, columns), defines["X_FLOAT32"])
    residual = column_vector(rng, (rows, columns), defines["RESIDUAL_FLOAT32"])
    weight = column_vector(rng, columns, defines["WEIGHT_FLOAT32"])
    # rows need not touch, nor groups of rows
    gap, groups = 16, 2 if rows % 2 == 0 else 1
    inner, wide = rows // groups, columns + gap
    y = np.full((groups, inner + 1, wide), -77, np.float32 if defines["OUT_FLOAT32"] else bfloat16)
    total = np.full((groups, inner + 1, wide), -77, np.float32 if defines["RESIDUAL"] == 3 else bfloat16)
    reciprocal = "factor" if order.startswith("torch-mean") else "reciprocal"
    operand = np.float32(columns)
    if not defines["MEAN_DIVIDE"]:
        operand = torch_mean_factor(rows, columns) if reciprocal == "factor" else np.float32(1) / np.float32(columns)
    arguments = Arguments(
        x.ctypes.data, residual.ctypes.data, weight.ctypes.data, y.ctypes.data, total.ctypes.data,
        rows, inner, columns, columns, wide, wide,
        inner * columns, inner * columns, (inner + 1) * wide, (inner + 1) * wide, float(operand), 1e-6,
    )  # fmt: skip
    library.run(-(-rows // defines["ROWS"]), ctypes.byref(arguments))

    z = x.astype(np.float32)
    if defines["RESIDUAL"]:
        z = z + residual.astype(np.float32)
        kept = z if defines["RESIDUAL"] == 3 else nearest(z)
        assert (bits(total[:, :inner, :columns].reshape(rows, columns)) == bits(kept)).all()
        if defines["RESIDUAL"] == 1:
            z = kept.astype(np.float32)
    norm = Norm(
        sum_order=order,
        contract=bool(defines["CONTRACT"]),
        mean="divide" if defines["MEAN_DIVIDE"] else reciprocal,
        rsqrt="correct",
        round_normalised=bool(defines["ROUND_NORMALISED"]),
        weight_offset=1.0 if "WEIGHT_OFFSET" in defines else 0.0,
        round_weighted=not defines["OUT_FLOAT32"],
        float32_weight="accept",
    )
    expected = normalise(z, weight, 1e-6, norm)
    assert expected.dtype == y.dtype
    wrong = np.argwhere(bits(y[:, :inner, :columns].reshape(rows, columns)) != bits(expected))
    assert len(wrong) == 0, (len(wrong), wrong[:5])
    assert (y[:, :, columns:] == -77).all()
    assert (y[:, inner] == -77).all()


def bits(a):
    return np.ascontiguousarray(a).view(np.uint16 if a.dtype == bfloat16 else np.uint32)


def test_every_order_that_a_kernel_can_add_in_is_here():
    assert {case[0] for case in CASES} == set(SUM_ORDERS) - {"llama.cpp-cpu"}
    with pytest.raises(ValueError, match="emulation"):
        sum_defines("llama.cpp-cpu", 1, 128)
    with pytest.raises(ValueError, match="130560"):
        sum_defines("torch-mean", 1, 130_561)
