"""The block of ``rms_norm_qkv`` as a chain of launches without gaps: norm and projection (one kernel for a few rows), heads (for
few rows of a small model in the same one).

Each kernel may begin before the one in front of it has ended (programmatic dependent launch, Hopper on) and waits for it before
it reads what that one writes. The projection has fetched its first weights by then. What may be fetched so early:

- by default nothing that the kernel in front of the whole call could still be writing: the norm waits for it, and only then lets
  the projection begin, so that the weights have been written by then whoever wrote them;
- with static weights the projection may begin, and fetch weights, while the kernel in front of the call still runs.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Final

import numpy as np

from cufuse import (
    _gpu_gemm,
    _gpu_head_parts,
    _gpu_heads,
    _gpu_linear,
    _gpu_linear_heads,
    _gpu_norm,
    _gpu_norm_linear,
    _layout,
    launch,
)
from cufuse._gpu_heads import Block, Described, Ends, Unsuited, dense
from cufuse._gpu_norm_linear import Rows
from cufuse._linear_problem import Problem
from cufuse.compiler import Kernel
from cufuse.qkv import Heads
from cufuse.recipe import Recipe

KERNELS: Final[tuple[Kernel, ...]] = ()
"""None of its own."""

_ALIGNMENT: Final = 1024
_OF_HEADS: Final = ("out[0]", "out[1]", "out[2]", "cos", "sin", "q_norm_weight", "k_norm_weight", "cache_slots")

Launches = list[tuple[Any, bytes]]
Step = Callable[[dict[str, int], int], Launches]


class Chain:
    """The launches of a call whose arrays have fixed layouts. Raises Unsuited where the kernels cannot do it but the operations
    one by one may, ValueError where those cannot either.

    ``launches(address, workspace)`` gives them; ``address`` knows the inputs and outputs by name, workspace has
    ``workspace_bytes`` bytes.
    """

    __slots__ = ("_steps", "workspace_bytes")

    _Plan: ClassVar[Any] = _gpu_linear.Plan
    """Of one product."""

    def __init__(
        self, arrays: dict[str, Any], shape: Heads, eps: float, recipe: Recipe, k_slices: int | None, device: int, static: bool
    ) -> None:
        """arrays: inputs by their names ("qkv_weight[0]", ...; absent ones None), results as "out[0]", ..., cache_slots."""
        ends = _gpu_heads.ends(recipe, arrays["q_norm_weight"] is not None, arrays["cos"] is not None)
        _require_strides(arrays, ends)
        x = arrays["x"]
        *leading, columns = x.shape
        tokens = int(np.prod(leading, dtype=np.int64))
        chained = launch.capability(device) >= 90
        self._steps: list[Step] = []
        self.workspace_bytes = 0

        weights = [name for name in arrays if name.startswith("qkv_weight")]
        width = 2 if recipe.norm.round_weighted else 4
        normalised = dense(x.shape, width)
        normalised_at = self._reserve(tokens * columns * width)
        raw, raw_at = self._projected(len(weights) == 1, tokens, 2 if recipe.gemm.output == "bfloat16" else 4, shape)
        products = self._products(arrays, weights, (tokens, columns, width), recipe, k_slices, device, chained)
        finished = self._projection_and_heads(arrays, products, normalised_at, ends, eps, device)
        if finished is not None:
            self._steps.append(self._norm(arrays, normalised, normalised_at, eps, recipe, device, chained, static))
            self._steps.append(finished)
            return
        everything = self._norm_and_projection(arrays, products, normalised_at, raw_at[0], eps, recipe, device, static, ends)
        if everything is not None:
            self._steps.append(everything)
            return
        together = self._norm_and_projection(arrays, products, normalised_at, raw_at[0], eps, recipe, device, static)
        if together is not None:
            self._steps.append(together)
        else:
            self._steps.append(self._norm(arrays, normalised, normalised_at, eps, recipe, device, chained, static))
            self._steps.append(self._projection(products, normalised_at, raw_at, device))
        self._steps.append(self._heads(arrays, raw, raw_at, tuple(leading), ends, eps, device, static))

    def _reserve(self, size: int) -> int:
        """Place of ``size`` bytes in the workspace."""
        at = self.workspace_bytes
        self.workspace_bytes += -(-size // _ALIGNMENT) * _ALIGNMENT
        return at

    def _norm(
        self, arrays: dict[str, Any], normalised: Described, at: int, eps: float, recipe: Recipe, device: int, chained: bool,
        static: bool,
    ) -> Step:  # fmt: skip
        names, inputs = ["x", "norm_weight"], {"x": arrays["x"], "weight": arrays["norm_weight"]}
        outs, residual_sum = {"out": normalised}, None
        written = []
        if arrays["residual"] is not None:
            names.insert(1, "residual")
            inputs = {"x": arrays["x"], "residual": arrays["residual"], "weight": arrays["norm_weight"]}
            outs["out[3]"], residual_sum = arrays["out[3]"], recipe.residual_sum
            written = ["out[3]"]
        alignment = _alignment(arrays, [*names, *written])
        options = {"programmatic": chained, "next_begins_early": static}
        plan = _gpu_norm.Plan(outs, inputs, alignment, eps, recipe.norm, residual_sum, device, **options)

        def step(address: dict[str, int], workspace: int) -> Launches:
            pointers = [workspace + at, *(address[name] for name in (*written, *names))]
            return [(plan.prepared, plan.arguments(pointers))]

        return step

    def _projected(
        self, packed: bool, tokens: int, itemsize: int, shape: Heads
    ) -> tuple[tuple[Described, ...], tuple[int, ...]]:
        """q, k and v as the products leave them in the workspace: layouts, and places."""
        row = sum(shape.rows)
        if packed:
            at = self._reserve(tokens * row * itemsize)
            places = [at + first * itemsize for first in (0, shape.rows[0], shape.rows[0] + shape.rows[1])]
        else:
            places = [self._reserve(tokens * rows * itemsize) for rows in shape.rows]
        raw = [
            Described(
                (tokens, rows // shape.head_dim, shape.head_dim),
                ((row if packed else rows) * itemsize, shape.head_dim * itemsize, itemsize),
                itemsize,
            )
            for rows in shape.rows
        ]
        return tuple(raw), tuple(places)

    def _products(
        self, arrays: dict[str, Any], weights: list[str], x: tuple[int, int, int], recipe: Recipe, k_slices: int | None,
        device: int, chained: bool,
    ) -> dict[str, Problem]:  # fmt: skip
        """By the weights' names; their x is dense: rows, columns, bytes of an element."""
        tokens, columns, width = x
        products = {}
        for name in weights:
            weight = arrays[name]
            n = weight.shape[0]
            slices = recipe.gemm.k_slices if k_slices is None else int(k_slices)
            if slices == "cublas":
                slices = _gpu_gemm.asked_slices(tokens, n, columns)
            out = dense((tokens, n), 2 if recipe.gemm.output == "bfloat16" else 4)
            alignment = (0, weight.data.ptr & 15, 0)
            products[name] = _gpu_linear.describe(
                dense((tokens, columns), width), weight, out, alignment, slices, device, weights_ready=chained
            )
        return products

    def _projection(self, products: dict[str, Any], x_at: int, raw_at: tuple[int, ...], device: int) -> Step:
        plans = [(name, self._Plan(product, device), at) for (name, product), at in zip(products.items(), raw_at, strict=False)]
        scratch = self._reserve(max(plan.workspace_bytes for _, plan, _ in plans))

        def step(address: dict[str, int], workspace: int) -> Launches:
            found: Launches = []
            for name, plan, at in plans:
                found += plan.launches(workspace + x_at, address[name], workspace + at, workspace + scratch)
            return found

        return step

    def _norm_and_projection(
        self, arrays: dict[str, Any], products: dict[str, Problem], normalised_at: int, raw_at: int, eps: float, recipe: Recipe,
        device: int, static: bool, ends: Ends | None = None,
    ) -> Step | None:  # fmt: skip
        """Both in one launch, for a few rows and a packed weight, with ``ends`` the heads as well; None where that cannot be."""
        rows = _rows_of(arrays, recipe)
        if len(products) > 1 or rows is None:
            return None
        name, problem = next(iter(products.items()))
        names = list(_OF_HEADS) if ends is not None else []
        try:
            heads = None
            if ends is not None:
                block = _finished_block(arrays)
                heads = _gpu_head_parts.HeadParts(block, ends, recipe.norm, eps, _alignment(arrays, names[:-1]))
            plan = _gpu_norm_linear.Plan(rows, problem, eps, device, weights_ready=static, heads=heads)
        except Unsuited:
            return None

        def step(address: dict[str, int], workspace: int) -> Launches:
            ready = launch.counters(device)
            given = [address.get(one, 0) for one in ("x", "residual", "norm_weight")]
            written = (address.get("out[3]", 0), ready, address[name], workspace + raw_at)
            return plan.launches((*given, workspace + normalised_at, *written, *(address[one] for one in names)))

        return step

    def _projection_and_heads(
        self, arrays: dict[str, Any], products: dict[str, Problem], normalised_at: int, ends: Ends, eps: float,
        device: int,
    ) -> Step | None:
        """Both in one launch, for many rows and a packed weight; None where that cannot be, or is slower."""
        if len(products) > 1:
            return None
        weight, problem = next(iter(products.items()))
        names = _OF_HEADS[:-1]
        try:
            plan = _gpu_linear_heads.Plan(_finished_block(arrays), ends, problem, eps, device, _alignment(arrays, names))
        except Unsuited:
            return None

        def step(address: dict[str, int], workspace: int) -> Launches:
            return plan.launches((workspace + normalised_at, address[weight], *(address[name] for name in names)))

        return step

    def _heads(
        self, arrays: dict[str, Any], raw: tuple[Described, ...], raw_at: tuple[int, ...], leading: tuple[int, ...],
        ends: Ends, eps: float, device: int, static: bool,
    ) -> Step:  # fmt: skip
        alignment = _alignment(arrays, _OF_HEADS[:-1])
        q, k, v = (_with_leading(one, leading) for one in raw)
        for at in raw_at:
            alignment |= at & 15
        block = _finished_block(arrays)._replace(source=(q, k, v))
        plan = _gpu_heads.Plan(block, ends, eps, device, alignment, weights_ready=True, tables_ready=not static)

        def step(address: dict[str, int], workspace: int) -> Launches:
            return plan.launches((*(workspace + at for at in raw_at), *(address[name] for name in _OF_HEADS)))

        return step

    def launches(self, address: dict[str, int], workspace: int) -> Launches:
        """Prepared kernels with their arguments, in order."""
        return [one for step in self._steps for one in step(address, workspace)]


