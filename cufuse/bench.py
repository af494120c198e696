"""``cufuse bench``: the attention front on this machine's GPU beside cuBLAS and PyTorch, times and bits of one process.

Each column is captured in a CUDA graph of calls that go through distinct packed weights (1 GB in all, more than the L2 cache
holds); the graphs are replayed in turn, and the median over all replays is divided by the number of calls. Outputs are poisoned,
the graph is replayed once more, and what its last call gave is compared with eager PyTorch bit by bit; without PyTorch with the
emulation, where that takes no more than some seconds. ``columns`` of the JSON says what each column computes.

JSON, schema 1::

    schema, complete        1; false where the run ended early (a lost GPU): the cells are those that were measured
    device                  name, capability, multiprocessors, l2_bytes, driver, cuda_driver, cublas
    versions, date, command packages; when it began (UTC); the command with every option
    recipe, repeat          of cufuse; turns, each of two replays a column
    columns                 name -> what it computes
    absent                  name -> why this column is nowhere
    readers                 model -> threads, loads and blocks of the reading kernel that gave the floor
    notes                   what else has to be said
    cells[]                 model, hidden (K), rows (N), tokens (M), weights (calls of a graph, each with a weight of its own),
                            floor (microseconds), host_microseconds, allocated_bytes (asked of CuPy's pool by one call with out=),
                            seconds (spent on the cell), and
      columns               name -> microseconds (null: see note), least, most, replays; differing (of q, k and v together, null:
                            not compared), outputs, against ("eager", "emulation", null), note, failed
      ratios                cufuse and cufuse_static -> their time divided by that of cublas_gemm, torch_compile, floor
"""

import datetime
import importlib.metadata
import inspect
import itertools
import math
import re
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

import cufuse
from cufuse.bench_inputs import Block, Layer, differing, poison, upload
from cufuse.bench_peers import OTHERS, Peers
from cufuse.bench_results import COLUMNS, CUFUSE, EAGER, GEMM, STATIC, Cell, Measurement, Results
from cufuse.bench_timing import Clock, LostGpuError, Run, Samples, allocated, host_cost, in_turn
from cufuse.checkpoint import QWEN3
from cufuse.recipe import Recipe

MODELS: Final = {name.removeprefix("qwen3-"): config for name, config in QWEN3.items()}

_FLOOR_TURNS: Final = 5
_MOST_EMULATED: Final = 1.2e9  # multiply-adds: about two seconds of NumPy
_CALL_MICROSECONDS: Final = 25.0  # of Python, at the most, for a call that is not in a graph
_PACKAGES: Final = ("numpy", "ml_dtypes", "cupy-cuda12x", "cupy-cuda13x", "torch", "triton", "transformers", "liger-kernel")


@dataclass(frozen=True)
class Settings:
    """What to measure. models: keys of MODELS. peer_seconds: after so many no more of PyTorch's forms are compiled."""

    models: tuple[str, ...]
    tokens: tuple[int, ...]
    recipe: Recipe
    repeat: int = 7
    peers: bool = True
    peer_seconds: float = 120.0

    @property
    def command(self) -> str:
        """The command line that has these settings."""
        options = f"--model {','.join(self.models)} --tokens {','.join(map(str, self.tokens))} --recipe {self.recipe.name}"
        peers = f"--peer-seconds {self.peer_seconds:g}" if self.peers else "--no-peers"
        return f"cufuse bench {options} --repeat {self.repeat} {peers}"


def run(
    settings: Settings,
    progress: Callable[[str, float], None] = lambda text, done: None,
    keep: Callable[[Results], None] = lambda results: None,
) -> Results:
    """Measure everything. ``keep`` is called after every cell with what there is so far. Raises NoGpuError without a GPU."""
    from cufuse import launch

    launch.device_count()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers
        bench = _Bench(settings, progress, keep)
        try:
            bench.measure()
            bench.results.complete = True
        except LostGpuError as error:
            bench.results.notes.append(f"the GPU was lost: {error}; what comes after needs a new process")
    keep(bench.results)
    return bench.results


