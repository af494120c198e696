"""``rms_norm`` and ``add_rms_norm`` on CuPy arrays: kernels/rms_norm.cu.

Rows are read where they lie: any strides that two levels of rows describe (the heads of q inside a packed projection, say),
unit stride along the last axis. One launch, no copy, no synchronisation, nothing allocated.
"""

import math
import struct
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from cufuse import _layout, _repeat, compiler, launch
from cufuse._norm_kernels import Types, configuration
from cufuse.compiler import Kernel
from cufuse.named_recipes import RECIPES
from cufuse.recipe import Norm, Recipe

_POINTERS: Final = struct.Struct("PPPPP")
_NUMBERS: Final = struct.Struct("10qffii")
_MOST_ROWS: Final = 2**31 - 1
_MOST_PLANS: Final = 4096
_THREADS: Final = 2048
"""That a multiprocessor holds."""


def rms_norm(x: Any, weight: Any, eps: float, norm: Norm, result: Any, call: _repeat.Call | None = None) -> Any:
    """Normalise checked arrays into ``result``; see ``cufuse.rms_norm``. call: what it shall be remembered by, if it shall.

    Raises ValueError for strides that the kernel does not walk, for an overlapping ``out``, for arrays of several GPUs and
    for rows beyond a block's shared memory.
    """
    _run({"out": result}, {"x": x, "weight": weight}, eps, norm, None, call)
    return result


