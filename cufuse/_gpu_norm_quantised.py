"""RMSNorm of one row and its product with a quantised weight in one launch (sm_90 on): kernels/quantised_linear_sm90.cu, NORM 1."""

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import numpy as np

from cufuse import _linear_quantised as planning
from cufuse import compiler, launch
from cufuse._gpu_heads import Unsuited
from cufuse._gpu_norm_linear import Rows
from cufuse._linear_problem import ceil_div
from cufuse._linear_quantised import Machine, Product, Streamed
from cufuse._norm_kernels import RESIDUAL, mean_operand, order_defines, order_of, point_defines, point_names, scratch_floats
from cufuse.compiler import Kernel
from cufuse.named_recipes import RECIPES

_GROUP: Final = 256
_NORM: Final = struct.Struct("4P2f2i16x")
_PACK: Final = 8
_EARLY_BYTES: Final = 56 * 1024
"""Of the rings, asked for while the kernel in front runs: more would delay the row, whose loads queue behind it."""


class Plan:
    """The launch for a row and a product. Raises Unsuited where the kernel cannot do it."""

    __slots__ = ("_arguments", "prepared")

    def __init__(self, rows: Rows, product: Product, eps: float, device: int, *, weights_ready: bool) -> None:
        capability = launch.capability(device)
        machine = Machine(capability, launch.multiprocessors(device), compiler.shared_memory_limit(capability))
        configuration = Streamed(product.form.name, 8, 1, True)
        _require(rows, product)
        deal = planning.deal_out(product, configuration, machine)
        found = planning.plan_streamed(product, configuration, machine)
        if deal is None or found is None or found.threads is None or found.threads < _GROUP:
            raise Unsuited("shared memory, or too few warps")
        row_bytes = ceil_div(4 * scratch_floats(_sums(rows)), 16) * 16 + rows.columns * rows.z_bytes
        size = max(deal.size, deal.sums_at + row_bytes)
        if size > machine.shared_memory:
            raise Unsuited("shared memory")
        stage = configuration.stage_bytes * deal.groups * product.slices
        early = min(deal.depth, max(1, _EARLY_BYTES // stage)) if weights_ready else 0
        numbers = float(mean_operand(rows.recipe.norm, 1, rows.columns)), float(np.float32(eps)), early, deal.sums_at
        kernel = _kernel(rows, configuration)
        self.prepared = launch.prepare(kernel, device, found.grid, threads=found.threads, smem=size, programmatic=True)

        def arguments(x: int, residual: int, norm_weight: int, total: int, weight: int, out: int) -> bytes:
            return found.arguments(x, weight, out) + _NORM.pack(x, residual, norm_weight, total, *numbers)

        self._arguments: Callable[..., bytes] = arguments

    def launches(self, *pointers: int) -> list[tuple[Any, bytes]]:
        """What to launch. pointers: x, residual, the norm's weight, the new residual, weight, out."""
        return [(self.prepared, self._arguments(*pointers))]


def _require(rows: Rows, p: Product) -> None:
    reasons = {
        "more than one row": rows.count != 1,
        "float32 between norm and product, or a padded row": not p.direct,
        "rows are no whole packs": rows.columns % _PACK != 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise Unsuited(reason)


def _sums(rows: Rows) -> dict[str, int]:
    return order_defines(order_of(rows.recipe.norm, rows.residual_sum), rows.count, rows.columns)


def _kernel(rows: Rows, configuration: Streamed) -> Kernel:
    norm, product = rows.recipe.norm, configuration.kernel
    defines: dict[str, int | str] = {**dict(product.defines), "NORM": 1, "COLUMNS": rows.columns, "GROUP": _GROUP}
    defines |= {**_sums(rows), **point_defines(norm), "X_FLOAT32": 0, "WEIGHT_FLOAT32": int(rows.weight_float32)}
    defines |= {"RESIDUAL": RESIDUAL[rows.residual_sum], "RESIDUAL_FLOAT32": int(rows.residual_float32)}
    points = point_names(norm)
    points += [f"residual {'float32 ' if rows.residual_float32 else ''}{rows.residual_sum}"] if rows.residual_sum else []
    points += ["float32 w"] if rows.weight_float32 else []
    order = f"{order_of(norm, rows.residual_sum)} {defines['SUM_THREADS']}"
    name = f"{product.name}, one row of {rows.columns} normalised: {order}, {', '.join(points) or 'plain'}"
    return replace(product, name=name, defines=tuple(defines.items()))


def _kernels() -> tuple[Kernel, ...]:
    """A choice for compile tests and tables: Qwen3's hidden sizes."""
    recipe = RECIPES["block-scaled"]
    found = []
    for form, columns, residual in (
        ("Q4_0", 1024, False), ("Q4_0", 2560, False), ("Q4_0", 4096, True), ("Q8_0", 4096, False), ("Q8_0", 5120, True),
        ("Q4_K", 4096, False), ("Q6_K", 4096, False),
    ):  # fmt: skip
        sum_of = recipe.residual_sum if residual else None
        rows = Rows(recipe, 1, columns, sum_of, True, False, (0, 0, 0))
        found.append(_kernel(rows, Streamed(form, 8, 1, True)))
    return tuple(found)


KERNELS: Final = _kernels()
