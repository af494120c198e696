"""What a block of a few rows spends its time on, measured on a GPU: python3 -m tests.gpu_timeline --model 8b --tokens 1,16,64

Marks are put into a copy of the kernels' texts: one thread of each CTA writes the GPU's nanosecond timer (an H200's goes in steps
of 32) at its start, behind each wait, and when its results are stored. Blocks run one behind the other in a CUDA graph, over
distinct weights of 1 GB. Times are microseconds from the moment at which the first CTA knew that all kernels in front have ended;
means over the graph's blocks of the first, the median and the last CTA. The marks take little time
(0.6B, one and 16 rows: 4.21 and 4.79 us with them, 4.19 and 4.65 without, in other runs).
``--form Q4_0`` takes quantised weights, ``--static`` static ones. Where the norm has a launch of its own it is marked too.
"""

import argparse
import shutil
import statistics
import struct
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from rich import box
from rich.console import Console
from rich.table import Table

from cufuse import compiler, launch
from cufuse.bench import MODELS
from cufuse.bench_inputs import Block, Layer
from cufuse.bench_quantised import Formats
from cufuse.bench_timing import Clock, Run
from cufuse.named_recipes import RECIPES
from cufuse.quantised import FORMATS

SLOTS: Final = 8
"""Marks of a CTA."""
_CTAS: Final = 4096
_MOST_ROWS: Final = 64
_ALIGNMENT: Final = 64
"""Of a structure of arguments that has tensor maps, and so of its size."""
_MARK: Final = f"""
static __device__ __forceinline__ void mark(unsigned long long* times, int event) {{
    if (threadIdx.x != 0) return;
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    times[(blockIdx.x + (unsigned long long)gridDim.x * blockIdx.y) * {SLOTS} + event] = now;
}}
"""
_MEMBER: Final = "    unsigned long long* times;\n"
_IN_FRONT_ENDED: Final = 1
_IN_FRONT: Final = ("starts", "kernels in front ended", "rows ready", "first weights there")
_EVENTS: Final = {
    "rms_norm_linear_sm90": (*_IN_FRONT, "last weights there", "products stored"),
    "quantised_row_sm90": (*_IN_FRONT, "", "products stored"),
    "quantised_wgmma_sm90": (*_IN_FRONT[:2], "", "first weights there", "products made", "products stored"),
    "quantised_linear_sm90": (*_IN_FRONT[:2], "", "first weights there", "products made", "products stored"),
    "rms_norm": ("starts", "kernels in front ended", "stored"),
    "heads": ("starts", "products may be read", "stored"),
}  # fmt: skip
# behind which text of a kernel which event is marked, or in front of which ("^")
_PLACES: Final = {
    "rms_norm_linear_sm90": (
        ("extern __shared__ __align__(1024) unsigned char memory[];\n", 0),
        ("    wait_for_previous_kernel();\n^#if ROWS > 1\n    normalise", 1),
        ("    if (warp < CONSUMERS / 32) sync_threads(BARRIERS_THERE, 32 + CONSUMERS);\n#endif\n", 2),
        ("            barrier_wait(full + place.slot * 8, place.parity);\n", "stage == 0 ? 3 : 4"),
        ("            output.store_rows<TILE_N>(0, row, tile * TILE_N, c, lane);\n        });\n", 5),
        ("    __syncwarp();\n    parts.finish();\n", 5),
    ),
    "quantised_row_sm90": (
        ("extern __shared__ __align__(1024) unsigned char memory[];\n", 0),
        ("        wait_for_previous_kernel();\n^#if ROWS == 1\n        row.read", 1),
        ("    __syncthreads();\n^#if CLUSTER > 0\n    wait_for_cluster();", 2),
        ("            barrier_wait(share.barriers + place.slot * 8, place.parity);\n", "left == count && round == 0 ? 3 : 6"),
        ("^#if CLUSTER > 0\n    if (multiplies) parts.finish();", 5),
    ),
    "quantised_wgmma_sm90": (
        ("^    let_next_kernel_begin();\n    if (brings)", 0),
        ("    wait_for_previous_kernel();\n", 1),
        ("        if (share < a.slices) consumer.begin_loading();\n", 3),
        ("^        // the last round's by all", 4),
        ("a.pairs}, c, tile * 16, token, lane);\n        }\n", 5),
    ),
    "quantised_linear_sm90": (
        ("^    let_next_kernel_begin();\n", 0),
        ("    wait_for_previous_kernel();\n", 1),
        ("                if (count > 0) barrier_wait(stream.barriers + place.slot * 8, place.parity);\n", "offset == 0 ? 3 : 6"),
        ("^            float4* sums = (float4*)(memory + a.sums_at)", 4),
        ("acc, tile * 16, first_token, lane);\n", 5),
    ),
    "rms_norm": (
        ("^    if (a.next_begins_early) let_next_kernel_begin();\n", 0),
        ("    wait_for_previous_kernel();\n^    if (!a.next", 1),
        ("    normalise_in_registers(a, thread, place);\n", 2),
        ("    normalise_in_shared_memory(a, thread, row, place);\n", 2),
    ),
    "heads": (
        ("^    let_next_kernel_begin();\n", 0),
        ("    wait_for_previous_kernel();\n^    if (!works", 1),
        ("a.eps).write(target + i * to.head);\n", 2),
    ),
}


