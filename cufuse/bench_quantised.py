"""The second table of ``cufuse bench``: the front with its weights in the formats of GGUF, beside the same in bfloat16.

Everything as in the first table, but for its turns to warm up: CUDA graphs over distinct weights, replayed in turn. bf16 is recipe
"torch", the formats are "block-scaled", both with static weights. The error is that of the projection alone, of at most 64 rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

import cufuse
from cufuse import quantised
from cufuse.bench_front import captured, compare
from cufuse.bench_inputs import EPS, Block, Layer, distinct_weights, download, upload
from cufuse.bench_results import BF16, FormatMeasurement, QuantisedCell
from cufuse.bench_timing import Clock, LostGpuError, Run, in_turn
from cufuse.named_recipes import RECIPES
from cufuse.quantised import QuantisedWeight

_MOST_WEIGHTS: Final = 400
_MOST_ROWS_OF_ERROR: Final = 64
_MOST_EMULATED: Final = 6e7  # multiply-adds: some seconds of NumPy
_BASE, _QUANTISED = RECIPES["torch"], RECIPES["block-scaled"]


class Formats:
    """One model's weights in several formats."""

    def __init__(self, layer: Layer, formats: Sequence[str], show: Callable[[str], None]) -> None:
        self.layer = layer
        self.weights: dict[str, list[Any]] = {}
        self.errors: dict[str, Exception] = {}
        first = download(layer.weights[0])
        for name in formats:
            show(f"quantising to {name}")
            try:
                packed = quantised.quantise(first, name).packed()
                self.weights[name] = _turned(packed, min(distinct_weights(packed.nbytes), _MOST_WEIGHTS))
            except LostGpuError:
                raise
            except Exception as error:
                self.errors[name] = error.with_traceback(None)


class QuantisedTable:
    """Fills the cells of one model."""

    def __init__(self, clock: Clock, repeat: int, show: Callable[[str, float], None]) -> None:
        self.clock, self.repeat, self.show = clock, repeat, show

    def measure(self, formats: Formats, cell: QuantisedCell) -> None:
        """Times, errors and, where the emulation is quick, bits of all formats."""
        layer, exact = formats.layer, None
        blocks = {BF16: Block(layer, cell.tokens, _BASE)}
        blocks |= {name: Block(layer, cell.tokens, _QUANTISED, weights) for name, weights in formats.weights.items()}
        cell.formats = {name: FormatMeasurement() for name in (BF16, *formats.errors, *formats.weights)}
        for name, error in formats.errors.items():
            cell.formats[name].fail(error)
        normalised = cufuse.rms_norm(layer.tokens[: min(cell.tokens, _MOST_ROWS_OF_ERROR)], layer.norm, eps=EPS)
        runs: dict[str, Run] = {}
        for number, (name, block) in enumerate(blocks.items()):
            self.show(f"{cell.model}, {cell.tokens} tokens: {name}", 0.6 * number / len(blocks))
            with _Part(self.clock, cell.formats[name], name):
                cell.formats[name].bytes = int(block.weights[0].nbytes)
                exact = _exact(normalised, layer.weights[0]) if exact is None else exact
                cell.formats[name].error = _error(_projected(normalised, block.weights[0]), exact)
                run = captured(self.clock, block, {"static_weights": True})
                self.clock.settle()
                run.launch()
                self.clock.settle()
                runs[name] = run
        del exact
        self.show(f"{cell.model}, {cell.tokens} tokens: timing the formats", 0.7)
        for name, samples in in_turn(self.clock.time, runs, self.repeat).items():
            if samples.error is not None:
                cell.formats[name].fail(samples.error)
            elif samples.times:
                cell.formats[name].take(samples.times, blocks[name].calls)
        if math.prod((cell.tokens, cell.rows, cell.hidden)) <= _MOST_EMULATED:
            for number, (name, run) in enumerate(runs.items()):
                self.show(f"{cell.model}, {cell.tokens} tokens: bits of {name}", 0.8 + 0.2 * number / len(runs))
                if not cell.formats[name].failed:
                    with _Part(self.clock, cell.formats[name], name):
                        reference = tuple(map(upload, blocks[name].emulated(blocks[name].calls - 1)))
                        compare(self.clock, cell.formats[name], run, reference, "emulation")


class _Part:
    """What is done for one format: an error is noted there and ends nothing else, but for a lost GPU."""

    def __init__(self, clock: Clock, found: FormatMeasurement, name: str) -> None:
        self.clock, self.found, self.name = clock, found, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        self.found.fail(error)
        try:
            if isinstance(error, LostGpuError):
                raise error
            self.clock.settle()
        except LostGpuError as lost:
            raise LostGpuError(f"{self.name}: {lost}") from lost
        return True


def _turned(packed: QuantisedWeight, count: int) -> list[QuantisedWeight]:
    """``count`` packed weights on the GPU with the tiles of one, each beginning with another: other memory, the same work."""
    import cupy

    first = upload(packed.data)
    found = [first]
    for number in range(1, count):
        start = number % len(first)
        other = cupy.empty_like(first)
        other[: len(first) - start] = first[start:]
        other[len(first) - start :] = first[:start]
        found.append(other)
    return [QuantisedWeight(data, packed.format, packed.shape, packed.layout) for data in found]


def _projected(normalised: Any, weight: Any) -> Any:
    if isinstance(weight, QuantisedWeight):
        return cufuse.quantised_linear(normalised, weight, recipe=_QUANTISED)
    return cufuse.linear(normalised, weight, recipe=_BASE)


def _exact(normalised: Any, weight: Any) -> Any:
    """The float64 product of bfloat16 arrays, on their own device."""
    return _wide(normalised) @ _wide(weight).T


def _error(found: Any, exact: Any) -> float:
    """Root mean square of the difference over that of ``exact``."""
    return float((((_wide(found) - exact) ** 2).mean() / (exact**2).mean()) ** 0.5)


def _wide(array: Any) -> Any:
    return array.astype(np.float32).astype(np.float64)
