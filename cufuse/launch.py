"""From a kernel's description to a launch on the arrays' own device and CuPy's current stream: all that knows CuPy.

Every kernel takes one structure by value, packed by the caller with ``struct``. A launch never synchronises and can be
captured in a CUDA graph; the first one of a kernel compiles and loads it (in a graph too, but rather before).
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import itertools
import math
import pkgutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

import cufuse
from cufuse import _driver, compiler
from cufuse.compiler import ARCHITECTURES, Kernel, KernelCompileError

__all__ = [
    "Kernel", "KernelCompileError", "NoGpuError", "Prepared", "contiguous", "counters", "kernels", "one_by_one", "prepare",
    "resource_table", "temporary", "workspace",
]  # fmt: skip

_KERNEL_MODULES = "_gpu_"


class NoGpuError(RuntimeError):
    """A GPU is needed and there is none that CuPy can use."""


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one target: registers a thread, bytes a block, bytes a thread; -1 where unknown."""

    kernel: Kernel
    target: str
    registers: int
    static_smem: int
    stack: int
    spills: int


def kernels() -> tuple[Kernel, ...]:
    """Every configuration that can be launched: the ``KERNELS`` of all modules ``cufuse._gpu_*``."""
    found: list[Kernel] = []
    for module in pkgutil.iter_modules(cufuse.__path__):
        if module.name.startswith(_KERNEL_MODULES):
            found += importlib.import_module(f"cufuse.{module.name}").KERNELS
    return tuple(found)


def resource_table(targets: Iterable[str] = ARCHITECTURES, only: Iterable[Kernel] | None = None) -> list[Resources]:
    """Compile every kernel for every target it can run on and list what it takes. Needs no GPU."""
    rows = []
    for kernel in kernels() if only is None else only:
        for target in targets:
            if kernel.runs_on(int(target.removeprefix("sm_").rstrip("af"))):
                cubin = compiler.compile_kernel(kernel, target)
                rows.append(Resources(kernel, target, cubin.registers, cubin.static_smem, cubin.stack, cubin.spills))
    return rows


@functools.cache
def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise NoGpuError(f"CuPy cannot be imported ({error}); install it with pip install 'cufuse[cuda13]'") from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise NoGpuError(f"CuPy finds no GPU ({error}); NumPy arrays run the emulation, with the same bits") from error
    if count == 0:
        raise NoGpuError("CuPy finds no GPU; NumPy arrays run the emulation, with the same bits")
    return cupy


def device_count() -> int:
    """Number of GPUs that CuPy sees, at least one; NoGpuError otherwise."""
    return int(_cupy().cuda.runtime.getDeviceCount())


def current_device() -> int:
    """CuPy's current device; NoGpuError without a GPU."""
    device: int = _cupy().cuda.runtime.getDevice()
    return device


@functools.cache
def device_name(device: int) -> str:
    """Such as "NVIDIA H200, compute capability 9.0"."""
    name = _cupy().cuda.runtime.getDeviceProperties(device)["name"].decode()
    return f"{name}, compute capability {capability(device) // 10}.{capability(device) % 10}"


@functools.cache
def capability(device: int) -> int:
    """Compute capability of a device, 10 * major + minor: 90 on Hopper."""
    return int(_cupy().cuda.Device(device).compute_capability)


@functools.cache
def multiprocessors(device: int) -> int:
    """Number of streaming multiprocessors of a device."""
    return int(_cupy().cuda.Device(device).attributes["MultiProcessorCount"])


def device_of(**arrays: Any) -> int:
    """The one device on which the named CuPy arrays (None is passed over) lie; ValueError where they differ."""
    devices = {name: array.device.id for name, array in arrays.items() if array is not None}
    if len(set(devices.values())) != 1:
        listed = ", ".join(f"{name} is on device {device}" for name, device in devices.items())
        raise ValueError(f"arrays of several GPUs: {listed}; bring all to one with cupy.asarray under its device")
    return int(next(iter(devices.values())))


class _ThisThread(threading.local):
    """A number that no other thread of the process ever has (the system gives its own again)."""

    numbers = itertools.count(1)

    def __init__(self) -> None:
        self.number = next(self.numbers)


_this_thread = _ThisThread()
_PER_THREAD: Final = 2  # cudaStreamPerThread: one name for the default streams of all threads


def current_stream() -> int:
    """CuPy's current stream on the current device: its pointer; for the per-thread default stream, which is another one in each
    thread, a negative number of this thread."""
    stream: int = _cupy().cuda.get_current_stream().ptr
    return stream if stream != _PER_THREAD else -_this_thread.number


_NOTHING_TO_DO: Final = contextlib.nullcontext()


def on_device(device: int) -> contextlib.AbstractContextManager[Any]:
    """Makes ``device`` CuPy's current one, if it is not that already."""
    cupy = _cupy()
    if cupy.cuda.runtime.getDevice() == device:
        return _NOTHING_TO_DO
    return cupy.cuda.Device(device)  # type: ignore[no-any-return]


