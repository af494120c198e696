"""``rms_norm_qkv`` on CuPy arrays with quantised weights: the chain of launches with products of its own.

Weights that are "block-scaled" by the recipe and packed go through the chain (``cufuse._gpu_qkv_chain``), so that their first
pieces are on their way while the norm still runs. Everything else goes one operation after the other.
"""

from typing import Any, Final

from cufuse import _gpu_qkv_steps, _gpu_quantised, _layout, launch
from cufuse._gpu_heads import Described
from cufuse._gpu_qkv_chain import Chain, Launches, Step
from cufuse._linear_quantised import Product
from cufuse.compiler import Kernel
from cufuse.qkv import Heads
from cufuse.quantised import tiles
from cufuse.quantised.weight import QuantisedWeight
from cufuse.recipe import Recipe

KERNELS: Final[tuple[Kernel, ...]] = ()
"""None of its own."""

_MOST_CALLS: Final = 1024


class QuantisedChain(Chain):
    """The launches of a call; Unsuited or another ValueError where the kernels cannot do it."""

    __slots__ = ("_weights",)

    def __init__(self, weights: dict[str, QuantisedWeight], *given: Any) -> None:
        """weights: by the names that the arrays have their bytes under; given: as Chain takes it."""
        self._weights = weights
        super().__init__(*given)

    def _products(  # type: ignore[override]
        self, arrays: dict[str, Any], weights: list[str], x: tuple[int, int, int], shape: Heads, recipe: Recipe,
        k_slices: int | None, device: int, chained: bool,
    ) -> tuple[dict[str, Product], tuple[Described, ...], tuple[int, ...]]:  # fmt: skip
        tokens, columns, width = x
        itemsize = 2 if recipe.gemm.output == "bfloat16" else 4
        slices = recipe.gemm.quantised_slices if k_slices is None else int(k_slices)
        places, products = [], {}
        for name in weights:
            weight = self._weights[name]
            n = weight.shape[0]
            places.append(self._reserve(tokens * n * itemsize))
            whole = columns == tiles.padded_columns(columns, weight.format)
            products[name] = Product(
                weight.format, tokens, n, columns, slices, 1 if width == 2 else 3, columns, direct=width == 2 and whole,
                out_float32=itemsize == 4, pairs=n % 2 == 0, programmatic=chained,
            )  # fmt: skip
        counts = (shape.heads, shape.kv_heads, shape.kv_heads)
        row = sum(shape.rows) if len(weights) == 1 else 0
        if row:
            places = [places[0] + first * itemsize for first in (0, shape.rows[0], shape.rows[0] + shape.rows[1])]
        distances = [row or count * shape.head_dim for count in counts]
        raw = tuple(
            Described((tokens, count, shape.head_dim), (distance * itemsize, shape.head_dim * itemsize, itemsize), itemsize)
            for count, distance in zip(counts, distances, strict=True)
        )
        return products, raw, tuple(places)

    def _norm_and_projection(self, *given: Any) -> Step | None:
        return None

    def _projection_and_heads(self, *given: Any) -> Step | None:
        return None

    def _projection(  # type: ignore[override]
        self, products: dict[str, Product], x_at: int, raw_at: tuple[int, ...], device: int
    ) -> Step:
        plans = [
            (name, _gpu_quantised.Plan(product, device), at)
            for (name, product), at in zip(products.items(), raw_at, strict=False)
        ]
        scratch = self._reserve(max(plan.workspace_bytes for _, plan, _ in plans))

        def step(address: dict[str, int], workspace: int) -> Launches:
            found: Launches = []
            for name, plan, at in plans:
                found += plan.launches(workspace + x_at, address[name], workspace + at, workspace + scratch)
            return found

        return step


_calls: dict[Any, QuantisedChain | None] = {}


def rms_norm_qkv(
    inputs: dict[str, Any],
    weights: tuple[Any, ...],
    shape: Heads,
    eps: float,
    recipe: Recipe,
    k_slices: int | None,
    static: bool,
    results: tuple[Any, ...],
) -> tuple[Any, ...]:
    """The block on checked arrays, into ``results``; see ``cufuse.rms_norm_qkv``. inputs: of weights their bytes."""
    outs = {f"out[{index}]": array for index, array in enumerate(results)}
    given = {name: array for name, array in inputs.items() if array is not None}
    device = launch.device_of(**given, **outs)
    arrays = inputs | outs
    described = [None if one is None else (one.shape, one.strides, one.dtype, one.data.ptr & 15) for one in arrays.values()]
    kinds = tuple((weight.format.name, weight.layout) if isinstance(weight, QuantisedWeight) else None for weight in weights)
    key = (tuple(arrays), tuple(described), kinds, shape, eps, recipe, k_slices, static, device)
    with launch.on_device(device):
        if key not in _calls:
            if len(_calls) >= _MOST_CALLS:
                _calls.clear()
            _calls[key] = _chain(arrays, weights, shape, eps, recipe, k_slices, device, static)
        chain = _calls[key]
        if chain is None:
            return _one_by_one(inputs, weights, shape, eps, recipe, k_slices, results)
        _layout.Overlap(outs, given).check([one.data.ptr for one in (*results, *given.values())])
        workspace = launch.workspace(device, chain.workspace_bytes)
        address = {name: 0 if array is None else array.data.ptr for name, array in arrays.items()}
        for prepared, arguments in chain.launches(address, workspace):
            prepared(arguments)
    return results


def _chain(
    arrays: dict[str, Any], weights: tuple[Any, ...], shape: Heads, eps: float, recipe: Recipe, k_slices: int | None, device: int,
    static: bool,
) -> QuantisedChain | None:  # fmt: skip
    """The chain, or None where the operations have to go one by one."""
    packed = all(isinstance(weight, QuantisedWeight) and weight.layout == "tiles" for weight in weights)
    if recipe.gemm.quantised != "block-scaled" or not packed:
        return None
    named = {f"qkv_weight[{index}]": weight for index, weight in enumerate(weights)}
    try:
        _layout.require_unit_stride(**{name: array for name, array in arrays.items() if array is not None})
        return QuantisedChain(named, arrays, shape, eps, recipe, k_slices, device, static)
    except ValueError:
        return None  # Unsuited, or what the operations say better one by one


def _one_by_one(
    inputs: dict[str, Any], weights: tuple[Any, ...], shape: Heads, eps: float, recipe: Recipe, k_slices: int | None,
    results: tuple[Any, ...],
) -> tuple[Any, ...]:  # fmt: skip
    remaining = dict(inputs)
    if remaining.pop("cache_slots", None) is not None:
        raise ValueError(
            "cache_slots is served for packed weights (QuantisedWeight.packed) under recipes that take them block-scaled; leave it "
            "out and copy k and v to their places"
        )
    return _gpu_qkv_steps.rms_norm_qkv(remaining, weights, shape, eps, recipe, k_slices, results)
