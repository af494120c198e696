"""Speed of ``rms_norm`` on a GPU beside PyTorch's ways, with the bits that each gives: python3 -m tests.gpu_bench_norm

One table a size: microseconds of one call inside a CUDA graph of many calls over different memory (medians of the replays),
bytes moved a second, and how many outputs differ from Hugging Face's eager module and from ``F.rms_norm``. All ways run in one
process, in turn and always in the same order; Liger where it is installed. A single row's buffers stay in the L2 cache, as
activations do. ``--schedules`` also times all schedules of kernels/rms_norm.cu where they exist, for two recipes.
"""

import argparse
import contextlib
import importlib
import importlib.util
import itertools
import json
import statistics
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_norm, _norm_kernels, _repeat, bench_peers, bench_results, launch
from cufuse.bench_timing import host_cost
from tests import gpu_support
from tests.golden import inputs
from tests.gpu_support import EPS, codes, from_torch, to_gpu, to_torch, values

SIZES = ((1, 4096), (64, 4096), (2048, 4096), (8192, 4096), (16384, 5120))
SCHEDULE_SIZES = (
    *((rows, 4096) for rows in (8, 64, 528, 2048, 8192)),
    *((2048, 2048), (16384, 5120)),
)
SCHEDULES: dict[str, tuple[bool | None, int | None]] = {
    "chosen": (None, None),
    "registers": (True, None),
    **{f"shared by {threads}": (False, threads) for threads in (128, 256, 512)},
}
"""Whether registers hold a row, and the threads of one in shared memory, as each demands."""
CACHE_BYTES = 60 << 20
MOST_CALLS = 400
TURNS = 3
"""Times that each way is measured; each takes the median of ten replays."""
LIGER = bench_peers._NEEDS[bench_results.LIGER]
"""Its module."""


def buffers(rows: int, columns: int) -> tuple[Any, Any]:
    """Inputs and outputs [n, rows, columns] of n calls: together four times the L2 cache, as far as 400 calls go."""
    count = min(MOST_CALLS, max(4, -(-4 * CACHE_BYTES // (4 * rows * columns))))
    x = values((count, rows, columns), rows)
    return x, gpu_support.cupy().empty_like(x)


def median_time(graph: Callable[[], None], calls: int) -> float:
    """Microseconds a call, the median of replays between CUDA events on PyTorch's stream."""
    torch = gpu_support.torch()
    times = []
    for turn in range(13):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph()
        end.record()
        end.synchronize()
        if turn >= 3:
            times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)


def torch_graph(call: Callable[[int], Any], calls: int) -> Callable[[], None]:
    """A graph of call(0), call(1), ..., captured by PyTorch."""
    torch = gpu_support.torch()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), torch.no_grad():
        for index in range(2):
            call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        for index in range(calls):
            call(index)
    return graph.replay  # type: ignore[no-any-return]


def cufuse_graph(call: Callable[[int], Any], calls: int) -> Callable[[], None]:
    """The same of our launches, captured by CuPy and replayed on PyTorch's stream."""
    gpu, torch = gpu_support.cupy(), gpu_support.torch()
    call(0)
    stream = gpu.cuda.Stream(non_blocking=True)
    gpu.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        for index in range(calls):
            call(index)
        graph = stream.end_capture()
    return lambda: graph.launch(gpu.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream))


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy on the device."""
    torch = gpu_support.torch()
    source, target = (torch.randint(0, 255, (1 << 30,), dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * (1 << 30) / (median_time(lambda: target.copy_(source), 1) * 1e-6)


def peers(weight: Any, compiled: bool) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """PyTorch's ways to the same norm, as functions of a tensor."""
    torch = gpu_support.torch()
    module = gpu_support.qwen3().Qwen3RMSNorm(len(weight), eps=EPS).to("cuda")
    module.weight = torch.nn.Parameter(to_torch(weight), requires_grad=False)
    yield "Hugging Face, eager", module
    yield "F.rms_norm", lambda x: torch.nn.functional.rms_norm(x, (len(weight),), module.weight, eps=EPS)
    if compiled:
        torch._dynamo.config.recompile_limit = 64
        yield "torch.compile", torch.compile(module, dynamic=False)
    if importlib.util.find_spec(LIGER.partition(".")[0]) is not None:
        liger = importlib.import_module(LIGER).LigerRMSNorm(len(weight), eps=EPS, casting_mode="llama").to("cuda")
        liger.weight = module.weight
        yield "Liger, llama mode", liger


def differing(found: Any, expected: Any) -> int:
    return int(gpu_support.cupy().count_nonzero(codes(found) != codes(expected)))


def _call_peer(function: Callable[[Any], Any], tensors: list[Any], index: int) -> Any:
    return function(tensors[index])


