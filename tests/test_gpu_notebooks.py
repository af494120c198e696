"""Notebook 06 on a GPU: its kernel in CuPy prints, line for line, what it prints in NumPy."""

import pytest

from tests import gpu_support
from tests.notebook_cells import FOLDER, demand_same_without_gpu

pytestmark = gpu_support.MARKS


def test_the_kernel_of_the_notebook_gives_the_same_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    demand_same_without_gpu(FOLDER / "06_test_your_own_kernel.ipynb", monkeypatch)
