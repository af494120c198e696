"""The README's figures are those that were recorded: the bench's tables, the counts of the GPU record."""

import copy
import json
import re
from typing import Any

import pytest

from tests import gpu_record, readme_tables


def test_the_tables_are_those_of_the_recorded_bench() -> None:
    readme = readme_tables.README.read_text(encoding="utf-8")
    assert readme == readme_tables.written(readme, readme_tables.load()), "python -m tests.readme_tables writes them anew"


def test_the_counts_are_those_of_the_record() -> None:
    readme, record = readme_tables.README.read_text(encoding="utf-8"), gpu_record.load()
    assert record is not None
    assert f"{sum(record['outputs'].values()):,} outputs, **0** differing bits, {record['tests']['passed']} tests" in readme
    assert f"{record['date'][:10]}, `tests/gpu_record.json`" in readme
    calls = {re.search(r"\d+ calls", tool["suite"])[0] for tool in record["compute_sanitizer"].values()}  # type: ignore[index]
    assert len(calls) == 1
    assert f"{calls.pop()} a tool, **0** errors" in readme
    block = sum(number for area, number in record["outputs"].items() if area.startswith("block"))
    assert f"{block:,} outputs, **0** differing bits" in readme


def test_the_command_of_the_bench_is_printed() -> None:
    command = readme_tables.load()["command"]
    assert command.replace(" --tokens 1,16,64,256,2048,8192", "") in readme_tables.README.read_text(encoding="utf-8")


def small_bench() -> dict[str, Any]:
    def column(microseconds: float | None, differing: int = 0) -> dict[str, Any]:
        return {"microseconds": microseconds, "differing": differing, "outputs": 1000}

    columns = {
        "cufuse": column(9.949), "cufuse_static": column(9.44), "cublas_gemm": column(10.0), "torch_compile": column(None),
        "f_rms_norm": column(100.4, 600), "liger": column(20.0, 3), "eager": column(1000.0),
    }  # fmt: skip
    prices = {"cufuse:batch-invariant": {"cufuse": 1.014}, "cufuse_static:batch-invariant": {"cufuse_static": 0.996}}
    cell = {"model": "8b", "tokens": 1, "floor": 8.0, "host_microseconds": 18.4, "allocated_bytes": 0, "columns": columns}
    cell["ratios"] = prices
    other = copy.deepcopy(cell) | {"model": "0.6b", "tokens": 16, "host_microseconds": 30.0}
    formats = {
        "bf16": {"microseconds": 9.0, "faster": 1.0, "needed": None, "met": None},
        "Q4_0": {"microseconds": 4.5, "faster": 2.0, "needed": 2.5, "met": False},
        "Q8_0": {"microseconds": 5.0, "faster": 1.8, "needed": 1.6, "met": True},
    }
    return {"cells": [cell, other], "quantised": [{"model": "8b", "tokens": 1, "formats": formats}]}


def test_cells_are_marked_where_what_is_shown_meets_the_goal() -> None:
    rows = readme_tables.block_table(small_bench()).splitlines()[2:]
    assert rows == [
        "| 0.6B | 16 |  | 10.0 | 9.95 | 9.44 | - | 20.0 | 100 | 1000 | **0.99** / **0.94** (1) | - (0.75) |",
        "| 8B | 1 | 8.00 | 10.0 | 9.95 | 9.44 | - | 20.0 | 100 | 1000 | 0.99 / **0.94** (0.95) | - (0.7) |",
    ]


def test_words_and_quantised_cells() -> None:
    assert readme_tables.block_in_words(small_bench()).splitlines() == [
        "Outputs whose bits are not eager PyTorch's, over all cells: "
        "cufuse **0** of 2,000, `F.rms_norm` 60 to 60 %, Liger up to 3 in a cell.",
        "With `out=` a call allocates 0 bytes of CuPy's pool; it costs the host 18 to 30 us, 24 in the median (wanted: 20).",
        "Up to 256 rows recipe `batch-invariant` takes 1.01 to 1.01 x `torch`'s time (static weights: 1.00 to 1.00 x).",
    ]
    table = readme_tables.quantised_table(small_bench())
    assert "| 8B | 1 | 9.00 | 4.50, 2.00 x (2.5 x) | 5.00, **1.80 x** (1.6 x) |" in table
    assert "met in 1 of 2 cells" in table


def test_a_changed_figure_is_noticed_and_a_missing_place_refused() -> None:
    bench, readme = readme_tables.load(), readme_tables.README.read_text(encoding="utf-8")
    other = json.loads(json.dumps(bench))
    other["cells"][0]["columns"]["cufuse"]["microseconds"] *= 1.5
    assert readme_tables.written(readme, other) != readme
    with pytest.raises(ValueError, match="quantised block"):
        readme_tables.written(readme.replace("<!-- quantised block", "<!-- another"), bench)