def add_rms_norm(
    x: Any, residual: Any, weight: Any, eps: float, recipe: Recipe, normalised: Any, new_residual: Any,
    call: _repeat.Call | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """Residual sum and norm of checked arrays in one launch; see ``cufuse.add_rms_norm`` and ``rms_norm`` above."""
    outs = {"out[0]": normalised, "out[1]": new_residual}
    _run(outs, {"x": x, "residual": residual, "weight": weight}, eps, recipe.norm, recipe.residual_sum, call)
    return normalised, new_residual


class Plan:
    """All of a call that its shapes, strides, alignment and recipe decide.

    programmatic : the launch may begin before the kernel in front of it has ended, and waits for it before it reads anything (but
        into the L2 cache).
    next_begins_early : the kernel behind this one need not wait for that either: it may begin as soon as all blocks have. Where
        the threads of all blocks do not fit onto the multiprocessors at once, it waits nevertheless: it was no quicker without.
    """

    __slots__ = ("_numbers", "_residual", "norm", "overlap", "prepared")

    def __init__(
        self,
        outs: dict[str, Any],
        inputs: dict[str, Any],
        alignment: int,
        eps: float,
        norm: Norm,
        residual_sum: str | None,
        device: int,
        programmatic: bool = False,
        next_begins_early: bool = False,
    ) -> None:
        _layout.require_unit_stride(**outs, **inputs)
        self.norm = norm  # kept, so that its identity stays its own in the key
        x = inputs["x"]
        walked = {"x": x, "residual": inputs.get("residual"), **outs}
        rows = _layout.walk(x.shape[:-1], walked if residual_sum is not None else walked | {"out[1]": None})
        if rows.rows > _MOST_ROWS:
            raise ValueError(f"x has shape {x.shape}: {rows.rows} rows, and a launch takes {_MOST_ROWS}; normalise it in parts")
        columns = x.shape[-1]
        arrays = [*outs.values(), *inputs.values()]
        chunk = _layout.vector_size(
            [alignment] * len(arrays),
            [array.itemsize for array in arrays],
            (columns, *rows.inner_strides, *rows.outer_strides),
        )
        wide = {name: array.itemsize == 4 for name, array in inputs.items()}
        types = Types(wide["x"], wide.get("residual", False), wide["weight"], arrays[0].itemsize == 4)
        chosen = configuration(norm, rows.rows, columns, chunk, types, residual_sum, launch.multiprocessors(device))
        _require_shared_memory(chosen.kernel, columns, device)
        self.prepared = launch.prepare(chosen.kernel, device, chosen.blocks, programmatic=programmatic)
        resident = launch.multiprocessors(device) * (_THREADS // chosen.kernel.threads)
        self._numbers = _NUMBERS.pack(
            rows.rows, rows.inner, *rows.inner_strides, *rows.outer_strides, chosen.mean_operand, np.float32(eps),
            next_begins_early and resident >= chosen.blocks, resident if programmatic else 0,
        )  # fmt: skip
        self._residual = residual_sum is not None
        self.overlap = _layout.Overlap(outs, inputs)

    def arguments(self, pointers: Sequence[int]) -> bytes:
        """Packed, with the addresses of outs and inputs in their order."""
        if self._residual:
            y, total, x, residual, weight = pointers
            return _POINTERS.pack(x, residual, weight, y, total) + self._numbers
        y, x, weight = pointers
        return _POINTERS.pack(x, 0, weight, y, 0) + self._numbers


_plans: dict[Any, Plan] = {}


def _run(
    outs: dict[str, Any], inputs: dict[str, Any], eps: float, norm: Norm, residual_sum: str | None, call: _repeat.Call | None
) -> None:
    arrays = [*outs.values(), *inputs.values()]
    memory = [array.data for array in arrays]
    device = memory[0].device_id
    if any([one.device_id != device for one in memory]):  # noqa: C419 (a list is quicker than a generator)
        launch.device_of(**inputs, **outs)
    pointers = [one.ptr for one in memory]
    alignment = 0
    for pointer in pointers:
        alignment |= pointer
    alignment &= 15
    strides = tuple([(array.strides, array.itemsize) for array in arrays])
    # identities, for hashing a dataclass of eight fields takes longer than the launch
    key = (inputs["x"].shape, strides, alignment, id(norm), residual_sum, eps, device)
    with launch.on_device(device):
        plan = _plans.get(key)
        if plan is None:
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
            # the kernel waits before it reads anything but into the L2 cache
            overlaps = launch.capability(device) >= 90
            plan = _plans[key] = Plan(outs, inputs, alignment, eps, norm, residual_sum, device, programmatic=overlaps)
        plan.overlap.check(pointers)
        arguments = plan.arguments(pointers)
        plan.prepared(arguments)
        if call is not None:
            _repeat.remember(call, [(plan.prepared, arguments)])


def _require_shared_memory(kernel: Kernel, columns: int, device: int) -> None:
    limit = compiler.shared_memory_limit(launch.capability(device))
    if kernel.dynamic_smem > limit:
        raise ValueError(
            f"x has {columns} columns, whose rows take {kernel.dynamic_smem} bytes of a block's shared memory, and device "
            f"{device} has {limit}: NumPy arrays run the emulation for any length"
        )


def _kernels() -> tuple[Kernel, ...]:
    """A choice for compile tests and tables: every named recipe's norm, Qwen3's rows, few and many, heads, residual sums."""
    found: dict[str, Kernel] = {}

    def add(recipe: Recipe, rows: int, columns: int, residual: bool = False) -> None:
        wide = recipe.residual_sum == "float32"
        types = Types(wide, wide and residual, False, not recipe.norm.round_weighted)
        chosen = configuration(recipe.norm, rows, columns, math.gcd(8, columns), types, recipe.residual_sum if residual else None)
        found.setdefault(chosen.kernel.name, chosen.kernel)

    for recipe in RECIPES.values():
        add(recipe, 64, 4096)
    for recipe in (RECIPES[name] for name in ("torch", "vllm-0.19", "flashinfer", "llama.cpp")):
        add(recipe, 64, 4096, residual=True)
    for rows, columns in ((1, 4096), (2048, 4096), (512, 128), (64, 1001)):
        add(RECIPES["torch"], rows, columns)
    return tuple(found.values())


KERNELS: Final = _kernels()
