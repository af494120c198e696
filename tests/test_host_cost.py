"""tests/gpu_host_cost.py, NumPy's arrays in the place of CuPy's: what it times are valid calls."""

import numpy as np
import pytest

from tests import gpu_host_cost


def test_the_calls_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_host_cost, "upload", np.array)
    for name, call in gpu_host_cost.calls().items():
        results = call()
        results = results if isinstance(results, tuple) else (results,)
        assert all(np.isfinite(one.astype(np.float32)).all() for one in results), name
