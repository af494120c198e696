"""All tests on a GPU, module by module in several processes at once: python3 -m tests.gpu_run

What ``python3 -m pytest -m gpu`` runs, in less time: most of it is Python and compilation, which one process does on one core. The
record, tests/gpu_record.json, is written where every module that pytest collects for the marker has run as a whole, on the same
sources, with nothing failed and nothing skipped. With --parts FOLDER each module's result is kept there, and a module that has
passed on the same sources does not run again: after a failure only what failed is repeated.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests import gpu_record

SLOW_FIRST = ("block", "quantised", "linear", "projections", "norms", "decoder", "casts", "generation", "qkv")
"""Modules that take long, so that no process is left alone with one at the end."""

ALONE = ("bench",)
"""Modules that compare times: they run behind all others, with the GPU to themselves."""


def collected() -> list[str]:
    """The modules in which there are tests on a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=gpu_record.ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"pytest cannot collect the tests:\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    found = dict.fromkeys(re.findall(r"^(tests/\w+\.py)::", done.stdout, re.MULTILINE))
    place = {name: order for order, name in enumerate(SLOW_FIRST)}
    return sorted(found, key=lambda module: place.get(_area(module), len(place)))


def _area(module: str) -> str:
    """"norms" of tests/test_gpu_norms.py."""
    return Path(module).stem.removeprefix("test_gpu_")


def run_module(module: str, folder: Path, seconds: float) -> dict[str, Any]:
    """One module in a process of its own; its part of the record, or what there is to say instead."""
    part, log = folder / f"{Path(module).stem}.json", folder / f"{Path(module).stem}.txt"
    begin = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", module]
    part.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as output:
        try:
            subprocess.run(
                command, cwd=gpu_record.ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds,
                env={**os.environ, gpu_record.PART_VARIABLE: str(part)},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            output.write(f"\nstopped after {seconds:g} s\n")
    found: dict[str, Any] = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {"clean": False}
    took, text = time.monotonic() - begin, log.read_text(encoding="utf-8", errors="replace")
    counts = ", ".join(f"{number} {word}" for word, number in found.get("tests", {}).items() if number)
    print(f"{'ok  ' if found['clean'] else 'FAIL'} {module}: {counts or 'nothing counted'}, {took:.0f} s", flush=True)
    if not found["clean"]:
        told = [line for line in text.splitlines() if re.match(r"(FAILED|ERROR|E  |stopped)", line)] or text.splitlines()[-15:]
        print("\n".join(line[:400] for line in told[:40]), flush=True)
    return found


def is_done(module: str, folder: Path, sources: str) -> bool:
    """Whether the module has passed on these sources."""
    part = folder / f"{Path(module).stem}.json"
    if not part.exists():
        return False
    found = json.loads(part.read_text(encoding="utf-8"))
    return bool(found["clean"] and found["source_sha256"] == sources)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=4, help="at once (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=400, help="limit for one module (default: %(default)s)")
    parser.add_argument("--parts", type=Path, help="folder in which each module's result is kept")
    given = parser.parse_args()
    begin, sources, modules = time.monotonic(), gpu_record.source_hash(), collected()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.parts or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        left = [module for module in modules if not is_done(module, folder, sources)]
        print(f"{len(modules)} modules with tests on a GPU, {len(modules) - len(left)} of them done before", flush=True)
        alone = [module for module in left if _area(module) in ALONE]
        with ThreadPoolExecutor(given.processes) as pool:
            together = [module for module in left if module not in alone]
            list(pool.map(lambda module: run_module(module, folder, given.seconds), together))
        for module in alone:
            run_module(module, folder, given.seconds)
        parts = {module: folder / f"{Path(module).stem}.json" for module in modules}
        found = {module: json.loads(part.read_text(encoding="utf-8")) for module, part in parts.items() if part.exists()}
    bad = [module for module in modules if module not in found or not found[module]["clean"]]
    if bad or any(part["source_sha256"] != sources for part in found.values()):
        print(f"no record: {', '.join(bad) or 'the sources changed'}")
        return 1
    counts: Counter[str] = Counter()
    outputs: Counter[str] = Counter()
    for part in found.values():
        counts.update(part["tests"])
        outputs.update(part["outputs"])
    gpu_record.write(dict(counts), dict(outputs), time.monotonic() - begin)
    print(f"{counts['passed']} passed, {sum(outputs.values()):,} outputs compared, {time.monotonic() - begin:.0f} s; recorded")
    return 0


if __name__ == "__main__":
    sys.exit(main())
