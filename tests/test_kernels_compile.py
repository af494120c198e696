"""Every kernel compiles without a GPU, within the limits of the machines it is for; and the cache of machine code."""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import re
import stat
import warnings
from pathlib import Path

import pytest

from cufuse import compiler, launch
from cufuse.compiler import ARCHITECTURES, Kernel, KernelCompileError

EVERYTHING = os.environ.get("CUFUSE_COMPILE_ALL") == "1"
"""Every configuration for every target (minutes); otherwise each where it is fastest, and two of each source elsewhere."""

SMALL = Kernel("small", "round_to_bf16.cu", "round_to_bf16", (("FLOAT64", 0),), 256)


@pytest.fixture(scope="module")
def kernels() -> tuple[Kernel, ...]:
    return launch.kernels()


def targets_of(kernel: Kernel, kernels: tuple[Kernel, ...]) -> list[str]:
    able = [target for target in ARCHITECTURES if kernel.runs_on(int(re.sub(r"\D", "", target)))]
    same_source = [other for other in kernels if other.source == kernel.source]
    if EVERYTHING or kernel in (same_source[0], same_source[-1]):
        return able
    return able[-1:] if "sm_90a" not in able else ["sm_90a"]


def build(kernel: Kernel, target: str) -> None:
    """Into the cache. What is wrong with the kernel is said where it is asked for again."""
    with contextlib.suppress(KernelCompileError):
        compiler.compile_kernel(kernel, target)


def build_all(wanted: list[tuple[Kernel, str]]) -> None:
    """By a process for each core."""
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as processes:
        list(processes.map(build, *zip(*wanted, strict=True), chunksize=4))


def test_every_kernel_fits_its_machines(kernels: tuple[Kernel, ...]) -> None:
    assert len({kernel.name for kernel in kernels}) == len(kernels)
    if EVERYTHING:
        build_all([(kernel, target) for kernel in kernels for target in targets_of(kernel, kernels)])
    for kernel in kernels:
        for target in targets_of(kernel, kernels):
            (row,) = launch.resource_table([target], [kernel])
            what = f"{kernel.name} for {target}: {row}"
            assert row.stack == 0, what
            assert row.spills == 0, what
            # registers are given out in eights to each thread
            assert 0 < -(-row.registers // 8) * 8 * kernel.threads <= compiler.REGISTERS_PER_BLOCK, what
            limit = compiler.shared_memory_limit(int(re.sub(r"\D", "", target)))
            assert 0 <= row.static_smem + kernel.dynamic_smem <= limit, what
            print(
                f"{kernel.name:58} {target:7} {row.registers:4} registers {kernel.threads:5} threads "
                f"{row.static_smem + kernel.dynamic_smem:7} bytes of shared memory"
            )


def test_every_source_is_registered(kernels: tuple[Kernel, ...]) -> None:
    assert {path.name for path in compiler.source_folder().glob("*.cu")} == {kernel.source for kernel in kernels}


def test_no_subnormal_is_flushed(kernels: tuple[Kernel, ...]) -> None:
    first = {kernel.source: kernel for kernel in kernels}
    for kernel in first.values():
        text = compiler.compile_ptx(kernel, "sm_90a" if kernel.runs_on(90) else "sm_80")
        assert ".visible .entry" in text
        # but for expf, which nvcc and NVRTC build around this instruction with or without the flag: CUDA's bits
        assert ".ftz" not in text.replace("ex2.approx.ftz.f32", ""), kernel.name


def test_ptxas_has_nothing_to_warn_of(kernels: tuple[Kernel, ...]) -> None:
    """Such as products that it would have to wait for one by one (C7510), or setmaxnreg left out (C7508)."""
    last = {kernel.source: kernel for kernel in kernels}
    for kernel in last.values():
        target = "sm_90a" if kernel.runs_on(90) else "sm_80"
        _, log = compiler._run(kernel, compiler._sources(kernel.source), compiler._options(kernel, target), "cubin")
        assert "warning" not in log.lower(), log


def test_products_are_tensor_core_instructions(kernels: tuple[Kernel, ...]) -> None:
    """The order of each sum is that of these instructions; none may become others."""
    for source, instruction in {
        "linear_sm80.cu": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "linear_small_m.cu": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "linear_sm90.cu": "wgmma.mma_async.sync.aligned.m64n",
    }.items():
        kernel = next(kernel for kernel in kernels if kernel.source == source)
        text = compiler.compile_ptx(kernel, "sm_90a")
        assert instruction in text
        assert not re.search(r"\b(fma|add|mul)\.(rn\.)?f32", text) or source == "linear_small_m.cu"
        assert not re.search(r"\bfma\.", text)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "_cache_is_off", False)
    return tmp_path / "cache"


