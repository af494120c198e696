"""On a GPU: nothing beside any output is written, over 200 shapes; threads that begin with cold caches give the bits of one."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from cufuse import compiler
from tests import gpu_support
from tests.concurrent_calls import CALLS, THREADS
from tests.gpu_support import COMPARED, Guarded, demand_same, rehearse, to_gpu
from tests.guarded_calls import guarded_calls

pytestmark = gpu_support.MARKS

SHAPES = 200
COLUMNS = (1, 7, 64, 100, 128, 513, 1000, 1024, 2560, 4096)
HALVES = (4, 10, 32, 64)
"""Of the heads; kernels are compiled for the numbers of columns and heads' sizes, so these are few, and the rest is drawn."""


def test_nothing_beside_the_outputs_is_written() -> None:
    calls = [
        (f"{what}, seed {seed}", call, ((0, 0), (8, 0), (3, 1), (5, 2))[seed % 4])
        for seed in range(SHAPES)
        for what, call in guarded_calls(seed, to_gpu, COLUMNS, HALVES)
    ]
    rehearse(call for _, call, _ in calls)
    for what, call, (gap, misplaced) in calls:
        expected = call()
        several = isinstance(expected, tuple)
        outputs = expected if several else (expected,)
        guards = [Guarded(one.shape, one.dtype, gap=gap, misplaced=misplaced) for one in outputs]
        found = call(out=tuple(guard.out for guard in guards) if several else guards[0].out)
        for guard, one, given in zip(guards, outputs, found if several else (found,), strict=True):
            guard.demand_intact(what)
            assert given.data.ptr == guard.out.data.ptr, what
            demand_same("guard bands", guard.out, one, f"{what}, gap {gap}, misplaced {misplaced}")


def test_a_guard_band_that_was_written_is_noticed() -> None:
    guard = Guarded((3, 5), gpu_support.bfloat16, gap=1)
    guard.out[...] = 1
    guard.demand_intact("the output alone")
    for place in (0, 255, 256 + 5, -1):
        codes = gpu_support.codes(guard.buffer)
        codes[place] += 1
        try:
            guard.demand_intact("one element")
        except AssertionError:
            codes[place] -= 1
            continue
        raise AssertionError(f"element {place} was written, unnoticed")


def test_threads_that_begin_cold_give_the_bits_of_one(tmp_path: Path) -> None:
    """In a process of its own, with an empty folder of compiled kernels: the threads compile, load and launch at once."""
    environment = os.environ | {compiler.CACHE_VARIABLE: str(tmp_path)}
    run = partial(subprocess.run, capture_output=True, text=True, timeout=500, check=False, env=environment)
    done = run([sys.executable, "-m", "tests.concurrent_calls", "cupy"], cwd=Path(__file__).resolve().parents[1])
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["errors"] == []
    assert told["calls"] == THREADS * CALLS
    assert told["differing"] == 0
    COMPARED["threads that begin cold"] += told["outputs"]