def marked(entry: str, text: str) -> str:
    """The kernel's text with its marks; ValueError where it is no longer as they expect it."""
    start = text.index("struct Arguments {")
    end = text.index("};", start)
    text = f"{text[:end]}{_MEMBER}{text[end:]}"
    for place, event in _PLACES[entry]:
        found = place.replace("^", "")
        if text.count(found) != 1:
            raise ValueError(f"{entry}: {text.count(found)} times {found!r}; a mark needs it once")
        before, _, after = place.rpartition("^") if "^" in place else (found, "", "")
        text = text.replace(found, f"{before}    mark(a.times, {event});\n{after}")
    return text


@contextmanager
def marked_kernels() -> Iterator[Path]:
    """A copy of the kernels with marks, compiled in the place of theirs."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
        kernels = Path(folder, "kernels")
        shutil.copytree(compiler.source_folder(), kernels)
        for entry in _PLACES:
            path = kernels / f"{entry}.cu"
            path.write_text(marked(entry, path.read_text(encoding="utf-8")), encoding="utf-8")
        header = kernels / "launches.cuh"
        header.write_text(header.read_text(encoding="utf-8") + _MARK, encoding="utf-8")
        patched.setattr(compiler, "source_folder", lambda: kernels)
        yield kernels


class Marks:
    """Where the launches of each call of a graph write: [calls, CTAs, SLOTS] of each marked kernel."""

    def __init__(self, calls: int) -> None:
        import cupy

        self.call, self.grids = 0, dict[str, int]()
        self.times = {entry: cupy.zeros((calls, _CTAS, SLOTS), np.uint64) for entry in _PLACES}

    def add(self, prepared: Any, arguments: bytes) -> bytes:
        """The arguments with the place of this call's times."""
        kernel = prepared.kernel
        if kernel.entry not in self.times:
            return arguments
        grid = prepared._shape[0]
        self.grids[kernel.entry] = grid[0] * grid[1]
        place = self.times[kernel.entry][self.call].data.ptr
        # what the heads of a cluster need ends with eight bytes of padding here
        padded = kernel.entry == "rms_norm_linear_sm90" and dict(kernel.defines)["CLUSTER"] > 0
        if self.grids[kernel.entry] > _CTAS:
            raise ValueError(f"{kernel.name}: {self.grids[kernel.entry]} CTAs, and there is room for the marks of {_CTAS}")
        packed = (arguments[:-8] if padded else arguments) + struct.pack("P", place)
        return packed + bytes(-len(packed) % _ALIGNMENT)


def require_products(launched: Collection[str], rows: int) -> None:
    """SystemExit where no marked kernel has multiplied: what stands in front of the products and behind them would not say why."""
    if not set(launched) - {"heads", "rms_norm"}:
        raise SystemExit(f"{rows} rows of these weights go to kernels without marks; take fewer")


