"""Every kernel once on small, ragged sizes, for compute-sanitizer: python3 -m tests.sanitizer_suite

Runs itself under memcheck, racecheck, initcheck and synccheck, at the same time, and prints each tool's summary; with --record
they go into tests/gpu_record.json. CuPy's memory pool is off, for it hides accesses beyond an allocation.
"""

import argparse
import collections
import json
import re
import subprocess
import sys
import time

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_linear, _gpu_linear_heads, _gpu_qkv, _gpu_stream, launch
from cufuse import _linear_small_m as small_m
from cufuse import _linear_tiles as tiles
from tests import gpu_record, gpu_support, sanitizer_cases
from tests.golden import inputs

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FINISHED = "every kernel ran"
CALL = "call: "


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bare", action="store_true", help="run the kernels here, without the tools")
    parser.add_argument("--tools", nargs="*", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--seconds", type=float, default=240, help="limit for all tools together (default: %(default)s)")
    parser.add_argument(
        "--record",
        action="store_true",
        help="write the summaries into tests/gpu_record.json; a full run of the tests that goes on beside it is waited for",
    )
    given = parser.parse_args()
    if given.bare:
        run_kernels()
        return 0
    command = [sys.executable, "-m", "tests.sanitizer_suite", "--bare"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = {tool: subprocess.Popen(["compute-sanitizer", "--tool", tool, *command], **output) for tool in given.tools}
    summaries = {tool: _summary(tool, process, given.seconds) for tool, process in processes.items()}
    if given.record:
        begin = time.monotonic()
        while (reason := gpu_record.complaint(record := gpu_record.load(), gpu_record.source_hash())) is not None:
            if time.monotonic() > begin + given.seconds:
                parser.error(reason)
            time.sleep(1)
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
        raise SystemExit(f"{tool}: the kernels did not run to their end:\n{first_errors(log)}\n... {log[-1500:]}")
    summary = gpu_record.sanitizer_summary(log)
    calls = next(line for line in log.splitlines() if FINISHED in line)
    print(f"{tool}: {summary['summary']}; {calls}", flush=True)
    if summary["errors"]:
        for (call, kernel), count in tally(log).most_common(40):
            print(f"  {count:6} x {kernel} in {call}")
        print(first_errors(log))
    return {**summary, "suite": calls}


def first_errors(log: str, lines: int = 40) -> str:
    """The call under which the tool first had something to say, and what it said."""
    said = log.splitlines()
    first = next((n for n, line in enumerate(said) if line.startswith("=========") and "COMPUTE-SANITIZER" not in line), len(said))
    call = next((line for line in reversed(said[:first]) if line.startswith(CALL)), "before the first call")
    return "\n".join([call, *said[first : first + lines]])


def tally(log: str) -> "collections.Counter[tuple[str, str]]":
    """How often the tool names each kernel, by the call that ran it."""
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    call = "before the first call"
    for line in log.splitlines():
        if line.startswith(CALL):
            call = line.removeprefix(CALL)
        elif (named := re.search(r"\bat (\w+)\+0x", line)) is not None:
            found[call, named[1]] += 1
    return found


def run_kernels() -> None:
    """Every operation against the emulation, then every configuration of the products on sizes that fit no tile."""
    cupy = gpu_support.cupy()
    cupy.cuda.set_allocator(None)
    launched = 0
    for case in sanitizer_cases.cases():
        print(f"{CALL}{case.what}", flush=True)
        found, expected = case.call(), case.expected()
        for one, other in zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]:
            gpu_support.demand_same("sanitized", one, other, case.what)
        launched += 1
    print(f"{CALL}the products' configurations", flush=True)
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
    print(f"{CALL}heads in the shadow", flush=True)
    # heads in the shadow of many rows' products, which small sizes would not be given to; with several tiles a CTA
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "multiprocessors", lambda device: 3)
        for width, k, stages in ((128, 712, 2), (128, 904, 3), (256, 968, 2), (256, 1160, 3)):
            patch.setattr(_gpu_linear_heads, "_choose", lambda problem, widths, rotates, width=width: width)
            patch.setattr(_gpu_qkv, "_calls", {})
            weight, tokens = inputs.bell((6 * 128, k), 8, 0.05), 130
            cos, sin = cufuse.rope_tables(np.arange(tokens), 128)
            given = (inputs.heavy((tokens, k), 9), inputs.norm_weight(k, 1, 8.0), weight)
            norms = inputs.norm_weight(128, 2, 6.0), inputs.norm_weight(128, 3, 96.5)
            # initcheck does not see what the copy engine stores: an output that it left out would still have other bits
            out = tuple(np.zeros((tokens, heads, 128), cufuse.bfloat16) for heads in (4, 1, 1))
            options = {"cos": cos, "sin": sin, "heads": 4, "k_slices": 1, "out": out}
            case = gpu_support.against_numpy("heads in the shadow", cufuse.rms_norm_qkv, *given, *norms, **options)
            for one, other in zip(case.call(), case.expected(), strict=True):
                gpu_support.demand_same("sanitized", one, other, case.what)
            shape = {"TILE_N": width, "PART_STAGES": stages}
            assert any(shape.items() <= dict(kernel.defines).items() for kernel, _ in launch._functions), shape
            launched += 1
    for reader in _gpu_stream.READERS:
        _gpu_stream.read(cupy.zeros(4 * 1001, "u4"), reader, cupy.zeros(1, "u4"))
        launched += 1
    cupy.cuda.runtime.deviceSynchronize()
    print(f"{FINISHED}: {launched} calls")


if __name__ == "__main__":
    sys.exit(main())
