"""The table of ``cufuse bench``: the attention front of cufuse, under one recipe or several, beside its peers, cell by cell."""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np

import cufuse
from cufuse.bench_inputs import Block, Layer, differing, poison, upload
from cufuse.bench_peers import OTHERS, Peers, TorchBlock
from cufuse.bench_results import COLUMNS, CUFUSE, EAGER, GEMM, STATIC, Cell, Measurement, Results, column_of
from cufuse.bench_timing import WARM_SECONDS, Clock, LostGpuError, Run, allocated, host_cost, in_turn
from cufuse.recipe import Recipe

if TYPE_CHECKING:
    from cufuse.bench import Settings

_FLOOR_TURNS: Final = 5
_MOST_EMULATED: Final = 1.2e9  # multiply-adds: about two seconds of NumPy
_CALL_MICROSECONDS: Final = 25.0  # of Python, at the most, for a call that is not in a graph

Show = Callable[[str, float], None]
"""Gets what is being done, and the share of a cell that is done."""


class Front:
    """All columns but those of quantised weights."""

    def __init__(self, settings: "Settings", clock: Clock, show: Show, results: Results) -> None:
        self.settings, self.clock, self.show, self.results = settings, clock, show, results
        show("importing the peers", 0.0)
        self.peers = Peers(OTHERS if settings.peers else ())
        self.peer_seconds = settings.peer_seconds
        absent = dict(self.peers.absent)
        self.ours: dict[str, tuple[Recipe, dict[str, bool]]] = {}
        modes: dict[str, dict[str, bool]] = {CUFUSE: {}, STATIC: {"static_weights": True}}
        for number, recipe in enumerate(settings.recipes):
            for name, options in modes.items():
                self.ours[column_of(name, recipe.name) if number else name] = (recipe, options)
        if not settings.peers:
            absent |= dict.fromkeys(OTHERS, "--no-peers")
        if self.peers.torch is None:
            absent.pop(GEMM, None)  # CuPy calls it
        results.absent = {name: absent[name] for name in COLUMNS if name in absent}

    def measure(self, layer: Layer, cell: Cell, read: Run) -> None:
        """Fill a cell; ``read``: the reading kernel's graph that gave its floor."""
        blocks = {recipe: Block(layer, cell.tokens, recipe) for recipe in self.settings.recipes}
        first = blocks[self.settings.recipes[0]]
        cell.weights = first.calls
        torch_block = None if self.peers.torch is None else self.peers.block(first)
        lost = False
        try:
            runs = self._runs(cell, blocks, torch_block, read)
            self.show(f"{cell.model}, {cell.tokens} tokens: timing", 0.7)
            for name, samples in in_turn(self.clock.time, runs, self.settings.repeat, WARM_SECONDS).items():
                if samples.error is not None:
                    cell.columns[name].fail(samples.error)
                elif samples.times:
                    cell.columns[name].take(samples.times, first.calls)
            self.show(f"{cell.model}, {cell.tokens} tokens: bits", 0.9)
            reference = torch_block.reference() if torch_block is not None and EAGER in runs else None
            self._bits(cell, runs, blocks, reference)
            if not cell.columns[CUFUSE].failed:
                self.clock.settle()
                with self.clock.stream:
                    cell.allocated_bytes = allocated(partial(first.call, 0))
                    indices = itertools.cycle(range(first.calls))
                    cell.host_microseconds = host_cost(lambda: first.call(next(indices)), self.clock.settle)
            self.clock.settle()
        except LostGpuError:
            lost = True  # and no call to it may ever return
            raise
        finally:
            if torch_block is not None and not lost:
                torch_block.release()

    def _runs(self, cell: Cell, blocks: dict[Recipe, Block], torch_block: TorchBlock | None, read: Run) -> dict[str, Run]:
        """All columns that can be made ready, in the order in which they are shown."""
        runs: dict[str, Run] = {}
        prepare = partial(self._prepare, cell, runs)
        for name, (recipe, options) in self.ours.items():
            prepare(name, partial(captured, self.clock, blocks[recipe], options))
        if torch_block is None:
            prepare(GEMM, partial(self._gemm_by_cupy, blocks[self.settings.recipes[0]], read, cell))
        else:
            for name in self.peers.names:
                prepare(name, partial(torch_block.run, name, self.clock))
        return {name: runs[name] for name in self.results.columns if name in runs}

    def _prepare(self, cell: Cell, runs: dict[str, Run], name: str, make: Callable[[], Run]) -> None:
        """A column made ready and replayed once, so that a kernel that breaks the GPU does it under its own name."""
        self.show(f"{cell.model}, {cell.tokens} tokens: {name}", 0.6 * len(runs) / len(self.results.columns))
        cell.columns[name] = Measurement()
        if name in OTHERS and self.peer_seconds <= 0:
            cell.columns[name].note = f"left out, the {self.settings.peer_seconds:g} s of --peer-seconds were spent"
            return
        begin = time.monotonic()
        try:
            made = make()
            self.clock.settle()
            made.launch()
            self.clock.settle()
            runs[name] = made
        except LostGpuError as error:
            cell.columns[name].fail(error)
            raise LostGpuError(f"{name}: {error}") from error
        except Exception as error:
            cell.columns[name].fail(error)
            self._settle(name)
        if name in OTHERS:
            self.peer_seconds -= time.monotonic() - begin

    def _gemm_by_cupy(self, block: Block, read: Run, cell: Cell) -> Run:
        """CuPy's cuBLAS, which cannot be captured: calls queued behind enough reading to hide Python's time."""
        import cupy

        out = cupy.empty((cell.tokens, cell.rows), cufuse.bfloat16)
        products = [_gemm_call(block.x, weight, out) for weight in block.weights[: block.calls]]
        cell.columns[GEMM].note = "CuPy's cuBLAS, which refuses capture: calls one by one, queued, without a graph"
        reading = (cell.floor or 1.0) * len(block.weights)
        turns = math.ceil(_CALL_MICROSECONDS * block.calls / reading) + 1

        def launch() -> None:
            with self.clock.stream:
                for product in products:
                    product()

        def before() -> None:
            for _ in range(turns):
                read.launch()

        return Run(launch, before=before)

    def floor(self, model: str, layer: Layer) -> tuple[float, Run]:
        """Microseconds in which one packed weight is read, by the quickest reader, and that reader's graph."""
        from cufuse import _gpu_stream

        self.show(f"{model}: streaming floor", 0.0)
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

    def _bits(self, cell: Cell, runs: dict[str, Run], blocks: dict[Recipe, Block], reference: tuple[Any, ...] | None) -> None:
        """Bits of every column against eager's; without them those of cufuse against the emulation's of the column's own recipe."""
        emulated: dict[Recipe, tuple[Any, ...]] = {}
        for name, one in runs.items():
            found = cell.columns[name]
            if not one.outputs or found.failed:
                continue
            try:
                if reference is not None:
                    compare(self.clock, found, one, reference, "eager")
                elif name in self.ours and math.prod((cell.tokens, cell.rows, cell.hidden)) <= _MOST_EMULATED:
                    recipe = self.ours[name][0]
                    if recipe not in emulated:
                        emulated[recipe] = tuple(map(upload, blocks[recipe].emulated(blocks[recipe].calls - 1)))
                    compare(self.clock, found, one, emulated[recipe], "emulation")
            except LostGpuError as error:
                raise LostGpuError(f"{name}: {error}") from error
            except Exception as error:
                found.fail(error)
                self._settle(name)

    def _settle(self, name: str) -> None:
        try:
            self.clock.settle()
        except LostGpuError as error:
            raise LostGpuError(f"{name}: {error}") from error


def captured(clock: Clock, block: Block, options: dict[str, bool]) -> Run:
    """All calls of a block as a graph, their kernels compiled and loaded before."""
    block.call(0, **options)
    graph = clock.capture(partial(block.call, index, **options) for index in range(block.calls))
    return Run(graph, outputs=block.out)


def compare(clock: Clock, found: Measurement, run: Run, reference: tuple[Any, ...], against: str) -> None:
    """Bits of one column: outputs poisoned, the whole graph replayed, the last call's outputs compared."""
    poison(run.outputs)
    clock.settle()
    run.launch()
    clock.settle()
    found.differing = differing(run.outputs, reference)
    found.outputs, found.against = sum(array.size for array in reference), against


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
