"""cufuse.testing on a GPU: CuPy arrays from the strategies, and the worked example, where kernels that are not ours are held to a
recipe: one in Triton that keeps it, one in CUDA C++ that CuPy compiles and that flushes subnormals, which the strategies find."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cufuse
from cufuse import testing
from cufuse.bf16 import bfloat16
from tests import gpu_support
from tests.gpu_support import COMPARED, to_gpu

pytestmark = gpu_support.MARKS

# what both kernels state: first to last, the mean by float32(1/K), rsqrt.approx, two roundings
STATED = cufuse.recipes["torch"].derive("first to last", norm={"sum_order": "sequential", "mean": "reciprocal"})
# a fifth of the profile: every example launches a kernel and waits for it
FEWER = settings(max_examples=max(50, settings().max_examples // 5), deadline=None)

CUDA = """
typedef unsigned short bf16;
__device__ float wide(bf16 code) { return __uint_as_float((unsigned)code << 16); }
__device__ bf16 rounded(float x) {  // to nearest even; no NaN here
    const unsigned bits = __float_as_uint(x);
    return (bf16)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}
extern "C" __global__ void norm_of_mine(const bf16* x, const bf16* weight, float* r, bf16* h, bf16* y, int columns,
                                        float reciprocal, float eps) {
    const long long row = (long long)blockIdx.x * columns;
    float sum = 0.0f;
    for (int k = 0; k < columns; ++k) sum += wide(x[row + k]) * wide(x[row + k]);  // exact: fused or not is the same
    const float factor = rsqrtf(__fadd_rn(__fmul_rn(sum, reciprocal), eps));
    r[blockIdx.x] = factor;
    for (int k = 0; k < columns; ++k) {
        h[row + k] = rounded(__fmul_rn(wide(x[row + k]), factor));
        y[row + k] = rounded(__fmul_rn(wide(h[row + k]), wide(weight[k])));
    }
}
"""


def cuda_stages(x: Any, weight: Any, eps: float) -> Iterator[tuple[str, Any]]:
    """The kernel above as CuPy compiles it, with its intermediates."""
    cupy = gpu_support.cupy()
    rows, columns = x.shape
    r, h, y = cupy.empty(rows, np.float32), cupy.empty(x.shape, x.dtype), cupy.empty(x.shape, x.dtype)
    codes = [array.view(np.uint16) for array in (x, weight, h, y)]
    reciprocal = np.float32(1) / np.float32(columns)
    arguments = (codes[0], codes[1], r, codes[2], codes[3], np.int32(columns), reciprocal, np.float32(eps))
    _module().get_function("norm_of_mine")((rows,), (1,), arguments)
    yield from {"r": r, "h": h, "y": y}.items()


def _module(made: list[Any] = []) -> Any:  # noqa: B006
    if not made:
        made.append(gpu_support.cupy().RawModule(code=CUDA))
    return made[0]


@FEWER
@given(testing.bf16_arrays(st.tuples(st.integers(1, 5), st.integers(0, 9))))
def test_arrays_are_brought_over_bit_for_bit(array: np.ndarray) -> None:
    testing.assert_bits_equal(to_gpu(array), array)


def test_strategies_give_cupy_arrays() -> None:
    cupy = gpu_support.cupy()
    # few shapes: each of them may be a kernel to compile
    products = testing.gemm_inputs(m=st.sampled_from([1, 3]), n=4, k=st.sampled_from([16, 40]), xp=cupy)

    @FEWER
    @given(testing.bf16_arrays((3, 4), xp=cupy), products, testing.float64_near_ties((7,), xp=cupy))
    def look(array: Any, product: dict[str, Any], wide: Any) -> None:
        assert all(isinstance(one, cupy.ndarray) for one in (array, wide, *product.values()))
        assert array.dtype == product["x"].dtype == bfloat16
        testing.assert_bits_equal(cufuse.linear(**product, k_slices=1), cufuse.linear(**on_host(product), k_slices=1))
        testing.assert_correctly_rounded(cufuse.round_to_bf16(wide), wide)
        COMPARED["testing: products and casts drawn by Hypothesis"] += wide.size + len(product["x"]) * len(product["weight"])

    look()


def on_host(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: gpu_support.to_host(one) if hasattr(one, "dtype") else one for name, one in arrays.items()}


def test_every_recipe_s_norm_on_drawn_inputs() -> None:
    cupy = gpu_support.cupy()

    # few shapes: each of them is a kernel to compile
    @FEWER
    @given(testing.rms_norm_inputs(rows=st.sampled_from([1, 3]), columns=128, allow_infinity=True, xp=cupy),
           st.sampled_from(["torch", "torch-rms-norm", "flashinfer"]))  # fmt: skip
    def look(inputs: dict[str, Any], name: str) -> None:
        found = cufuse.rms_norm(**inputs, recipe=name)
        testing.assert_bits_equal(found, cufuse.rms_norm(**on_host(inputs), recipe=name), what=name)
        COMPARED["testing: norms drawn by Hypothesis"] += found.size

    look()


def test_a_kernel_of_one_s_own_in_cuda() -> None:
    """It keeps the recipe where nothing is subnormal; on subnormals the flush that CuPy adds is found, and named."""
    ordinary = to_gpu(np.random.default_rng(1).standard_normal((16, 300)).astype(bfloat16))
    weight = to_gpu(np.random.default_rng(2).standard_normal(300).astype(bfloat16))
    inputs = {"x": ordinary, "weight": weight, "eps": 1e-6}
    assert testing.find_first_difference(STATED, cuda_stages, inputs) is None
    tiny = to_gpu(np.full((1, 300), 2.0**-130).astype(bfloat16))
    found = testing.find_first_difference(STATED, cuda_stages, inputs | {"x": tiny})
    assert found is not None
    assert found.stage in ("h", "y")
    assert found.rounding is not None and "first to last states there" in found.rounding
    assert float(found.values[1]) == 0 and float(found.values[0]) != 0


@pytest.mark.filterwarnings("ignore")
def test_a_kernel_of_one_s_own_in_triton() -> None:
    """A row a program, first to last, and every bit of the recipe."""
    torch = gpu_support.torch()
    triton = gpu_support._peer("triton")
    from tests.triton_norm import norm_kernel

    def stages(x: Any, weight: Any, eps: float) -> Iterator[tuple[str, Any]]:
        rows, columns = x.shape
        r = torch.empty(rows, dtype=torch.float32, device="cuda")
        h, y = torch.empty_like(x), torch.empty_like(x)
        reciprocal = float(np.float32(1) / np.float32(columns))
        block = triton.next_power_of_2(columns)
        # by default Triton makes one fused multiply-add of the mean's product and eps: another recipe
        norm_kernel[(rows,)](x, weight, r, h, y, columns, reciprocal, float(np.float32(eps)), block, enable_fp_fusion=False)
        yield from {"r": r, "h": h, "y": y}.items()

    @FEWER
    @given(testing.rms_norm_inputs(rows=st.sampled_from([1, 3]), columns=st.sampled_from([1, 16, 100]), allow_subnormal=False))
    def look(inputs: dict[str, Any]) -> None:
        tensors = {name: gpu_support.to_torch(to_gpu(one)) if name != "eps" else one for name, one in inputs.items()}
        difference = testing.find_first_difference(STATED, stages, tensors)
        assert difference is None, str(difference)
        COMPARED["testing: a Triton kernel drawn by Hypothesis"] += inputs["x"].size

    look()
