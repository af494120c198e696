"""What the orders of summation are made of: threads that add squares in a chain, and trees over threads.

A padding zero stands for "this thread has no element here": all terms are squares, so every accumulator is +0 or
positive (or NaN), and ``v + 0`` and ``fma(0, 0, v)`` are ``v`` bit for bit.
"""

from typing import NamedTuple

import numpy as np

from cufuse.emulation.floats import Float32Array, fma32


class Terms(NamedTuple):
    """The terms of a sum of squares: the squares themselves, or the values where square and addition are one FMA."""

    values: Float32Array
    fused: bool

    def arranged(self, *shape: int) -> "Terms":
        """[rows, columns] -> [rows, *shape], the columns in order and zeros behind them (a view where they fit)."""
        values = self.values
        rows, columns = values.shape
        total = int(np.prod(shape))
        if total != columns:
            padded = np.zeros((rows, total), np.float32)
            padded[:, :columns] = values
            values = padded
        return Terms(values.reshape(rows, *shape), self.fused)

    def columns(self, start: int, stop: int) -> "Terms":
        """Columns start to stop of every row."""
        return Terms(self.values[:, start:stop], self.fused)

    def rows(self, chosen: slice) -> "Terms":
        """The chosen rows."""
        return Terms(self.values[chosen], self.fused)

    def add_to(self, accumulators: Float32Array, *index: slice | int) -> None:
        """Add the terms at ``index`` to the accumulators, in place: one float32 rounding each."""
        part = self.values[(slice(None), *index)]
        if self.fused:
            accumulators[...] = fma32(part, part, accumulators)
        else:
            accumulators += part


def terms(x: Float32Array, contract: bool) -> Terms:
    """The terms of x's sum of squares. Where all squares are exact, contraction to FMA cannot be seen and is dropped.

    A square is exact when the value has at most 12 significant bits (every bfloat16 has 8) and it does not underflow.
    """
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        squares = x * x
    if not contract:
        return Terms(squares, False)
    underflow = (squares < np.finfo(np.float32).tiny) & (x != 0)
    exact = not (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFF)).any() and not underflow.any()
    return Terms(squares, False) if exact else Terms(x, True)


def chain(squares: Terms, threads: int, vector: int) -> Float32Array:
    """[rows, columns] -> [rows, threads]: thread t adds the vectors t, t + threads, ... into one accumulator, the
    elements of a vector in order."""
    rows, columns = squares.values.shape
    steps = -(-columns // (threads * vector))
    arranged = squares.arranged(steps, threads, vector)
    accumulators = np.zeros((rows, threads), np.float32)
    for step in range(steps):
        for element in range(vector):
            arranged.add_to(accumulators, step, slice(None), element)
    return accumulators


def halve(values: Float32Array, down_to: int = 1) -> Float32Array:
    """Tree over the last axis (a power of two): element i += element i + n/2, then n/4, ..., down to so many.

    This is what thread 0 holds after shuffles, down or xor, by n/2, n/4, ..., 1, and after halving in shared memory.
    """
    while values.shape[-1] > down_to:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values


def pair_up(values: Float32Array) -> Float32Array:
    """Tree over the last axis (a power of two): element i += element i + 1, then 2, 4, ...: shuffles down by that."""
    while values.shape[-1] > 1:
        values = values[..., ::2] + values[..., 1::2]
    return values


def in_order(values: Float32Array) -> Float32Array:
    """The last axis added first to last."""
    total = values[..., 0].copy()
    for i in range(1, values.shape[-1]):
        total += values[..., i]
    return total


def by_warps(values: Float32Array) -> Float32Array:
    """[..., threads] -> [..., warps, 32], idle threads holding zero."""
    threads = values.shape[-1]
    warps = -(-threads // 32)
    if threads != warps * 32:
        padded = np.zeros((*values.shape[:-1], warps * 32), np.float32)
        padded[..., :threads] = values
        values = padded
    return values.reshape(*values.shape[:-1], warps, 32)


def to_width(values: Float32Array, width: int) -> Float32Array:
    """The last axis extended to ``width`` with zeros."""
    padded = np.zeros((*values.shape[:-1], width), np.float32)
    padded[..., : values.shape[-1]] = values
    return padded
