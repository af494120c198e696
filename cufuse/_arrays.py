"""Which library an operation's arrays belong to, and where its output goes.

The array decides the back end: NumPy arrays run the emulation, CuPy arrays the kernels. Nothing is copied across.
"""

import sys
from typing import Any

import numpy as np

_OVERLAP_WORK: Any = 10**6  # NumPy's type hints know 0 and -1 alone


def backend(optional: dict[str, Any], /, **required: Any) -> str:
    """"numpy" or "cupy" for the named arrays, of which the optional ones may be None; TypeError where they mix or are something
    else."""
    given = {name: array for name, array in optional.items() if array is not None}
    types = {type(array) for array in (*required.values(), *given.values())}
    if len(types) == 1:  # the usual case, without a look at each
        only, cupy = types.pop(), sys.modules.get("cupy")
        if only is np.ndarray:
            return "numpy"
        if cupy is not None and only is cupy.ndarray:
            return "cupy"
    kinds = {name: _kind(name, array) for name, array in (required | given).items()}
    found = set(kinds.values())
    if len(found) == 1:
        return found.pop()
    listed = ", ".join(f"{name} is a {kind} array" for name, kind in kinds.items())
    raise TypeError(f"arrays of two libraries: {listed}; bring all to one with cupy.asarray or cupy.asnumpy")


def loaded_kernels(module: str, arrays: tuple[Any, ...]) -> Any:
    """The package's module of that name, which launches kernels, if it has been imported and all arrays are CuPy's; None otherwise.

    For calls whose like was checked before: nothing but types is looked at, and None among the arrays is not CuPy's.
    """
    # not from sys.modules, where a module already stands while another thread still imports it
    found, cupy = vars(sys.modules["cufuse"]).get(module), sys.modules.get("cupy")
    if found is None or cupy is None:
        return None
    kind = cupy.ndarray
    for array in arrays:
        if type(array) is not kind:
            return None
    return found


def repeated(operation: str, arrays: tuple[Any, ...], recipe: Any, *options: Any) -> tuple[Any, bool]:
    """What a call shall be remembered by (None: not at all), and whether one like it was and has been made again.

    arrays : results, then inputs; recipe, options : as the caller gave them.
    """
    repeat = loaded_kernels("_repeat", arrays)
    if repeat is None:
        return None, False
    call = repeat.described(operation, arrays, recipe, *options)
    return call, repeat.again(call)


def _kind(name: str, array: Any) -> str:
    if isinstance(array, (np.ndarray, np.generic)):
        return "numpy"
    # CuPy is looked up, not imported: whoever holds a CuPy array has imported it
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, cupy.ndarray):
        return "cupy"
    raise TypeError(
        f"{name} is a {type(array).__module__}.{type(array).__qualname__}; needed is a NumPy or CuPy array: "
        "numpy.asarray converts lists, cupy.from_dlpack takes PyTorch and JAX arrays without a copy"
    )


def output(out: Any, shape: tuple[int, ...], dtype: Any, kind: str, like: Any, name: str = "out") -> Any:
    """``out`` after a check of its shape and dtype, or a new array of the back end ``kind`` beside ``like``."""
    if out is None:
        if kind == "numpy":
            return np.empty(shape, dtype)
        import cupy

        with like.device:
            return cupy.empty(shape, dtype)
    if out.dtype != dtype:
        raise TypeError(f"{name} has dtype {out.dtype}; needed is {np.dtype(dtype)}")
    if out.shape != shape:
        raise ValueError(f"{name} has shape {out.shape}; needed is {shape}")
    if kind == "numpy" and not out.flags.writeable:
        raise ValueError(f"{name} is read-only; give a writeable array")
    return out


def refuse_overlap(*outs: Any, **inputs: Any) -> None:
    """ValueError where an output (NumPy array, or None) shares memory with an input or with another output: what an element
    shows would depend on the order in which elements are written."""
    for index, out in enumerate(outs):
        name = "out" if len(outs) == 1 else f"out[{index}]"
        others = inputs | {f"out[{other}]": outs[other] for other in range(index)}
        for other_name, other in others.items():
            # with work allowed it compares elements, not bounds, and says yes where strides are too intricate to tell
            if out is not None and other is not None and np.may_share_memory(out, other, max_work=_OVERLAP_WORK):
                raise ValueError(f"{name} overlaps {other_name} in memory; give an array of its own")


def require_shape(name: str, array: Any, shape: tuple[int | None, ...], meaning: str) -> None:
    """ValueError unless the array has this shape (None: any length)."""
    if array.ndim != len(shape) or any(w is not None and w != g for w, g in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if w is None else str(w) for w in shape)
        raise ValueError(f"{name} has shape {array.shape}; needed is ({wanted}{',' if len(shape) == 1 else ''}): {meaning}")


def outputs(out: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    """``out`` of an operation with several results: a tuple with one array (or None) for each of them."""
    if out is None:
        return (None,) * len(names)
    if not isinstance(out, (tuple, list)) or len(out) != len(names):
        raise TypeError(f"out is a {type(out).__name__}; needed is a tuple of {len(names)} arrays: {', '.join(names)}")
    return tuple(out)
