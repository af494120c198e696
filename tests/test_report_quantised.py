"""The report's quantised side: rows against the same computed otherwise, GGUF files, the command, and misuse."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import cufuse
from cufuse import oracle, quantised
from cufuse.__main__ import main
from cufuse.quantised import quantise_layer
from cufuse.report import analyse
from cufuse.report_plot import draw
from cufuse.report_quantised import RECIPES, print_rows, rows
from tests.report_layers import small_layer
from tests.test_gguf import Written
from tests.witnesses import random_bf16


def layer_and_input() -> tuple[Any, np.ndarray]:
    layer = small_layer()
    return layer, random_bf16(9, 5, layer.config.hidden_size)


def test_rows_are_what_the_operations_give() -> None:
    layer, x = layer_and_input()
    found = {(row.weights, row.norms, row.recipe): row for row in rows(layer, x, ["q8_0", "Q4_0"])}
    assert list(found) == [
        ("bfloat16", "kept", "torch"), ("bfloat16", "kept", "late-rounding"), ("bfloat16", "kept", "llama.cpp"),
        *(("Q8_0", "kept", recipe) for recipe in RECIPES), ("Q8_0", "Q8_0", "block-scaled"),
        *(("Q4_0", "kept", recipe) for recipe in RECIPES), ("Q4_0", "Q4_0", "block-scaled"),
    ]  # fmt: skip
    exact = oracle.linear(oracle.rms_norm(x, layer.input_norm, eps=layer.config.rms_norm_eps), layer.k_proj)
    normalised = cufuse.rms_norm(x, layer.input_norm, eps=layer.config.rms_norm_eps)
    for weights, recipe, slices in (("Q8_0", "block-scaled", 8), ("Q4_0", "torch", 1)):
        k = quantised.quantised_linear(normalised, quantised.quantise(layer.k_proj, weights), recipe=recipe, k_slices=slices)
        error = float(np.sqrt(np.mean((k.astype(np.float64) - exact) ** 2)))
        assert found[weights, "kept", recipe].stages["k"].rms_error == pytest.approx(error, rel=1e-12)
    assert found["bfloat16", "kept", "torch"].stages["k"].mismatches == 0


def test_quantisation_outweighs_rounding_and_quantised_norms_are_worse() -> None:
    layer, x = layer_and_input()
    found = {(row.weights, row.norms, row.recipe): row.stages["k_normed"].rms_error for row in rows(layer, x, ["Q4_0", "Q8_0"])}
    assert found["Q4_0", "kept", "block-scaled"] > found["Q8_0", "kept", "block-scaled"] > found["bfloat16", "kept", "torch"]
    for form in ("Q4_0", "Q8_0"):
        assert found[form, form, "block-scaled"] > 1.2 * found[form, "kept", "block-scaled"]


@pytest.mark.filterwarnings("ignore::cufuse.AssumedSlicesWarning")
def test_a_quantised_layer_under_every_recipe() -> None:
    """Norm weights of float32 go to the recipes that take them, and rounded to the others; truth is that of the decoded weights."""
    layer, x = layer_and_input()
    report = analyse(quantise_layer(layer, "Q8_0"), x)
    assert {"block-scaled", "llama.cpp-q8_1"} <= set(report.recipes)
    assert any("q Q8_0, k Q8_0, v Q8_0" in note for note in report.notes)
    assert report.recipes["float32"].stages["k"].rms_error < 1e-5
    assert report.recipes["torch"].stages["k"].rms_error > report.recipes["llama.cpp"].stages["k"].rms_error
    worst = report.recipes["llama.cpp-q8_1"].worst
    assert worst is not None
    assert worst.chain[-1].name == "k_rotated"
    stage = report.recipes["llama.cpp-q8_1"].stages["k_normed"]
    assert worst.difference == stage.max_abs_diff


def test_texts_and_pictures() -> None:
    layer, x = layer_and_input()
    table = rows(layer, x, ["Q8_0", "Q6_K", "Q4_K", "Q4_0"]) if layer.config.hidden_size % 256 == 0 else rows(layer, x, ["Q4_0"])
    console = Console(record=True, width=200, file=io.StringIO())
    print_rows(table, console)
    text = console.export_text()
    assert "Norm weights must not be quantised" in text
    assert "block-scaled" in text
    pytest.importorskip("matplotlib")
    report = dataclasses.replace(analyse(layer, x, recipes=["torch", "late-rounding"]), quantisation=tuple(table))
    figure = draw(report)
    assert [axes.get_title(loc="left") for axes in figure.axes][-1] == "What quantising costs"
    assert report.to_json()["quantisation"][0]["stages"]["k"]["outputs"] == table[0].stages["k"].outputs


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(list(arguments))
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    return int(code or 0), captured.out, captured.err


@pytest.mark.filterwarnings("ignore::cufuse.AssumedSlicesWarning")
def test_command_with_a_gguf_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = Written(tmp_path / "tiny.gguf").path
    target = tmp_path / "report.json"
    code, out, err = run(capsys, "report", str(path), "--tokens", "3", "--recipes", "torch,llama.cpp-q8_1", "--json", str(target))
    assert code == 0, err
    assert "Projections as stored: q Q4_K, k Q4_K, v Q6_K" in out
    assert list(json.loads(target.read_text())["recipes"]) == ["torch", "llama.cpp-q8_1"]
    code, _, err = run(capsys, "report", str(path), "--packed", "--tokens", "3")
    assert code == 2
    assert "weights[2] is Q6_K" in err
    code, _, err = run(capsys, "report", str(path), "--quantise", "q4_0")
    assert code == 2
    assert "quantised already" in err


def test_command_with_quantise(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "report", "--tokens", "2", "--recipes", "torch", "--quantise", "q8_0, q4_0", "--json", "-")
    assert code == 0, err
    table = json.loads(out)["quantisation"]
    assert [row["weights"] for row in table if row["recipe"] == "block-scaled" and row["norms"] == "kept"] == ["Q8_0", "Q4_0"]
    code, _, err = run(capsys, "report", "--quantise", "q5_1")
    assert code == 2
    assert "format is 'q5_1'; known are Q4_0" in err