class _Bench:
    def __init__(self, settings: Settings, progress: Callable[[str, float], None], keep: Callable[[Results], None]) -> None:
        self.settings, self.progress, self.keep = settings, progress, keep
        progress("importing the peers", 0.0)
        self.clock = Clock()
        self.peers = Peers(OTHERS if settings.peers else ())
        self.peer_seconds = settings.peer_seconds
        self.ours: dict[str, dict[str, bool]] = {CUFUSE: {}}
        absent = dict(self.peers.absent)
        if "static_weights" in inspect.signature(cufuse.rms_norm_qkv).parameters:
            self.ours[STATIC] = {"static_weights": True}
        else:
            absent[STATIC] = "this cufuse.rms_norm_qkv has no static_weights"
        if not settings.peers:
            absent |= dict.fromkeys(OTHERS, "--no-peers")
        if self.peers.torch is None:
            absent.pop(GEMM, None)  # CuPy calls it
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.results = Results(
            machine(), versions(), date, settings.command, settings.recipe.name, settings.repeat, _ordered(absent)
        )
        self.done = 0

    def measure(self) -> None:
        """All models and numbers of tokens."""
        for name in self.settings.models:
            self._show(f"{name}: weights", 0.0)
            try:
                layer = Layer(MODELS[name], max(self.settings.tokens))
                floor = self._floor(name, layer)
            except LostGpuError:
                raise
            except Exception as error:
                self._give_up(name, error)
                self.done += len(self.settings.tokens)
                continue
            for tokens in self.settings.tokens:
                begin = time.monotonic()
                cell = Cell(name, layer.hidden, layer.rows, tokens, floor=floor[0])
                self.results.cells.append(cell)
                try:
                    self._measure_cell(cell, layer, floor[1])
                except LostGpuError as error:
                    raise LostGpuError(f"{name}, {tokens} tokens, {error}") from error
                except Exception as error:
                    self._give_up(f"{name}, {tokens} tokens", error)
                cell.seconds = round(time.monotonic() - begin, 2)
                self.done += 1
                self.peers.forget()
                self.keep(self.results)
            del layer, floor
            self._free()

    def _measure_cell(self, cell: Cell, layer: Layer, read: Run) -> None:
        block = Block(layer, cell.tokens, self.settings.recipe)
        cell.weights = block.calls
        runs: dict[str, Run] = {}
        prepare = partial(self._prepare, cell, runs)
        for name, options in self.ours.items():
            prepare(name, partial(self._our_run, block, options))
        reference: tuple[Any, ...] | None = None
        if self.peers.torch is None:
            prepare(GEMM, partial(self._gemm_by_cupy, block, read, cell))
        else:
            torch_block = self.peers.block(block)
            for name in self.peers.names:
                prepare(name, partial(torch_block.run, name, self.clock))
            if EAGER in runs:
                reference = torch_block.reference()
        self._show(f"{cell.model}, {cell.tokens} tokens: timing", 0.7)
        order = {name: runs[name] for name in COLUMNS if name in runs}
        for name, samples in in_turn(self.clock.time, order, self.settings.repeat).items():
            self._note_time(cell.columns[name], samples, block.calls)
        self._show(f"{cell.model}, {cell.tokens} tokens: bits", 0.9)
        if reference is not None:
            self._compare(cell, order, reference, "eager")
        elif math.prod((cell.tokens, cell.rows, cell.hidden)) <= _MOST_EMULATED:
            self._compare(cell, order, tuple(map(upload, block.emulated(block.calls - 1))), "emulation")
        if not cell.columns[CUFUSE].failed:
            self.clock.settle()
            with self.clock.stream:
                cell.allocated_bytes = allocated(partial(block.call, 0))
                indices = itertools.cycle(range(block.calls))
                cell.host_microseconds = host_cost(lambda: block.call(next(indices)), self.clock.settle)

    def _prepare(self, cell: Cell, runs: dict[str, Run], name: str, make: Callable[[], Run]) -> None:
        """A column made ready; what goes wrong stays its own."""
        self._show(f"{cell.model}, {cell.tokens} tokens: {name}", 0.6 * len(runs) / len(COLUMNS))
        cell.columns[name] = Measurement()
        if name in OTHERS and self.peer_seconds <= 0:
            cell.columns[name].note = f"left out, the {self.settings.peer_seconds:g} s of --peer-seconds were spent"
            return
        begin = time.monotonic()
        try:
            runs[name] = make()
            self.clock.settle()
        except LostGpuError as error:
            _fail(cell.columns[name], error)
            raise LostGpuError(f"{name}: {error}") from error
        except Exception as error:
            _fail(cell.columns[name], error)
            self.clock.settle()
        if name in OTHERS:
            self.peer_seconds -= time.monotonic() - begin

    def _our_run(self, block: Block, options: dict[str, bool]) -> Run:
        block.call(0, **options)
        graph = self.clock.capture(partial(block.call, index, **options) for index in range(block.calls))
        return Run(graph, outputs=block.out)

    def _gemm_by_cupy(self, block: Block, read: Run, cell: Cell) -> Run:
        """CuPy's cuBLAS, which cannot be captured: calls queued behind enough reading to hide Python's time."""
        import cupy

        out = cupy.empty((cell.tokens, cell.rows), cufuse.bfloat16)
        products = [_gemm_call(block.x, weight, out) for weight in block.layer.weights[: block.calls]]
        cell.columns[GEMM].note = "CuPy's cuBLAS, which refuses capture: calls one by one, queued, without a graph"
        reading = (cell.floor or 1.0) * len(block.layer.weights)
        turns = math.ceil(_CALL_MICROSECONDS * block.calls / reading) + 1

        def launch() -> None:
            for product in products:
                product()

        def before() -> None:
            for _ in range(turns):
                read.launch()

        return Run(launch, before=before)

    def _floor(self, model: str, layer: Layer) -> tuple[float, Run]:
        """Microseconds in which one packed weight is read, by the quickest reader, and that reader's graph."""
        from cufuse import _gpu_stream

        self._show(f"{model}: streaming floor", 0.0)
        runs = {}
        for reader in _gpu_stream.READERS:
            calls = [partial(_gpu_stream.read, weight, reader) for weight in layer.weights]
            calls[0]()
            runs[f"{reader.threads} threads, {reader.loads} loads, {reader.blocks} blocks"] = Run(self.clock.capture(calls))
        found = {name: one for name, one in in_turn(self.clock.time, runs, _FLOOR_TURNS).items() if one.times}
        medians = {name: statistics.median(one.times) / len(layer.weights) for name, one in found.items()}
        best = min(medians, key=lambda name: medians[name])
        self.results.readers[model] = best
        return medians[best], runs[best]

    def _note_time(self, one: Measurement, samples: Samples, calls: int) -> None:
        if samples.error is not None:
            _fail(one, samples.error)
        elif samples.times:
            one.microseconds = statistics.median(samples.times) / calls
            one.least, one.most, one.replays = min(samples.times) / calls, max(samples.times) / calls, len(samples.times)

    def _compare(self, cell: Cell, runs: dict[str, Run], reference: tuple[Any, ...], against: str) -> None:
        """Bits of every column: outputs poisoned, the whole graph replayed, the last call's outputs compared."""
        for name, one in runs.items():
            found = cell.columns[name]
            if not one.outputs or found.failed:
                continue
            try:
                poison(one.outputs)
                self.clock.settle()
                one.launch()
                self.clock.settle()
                found.differing = differing(one.outputs, reference)
                found.outputs, found.against = sum(array.size for array in reference), against
            except LostGpuError as error:
                raise LostGpuError(f"{name}: {error}") from error
            except Exception as error:
                _fail(found, error)
                self.clock.settle()

    def _give_up(self, what: str, error: Exception) -> None:
        self.results.notes.append(f"{what}: given up, {type(error).__name__}: {_line(error)}")
        self.clock.settle()

    def _free(self) -> None:
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()

    def _show(self, text: str, share: float) -> None:
        self.progress(text, (self.done + share) / (len(self.settings.models) * len(self.settings.tokens)))


