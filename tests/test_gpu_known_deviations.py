"""Known deviations that need a GPU: CuPy's cast of float64, its flush of subnormals in kernels compiled from text, and PyTorch's
arrays as CuPy sees them. Each test fails where the deviation appears elsewhere and where it has vanished."""

import numpy as np

import cufuse
from cufuse.bf16 import bfloat16
from tests import gpu_support
from tests.deviations import demand_exactly, near_ties, rounded_twice
from tests.gpu_support import demand_same, to_gpu, to_host
from tests.witnesses import bits

pytestmark = gpu_support.MARKS

SCALED = """
extern "C" __global__ void scaled(const float* x, float* y, int count, float one) {
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i] = x[i] * one;
}
"""


def test_cupy_rounds_float64_twice() -> None:
    x = near_ties()
    x = x[np.abs(x) >= 2.0**-125]  # below, CuPy's flush of float32 subnormals comes in between
    found = to_host(to_gpu(x).astype(bfloat16))
    demand_exactly(bits(found) != bits(cufuse.round_to_bf16(x)), rounded_twice(x), "CuPy on a GPU, float64 to bfloat16")
    demand_same("known deviations", cufuse.round_to_bf16(to_gpu(x)), cufuse.round_to_bf16(x), "cufuse's cast beside it")


def test_cupy_flushes_subnormals_in_kernels_compiled_from_text() -> None:
    """CuPy adds -ftz=true behind the user's options; all float32 subnormals become zeros, and nothing else changes."""
    cupy = gpu_support.cupy()
    codes = np.concatenate([np.arange(0, 1 << 24), np.arange(1 << 24, 0x7F800000, 997)]).astype(np.uint32)
    x = np.concatenate([codes, codes | np.uint32(0x80000000)]).view(np.float32)
    given, found = to_gpu(x), cupy.empty(x.shape, np.float32)
    for options in ((), ("-ftz=false",)):
        module = cupy.RawModule(code=SCALED, options=options)
        module.get_function("scaled")((-(-x.size // 256),), (256,), (given, found, np.int32(x.size), np.float32(1)))
        subnormal = (x != 0) & (np.abs(x) < np.finfo(np.float32).tiny)
        demand_exactly(bits(to_host(found)) != bits(x), subnormal, f"CuPy's RawModule with options {options}")


def test_cupy_takes_pytorch_s_bfloat16_for_two_bytes() -> None:
    """By its array interface; through DLPack it is bfloat16."""
    cupy, torch = gpu_support.cupy(), gpu_support.torch()
    tensor = torch.ones(3, dtype=torch.bfloat16, device="cuda")
    assert cupy.asarray(tensor).dtype == np.dtype("V2")
    assert cupy.from_dlpack(tensor).dtype == bfloat16


def test_pytorch_s_cast_on_a_gpu_does_not_deviate_on_nan() -> None:
    """0x7FFF for every NaN, where its cast on a CPU gives other codes: the policy that cufuse follows."""
    torch = gpu_support.torch()
    payloads = np.arange(1, 1 << 23, 257, dtype=np.uint32)
    x = np.concatenate([payloads | np.uint32(0x7F800000), payloads | np.uint32(0xFF800000)]).view(np.float32)
    found = gpu_support.from_torch(torch.from_numpy(x).to("cuda").to(torch.bfloat16))
    demand_same("known deviations", found, cufuse.round_to_bf16(x), "PyTorch on a GPU, NaN")
