"""pytest plugin: what the last full run of the tests on a GPU compared, and from which sources, in tests/gpu_record.json.

``python3 -m pytest -m gpu`` writes the record where a GPU is, nothing failed and nothing was skipped; so does
``python3 -m tests.gpu_run``, which runs the same tests in several processes. Everywhere else the end of
a test run says how old the record is; tests/test_gpu_record.py fails once kernels or launch sources are no longer those that
ran. ``python3 -m tests.gpu_record --sanitizer memcheck LOG`` adds the summary that a log of compute-sanitizer ends with.
"""

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "tests" / "gpu_record.json"
SOURCES = (
    "kernels/*",
    "cufuse/launch.py",
    "cufuse/compiler.py",
    "cufuse/_driver.py",
    "cufuse/_layout.py",
    "cufuse/_norm_kernels.py",
    "cufuse/_linear_*.py",
    "cufuse/_gpu_*.py",
    "cufuse/_repeat.py",
    "cufuse/emulation/sums_kernel.py",
    "cufuse/quantised/formats.py",
    "cufuse/quantised/tiles.py",
    "cufuse/qwen3/gpu*.py",
)
"""What decides which machine code runs on a GPU, and with which arguments."""

PART_VARIABLE = "CUFUSE_GPU_PART"
"""A file for the result of a run of one module, from which tests.gpu_run puts the record together."""

RENEW = "run python3 -m pytest -m gpu on a machine with an NVIDIA GPU, PyTorch and transformers, and commit tests/gpu_record.json"


def source_files(root: Path = ROOT) -> list[Path]:
    """The files behind the hash, sorted by their names below the root."""
    found = {file for pattern in SOURCES for file in root.glob(pattern) if file.is_file()}
    return sorted(found, key=lambda file: file.relative_to(root).as_posix())