def _gemm_call(x: Any, weight: Any, out: Any) -> Callable[[], None]:
    """x weight^T into out through CuPy's cuBLAS: column-major out^T = op_T(weight^T) x^T."""
    import cupy
    from cupy.cuda import cublas

    (m, k), n = x.shape, weight.shape[0]
    one, zero = np.array(1, np.float32), np.array(0, np.float32)
    bf16, float32, automatic = cupy.cuda.runtime.CUDA_R_16BF, cublas.CUBLAS_COMPUTE_32F, -1
    handle = cupy.cuda.device.get_cublas_handle()

    def call() -> None:
        cublas.gemmEx(
            handle, cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, n, m, k, one.ctypes.data, weight.data.ptr, bf16, k,
            x.data.ptr, bf16, k, zero.ctypes.data, out.data.ptr, bf16, n, float32, automatic,
        )  # fmt: skip

    return call


def _fail(one: Measurement, error: Exception) -> None:
    one.note, one.failed = f"{type(error).__name__}: {_line(error)}", True
    one.microseconds = one.differing = None


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _ordered(absent: dict[str, str]) -> dict[str, str]:
    return {name: absent[name] for name in COLUMNS if name in absent}


def machine() -> dict[str, Any]:
    """The GPU, its driver and cuBLAS."""
    import cupy

    from cufuse import cublaslt, launch

    device = launch.current_device()
    properties = cupy.cuda.runtime.getDeviceProperties(device)
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.\d+[.\d]*)", driver.read_text()) if driver.exists() else None
    try:
        cublas = str(cublaslt.version())
    except cublaslt.CublasLtError as error:
        cublas = f"unknown ({error})"
    return {
        "name": properties["name"].decode(),
        "capability": launch.capability(device),
        "multiprocessors": launch.multiprocessors(device),
        "l2_bytes": int(properties["l2CacheSize"]),
        "driver": found.group(1) if found else "unknown",
        "cuda_driver": int(cupy.cuda.runtime.driverGetVersion()),
        "cublas": cublas,
    }


def versions() -> dict[str, str]:
    """Versions of cufuse and of the packages that take part."""
    found = {"cufuse": cufuse.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
