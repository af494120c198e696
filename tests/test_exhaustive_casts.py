"""float32 to bfloat16 on every input: NumPy, kernels/bf16.cuh built for the host, and the definition of each mode, pairwise.

    CUFUSE_EXHAUSTIVE=1 python -m pytest -s tests/test_exhaustive_casts.py

takes all 2**32 inputs in five modes and every pair of discarded fraction and random word; without the variable it takes
the neighbourhood of every bfloat16 and of every tie, and every 4,099th input. tests/test_gpu_casts.py compares the GPU kernel with
the definition of each mode.
"""

import concurrent.futures
import ctypes
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import pytest

import cufuse
from cufuse import bf16, compiler
from tests.totals import count
from tests.witnesses import bits

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to compile the header for the host")

EXHAUSTIVE = bool(os.environ.get("CUFUSE_EXHAUSTIVE"))
MODES = [mode for mode in bf16.ROUNDING_MODES if mode != "stochastic"]
CHUNK = 1 << 22
SOURCE = """
#include <cmath>
#include <cstring>
#include "bf16.cuh"

static double value[0x7F81];  // of a bfloat16 magnitude by its code; infinity's stands for 2^128

extern "C" void prepare() {
    for (int code = 0; code <= 0x7F80; ++code) {
        const int field = code >> 7, fraction = code & 0x7F;
        value[code] = field ? std::ldexp(128.0 + fraction, field - 134) : std::ldexp((double)fraction, -133);
    }
}

// by comparing distances in double, where the float32 and both its neighbours are exact; -1 where they are no neighbours
static int by_definition(u32 bits, int mode) {
    float x;
    std::memcpy(&x, &bits, 4);
    const int sign = (int)(bits >> 31) << 15;
    if (x != x) return 0x7FFF;
    const double magnitude = std::fabs((double)x);
    if (std::isinf(magnitude)) return sign | 0x7F80;
    const u32 below = (bits & 0x7FFFFFFFu) >> 16;
    const double low = value[below], high = value[below + 1];
    if (!(low <= magnitude && magnitude < high)) return -1;
    const double to_low = magnitude - low, to_high = high - magnitude;
    const bool even = below % 2 == 0, exact = to_low == 0;
    bool outward = false;
    if (mode == NEAREST_EVEN) outward = to_high < to_low || (to_high == to_low && !even);
    if (mode == NEAREST_AWAY) outward = to_high <= to_low;
    if (mode == UP) outward = !exact && !sign;
    if (mode == DOWN) outward = !exact && sign;
    return sign | (int)(below + outward);
}

extern "C" long differing(const u32* x, const u16* found, long count, int mode) {
    long bad = 0;
    for (long i = 0; i < count; ++i) bad += found[i] != round_float32(x[i], mode, 0) || found[i] != by_definition(x[i], mode);
    return bad;
}

// discarded fractions from first on: how many have another number of random words that round up than the fraction says
extern "C" long miscounted(u32 head, u32 first, long count) {
    long bad = 0;
    for (u32 rest = first; rest < first + count; ++rest) {
        u32 up = 0, other = 0;
        for (u32 random = 0; random < 65536; ++random) {
            const u16 code = round_float32(head << 16 | rest, STOCHASTIC, random);
            up += code == head + 1;
            other += code != head && code != head + 1;
        }
        bad += up != rest || other;
    }
    return bad;
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("exhaustive_casts")
    (folder / "casts.cpp").write_text(SOURCE)
    command = ["g++", "-std=c++17", "-O3", "-march=native", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"]
    command += ["-shared", "-fPIC", f"-I{compiler.source_folder()}", str(folder / "casts.cpp"), "-o", str(folder / "casts.so")]
    subprocess.run(command, check=True)
    found = ctypes.CDLL(str(folder / "casts.so"))
    found.prepare()
    found.differing.restype = found.miscounted.restype = ctypes.c_long
    return found


def in_parallel(what: str, tasks: Iterable[Callable[[], int]], total: int) -> int:
    """The sum of what the tasks find, on all processors, with the share done on stderr when it takes long."""
    began, shown, wrong, done = time.monotonic(), 0.0, 0, 0
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        for future in concurrent.futures.as_completed([pool.submit(task) for task in tasks]):
            wrong, done = wrong + future.result(), done + 1
            seconds = time.monotonic() - began
            if EXHAUSTIVE and (seconds - shown > 5 or done == total):
                shown = seconds
                print(f"{what}: {100 * done / total:5.1f} % after {seconds:.0f} s, {wrong} differ", file=sys.stderr, flush=True)
    return wrong


def numpy_against_both(library: ctypes.CDLL, x: np.ndarray, mode: str) -> int:
    found = bits(cufuse.round_to_bf16(x.view(np.float32), mode=mode))
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, found)]
    return int(library.differing(*pointers, ctypes.c_long(x.size), bf16.ROUNDING_MODES.index(mode)))


def inputs(first: int, last: int) -> list[Callable[[], np.ndarray]]:
    """Parts of the float32 codes from first to last, excluded, to try."""
    if EXHAUSTIVE:
        return [partial(np.arange, start, start + CHUNK, dtype=np.uint32) for start in range(first, last, CHUNK)]
    heads = np.arange(first, last, 65536, dtype=np.uint64).astype(np.uint32)[:, None]
    tails = np.array([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xFFFE, 0xFFFF], np.uint32)
    every = np.arange(first, last, 4099, dtype=np.uint64).astype(np.uint32)
    return [lambda: (heads | tails).reshape(-1), lambda: every]


@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.parametrize("mode", MODES)
def test_numpy_header_and_definition_agree(library: ctypes.CDLL, mode: str, quarter: int) -> None:
    parts = inputs(quarter << 30, quarter + 1 << 30)
    tried = 0

    def task(part: Callable[[], np.ndarray]) -> int:
        nonlocal tried
        x = part()
        tried += x.size
        return numpy_against_both(library, x, mode)

    assert in_parallel(f"float32, {mode}, quarter {quarter}", [partial(task, part) for part in parts], len(parts)) == 0
    count("casts of float32: NumPy = CUDA header = definition", inputs=tried, outputs=2 * tried)


def test_a_wrong_code_would_be_noticed(library: ctypes.CDLL) -> None:
    x = np.arange(0x3F7F0000, 0x3F820000, dtype=np.uint32)
    for mode in MODES:
        found = bits(cufuse.round_to_bf16(x.view(np.float32), mode=mode))
        found[::1000] ^= 1
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (x, found)]
        wrong = library.differing(*pointers, ctypes.c_long(x.size), bf16.ROUNDING_MODES.index(mode))
        assert wrong == len(found[::1000])


HEADS = [0x3F80, 0x0000, 0x007F, 0x7F7F, 0xBF81, 0x8000]


@pytest.mark.parametrize("quarter", range(4))
@pytest.mark.parametrize("head", HEADS, ids=hex)
def test_stochastic_counts(library: ctypes.CDLL, head: int, quarter: int) -> None:
    """Of the 65,536 random words, as many round up as the discarded fraction says: for every fraction, NumPy and header."""
    step = 1 if EXHAUSTIVE else 257
    words = np.arange(65536, dtype=np.uint16)

    def by_numpy(rests: np.ndarray) -> int:
        x = np.repeat(np.uint32(head << 16) | rests.astype(np.uint32), 65536).view(np.float32)
        found = bits(cufuse.round_to_bf16(x, mode="stochastic", random_bits=np.tile(words, len(rests)))).reshape(-1, 65536)
        up = (found == head + 1).sum(axis=1)
        return int(np.count_nonzero((up != rests) | ((found == head).sum(axis=1) + up != 65536)))

    # NumPy takes a minute for each head: in full for one of them
    first, last = quarter << 14, quarter + 1 << 14
    rests = np.arange(first, last, step if head == HEADS[0] else 257)
    tasks: list[Callable[[], int]] = [partial(by_numpy, part) for part in np.array_split(rests, -(-len(rests) // 32))]
    amount = 1024 if EXHAUSTIVE else 4
    tasks += [partial(library.miscounted, head, start, ctypes.c_long(amount)) for start in range(first, last, 1024)]
    assert in_parallel(f"stochastic, {head:#06x}, quarter {quarter}", tasks, len(tasks)) == 0
    tried = 65536 * (len(rests) + 16 * amount)
    count("stochastic casts of float32: exact counts", inputs=tried, outputs=tried)