def source_hash(root: Path = ROOT) -> str:
    """SHA-256 over the names and contents of the sources, line endings normalised."""
    digest = hashlib.sha256()
    for file in source_files(root):
        content = file.read_bytes().replace(b"\r\n", b"\n")
        digest.update(f"{file.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def load(path: Path = RECORD) -> dict[str, Any] | None:
    """The record, or None where there is none."""
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def age(record: dict[str, Any], now: datetime.datetime | None = None) -> str:
    """How long ago the recorded run was: "3 days ago"."""
    then = datetime.datetime.fromisoformat(record["date"])
    hours = int(((now or datetime.datetime.now(datetime.UTC)) - then).total_seconds()) // 3600
    number, unit = (hours, "hour") if hours < 48 else (hours // 24, "day")
    return f"{number} {unit}{'' if number == 1 else 's'} ago"


def complaint(record: dict[str, Any] | None, sources: str) -> str | None:
    """Why the record does not speak for these sources, and how to renew it; None where it does."""
    if record is None:
        return f"the kernels have never run on a GPU as far as tests/gpu_record.json knows: there is none; {RENEW}"
    if record["source_sha256"] != sources:
        return (
            f"kernels or launch sources are not those that ran on {record['device']} on {record['date'][:10]}: their hash is "
            f"{sources[:12]}, the record's {record['source_sha256'][:12]}; {RENEW}"
        )
    return None


class Recorder:
    """Counts the reports of one session's tests on a GPU, and writes the record at its end."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}
        self.of_workers: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "gpu" in report.keywords:
            self.count(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed and "gpu" in report.nodeid:
            self.count(report)

    def count(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """A test passes with its call; it fails or is skipped in whichever phase."""
        if report.outcome != "passed" or report.when == "call":
            self.counts[report.outcome] += 1

    def is_clean(self) -> bool:
        return self.counts["passed"] > 0 and self.counts["failed"] == 0 and self.counts["skipped"] == 0

    def outputs(self) -> dict[str, int]:
        """Outputs by area, those of pytest-xdist's processes included."""
        return dict(self.of_workers + Counter(outputs_compared()))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.of_workers.update(getattr(node, "workeroutput", {}).get("cufuse_outputs", {}))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["cufuse_outputs"] = {area: int(number) for area, number in outputs_compared().items()}
            return
        part = os.environ.get(PART_VARIABLE)
        if part is not None:
            clean = exitstatus == 0 and self.is_clean()
            found = {"clean": clean, "source_sha256": source_hash(), "tests": self.counts, "outputs": self.outputs()}
            Path(part).write_text(json.dumps(found), encoding="utf-8")
        elif exitstatus == 0 and self.is_clean() and is_full_run(session.config):
            write(self.counts, self.outputs(), time.monotonic() - self.started)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        outputs = self.outputs()
        if outputs:
            terminalreporter.section("outputs compared on a GPU, 0 differing bits")
            for area, number in (*sorted(outputs.items()), ("together", sum(outputs.values()))):
                terminalreporter.write_line(f"  {area:40} {number:>18,}")
        terminalreporter.write_line(summary(self.counts["skipped"], load()))


def is_full_run(config: pytest.Config) -> bool:
    """Whether all tests on a GPU were asked for, and nothing but these: ``pytest -m gpu``."""
    chosen = [Path(argument).resolve() for argument in config.args]
    narrowed = config.option.keyword or getattr(config.option, "lf", False) or config.option.deselect or config.option.ignore
    return (
        config.option.markexpr.strip() == "gpu"
        and all(one in (ROOT, ROOT / "tests") for one in chosen)
        and not narrowed
        and not hasattr(config, "workerinput")
    )


def outputs_compared() -> dict[str, int]:
    """Outputs by area, as the modules that compare have counted them."""
    support = sys.modules.get("tests.gpu_support")
    return dict(getattr(support, "COMPARED", {}))


def summary(skipped: int, record: dict[str, Any] | None) -> str:
    """One line for the end of a run."""
    here = f"tests on a GPU: {skipped} skipped here; " if skipped else "tests on a GPU: "
    if record is None:
        return here + "no record of a full run"
    tests, outputs = record["tests"]["passed"], sum(record["outputs"].values())
    return here + f"last full run {age(record)} on {record['device']}: {tests} passed, {outputs:,} outputs compared"


def write(counts: dict[str, int], outputs: dict[str, int], seconds: float, path: Path = RECORD) -> None:
    """The record of a run that has just ended; a sanitizer's summary stays if it is of the same sources."""
    before, sources = load(path), source_hash()
    kept = before["compute_sanitizer"] if before is not None and before["source_sha256"] == sources else {}
    record = {
        "source_sha256": sources,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **machine(),
        "tests": counts,
        "outputs": dict(sorted(outputs.items())),
        "outputs_together": sum(outputs.values()),
        "seconds": round(seconds, 1),
        "compute_sanitizer": kept,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Device, driver and versions of what computed and of what was compared with."""
    import cupy

    from cufuse import compiler, launch

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    driver = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?(\d+\.\d+[.\d]*)", driver.read_text()) if driver.exists() else None
    return {
        "device": properties["name"].decode(),
        "capability": launch.capability(cupy.cuda.runtime.getDevice()),
        "driver": found.group(1) if found else "unknown",
        "cuda_driver": cupy.cuda.runtime.driverGetVersion(),
        "nvrtc": ".".join(map(str, compiler._compiler().version())),
        "python": platform.python_version(),
        "packages": dict(sorted(versions())),
    }


def versions() -> Iterator[tuple[str, str]]:
    for package in ("cupy-cuda12x", "cupy-cuda13x", "torch", "transformers", "numpy", "ml_dtypes", "numba"):
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue


def sanitizer_summary(log: str) -> dict[str, Any]:
    """The errors that a log of compute-sanitizer counts. ValueError for a log without its last line."""
    found = re.findall(r"^=+ (ERROR SUMMARY: (\d+) errors?.*|RACECHECK SUMMARY: (\d+) hazards?.*)$", log, re.MULTILINE)
    if not found:
        raise ValueError("the log has no line 'ERROR SUMMARY' or 'RACECHECK SUMMARY': did compute-sanitizer run to its end?")
    text, errors, hazards = found[-1]
    return {"errors": int(errors or hazards), "summary": text}


def main() -> None:
    parser = argparse.ArgumentParser(description="Add the summary of a compute-sanitizer run to tests/gpu_record.json.")
    parser.add_argument("--sanitizer", nargs=2, metavar=("TOOL", "LOG"), required=True)
    tool, log = parser.parse_args().sanitizer
    record = load()
    if (reason := complaint(record, source_hash())) is not None:
        parser.error(reason)
    assert record is not None
    record["compute_sanitizer"][tool] = sanitizer_summary(Path(log).read_text(encoding="utf-8", errors="replace"))
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"{tool}: {record['compute_sanitizer'][tool]['summary']}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Recorder(), "cufuse-gpu-record")


if __name__ == "__main__":
    main()
