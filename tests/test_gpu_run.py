"""The runner of the GPU tests, and the sanitizer's suite, where they can be told apart from a GPU: what counts as done, what is
written when, what is shown of a log."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests import gpu_record, gpu_run, sanitizer_suite

MODULES = ["tests/test_gpu_a.py", "tests/test_gpu_b.py"]
PART: dict[str, Any] = {"clean": True, "tests": {"passed": 3, "failed": 0, "skipped": 0}, "outputs": {"norms": 10}}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the record would be written with; modules and sources are made up."""
    calls: list[Any] = []
    monkeypatch.setattr(gpu_record, "source_hash", lambda: "now")
    monkeypatch.setattr(gpu_record, "write", lambda counts, outputs, seconds: calls.append((counts, outputs)))
    monkeypatch.setattr(gpu_run, "collected", lambda: list(MODULES))
    return calls


def runs(monkeypatch: pytest.MonkeyPatch, found: dict[str, dict[str, Any]]) -> list[str]:
    """Modules "run" by leaving the given parts; returns which were."""
    done: list[str] = []

    def run_module(module: str, folder: Path, seconds: float) -> dict[str, Any]:
        done.append(module)
        (folder / f"{Path(module).stem}.json").write_text(json.dumps(found[module]))
        return found[module]

    monkeypatch.setattr(gpu_run, "run_module", run_module)
    return done


def test_the_record_is_of_all_modules(monkeypatch: pytest.MonkeyPatch, written: list[Any], tmp_path: Path) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_run", "--parts", str(tmp_path)])
    part = PART | {"source_sha256": "now"}
    done = runs(monkeypatch, {MODULES[0]: part, MODULES[1]: part | {"outputs": {"norms": 5, "casts": 1}}})
    assert gpu_run.main() == 0
    assert sorted(done) == MODULES
    assert written == [({"passed": 6, "failed": 0, "skipped": 0}, {"norms": 15, "casts": 1})]
    assert gpu_run.main() == 0
    assert len(done) == 2  # what has passed on the same sources does not run again


def test_modules_that_compare_times_run_alone(monkeypatch: pytest.MonkeyPatch, written: list[Any], tmp_path: Path) -> None:
    modules = ["tests/test_gpu_bench.py", *MODULES]
    monkeypatch.setattr(gpu_run, "collected", lambda: modules)
    monkeypatch.setattr("sys.argv", ["gpu_run", "--parts", str(tmp_path), "--processes", "3"])
    running: set[str] = set()
    beside: dict[str, set[str]] = {}

    def run_module(module: str, folder: Path, seconds: float) -> None:
        running.add(module)
        time.sleep(0.05)
        beside[module] = running - {module}
        (folder / f"{Path(module).stem}.json").write_text(json.dumps(PART | {"source_sha256": "now"}))
        time.sleep(0.05)
        running.remove(module)

    monkeypatch.setattr(gpu_run, "run_module", run_module)
    assert gpu_run.main() == 0 and len(written) == 1
    assert list(beside)[-1] == modules[0] and beside[modules[0]] == set()
    assert beside[MODULES[0]] == {MODULES[1]}  # the others do run together


@pytest.mark.parametrize("changed", [{"clean": False}, {"source_sha256": "before"}])
def test_no_record_of_a_failure_or_of_other_sources(
    monkeypatch: pytest.MonkeyPatch, written: list[Any], tmp_path: Path, changed: dict[str, Any]
) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_run", "--parts", str(tmp_path)])
    part = PART | {"source_sha256": "now"}
    done = runs(monkeypatch, {MODULES[0]: part, MODULES[1]: part | changed})
    for turn in range(2):
        assert gpu_run.main() == 1
        assert len(done) == 2 + turn  # only what is not done is repeated
    assert written == []


def test_a_module_without_a_part_is_no_success(written: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_run", "--parts", str(tmp_path)])
    monkeypatch.setattr(gpu_run, "run_module", lambda *given: {"clean": False})
    assert gpu_run.main() == 1
    assert written == []


def test_a_log_is_cut_to_its_first_errors() -> None:
    log = "========= COMPUTE-SANITIZER\ncall: a\ncall: b\n========= Invalid __global__ read\n=========     at heads\ncall: c\n"
    assert sanitizer_suite.first_errors(log, lines=2) == "call: b\n========= Invalid __global__ read\n=========     at heads"
    assert sanitizer_suite.first_errors("========= Error").startswith("before the first call")


def test_a_log_is_summed_up_by_call_and_kernel() -> None:
    race = "========= Error: Race between Write access at heads+0x10\n=========     and Read access at heads+0x20"
    log = f"call: a\n{race}\ncall: b\n=========     at cast_f32+0x250\n{race}\n=========     by thread (0,0,0) in block (8,0,0)"
    assert sanitizer_suite.tally(log) == {("a", "heads"): 2, ("b", "heads"): 2, ("b", "cast_f32"): 1}
