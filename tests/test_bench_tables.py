"""The tables of ``cufuse bench`` without a GPU: columns of several recipes, quantised weights with their goals, text, JSON."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import cufuse
from cufuse import bench, bench_inputs, bench_results
from cufuse.__main__ import main
from cufuse.bench_results import (
    BF16,
    COLUMNS,
    COMPILE,
    CUFUSE,
    GEMM,
    LIGER,
    STATIC,
    Cell,
    FormatMeasurement,
    Measurement,
    QuantisedCell,
    Results,
    column_of,
)
from cufuse.bench_text import WIDTH, print_results
from tests import host_bench
from tests.host_bench import COMMAND


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The pretended GPU, without PyTorch, in an empty folder."""
    return host_bench.installed(monkeypatch, tmp_path)


def test_several_recipes(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """The first has the usual columns, each further one two of its own, compared with its own emulation, and its price."""
    assert main([*COMMAND, "--recipe", "torch,float32", "--no-peers"]) == 0
    found = json.loads(Path("b.json").read_text())
    assert (found["recipe"], found["recipes"]) == ("torch", ["torch", "float32"])
    assert found["columns"]["cufuse:float32"] == "cufuse under recipe 'float32'"
    for cell in found["cells"]:
        assert list(cell["columns"]) == [CUFUSE, STATIC, "cufuse:float32", "cufuse_static:float32", GEMM]
        assert [cell["columns"][name]["differing"] for name in cell["columns"]] == [0, 0, 0, 0, None]
        times = {name: one["microseconds"] for name, one in cell["columns"].items()}
        assert cell["ratios"]["cufuse:float32"] == {CUFUSE: times["cufuse:float32"] / times[CUFUSE]}
        assert cell["ratios"]["cufuse_static:float32"] == {STATIC: times["cufuse_static:float32"] / times[STATIC]}
    text = " ".join(capsys.readouterr().out.split())
    assert "Recipe float32 beside torch: microseconds, time divided by time; outputs that differ from emulation" in text


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def test_quantised_weights(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND, "--quantised", "q4_0,Q8_0", "--no-peers"]) == 0
    found = json.loads(Path("b.json").read_text())
    assert found["command"].endswith("--no-peers --quantised Q4_0,Q8_0")
    described = re.split(r"\W+", str(bench.__doc__))
    first = found["quantised"][0]
    assert {*first, *first["formats"][BF16]} <= set(described)
    layer = bench_inputs.Layer(bench.MODELS["small"], 3)
    exact_weight = layer.weights[0].astype(np.float64)
    for cell in found["quantised"]:
        assert (cell["model"], cell["hidden"], cell["rows"]) == ("small", 128, 512)
        assert list(cell["formats"]) == [BF16, "Q4_0", "Q8_0"]
        y = cufuse.rms_norm(layer.tokens[: cell["tokens"]], layer.norm)
        truth = y.astype(np.float64) @ exact_weight.T
        for name, one in cell["formats"].items():
            product = cufuse.linear(y, layer.weights[0], k_slices=1)
            if name != BF16:
                product = cufuse.quantised_linear(y, cufuse.quantise(layer.weights[0], name))
            error = root_mean_square(product.astype(np.float64) - truth) / root_mean_square(truth)
            assert one["error"] == pytest.approx(error, rel=1e-9)
            assert one["bytes"] == {BF16: 512 * 128 * 2, "Q4_0": 512 * 128 // 32 * 18, "Q8_0": 512 * 128 // 32 * 34}[name]
            assert (one["differing"], one["against"], one["failed"]) == (0, "emulation", False)
            assert one["faster"] == cell["formats"][BF16]["microseconds"] / one["microseconds"]
            goal = 1.0 if name == "Q4_0" else None
            assert (one["needed"], one["met"]) == (goal, None if goal is None else one["faster"] >= goal)
        errors = [one["error"] for one in cell["formats"].values()]
        assert errors[0] < 0.004 < errors[2] < 0.01 < 0.05 < errors[1] < 0.15
    out = capsys.readouterr().out
    assert "The block with weights in other formats" in out
    assert "36,864" in out


def test_a_format_that_fails_names_its_reason(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """K = 128 has no whole block of Q4_K."""
    arguments = ["bench", "--model", "small", "--tokens", "2", "--repeat", "1", "--json", "b.json"]
    assert main([*arguments, "--only-quantised", "--quantised", "Q4_K,Q8_0", "--quantised-tokens", "3"]) == 2
    done = capsys.readouterr()
    found = json.loads(Path("b.json").read_text())
    assert (found["cells"], found["complete"]) == ([], True)
    assert (
        found["command"]
        == "cufuse bench --model small --tokens 2 --repeat 1 --only-quantised --quantised Q4_K,Q8_0 --quantised-tokens 3"
    )
    assert [cell["tokens"] for cell in found["quantised"]] == [3]
    formats = found["quantised"][0]["formats"]
    assert {name: one["failed"] for name, one in formats.items()} == {BF16: False, "Q4_K": True, "Q8_0": False}
    assert formats["Q4_K"]["note"].startswith("ValueError: ")
    assert "256" in formats["Q4_K"]["note"]
    assert formats["Q8_0"]["differing"] == 0
    assert done.err.startswith("cufuse bench: small, 3 tokens, weights in Q4_K: ValueError: ")


def test_nothing_written_is_seen_in_a_format(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def skip(call: Callable[[], Any], options: dict[str, Any]) -> None:
        if cufuse.named_recipes.get(options["recipe"]).name != "block-scaled":
            call()

    host_bench.change_calls(monkeypatch, skip)
    assert main([*COMMAND, "--only-quantised", "--quantised", "Q8_0"]) == 0
    cells = json.loads(Path("b.json").read_text())["quantised"]
    assert [cell["formats"]["Q8_0"]["differing"] for cell in cells] == [512, 3 * 512]
    assert [cell["formats"][BF16]["differing"] for cell in cells] == [0, 0]


def test_goals() -> None:
    """The project's, for an H200."""
    needed = bench_results.needed
    assert [needed("Q4_0", model, 1) for model in bench.MODELS] == [1.5, 1.0, 2.2, 2.5, 1.0, 2.8]
    assert [needed("Q8_0", model, 1) for model in bench.MODELS] == [None, None, None, 1.6, None, 1.6]
    assert [needed("Q4_0", "8b", tokens) for tokens in (2, 64, 65, 2048)] == [1.0, 1.0, None, None]
    assert [needed(name, "8b", 2) for name in ("Q8_0", "Q4_K", "Q6_K", BF16)] == [None] * 4
    cell = QuantisedCell("8b", 4096, 6144, 1, {BF16: FormatMeasurement(10.0), "Q4_0": FormatMeasurement(4.0)})
    assert (cell.faster("Q4_0"), cell.met("Q4_0"), cell.met(BF16), cell.met("Q8_0")) == (2.5, True, None, None)
    cell.formats["Q4_0"].microseconds = 4.1
    assert cell.met("Q4_0") is False
    cell.formats["Q4_0"].microseconds = None
    assert (cell.faster("Q4_0"), cell.met("Q4_0")) == (None, None)


def canned() -> Results:
    """A whole default run with made-up numbers."""
    device = {"name": "NVIDIA H200", "driver": "1.2.3"}
    results = Results(device, {"cufuse": "0"}, "2026-01-01T00:00:00+00:00", "cufuse bench", ["torch"], 7, complete=True)
    results.absent[LIGER] = "liger_kernel cannot be imported [at all]"
    for model, tokens in ((model, tokens) for model in ("0.6b", "4b", "8b", "32b") for tokens in (1, 16, 64, 256, 2048, 8192)):
        cell = Cell(model, 5120, 10240, tokens, 11, 24.61, 18.6, 0, seconds=2.5)
        for number, name in enumerate(COLUMNS):
            if name != LIGER:
                outputs = tokens * 10240
                differ = None if name == GEMM else outputs * 5 // 9 if name == COMPILE else 0
                cell.columns[name] = Measurement(10.0 * tokens**0.5 * (number + 1), 1.0, 2.0, 14, differ, outputs, "eager")
        results.cells.append(cell)
    results.cells[-1].columns[COMPILE] = Measurement(note="left out, the 120 s of --peer-seconds were spent")
    results.cells[3].columns[CUFUSE].differing = 12
    return results


def test_tables_of_recipes_and_formats(capsys: pytest.CaptureFixture[str]) -> None:
    results = canned()
    results.recipes.append("batch-invariant")
    for cell in results.cells:
        for name in (CUFUSE, STATIC):
            other = Measurement(1.25 * (cell.time(name) or 0), 1.0, 2.0, 14, 7, cell.tokens * 10240, "eager")
            cell.columns[column_of(name, "batch-invariant")] = other
        results.quantised.append(QuantisedCell(cell.model, cell.hidden, cell.rows, cell.tokens, {
            BF16: FormatMeasurement(10.0, 9.0, 11.0, 14, 0, 10240, "emulation", bytes=104857600, error=1.6e-3),
            "Q4_0": FormatMeasurement(8.0 if cell.tokens < 64 else 12.0, 9.0, 11.0, 14, bytes=29491200, error=8.6e-2),
        }))  # fmt: skip
    print_results(results, Console(width=WIDTH))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    rows = [" ".join(line.split()) for line in lines]
    assert "model M cufuse batch-invariant ratio static batch-invariant ratio differing" in rows
    assert "32b 1 20.0 25.0 1.25 30.0 37.5 1.25 7" in rows
    assert "model M weights us bf16/it needed met bytes RMS error differing" in rows
    assert "0.6b 1 bf16 10.0 1.00 - - 104,857,600 1.6e-03 0" in rows
    assert "Q4_0 8.00 1.25 1.50 no 29,491,200 8.6e-02 -" in rows
    assert "Q4_0 8.00 1.25 1.00 yes 29,491,200 8.6e-02 -" in rows
    text = " ".join(" ".join(lines).split())
    assert "Q4_0: the goal is met in 4 of 12 cells, not in 0.6b at 1, 0.6b at 64, 4b at 1," in text


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    print_results(canned(), Console(width=WIDTH))
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert "…" not in out
    rows = [" ".join(line.split()) for line in lines]
    assert "model M floor cuBLAS cufuse static compile F.rms eager" in rows
    assert "32b 1 24.6 10.0 20.0 30.0 40.0 60.0 70.0" in rows
    assert "8192 24.6 905 1810 2715 - 5431 6336" in rows
    assert "0.6b 1 2.00 0.50 0.81 3.00 0.75 1.22 18.6 0" in rows
    assert "256 12 0 55.6 % 0 0" in rows
    text = " ".join(out.split())
    assert "cufuse: 12 of 433,233,920 outputs differ from eager: 0.6b at 256." in text
    assert "static: 0 of 433,233,920 outputs differ from eager." in text
    assert "Liger absent: liger_kernel cannot be imported [at all]." in text
    assert "Note: compile: left out, the 120 s of --peer-seconds were spent (32b at 8192)." in text


def test_json_of_canned_measurements() -> None:
    found = json.loads(json.dumps(canned().to_json()))
    assert found["columns"] == COLUMNS
    assert found["cells"][0]["ratios"] == {
        CUFUSE: {GEMM: 2.0, COMPILE: 0.5, "floor": 20 / 24.61}, STATIC: {GEMM: 3.0, COMPILE: 0.75, "floor": 30 / 24.61},
    }  # fmt: skip
    assert found["cells"][-1]["ratios"][CUFUSE][COMPILE] is None
