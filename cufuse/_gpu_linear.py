"""``x weight^T`` on CuPy arrays: which kernel takes a product, and its launches.

All kernels give the same bits: one float32 accumulator for each output that walks K upward, sixteen at a time, one tensor-core
instruction each, from +0; slices of K have accumulators of their own and are added in float32, first to last. The choice
between them is speed alone.
"""

import struct
from collections.abc import Callable
from typing import Any, Final

from cufuse import _linear_small_m as small_m
from cufuse import _linear_tiles as tiles
from cufuse import _repeat, compiler, launch
from cufuse._linear_problem import Launch, Problem, ceil_div, slice_length
from cufuse.compiler import Kernel

_SPLIT: Final = Kernel("split_float32", "split_float32.cu", "split_float32", (), 256)
_SUM: Final = Kernel("sum_slices", "sum_slices.cu", "sum_slices", (), 256)
_SPLIT_ARGUMENTS: Final = struct.Struct("PPqii")
_SUM_ARGUMENTS: Final = struct.Struct("PPqii")
_MOST_PLANS: Final = 4096
_MOST_ADDRESSES: Final = 256
"""Of a plan, whose launches are remembered: some 500 bytes each."""

_Launch = tuple[Any, bytes]
Configuration = small_m.Configuration | tiles.WarpgroupConfiguration | tiles.MmaConfiguration

KERNELS: Final = (
    *(c.kernel for c in small_m.CONFIGURATIONS),
    *(c.kernel for c in tiles.WARPGROUP),
    *(c.kernel for c in tiles.MMA),
    _SPLIT,
    _SUM,
)


def linear(
    x: Any,
    weight: Any,
    out: Any,
    k_slices: int = 1,
    *,
    configuration: Configuration | None = None,
    weights_ready: bool = False,
    call: _repeat.Call | None = None,
) -> Any:
    """out[m, n] = sum over k of x[m, k] weight[n, k], for checked CuPy arrays of one device; returns out.

    x : [M, K], bfloat16, or float32 (split into three bfloat16 parts); unit stride along K, rows any distance apart.
    weight : [N, K], bfloat16, the same. out : [M, N], bfloat16 or float32, contiguous, sharing no memory with the inputs.
    k_slices : slices of K.
    configuration : which kernel, for measurements; None chooses. ValueError where it cannot take the product.
    weights_ready : weight may be read before the kernel in front of this one in the stream has ended: only where it has been
        written before that one was launched. Kernels that cannot do it ignore it.
    call : what the launches shall be remembered by, if they shall.
    """
    memory, weights, results = x.data, weight.data, out.data
    pointers = (memory.ptr, weights.ptr, results.ptr)
    device = memory.device_id
    if weights.device_id != device or results.device_id != device:
        launch.device_of(x=x, weight=weight, out=out)
    alignment = alignment_of(pointers)
    key = (
        x.shape, x.strides, x.itemsize, weight.shape, weight.strides, out.itemsize, alignment, k_slices, device,
        configuration, weights_ready,
    )  # fmt: skip
    with launch.on_device(device):
        plan = _plans.get(key)
        if plan is None:
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
            problem = describe(x, weight, out, alignment, k_slices, device, weights_ready=weights_ready)
            plan = _plans[key] = Plan(problem, device, configuration)
        workspace = launch.workspace(device, plan.workspace_bytes) if plan.workspace_bytes else 0
        launches = plan.launches(*pointers, workspace)
        launch.one_by_one(launches)
        if call is not None:
            _repeat.remember(call, launches)
    return out


_plans: dict[Any, "Plan"] = {}


def alignment_of(pointers: tuple[int, int, int]) -> tuple[int, int, int]:
    """Bytes by which x, weight and out miss multiples of 16."""
    return (pointers[0] & 15, pointers[1] & 15, pointers[2] & 15)


def describe(
    x: Any, weight: Any, out: Any, alignment: tuple[int, int, int], k_slices: int, device: int, *, weights_ready: bool
) -> Problem:
    """The product of arrays as ``linear`` takes them, or of their layouts."""
    (m, k), n = x.shape, weight.shape[0]
    # a stride along an axis of length 1 means nothing; a row's own length is as good as any
    x_stride = x.strides[0] // x.itemsize if m > 1 else -(-k // 8) * 8
    weight_stride = weight.strides[0] // 2 if n > 1 else -(-k // 8) * 8
    capability = launch.capability(device)
    return Problem(
        m, n, k, x_stride, weight_stride,
        float32_x=x.itemsize == 4,
        out_float32=out.itemsize == 4,
        # the parts of float32 values are written where they are aligned
        aligned_x=x.itemsize == 4 or (alignment[0] == 0 and x_stride % 8 == 0),
        aligned_weight=alignment[1] == 0 and weight_stride % 8 == 0,
        aligned_out=alignment[2] == 0,
        mappable=x_stride >= k and weight_stride >= k,
        pairs=n % 2 == 0 and alignment[2] % (2 * out.itemsize) == 0,
        slice_k=slice_length(k, k_slices),
        capability=capability,
        multiprocessors=launch.multiprocessors(device),
        shared_memory=compiler.shared_memory_limit(capability),
        programmatic=capability >= 90,
        weights_ready=weights_ready,
    )  # fmt: skip


