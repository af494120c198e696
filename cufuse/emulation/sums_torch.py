"""PyTorch's orders of summation on CUDA: ``mean`` (Reduce.cuh) and ``F.rms_norm`` (layer_norm_kernel.cu).

The functions named in ``cufuse.emulation.sums`` take a block of rows, float32 [rows, columns], ``all_rows``, the
number of rows of the whole call, and ``first_row``, the index of the block's first row in it.
"""

from typing import NamedTuple

import numpy as np

from cufuse.emulation.floats import Float32Array, fma32
from cufuse.emulation.sums_parts import Terms, chain, halve, in_order, pair_up, terms

MULTIPROCESSORS = 132
THREADS_PER_MULTIPROCESSOR = 2048
"""The H200's and H100's figures. They matter only for rows that several thread blocks share: see ``ReduceConfig``."""


class ReduceConfig(NamedTuple):
    """How ATen's reduction of [rows, columns] over the last dimension is launched (Reduce.cuh, setReduceConfig).

    ``vectorised``: elements are read as vectors of four. A thread block is ``width`` x ``height`` threads; ``split``:
    all of them share a row, otherwise each of the ``height`` lines has its own. ``blocks``: thread blocks that share
    a row. Several blocks share a row only where a thread of one block would have 256 elements or more, which is from
    130,561 columns on, and where all rows together do not fill the GPU.
    """

    vectorised: bool
    width: int
    height: int
    split: bool
    blocks: int

    @property
    def lines(self) -> int:
        """Lines of ``width`` threads that share a row."""
        return (self.height if self.split else 1) * self.blocks


