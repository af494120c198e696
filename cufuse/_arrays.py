"""Which library an operation's arrays belong to, and where its output goes.

The array decides the back end: NumPy arrays run the emulation, CuPy arrays the kernels. Nothing is copied across.
"""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np


def backend(**arrays: Any) -> str:
    """"numpy" or "cupy" for the named arrays (None is passed over); TypeError where they mix or are something else."""
    kinds: dict[str, str] = {}
    for name, array in arrays.items():
        if array is None:
            continue
        kinds[name] = _kind(name, array)
    found = set(kinds.values())
    if len(found) == 1:
        return found.pop()
    listed = ", ".join(f"{name} is a {kind} array" for name, kind in kinds.items())
    raise TypeError(f"arrays of two libraries: {listed}; bring all to one with cupy.asarray or cupy.asnumpy")


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


def output(out: Any, shape: tuple[int, ...], dtype: Any, kind: str, like: Any) -> Any:
    """``out`` after a check of its shape and dtype, or a new array of the back end ``kind`` beside ``like``."""
    if out is None:
        if kind == "numpy":
            return np.empty(shape, dtype)
        import cupy

        with like.device:
            return cupy.empty(shape, dtype)
    if out.dtype != dtype:
        raise TypeError(f"out has dtype {out.dtype}; needed is {np.dtype(dtype)}")
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; needed is {shape}")
    if kind == "numpy" and not out.flags.writeable:
        raise ValueError("out is read-only; give a writeable array")
    return out


@contextlib.contextmanager
def no_overlap(out: Any, **inputs: Any) -> Iterator[None]:
    """Refuse an ``out`` that shares memory with an input: which of the two an element shows would depend on the
    order in which elements are written. ValueError."""
    if out is not None:
        for name, array in inputs.items():
            if array is not None and np.may_share_memory(out, array) and np.shares_memory(out, array, max_work=10**6):
                raise ValueError(f"out overlaps {name} in memory; give an array of its own")
    yield


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
