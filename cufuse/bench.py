"""``cufuse bench``: the attention front on this machine's GPU beside cuBLAS and PyTorch, times and bits of one process.

Each column is captured in a CUDA graph of calls that go through distinct packed weights (1 GB in all, more than the L2 cache
holds); the graphs are replayed in turn, each turn in another random order, and the median over all replays is divided by the
number of calls. Outputs are poisoned, the graph is replayed once more, and what its last call gave is compared with eager PyTorch
bit by bit; without PyTorch with the emulation, where that takes no more than some seconds. ``columns`` of the JSON says what each
column computes.

JSON, schema 1::

    schema, complete        1; false where the run ended early (a lost GPU): the cells are those that were measured
    device                  name, capability, multiprocessors, l2_bytes, driver, cuda_driver, cublas
    versions, date, command packages; when it began (UTC); the command with every option
    recipe, recipes, repeat of cufuse, the first one and all; turns, each of two replays a column
    columns                 name -> what it computes
    absent                  name -> why this column is nowhere
    readers                 model -> threads, loads and blocks of the reading kernel that gave the floor
    notes                   what else has to be said
    cells[]                 model, hidden (K), rows (N), tokens (M), weights (calls of a graph, each with a weight of its own),
                            floor (microseconds), host_microseconds, allocated_bytes (asked of CuPy's pool by one call with out=),
                            seconds (spent on the cell), and
      columns               name -> microseconds (null: see note), least, most, replays; differing (of q, k and v together, null:
                            not compared), outputs, against ("eager", "emulation", null), note, failed
      ratios                cufuse and cufuse_static -> their time divided by that of cublas_gemm, torch_compile, floor;
                            cufuse:RECIPE, cufuse_static:RECIPE (further recipes) -> divided by that of cufuse, cufuse_static
    quantised[]             with --quantised: model, hidden, rows, tokens, seconds as above, and
      formats               "bf16" (recipe "torch") and the formats (recipe "block-scaled"), static weights -> microseconds and
                            the rest as in a column; bytes (of one packed weight); error (of the projection alone: root mean square
                            of the difference from the float64 product with the unquantised weight, over that product's); faster
                            (bf16's time divided by this one), needed (the project's goal on an H200, or null), met
"""

import datetime
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Final

from cufuse.bench_front import Front
from cufuse.bench_inputs import Layer
from cufuse.bench_machine import machine, versions
from cufuse.bench_quantised import Formats, QuantisedTable
from cufuse.bench_results import Cell, QuantisedCell, Results, one_line
from cufuse.bench_timing import Clock, LostGpuError
from cufuse.checkpoint import QWEN3
from cufuse.recipe import Recipe

MODELS: Final = {name.removeprefix("qwen3-"): config for name, config in QWEN3.items()}


@dataclass(frozen=True)
class Settings:
    """What to measure. models: keys of MODELS. recipes: the first one gives the columns "cufuse" and "cufuse_static".
    peer_seconds: after so many no more of PyTorch's forms are compiled. formats: of the quantised weights' table, quantised_tokens:
    its numbers of rows where they are others. front: whether the first table is measured."""

    models: tuple[str, ...]
    tokens: tuple[int, ...]
    recipes: tuple[Recipe, ...]
    repeat: int = 7
    peers: bool = True
    peer_seconds: float = 120.0
    formats: tuple[str, ...] = ()
    quantised_tokens: tuple[int, ...] | None = None
    front: bool = True

    @property
    def rows_of_formats(self) -> tuple[int, ...]:
        """Numbers of rows of the quantised weights' table; none without formats."""
        return (self.tokens if self.quantised_tokens is None else self.quantised_tokens) if self.formats else ()

    @property
    def command(self) -> str:
        """The command line that has these settings."""
        recipes = ",".join(recipe.name for recipe in self.recipes)
        words = ["cufuse bench", f"--model {','.join(self.models)} --tokens {','.join(map(str, self.tokens))}"]
        if self.front:
            peers = f"--peer-seconds {self.peer_seconds:g}" if self.peers else "--no-peers"
            words += [f"--recipe {recipes} --repeat {self.repeat} {peers}"]
        else:
            words += [f"--repeat {self.repeat} --only-quantised"]
        if self.formats:
            words.append(f"--quantised {','.join(self.formats)}")
        if self.quantised_tokens is not None:
            words.append(f"--quantised-tokens {','.join(map(str, self.quantised_tokens))}")
        return " ".join(words)


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
        self.done = 0
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        recipes = [recipe.name for recipe in settings.recipes]
        self.results = Results(machine(), versions(), date, settings.command, recipes, settings.repeat)
        self.clock = Clock()
        self.front = Front(settings, self.clock, self._show, self.results) if settings.front else None

    def measure(self) -> None:
        """All models and numbers of tokens."""
        for name in self.settings.models:
            before = self.done
            self._show(f"{name}: weights", 0.0)
            try:
                self._measure_model(name, Layer(MODELS[name], max(*self.settings.tokens, *self.settings.rows_of_formats, 1)))
            except LostGpuError:
                raise
            except Exception as error:
                self._give_up(name, error)
            self.done = before + self._cells_of_a_model()
            self._free()

    def _measure_model(self, name: str, layer: Layer) -> None:
        if self.front is not None:
            floor, read = self.front.floor(name, layer)
            for tokens in self.settings.tokens:
                cell = Cell(name, layer.hidden, layer.rows, tokens, floor=floor)
                self.results.cells.append(cell)
                self._measure_cell(cell, partial(self.front.measure, layer, cell, read))
                self.front.peers.forget()
        if self.settings.formats:
            formats = Formats(layer, self.settings.formats, lambda text: self._show(f"{name}: {text}", 0.0))
            table = QuantisedTable(self.clock, self.settings.repeat, self._show)
            for tokens in self.settings.rows_of_formats:
                quantised = QuantisedCell(name, layer.hidden, layer.rows, tokens)
                self.results.quantised.append(quantised)
                self._measure_cell(quantised, partial(table.measure, formats, quantised))

    def _measure_cell(self, cell: Cell | QuantisedCell, measure: Callable[[], None]) -> None:
        """One cell; what goes wrong stays in it, but for a lost GPU."""
        begin = time.monotonic()
        where = f"{cell.model}, {cell.tokens} tokens"
        try:
            measure()
        except LostGpuError as error:
            raise LostGpuError(f"{where}, {error}") from error
        except Exception as error:
            self._give_up(where, error)
        cell.seconds = round(time.monotonic() - begin, 2)
        self.done += 1
        self.keep(self.results)

    def _give_up(self, what: str, error: Exception) -> None:
        self.results.notes.append(f"{what}: given up, {type(error).__name__}: {one_line(error)}")
        self.clock.settle()

    def _free(self) -> None:
        import cupy

        cupy.get_default_memory_pool().free_all_blocks()

    def _cells_of_a_model(self) -> int:
        return (len(self.settings.tokens) if self.settings.front else 0) + len(self.settings.rows_of_formats)

    def _show(self, text: str, share: float) -> None:
        self.progress(text, (self.done + share) / (len(self.settings.models) * self._cells_of_a_model()))
