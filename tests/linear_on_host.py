"""The kernels of ``linear`` run on the CPU: their own text under kernels_on_host/, behind a stand-in for the launcher.

From the choice of a kernel over its plan, tensor maps and packed arguments to the last barrier, everything but the machine
itself is the code that runs on a GPU.
"""

import contextlib
import ctypes
import hashlib
import re
import shutil
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cufuse import compiler
from cufuse.compiler import Kernel

FOLDER = Path(__file__).resolve().parent / "kernels_on_host"
COMPILER = shutil.which("g++")
_MEMORY = re.compile(r"extern __shared__ __align__\(\d+\) unsigned char memory\[\];")
_HARNESS = """
extern "C" const char* run_on_host(const void* arguments, unsigned grid_x, unsigned grid_y, int cluster, int threads,
                                   unsigned long shared, unsigned seed) {{
    const auto kernel = [](const void* given) {{
        Arguments a;
        std::memcpy(&a, given, sizeof a);
        {entry}(a);
    }};
    return host::run_grid(kernel, arguments, grid_x, grid_y, cluster, threads, shared, seed);
}}
extern "C" unsigned long arguments_size() {{ return sizeof(Arguments); }}
"""
_FLAGS = ["-std=c++17", "-O1", "-fPIC", "-w", "-fno-strict-aliasing", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
_MACHINE = ("machine", "tensor_cores", "copies", "loads")


def tensor_map(pointer: int, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...]) -> bytes:
    """In place of the driver's: what kernels_on_host/pipeline.cuh reads."""
    assert all(stride % 16 == 0 for stride in strides)
    assert all(0 < extent <= 256 for extent in box)
    assert pointer % 16 == 0

    def padded(values: tuple[int, ...], length: int) -> tuple[int, ...]:
        return (*values, *(0,) * (length - len(values)))

    numbers = (pointer, len(shape), *padded(shape, 3), *padded(strides, 2), *padded(box, 3))
    return struct.pack("16Q", *padded(numbers, 16))


class KernelFailure(AssertionError):
    """A kernel waited for ever, reached outside its memory or broke a rule of the machine."""


class Prepared:
    """launch.Prepared on the host."""

    def __init__(self, library: ctypes.CDLL, shape: tuple[int, ...], seed: int) -> None:
        self.library, self.shape, self.seed = library, shape, seed

    def clusters_at_once(self) -> int:
        return self.shape[0] // self.shape[2]

    def bound(self, arguments: bytes, stream: int) -> Any:
        return lambda: self(arguments)

    def __call__(self, arguments: bytes) -> None:
        assert len(arguments) == self.library.arguments_size()
        failure = self.library.run_on_host(arguments, *self.shape[:4], ctypes.c_ulong(self.shape[4]), self.seed)
        if failure is not None:
            raise KernelFailure(failure.decode())


class HostGpu:
    """Compiles kernels with g++ into ``folder``, and stands in for cufuse.launch where it is installed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seed = 1
        self.multiprocessors = 4
        self.capability = 90
        self.launched: list[Kernel] = []
        self._libraries: dict[str, ctypes.CDLL] = {}
        self._workspaces: list[np.ndarray] = []
        self.change: Callable[[str], str] = lambda source: source

    def install(self, patch: Any) -> None:
        """Put the stand-ins in place (``patch`` is pytest's monkeypatch)."""
        from cufuse import _driver, _gpu_linear, _repeat, launch

        patch.setattr(launch, "prepare", self.prepare)
        patch.setattr(launch, "workspace", self.workspace)
        patch.setattr(launch, "capability", lambda device: self.capability)
        patch.setattr(launch, "multiprocessors", lambda device: self.multiprocessors)
        patch.setattr(launch, "on_device", lambda device: contextlib.nullcontext())
        patch.setattr(_driver, "tensor_map", tensor_map)
        patch.setattr(_gpu_linear, "_plans", {})
        patch.setattr(_repeat, "_calls", {})

    def prepare(
        self,
        kernel: Kernel,
        device: int,
        grid: int | tuple[int, int, int],
        *,
        threads: int | None = None,
        smem: int | None = None,
        cluster: int = 1,
        programmatic: bool = False,
    ) -> Prepared:
        x, y, z = (grid, 1, 1) if isinstance(grid, int) else grid
        threads, smem = threads or kernel.threads, kernel.dynamic_smem if smem is None else smem
        assert z == 1
        assert threads <= kernel.threads
        assert smem <= compiler.shared_memory_limit(self.capability)
        assert x % cluster == 0
        assert kernel.runs_on(self.capability)
        self.launched.append(kernel)
        return Prepared(self.library(kernel), (x, y, cluster, threads, smem), self.seed)

    def workspace(self, device: int, size: int) -> int:
        # kept, as on a GPU, and poisoned
        self._workspaces.append(np.full(size + 256, 0xFF, np.uint8))
        return int(-(-self._workspaces[-1].ctypes.data // 256) * 256)

    def library(self, kernel: Kernel) -> ctypes.CDLL:
        source = (compiler.source_folder() / kernel.source).read_text(encoding="utf-8")
        source = self.change(_MEMORY.sub("unsigned char* memory = host::shared_memory();", source))
        key = hashlib.sha256(repr((source, kernel.defines)).encode()).hexdigest()[:24]
        if key not in self._libraries:
            library = self.folder / f"{key}.so"
            if not library.exists():
                self._build(kernel, source, library)
            self._libraries[key] = ctypes.CDLL(str(library))
            self._libraries[key].arguments_size.restype = ctypes.c_ulong
            self._libraries[key].run_on_host.restype = ctypes.c_char_p
        return self._libraries[key]

    def _build(self, kernel: Kernel, source: str, library: Path) -> None:
        text = f'#include "wgmma.cuh"\n{source}\n{_HARNESS.format(entry=kernel.entry)}'
        path = library.with_suffix(".cpp")
        path.write_text(text, encoding="utf-8")
        defines = [f"-D{name}={value}" for name, value in kernel.defines]
        _call_compiler(self.folder, *defines, str(path), *self._machine(), "-shared", "-o", str(library))

    def _machine(self) -> list[str]:
        """The machine's object files, compiled once."""
        objects = [self.folder / f"{name}.o" for name in _MACHINE]
        for compiled in objects:
            if not compiled.exists():
                _call_compiler(self.folder, "-c", str(FOLDER / f"{compiled.stem}.cpp"), "-o", str(compiled))
        return [str(compiled) for compiled in objects]


def demand_noticed(
    gpu: HostGpu, right: str, wrong: str, same: Callable[[int], bool], whole: Callable[[str], str] = lambda source: source
) -> None:
    """That a fault planted in the kernels' text, ``right`` replaced by ``wrong``, fails or changes bits for one of three orders of
    events. same: runs the case with a seed and says whether the bits are the emulation's. whole: the text with its headers."""
    applied = []

    def plant(source: str) -> str:
        text = whole(source)
        applied.append(right in text)
        return text.replace(right, wrong)

    gpu.change = plant
    for seed in (1, 2, 3):
        try:
            if not same(seed):
                break
        except KernelFailure:
            break
    else:
        raise AssertionError("not noticed")
    assert any(applied)


def _call_compiler(folder: Path, *arguments: str) -> None:
    # FOLDER comes first: its headers stand in for those of the same names, and bf16.cuh is the kernels' own
    command = ["g++", *_FLAGS, f"-I{FOLDER}", f"-I{compiler.source_folder()}", *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
