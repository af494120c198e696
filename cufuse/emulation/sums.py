"""The sum of squares of a row, added in the order in which an implementation adds it.

float32 addition is not associative: the order decides the last bits of a norm's statistic. Every order here is that of
one implementation, read from its source, down to lanes and warps; ``SUM_ORDERS`` names them. Only additions that can
change a bit are done: idle threads and masked elements contribute zeros, which change nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal, Protocol

import ml_dtypes
import numpy as np

from cufuse.emulation import sums_engines, sums_torch
from cufuse.emulation.floats import Float32Array

MeanKind = Literal["factor", "reciprocal", "divide"]


class BlockFunction(Protocol):
    """Sums of squares of a block of rows, float32 [rows, columns] -> [rows]; it begins at row first_row of all_rows."""

    def __call__(self, x: Float32Array, all_rows: int, first_row: int, contract: bool) -> Float32Array: ...


@dataclass(frozen=True)
class SumOrder:
    """One order of summation.

    ``summary``: readable, one line. ``source``: project, version, file. ``function``: the sums of a block of rows.
    ``mean``: what the implementation makes of the sum (see ``mean_of_squares``). ``depends_on_rows``: whether the
    number of rows changes the order, so that the norm of a row depends on its batch. ``own_mean``: the mean of
    squares where it is not formed from a float32 sum of squares, which is for numbers of columns that
    ``sum_if_multiple_of`` does not divide (0: for all).
    """

    name: str
    summary: str
    source: str
    function: BlockFunction
    mean: MeanKind
    depends_on_rows: bool
    own_mean: BlockFunction | None = None
    sum_if_multiple_of: int = 0

    def has_own_mean(self, columns: int) -> bool:
        """Whether the mean of so many squares comes from ``own_mean``."""
        summed = self.sum_if_multiple_of != 0 and columns % self.sum_if_multiple_of == 0
        return self.own_mean is not None and not summed


_ORDERS: Final = (
    SumOrder(
        "torch-mean",
        "32 to 512 threads a row (fewer the more rows), vectors of 4 into 4 accumulators, then halving; "
        "from K = 8161 on (earlier below 16 rows) a whole thread block a row",
        "PyTorch 2.10 to 2.13, ATen/native/cuda/Reduce.cuh; the mean: ReduceMomentKernel.cu",
        sums_torch.torch_mean,
        "factor",
        depends_on_rows=True,
    ),
    SumOrder(
        "torch-mean-2.9",
        "as torch-mean, but lanes 1, 2, 4, 8, 16 apart, lines before lanes, and vectors only from K = 129 on",
        "PyTorch 2.0 to 2.9, ATen/native/cuda/Reduce.cuh",
        sums_torch.torch_mean_2_9,
        "factor",
        depends_on_rows=True,
    ),
    SumOrder(
        "torch-rms-norm",
        "128 threads, vectors of 4 into one accumulator, lanes 16, 8, 4, 2, 1 apart, warps 2, 1 apart; "
        "K no multiple of 4: Welford's variance + mean**2 over 512 threads",
        "PyTorch 2.9 to 2.13, ATen/native/cuda/layer_norm_kernel.cu, block_reduce.cuh, SharedReduceOps.h",
        sums_torch.torch_rms_norm,
        "divide",
        depends_on_rows=False,
        own_mean=sums_torch.torch_rms_norm_moments,
        sum_if_multiple_of=4,
    ),
    SumOrder(
        "vllm",
        "up to 1024 threads (256 from 256 rows on), vectors of gcd(8, K) into one accumulator, "
        "lanes 1, 2, 4, 8, 16 apart, then the warps one after the other",
        "vLLM 0.11 to 0.20, csrc/layernorm_kernels.cu, rms_norm_kernel; CUB's BlockReduce by warp reductions",
        sums_engines.vllm,
        "divide",
        depends_on_rows=True,
    ),
    SumOrder(
        "vllm-add",
        "as vllm, but vectors of 8 summed first: four pairs of squares, one after the other",
        "vLLM up to 0.20, csrc/layernorm_kernels.cu, fused_add_rms_norm_kernel; type_convert.cuh, sum_squares",
        sums_engines.vllm_add,
        "divide",
        depends_on_rows=True,
    ),
    SumOrder(
        "flashinfer",
        "up to 1024 threads, vectors of gcd(8, K) into one accumulator, lanes 16, 8, 4, 2, 1 apart, warps likewise",
        "FlashInfer 0.2 to 0.6, include/flashinfer/norm.cuh (the CUDA kernels, not the CuTe DSL ones)",
        sums_engines.flashinfer,
        "reciprocal",
        depends_on_rows=False,
    ),
    SumOrder(
        "llama.cpp",
        "1024 threads (256 if K < 1024), one accumulator, lanes 16, 8, 4, 2, 1 apart, warps likewise",
        "llama.cpp of 2025, ggml/src/ggml-cuda/norm.cu, rms_norm_f32",
        sums_engines.llama_cpp,
        "reciprocal",
        depends_on_rows=False,
    ),
    SumOrder(
        "llama.cpp-cpu",
        "float32 squares, first to last, into a float64",
        "llama.cpp of 2025, ggml/src/ggml-cpu/ops.cpp, ggml_compute_forward_rms_norm_f32",
        sums_engines.llama_cpp_cpu,
        "divide",
        depends_on_rows=False,
        own_mean=sums_engines.llama_cpp_cpu_mean,
    ),
    SumOrder(
        "nano-vllm",
        "min(2048, next power of two) accumulators, neighbours in fours, lanes 16, 8, 4, 2, 1 apart, warps likewise",
        "cufuse's choice of a Triton reduction: Inductor's own layout depends on its version and tuning",
        sums_engines.nano_vllm,
        "divide",
        depends_on_rows=False,
    ),
    SumOrder(
        "sequential",
        "first to last into one accumulator",
        "cufuse; no GPU kernel adds like this",
        sums_engines.sequential,
        "divide",
        depends_on_rows=False,
    ),
)

SUM_ORDERS: Final[Mapping[str, SumOrder]] = MappingProxyType({order.name: order for order in _ORDERS})
"""Every order of summation, by name."""

# about 2 MB of float32 at a time: it stays in the cache, and temporaries stay small
_ELEMENTS_AT_A_TIME: Final = 1 << 19


def sum_of_squares(x: Any, order: str, *, contract: bool = False) -> Float32Array:
    """The rows' sums of squares in float32, added in the named order.

    Formula: ``sum(x[m, k]**2 for k)`` where every square and every addition is rounded to float32, to nearest even;
    with ``contract``, square and first addition are one FMA, as nvcc compiles ``s += x * x`` by default. For bfloat16
    values the squares are exact and contraction changes nothing.

    Parameters
    ----------
    x : float32 or bfloat16 array [rows, columns], any strides. The order may depend on both lengths, and for
        "torch-mean" on a row's index where columns % 4 != 0 (ATen reads aligned vectors), so give all rows of the call.
    order : a name in ``SUM_ORDERS``.
    contract : fuse square and addition.

    Returns
    -------
    float32 array [rows].

    Special values: a NaN or an infinity in a row makes its sum NaN or infinity; subnormals are kept. Accuracy: the
    error of the longest chain of additions, ``(1 + 2**-24)**depth - 1`` relative to the exact sum.

    Raises TypeError for another dtype or no NumPy array; ValueError for another number of dimensions, for no columns,
    for an unknown order, and for "torch-rms-norm" where columns % 4 != 0: ``F.rms_norm`` forms no sum of squares
    there (``mean_of_squares`` follows it).
    """
    return _in_blocks(x, _order(order).function, contract)


def mean_of_squares(x: Any, order: str, *, contract: bool = False, mean: MeanKind | None = None) -> Float32Array:
    """The rows' means of squares in float32, as the implementation behind the order forms them.

    ``mean`` says what becomes of the sum ``s`` of ``sum_of_squares`` (None: what the implementation does,
    ``SumOrder.mean``):

    ==========  =================================================================================================
    factor      ``s * torch_mean_factor(rows, columns)``: PyTorch's mean
    reciprocal  ``s * float32(1 / columns)``: division under nvcc's -use_fast_math, if the chip's reciprocal is
                correctly rounded for the number of columns (documented to 1 ulp)
    divide      ``s / columns``, correctly rounded
    ==========  =================================================================================================

    The three agree where columns is a power of two. Where the implementation forms no sum of squares ("torch-rms-norm"
    with columns % 4 != 0; "llama.cpp-cpu", which divides in float64), ``mean`` must be None and its own mean is
    returned.

    Parameters, special values and errors: as ``sum_of_squares``; no columns give ValueError here too.
    """
    chosen = _order(order)
    columns = _check(x)[1]
    if chosen.own_mean is not None and chosen.has_own_mean(columns):
        if mean is not None:
            raise ValueError(f"mean is {mean!r}; {order!r} has its own mean for {columns} columns: leave mean out")
        return _in_blocks(x, chosen.own_mean, contract)
    total = _in_blocks(x, chosen.function, contract)
    kind = chosen.mean if mean is None else mean
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "factor":
            return total * torch_mean_factor(*x.shape)
        if kind == "reciprocal":
            return total * (np.float32(1) / np.float32(columns))
        if kind == "divide":
            return total / np.float32(columns)
    raise ValueError(f"mean is {mean!r}; needed is 'factor', 'reciprocal', 'divide' or None")


def torch_mean_factor(rows: int, columns: int) -> np.float32:
    """What PyTorch's mean multiplies the sums of [rows, columns] by: ``float32(rows) / float32(rows * columns)``.

    It is float32(1 / columns) only while both counts are exact in float32; beyond 2**24 elements it may be a neighbour
    of that, so that the mean of a row depends on the batch once more.
    Source: PyTorch 2.x, ATen/native/cuda/ReduceMomentKernel.cu, mean_kernel_impl.
    """
    return np.float32(rows) / np.float32(rows * columns)


def _order(name: str) -> SumOrder:
    if name not in SUM_ORDERS:
        raise ValueError(f"order is {name!r}; needed is one of {', '.join(SUM_ORDERS)}")
    return SUM_ORDERS[name]


def _check(x: Any) -> tuple[int, int]:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"x is a {type(x).__qualname__}; needed is a NumPy array: numpy.asarray converts lists")
    if x.dtype not in (np.float32, ml_dtypes.bfloat16):
        raise TypeError(f"x has dtype {x.dtype}; needed is float32 or bfloat16: use x.astype(numpy.float32)")
    if x.ndim != 2:
        raise ValueError(f"x has shape {x.shape}; needed is [rows, columns]: use x.reshape(-1, x.shape[-1])")
    if x.shape[1] == 0:
        raise ValueError(f"x has shape {x.shape}; needed is at least one column")
    rows, columns = x.shape
    return rows, columns


def _in_blocks(x: Any, function: BlockFunction, contract: bool) -> Float32Array:
    rows, columns = _check(x)
    total = np.empty(rows, np.float32)
    step = max(1, _ELEMENTS_AT_A_TIME // columns)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for first in range(0, rows, step):
            block = x[first : first + step].astype(np.float32, copy=False)
            total[first : first + step] = function(block, rows, first, contract)
    return total