def count_builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    builds: list[str] = []
    run = compiler._run

    def counted(kernel: Kernel, *arguments: object) -> object:
        builds.append(kernel.name)
        return run(kernel, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(compiler, "_run", counted)
    return builds


def test_cache_is_read_and_damage_noticed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = count_builds(monkeypatch)
    first = compiler.compile_kernel(SMALL, "sm_90a")
    assert compiler.compile_kernel(SMALL, "sm_90a") == first
    assert len(builds) == 1
    (code,), (about,) = folder.glob("*.cubin"), folder.glob("*.json")
    whole, text = code.read_bytes(), about.read_text()
    assert whole == first.code
    damages = [
        (code, whole[: len(whole) // 2]),
        (code, b""),
        (code, whole[:100] + bytes([whole[100] ^ 1]) + whole[101:]),
        (about, b"{"),
        (about, b"[]"),
        (about, json.dumps({"sha256": json.loads(text)["sha256"]}).encode()),
    ]
    for number, (path, content) in enumerate(damages):
        path.write_bytes(content)
        assert compiler.compile_kernel(SMALL, "sm_90a") == first
        assert len(builds) == number + 2
        assert code.read_bytes() == whole
    code.unlink()
    assert compiler.compile_kernel(SMALL, "sm_90a") == first
    assert not list(folder.glob("*.tmp"))


def test_key_knows_source_headers_flags_and_target(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sources = tmp_path / "kernels"
    sources.mkdir()
    (sources / "a.cuh").write_text('#pragma once\n#include "b.cuh"\n')
    (sources / "b.cuh").write_text("#define VALUE 1\n")
    (sources / "k.cu").write_text('#include "a.cuh"\nextern "C" __global__ void k(int* out) { *out = VALUE + PLUS; }\n')
    monkeypatch.setattr(compiler, "source_folder", lambda: sources)
    builds = count_builds(monkeypatch)

    def compiled(plus: int = 0, target: str = "sm_80") -> int:
        compiler.compile_kernel(Kernel("k", "k.cu", "k", (("PLUS", plus),), 32), target)
        return len(builds)

    assert [compiled(), compiled()] == [1, 1]
    assert compiled(plus=1) == 2
    assert compiled(target="sm_90a") == 3
    (sources / "b.cuh").write_text("#define VALUE 2\n")  # included by a header alone
    assert compiled() == 4
    with (sources / "k.cu").open("a") as source:
        source.write("// a comment\n")
    assert compiled() == 5


@pytest.mark.skipif(os.name != "posix", reason="permissions of folders are POSIX's")
def test_folder_that_cannot_be_written_costs_one_warning(folder: Path) -> None:
    folder.parent.joinpath("cache").write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match=compiler.CACHE_VARIABLE):
        first = compiler.compile_kernel(SMALL, "sm_90a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler.compile_kernel(SMALL, "sm_90a").code == first.code


def test_unreadable_entry_is_compiled_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiler.compile_kernel(SMALL, "sm_90a")
    (code,) = folder.glob("*.cubin")
    code.unlink()
    code.mkdir()  # neither readable nor replaceable
    with pytest.warns(RuntimeWarning):
        assert compiler.compile_kernel(SMALL, "sm_90a").code == first.code
    assert stat.S_ISDIR(code.stat().st_mode)


def test_compile_error_names_file_and_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "k.cu").write_text('extern "C" __global__ void k() {\n    nonsense;\n}\n')
    monkeypatch.setattr(compiler, "source_folder", lambda: tmp_path)
    with pytest.raises(KernelCompileError, match=r"k\.cu\(2\).*nonsense") as caught:
        compiler.compile_kernel(Kernel("k", "k.cu", "k", (), 32), "sm_80")
    assert "nonsense" in caught.value.log
    assert not folder.exists()


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(compiler.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    monkeypatch.setattr("sys.platform", "linux")
    assert compiler.cache_folder() == Path("/somewhere/cufuse")


def test_both_ways_to_nvrtc_give_the_same_code() -> None:
    pytest.importorskip("cupy")
    pytest.importorskip("cuda.bindings.nvrtc")
    ways = [compiler._CudaBindings(), compiler._CupyNvrtc()]
    if ways[0].version() != ways[1].version():
        pytest.skip(f"two NVRTC: {[way.version() for way in ways]}")
    sources = compiler._sources(SMALL.source)
    headers = {name: text for name, text in sources.items() if name != SMALL.source}
    options = compiler._options(SMALL, "sm_90a")
    codes = [way.build(SMALL.source, sources[SMALL.source], headers, options, "cubin")[0] for way in ways]
    assert codes[0] is not None
    assert codes[1] is not None
    assert codes[0] == codes[1][: len(codes[0])]
    assert set(codes[1][len(codes[0]) :]) <= {0}
