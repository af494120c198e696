"""A norm in Triton for the worked example of tests/test_gpu_testing.py, in a file of its own, as Triton reads a kernel's source."""

import triton
import triton.language as tl


@triton.jit
def norm_kernel(x, weight, r, h, y, columns, reciprocal, eps, block: tl.constexpr):
    row = tl.program_id(0)
    total = tl.full([], 0.0, tl.float32)
    for k in range(columns):
        value = tl.load(x + row * columns + k).to(tl.float32)
        total += value * value  # exact: fused or not is the same
    factor = tl.rsqrt(total * reciprocal + eps)
    tl.store(r + row, factor)
    place = tl.arange(0, block)
    inside = place < columns
    values = tl.load(x + row * columns + place, mask=inside, other=0.0).to(tl.float32)
    normalised = (values * factor).to(tl.bfloat16)
    tl.store(h + row * columns + place, normalised, mask=inside)
    scale = tl.load(weight + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * columns + place, (normalised.to(tl.float32) * scale).to(tl.bfloat16), mask=inside)
