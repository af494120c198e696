"""What llama.cpp runs on NVIDIA GPUs for up to eight tokens: activations in blocks of 32 bytes, integer dot products.

Source: llama.cpp at 000f4625, ggml/src/ggml-cuda/quantize.cu (quantize_q8_1), mmvq.cu (mul_mat_vec_q, table GENERIC, which Hopper
takes), vecdotq.cuh (vec_dot_q4_0_q8_1 and its like). mmvq runs for at most MMVQ_MAX_BATCH_SIZE = 8 tokens; more take mmq.cuh, whose
order is not followed here.

Activations, blocks of 32:  amax = max |x|;  d = amax / 127;  q = round(x / d), ties away from zero;  s = sum of the x in float32,
lanes 16, 8, 4, 2, 1 apart;  d and s are kept as float16. Compiled with -use_fast_math: division by 127 is a product with
float32(1/127), x / d one with the reciprocal of d. The reciprocal is taken as correctly rounded, where the chip's rcp.approx may be
one ulp off: a q next to a tie may then differ by one. Subnormals, which the chip flushes, are kept: their blocks have d = 0 in
float16 either way.

Products, each fused into the addition that follows it, as nvcc contracts them (read from the source, not from machine code):

    Q4_0, 16 of the 32:   acc = fma(d4, fma(dot, d8, -(4 s8)), acc)             dot of the unsigned halves; s stands for their - 8
    Q8_0, 8 of the 32:    acc = fma(d8_0 * d8, dot, acc)
    Q4_K, 8 of two 32:    sd = fma(d8, dot s, sd), sm = fma(d8, sum(q8) m, sm), each for the first 32, then the second;
                          acc = acc + fma(d, sd, -(dmin * sm))
    Q6_K, 4 of two 32:    sf = fma(d8, dot s, sf) for both;  acc = fma(d, sf, acc)

Order: 128 threads for 1 to 4 tokens, 64 for 5 to 8. Each walks K upward with one accumulator, in the strides that the functions
below give; warps are added to the first one in turn, then lanes 16, 8, 4, 2, 1 apart.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cufuse.emulation.floats import fma32

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

MOST_ROWS: Final = 8
"""Tokens of one call; more are taken in groups of so many, as with llama.cpp's option --ubatch-size 8."""

_BLOCK: Final = 32
_COLUMNS_AT_A_TIME: Final = 2048


class Activations:
    """Rows of x [M, K] as blocks: ``q`` int32 [M, K], ``d`` and ``s`` float32 [M, K / 32] (float16 values)."""

    def __init__(self, x: Float32) -> None:
        blocks = x.reshape(len(x), -1, _BLOCK)
        with np.errstate(all="ignore"):
            # as fmaxf, passes over NaN but where there is nothing else
            amax = np.fmax.reduce(np.abs(blocks), axis=2)
            d = amax * np.float32(np.float32(1) / np.float32(127))
            scaled = blocks * (np.float32(1) / d)[..., None]
            rounded = np.copysign(np.floor(np.abs(scaled.astype(np.float64)) + 0.5), scaled)
            # a cast of NaN gives 0; there is nothing to keep of a block whose scale is zero or infinite
            rounded = np.where(np.isfinite(rounded) & (amax != 0)[..., None], rounded, 0)
            total = blocks
            for lanes in (16, 8, 4, 2, 1):
                total = total[..., :lanes] + total[..., lanes : 2 * lanes]
            self.q: Int32 = rounded.astype(np.int32).reshape(len(x), -1)
            self.d: Float32 = d.astype(np.float16).astype(np.float32)
            self.s: Float32 = total[..., 0].astype(np.float16).astype(np.float32)


def matmul(x: Float32, form: str, content: dict[str, Any], progress: Callable[[float], object] | None = None) -> Float32:
    """x [M, K] float32 times a weight [N, K]^T in the format ``form``: float32 [M, N]; K a multiple of the format's block.

    ``content``: "integers" int8 [N, K], as they are multiplied (Q4_0 and Q4_K: 0 to 15, Q6_K: -32 to 31); "d" float32 [N, blocks];
    for the K formats "s" int [N, K / 32 or K / 16], and for Q4_K "dmin" [N, blocks] and "m" [N, K / 32].
    """
    out = np.empty((len(x), len(content["integers"])), np.float32)
    calls = list(range(0, len(x), MOST_ROWS))
    for done, first in enumerate(calls, 1):
        rows = slice(first, first + MOST_ROWS)
        for column in range(0, out.shape[1], _COLUMNS_AT_A_TIME):
            columns = slice(column, column + _COLUMNS_AT_A_TIME)
            part = {name: array[columns] for name, array in content.items()}
            with np.errstate(all="ignore"):
                out[rows, columns] = _call(x[rows], form, part)
        if progress is not None:
            progress(done / len(calls))
    nan = np.isnan(out)
    out.view(np.uint32)[nan] = 0x7FFFFFFF
    return out


