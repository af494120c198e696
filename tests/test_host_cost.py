"""tests/gpu_host_cost.py, NumPy's arrays in the place of CuPy's: its calls are valid, and its batches are what it says."""

import numpy as np
import pytest

from tests import gpu_host_cost


def test_the_calls_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_host_cost, "upload", np.array)
    for name, call in gpu_host_cost.calls().items():
        results = call()
        results = results if isinstance(results, tuple) else (results,)
        assert all(np.isfinite(one.astype(np.float32)).all() for one in results), name


def test_batches_are_counted() -> None:
    made: list[str] = []
    found = gpu_host_cost.cost(lambda: made.append("call"), lambda: made.append("settle"))
    assert found == sorted(found) and len(found) == gpu_host_cost.BATCHES and found[0] > 0
    assert made.count("call") == gpu_host_cost.CALLS * (gpu_host_cost.BATCHES + 1)
    # what was queued before a batch is not in its time
    assert made[gpu_host_cost.CALLS] == made[-1] == "settle"
