"""The record of the last run on a GPU: it speaks for the sources as they are, and its writer can tell when it may not write."""

import datetime
import json
import re
import types
from pathlib import Path
from typing import Any

import pytest

from tests import gpu_record


def test_the_kernels_that_ran_are_those_in_the_repository() -> None:
    record = gpu_record.load()
    assert (reason := gpu_record.complaint(record, gpu_record.source_hash())) is None, reason
    assert record is not None
    assert record["tests"]["failed"] == record["tests"]["skipped"] == 0
    assert record["outputs_together"] == sum(record["outputs"].values()) > 10**9
    assert all(found["errors"] == 0 for found in record["compute_sanitizer"].values())


def checkout(folder: Path) -> Path:
    for name, text in {"kernels/a.cu": "one\n", "cufuse/_gpu_norm.py": "two\n", "cufuse/norm.py": "three\n"}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


def test_the_hash_follows_names_and_contents_alone(tmp_path: Path) -> None:
    root = checkout(tmp_path)
    first = gpu_record.source_hash(root)
    assert [file.name for file in gpu_record.source_files(root)] == ["_gpu_norm.py", "a.cu"]
    (root / "kernels/a.cu").write_bytes(b"one\r\n")
    (root / "cufuse/norm.py").write_bytes(b"something else\n")
    assert gpu_record.source_hash(root) == first
    (root / "kernels/a.cu").write_bytes(b"One\n")
    assert gpu_record.source_hash(root) != first
    (root / "kernels/a.cu").rename(root / "kernels/b.cu")
    (root / "kernels/b.cu").write_bytes(b"one\n")
    assert gpu_record.source_hash(root) != first


def test_every_module_that_decides_a_launch_is_hashed() -> None:
    """Whatever imports the launcher or describes kernels, and every kernel."""
    hashed = set(gpu_record.source_files())
    assert {file for file in (gpu_record.ROOT / "kernels").iterdir() if file.is_file()} <= hashed
    for file in (gpu_record.ROOT / "cufuse").glob("_[a-z]*.py"):
        if re.search(r"^from cufuse.* import .*\b(launch|Kernel)\b", file.read_text(encoding="utf-8"), re.MULTILINE):
            assert file in hashed, f"{file.name} decides about launches: name it in gpu_record.SOURCES"
    for file in (gpu_record.ROOT / "cufuse").rglob("*.py"):
        if (file.name.startswith("gpu") and file.parent.name != "cufuse") or "launch.prepare(" in file.read_text(encoding="utf-8"):
            assert file in hashed, f"{file} decides about launches: name it in gpu_record.SOURCES"


RECORD: dict[str, Any] = {
    "source_sha256": "0" * 64,
    "date": "2026-11-20T10:00:00+00:00",
    "device": "NVIDIA H200",
    "tests": {"passed": 7, "failed": 0, "skipped": 0},
    "outputs": {"casts": 1_000_000},
    "compute_sanitizer": {"memcheck": {"errors": 0, "summary": "ERROR SUMMARY: 0 errors"}},
}


def test_what_is_said_about_a_record() -> None:
    assert gpu_record.complaint(RECORD, "0" * 64) is None
    assert "python3 -m pytest -m gpu" in str(gpu_record.complaint(RECORD, "1" * 64))
    assert "NVIDIA H200 on 2026-11-20" in str(gpu_record.complaint(RECORD, "1" * 64))
    assert "there is none" in str(gpu_record.complaint(None, "1" * 64))
    then = datetime.datetime.fromisoformat(RECORD["date"])
    for hours, text in ((0.5, "0 hours ago"), (1, "1 hour ago"), (47, "47 hours ago"), (48, "2 days ago"), (250, "10 days ago")):
        assert gpu_record.age(RECORD, then + datetime.timedelta(hours=hours)) == text
    assert gpu_record.summary(12, None) == "tests on a GPU: 12 skipped here; no record of a full run"
    assert "7 passed, 1,000,000 outputs compared" in gpu_record.summary(0, RECORD)


def config(**changes: Any) -> Any:
    options = {"markexpr": "gpu", "keyword": "", "lf": False, "deselect": None, "ignore": None} | changes
    return types.SimpleNamespace(args=[str(gpu_record.ROOT / "tests")], option=types.SimpleNamespace(**options))


def test_only_full_and_clean_runs_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_record.is_full_run(config())
    for change in ({"markexpr": ""}, {"markexpr": "not gpu"}, {"keyword": "norm"}, {"lf": True}, {"deselect": ["x"]}):
        assert not gpu_record.is_full_run(config(**change))
    narrow = config()
    narrow.args = [str(gpu_record.ROOT / "tests" / "test_gpu_norms.py")]
    assert not gpu_record.is_full_run(narrow)

    written: list[dict[str, int]] = []
    monkeypatch.setattr(gpu_record, "write", lambda counts, outputs, seconds: written.append(dict(counts)))

    def finish(*outcomes: tuple[str, str], exitstatus: int = 0) -> int:
        recorder = gpu_record.Recorder()
        for when, outcome in outcomes:
            recorder.pytest_runtest_logreport(types.SimpleNamespace(keywords={"gpu": 1}, when=when, outcome=outcome))  # type: ignore
        recorder.pytest_runtest_logreport(types.SimpleNamespace(keywords={}, when="setup", outcome="skipped"))  # type: ignore
        recorder.pytest_sessionfinish(types.SimpleNamespace(config=config()), exitstatus)  # type: ignore
        return len(written)

    passed = [("setup", "passed"), ("call", "passed"), ("teardown", "passed")]
    assert finish(*passed, *passed) == 1
    assert written == [{"passed": 2, "failed": 0, "skipped": 0}]
    assert finish(*passed, ("setup", "skipped")) == 1
    assert finish(*passed, ("call", "failed")) == 1
    assert finish(*passed, exitstatus=1) == 1
    assert finish() == 1


def test_a_sanitizer_summary_stays_with_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_record, "machine", lambda: {"device": "pretended"})
    file = tmp_path / "record.json"
    for sources, kept in ((gpu_record.source_hash(), RECORD["compute_sanitizer"]), ("0" * 64, {})):
        file.write_text(json.dumps(RECORD | {"source_sha256": sources}))
        gpu_record.write({"passed": 1, "failed": 0, "skipped": 0}, {"b": 2, "a": 1}, 1.23, file)
        found = gpu_record.load(file)
        assert found is not None
        assert found["compute_sanitizer"] == kept
        assert found["outputs_together"] == 3
        assert gpu_record.complaint(found, gpu_record.source_hash()) is None


def test_logs_of_compute_sanitizer() -> None:
    log = "========= COMPUTE-SANITIZER\nsome output\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu_record.sanitizer_summary(log) == {"errors": 0, "summary": "ERROR SUMMARY: 0 errors"}
    assert gpu_record.sanitizer_summary(log.replace("0 errors", "3 errors (1 leaked)"))["errors"] == 3
    race = "========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n"
    assert gpu_record.sanitizer_summary(race)["errors"] == 2
    with pytest.raises(ValueError, match="run to its end"):
        gpu_record.sanitizer_summary("========= COMPUTE-SANITIZER\n")
