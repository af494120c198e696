"""Slow, literal simulations of the kernels whose orders of summation cufuse emulates.

One row at a time, one thread at a time, one np.float32 scalar at a time; shared memory is a list, a shuffle reads the
list of a warp's registers. Written from the kernels' sources, without the emulation's tricks (no padding, no
reshaping). Registers that a kernel never sets hold NaN, so that a dependence on them shows.
"""

from collections.abc import Callable
from fractions import Fraction
from math import gcd

import numpy as np

F = np.float32
UNSET = F("nan")
Add = Callable[[np.float32, np.float32], np.float32]
"""(accumulator, x) -> accumulator + x * x"""


def round_to_float32(value: Fraction) -> np.float32:
    """Nearest even, by integers alone."""
    if value == 0:
        return F(0)
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    spacing = Fraction(2) ** (max(exponent, -126) - 23)
    count = round(magnitude / spacing)  # Python rounds a Fraction half to even
    rounded = count * spacing
    if rounded >= 2 ** Fraction(128):
        return F("inf") if value > 0 else F("-inf")
    return F(float(rounded)) if value > 0 else F(-float(rounded))


def add_square(s: np.float32, x: np.float32) -> np.float32:
    return s + x * x


def add_square_fused(s: np.float32, x: np.float32) -> np.float32:
    return round_to_float32(Fraction(float(x)) ** 2 + Fraction(float(s)))


def shuffle_down(registers: list, offset: int) -> list:
    n = len(registers)
    return [registers[i + offset] if i + offset < n else registers[i] for i in range(n)]


def shuffle_xor(registers: list, offset: int) -> list:
    return [registers[i ^ offset] for i in range(len(registers))]


# --- PyTorch: mean (Reduce.cuh) ---------------------------------------------------------------------------------------


def last_pow2(n: int) -> int:
    for shift in (1, 2, 4, 8, 16):
        n |= n >> shift
    return max(1, n - (n >> 1))


