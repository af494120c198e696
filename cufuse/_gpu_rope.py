"""``rope`` on CuPy arrays: kernels/rope.cu, q and k in one launch, read and written where they lie."""

import struct
from typing import Any, Final

from cufuse import _layout, launch
from cufuse.compiler import Kernel
from cufuse.named_recipes import RECIPES
from cufuse.recipe import Recipe, Rope

_POINTERS: Final = struct.Struct("6P")
_NUMBERS: Final = struct.Struct("4i18q")
_MOST_THREADS: Final = 512
_FEW_TOKENS_THREADS: Final = 128
_MOST_BLOCKS: Final = 2**31 - 1
_MOST_PLANS: Final = 4096
_NAMES: Final = ("out[0]", "out[1]", "q", "k", "cos", "sin")


def rope(
    q: Any, k: Any, cos: Any, sin: Any, rope: Rope, out_q: Any, out_k: Any, checked: Recipe | None = None
) -> tuple[Any, Any]:
    """Rotate checked arrays q and k [..., H, D] into out_q and out_k; see ``cufuse.rope``.

    Any strides of heads, and of tokens on two levels (batch and position of a transposed array, say); unit stride along D.
    checked : the recipe under which the caller has checked the arrays, if ``repeat`` shall take further calls like this one.
    Raises ValueError for other strides, for an overlapping ``out`` and for arrays of several GPUs.
    """
    arrays = (out_q, out_k, q, k, cos, sin)
    if out_q.size == 0 and out_k.size == 0:
        return out_q, out_k
    key, pointers, devices = _described(arrays, rope if checked is None else id(checked))
    if len(set(devices)) > 1:
        launch.device_of(**dict(zip(_NAMES, arrays, strict=True)))
    with launch.on_device(devices[0]):
        plan = _plans.get(key)
        if plan is None:
            if len(_plans) >= _MOST_PLANS:
                _plans.clear()
            plan = _plans[key] = _Plan(arrays, key[2], rope, devices[0], checked)
        plan.run(pointers)
    return out_q, out_k


def repeat(arrays: tuple[Any, ...], recipe: Recipe) -> bool:
    """Launch a call whose like in shapes, strides, dtypes and alignment ``rope`` was given checked; False where there was none.

    arrays : CuPy's: out_q, out_k, q, k, cos, sin. Overlaps, which addresses decide, are looked for in every call.
    """
    key, pointers, devices = _described(arrays, id(recipe))
    plan = _plans.get(key)
    if plan is None:
        return False
    with launch.on_device(devices[0]):
        plan.run(pointers)
    return True


def _described(arrays: tuple[Any, ...], numerics: Rope | int) -> tuple[tuple[Any, ...], list[int], tuple[int, ...]]:
    """The key of a call's plan, and the arrays' addresses and devices."""
    memory = [array.data for array in arrays]
    pointers = [one.ptr for one in memory]
    devices = tuple([one.device_id for one in memory])
    alignment = 0
    for pointer in pointers:
        alignment |= pointer
    layouts = tuple([(array.shape, array.strides, array.dtype) for array in arrays])
    return (numerics, devices, alignment & 15, layouts), pointers, devices


class _Plan:
    """All of a call that its shapes, strides, alignment and recipe decide."""

    __slots__ = ("_checked", "_numbers", "_overlap", "_prepared")

    def __init__(self, arrays: tuple[Any, ...], alignment: int, rope: Rope, device: int, checked: Recipe | None) -> None:
        self._checked = checked  # kept, so that its identity stays its own in the key
        named = dict(zip(_NAMES, arrays, strict=True))
        _layout.require_unit_stride(**named)
        out_q, out_k, q, k, cos, sin = arrays
        walked = {"q": q, "k": k, "out[0]": out_q, "out[1]": out_k, "cos": cos, "sin": sin}
        tokens = _layout.walk(q.shape[:-2], walked)
        heads = [_layout.element_stride(name, walked[name], -2) for name in ("q", "k", "out[0]", "out[1]")]
        half = q.shape[-1] // 2
        lengths = (half, *heads, *tokens.inner_strides, *tokens.outer_strides)
        chunk = _layout.vector_size([alignment] * len(arrays), [array.itemsize for array in arrays], lengths)
        units = (q.shape[-2] + k.shape[-2]) * (half // chunk)
        few = tokens.rows < 4 * launch.multiprocessors(device)
        parts = -(-units // (_FEW_TOKENS_THREADS if few else _MOST_THREADS))
        if tokens.rows * parts > _MOST_BLOCKS:
            raise ValueError(f"q has shape {q.shape}: {tokens.rows} tokens are too many for one launch; rotate it in parts")
        kernel = _kernel(rope, q.shape[-1], chunk, tuple(array.itemsize == 4 for array in (q, k, cos, sin, out_q)))
        threads = -(-units // parts // 32) * 32
        self._prepared = launch.prepare(kernel, device, tokens.rows * parts, threads=threads)
        self._numbers = _NUMBERS.pack(
            q.shape[-2], k.shape[-2], tokens.inner, parts, *heads, 0, 0, *tokens.inner_strides, *tokens.outer_strides
        )
        self._overlap = _layout.Overlap({name: named[name] for name in _NAMES[:2]}, {name: named[name] for name in _NAMES[2:]})

    def run(self, pointers: list[int]) -> None:
        """Launch on the current stream, with these addresses."""
        self._overlap.check(pointers)
        out_q, out_k, q, k, cos, sin = pointers
        self._prepared(_POINTERS.pack(q, k, cos, sin, out_q, out_k) + self._numbers)


_plans: dict[Any, _Plan] = {}


def _kernel(rope: Rope, dimensions: int, chunk: int, float32: tuple[bool, ...]) -> Kernel:
    """float32: whether q, k, cos, sin and the outputs are that (bfloat16 otherwise)."""
    round_tables = rope.tables == "bfloat16" and (float32[2] or float32[3])
    defines = {"DIMENSIONS": dimensions, "CHUNK": chunk}
    defines |= {f"{name}_FLOAT32": int(one) for name, one in zip(("Q", "K", "COS", "SIN", "OUT"), float32, strict=True)}
    defines |= {"ROUND_TABLES": int(round_tables), "ROUND_PRODUCTS": int(rope.round_products), "CONTRACT": int(rope.contract)}
    q, k, cos, sin, out = ("float32" if one else "bfloat16" for one in float32)
    rounded = ", ".join(name.lower().replace("_", " ") for name, value in defines.items() if value and name[:3] in ("ROU", "CON"))
    name = f"rope D {dimensions}, q {q}, k {k}, cos {cos}, sin {sin} -> {out}, {rounded or 'plain'}, by {chunk}"
    return Kernel(name, "rope.cu", "rope", tuple(defines.items()), _MOST_THREADS)


def _kernels() -> tuple[Kernel, ...]:
    """A choice for compile tests and tables: every named recipe's rotation of heads of 128."""
    found: dict[str, Kernel] = {}
    for recipe in RECIPES.values():
        wide, tables = not recipe.head_norm.round_weighted, recipe.rope.tables == "float32"
        kernel = _kernel(recipe.rope, 128, 8, (wide, wide, tables, tables, not recipe.rope.round_sum))
        found.setdefault(kernel.name, kernel)
    return tuple(found.values())


KERNELS: Final = _kernels()