def _choose(problem: Problem) -> Launch:
    quicker = not tiles.suits_warpgroups(problem) or small_m.beats_warpgroups(problem)
    if small_m.suits(problem) and quicker and (found := small_m.plan(problem, small_m.choose(problem))) is not None:
        return found
    if tiles.suits_warpgroups(problem):
        return tiles.plan_warpgroups(problem, tiles.choose_warpgroups(problem))
    return tiles.plan_mma(problem, tiles.choose_mma(problem))


def _given(problem: Problem, configuration: Configuration) -> Launch:
    """The launch of a configuration that was asked for by name."""
    found: Launch | None = None
    if isinstance(configuration, small_m.Configuration):
        if small_m.suits(problem) and problem.m <= configuration.tokens:
            found = small_m.plan(problem, configuration)
    elif isinstance(configuration, tiles.WarpgroupConfiguration):
        if tiles.takes_warpgroups(problem, configuration):
            found = tiles.plan_warpgroups(problem, configuration)
    elif (configuration.parts > 1) == problem.float32_x and (problem.vectors or not configuration.vector):
        found = tiles.plan_mma(problem, configuration)
    if found is None:
        raise ValueError(f"configuration {configuration} cannot take {problem}")
    return found


class Plan:
    """The launches of one kind of product: splitting x, multiplying, adding slices."""

    __slots__ = ("_add", "_known", "_parts", "_prepared", "_product", "_split", "workspace_bytes")

    def __init__(self, problem: Problem, device: int, configuration: Configuration | None = None) -> None:
        self._product = _choose(problem) if configuration is None else _given(problem, configuration)
        p, found = problem, self._product
        self._prepared = launch.prepare(
            found.kernel, device, found.grid, threads=found.threads, smem=found.smem, cluster=found.cluster,
            programmatic=found.programmatic,
        )  # fmt: skip
        self._known: dict[tuple[int, int, int, int], list[_Launch]] = {}
        blocks = 8 * p.multiprocessors
        self._split: Callable[[int, int], _Launch] | None = None
        self._add: Callable[[int, int], _Launch] | None = None
        # the workspace begins with x's parts, then has the slices
        self._parts = ceil_div(p.m * tiles.parts_row(p.k) * 2, 256) * 256 if p.float32_x else 0
        self.workspace_bytes = self._parts + (p.slices * p.m * p.n * 4 if found.partial_sums else 0)
        if p.float32_x:
            splitter = launch.prepare(_SPLIT, device, min(ceil_div(p.m * p.k, 256), blocks))
            self._split = lambda x, parts: (splitter, _SPLIT_ARGUMENTS.pack(x, parts, p.x_stride, p.m, p.k))
        if found.partial_sums:
            adder = launch.prepare(_SUM, device, min(ceil_div(p.m * p.n, 256), blocks))
            self._add = lambda slices, out: (adder, _SUM_ARGUMENTS.pack(slices, out, p.m * p.n, p.slices, p.out_float32))

    def launches(self, x: int, weight: int, out: int, workspace: int) -> list[_Launch]:
        """Prepared kernels and their arguments, in order, with these addresses; workspace: of workspace_bytes, 256-aligned.

        They follow from the addresses alone, and are remembered: to encode tensor maps is a large part of what a call costs.
        """
        addresses = (x, weight, out, workspace)
        found = self._known.get(addresses)
        if found is None:
            if len(self._known) >= _MOST_ADDRESSES:
                self._known.clear()
            found = self._known[addresses] = self._made(*addresses)
        return found

    def _made(self, x: int, weight: int, out: int, workspace: int) -> list[_Launch]:
        first = []
        if self._split is not None:
            first.append(self._split(x, workspace))
            x = workspace
        if self._add is None:
            return [*first, (self._prepared, self._product.arguments(x, weight, out))]
        slices = workspace + self._parts
        return [*first, (self._prepared, self._product.arguments(x, weight, slices)), self._add(slices, out)]
