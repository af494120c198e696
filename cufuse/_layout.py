"""Where the rows of device arrays lie: axes joined to what a kernel walks, alignment, and memory that two arrays share.

Only shapes, strides and addresses are looked at, never elements, so all of it also runs on a machine without a GPU.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_EXACT_WORK: Any = 10**6
_REMEMBERED = 4096
_FAR: int = 1 << 44  # an address for shadows, far enough from zero for every difference


class Walk(NamedTuple):
    """Leading axes joined into ``outer`` groups of ``inner`` rows; each array's strides of the two, in elements."""

    outer: int
    inner: int
    outer_strides: tuple[int, ...]
    inner_strides: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.outer * self.inner


def require_unit_stride(**arrays: Any) -> None:
    """ValueError where an array's last axis is not contiguous; None, axes of one element and empty arrays pass."""
    for name, array in arrays.items():
        if array is not None and array.shape[-1] > 1 and array.strides[-1] != array.itemsize and array.size > 0:
            raise ValueError(
                f"{name} has a stride of {array.strides[-1]} bytes along its last axis; the kernels need {array.itemsize}: "
                f"{_remedy(name)}"
            )


def walk(shape: tuple[int, ...], arrays: dict[str, Any]) -> Walk:
    """Join the leading axes ``shape``, which the named arrays have in common, into at most two levels.

    Neighbouring axes are joined where every array's strides allow it. None stands for an array that is absent (strides 0).
    Raises ValueError, naming the first array whose strides need a third level.
    """
    strides = {
        name: tuple(element_stride(name, array, axis) for axis in range(len(shape))) for name, array in arrays.items()
    }
    levels = _joined(shape, tuple(strides.values()))
    if len(levels) > 2:
        name = max(strides, key=lambda one: len(_joined(shape, (strides[one],))))
        array = arrays[name]
        raise ValueError(
            f"{name} has shape {array.shape} and strides {array.strides} in bytes; its rows, with those of the other arrays, lie "
            f"on {len(levels)} levels of strides, and the kernels walk two: {_remedy(name)}"
        )
    nothing = (1, (0,) * len(strides))
    (outer, outer_strides), (inner, inner_strides) = [nothing] * (2 - len(levels)) + levels
    return Walk(outer, inner, outer_strides, inner_strides)


def element_stride(name: str, array: Any, axis: int) -> int:
    """An array's stride along an axis in elements; 0 where the axis has one element at most, or the array is None."""
    if array is None or array.shape[axis] <= 1:
        return 0
    if array.strides[axis] % array.itemsize:
        raise ValueError(f"{name} has strides {array.strides}, no multiples of its {array.itemsize} bytes: {_remedy(name)}")
    return int(array.strides[axis] // array.itemsize)


def _joined(shape: tuple[int, ...], strides: Sequence[tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
    """[(length, each array's stride), ...], outermost first, as few as can be."""
    levels: list[tuple[int, tuple[int, ...]]] = []
    for length, steps in zip(shape, zip(*strides, strict=True), strict=True):
        if length == 1:
            continue
        if levels and all(far == near * length for far, near in zip(levels[-1][1], steps, strict=True)):
            levels[-1] = (levels[-1][0] * length, steps)
        else:
            levels.append((length, steps))
    return levels


def _remedy(name: str) -> str:
    if name.startswith("out"):
        return "give a contiguous array, or None, and copy from it"
    return f"make it contiguous with cupy.ascontiguousarray({name})"


def vector_size(pointers: Sequence[int], itemsizes: Sequence[int], lengths: Sequence[int], largest: int = 8) -> int:
    """Elements that one access may take: the largest power of two up to ``largest`` that divides all ``lengths`` (row
    lengths and strides, in elements) and to which every pointer is aligned, as far as 16 bytes."""
    size = largest
    while size > 1 and (
        any(length % size for length in lengths)
        or any(pointer % min(16, size * itemsize) for pointer, itemsize in zip(pointers, itemsizes, strict=True))
    ):
        size //= 2
    return size


class Overlap:
    """Refuses outputs that share memory with an input or with another output, for arrays of fixed shapes and strides.

    Made once for a call's shapes; a call then compares addresses, and elements only where the bounds of two arrays
    interleave (parts of one packed buffer). What was found disjoint is remembered by the distance of the two.
    """

    def __init__(self, outs: dict[str, Any], inputs: dict[str, Any]) -> None:
        """outs, inputs: the arrays by name, in the order in which ``check`` gets their pointers (outs first)."""
        arrays = outs | inputs
        self._names = tuple(arrays)
        self._shapes = tuple((array.shape, array.strides, array.itemsize) for array in arrays.values())
        bounds = [_bounds(*shape) for shape in self._shapes]
        for out, array in outs.items():
            if _own_overlap(array):
                raise ValueError(f"{out} has strides {array.strides}, so that its elements share memory; {_remedy(out)}")
        self._pairs = [
            (out, other, bounds[other][0] - bounds[out][1], bounds[other][1] - bounds[out][0])
            for out in range(len(outs))
            for other in range(out + 1, len(arrays))
        ]
        self._disjoint: set[tuple[int, int, int]] = set()

    def check(self, pointers: Sequence[int]) -> None:
        """ValueError where an output at its address overlaps something."""
        for out, other, least, most in self._pairs:
            distance = pointers[out] - pointers[other]
            if least < distance < most and (out, other, distance) not in self._disjoint:
                if self._share_memory(out, other, distance):
                    raise ValueError(
                        f"{self._names[out]} overlaps {self._names[other]} in memory; give an array of its own"
                    )
                if len(self._disjoint) >= _REMEMBERED:
                    self._disjoint.clear()
                self._disjoint.add((out, other, distance))

    def _share_memory(self, out: int, other: int, distance: int) -> bool:
        first, second = _shadow(self._shapes[out], _FAR + distance), _shadow(self._shapes[other], _FAR)
        # with work allowed it compares elements, not bounds, and says yes where strides are too intricate to tell
        return np.may_share_memory(first, second, max_work=_EXACT_WORK)


def _bounds(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """First byte and the one behind the last, relative to the pointer (negative strides reach below it)."""
    if 0 in shape:
        return 0, 0
    reach = [(length - 1) * stride for length, stride in zip(shape, strides, strict=True)]
    return sum(min(0, one) for one in reach), sum(max(0, one) for one in reach) + itemsize


def _own_overlap(array: Any) -> bool:
    """Whether two of an array's elements share memory: sorted by stride, each axis must step over all before it."""
    if 0 in array.shape:
        return False
    extent = array.itemsize
    for stride, length in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < extent:
            return True
        extent += stride * (length - 1)
    return False


def _shadow(shape: tuple[tuple[int, ...], tuple[int, ...], int], address: int) -> Any:
    """A NumPy array with this shape, these strides and this address, whose elements are never touched."""
    lengths, strides, itemsize = shape

    class Holder:
        __array_interface__ = {  # noqa: RUF012 (read once)
            "shape": lengths,
            "strides": strides,
            "typestr": f"|V{itemsize}",
            "data": (address, False),
            "version": 3,
        }

    return np.asarray(Holder())
