"""What the kernels of ``linear`` are asked to do, and the launches that do it."""

from collections.abc import Callable
from dataclasses import dataclass

from cufuse.compiler import Kernel

SLICE_BLOCK = 64
"""K is cut into slices at multiples of this."""


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


@dataclass(frozen=True)
class Problem:
    """out[m, n] = sum over k of x[m, k] weight[n, k] on a device: shapes, layout in memory and the device's limits.

    x_stride, weight_stride : distance of two rows, in elements.
    float32_x : x holds float32, which are split into three bfloat16 parts first.
    aligned_x, aligned_weight, aligned_out : pointers and, for the inputs, distances of rows are multiples of 16 bytes.
    mappable : rows lie one behind the other, as a tensor map wants them.
    pairs : two neighbouring outputs may be stored at once: n is even and out aligned to them.
    slice_k : values of k in a slice; slices = ceil(k / slice_k).
    programmatic : may begin before the kernel in front of it in the stream has ended (programmatic dependent launch), and then
    waits for it, but for weights_ready: the weight may be read before.
    """

    m: int
    n: int
    k: int
    x_stride: int
    weight_stride: int
    float32_x: bool
    out_float32: bool
    aligned_x: bool
    aligned_weight: bool
    aligned_out: bool
    mappable: bool
    pairs: bool
    slice_k: int
    capability: int
    multiprocessors: int
    shared_memory: int
    programmatic: bool = False
    weights_ready: bool = False

    @property
    def slices(self) -> int:
        """Slices of K that are not empty."""
        return ceil_div(self.k, self.slice_k)

    @property
    def vectors(self) -> bool:
        """Whether rows of both operands can be read 16 bytes at a time, to their end."""
        return self.aligned_x and self.aligned_weight and self.k % 8 == 0

    @property
    def maps(self) -> bool:
        """Whether the copy engine can fetch bfloat16 boxes of both operands."""
        return self.vectors and self.mappable and not self.float32_x


def slice_length(k: int, k_slices: int) -> int:
    """Values of k in a slice where K is cut as cuBLAS does: ceil(K/64/slices) blocks of 64, the last slice shorter."""
    return ceil_div(ceil_div(k, SLICE_BLOCK), k_slices) * SLICE_BLOCK


@dataclass(frozen=True)
class Launch:
    """One launch: its shape, and the packed arguments as a function of the pointers of x, weight and out.

    partial_sums : out is to be a float32 workspace [slices, m, n], whose slices remain to be added.
    """

    kernel: Kernel
    grid: tuple[int, int, int]
    arguments: Callable[[int, int, int], bytes]
    threads: int | None = None
    smem: int | None = None
    cluster: int = 1
    partial_sums: bool = False
    programmatic: bool = False
