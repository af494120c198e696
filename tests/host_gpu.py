"""A stand-in for CuPy and for the launcher that runs kernels' texts on the host (host_cuda.hpp).

With it, the whole way from a public operation over strides, alignment, macros and packed arguments to a kernel is checked on
a machine without a GPU. Devices, streams, caches of machine code and rsqrt.approx are not.
"""

import contextlib
import ctypes
import hashlib
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cufuse import _repeat, launch
from cufuse.compiler import Kernel

ROOT = Path(__file__).resolve().parent.parent
HARNESS = """
#include "host_cuda.hpp"
#include "{source}"
extern "C" void run(unsigned blocks, unsigned rows, unsigned threads, const void* a) {{
    run_grid(blocks, {{threads, 1, 1}}, [a] {{ {entry}(*static_cast<const Arguments*>(a)); }}, rows);
}}
"""


class Device(contextlib.nullcontext):
    """cupy.cuda.Device."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.id = number


class Pointer:
    """cupy.cuda.MemoryPointer."""

    def __init__(self, ptr: int, device_id: int) -> None:
        self.ptr, self.device_id = ptr, device_id


class Array:
    """cupy.ndarray over host memory, on a numbered pretended device."""

    def __init__(self, host: np.ndarray, device: int = 0) -> None:
        self.host = host
        self.device = Device(device)

    shape = property(lambda self: self.host.shape)
    strides = property(lambda self: self.host.strides)
    dtype = property(lambda self: self.host.dtype)
    itemsize = property(lambda self: self.host.itemsize)
    ndim = property(lambda self: self.host.ndim)
    size = property(lambda self: self.host.size)
    flags = property(lambda self: self.host.flags)
    data = property(lambda self: Pointer(self.host.__array_interface__["data"][0], self.device.id))

    def __getitem__(self, index: Any) -> "Array":
        return Array(self.host[index], self.device.id)

    def __setitem__(self, index: Any, value: "Array") -> None:
        self.host[index] = value.host

    def __eq__(self, other: object) -> Any:
        raise ValueError("arrays are compared element by element: no truth in that")

    __hash__ = None  # type: ignore[assignment]

    def __len__(self) -> int:
        return len(self.host)

    def view(self, dtype: Any) -> "Array":
        return Array(self.host.view(dtype), self.device.id)

    def reshape(self, *shape: Any) -> "Array":
        reshaped = self.host.reshape(*shape)
        assert np.shares_memory(reshaped, self.host) or self.size == 0, "this reshape copies"
        return Array(reshaped, self.device.id)


def empty(shape: Any, dtype: Any) -> Array:
    """cupy.empty, poisoned: nothing may stay unwritten."""
    host = np.empty(shape, dtype)
    host.view(np.uint8).fill(0xA5)
    return Array(host)


class Prepared:
    """launch.Prepared on the host."""

    def __init__(self, kernel: Kernel, library: ctypes.CDLL, grid: tuple[int, ...], threads: int) -> None:
        self.kernel, self.library, self.grid, self.threads = kernel, library, grid, threads

    def bound(self, arguments: bytes, stream: int) -> Any:
        return lambda: self(arguments)

    def __call__(self, arguments: bytes) -> None:
        self.library.run(*self.grid[:2], self.threads, ctypes.c_char_p(arguments))


class HostGpu:
    """Compiles kernels with g++ and remembers which were launched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.libraries: dict[str, ctypes.CDLL] = {}
        self.launched: list[Kernel] = []
        self.tensor_cores: Any = None  # tests.linear_on_host.HostGpu

    def prepare(
        self,
        kernel: Kernel,
        device: int,
        grid: Any,
        *,
        threads: int | None = None,
        smem: int | None = None,
        cluster: int = 1,
        programmatic: bool = False,
    ) -> Any:
        """As launch.prepare; kernels that take a tensor core or the copy engine go to the machine that has them."""
        if self.tensor_cores is not None and kernel.source.startswith(("linear_", "rms_norm_linear", "quantised_")):
            return self.tensor_cores.prepare(
                kernel, device, grid, threads=threads, smem=smem, cluster=cluster, programmatic=programmatic
            )
        threads = kernel.threads if threads is None else threads
        assert 0 < threads <= kernel.threads
        shape = (grid, 1, 1) if isinstance(grid, int) else grid
        assert 0 < shape[0] < 2**31
        assert 0 < shape[1] < 2**16
        assert shape[2] == 1
        self.launched.append(kernel)
        return Prepared(kernel, self.library(kernel), shape, threads)

    def library(self, kernel: Kernel) -> ctypes.CDLL:
        key = hashlib.sha256(repr((kernel.source, kernel.defines)).encode()).hexdigest()[:16]
        if key not in self.libraries:
            source, library = self.folder / f"{key}.cpp", self.folder / f"{key}.so"
            source.write_text(HARNESS.format(source=kernel.source, entry=kernel.entry))
            flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
            flags += [f"-I{ROOT / 'kernels'}", f"-I{ROOT / 'tests'}"]
            defines = [f"-D{name}={value}" for name, value in kernel.defines]
            subprocess.run(["g++", *flags, *defines, str(source), "-o", str(library)], check=True, capture_output=True, text=True)
            self.libraries[key] = ctypes.CDLL(str(library))
        return self.libraries[key]


