"""``cufuse bench`` without a GPU: arrays are NumPy's, so that the emulation computes, and a graph is a list of calls."""

import functools
import sys
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_stream, bench, bench_front, bench_inputs, cublaslt, launch
from cufuse._model_config import ModelConfig
from cufuse.bench_timing import Launch, Run

COMMAND = ["bench", "--model", "small", "--tokens", "1,3", "--repeat", "2", "--json", "b.json"]
SMALL = ModelConfig("qwen3", 128, 4, 2, 64, 1, 1e-6, 1e6)


class Clock:
    """cufuse.bench_timing.Clock on the host; ``spoil`` is called before every timed launch."""

    spoil: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self) -> None:
        self.stream = _Context()

    def capture(self, calls: Iterable[Callable[[], Any]]) -> Launch:
        listed = list(calls)

        def launch() -> None:
            for call in listed:
                call()

        return launch

    def time(self, run: Run) -> list[float]:
        (run.before or (lambda: None))()
        self.spoil()
        begin = time.perf_counter()
        run.launch()
        return [(time.perf_counter() - begin) * 1e6]

    def settle(self) -> None:
        pass


class _Context:
    def __enter__(self) -> "_Context":
        return self

    def __exit__(self, *_: object) -> None:
        pass


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path) -> types.ModuleType:
    """The stand-ins in place for one test, and one small model, without PyTorch and in ``folder``; returns the pretended CuPy."""
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "torch", None)
    cupy: Any = types.ModuleType("cupy")
    cupy.ndarray = type("ndarray", (), {})
    cupy.asarray, cupy.asnumpy, cupy.empty_like, cupy.count_nonzero = np.asarray, np.asarray, np.empty_like, np.count_nonzero
    cupy.empty = lambda shape, dtype: np.full(shape, 7, dtype)
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_all_blocks=lambda: None)

    cuda: Any = types.ModuleType("cupy.cuda")
    cuda.MemoryHook = _Context
    cupy.cuda = cuda
    for name, module in {"cupy": cupy, "cupy.cuda": cuda}.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(launch, "device_count", lambda: 1)
    monkeypatch.setattr(_gpu_stream, "read", lambda array, reader: None)
    monkeypatch.setattr(cublaslt, "k_slices", lambda m, n, k: 1)
    monkeypatch.setattr(bench, "Clock", Clock)
    monkeypatch.setattr(bench_front, "host_cost", functools.partial(bench_front.host_cost, calls=2, batches=1))
    monkeypatch.setattr(bench_front, "_gemm_call", lambda x, weight, out: lambda: None)
    monkeypatch.setattr(bench, "MODELS", {"small": SMALL, "other": SMALL})
    monkeypatch.setattr(bench, "machine", lambda: {"name": "pretended", "driver": "0.0"})
    monkeypatch.setattr(bench_inputs, "TOTAL_BYTES", 1 << 18)
    return cupy  # type: ignore[no-any-return]


def change_calls(monkeypatch: pytest.MonkeyPatch, change: Callable[[Callable[[], Any], dict[str, Any]], Any]) -> None:
    """Put ``change`` between the bench and the calls that it times, which are those with out=."""
    real = cufuse.rms_norm_qkv

    def changed(*arrays: Any, **options: Any) -> Any:
        return change(lambda: real(*arrays, **options), options) if "out" in options else real(*arrays, **options)

    monkeypatch.setattr(cufuse, "rms_norm_qkv", changed)
