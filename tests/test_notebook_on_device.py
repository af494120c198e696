"""The way of notebook 06 through CuPy, on a stand-in: arrays that NumPy cannot read by accident, casts by the kernel's own text."""

import operator
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cufuse import _gpu_cast, launch
from tests import host_gpu
from tests.notebook_cells import FOLDER, demand_same_without_gpu

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to run a kernel's text on the host")

NOTEBOOK = FOLDER / "06_test_your_own_kernel.ipynb"


class Array(host_gpu.Array):
    """With the arithmetic of CuPy's arrays, which refuse to become NumPy's, and flush float32 subnormals to zero."""

    def __array__(self, *given: Any, **named: Any) -> Any:
        raise TypeError("Implicit conversion to a NumPy array is not allowed")

    def __getitem__(self, index: Any) -> "Array":
        return Array(self.host[index])

    def view(self, dtype: Any) -> "Array":
        return Array(self.host.view(dtype))

    def reshape(self, *shape: Any) -> "Array":
        return Array(super().reshape(*shape).host)

    def astype(self, dtype: Any) -> "Array":
        return Array(_flushed(self.host.astype(dtype)))


def _flushed(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.float32:
        return np.where(np.abs(values) < np.float32(2.0**-126), np.copysign(np.float32(0), values), values)
    return values


def _operator(compute: Callable[[Any, Any], Any], swapped: bool) -> Callable[[Array, Any], Array]:
    def apply(self: Array, other: Any) -> Array:
        if isinstance(other, np.ndarray):
            raise TypeError("a NumPy array beside one of CuPy's")
        pair = (self.host, other.host if isinstance(other, Array) else other)
        return Array(_flushed(compute(*reversed(pair) if swapped else pair)))

    return apply


for _name in ("add", "sub", "mul", "truediv"):
    setattr(Array, f"__{_name}__", _operator(getattr(operator, _name), False))
    setattr(Array, f"__r{_name}__", _operator(getattr(operator, _name), True))


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    for _ in host_gpu.installed(monkeypatch, host_gpu.HostGpu(tmp_path)):
        found: Any = sys.modules["cupy"]
        found.ndarray, found.float32, found.float64 = Array, np.float32, np.float64
        found.empty = lambda shape, dtype: Array(host_gpu.empty(shape, dtype).host)
        found.asarray = lambda array: Array(np.array(array))
        found.asnumpy = lambda array: np.array(array.host)
        found.sqrt = lambda array: Array(np.sqrt(array.host))
        monkeypatch.setattr(launch, "device_count", lambda: 1)
        if hasattr(_gpu_cast, "_plans"):
            monkeypatch.setattr(_gpu_cast, "_plans", {})
        yield found


def test_the_notebook_prints_the_same_through_cupy(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    demand_same_without_gpu(NOTEBOOK, monkeypatch)


def test_the_stand_in_refuses_what_cupy_refuses(cupy: Any) -> None:
    array = cupy.asarray(np.ones(2, np.float32))
    for wrong in (lambda: np.asarray(array), lambda: array * np.ones(2), lambda: np.float32(1) < array):
        with pytest.raises(TypeError):
            wrong()
    assert (array * np.float32(2.0**-127)).host.tolist() == [0.0, 0.0]