class AtenReduce:
    """setReduceConfig and ReduceOp::run for float32 [rows, columns], contiguous, reduced over the columns."""

    def __init__(self, rows: int, columns: int, old: bool, sms: int = 132):
        self.end, self.old = columns, old
        dim0, dim1 = columns, rows
        self.vectorize = dim0 > 128 if old else dim0 >= 128
        if self.vectorize:
            dim0 //= 4
        pow0 = last_pow2(dim0) if dim0 < 512 else 512
        pow1 = last_pow2(dim1) if dim1 < 512 else 512
        self.bw = min(pow0, 32)
        self.bh = min(pow1, 512 // self.bw)
        self.bw = min(pow0, 512 // self.bh)
        step_input, step_output = self.bw, 1
        values_per_thread = -(-columns // step_input)
        self.split = values_per_thread >= self.bh * 16 or values_per_thread >= 256
        if self.split:
            step_input *= self.bh
        else:
            step_output *= self.bh
        self.ctas = 1
        values_per_thread = -(-columns // step_input)
        grid = -(-rows // step_output)
        target = sms * (2048 // (self.bw * self.bh))
        if self.split and values_per_thread >= 256 and grid <= target:
            self.ctas = max(min(-(-target // grid), -(-values_per_thread // 16)), -(-values_per_thread // 256))
        self.step_input = step_input * self.ctas

    def row_sum(self, x: list, row: int, add: Add) -> np.float32:
        staged = []
        for cta in range(self.ctas):
            block = [[UNSET] * self.bw for _ in range(self.bh)]
            for ty in range(self.bh):
                if not self.split and ty != row % self.bh:
                    continue  # this line of threads has another row
                for tx in range(self.bw):
                    index = tx + (ty * self.bw + cta * self.bw * self.bh if self.split else 0)
                    block[ty][tx] = self.thread(x, row, index, tx, ty, cta, add)
            staged.append(self.block(block, 0 if self.split else row % self.bh))
        if self.ctas == 1:
            return staged[0]
        threads = self.bw * self.bh
        value = [F(0)] * threads
        for tid in range(threads):
            for k in range(tid, self.ctas, threads):
                value[tid] = value[tid] + staged[k]
        grid = [value[y * self.bw : (y + 1) * self.bw] for y in range(self.bh)]
        return self.x_reduce(self.y_reduce(grid))[0][0]

    def thread(self, x: list, row: int, idx: int, tx: int, ty: int, cta: int, add: Add) -> np.float32:
        if not self.vectorize:
            values = [F(0)] * 4
            step = 0
            while idx < self.end:
                values[step % 4] = add(values[step % 4], x[idx])
                idx, step = idx + self.step_input, step + 1
            return ((values[0] + values[1]) + values[2]) + values[3]
        end, data = self.end, 0  # data: offset into x
        value = F(0)
        tail_thread = (not self.split or ty == 0) and cta == 0
        shift = (row * self.end * 4 % 16) // 4
        if shift > 0:
            data -= shift
            end += shift
            if shift <= tx < 4 and tail_thread:
                value = add(value, x[data + tx])
            end -= 4
            data += 4
        values = [value, F(0), F(0), F(0)]
        while idx * 4 + 3 < end:
            for i in range(4):
                values[i] = add(values[i], x[data + idx * 4 + i])
            idx += self.step_input
        tail = end - end % 4 + tx
        if tail_thread and tail < end:
            values[0] = add(values[0], x[data + tail])
        return ((values[0] + values[1]) + values[2]) + values[3]

    def block(self, grid: list, line: int) -> np.float32:
        if not self.split:
            return self.x_reduce(grid)[line][0]
        grid = self.x_reduce(self.y_reduce(grid)) if self.old else self.y_reduce(self.x_reduce(grid))
        return grid[0][0]

    def x_reduce(self, grid: list) -> list:
        grid = [line[:] for line in grid]
        dim_x = self.bw
        if dim_x > 32:
            shared = [line[:] for line in grid]
            offset = dim_x // 2
            while offset >= 32:
                for y in range(self.bh):
                    for tx in range(offset):
                        grid[y][tx] = grid[y][tx] + shared[y][tx + offset]
                        shared[y][tx] = grid[y][tx]
                offset >>= 1
            dim_x = 32
        flat = [v for line in grid for v in line]
        offsets = [dim_x >> i for i in range(1, 6) if dim_x >> i]
        for offset in reversed(offsets) if self.old else offsets:
            other = []
            for w in range(0, len(flat), 32):
                other += shuffle_down(flat[w : w + 32], offset)
            flat = [a + b for a, b in zip(flat, other, strict=True)]
        return [flat[y * self.bw : (y + 1) * self.bw] for y in range(self.bh)]

    def y_reduce(self, grid: list) -> list:
        grid = [line[:] for line in grid]
        shared = [line[:] for line in grid]
        offset = self.bh // 2
        while offset:
            for y in range(offset):
                for tx in range(self.bw):
                    grid[y][tx] = grid[y][tx] + shared[y + offset][tx]
                    shared[y][tx] = grid[y][tx]
            offset >>= 1
        return grid


# --- PyTorch: F.rms_norm (layer_norm_kernel.cu) -----------------------------------------------------------------------


def torch_rms_norm(x: list, add: Add) -> np.float32:
    warps = []
    for ty in range(4):
        lanes = []
        for tx in range(32):
            s = F(0)
            for i in range(tx + 32 * ty, len(x) // 4, 128):
                for ii in range(4):
                    s = add(s, x[4 * i + ii])
            lanes.append(s)
        for offset in (16, 8, 4, 2, 1):
            lanes = [a + b for a, b in zip(lanes, shuffle_down(lanes, offset), strict=True)]
        warps.append(lanes[0])
    for offset in (2, 1):
        for y in range(offset):
            warps[y] = warps[y] + warps[y + offset]
    return warps[0]


def torch_rms_norm_moments(x: list) -> np.float32:
    """mean, m2 and count of WelfordOps, every FMA that nvcc forms done in exact arithmetic."""

    def fma(a, b, c):
        return round_to_float32(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)))

    def combine(a, b):
        if a[2] == 0:
            return b
        if b[2] == 0:
            return a
        delta, count = b[0] - a[0], a[2] + b[2]
        share = b[2] / count
        return fma(delta, share, a[0]), fma(delta * delta * a[2], share, a[1] + b[1]), count

    def warp(lanes):
        for offset in (16, 8, 4, 2, 1):
            lanes = [combine(a, b) for a, b in zip(lanes, shuffle_down(lanes, offset), strict=True)]
        return lanes[0]

    threads = []
    for t in range(512):
        mean, m2, n = F(0), F(0), 0
        for j in range(t, len(x), 512):
            n += 1
            delta = x[j] - mean
            mean = mean + delta / F(n)
            m2 = fma(delta, x[j] - mean, m2)
        threads.append((mean, m2, F(n)))
    shared = [warp(threads[w : w + 32]) for w in range(0, 512, 32)]
    mean, m2, count = warp(shared + [(F(0), F(0), F(0))] * 16)
    return fma(mean, mean, m2 / count)


# --- engines ----------------------------------------------------------------------------------------------------------


def strided(x: list, threads: int, vector: int, add: Add) -> list:
    registers = []
    for t in range(threads):
        s = F(0)
        for i in range(t, len(x) // vector, threads):
            for j in range(vector):
                s = add(s, x[i * vector + j])
        registers.append(s)
    return registers


def cub_block_reduce(registers: list) -> np.float32:
    valid = len(registers)
    aggregates = []
    for offset in range(0, valid, 32):
        lanes = registers[offset : offset + 32]
        last = len(lanes) - 1
        lanes = lanes + [UNSET] * (32 - len(lanes))
        for step in (1, 2, 4, 8, 16):
            below = shuffle_down(lanes, step)
            lanes = [below[i] + lanes[i] if i + step <= last else lanes[i] for i in range(32)]
        aggregates.append(lanes[0])
    total = aggregates[0]
    for addend in aggregates[1:]:
        total = total + addend
    return total


def vllm(x: list, rows: int, add: Add) -> np.float32:
    vector = gcd(8, len(x))
    return cub_block_reduce(strided(x, min(len(x) // vector, 1024 if rows < 256 else 256), vector, add))


def vllm_add(x: list, rows: int, add: Add) -> np.float32:
    threads = min(len(x), 1024 if rows < 256 else 256)
    if len(x) % 8:
        return cub_block_reduce(strided(x, threads, 1, add))
    registers = []
    for t in range(threads):
        variance = F(0)
        for i in range(t, len(x) // 8, threads):
            result = F(0)
            for j in range(8 * i, 8 * i + 8, 2):
                result = result + add(x[j + 1] * x[j + 1], x[j])
            variance = variance + result
        registers.append(variance)
    return cub_block_reduce(registers)


def two_xor_trees(registers: list) -> np.float32:
    smem = []
    for w in range(0, len(registers), 32):
        lanes = registers[w : w + 32]
        for offset in (16, 8, 4, 2, 1):
            lanes = [a + b for a, b in zip(lanes, shuffle_xor(lanes, offset), strict=True)]
        smem.append(lanes[0])
    lanes = [smem[i] if i < len(smem) else F(0) for i in range(32)]
    for offset in (16, 8, 4, 2, 1):
        lanes = [a + b for a, b in zip(lanes, shuffle_xor(lanes, offset), strict=True)]
    return lanes[0]


def flashinfer(x: list, rows: int, add: Add) -> np.float32:
    vector = gcd(8, len(x))
    warps = -(-min(1024, len(x) // vector) // 32)
    return two_xor_trees(strided(x, 32 * warps, vector, add))


def llama_cpp(x: list, rows: int, add: Add) -> np.float32:
    return two_xor_trees(strided(x, 256 if len(x) < 1024 else 1024, 1, add))


def nano_vllm(x: list, rows: int, add: Add) -> np.float32:
    width = 1
    while width < len(x) and width < 2048:
        width *= 2
    accumulators = strided(x, width, 1, add)
    threads = []
    for t in range(max(1, width // 4)):
        s = accumulators[4 * t]
        for value in accumulators[4 * t + 1 : 4 * t + 4]:
            s = s + value
        threads.append(s)
    while len(threads) > 1:  # lanes by xor in every warp, then warps by xor: lane 0's tree, level by level
        group = min(32, len(threads))
        warps = []
        for w in range(0, len(threads), group):
            lanes, offset = threads[w : w + group], group // 2
            while offset:
                lanes = [a + b for a, b in zip(lanes, shuffle_xor(lanes, offset), strict=True)]
                offset //= 2
            warps.append(lanes[0])
        threads = warps
    return threads[0]


def sequential(x: list, rows: int, add: Add) -> np.float32:
    s = F(0)
    for value in x:
        s = add(s, value)
    return s
