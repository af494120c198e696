"""Every kernel once on small, ragged sizes, for compute-sanitizer: python3 -m tests.sanitizer_suite

Runs itself under memcheck, racecheck, initcheck and synccheck, at the same time, and prints each tool's summary; with --record
they go into tests/gpu_record.json. CuPy's memory pool is off, for it hides accesses beyond an allocation.
"""

import argparse
import json
import subprocess
import sys

import numpy as np

import cufuse
from cufuse import _gpu_linear
from cufuse import _linear_small_m as small_m
from cufuse import _linear_tiles as tiles
from tests import gpu_record, gpu_support, sanitizer_cases
from tests.golden import inputs

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FINISHED = "every kernel ran"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bare", action="store_true", help="run the kernels here, without the tools")
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--seconds", type=float, default=240, help="limit for all tools together (default: %(default)s)")
    parser.add_argument("--record", action="store_true", help="write the summaries into tests/gpu_record.json")
    given = parser.parse_args()
    if given.bare:
        run_kernels()
        return 0
    command = [sys.executable, "-m", "tests.sanitizer_suite", "--bare"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = {tool: subprocess.Popen(["compute-sanitizer", "--tool", tool, *command], **output) for tool in given.tools}
    summaries = {tool: _summary(tool, process, given.seconds) for tool, process in processes.items()}
    if given.record:
        record = gpu_record.load()
        if (reason := gpu_record.complaint(record, gpu_record.source_hash())) is not None:
            parser.error(reason)
        assert record is not None
        record["compute_sanitizer"] = summaries
        gpu_record.RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(any(summary["errors"] for summary in summaries.values()))


def _summary(tool: str, process: "subprocess.Popen[str]", seconds: float) -> dict[str, object]:
    try:
        log, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise SystemExit(f"{tool} took more than {seconds:g} s: {process.communicate()[0][-2000:]}") from None
    if FINISHED not in log:
        raise SystemExit(f"{tool}: the kernels did not run to their end: {log[-3000:]}")
    summary = gpu_record.sanitizer_summary(log)
    calls = next(line for line in log.splitlines() if FINISHED in line)
    print(f"{tool}: {summary['summary']}; {calls}", flush=True)
    if summary["errors"]:
        print("\n".join(line for line in log.splitlines() if line.startswith("="))[:4000])
    return {**summary, "suite": calls}


def run_kernels() -> None:
    """Every operation against the emulation, then every configuration of the products on sizes that fit no tile."""
    cupy = gpu_support.cupy()
    cupy.cuda.set_allocator(None)
    launched = 0
    for case in sanitizer_cases.cases():
        found, expected = case.call(), case.expected()
        for one, other in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
            gpu_support.demand_same("sanitized", one, other, case.what)
        launched += 1
    for configuration in (*small_m.CONFIGURATIONS, *tiles.WARPGROUP, *tiles.MMA):
        for m, n, k, slices in ((7, 56, 192, 1), (5, 40, 320, 2), (130, 264, 128, 1), (3, 9, 33, 1)):
            dtype = np.float32 if getattr(configuration, "parts", 1) > 1 else cufuse.bfloat16
            x = gpu_support.to_gpu(inputs.bell((m, k), 1).astype(dtype))
            weight, out = gpu_support.to_gpu(inputs.bell((n, k), 2, 0.05)), cupy.empty((m, n), cufuse.bfloat16)
            try:
                _gpu_linear.linear(x, weight, out, slices, configuration=configuration)
            except ValueError:
                continue  # this configuration does not take this product
            launched += 1
    cupy.cuda.runtime.deviceSynchronize()
    print(f"{FINISHED}: {launched} calls")


if __name__ == "__main__":
    sys.exit(main())