def reduce_config(rows: int, columns: int, vectorised_from: int = 128) -> ReduceConfig:
    """ATen's launch for a float32 reduction over contiguous rows; torch <= 2.9 vectorises from 129 columns on."""
    most_threads = 512
    vectorised = columns >= vectorised_from
    across = min(_power_of_two_below(columns // 4 if vectorised else columns), most_threads)
    down = min(_power_of_two_below(rows), most_threads)
    height = min(down, most_threads // min(across, 32))
    width = min(across, most_threads // height)
    split = -(-columns // width) >= min(16 * height, 256)
    blocks = 1
    per_thread = -(-columns // (width * height))
    most_blocks = MULTIPROCESSORS * (THREADS_PER_MULTIPROCESSOR // (width * height))
    if split and per_thread >= 256 and rows <= most_blocks:
        blocks = max(min(-(-most_blocks // rows), -(-per_thread // 16)), -(-per_thread // 256))
    return ReduceConfig(vectorised, width, height, split, blocks)


def _power_of_two_below(n: int) -> int:
    return 1 << (n.bit_length() - 1)


def torch_mean(x: Float32Array, all_rows: int, first_row: int, contract: bool) -> Float32Array:
    """``x.pow(2).mean(-1)``'s sum, torch >= 2.10."""
    config = reduce_config(all_rows, x.shape[1])
    lines = _lines(terms(x, contract), config, first_row)
    rows = len(x)
    lines = _across(lines, ascending=False)
    if config.split:
        lines = halve(lines.reshape(rows, config.blocks, config.height))
    return _blocks(lines.reshape(rows, config.blocks), config, ascending=False)


def torch_mean_2_9(x: Float32Array, all_rows: int, first_row: int, contract: bool) -> Float32Array:
    """``x.pow(2).mean(-1)``'s sum, torch 2.0 to 2.9."""
    config = reduce_config(all_rows, x.shape[1], vectorised_from=129)
    lines = _lines(terms(x, contract), config, first_row)
    rows = len(x)
    if config.split:
        by_block = lines.reshape(rows, config.blocks, config.height, config.width)
        lines = halve(by_block.swapaxes(2, 3))[..., 0]
    lines = _across(lines.reshape(rows, config.blocks, config.width), ascending=True)
    return _blocks(lines, config, ascending=True)


def _across(values: Float32Array, ascending: bool) -> Float32Array:
    """block_x_reduce, [..., width] -> [...]: halving to 32, then shuffles down by 16 ... 1; ascending: 1 ... 16."""
    values = halve(values, 32)
    return (pair_up(values) if ascending else halve(values))[..., 0]


def _blocks(values: Float32Array, config: ReduceConfig, ascending: bool) -> Float32Array:
    """global_reduce: the last block adds the sums of all, [rows, blocks] -> [rows]; y before x in every version."""
    if config.blocks == 1:
        return values[:, 0]
    rows, blocks = values.shape
    threads = config.width * config.height
    steps = -(-blocks // threads)
    staged = np.zeros((rows, steps * threads), np.float32)
    staged[:, :blocks] = values
    held = in_order(staged.reshape(rows, steps, threads).swapaxes(1, 2))
    held = halve(held.reshape(rows, config.height, config.width).swapaxes(1, 2))[..., 0]
    return _across(held, ascending)


def _lines(squares: Terms, config: ReduceConfig, first_row: int) -> Float32Array:
    """What the threads that share a row hold before they meet: [rows, lines, width]."""
    rows, columns = squares.values.shape
    if not config.vectorised:
        return _by_step(squares, config.width).reshape(rows, 1, config.width)
    held = np.empty((rows, config.lines * config.width), np.float32)
    # a row starts on a 16-byte boundary only where its first element's index is a multiple of four
    period = 4 // np.gcd(columns, 4)
    for start in range(min(period, rows)):
        chosen = slice(start, None, period)
        misplaced = (first_row + start) * columns % 4
        held[chosen] = _by_vector(squares.rows(chosen), held.shape[1], misplaced)
    return held.reshape(rows, config.lines, config.width)


def _by_step(squares: Terms, threads: int) -> Float32Array:
    """thread_reduce_impl: thread t takes elements t, t + threads, ...; four accumulators by the number of the step."""
    rows, columns = squares.values.shape
    steps = -(-columns // threads)
    arranged = squares.arranged(steps, threads)
    accumulators = np.zeros((4, rows, threads), np.float32)
    for step in range(steps):
        arranged.add_to(accumulators[step % 4], step)
    total: Float32Array = ((accumulators[0] + accumulators[1]) + accumulators[2]) + accumulators[3]
    return total


def _by_vector(squares: Terms, threads: int, misplaced: int) -> Float32Array:
    """input_vectorized_thread_reduce_impl for rows that start ``misplaced`` elements behind a 16-byte boundary.

    The elements before the first boundary go to accumulator 0 of threads misplaced ... 3, before all else; then
    thread t takes vectors t, t + threads, ..., four accumulators by the position in the vector; the one to three
    elements that are left go to accumulator 0 of threads 0, 1, 2; the accumulators are added in order.
    """
    rows, columns = squares.values.shape
    head = (4 - misplaced) % 4
    vectors = (columns - head) // 4
    body = squares.columns(head, head + 4 * vectors)
    tail = squares.columns(head + 4 * vectors, columns)
    accumulators = np.zeros((rows, threads, 4), np.float32)
    if head:
        squares.columns(0, head).add_to(accumulators[:, misplaced:4, 0])
    steps = -(-vectors // threads)
    arranged = body.arranged(steps, threads, 4)
    for step in range(steps):
        arranged.add_to(accumulators, step)
    tail.add_to(accumulators[:, : columns - head - 4 * vectors, 0])
    return in_order(accumulators)


def torch_rms_norm(x: Float32Array, all_rows: int, first_row: int, contract: bool) -> Float32Array:
    """The sum inside ``F.rms_norm``, torch >= 2.9 (layer_norm_kernel.cu, compute_stats)."""
    rows, columns = x.shape
    if columns % 4:
        raise ValueError(
            f"x has {columns} columns; F.rms_norm adds up squares only where that is a multiple of 4, and takes the "
            "variance and the squared mean otherwise: ask mean_of_squares, which does the same"
        )
    warps = halve(chain(terms(x, contract), 128, 4).reshape(rows, 4, 32))[..., 0]
    return halve(warps)[..., 0]


class Welford(NamedTuple):
    """Running mean, sum of squared deviations and count (ATen's WelfordData)."""

    mean: Float32Array
    m2: Float32Array
    size: Float32Array


def torch_rms_norm_moments(x: Float32Array, all_rows: int, first_row: int, contract: bool) -> Float32Array:
    """The mean of squares of ``F.rms_norm`` where the columns are no multiple of 4: variance + mean**2
    (layer_norm_kernel.cu, RowwiseMomentsCUDAKernel; SharedReduceOps.h, WelfordOps; block_reduce.cuh, BlockReduce)."""
    rows, columns = x.shape
    threads = 512
    steps = -(-columns // threads)
    held = Welford(*(np.zeros((rows, threads), np.float32) for _ in range(3)))
    for step in range(steps):
        part = x[:, step * threads : (step + 1) * threads]
        _take(held, part, np.float32(step + 1), contract)
    by_warp = Welford(*(field.reshape(rows, 16, 32) for field in held))
    warps = Welford(*(field[..., 0] for field in _halve_moments(by_warp, contract)))
    total = _halve_moments(warps, contract)
    mean, m2, count = (field[:, 0] for field in total)
    variance = m2 / count
    return fma32(mean, mean, variance) if contract else variance + mean * mean


def _take(held: Welford, x: Float32Array, count: np.float32, contract: bool) -> None:
    """Each of the first threads takes one more element, in place."""
    mean, m2, counts = (field[:, : x.shape[1]] for field in held)
    delta = x - mean
    mean += delta / count
    new_delta = x - mean
    m2[...] = fma32(delta, new_delta, m2) if contract else m2 + delta * new_delta
    counts[...] = count


def _halve_moments(values: Welford, contract: bool) -> Welford:
    """The tree of ``halve`` with the combination of two sets of moments in place of the addition."""
    while values.mean.shape[-1] > 1:
        half = values.mean.shape[-1] // 2
        a = Welford(*(field[..., :half] for field in values))
        b = Welford(*(field[..., half:] for field in values))
        values = _combine(a, b, contract)
    return values


def _combine(a: Welford, b: Welford, contract: bool) -> Welford:
    count = a.size + b.size
    with np.errstate(invalid="ignore"):
        delta = b.mean - a.mean
        share = b.size / count
        weighted = delta * delta * a.size
        m2 = a.m2 + b.m2
        mean = fma32(delta, share, a.mean) if contract else a.mean + delta * share
        m2 = fma32(weighted, share, m2) if contract else m2 + weighted * share
    a_empty, b_empty = a.size == 0, b.size == 0
    return Welford(*(
        np.where(a_empty, from_b, np.where(b_empty, from_a, combined))
        for from_a, from_b, combined in zip(a, b, Welford(mean, m2, count), strict=True)
    ))