def _rows_of(arrays: dict[str, Any], recipe: Recipe) -> Rows | None:
    """What is normalised, for kernels that do more than that; None where they cannot read it."""
    x, residual = arrays["x"], arrays["residual"]
    total = arrays["out[3]"] if residual is not None else None
    walked = _layout.walk(x.shape[:-1], {"x": x, "residual": residual, "out[3]": total})
    read = ["x", "norm_weight", *(["residual", "out[3]"] if total is not None else [])]
    if x.itemsize != 2 or walked.outer != 1 or _alignment(arrays, read):
        return None
    wide = [one is not None and one.itemsize == 4 for one in (arrays["norm_weight"], residual)]
    strides = (walked.inner_strides[0], walked.inner_strides[1], walked.inner_strides[2])
    sum_of = recipe.residual_sum if residual is not None else None
    return Rows(recipe, walked.rows, x.shape[-1], sum_of, wide[0], wide[1], strides)


def _require_strides(arrays: dict[str, Any], ends: Ends) -> None:
    """ValueError for strides that nothing reads or writes; Unsuited for outputs to which the operations one by one copy."""
    copied = {"out[2]"} if ends.norm is not None or ends.rope is not None else {"out[0]", "out[1]", "out[2]"}
    slots = arrays["cache_slots"]
    if slots is not None:
        copied -= {"out[1]", "out[2]"}  # of caches single slots are written
        if not slots.flags.c_contiguous:
            raise ValueError(
                f"cache_slots has strides {slots.strides} in bytes; the kernels read one slot behind the other: make it "
                "contiguous with cupy.ascontiguousarray(cache_slots)"
            )
    _layout.require_unit_stride(**{name: array for name, array in arrays.items() if name not in copied})
    try:
        _layout.require_unit_stride(**{name: arrays[name] for name in copied})
    except ValueError as error:
        raise Unsuited(str(error)) from error


def _finished_block(arrays: dict[str, Any]) -> Block:
    """What is done with the heads, for kernels that have them already: their source is what they write."""
    outs = (arrays["out[0]"], arrays["out[1]"], arrays["out[2]"])
    weights, tables = (arrays["q_norm_weight"], arrays["k_norm_weight"]), (arrays["cos"], arrays["sin"])
    return Block(outs, outs, *weights, *tables, slots=arrays["cache_slots"], move_v=True)


def _alignment(arrays: dict[str, Any], names: Sequence[str]) -> int:
    bits = 0
    for name in names:
        if arrays[name] is not None:
            bits |= arrays[name].data.ptr
    return bits & 15


def _with_leading(array: Described, leading: tuple[int, ...]) -> Described:
    """[tokens, H, D] as [..., H, D]: the tokens lie one behind the other."""
    strides, step = [], array.strides[0]
    for length in reversed(leading):
        strides.append(step)
        step *= length
    return Described((*leading, *array.shape[1:]), (*reversed(strides), *array.strides[1:]), array.itemsize)
