"""Orders of summation of inference engines: vLLM, FlashInfer, llama.cpp, nano-vllm.

Every function takes a block of rows, float32 [rows, columns], and ``all_rows``, the number of rows of the whole call
(the launch, and with it the order, may depend on it), and returns the rows' sums of squares, float32 [rows].
"""

import math

import numpy as np

from cufuse.emulation.floats import Float32Array, fma32
from cufuse.emulation.sums_parts import by_warps, chain, halve, in_order, pair_up, terms, to_width


def vllm(x: Float32Array, all_rows: int, first_row: int, contract: bool) -> Float32Array:
    """vLLM's rms_norm_kernel (csrc/layernorm_kernels.cu, 0.11 to 0.20)."""
    columns = x.shape[1]
    vector = math.gcd(8, columns)
    threads = min(columns // vector, _vllm_most_threads(all_rows))
    return _cub_block_sum(chain(terms(x, contract), threads, vector))


def vllm_add(x: Float32Array, all_rows: int, first_row: int, contract: bool) -> Float32Array:
    """vLLM's fused_add_rms_norm_kernel (csrc/layernorm_kernels.cu and type_convert.cuh): pairs of squares first."""
    rows, columns = x.shape
    threads = min(columns, _vllm_most_threads(all_rows))
    if columns % 8:
        return _cub_block_sum(chain(terms(x, contract), threads, 1))
    squares = terms(x, contract)
    if squares.fused:
        pairs = fma32(x[:, ::2], x[:, ::2], x[:, 1::2] * x[:, 1::2])
    else:
        pairs = squares.values[:, ::2] + squares.values[:, 1::2]
    steps = -(-columns // (8 * threads))
    vectors = np.zeros((rows, steps * threads), np.float32)
    vectors[:, : columns // 8] = in_order(pairs.reshape(rows, columns // 8, 4))
    return _cub_block_sum(in_order(vectors.reshape(rows, steps, threads).swapaxes(1, 2)))


def _vllm_most_threads(all_rows: int) -> int:
    return 1024 if all_rows < 256 else 256


def _cub_block_sum(threads: Float32Array) -> Float32Array:
    """cub::BlockReduce with warp reductions: shuffles down by 1, 2, 4, 8, 16, then thread 0 adds the warps in order."""
    return in_order(pair_up(by_warps(threads))[..., 0])


def flashinfer(x: Float32Array, all_rows: int, first_row: int, contract: bool) -> Float32Array:
    """FlashInfer's RMSNormKernel, FusedAddRMSNormKernel and QKRMSNormKernel (include/flashinfer/norm.cuh)."""
    columns = x.shape[1]
    vector = math.gcd(8, columns)
    warps = -(-min(1024, columns // vector) // 32)
    return _two_xor_trees(chain(terms(x, contract), 32 * warps, vector))


def llama_cpp(x: Float32Array, all_rows: int, first_row: int, contract: bool) -> Float32Array:
    """llama.cpp's rms_norm_f32 on CUDA (ggml/src/ggml-cuda/norm.cu)."""
    threads = 1024 if x.shape[1] >= 1024 else 256
    return _two_xor_trees(chain(terms(x, contract), threads, 1))


def _two_xor_trees(threads: Float32Array) -> Float32Array:
    """Shuffles by xor of 16, 8, 4, 2, 1 inside the warps, then the same over the warps' sums, absent warps zero."""
    warps = halve(by_warps(threads))[..., 0]
    return halve(to_width(warps, 32))[..., 0]


def nano_vllm(x: Float32Array, all_rows: int, first_row: int, contract: bool) -> Float32Array:
    """A plain Triton reduction, standing for what Inductor makes of nano-vllm's RMSNorm (cufuse's choice)."""
    rows, columns = x.shape
    width = min(1 << (columns - 1).bit_length(), 2048)
    accumulators = chain(terms(x, contract), width, 1)
    vector = min(width, 4)
    threads = in_order(accumulators.reshape(rows, width // vector, vector))
    warps = halve(threads.reshape(rows, -1, min(32, threads.shape[1])))[..., 0]
    return halve(warps)[..., 0]


def sequential(x: Float32Array, all_rows: int, first_row: int, contract: bool) -> Float32Array:
    """One accumulator, first column to last."""
    squares = terms(x, contract)
    if squares.fused:
        return chain(squares, 1, 1)[:, 0]
    return np.add.accumulate(squares.values, axis=1)[:, -1]


def llama_cpp_cpu(x: Float32Array, all_rows: int, first_row: int, contract: bool) -> Float32Array:
    """llama.cpp on the CPU (ggml/src/ggml-cpu/ops.cpp): float32 squares added in order in float64, rounded once."""
    return _float64_sum(x).astype(np.float32)


def llama_cpp_cpu_mean(x: Float32Array, all_rows: int, first_row: int, contract: bool) -> Float32Array:
    """The mean that belongs to it: divided in float64, then rounded to float32."""
    return (_float64_sum(x) / np.float64(x.shape[1])).astype(np.float32)


def _float64_sum(x: Float32Array) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.add.accumulate(x * x, axis=1, dtype=np.float64)[:, -1]
