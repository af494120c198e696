"""Into how many slices cuBLAS cuts K, where that was recorded: the Qwen3 projections on an H200.

The table holds cuBLASLt's own answers (not its rules) for every M from 1 to 8192; ``data/cublas_slices.json`` names device,
cuBLASLt version, workspace and the script that recorded it.
"""

import bisect
import functools
import json
from importlib import resources
from typing import Any


class AssumedSlicesWarning(UserWarning):
    """A projection was computed with one slice of K, because nothing is recorded of how cuBLAS would cut it."""


def recorded_slices(m: int, n: int, k: int) -> int | None:
    """The recorded number of slices of K for ``[m, k] x [n, k]^T`` in bfloat16 on sm_90, or None where none is recorded."""
    record = _record()
    runs = record["slices"].get(f"{n}x{k}")
    first, last = record["rows"]
    if runs is None or not first <= m <= last:
        return None
    return int(runs[bisect.bisect_right([run[0] for run in runs], m) - 1][1])


def provenance() -> str:
    """Device and library of the recorded table, for reports."""
    record = _record()
    return f"{record['device']}, cuBLASLt {record['cublaslt']}, {record['date']}"


@functools.cache
def _record() -> dict[str, Any]:
    text = resources.files("cufuse.emulation").joinpath("data/cublas_slices.json").read_text()
    record: dict[str, Any] = json.loads(text)
    return record
