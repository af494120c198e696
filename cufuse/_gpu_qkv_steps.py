"""``rms_norm_qkv`` on CuPy arrays, one operation after the other: for what the chain's kernels cannot do.

Every step writes its result where the next one reads it: parts of a packed projection are normalised and rotated in place in
the buffer, and the last step of q and k writes to the outputs. Only a packed v is copied to its output.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from cufuse import _driver, _gpu_cast, _gpu_gemm, _gpu_norm, _gpu_rope, launch
from cufuse.bf16 import bfloat16
from cufuse.compiler import Kernel
from cufuse.qkv import Heads
from cufuse.recipe import Norm, Recipe, Rope

KERNELS: Final[tuple[Kernel, ...]] = ()
"""None of its own."""

_ALIGNMENT: Final = 512

Allocate = Callable[[tuple[int, ...], Any], Any]


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

    No synchronisation. Intermediates come from CuPy's memory pool; in a stream capture from buffers that stay, because the
    graph keeps their addresses.
    """
    given = {name: array for name, array in inputs.items() if array is not None}
    outs = {f"out[{index}]": array for index, array in enumerate(results)}
    device = launch.device_of(**given, **outs)
    with launch.on_device(device):
        allocate = _allocator(device)
        normalised = _normalise(inputs, eps, recipe, results, allocate)
        steps = _steps(inputs, recipe)
        found = _project(normalised, weights, shape, recipe, k_slices, results, steps, allocate)
        for index, weight in enumerate((inputs["q_norm_weight"], inputs["k_norm_weight"])):
            if steps.norm is not None:
                last = steps.rope is None
                target = results[index] if last else allocate(results[index].shape, _float_type(steps.norm.round_weighted))
                found[index] = _gpu_norm.rms_norm(found[index], weight, eps, steps.norm, target)
        if steps.rope is not None:
            _gpu_rope.rope(found[0], found[1], inputs["cos"], inputs["sin"], steps.rope, results[0], results[1])
            found[:2] = results[:2]
        for value, result in zip(found, results, strict=False):
            _deliver(value, result, allocate)
    return results


@dataclasses.dataclass(frozen=True)
class _Steps:
    """What follows q's and k's projection; the last of them rounds where the recipe rounds at the very end."""

    norm: Norm | None
    rope: Rope | None


def _steps(inputs: dict[str, Any], recipe: Recipe) -> _Steps:
    norm = recipe.head_norm if inputs["q_norm_weight"] is not None else None
    rope = recipe.rope if inputs["cos"] is not None else None
    if recipe.round_output and rope is not None:
        rope = dataclasses.replace(rope, round_sum=True)
    elif recipe.round_output and norm is not None:
        norm = dataclasses.replace(norm, round_weighted=True)
    return _Steps(norm, rope)


def _normalise(inputs: dict[str, Any], eps: float, recipe: Recipe, results: tuple[Any, ...], allocate: Allocate) -> Any:
    x, residual, weight = inputs["x"], inputs["residual"], inputs["norm_weight"]
    normalised = allocate(x.shape, _float_type(recipe.norm.round_weighted))
    if residual is None:
        return _gpu_norm.rms_norm(x, weight, eps, recipe.norm, normalised)
    return _gpu_norm.add_rms_norm(x, residual, weight, eps, recipe, normalised, results[3])[0]


def _project(
    normalised: Any,
    weights: tuple[Any, ...],
    shape: Heads,
    recipe: Recipe,
    k_slices: int | None,
    results: tuple[Any, ...],
    steps: _Steps,
    allocate: Allocate,
) -> list[Any]:
    """q, k and v [..., H, D]: views of one buffer where the weight is packed; outputs themselves where nothing follows."""
    *leading, columns = normalised.shape
    flat = normalised.reshape(-1, columns)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads)
    ends = steps.norm is None and steps.rope is None
    if len(weights) == 1:
        gemm = dataclasses.replace(recipe.gemm, output="bfloat16") if recipe.round_output and ends else recipe.gemm
        buffer = allocate((len(flat), weights[0].shape[0]), _float_type(gemm.output == "bfloat16"))
        _gpu_gemm.linear(flat, weights[0], gemm, k_slices, buffer)
        packed = buffer.reshape(*leading, sum(heads), shape.head_dim)
        firsts = (0, shape.heads, shape.heads + shape.kv_heads)
        return [packed[..., first : first + count, :] for first, count in zip(firsts, heads, strict=True)]
    found = []
    for name, weight, count, result in zip("qkv", weights, heads, results, strict=False):
        last = name == "v" or ends
        gemm = dataclasses.replace(recipe.gemm, output="bfloat16") if recipe.round_output and last else recipe.gemm
        direct = last and result.flags.c_contiguous
        target = result if direct else allocate(result.shape, _float_type(gemm.output == "bfloat16"))
        _gpu_gemm.linear(flat, weight, gemm, k_slices, target.reshape(len(flat), count * shape.head_dim))
        found.append(target)
    return found


def _deliver(value: Any, result: Any, allocate: Allocate) -> None:
    """Bring a value to its output, if it is not there: a copy, or the rounding at the very end."""
    if value is result:
        return
    if value.dtype != result.dtype:
        dense = allocate(value.shape, value.dtype)
        dense[...] = value
        value = result if result.flags.c_contiguous else allocate(result.shape, result.dtype)
        _gpu_cast.round_to_bf16(dense, "nearest_even", None, value)
    if value is not result:
        code = np.uint16 if result.itemsize == 2 else np.uint32
        result.view(code)[...] = value.view(code)


def _float_type(rounded: bool) -> Any:
    return np.dtype(bfloat16) if rounded else np.dtype(np.float32)


_kept: dict[tuple[int, int], list[Any]] = {}


def _allocator(device: int) -> Allocate:
    """Where intermediates come from: the pool, or in a capture memory that is never given back."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    if not stream.is_capturing():
        return cupy.empty  # type: ignore[no-any-return]
    held = _kept.setdefault((device, stream.ptr), [])
    used = 0

    def allocate(shape: tuple[int, ...], dtype: Any) -> Any:
        # one buffer after the other; each call of a capture begins with the first again, for its launches are in order
        nonlocal used
        size = -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT
        while used < len(held) and held[used].nbytes < size:
            used += 1
        if used == len(held):
            with _driver.relaxed_capture():
                held.append(cupy.empty(size, np.uint8))
        used += 1
        return cupy.ndarray(shape, dtype, memptr=held[used - 1].data)

    return allocate
