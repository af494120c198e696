"""``rms_norm_qkv`` on CuPy arrays, one operation after the other: for what the chain's kernels cannot do.

Every step writes its result where the next one reads it: parts of a packed projection are normalised and rotated in place in
the buffer, and the last step of q and k writes to the outputs. Only a packed v is copied to its output.
"""

import dataclasses
import functools
from typing import Any, Final

import numpy as np

from cufuse import _gpu_cast, _gpu_gemm, _gpu_norm, _gpu_rope, launch
from cufuse.bf16 import bfloat16
from cufuse.compiler import Kernel
from cufuse.qkv import Heads
from cufuse.recipe import Gemm, Norm, Recipe, Rope

KERNELS: Final[tuple[Kernel, ...]] = ()
"""None of its own."""


def rms_norm_qkv(
    inputs: dict[str, Any],
    weights: tuple[Any, ...],
    shape: Heads,
    eps: float,
    recipe: Recipe,
    k_slices: int | None,
    results: tuple[Any, ...],
) -> tuple[Any, ...]:
    """The block on checked arrays, into ``results``; see ``cufuse.rms_norm_qkv``.

    No synchronisation. Intermediates are ``launch.temporary``.
    """
    given = {name: array for name, array in inputs.items() if array is not None}
    outs = {f"out[{index}]": array for index, array in enumerate(results)}
    device = launch.device_of(**given, **outs)
    with launch.on_device(device):
        normalised = _normalise(inputs, eps, recipe, results)
        steps = _steps(recipe, inputs["q_norm_weight"] is not None, inputs["cos"] is not None)
        found = _project(normalised, weights, shape, k_slices, results, steps)
        if steps.norm is not None:
            for index, name in enumerate("qk"):
                target = results[index]
                if steps.rope is not None:
                    target = launch.temporary(target.shape, _float_type(steps.norm.round_weighted), f"{name} normed")
                found[index] = _gpu_norm.rms_norm(found[index], inputs[f"{name}_norm_weight"], eps, steps.norm, target)
        if steps.rope is not None:
            _gpu_rope.rope(found[0], found[1], inputs["cos"], inputs["sin"], steps.rope, results[0], results[1])
            found[:2] = results[:2]
        for value, result in zip(found, results, strict=False):
            _deliver(value, result)
    return results


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The projections of q and k and of v, and what follows q's and k's; the last step of each also rounds what the recipe
    rounds at the very end."""

    projection: Gemm
    v_projection: Gemm
    norm: Norm | None
    rope: Rope | None

    @property
    def nothing_follows(self) -> bool:
        """Whether q and k leave the block as their projections make them."""
        return self.norm is None and self.rope is None


@functools.lru_cache(maxsize=256)  # so that equal calls have the identical norm, by which _gpu_norm knows its plans
def _steps(recipe: Recipe, head_norm: bool, rotation: bool) -> _Steps:
    rounded = recipe.output(head_norm=head_norm, rotation=rotation) == "bfloat16"
    last = dataclasses.replace(recipe.gemm, output=recipe.output(head_norm=False, rotation=False))
    norm, rope = recipe.head_norm, recipe.rope
    if rotation:
        rope = dataclasses.replace(rope, round_sum=rounded)
    elif head_norm:
        norm = dataclasses.replace(norm, round_weighted=rounded)
    first = recipe.gemm if head_norm or rotation else last
    return _Steps(first, last, norm if head_norm else None, rope if rotation else None)


def _normalise(inputs: dict[str, Any], eps: float, recipe: Recipe, results: tuple[Any, ...]) -> Any:
    x, residual, weight = inputs["x"], inputs["residual"], inputs["norm_weight"]
    normalised = launch.temporary(x.shape, _float_type(recipe.norm.round_weighted), "normalised")
    if residual is None:
        return _gpu_norm.rms_norm(x, weight, eps, recipe.norm, normalised)
    return _gpu_norm.add_rms_norm(x, residual, weight, eps, recipe, normalised, results[3])[0]


def _project(
    normalised: Any,
    weights: tuple[Any, ...],
    shape: Heads,
    k_slices: int | None,
    results: tuple[Any, ...],
    steps: _Steps,
) -> list[Any]:
    """q, k and v [..., H, D]: views of one buffer where the weight is packed; outputs themselves where nothing follows."""
    *leading, columns = normalised.shape
    flat = normalised.reshape(-1, columns)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    if len(weights) == 1:
        dtype = _float_type(steps.projection.output == "bfloat16")
        buffer = launch.temporary((len(flat), weights[0].shape[0]), dtype, "q, k, v")
        _gpu_gemm.linear(flat, weights[0], steps.projection, k_slices, buffer)
        packed = buffer.reshape(*leading, sum(heads), shape.head_dim)
        firsts = (0, shape.heads, shape.heads + shape.kv_heads)
        return [packed[..., first : first + count, :] for first, count in zip(firsts, heads, strict=True)]
    found = []
    for name, weight, count, result in zip("qkv", weights, heads, results, strict=False):
        gemm = steps.v_projection if name == "v" else steps.projection
        direct = (name == "v" or steps.nothing_follows) and result.flags.c_contiguous
        target = result if direct else launch.temporary(result.shape, _float_type(gemm.output == "bfloat16"), name)
        _gpu_gemm.linear(flat, weight, gemm, k_slices, target.reshape(len(flat), count * shape.head_dim))
        found.append(target)
    return found


def _deliver(value: Any, result: Any) -> None:
    """Bring a value to its output, if it is not there: a copy, or the rounding at the very end."""
    if value is result:
        return
    if value.dtype != result.dtype:
        rounded = result if result.flags.c_contiguous else launch.temporary(result.shape, result.dtype, "rounded")
        _gpu_cast.round_to_bf16(value, "nearest_even", None, rounded)
        value = rounded
    if value is not result:
        code = np.uint16 if result.itemsize == 2 else np.uint32
        result.view(code)[...] = value.view(code)


def _float_type(rounded: bool) -> Any:
    return np.dtype(bfloat16) if rounded else np.dtype(np.float32)