def _call_cufuse(recipe: str, weight: Any, x: Any, y: Any, index: int) -> Any:
    return cufuse.rms_norm(x[index], weight, eps=EPS, recipe=recipe, out=y[index])


def measure(rows: int, columns: int, compiled: bool) -> list[dict[str, Any]]:
    """One line for each way: name, microseconds, terabytes a second, outputs that differ from the two references."""
    torch = gpu_support.torch()
    x, y = buffers(rows, columns)
    weight = to_gpu(inputs.norm_weight(columns, 5, 96.5))
    tensors = [to_torch(x[index]) for index in range(len(x))]
    graphs: dict[str, Callable[[], None]] = {}
    results: dict[str, Any] = {}
    for name, function in peers(weight, compiled):
        with torch.no_grad():
            results[name] = from_torch(function(tensors[0])).copy()
        graphs[name] = torch_graph(partial(_call_peer, function, tensors), len(x))
    for recipe in ("torch", "torch-rms-norm"):
        y.view(np.uint16).fill(0xFFFF)
        own = partial(_call_cufuse, recipe, weight, x, y)
        results[f"cufuse, {recipe}"] = own(0).copy()
        graphs[f"cufuse, {recipe}"] = cufuse_graph(own, len(x))
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(TURNS):
        for name, graph in graphs.items():
            times[name].append(median_time(graph, len(x)))
    lines = []
    for name, result in results.items():
        time = statistics.median(times[name])
        line = {"way": name, "microseconds": time, "terabytes_per_second": 4 * rows * columns / time * 1e-6}
        line["from_hugging_face"] = differing(result, results["Hugging Face, eager"])
        line["from_f_rms_norm"] = differing(result, results["F.rms_norm"])
        lines.append(line)
    return lines


def schedules(rows: int, columns: int, recipe: str) -> dict[str, float | None]:
    """Microseconds of each schedule, None where there is no such kernel."""
    x, y = buffers(rows, columns)
    weight = to_gpu(inputs.norm_weight(columns, 5, 96.5))
    found: dict[str, float | None] = {}
    for name, (direct, group) in SCHEDULES.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_gpu_norm, "configuration", partial(_norm_kernels.configuration, direct=direct, group=group))
            patch.setattr(_gpu_norm, "_plans", {})
            patch.setattr(_repeat, "_calls", {})
            found[name] = None
            with contextlib.suppress(ValueError, launch.KernelCompileError):
                graph = cufuse_graph(lambda index: cufuse.rms_norm(x[index], weight, eps=EPS, recipe=recipe, out=y[index]), len(x))
                found[name] = median_time(graph, len(x))
    return found


def host_time() -> float:
    """Microseconds of Python that one call of a single row costs, launch included."""
    x, weight = values((1, 4096), 1), to_gpu(inputs.norm_weight(4096, 5, 96.5))
    out = gpu_support.cupy().empty_like(x)
    return host_cost(lambda: cufuse.rms_norm(x, weight, out=out), gpu_support.cupy().cuda.Device().synchronize, calls=400)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write everything as JSON")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes seconds a size)")
    parser.add_argument("--schedules", action="store_true", help="time all schedules of the kernel too")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    bandwidth = copy_bandwidth()
    host = host_time()
    print(f"copy: {bandwidth / 1e12:.2f} TB/s; host time of a call: {host:.1f} us")
    record: dict[str, Any] = {"copy_bytes_per_second": bandwidth, "host_microseconds": host, "sizes": {}, "schedules": {}}
    print(f"{'size':>12} {'way':24} {'us':>9} {'TB/s':>6} {'of copy':>8} {'!= HF':>11} {'!= F.rms_norm':>14}")
    for rows, columns in SIZES:
        lines = measure(rows, columns, not given.no_compile)
        record["sizes"][f"{rows}x{columns}"] = lines
        for line in lines:
            time, speed = line["microseconds"], line["terabytes_per_second"]
            start = f"{f'{rows}x{columns}':>12} {line['way']:24} {time:9.2f} {speed:6.2f} {speed * 1e12 / bandwidth:8.0%}"
            print(f"{start} {line['from_hugging_face']:11,} {line['from_f_rms_norm']:14,}", flush=True)
    for recipe, (rows, columns) in itertools.product(("torch", "torch-rms-norm") if given.schedules else (), SCHEDULE_SIZES):
        found = record["schedules"][f"{recipe} {rows}x{columns}"] = schedules(rows, columns, recipe)
        texts = [f"{name} {time:.2f}" for name, time in found.items() if time is not None]
        print(f"{recipe} {f'{rows}x{columns}':>12}: {'; '.join(texts)}", flush=True)
    if given.out is not None:
        given.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