class Prepared:
    """A kernel loaded on a device with its launch shape fixed; calling it with the packed arguments launches it on CuPy's
    current stream. The device must be the current one (``on_device``)."""

    __slots__ = ("_configs", "_function", "_launch", "_shape", "_stream", "device", "kernel")

    def __init__(
        self, kernel: Kernel, device: int, grid: tuple[int, int, int], threads: int, smem: int, cluster: int, programmatic: bool
    ) -> None:
        self.kernel, self.device = kernel, device
        self._function = _load(kernel, device)
        self._shape = (grid, threads, smem, cluster, programmatic)
        self._configs: dict[int, Any] = {}
        self._launch = _driver.library().cuLaunchKernelEx
        self._stream = _cupy().cuda.get_current_stream

    def _config(self, stream: int) -> Any:
        config = self._configs.get(stream)
        if config is None:
            grid, threads, smem, cluster, programmatic = self._shape
            handle = stream if stream >= 0 else _PER_THREAD
            config = ctypes.byref(_driver.launch_config(grid, threads, smem, handle, cluster, programmatic))
            self._configs[stream] = config
        return config

    def clusters_at_once(self) -> int:
        """How many clusters the device runs at the same time when nothing else does (no more than fit into its GPCs)."""
        grid, threads, smem, cluster, _ = self._shape
        config = _driver.launch_config(grid, threads, smem, 0, cluster, False)
        found = ctypes.c_int()
        call = functools.partial(_driver.library().cuOccupancyMaxActiveClusters, ctypes.byref(found), self._function)
        status = call(ctypes.byref(config))
        if status == _driver.INVALID_CONTEXT:
            _make_context_current(self.device)
            status = call(ctypes.byref(config))
        _driver.check(status, "cuOccupancyMaxActiveClusters")
        return found.value

    def bound(self, arguments: bytes, stream: int) -> Callable[[], int]:
        """The launch on a stream (``current_stream``) with everything prepared: calling it returns the driver's status, 0 if all
        is well."""
        params = ctypes.byref(ctypes.c_char_p(arguments))
        return functools.partial(self._launch, self._config(stream), self._function, params, None)

    def __call__(self, arguments: bytes) -> None:
        config = self._config(self._stream().ptr)
        # kernelParams is an array of one pointer, to the one structure
        status = self._launch(config, self._function, ctypes.byref(ctypes.c_char_p(arguments)), None)
        if status == _driver.INVALID_CONTEXT:
            _make_context_current(self.device)
            status = self._launch(config, self._function, ctypes.byref(ctypes.c_char_p(arguments)), None)
        if status:
            _driver.check(status, f"launch of {self.kernel.name} {self._shape}")


def prepare(
    kernel: Kernel,
    device: int,
    grid: int | tuple[int, int, int],
    *,
    threads: int | None = None,
    smem: int | None = None,
    cluster: int = 1,
    programmatic: bool = False,
) -> Prepared:
    """Compile, load and shape a launch. threads, dynamic smem: the kernel's own numbers unless given.

    cluster : CTAs of a cluster along x. programmatic : the launch may begin before the one in front of it in the stream has
    ended; only for kernels that wait with ``griddepcontrol.wait`` before they touch what others write (but to ask
    for it into the L2 cache).
    Raises KernelCompileError, NoGpuError, and ValueError where the device cannot run the kernel.
    """
    if not kernel.runs_on(capability(device)):
        limit = compiler.shared_memory_limit(capability(device))
        raise ValueError(
            f"kernel {kernel.name!r} needs a compute capability from {kernel.capability} to {kernel.last} and "
            f"{kernel.dynamic_smem} bytes of shared memory; device {device} has {capability(device)} and {limit}"
        )
    shape = (grid, 1, 1) if isinstance(grid, int) else grid
    smem = kernel.dynamic_smem if smem is None else smem
    return Prepared(kernel, device, shape, threads or kernel.threads, smem, cluster, programmatic)


_functions: dict[tuple[Kernel, int], tuple[Any, ctypes.c_void_p]] = {}
_loading = threading.Lock()


def _load(kernel: Kernel, device: int) -> ctypes.c_void_p:
    """The kernel's function in the device's primary context, the one that the CUDA runtime and so CuPy use."""
    with _loading:
        found = _functions.get((kernel, device))
        if found is None:
            cubin = compiler.compile_kernel(kernel, compiler.architecture(capability(device)))
            with on_device(device):
                _make_context_current(device)
                # a kernel without a number of its own is given some at each launch: it may have all that the device has
                most = compiler.shared_memory_limit(capability(device)) - max(cubin.static_smem, 0)
                found = _from_cubin(cubin.code, kernel.entry, kernel.dynamic_smem or most)
            _functions[kernel, device] = found
    return found[1]


