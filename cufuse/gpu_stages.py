"""Every intermediate of ``rms_norm_qkv`` from the kernels, as NumPy arrays: what ``cufuse report --device gpu`` compares.

One kernel after the other with a copy to the host behind each, so that every rounding point can be looked at; the fast way is
``cufuse.rms_norm_qkv``.
"""

from typing import Any

import numpy as np

from cufuse import _gpu_gemm, _gpu_norm, _gpu_rope, gemm, launch
from cufuse.bf16 import bfloat16
from cufuse.qkv import STAGES, Heads
from cufuse.quantised.weight import QuantisedWeight
from cufuse.recipe import Norm, Recipe


def stages(
    inputs: dict[str, Any], weights: tuple[Any, ...], shape: Heads, eps: float, recipe: Recipe
) -> dict[str, np.ndarray]:
    """As ``cufuse.qkv.stages`` on the same NumPy arrays and with its slices of K, but computed on CuPy's current GPU.

    No residual. Raises NoGpuError without a GPU.
    """
    launch.device_count()
    import cupy

    given: dict[str, Any] = {name: None if array is None else cupy.asarray(array) for name, array in inputs.items()}
    count = len(given["x"])
    found: dict[str, Any] = {}
    found["normalised"] = _norm(given["x"], given["norm_weight"], eps, recipe.norm)
    products = []
    for weight in weights:
        dtype = bfloat16 if recipe.gemm.output == "bfloat16" else np.float32
        product = cupy.empty((count, weight.shape[0]), dtype)
        slices = gemm.slices_for(count, weight, recipe.gemm)
        on_device = weight.on_gpu() if isinstance(weight, QuantisedWeight) else cupy.asarray(weight)
        products.append(_gpu_gemm.linear(found["normalised"], on_device, recipe.gemm, slices, product))
    if len(products) == 1:
        products = cupy.split(products[0], np.cumsum(shape.rows)[:2].tolist(), axis=1)
    for name, product in zip("qkv", products, strict=True):
        found[name] = cupy.ascontiguousarray(product).reshape(count, -1, shape.head_dim)
    last = {}
    for name in "qk":
        last[name] = found[name]
        if given[f"{name}_norm_weight"] is not None:
            last[name] = _norm(found[name], given[f"{name}_norm_weight"], eps, recipe.head_norm)
            found[f"{name}_normed"] = last[name]
    if given["cos"] is not None:
        dtype = bfloat16 if recipe.rope.round_sum else np.float32
        rotated = [cupy.empty(last[name].shape, dtype) for name in "qk"]
        _gpu_rope.rope(last["q"], last["k"], given["cos"], given["sin"], recipe.rope, rotated[0], rotated[1])
        found["q_rotated"], found["k_rotated"] = rotated
    return {name: cupy.asnumpy(found[name]) for name in STAGES if name in found}


def _norm(x: Any, weight: Any, eps: float, norm: Norm) -> Any:
    import cupy

    result = cupy.empty(x.shape, bfloat16 if norm.round_weighted else np.float32)
    return _gpu_norm.rms_norm(x, weight, eps, norm, result)
