"""Strides joined into levels, vector sizes and overlap, against what NumPy's own indexing says."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cufuse import _layout


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def row_addresses(array: np.ndarray) -> list[int]:
    """Where each row of an array [..., K] begins, in C order, by indexing."""
    return [address(array[index]) for index in itertools.product(*map(range, array.shape[:-1]))]


def walked(walk: _layout.Walk, which: int, array: np.ndarray) -> list[int]:
    """The same by a walk's two levels."""
    return [
        address(array) + (outer * walk.outer_strides[which] + inner * walk.inner_strides[which]) * array.itemsize
        for outer in range(walk.outer)
        for inner in range(walk.inner)
    ]


@st.composite
def views(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two views of one shape [..., K] with axes sliced, reversed and transposed; K contiguous."""
    axes = draw(st.integers(0, 4))
    shape = tuple(draw(st.integers(1, 4)) for _ in range(axes))
    found = []
    for _ in range(2):
        order = draw(st.permutations(range(axes)))
        steps = [draw(st.sampled_from((1, 1, 1, 2, -1))) for _ in range(axes)]
        extra = [draw(st.integers(0, 1)) for _ in range(axes)]
        lengths = [shape[axis] * abs(steps[axis]) + extra[axis] for axis in range(axes)]
        base = np.zeros([lengths[axis] for axis in order] + [draw(st.integers(5, 7))], np.uint16)
        view = base.transpose(*np.argsort(order), axes)[..., :5]
        cut = tuple(slice(None, None, step) for step in steps)
        view = view[cut][tuple(slice(0, length) for length in shape)]
        found.append(view)
    return found[0], found[1]


@given(views())
def test_a_walk_reaches_every_row(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, out = pair
    assert x.shape == out.shape
    try:
        walk = _layout.walk(x.shape[:-1], {"x": x, "nothing": None, "out": out})
    except ValueError:
        assert x.ndim > 3, "two leading axes are two levels"
        return
    assert walk.rows == np.prod(x.shape[:-1])
    assert walked(walk, 0, x) == row_addresses(x)
    assert walked(walk, 2, out) == row_addresses(out)
    assert walk.inner_strides[1] == walk.outer_strides[1] == 0


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_contiguous_arrays_have_one_level(a: int, b: int, c: int) -> None:
    x = np.zeros((a, b, c, 8), np.float32)
    assert _layout.walk((a, b, c), {"x": x}) == (1, a * b * c, (0,), (8 if a * b * c > 1 else 0,))


def test_refusals_name_the_array_and_the_remedy() -> None:
    x = np.zeros((4, 5, 6, 8), np.uint16)
    with pytest.raises(ValueError, match=r"residual has shape \(6, 5, 4, 8\) .* 3 levels .*cupy.ascontiguousarray\(residual\)"):
        _layout.walk((6, 5, 4), {"x": np.zeros((6, 5, 4, 8), np.uint16), "residual": x.transpose(2, 1, 0, 3)})
    with pytest.raises(ValueError, match=r"out has shape .* give a contiguous array, or None, and copy from it"):
        _layout.walk((6, 5, 4), {"x": np.zeros((6, 5, 4, 8), np.uint16), "out": x.transpose(2, 1, 0, 3)})
    with pytest.raises(ValueError, match=r"weight has a stride of 4 bytes along its last axis; the kernels need 2"):
        _layout.require_unit_stride(x=x, weight=np.zeros(16, np.uint16)[::2], none=None)
    _layout.require_unit_stride(one=np.zeros((3, 8), np.uint16)[:, ::8])
    odd = np.lib.stride_tricks.as_strided(np.zeros(64, np.uint8).view(np.uint16), (3, 4), (9, 2))
    with pytest.raises(ValueError, match=r"x has strides \(9, 2\), no multiples of its 2 bytes"):
        _layout.walk((3,), {"x": odd})
    with pytest.raises(ValueError, match=r"out has strides \(0, 2\), so that its elements share memory"):
        _layout.Overlap({"out": np.broadcast_to(np.zeros(4, np.uint16), (3, 4))}, {})


@pytest.mark.parametrize(
    ("pointers", "itemsizes", "lengths", "size"),
    [
        ([0, 512], [2, 2], (4096,), 8),
        ([0, 8], [2, 2], (4096,), 4),
        ([0, 2], [2, 2], (4096,), 1),
        ([0, 16], [2, 4], (4096,), 8),
        ([0, 8], [2, 4], (4096,), 2),
        ([0, 0], [2, 2], (4096, 4100), 4),
        ([0, 0], [2, 2], (4096, 0, -6), 2),
        ([0], [2], (7,), 1),
    ],
)
def test_vector_size(pointers: list[int], itemsizes: list[int], lengths: tuple[int, ...], size: int) -> None:
    assert _layout.vector_size(pointers, itemsizes, lengths) == size


@st.composite
def parts(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Two parts of one buffer, side by side, interleaved or overlapping."""
    base = np.zeros((6, 12), np.uint16)
    found = []
    for _ in range(2):
        rows, columns = (sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in base.shape)
        found.append(base[slice(*rows), slice(*columns)][:: draw(st.sampled_from((1, 2, -1)))])
    return found[0], found[1]


@given(parts())
def test_overlap_is_numpys(pair: tuple[np.ndarray, np.ndarray]) -> None:
    out, x = pair
    overlap = _layout.Overlap({"out": out}, {"x": x})
    for _ in range(2):  # the second time from what is remembered
        if np.shares_memory(out, x):
            with pytest.raises(ValueError, match=r"out overlaps x in memory; give an array of its own"):
                overlap.check([address(out), address(x)])
        else:
            overlap.check([address(out), address(x)])


def test_outputs_may_not_overlap_each_other() -> None:
    base: Any = np.zeros(100, np.uint16)
    overlap = _layout.Overlap({"out[0]": base[:10], "out[1]": base[:10]}, {"x": base[:10]})
    overlap.check([0, 20, 40])
    with pytest.raises(ValueError, match=r"out\[0\] overlaps out\[1\] in memory"):
        overlap.check([0, 18, 40])
    with pytest.raises(ValueError, match=r"out\[1\] overlaps x in memory"):
        overlap.check([100, 18, 0])
