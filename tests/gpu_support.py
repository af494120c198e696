"""What the tests on a GPU share: libraries imported late, inputs, comparison of bits on the GPU, and the count of outputs.

Importing this needs neither CuPy nor PyTorch. Arrays are compared where they are: a large result is never brought to the host.
"""

import concurrent.futures
import functools
import importlib
import multiprocessing
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cufuse import compiler, launch
from cufuse.bf16 import bfloat16, ulp_distance
from cufuse.compiler import Kernel
from tests.witnesses import UNSIGNED

MARKS = [
    pytest.mark.gpu,
    # of the libraries beside us; ours are errors
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
"""What every test module on a GPU is marked with."""

EPS = 1e-6

COMPARED: Counter[str] = Counter()
"""Outputs that were compared bit by bit and found equal, by area; tests.gpu_record writes it down."""


@functools.cache
def cupy() -> Any:
    return _import("cupy")


@functools.cache
def torch() -> Any:
    """PyTorch with a GPU; the test is skipped without."""
    found = _peer("torch")
    if not found.cuda.is_available():
        pytest.skip("PyTorch finds no GPU")
    return found


@functools.cache
def qwen3() -> Any:
    """Hugging Face's Qwen3 modules; the test is skipped without."""
    torch()
    return _peer("transformers.models.qwen3.modeling_qwen3")


def _peer(name: str) -> Any:
    try:
        return _import(name)
    except ImportError as error:
        pytest.skip(f"nothing to compare with: {error}")


def _import(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def to_gpu(value: Any) -> Any:
    """NumPy array, or a tuple of them, as CuPy arrays; anything else as it is. bfloat16 travels as its codes."""
    if isinstance(value, tuple):
        return tuple(map(to_gpu, value))
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == ml_dtypes.bfloat16:
        # ascontiguousarray gives an array without axes one
        return cupy().asarray(np.ascontiguousarray(value).reshape(value.shape).view(np.uint16)).view(bfloat16)
    return cupy().asarray(value)


def to_host(value: Any) -> np.ndarray:
    """CuPy array as a NumPy array."""
    return np.asarray(cupy().asnumpy(codes(value))).view(value.dtype)


def from_torch(tensor: Any) -> Any:
    """A tensor on the GPU as a CuPy array of the same memory."""
    return cupy().from_dlpack(tensor.detach())


def to_torch(array: Any) -> Any:
    """A CuPy array as a tensor of the same memory."""
    return torch().from_dlpack(array)


def values(shape: tuple[int, ...], seed: int, *, scale: float = 1.0, dtype: Any = bfloat16) -> Any:
    """Random CuPy array made on the GPU by PyTorch: a bell curve, about one value in 64 up to 256 times as large."""
    library = torch()
    generator = library.Generator(device="cuda").manual_seed(seed)
    x = library.randn(shape, generator=generator, device="cuda", dtype=library.float32) * scale
    raw = library.randint(0, 64 * 9, shape, generator=generator, device="cuda", dtype=library.int32)
    x = library.where(raw < 9, library.ldexp(x, raw), x)
    return from_torch(x.to(library.bfloat16) if dtype == bfloat16 else x)


def codes(array: Any) -> Any:
    """An array's bits as unsigned integers: a view, whatever the strides."""
    return array.view(UNSIGNED[array.dtype.itemsize])


def demand_same(area: str, found: Any, expected: Any, what: str) -> None:
    """0 differing bits of a CuPy array against a CuPy or NumPy array; counts the outputs, names the first difference.

    A float32 NaN counts as equal to any other: no recipe promises its bits. A bfloat16 NaN has to have the same.
    """
    gpu = cupy()
    if isinstance(expected, np.ndarray):
        expected = to_gpu(expected)
    assert found.dtype == expected.dtype, f"{what}: dtype {found.dtype}, expected {expected.dtype}"
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, expected {expected.shape}"
    differ = codes(found) != codes(expected)
    if found.dtype == np.float32:
        differ &= ~(gpu.isnan(found) & gpu.isnan(expected))
    count = int(gpu.count_nonzero(differ))
    if count:
        place = int(gpu.flatnonzero(differ)[0])
        pytest.fail(f"{what}: {count} of {found.size} differ, first at {_described(found, expected, place)}")
    COMPARED[area] += found.size


def _described(found: Any, expected: Any, place: int) -> str:
    where = tuple(int(i) for i in np.unravel_index(place, found.shape))
    one, other = (cupy().asnumpy(codes(array)[where].reshape(1)).view(array.dtype) for array in (found, expected))
    text = f"{where}: {codes(one)[0]:#x} ({one[0]}), expected {codes(other)[0]:#x} ({other[0]})"
    return text + (f", {int(ulp_distance(one, other)[0])} ulp apart" if found.dtype == bfloat16 else "")


class Guarded:
    """An output in the middle of a poisoned buffer: whatever is written beside it, or left out of it, is noticed."""

    POISON = 0xA5

    def __init__(self, shape: tuple[int, ...], dtype: Any, *, gap: int = 0, misplaced: int = 0) -> None:
        """gap : elements between rows (the last axis). misplaced : elements past an aligned address."""
        gpu = cupy()
        rows, columns = int(np.prod(shape[:-1])), shape[-1]
        stride = columns + gap
        self.buffer = gpu.empty(rows * stride + 512, dtype)
        self.buffer.view(np.uint8).fill(self.POISON)
        start = 256 + misplaced
        inside = gpu.zeros(self.buffer.size, bool)
        inside[start : start + rows * stride].reshape(rows, stride)[:, :columns] = True
        self.inside = inside
        block = self.buffer[start : start + rows * stride].reshape(rows, stride)[:, :columns]
        strides = [stride * block.itemsize, block.itemsize]
        for length in reversed(shape[1:-1]):
            strides.insert(0, strides[0] * length)
        self.out = gpu.lib.stride_tricks.as_strided(block, shape, strides[-len(shape) :])

    def demand_intact(self, what: str) -> None:
        """Nothing outside was written."""
        poison = int.from_bytes(bytes([self.POISON]) * self.buffer.itemsize, "little")
        touched = (codes(self.buffer) != poison) & ~self.inside
        assert not bool(touched.any()), f"{what}: memory beside the output was written, first at {cupy().flatnonzero(touched)[:1]}"


def captured(call: Any) -> Any:
    """A CUDA graph of what ``call`` launches, and the stream it was captured on. Called once before: that loads kernels."""
    gpu = cupy()
    call()
    stream = gpu.cuda.Stream(non_blocking=True)
    gpu.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        call()
        graph = stream.end_capture()
    return graph, stream


@dataclass(frozen=True)
class Case:
    """One comparison: ``call`` gives CuPy arrays (one, or a tuple), ``expected`` the same as CuPy or NumPy arrays."""

    what: str
    call: Callable[[], Any]
    expected: Callable[[], Any]


def against_numpy(what: str, function: Callable[..., Any], *arrays: Any, **options: Any) -> Case:
    """The same public call with CuPy and with NumPy arrays."""
    given = [to_gpu(array) for array in arrays]
    named = {name: to_gpu(value) for name, value in options.items()}
    return Case(what, functools.partial(function, *given, **named), functools.partial(function, *arrays, **options))


def given_by(function: Callable[..., Any], *arrays: Any) -> Any:
    """What a function of tensors gives for CuPy arrays, as CuPy arrays."""
    with torch().no_grad():
        found = function(*map(to_torch, arrays))
    return tuple(map(from_torch, found)) if isinstance(found, (tuple, list)) else from_torch(found)


def demand_cases(area: str, cases: Iterable[Case]) -> None:
    """Compare every case, after all their kernels were compiled at once."""
    listed = list(cases)
    rehearse(case.call for case in listed)
    for case in listed:
        found, expected = case.call(), case.expected()
        if not isinstance(found, tuple):
            found, expected = (found,), (expected,)
        for index, (one, other) in enumerate(zip(found, expected, strict=True)):
            demand_same(area, one, other, case.what if len(found) == 1 else f"{case.what}, result {index}")


class Nothing:
    """A launch.Prepared that launches nothing."""

    def __call__(self, arguments: bytes) -> None:
        pass

    def bound(self, arguments: bytes, stream: int) -> Callable[[], int]:
        return lambda: 0

    def clusters_at_once(self) -> int:
        return 66  # an H200's 132 multiprocessors in pairs


def rehearse(calls: Iterable[Callable[[], Any]]) -> None:
    """Compile what the calls would launch, on all cores: they are made once, with launches that do nothing."""
    launch.kernels()  # imports every module that launches
    ours = [module for name, module in sys.modules.items() if name.startswith("cufuse.")]
    prepared = [(module, cache) for module in ours for cache in ("_plans", "_calls") if hasattr(module, cache)]
    found: list[Kernel] = []

    def prepare(kernel: Kernel, *_: Any, **__: Any) -> Nothing:
        found.append(kernel)
        return Nothing()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "prepare", prepare)
        for module, cache in prepared:
            patch.setattr(module, cache, {})
        for call in calls:
            call()
    wanted = list(dict.fromkeys(found))
    target = compiler.architecture(launch.capability(0))
    if len(wanted) > 1:
        list(_compilers().map(_compile, wanted, [target] * len(wanted)))


@functools.cache
def _compilers() -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn"))


def _compile(kernel: Kernel, target: str) -> None:
    _import("cupy")  # the parent's NVRTC is CuPy's, and its version is in the cache's key
    try:
        compiler.compile_kernel(kernel, target)
    except compiler.KernelCompileError:
        return  # the test that launches it says so
