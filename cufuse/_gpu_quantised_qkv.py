"""``rms_norm_qkv`` on CuPy arrays with quantised weights: the chain of launches with products of its own.

Weights that are "block-scaled" by the recipe and packed go through the chain (``cufuse._gpu_qkv_chain``), so that their first
pieces are on their way while the norm still runs. Everything else goes one operation after the other.
"""

from typing import Any, Final

from cufuse import _gpu_norm_quantised, _gpu_qkv_steps, _gpu_quantised, _layout, launch
from cufuse._gpu_head_parts import HeadParts
from cufuse._gpu_heads import Unsuited
from cufuse._gpu_qkv_chain import _OF_HEADS, Chain, Launches, Step, _alignment, _finished_block, _rows_of
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
    """The launches of a call; errors as of Chain."""

    __slots__ = ("_weights",)

    _Plan = _gpu_quantised.Plan

    def __init__(self, weights: dict[str, QuantisedWeight], *given: Any) -> None:
        """weights: by the names that the arrays have their bytes under; given: as Chain takes it."""
        self._weights = weights
        super().__init__(*given)

    def _products(  # type: ignore[override]
        self, arrays: dict[str, Any], weights: list[str], x: tuple[int, int, int], recipe: Recipe, k_slices: int | None,
        device: int, chained: bool,
    ) -> dict[str, Product]:  # fmt: skip
        tokens, columns, width = x
        slices = recipe.gemm.quantised_slices if k_slices is None else int(k_slices)
        products = {}
        for name in weights:
            weight = self._weights[name]
            n = weight.shape[0]
            whole = columns == tiles.padded_columns(columns, weight.format)
            products[name] = Product(
                weight.format, tokens, n, columns, slices, 1 if width == 2 else 3, columns, direct=width == 2 and whole,
                out_float32=recipe.gemm.output == "float32", pairs=n % 2 == 0, programmatic=chained,
            )  # fmt: skip
        return products

    def _norm_and_projection(  # type: ignore[override]
        self, arrays: dict[str, Any], products: dict[str, Product], normalised_at: int, raw_at: int, eps: float, recipe: Recipe,
        device: int, static: bool, ends: Any = None,
    ) -> Step | None:  # fmt: skip
        """Both in one launch, for a few rows and a packed weight, with ``ends`` the heads as well; None where that cannot be."""
        rows = _rows_of(arrays, recipe)
        if len(products) > 1 or rows is None:
            return None
        name, product = next(iter(products.items()))
        names = list(_OF_HEADS) if ends is not None else []
        try:
            heads = None
            if ends is not None:
                alignment = _alignment(arrays, names[:-1])
                heads = HeadParts(_finished_block(arrays), ends, recipe.norm, eps, alignment)
            plan = _gpu_norm_quantised.Plan(rows, product, eps, device, weights_ready=static, heads=heads)
        except Unsuited:
            return None

        def step(address: dict[str, int], workspace: int) -> Launches:
            row = [address.get(one, 0) for one in ("x", "residual", "norm_weight", "out[3]")]
            return plan.launches(*row, address[name], workspace + raw_at, *(address[one] for one in names))

        return step

    def _projection_and_heads(self, *given: Any) -> Step | None:
        return None


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
        try:
            chain = _calls[key]
        except KeyError:
            chain = _chain(arrays, weights, shape, eps, recipe, k_slices, device, static)
            if len(_calls) >= _MOST_CALLS:
                _calls.clear()
            _calls[key] = chain
        if chain is None:
            return _one_by_one(inputs, weights, shape, eps, recipe, k_slices, results)
        _layout.Overlap(outs, given).check([one.data.ptr for one in (*results, *given.values())])
        workspace = launch.workspace(device, chain.workspace_bytes)
        address = {name: 0 if array is None else array.data.ptr for name, array in arrays.items()}
        launch.one_by_one(chain.launches(address, workspace))
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
        return QuantisedChain(named, arrays, shape, eps, recipe, k_slices, device, static)
    except Unsuited:
        return None


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
