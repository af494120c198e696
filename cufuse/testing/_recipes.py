"""A Hypothesis strategy for recipes: the named ones, and valid neighbours of theirs."""

import dataclasses
import functools
from typing import Any, Final, get_args, get_type_hints

from hypothesis import strategies as st

from cufuse.emulation.sums import SUM_ORDERS
from cufuse.emulation.tensor_core import TENSOR_CORES
from cufuse.named_recipes import RECIPES
from cufuse.recipe import Recipe

_OPEN: Final[dict[str, tuple[Any, ...]]] = {
    "sum_order": tuple(SUM_ORDERS),
    "sum_order_after_residual": (None, *SUM_ORDERS),
    "core": tuple(name for name, core in TENSOR_CORES.items() if "bfloat16" in core.dtypes),
    "k_slices": ("cublas", 1, 2, 3),
    "weight_offset": (0.0, 1.0),
}
_TEXTS: Final = ("name", "summary", "source")


@functools.cache
def choices() -> dict[str, tuple[Any, ...]]:
    """Every field of a recipe's numerics ("norm.rsqrt", "residual_sum") with the values to draw for it.

    Read from the types of ``cufuse.Recipe`` and its parts (those that every recipe has), so that a new field is drawn without a
    change here: bool and Literal by their types, others by what occurs in the named recipes.
    """
    parts = {name: kind for name, kind in get_type_hints(Recipe).items() if dataclasses.is_dataclass(kind)}
    found = {}
    for prefix, kind in {"": Recipe, **{f"{name}.": kind for name, kind in parts.items()}}.items():
        hints = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            hint, name = hints[field.name], prefix + field.name
            if name in parts or name in _TEXTS or (type(None) in get_args(hint) and field.name not in _OPEN):
                continue
            if field.name in _OPEN:
                found[name] = _OPEN[field.name]
            elif hint is bool:
                found[name] = (False, True)
            else:
                found[name] = get_args(hint) or tuple(sorted({value_of(recipe, name) for recipe in RECIPES.values()}))
    return found


def recipes(
    *, changes: int = 3, fields: tuple[str, ...] | None = None, kernels_only: bool = False
) -> st.SearchStrategy[Recipe]:
    """Recipes: the named ones with up to ``changes`` fields changed, and whatever else must then change with them.

    Parameters
    ----------
    changes : how many fields at most; 0 for the named recipes alone.
    fields : which may be changed, such as ("norm.rsqrt", "gemm.core"); all by default.
    kernels_only : leaves out what no kernel does (the order "llama.cpp-cpu"), for tests that run on CuPy arrays.

    All of them are valid: where a changed field contradicts another (what the norm rounds and what the projection takes), the other
    follows it, and a change that still contradicts something is left out. The name lists what is changed ("torch,
    norm.rsqrt=correct"). Shrinks to "torch". Raises ValueError for unknown fields.
    """
    known = choices()
    if kernels_only:
        known = {name: tuple(value for value in values if value != "llama.cpp-cpu") for name, values in known.items()}
    unknown = set(fields or ()) - set(known)
    if unknown:
        raise ValueError(f"fields names {sorted(unknown)}; known are {', '.join(known)}")
    pairs = [(name, value) for name in known if fields is None or name in fields for value in known[name]]
    changed = st.lists(st.sampled_from(pairs), max_size=changes, unique_by=lambda one: one[0])
    return st.builds(lambda base, drawn: changed_recipe(base, dict(drawn)), st.sampled_from(list(RECIPES.values())), changed)


def changed_recipe(base: Recipe, changed: dict[str, Any]) -> Recipe:
    """``base`` with these fields ("norm.rsqrt") set and every other field that contradicts them made to follow."""
    before = {name: value_of(base, name) for name in choices()}
    held, found = before, base
    for count, (name, value) in enumerate(changed.items(), 1):
        wanted = held | {name: value}
        _follow(wanted, set(list(changed)[:count]), base)
        differing = {one: to for one, to in wanted.items() if to != before[one]}
        listed = ", ".join(f"{one}={to}" for one, to in sorted(differing.items()))
        parts: dict[str, Any] = {}
        for one, to in differing.items():
            part, _, field = one.rpartition(".")
            if part:
                parts.setdefault(part, {})[field] = to
            else:
                parts[field] = to
        try:
            found = base.derive(f"{base.name}, {listed}", **parts) if differing else base
            held = wanted
        except ValueError:
            continue
    return found


def value_of(recipe: Recipe, name: str) -> Any:
    """The value of a field named as in ``choices``."""
    return functools.reduce(getattr, name.split("."), recipe)


def _follow(held: dict[str, Any], changed: set[str], base: Recipe) -> None:
    """The rules of ``cufuse.recipe``: what the norm leaves is what the projection takes; bfloat16 projections behind the attention
    want bfloat16; bfloat16 products want a bfloat16 sum and operands; a fused multiply-add has no product to round; a last rounding
    wants something to round."""
    if "gemm.input" in changed and "norm.round_weighted" not in changed:
        held["norm.round_weighted"] = held["gemm.input"] == "bfloat16"
    held["gemm.input"] = "bfloat16" if held["norm.round_weighted"] else "float32"
    if (held["gemm.input"] if base.dense is None else base.dense.input) == "bfloat16":
        held |= {"attention.round_output": True, "mlp.round_gated": True}
    if held["rope.round_products"]:
        if "rope.round_products" in changed:
            held |= {"rope.contract": False, "rope.round_sum": True, "head_norm.round_weighted": True}
        elif held["rope.contract"] or not held["rope.round_sum"] or not held["head_norm.round_weighted"]:
            held["rope.round_products"] = False
    nothing_wide = held["gemm.output"] == "bfloat16" and held["rope.round_sum"] and held["head_norm.round_weighted"]
    if held["round_output"] and nothing_wide:
        held["round_output"] = False