def measure(block: Block, clock: Clock, static: bool) -> tuple[float, dict[str, np.ndarray]]:
    """Microseconds of a block, and of each marked kernel its times [blocks, CTAs, SLOTS] in nanoseconds; 0: no mark."""
    marks = Marks(block.calls)
    bound, launched = launch.Prepared.bound, launch.Prepared.__call__

    def call(index: int) -> None:
        marks.call = index
        block.call(index, static_weights=static)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(launch.Prepared, "bound", lambda one, arguments, stream: bound(one, marks.add(one, arguments), stream))
        patched.setattr(launch.Prepared, "__call__", lambda one, arguments: launched(one, marks.add(one, arguments)))
        call(0)
        replay = clock.capture([partial(call, index) for index in range(block.calls)])
        time = statistics.median(clock.time(Run(replay))) / block.calls
    require_products(marks.grids, len(block.x))
    found = {entry: marks.times[entry][:, :count].get().astype(np.int64) for entry, count in marks.grids.items()}
    return time, found


def rows_of(found: dict[str, np.ndarray]) -> list[tuple[str, str, list[float]]]:
    """Kernel, event, and microseconds of the first, median and last CTA; last of all the next block's first kernel."""
    first = next(entry for entry in found if entry != "heads")
    ended = found[first][:, :, _IN_FRONT_ENDED].min(axis=1)
    rows = []
    blocks = range(2, len(ended) - 1)
    for entry, times in sorted(found.items(), key=lambda item: item[0] == "heads"):
        for event, name in enumerate(_EVENTS[entry]):
            if name and times[:, :, event].any():
                rows.append((entry, name, _spread([times[i, :, event] - ended[i] for i in blocks])))
    for event in (0, _IN_FRONT_ENDED):
        spread = _spread([found[first][i + 1, :, event] - ended[i] for i in blocks])
        rows.append(("the next block", _EVENTS[first][event], spread))
    return rows


def _spread(times: list[np.ndarray]) -> list[float]:
    # a CTA without a mark is far in the past
    each = [(known.min(), np.median(known), known.max()) for known in (one[one > -(10**9)] for one in times)]
    return [float(value) / 1000 for value in np.mean(each, axis=0)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m tests.gpu_timeline", description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--model", default="8b", help=f"of {', '.join(MODELS)}, several with commas")
    parser.add_argument("--tokens", default="1,16,64", help=f"rows, up to {_MOST_ROWS}, several with commas")
    parser.add_argument("--form", help="of quantised weights, such as Q4_0")
    parser.add_argument("--static", action="store_true", help="static weights")
    given = parser.parse_args()
    models, rows = given.model.split(","), [int(one) if one.isdecimal() else 0 for one in given.tokens.split(",")]
    for wrong in [one for one in models if one not in MODELS]:
        parser.error(f"--model {wrong}: known are {', '.join(MODELS)}")
    if not all(1 <= one <= _MOST_ROWS for one in rows):
        parser.error(f"--tokens {given.tokens}: needed are numbers from 1 to {_MOST_ROWS}, for which the marked kernels are")
    if given.form not in (None, *FORMATS):
        parser.error(f"--form {given.form}: known are {', '.join(FORMATS)}")
    console, clock = Console(width=110), Clock()
    recipe = RECIPES["block-scaled" if given.form else "torch"]
    with marked_kernels():
        for model in models:
            layer = Layer(MODELS[model], max(rows))
            weights = None if given.form is None else Formats(layer, [given.form], lambda doing: None).weights[given.form]
            for tokens in rows:
                time, found = measure(Block(layer, tokens, recipe, weights), clock, given.static)
                title = f"{model}, {tokens} rows, {given.form or 'bf16'}{', static' if given.static else ''}: {time:.2f} us a block"
                columns = ("kernel", "event", "first CTA", "median", "last")
                table = Table(*columns, title=title, box=box.SIMPLE_HEAD, title_justify="left")
                for entry, event, spread in rows_of(found):
                    table.add_row(entry, event, *(f"{value:.2f}" for value in spread))
                console.print(table)


if __name__ == "__main__":
    main()
