"""What may go wrong around a computation: outputs in a buffer of others, threads, processes, damaged caches, full disks.

Inputs of the first two are calls.
"""

import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import cufuse
from cufuse import compiler
from cufuse.compiler import Kernel
from tests import totals
from tests.concurrent_calls import CALLS, THREADS
from tests.guarded_calls import Guarded, guarded_calls

ROOT = Path(__file__).resolve().parents[1]
SHAPES = 200
SMALL = Kernel("small", "round_to_bf16.cu", "round_to_bf16", (("FLOAT64", 0),), 256)

SMALL_FILES = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))"
"""The system then refuses to write more than 1,000 bytes to a file, as a full disk does."""

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="limits of file sizes and folders as on Linux")


def python(*arguments: str | Path, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Runs Python in the checkout; None takes a variable away."""
    changed = {name: value for name, value in (os.environ | environment).items() if value is not None}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=changed, timeout=120, check=False)


# outputs


def test_nothing_beside_the_outputs_is_written() -> None:
    compared = 0
    for seed in range(SHAPES):
        rng = np.random.default_rng((seed, 1))
        for what, call in guarded_calls(seed, np.asarray):
            expected = call()
            several = isinstance(expected, tuple)
            outputs = expected if several else (expected,)
            guards = [Guarded(one.shape, one.dtype, rng) for one in outputs]
            call(out=tuple(guard.out for guard in guards) if several else guards[0].out)
            for guard, one in zip(guards, outputs, strict=True):
                guard.demand_intact(f"{what}, seed {seed}, shape {one.shape}")
                assert guard.out.tobytes() == one.tobytes(), f"{what}, seed {seed}: other bits than without out"
                compared += one.size
    totals.count("guard bands", inputs=6 * SHAPES, outputs=compared)


def test_the_guard_notices() -> None:
    for place in (0, -1):
        guard = Guarded((3, 5), cufuse.bfloat16, np.random.default_rng(0))
        guard.out[...] = 1
        guard.demand_intact("nothing")
        guard.buffer[np.flatnonzero(~guard.inside)[place]] ^= 1
        with pytest.raises(AssertionError, match="1 bytes beside the output"):
            guard.demand_intact("one byte")


# threads and processes


def test_threads_that_begin_cold_give_the_bits_of_one() -> None:
    done = python("-m", "tests.concurrent_calls", "numpy")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["errors"] == []
    assert told["calls"] == THREADS * CALLS
    assert told["differing"] == 0
    totals.count("threads that begin cold", inputs=told["calls"], outputs=told["outputs"])


COMPILE = """
import hashlib, json, sys, time
from pathlib import Path
from cufuse import compiler
from cufuse.compiler import Kernel

kernels = [Kernel(f"small {x}", "round_to_bf16.cu", "round_to_bf16", (("FLOAT64", x),), 256) for x in (0, 1)]
Path(sys.argv[1], sys.argv[2]).touch()
while len(list(Path(sys.argv[1]).iterdir())) < int(sys.argv[3]):
    time.sleep(0.001)
found = [compiler.compile_kernel(kernel, target) for kernel in kernels for target in ("sm_80", "sm_90a")]
print(json.dumps([hashlib.sha256(one.code).hexdigest() for one in found]))
"""


def test_processes_that_compile_into_one_empty_cache_at_once(tmp_path: Path) -> None:
    cache, waiting = tmp_path / "cache", tmp_path / "waiting"
    waiting.mkdir()
    environment = os.environ | {compiler.CACHE_VARIABLE: str(cache)}
    count = 2
    running = [
        subprocess.Popen(
            [sys.executable, "-c", COMPILE, str(waiting), str(number), str(count)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )
        for number in range(count)
    ]  # fmt: skip
    told = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * count, told
    assert [stderr for _, stderr in told] == [""] * count
    assert len({stdout for stdout, _ in told}) == 1
    files = sorted(path.name for path in cache.iterdir())
    assert len(files) == 2 * 4 and all(name.endswith((".cubin", ".json")) for name in files), files
    # a third one finds all of them whole
    without = COMPILE.replace("found = ", 'compiler._run = lambda *_: sys.exit("compiled again")\nfound = ')
    third = python("-c", without, waiting, "third", str(count), **{compiler.CACHE_VARIABLE: str(cache)})
    assert (third.returncode, third.stdout) == (0, told[0][0]), third.stderr


# caches


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_cache_is_off", False)
    return tmp_path / "cache"


def test_an_entry_replaced_by_another_is_noticed(cache: Path) -> None:
    """Code and description both, so that the checksum fits: another kernel's, and the same kernel's for another target."""
    other = Kernel("other", SMALL.source, SMALL.entry, (("FLOAT64", 1),), 256)
    first = compiler.compile_kernel(SMALL, "sm_90a")
    own = {path.suffix: path for path in cache.iterdir()}
    for kernel, target in ((other, "sm_90a"), (SMALL, "sm_80")):
        strange = compiler.compile_kernel(kernel, target)
        assert strange.code != first.code
        (about,) = (path for path in cache.glob("*.json") if json.loads(path.read_text())["sha256"] == _sha(strange.code))
        own[".json"].write_bytes(about.read_bytes())
        own[".cubin"].write_bytes(strange.code)
        assert compiler.compile_kernel(SMALL, "sm_90a") == first
        assert own[".cubin"].read_bytes() == first.code


def _sha(code: bytes) -> str:
    return hashlib.sha256(code).hexdigest()


NUMBA_CALL = """
import numpy as np, ml_dtypes
from cufuse.emulation.tensor_core import matmul
a = (np.arange(4 * 64) % 13).reshape(4, 64).astype(ml_dtypes.bfloat16)
assert (matmul(a, a, engine="numba") == a.astype(np.float32) @ a.astype(np.float32).T).all()
print("right")
"""


@linux_only
def test_numba_s_cache_may_be_full_damaged_or_nowhere(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    folder = tmp_path / "numba"
    damage = """
from pathlib import Path
for path in Path(sys.argv[1]).rglob(sys.argv[2]):
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
"""
    # full, then empty, then each kind of file cut in half (index and machine code), then no folder at all
    for before, where in ((SMALL_FILES, folder), ("", folder), (damage, folder), ("", Path("/dev/null/x"))):
        done = python("-c", "import sys\n" + before + NUMBA_CALL, folder, "*.nbi", NUMBA_CACHE_DIR=str(where))
        assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
        assert bool(list(folder.rglob("*.nbi"))) == (before != SMALL_FILES)


# full disks and homes that cannot be written


@linux_only
def test_a_full_disk_costs_the_cache_and_one_warning(tmp_path: Path) -> None:
    """Files are cut off at 1,000 bytes, by the system itself."""
    program = f"""
{SMALL_FILES}
import warnings
from cufuse import compiler
kernel = {SMALL!r}
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    codes = {{compiler.compile_kernel(kernel, "sm_90a").code for _ in range(2)}}
(warning,) = heard
print(len(codes), warning.category.__name__, warning.message)
"""
    program = program.replace("Kernel(", "compiler.Kernel(")
    done = python("-c", program, **{compiler.CACHE_VARIABLE: str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"1 RuntimeWarning compiled kernels cannot be kept in {tmp_path / 'cache'} ([Errno 27]")
    assert f"set {compiler.CACHE_VARIABLE}" in done.stdout
    assert list((tmp_path / "cache").iterdir()) == [], "half an entry was left"


@linux_only
@pytest.mark.parametrize("target", ["synthesise", "json", "plot"])
def test_a_full_disk_leaves_nothing_and_says_so(tmp_path: Path, target: str) -> None:
    command = {
        "synthesise": ["synthesise", str(tmp_path / "model"), "--layers", "1", "--embedding-rows", "8", "--attention-only"],
        "json": ["report", "--tokens", "1", "--recipes", "late-rounding", "--json", str(tmp_path / "r.json")],
        "plot": ["report", "--tokens", "1", "--recipes", "late-rounding", "--plot", str(tmp_path / "r.png")],
    }[target]
    program = f"{SMALL_FILES}; import sys; from cufuse.__main__ import main; sys.exit(main({command!r}))"
    if target == "plot":
        pytest.importorskip("matplotlib")
    done = python("-c", program, NUMBA_CACHE_DIR=str(tmp_path.parent), MPLCONFIGDIR=str(tmp_path.parent))
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].endswith("File too large"), done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@linux_only
def test_standard_output_that_is_full(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "cufuse", "recipes"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (2, "cufuse recipes: No space left on device\n")


@linux_only
def test_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    """Nobody may make a folder below /dev/null, root neither."""
    nowhere = {
        "HOME": "/dev/null/home", "XDG_CACHE_HOME": None, compiler.CACHE_VARIABLE: None, "NUMBA_CACHE_DIR": "/dev/null/numba",
    }  # fmt: skip
    program = f"from cufuse import compiler; compiler.compile_kernel(compiler.{SMALL!r}, 'sm_80')"
    done = python("-W", "always::RuntimeWarning", "-c", program, **nowhere)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("RuntimeWarning") == 1
    assert "compiled kernels cannot be kept in /dev/null/home/.cache/cufuse" in done.stderr
    done = python("-m", "cufuse", "report", "--tokens", "1", "--recipes", "late-rounding", "--json", tmp_path / "r.json", **nowhere)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "r.json").read_text())["tokens"] == 1
    done = python("-m", "cufuse", "info", **nowhere)
    assert done.returncode == 0 and "/dev/null/home/.cache/cufuse" in done.stdout, done.stderr
    # CuPy cannot even be imported there, where it is installed
    assert "CuPy cannot be imported" in done.stdout
    done = python("-m", "cufuse", "synthesise", "/dev/null/home/model", "--layers", "1", **nowhere)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "Not a directory" in done.stderr


def test_a_write_that_fails_halfway_leaves_no_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full (ENOSPC) at each of the entry's two files in turn."""
    replace = os.replace
    for allowed in (0, 1):
        renamed: list[str] = []

        def full(source: str, target: Path, allowed: int = allowed, renamed: list[str] = renamed) -> None:
            if len(renamed) >= allowed:
                raise OSError(28, "No space left on device", str(target))
            renamed.append(str(target))
            replace(source, target)

        monkeypatch.setattr(compiler, "_cache_is_off", False)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", full)
            with pytest.warns(RuntimeWarning, match="No space left on device"):
                first = compiler.compile_kernel(SMALL, "sm_90a")
        assert [path.suffix for path in cache.iterdir()] == [".cubin"][:allowed]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            monkeypatch.setattr(compiler, "_cache_is_off", False)
            assert compiler.compile_kernel(SMALL, "sm_90a") == first  # and keeps it: there is room again
        assert sorted(path.suffix for path in cache.iterdir()) == [".cubin", ".json"]
        for path in cache.iterdir():
            path.unlink()
