"""Notebook 06 on a GPU: its kernel in CuPy prints, line for line, what it prints in NumPy."""

import pytest

import cufuse
from cufuse import launch
from tests import gpu_support
from tests.notebook_cells import FOLDER, printed

pytestmark = gpu_support.MARKS


def test_the_kernel_of_the_notebook_gives_the_same_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    path = FOLDER / "06_test_your_own_kernel.ipynb"
    first, *on_gpu = printed(path, pictures=False)
    assert first == "arrays of cupy\n"

    def none() -> int:
        raise cufuse.NoGpuError("no GPU for the second run")

    monkeypatch.setattr(launch, "device_count", none)
    first, *on_host = printed(path, pictures=False)
    assert first == "arrays of numpy\n"
    assert on_gpu == on_host
    assert any("found with x" in text for text in on_gpu)  # the mistake
