"""Ctrl-C in the middle of a command: exit code 130, one line, and no file that is half written."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals as on POSIX")


def started(*arguments: str | Path, folder: Path) -> subprocess.Popen[str]:
    """A command in a process that Ctrl-C reaches, whatever this one was started by (nohup, a shell's background)."""
    return subprocess.Popen(
        [sys.executable, "-m", "cufuse", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def seconds_of_work(process: subprocess.Popen[str]) -> float:
    """Processor time that the process has had."""
    try:
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def interrupt(process: subprocess.Popen[str]) -> None:
    """Ctrl-C; then what every interrupted command has to leave."""
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "cufuse: interrupted; nothing was written half\n")


@pytest.mark.skipif(sys.platform != "linux", reason="processor time from /proc")
@pytest.mark.parametrize("work", [3.0, 6.0])
def test_report(tmp_path: Path, work: float) -> None:
    """A long report, once early, once late; what stood under the names of its files stays."""
    (tmp_path / "r.json").write_text("an older report")
    (tmp_path / "r.png").write_text("an older plot")
    options = ("--model", "qwen3-32b", "--tokens", "256", "--json", "r.json", "--plot", "r.png")
    pytest.importorskip("matplotlib")
    with started("report", *options, folder=tmp_path) as process:
        while seconds_of_work(process) < work and process.poll() is None:
            time.sleep(0.02)
        interrupt(process)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.png"]
    assert (tmp_path / "r.json").read_text() == "an older report"
    assert (tmp_path / "r.png").read_text() == "an older plot"


@pytest.mark.parametrize("overwrite", [False, True])
def test_synthesise(tmp_path: Path, overwrite: bool) -> None:
    """While the weights are being written; a checkpoint that was to be replaced stays whole."""
    small = ("--layers", "1", "--embedding-rows", "8", "--attention-only")
    before: dict[str, bytes] = {}
    if overwrite:
        with started("synthesise", "model", *small, folder=tmp_path) as process:
            assert process.wait(timeout=60) == 0
        before = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    options = ("--model", "qwen3-8b", "--layers", "4", *(("--overwrite",) if overwrite else ()))
    with started("synthesise", "model", *options, folder=tmp_path) as process:
        limit = time.monotonic() + 60
        while not any(path.stat().st_size > 1 << 22 for path in tmp_path.glob(".model.*.partial/*.safetensors")):
            assert process.poll() is None and time.monotonic() < limit, "never began to write"
            time.sleep(0.005)
        interrupt(process)
    assert [path.name for path in tmp_path.iterdir()] == (["model"] if overwrite else [])
    assert {path.name: path.read_bytes() for path in tmp_path.glob("model/*")} == before