def installed(monkeypatch: pytest.MonkeyPatch, gpu: HostGpu) -> Iterator[HostGpu]:
    """Puts the stand-ins in place for one test."""
    from cufuse import _gpu_norm, _gpu_rope

    cupy = types.ModuleType("cupy")
    cupy.ndarray, cupy.empty = Array, empty  # type: ignore[attr-defined]
    stream = types.SimpleNamespace(ptr=0, is_capturing=lambda: False)
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda: stream)  # type: ignore[attr-defined]
    cupy.dtype = np.dtype  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(launch, "prepare", gpu.prepare)
    monkeypatch.setattr(launch, "capability", lambda device: 90)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(launch, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "current_stream", lambda: 0)
    monkeypatch.setattr(launch, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launch, "temporary", lambda shape, dtype, purpose: empty(shape, dtype))
    for module in (_gpu_norm, _gpu_rope):
        monkeypatch.setattr(module, "_plans", {})
    monkeypatch.setattr(_repeat, "_calls", {})
    gpu.launched.clear()
    yield gpu


def forget_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """What calls were planned with, such as another number of multiprocessors, is planned anew."""
    from cufuse import _gpu_linear, _gpu_norm, _gpu_qkv, _gpu_quantised, _gpu_quantised_qkv

    for module in (_gpu_linear, _gpu_norm, _gpu_quantised):
        monkeypatch.setattr(module, "_plans", {})
    for module in (_gpu_qkv, _gpu_quantised_qkv, _repeat):
        monkeypatch.setattr(module, "_calls", {})


def with_tensor_cores(folders: pytest.TempPathFactory) -> HostGpu:
    """The machine of this module, with that of tests.linear_on_host for kernels that need tensor cores or the copy engine."""
    from tests import linear_on_host

    gpu = HostGpu(folders.mktemp("host"))
    gpu.tensor_cores = linear_on_host.HostGpu(folders.mktemp("tensor_cores"))
    return gpu


def installed_with_tensor_cores(monkeypatch: pytest.MonkeyPatch, gpu: HostGpu) -> Iterator[HostGpu]:
    """Puts both in place for one test of a chain of launches."""
    from cufuse import _driver
    from tests import linear_on_host

    counters = np.zeros(4096, np.uint8)
    for found in installed(monkeypatch, gpu):
        monkeypatch.setattr(_driver, "tensor_map", linear_on_host.tensor_map)
        monkeypatch.setattr(launch, "workspace", gpu.tensor_cores.workspace)
        monkeypatch.setattr(launch, "counters", lambda device: counters.ctypes.data)
        yield found
        assert not counters.any()  # every kernel leaves zeros
