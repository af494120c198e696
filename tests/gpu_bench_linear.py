"""Speed of the kernels of ``linear`` on a GPU beside cuBLAS, with the bits that each gives: python3 -m tests.gpu_bench_linear

Microseconds of one product inside a CUDA graph over distinct weights of 1 GB in all, medians of the replays, and how many outputs
of the first weight differ from F.linear. cuBLAS (F.linear) runs in the same process before and after the others of a line. Each
configuration has a time limit: the measuring process is ended and started again behind one that hangs or fails.
``--rows 1,64`` and ``--models 8B`` choose; ``--json FILE`` keeps everything.
"""

import argparse
import concurrent.futures
import itertools
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from cufuse import _gpu_linear, compiler
from cufuse import _linear_small_m as small_m
from cufuse import _linear_tiles as tiles
from cufuse._linear_problem import Problem

MODELS = {"0.6B": (1024, 4096), "4B": (2560, 6144), "8B": (4096, 6144), "32B": (5120, 10240)}
ROWS = (1, 8, 16, 32, 64, 128, 256, 2048, 8192)
GRAPH_BYTES = 1 << 30
JOB_SECONDS = 40.0
Small, Group = small_m.Configuration, tiles.WarpgroupConfiguration


def hopper(m: int, n: int, k: int) -> Problem:
    """The product on an H200."""
    return Problem(m, n, k, k, k, False, False, True, True, True, True, True, -(-k // 64) * 64, 90, 132, 232448)


def candidates(m: int, n: int, k: int) -> dict[str, Any]:
    """Label -> configuration; None is the chosen one, a "+" label is launched as a dependent."""
    found: dict[str, Any] = {"chosen": None}
    if m <= 64:
        chosen = small_m.choose(hopper(m, n, k))
        width = tiles.choose_warpgroups(hopper(m, n, k)).tile_n
        found |= {"chosen +": None, "mma": chosen}
        if m <= 8:
            found |= {
                "mma 8 rows": Small(8, 8, 256, True),
                "mma k128": Small(8, 16, 128, True),
                "mma k512": Small(8, 16, 512, True),
                "mma by rows k256": Small(8, 16, 256, True, boxes=False),
                "mma by rows k1024": Small(8, 16, 1024, True, boxes=False),
                "mma streamed": Small(8, 16, 256, False),
            }
        else:
            tokens = chosen.tokens
            for stage, c in ((128, 1), (128, 2), (256, 1), (256, 2), (256, 4)):
                found[f"mma k{stage} x{c}"] = Small(tokens, 16, stage, False, cluster=c)
        for tile_k, c in ((64, 1), (128, 1), (256, 1), (128, 2), (256, 2), (256, 4)):
            found[f"wg {width} k{tile_k} x{c}"] = Group(1, width, 1, c, tile_k=tile_k)
        found |= {f"wg {width} k{tile_k} x1 +": Group(1, width, tile_k=tile_k) for tile_k in (128, 256)}
        return found
    if m <= 256:
        for clusters in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4)):
            if m > 128 or clusters[0] == 1:
                widths = (64, 96, 128, 160)
                found |= {f"wg {w} {clusters[0]}x{clusters[1]} boxes": Group(2, w, *clusters, True) for w in widths}
        return found
    shapes = ((256, 2, 1, True), (256, 1, 2, True), (256, 1, 1, True), (256, 2, 1, False), (128, 2, 1, True), (192, 2, 1, True))
    return found | {f"wg {w} {a}x{b}{' boxes' if box else ''}": Group(2, w, a, b, box) for w, a, b, box in shapes}


def all_jobs(models: list[str], rows: list[int]) -> list[tuple[str, int, str]]:
    """(model, M, label), cuBLAS first and last of each line."""
    jobs = []
    for model in models:
        k, n = MODELS[model]
        for m in rows:
            jobs += [(model, m, label) for label in ("cuBLAS", *candidates(m, n, k), "cuBLAS again")]
    return jobs


