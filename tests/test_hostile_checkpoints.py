"""Hostile checkpoints under watch: the documented exception or the right arrays, within a second of a processor's time and 100 MB,
no hang, and nothing opened outside the checkpoint's folder.

``CUFUSE_HOSTILE_FILES=20000 python -m pytest -s tests/test_hostile_checkpoints.py`` tries 20,000 mutations (2,000 by default).
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import totals
from tests.hostile_files import HANDMADE, mutated
from tests.hostile_worker import MEMORY, SECONDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of address space, alarms and forks as on Linux")

FILES = int(os.environ.get("CUFUSE_HOSTILE_FILES", "2000"))
AT_A_TIME = 5000


def worker(*arguments: str | int | Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.hostile_worker", *map(str, arguments)]
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_handmade(tmp_path: Path) -> None:
    found = worker("handmade", tmp_path)
    assert list(found) == list(HANDMADE)
    for name, (_, expected) in HANDMADE.items():
        done = found[name]
        what = f"{name}: {done}"
        assert done["message"] == "RIGHT" if expected is None else expected in done["message"], what
        assert not done["message"].startswith(("HANG", "UNDOCUMENTED", "WRONG", "DIED")), what
        assert "\n" not in done["message"] and len(done["message"]) < 1000, what
        assert done["same"], f"another answer while traced, {what}"
        assert done["outside"] == [], what
        assert done["seconds"] < SECONDS, what
        assert done["bytes"] < MEMORY, what
    slowest, largest = (max(done[key] for done in found.values()) for key in ("seconds", "bytes"))
    totals.count("checkpoints, handmade", inputs=len(found), outputs=len(found))
    print(f"\n{len(found)} handmade checkpoints: at most {slowest:.3f} s and {largest:,} bytes each")


def test_mutations(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    failures: list[str] = []
    slowest, largest = 0.0, 0
    for first in range(0, FILES, AT_A_TIME):
        folder = tmp_path / str(first)
        folder.mkdir()
        found = worker("mutations", folder, first, min(first + AT_A_TIME, FILES))
        counts.update(found["counts"])
        failures += found["failures"]
        slowest, largest = max(slowest, found["seconds"]), max(largest, found["bytes"])
    assert not failures, f"{len(failures)} of {FILES}: " + "\n".join(failures[:10])
    assert counts.total() == FILES
    totals.count("checkpoints, mutations", inputs=FILES, outputs=FILES)
    print(f"\n{FILES:,} mutations: at most {slowest:.3f} s and {largest:,} bytes each")
    for what, count in sorted(counts.items()):
        print(f"  {what:36} {count:6,}")
    # neither all refused nor all read: the mutations are near the line between the two
    read = sum(count for what, count in counts.items() if what.endswith("read"))
    assert FILES // 50 < read < FILES // 2


def test_a_seed_gives_the_same_mutation() -> None:
    text = json.dumps({"a": {"dtype": "BF16", "shape": [32], "data_offsets": [0, 64]}}).encode()
    whole = len(text).to_bytes(8, "little") + text + bytes(64)
    assert [mutated(whole, seed) for seed in range(50)] == [mutated(whole, seed) for seed in range(50)]
    assert len({mutated(whole, seed) for seed in range(50)}) > 40


def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    """Each guard with something to catch: a hang, a lot of memory, a file outside, an undocumented exception."""
    program = """
import json, signal, sys
from pathlib import Path
import numpy as np
from cufuse.checkpoint import CheckpointError
from tests import hostile_worker as worker

def sleep(path):
    try:
        while True:
            pass
    except Exception:
        pass

def look_around(path):
    for name in ("/etc/hostname", path / "inside", path / ".." / "beside"):
        try:
            open(name).close()
        except OSError:
            pass
    raise CheckpointError("x")

def fail(path):
    raise KeyError("x")

signal.signal(signal.SIGALRM, worker._ring)
sys.addaudithook(worker._hear)
found = []
for read in (sleep, lambda path: {"a": np.ones(20_000_000)}, look_around, fail):
    worker.read = read
    done = worker.attempt(Path(sys.argv[1]), seconds=0.3)
    done.pop("arrays")
    found.append(done)
print(json.dumps(found))
"""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    hang, large, outside, undocumented = json.loads(done.stdout)
    assert hang["message"] == "HANG"
    assert large["bytes"] > MEMORY
    assert outside["outside"] == ["/etc/hostname", str(tmp_path / ".." / "beside")]
    assert undocumented["message"] == "UNDOCUMENTED KeyError: 'x'"
