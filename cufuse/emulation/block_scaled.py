"""A product with weights that are integers times a scale for each group of k, on tensor cores: the integers enter exactly.

For each output (m, n), with steps of ``cufuse.emulation.tensor_core`` and groups of 16 or 32 k:

    for slice of K:                                       cut at multiples of a piece (64 or 256 k)
        acc = +0
        for group in slice:                               ascending
            c = +0
            for sixteen in group:  for part in parts:  for L of the sixteen:  c <- block(part[m], integer[n], c)
            acc = fma(scale[n, group], c, acc)            one rounding, to nearest even
            if offsets:
                s = +0;  the same with ones for the integers
                acc = fma(-offset[n, group], s, acc)
        total = acc of the first slice, then total + acc  in float32

K is padded with zero integers, scales and activations to whole pieces. A NaN is 0x7FFFFFFF. The integers have 8 bits at most and
are bfloat16 values; scales and offsets are float32. No weight is rounded: what is lost is what sums lose.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from cufuse.emulation import _tiles, tensor_core
from cufuse.emulation.floats import fma32

Float32 = NDArray[np.float32]

_COLUMNS = 1024


@dataclass(frozen=True)
class Weights:
    """``integers`` int8 [N, K]; ``scales`` float32 [N, K / group]; ``offsets`` likewise, or None; ``piece`` in k."""

    integers: NDArray[np.int8]
    scales: Float32
    offsets: Float32 | None
    group: int
    piece: int


def slice_bounds(columns: int, piece: int, k_slices: int) -> list[tuple[int, int]]:
    """First and last k of each slice: ceil(pieces / slices) pieces each, the last ones shorter or left out; K is padded."""
    pieces = -(-columns // piece)
    length = -(-pieces // k_slices) * piece
    return [(start, min(start + length, pieces * piece)) for start in range(0, pieces * piece, length)]


def matmul(
    parts: Sequence[NDArray[Any]],
    weights: Weights,
    *,
    core: str,
    k_slices: int,
    progress: Callable[[float], object] | None = None,
) -> Float32:
    """Activations, bfloat16 parts [M, K] each, times weights [N, K]^T: float32 [M, N]; arguments already checked.

    ``progress`` is called from the calling thread with the fraction done.
    """
    rows, columns = parts[0].shape[0], weights.integers.shape[0]
    threads = os.cpu_count() or 1
    width = min(_COLUMNS, max(128, -(-columns // threads)))
    jobs = [
        (slice(row, row + _tiles.ROWS), slice(column, column + width))
        for row in range(0, rows, _tiles.ROWS)
        for column in range(0, columns, width)
    ]
    out = np.empty((rows, columns), np.float32)

    def run(job: tuple[slice, slice]) -> None:
        with np.errstate(all="ignore"):
            out[job] = _tile([part[job[0]] for part in parts], weights, job[1], tensor_core.TENSOR_CORES[core], k_slices)

    with ThreadPoolExecutor(min(threads, len(jobs))) as pool:
        for done, _ in enumerate(pool.map(run, jobs), 1):
            if progress is not None:
                progress(done / len(jobs))
    return _tiles.with_tensor_core_nan(out)


class _Steps:
    """The tensor core's steps for one tile, with its buffers."""

    def __init__(self, core: tensor_core.TensorCore, rows: int, columns: int, parts: int) -> None:
        self.core = core
        self.step = tensor_core._engine(None)(core.terms, core.fraction_bits, columns)
        self.left = [_tiles.Operand("bfloat16", (_tiles.DEPTH, rows)) for _ in range(parts)]
        self.right = _tiles.Operand("bfloat16", (_tiles.DEPTH, columns))
        self.ones = _tiles.Operand("bfloat16", (_tiles.GROUP, columns))
        self.ones.load_rows(np.ones((columns, _tiles.GROUP), ml_dtypes.bfloat16))
        self.shape = (rows, columns)

    def group(self, start: int, length: int, ones: bool) -> Float32:
        """c of the k from ``start`` on in the buffers, ``length`` of them."""
        c = np.zeros(self.shape, np.float32)
        for sixteen in range(start, start + length, _tiles.GROUP):
            for left in self.left:
                for k in range(0, _tiles.GROUP, self.core.terms):
                    self._add(left, slice(sixteen + k, sixteen + k + self.core.terms), k, ones, c)
        return c

    def _add(self, left: _tiles.Operand, depth: slice, k: int, ones: bool, c: Float32) -> None:
        right = self.ones if ones else self.right
        other = slice(k, k + self.core.terms) if ones else depth
        operands = left.values[depth], left.exponents[depth], right.values[other], right.exponents[other]
        missed = self.step(*operands, c)
        if missed is not None:
            m, n = np.nonzero(missed)
            gathered = operands[0][:, m], operands[1][:, m], operands[2][:, n], operands[3][:, n], c[m, n]
            c[m, n] = _tiles.general_step(*gathered, self.core.fraction_bits, self.core.floor)


def _tile(parts: list[NDArray[Any]], weights: Weights, at: slice, core: tensor_core.TensorCore, k_slices: int) -> Float32:
    integers, scales = weights.integers[at], weights.scales[at]
    offsets = None if weights.offsets is None else weights.offsets[at]
    steps = _Steps(core, len(parts[0]), len(integers), len(parts))
    total: Float32 | None = None
    for first, last in slice_bounds(integers.shape[1], weights.piece, k_slices):
        acc = np.zeros(steps.shape, np.float32)
        for start in range(first, last, _tiles.DEPTH):
            depth = min(_tiles.DEPTH, last - start)
            chunk = slice(start, start + depth)
            steps.right.load_rows(_padded(integers[:, chunk].astype(ml_dtypes.bfloat16), depth))
            for operand, part in zip(steps.left, parts, strict=True):
                operand.load_rows(_padded(part[:, chunk], depth))
            for k in range(0, depth, weights.group):
                group = (start + k) // weights.group
                acc = fma32(_column(scales, group), steps.group(k, weights.group, False), acc)
                if offsets is not None:
                    acc = fma32(-_column(offsets, group), steps.group(k, weights.group, True), acc)
        total = acc if total is None else np.add(total, acc)
    assert total is not None
    return total


def _padded(rows: NDArray[Any], columns: int) -> NDArray[Any]:
    if rows.shape[1] == columns:
        return rows
    padded = np.zeros((len(rows), columns), rows.dtype)
    padded[:, : rows.shape[1]] = rows
    return padded


def _column(scales: Float32, group: int) -> Float32:
    """The scales of a group for all columns of the output; zeros past the last group."""
    return scales[None, :, group] if group < scales.shape[1] else np.zeros((1, len(scales)), np.float32)
