"""What is summed up at the end of a run is the same whether one process tested or several (pytest-xdist)."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = """
import sys, types
import pytest
from tests import totals

sys.modules["tests.gpu_support"] = types.SimpleNamespace(COMPARED={})  # what modules of tests on a GPU count in

@pytest.mark.parametrize("number", range(8))
def test_one(number):
    totals.count("sums", inputs=number, outputs=10 * number)
    totals.ratio("sums", number / 16)
    compared = sys.modules["tests.gpu_support"].COMPARED
    compared["products"] = compared.get("products", 0) + 1000

@pytest.mark.gpu
@pytest.mark.parametrize("number", range(3))
def test_on_a_gpu(number):
    pytest.skip("no GPU")
"""


def last_lines(folder: Path, *options: str) -> list[str]:
    """What a run of CASES ends with, without its own account of seconds and processes."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.totals", "-p", "tests.gpu_record", "-o", "markers=gpu", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "test_cases.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    return [line for line in lines if "inputs" in line or "bound" in line or "products" in line or "tests on a GPU" in line]


def test_sums_of_several_processes(tmp_path: Path) -> None:
    if importlib.util.find_spec("xdist") is None:
        pytest.skip("pytest-xdist is not installed")
    (tmp_path / "test_cases.py").write_text(CASES)
    alone = last_lines(tmp_path, "-p", "no:xdist")
    several = last_lines(tmp_path, "-n", "2", "--dist", "worksteal")
    assert several == alone
    assert "tests on a GPU: 3 skipped here; last full run" in alone.pop(1)
    assert [line.split() for line in alone] == [
        ["products", "8,000"],
        ["sums", "28", "inputs", "280", "outputs", "compared"],
        ["sums", "largest", "error:", "0.438", "of", "its", "bound"],
    ]