def _from_cubin(code: bytes, entry: str, dynamic_smem: int) -> tuple[Any, ctypes.c_void_p]:
    """The function ``entry`` of a cubin on the current device, its dynamic shared memory allowed: CuPy's RawKernel, which
    keeps it loaded, and the driver's handle."""
    # RawModule reads machine code from files alone, and remembers modules by path: the name has to belong to the content
    with tempfile.TemporaryDirectory(prefix="cufuse-") as folder, _driver.relaxed_capture():
        path = Path(folder) / f"{hashlib.sha256(code).hexdigest()}.cubin"
        path.write_bytes(code)
        function = _cupy().RawModule(path=str(path)).get_function(entry)
        function.max_dynamic_shared_size_bytes = dynamic_smem
        return function, ctypes.c_void_p(function.kernel.ptr)


def _make_context_current(device: int) -> None:
    """In a thread that has not used the GPU yet the driver knows no context; the runtime sets it on its first real call."""
    runtime = _cupy().cuda.runtime
    with _driver.relaxed_capture():
        runtime.setDevice(device)
        runtime.free(0)


_workspaces: dict[tuple[int, int, str], list[Any]] = {}
_growing = threading.Lock()


def workspace(device: int, size: int, purpose: str = "") -> int:
    """Pointer to at least ``size`` bytes that belong to CuPy's current stream on ``device``, others for each ``purpose``.

    Launches of one stream share it, one after the other. It only ever grows, from 1 MiB on (64 KiB for a thread's default stream),
    and outgrown ones are kept, as are those of threads (per-thread default streams) and streams that are gone: a captured graph
    holds their addresses. Graphs captured on one stream must therefore not be replayed at the same time as each other or as calls
    on that stream; nor graphs whose streams came one after the other, as CUDA gives the handle of a stream that is gone to the next
    one (50 of 50 on an H200): keep the streams.
    """
    cupy = _cupy()
    stream = current_stream()
    held = _workspaces.setdefault((device, stream, purpose), [])
    with _growing:  # two threads on one stream would each append a block, and take the other's smaller one
        block = held[-1] if held else None
        if block is None or block.nbytes < size:
            with _driver.relaxed_capture():
                block = cupy.empty(max(size, 2 * block.nbytes if block is not None else 1 << (20 if stream >= 0 else 16)), "u1")
            held.append(block)
    return int(block.data.ptr)


def temporary(shape: tuple[int, ...], dtype: Any, purpose: str) -> Any:
    """An array on the current device for what a call needs in between; ``purpose`` tells apart what it needs at the same time.

    From CuPy's pool; in a capture from the stream's ``workspace``, for the graph holds its address when the call is long over.
    """
    cupy = _cupy()
    if not cupy.cuda.get_current_stream().is_capturing():
        return cupy.empty(shape, dtype)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    device = current_device()
    memory = cupy.cuda.UnownedMemory(workspace(device, size, purpose), size, None, device)
    return cupy.ndarray(shape, dtype, memptr=cupy.cuda.MemoryPointer(memory, 0))


def contiguous(array: Any, purpose: str) -> Any:
    """The array itself where it is C-contiguous, else a copy as ``temporary`` makes it."""
    if array.flags.c_contiguous:
        return array
    code = np.dtype(f"u{array.itemsize}")  # bits as they are: CuPy copies bfloat16 and flushes nothing that way
    dense = temporary(array.shape, array.dtype, purpose)
    dense.view(code)[...] = array.view(code)
    return dense


_launching = threading.Lock()


def one_by_one(launches: Iterable[tuple[Prepared, bytes]]) -> None:
    """An operation's launches on the current stream, without another thread's between them: they share the workspace."""
    with _launching:
        for prepared, arguments in launches:
            prepared(arguments)


_COUNTER_BYTES = 4096
_counters: dict[tuple[int, int], Any] = {}


def counters(device: int) -> int:
    """Pointer to 4096 bytes of zeros that belong to CuPy's current stream on ``device``.

    For words by which the blocks of a launch find each other: a kernel leaves them as zeros again, so that the launches of a
    stream, one after the other, share them. As with ``workspace``, graphs captured on one stream must not run at the same time.
    """
    cupy = _cupy()
    key = (device, current_stream())
    if key not in _counters:
        with _making_counters:
            if key not in _counters:
                with _driver.relaxed_capture():
                    # not from the pool, where work of the block's former owner may still be to come
                    made = cupy.cuda.MemoryPointer(cupy.cuda.Memory(_COUNTER_BYTES), 0)
                    # on a stream of its own, so that a capture does not take it for a part of the graph
                    with cupy.cuda.Stream(non_blocking=True) as apart:
                        cupy.cuda.runtime.memsetAsync(made.ptr, 0, _COUNTER_BYTES, apart.ptr)
                        apart.synchronize()
                _counters[key] = made
    return int(_counters[key].ptr)


_making_counters = threading.Lock()