def _call(x: Float32, form: str, content: dict[str, Any]) -> Float32:
    threads = 128 if len(x) <= 4 else 64
    acc = np.zeros((len(x), len(content["integers"]), threads), np.float32)
    for lanes, step in _STEPS[form](Activations(x), content, threads):
        acc[..., lanes] = step(acc[..., lanes])
    total = acc[..., :32]
    for warp in range(1, threads // 32):
        total = total + acc[..., 32 * warp : 32 * warp + 32]
    for offset in (16, 8, 4, 2, 1):
        total = total[..., :offset] + total[..., offset : 2 * offset]
    result: Float32 = total[..., 0]
    return result


Step = Callable[[Float32], Float32]


def _dot(a: Activations, w: NDArray[np.int8], k: NDArray[np.int64]) -> Float32:
    """Integer dot products over the columns k [lanes, n]: float32 [M, N, lanes], exact."""
    left = a.q[:, k].transpose(1, 0, 2).astype(np.float32)
    right = w[:, k].transpose(1, 2, 0).astype(np.float32)
    products: Float32 = np.matmul(left, right)  # below 2^24: exact in any order
    return products.transpose(1, 2, 0)


def _walk(threads: int, per_block: int, blocks: int) -> Iterator[tuple[slice, NDArray[np.int64], NDArray[np.int64]]]:
    """(lanes, their blocks, their places in the block) for each turn of a thread's loop."""
    lane = np.arange(threads)
    for first in range(0, blocks, threads // per_block):
        block = first + lane // per_block
        count = int((block < blocks).sum())
        yield slice(0, count), block[:count], lane[:count] % per_block


def _q4_0(a: Activations, w: dict[str, Any], threads: int) -> Iterator[tuple[slice, Step]]:
    for lanes, block, place in _walk(threads, 2, w["d"].shape[1]):
        k = 32 * block[:, None] + 8 * place[:, None] + np.r_[0:8, 16:24]
        inner = fma32(_dot(a, w["integers"], k), a.d[:, None, block], -(np.float32(4) * a.s[:, None, block]))
        scale = w["d"][None, :, block]
        yield lanes, lambda acc, inner=inner, scale=scale: fma32(scale, inner, acc)  # type: ignore[misc]


def _q8_0(a: Activations, w: dict[str, Any], threads: int) -> Iterator[tuple[slice, Step]]:
    for lanes, block, place in _walk(threads, 4, w["d"].shape[1]):
        k = 32 * block[:, None] + 8 * place[:, None] + np.arange(8)
        dot = _dot(a, w["integers"], k)
        scale = w["d"][None, :, block] * a.d[:, None, block]
        yield lanes, lambda acc, dot=dot, scale=scale: fma32(scale, dot, acc)  # type: ignore[misc]


def _q4_k(a: Activations, w: dict[str, Any], threads: int) -> Iterator[tuple[slice, Step]]:
    ones = np.ones((1, w["integers"].shape[1]), np.int8)
    for lanes, block, place in _walk(threads, 16, w["d"].shape[1]):
        shape = (len(a.q), len(w["d"]), len(block))
        sums_d, sums_m = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        for half in (0, 1):
            group = 8 * block + 2 * (place // 4) + half
            k = 32 * group[:, None] + 4 * (place % 4)[:, None] + np.r_[0:4, 16:20]
            d8 = a.d[:, None, group]
            sums_d = fma32(d8, _dot(a, w["integers"], k) * w["s"][None, :, group].astype(np.float32), sums_d)
            sums_m = fma32(d8, _dot(a, ones, k) * w["m"][None, :, group].astype(np.float32), sums_m)
        inner = fma32(w["d"][None, :, block], sums_d, -(w["dmin"][None, :, block] * sums_m))
        yield lanes, lambda acc, inner=inner: acc + inner  # type: ignore[misc]


def _q6_k(a: Activations, w: dict[str, Any], threads: int) -> Iterator[tuple[slice, Step]]:
    for lanes, block, place in _walk(threads, 32, w["d"].shape[1]):
        sums = np.zeros((len(a.q), len(w["d"]), len(block)), np.float32)
        # a thread's four weights lie in one 32 of the first or second 128, and 64 further on
        start = 128 * (place // 16) + 32 * (place % 16 // 8) + 4 * (place % 8)
        for half in (0, 1):
            at = 256 * block + start + 64 * half
            k = at[:, None] + np.arange(4)
            product = _dot(a, w["integers"], k) * w["s"][None, :, at // 16].astype(np.float32)
            sums = fma32(a.d[:, None, at // 32], product, sums)
        scale = w["d"][None, :, block]
        yield lanes, lambda acc, sums=sums, scale=scale: fma32(scale, sums, acc)  # type: ignore[misc]


_STEPS: Final[dict[str, Callable[[Activations, dict[str, Any], int], Iterator[tuple[slice, Step]]]]] = {
    "Q4_0": _q4_0, "Q8_0": _q8_0, "Q4_K": _q4_k, "Q6_K": _q6_k,
}  # fmt: skip