class Bench:
    """Inputs of one model and M at a time, and the measuring of one job."""

    def __init__(self) -> None:
        import cupy
        import torch

        self.cupy, self.torch = cupy, torch
        self.held: tuple[str, int] | None = None

    def prepare(self, model: str, m: int) -> None:
        if self.held == (model, m):
            return
        torch = self.torch
        (k, n), generator = MODELS[model], torch.Generator(device="cuda").manual_seed(m)
        if self.held is None or self.held[0] != model:
            count = max(3, -(-GRAPH_BYTES // (2 * k * n)))
            self.weights = [torch.empty((n, k), dtype=torch.bfloat16, device="cuda") for _ in range(count)]
            for weight in self.weights:
                weight.normal_(std=k**-0.5, generator=generator)
            self.ours = [self.cupy.from_dlpack(weight) for weight in self.weights]
        self.x = torch.empty((m, k), dtype=torch.bfloat16, device="cuda").normal_(generator=generator)
        self.out = torch.empty((m, n), dtype=torch.bfloat16, device="cuda")
        self.our_x, self.our_out = self.cupy.from_dlpack(self.x), self.cupy.from_dlpack(self.out)
        self.expected = torch.nn.functional.linear(self.x, self.weights[0])
        torch.cuda.synchronize()  # measured on another stream
        self.held = model, m

    def measure(self, model: str, m: int, label: str) -> dict[str, Any]:
        self.prepare(model, m)
        torch = self.torch
        k, n = MODELS[model]
        # long products need fewer of them in a graph than short ones
        count = min(len(self.weights), max(3, int(2e4 / (2e-9 * m * n * k + 5))))
        self.out.view(torch.int16).fill_(0x7FC0)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        ours = self.cupy.cuda.Stream.from_external(stream)
        configuration = None if label.startswith("cuBLAS") else candidates(m, n, k)[label]

        def call(index: int) -> None:
            if label.startswith("cuBLAS"):
                torch.mm(self.x, self.weights[index].t(), out=self.out)
            else:
                with ours:
                    options = {"configuration": configuration, "weights_ready": label.endswith("+")}
                    _gpu_linear.linear(self.our_x, self.ours[index], self.our_out, **options)

        with torch.cuda.stream(stream):
            call(0)
            stream.synchronize()
            differing = int((self.out.view(torch.int16) != self.expected.view(torch.int16)).sum())
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                for index in range(count):
                    call(index)
            times = []
            for turn in range(12):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(stream)
                graph.replay()
                end.record(stream)
                end.synchronize()
                if turn >= 2:
                    times.append(start.elapsed_time(end) * 1000 / count)
        return {"us": statistics.median(times), "least": min(times), "differing": differing}

    def host_cost(self) -> float:
        """Microseconds of Python for one call with an output, launches queued."""
        self.prepare("0.6B", 1)
        for _ in range(50):
            _gpu_linear.linear(self.our_x, self.ours[0], self.our_out)
        self.torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(500):
            _gpu_linear.linear(self.our_x, self.ours[0], self.our_out)
        cost = (time.perf_counter() - begin) / 500 * 1e6
        self.torch.cuda.synchronize()
        return cost


def serve() -> None:
    """The measuring process: jobs as JSON lines in, results out."""
    bench = Bench()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        model, m, label = json.loads(line)
        try:
            result = bench.host_cost() if label == "host" else bench.measure(model, m, label)
        except Exception as error:  # reported beside the others; a broken context is noticed by what follows
            result = {"error": f"{type(error).__name__}: {str(error)[:160]}"}
        print(json.dumps(result), flush=True)


class Server:
    """A measuring process that is started again when it does not answer."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "tests.gpu_bench_linear", "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, args=(self.process, self.lines), daemon=True).start()
        self.lines.get(timeout=120)

    @staticmethod
    def _read(process: Any, lines: "queue.Queue[str]") -> None:
        for line in process.stdout:
            if line.startswith(("{", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9")):
                lines.put(line)
        lines.put("")

    def ask(self, job: tuple[str, int, str]) -> Any:
        if self.process is None:
            self.start()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=JOB_SECONDS)
        except queue.Empty:
            line = '{"error": "no answer in time"}'
        except BrokenPipeError:
            line = ""
        result = json.loads(line) if line else {"error": "the process ended"}
        if isinstance(result, dict) and "error" in result:
            self.process.kill()  # its context may be broken
            self.process.wait()
            self.process = None
        return result


def compile_all(jobs: list[tuple[str, int, str]]) -> None:
    """Machine code of every candidate, on all cores."""
    kernels = {}
    for model, m, label in jobs:
        k, n = MODELS[model]
        configuration = candidates(m, n, k).get(label)
        if configuration is not None:
            kernels[configuration.kernel.name] = configuration.kernel
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_compile, [*kernels.values(), *_gpu_linear.KERNELS]))


def _compile(kernel: Any) -> None:
    import cupy  # noqa: F401  (the measuring process takes CuPy's NVRTC, whose version is in the cache's key)

    if kernel.runs_on(90):
        compiler.compile_kernel(kernel, "sm_90a")


def _time(result: dict[str, Any]) -> float:
    return float(result["us"])


def alternate(models: list[str], rows: list[int], times: int, path: Path | None) -> None:
    """cuBLAS and the chosen kernel, one after the other, cuBLAS first; medians over the turns. Clocks follow load: from 2048 rows
    on the order may favour one of them."""
    server, results = Server(), []
    print("microseconds, medians of", times, "turns; n: outputs that differ from F.linear in any of them", flush=True)
    for model, m in itertools.product(models, rows):
        turns = [(server.ask((model, m, "cuBLAS")), server.ask((model, m, "chosen"))) for _ in range(times)]
        if any("error" in one for turn in turns for one in turn):
            print(model, m, turns[0])
            continue
        theirs, ours = (statistics.median(turn[index]["us"] for turn in turns) for index in (0, 1))
        differing = sum(turn[1]["differing"] for turn in turns)
        results.append({"model": model, "m": m, "cublas_us": theirs, "cufuse_us": ours, "differing": differing})
        print(f"{model:5} M={m:5}: cuBLAS {theirs:8.2f}  cufuse {ours:8.2f}  {ours / theirs:.3f} x  n {differing}", flush=True)
    if path is not None:
        path.write_text(json.dumps(results, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=list(ROWS))
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alternate", type=int, default=0, metavar="N", help="cuBLAS and the chosen kernel in turn, N times")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve()
        return
    jobs, begin = all_jobs(given.models, given.rows), time.time()
    if given.alternate:
        alternate(given.models, given.rows, given.alternate, given.json)
        return
    compile_all(jobs)
    print(f"compiled in {time.time() - begin:.0f} s; microseconds, and !n where n outputs differ from F.linear", flush=True)
    server, results = Server(), []
    print(f"Python for one call: {server.ask(('0.6B', 1, 'host'))} us", flush=True)
    line: list[str] = []
    for model, m, label in jobs:
        result = server.ask((model, m, label))
        results.append({"model": model, "m": m, "label": label, **result})
        shown = f"{result['us']:.1f}" if "us" in result else result["error"]
        differing = f" !{result['differing']}" if result.get("differing") else ""
        line.append(f"{label} {shown}{differing}")
        if label == "cuBLAS again":
            best = min((one for one in results if (one["model"], one["m"]) == (model, m) and "us" in one), key=_time)
            print(f"{model} M={m}: best {best['label']} {best['us']:.1f} of {'; '.join(line)}", flush=True)
            line = []
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    print(f"{time.time() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
