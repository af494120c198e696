"""The analysis of a layer: its numbers against the same, computed otherwise; its JSON form, its texts, its time and memory."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import cufuse
from cufuse import named_recipes, oracle, qkv
from cufuse.report import OPTIONS, Report, analyse
from cufuse.report_inputs import made_up_hidden_states, random_token_ids
from cufuse.report_text import print_layers, print_report, verdict
from cufuse.synthetic import synthetic_layer
from tests.report_layers import as_bf16, full_report, qwen3, small_layer, stages_of
from tests.witnesses import bits, demand_bits, random_bf16


def printed(report: Report) -> str:
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        print_report(report, console)
        return console.export_text()


def test_the_reference_equals_itself() -> None:
    report = full_report()
    assert report.reference == next(iter(report.recipes)) == "torch"
    assert tuple(report.recipes) == tuple(name for name in cufuse.recipes if name not in named_recipes.QUANTISED_ONLY)
    for name, stage in report.recipes["torch"].stages.items():
        assert name in qkv.STAGES
        assert (stage.mismatches, stage.max_abs_diff, stage.max_ulp_diff, stage.share) == (0, 0, 0, 0)
        assert 0 < stage.rms_error < stage.max_abs_error
    assert report.recipes["torch"].worst is None
    assert report.recipes["torch"].amplification is None
    assert list(report.recipes["torch"].stages) == list(qkv.STAGES)
    sizes = [stage.outputs for stage in report.recipes["torch"].stages.values()]
    assert sizes == [16 * 1024, 16 * 2048, 16 * 1024, 16 * 1024, 16 * 2048, 16 * 1024, 16 * 2048, 16 * 1024]


def test_late_rounding_is_amplified_by_the_k_norm() -> None:
    report = full_report()
    late = report.recipes["late-rounding"]
    assert late.stages["k_normed"].share > 0.1
    assert late.amplification >= 10
    assert late.amplification == late.stages["k_normed"].max_abs_diff / late.stages["k"].max_abs_diff
    assert report.max_k_norm_weight == 96.5
    assert late.worst.k_norm_weight is not None
    # float32 kept float32 has the same bits as late rounding, and is far nearer to the truth than torch
    assert report.recipes["float32"].stages == late.stages
    assert late.stages["k_normed"].rms_error < report.recipes["torch"].stages["k_normed"].rms_error / 100


def test_the_study_s_options() -> None:
    options = full_report().options
    assert {title: option.recipe for title, option in options.items()} == OPTIONS
    equal = {title for title, option in options.items() if option.all_bits_equal}
    assert equal == {"PyTorch path", "option 1: PyTorch's rounding points, one call"}
    one_call = options["option 1: PyTorch's rounding points, one call"]
    assert (one_call.k.mismatches, one_call.k_normed.mismatches, one_call.amplification) == (0, 0, None)
    assert options["option 3: K norm apart"].k_normed.mismatches > 0


STAGE_KEYS = {"outputs", "mismatches", "max_abs_diff", "max_ulp_diff", "max_abs_error", "rms_error", "max_ulp_error"}


def demand_schema(content: dict, stages: set[str]) -> None:
    assert set(content) == {
        "schema", "model", "layer", "tokens", "reference", "arch", "form", "synthetic", "max_k_norm_weight", "recipes", "options",
        "notes",
    }  # fmt: skip
    assert content["schema"] == 1
    for recipe in content["recipes"].values():
        assert set(recipe) == {"stages", "amplification", "worst"}
        assert set(recipe["stages"]) == stages
        assert all(set(stage) == STAGE_KEYS for stage in recipe["stages"].values())
        if recipe["worst"] is not None:
            assert set(recipe["worst"]) == {
                "stage", "token", "head", "channel", "k_norm_weight", "difference", "first_difference", "cause", "chain",
            }  # fmt: skip
            assert all(set(link) == {"name", "reference", "recipe"} for link in recipe["worst"]["chain"])
    for option in content["options"].values():
        assert set(option) == {"recipe", "k", "k_normed", "amplification", "all_bits_equal"}
        assert set(option["k"]) == STAGE_KEYS


def test_json_form() -> None:
    report = full_report()
    text = json.dumps(report.to_json(), allow_nan=False)
    content = json.loads(text)
    demand_schema(content, set(qkv.STAGES))
    told = [content[key] for key in ("model", "layer", "tokens", "reference", "arch", "form", "synthetic")]
    assert told == ["qwen3-0.6b", 0, 16, "torch", "sm_90", "separate", True]
    late = content["recipes"]["late-rounding"]
    assert late["stages"]["k"] == dataclasses.asdict(report.recipes["late-rounding"].stages["k"])
    assert late["amplification"] == report.recipes["late-rounding"].amplification
    assert content["recipes"]["torch"]["worst"] is content["recipes"]["torch"]["amplification"] is None
    assert any("synthetic" in note for note in content["notes"])
    assert any("gemma multiplies by weight + 1" in note for note in content["notes"])


def test_numbers_computed_once_more() -> None:
    """k before and after its norm under late rounding, from the public operations, element by element in Python."""
    layer, x = qwen3()
    eps = layer.config.rms_norm_eps
    path, wide = (
        cufuse.linear(cufuse.rms_norm(x, layer.input_norm, eps=eps, recipe=name), layer.k_proj, recipe=name)
        for name in ("torch", "late-rounding")
    )
    truth = oracle.linear(oracle.rms_norm(x, layer.input_norm, eps=eps), layer.k_proj)
    found = full_report().recipes["late-rounding"].stages
    for stage, a, b, t in (
        ("k", wide, path, truth),
        (
            "k_normed",
            cufuse.rms_norm(wide.reshape(16, 8, 128), layer.k_norm, eps=eps, recipe="late-rounding"),
            cufuse.rms_norm(path.reshape(16, 8, 128), layer.k_norm, eps=eps),
            oracle.rms_norm(truth.reshape(16, 8, 128), layer.k_norm, eps=eps),
        ),
    ):
        shown, other, real = cufuse.round_to_bf16(a).ravel(), b.ravel(), t.ravel().tolist()
        differences = [abs(float(one) - float(two)) for one, two in zip(shown, other, strict=True)]
        errors = [abs(float(one) - two) for one, two in zip(a.ravel(), real, strict=True)]
        steps = np.abs(ordinals(shown) - ordinals(other))
        expected = found[stage]
        assert expected.outputs == len(differences) == 16 * 1024
        assert expected.mismatches == sum(one != two for one, two in zip(bits(shown).tolist(), bits(other).tolist(), strict=True))
        assert expected.max_abs_diff == max(differences)
        assert expected.max_ulp_diff == steps.max()
        assert expected.max_abs_error == max(errors)
        assert expected.rms_error == pytest.approx(math.sqrt(math.fsum(error * error for error in errors) / len(errors)), rel=1e-12)
        assert expected.max_ulp_error == np.abs(ordinals(shown) - ordinals(oracle.rounded(t).ravel())).max()


def ordinals(x: np.ndarray) -> np.ndarray:
    code = bits(x).astype(np.int64)
    return np.where(code < 0x8000, code, 0x8000 - code)


def test_packed_and_separate_differ_where_cublas_s_slices_do() -> None:
    """Qwen3-8B's shapes at 2 tokens: v has 3 slices of K apart and 1 packed; the reference is each form's own."""
    layer = synthetic_layer("qwen3-8b", 0, 0)
    x = made_up_hidden_states(1, 4096, 1)
    reports = {separate: analyse(layer, x, recipes=["batch-invariant"], separate=separate) for separate in (True, False)}
    assert [reports[separate].form for separate in (True, False)] == ["separate", "packed"]
    shares = {separate: report.recipes["batch-invariant"].stages["v"].mismatches for separate, report in reports.items()}
    assert shares[False] == 0
    assert shares[True] > 0


def test_another_tensor_core() -> None:
    """sm_80: nothing is recorded there, which is a note and not a warning; the bits are another core's."""
    layer, x = qwen3()
    report = analyse(layer, x[:4], recipes=["late-rounding"], arch="sm_80")
    assert report.arch == "sm_80"
    assert list(report.recipes) == ["torch", "late-rounding"]
    assert sum("is not recorded: one slice assumed" in note for note in report.notes) == 2  # of N = 2048 and N = 1024
    assert any("Nothing was measured on sm_80" in note for note in report.notes)
    assert report.options["option 1: PyTorch's rounding points, one call"].all_bits_equal
    here = analyse(layer, x[:4], recipes=["late-rounding"])
    assert here.recipes["torch"].stages["k"].rms_error != report.recipes["torch"].stages["k"].rms_error
    assert not any("assumed" in note for note in here.notes)


def test_another_reference() -> None:
    layer, x = qwen3()
    report = analyse(layer, x[:3], recipes=["torch", "float32", "vllm-0.20"], reference="late-rounding")
    assert list(report.recipes) == ["late-rounding", "torch", "float32", "vllm-0.20"]
    assert all(stage.mismatches == 0 for stage in report.recipes["float32"].stages.values())
    torch, back = report.recipes["torch"].stages, analyse(layer, x[:3], recipes=["late-rounding"]).recipes["late-rounding"].stages
    for name in qkv.STAGES:
        assert (torch[name].mismatches, torch[name].max_abs_diff) == (back[name].mismatches, back[name].max_abs_diff)
    assert report.options["PyTorch path"].all_bits_equal
    assert not report.options["fused kernel, late rounding"].all_bits_equal
    assert "Bit for bit late-rounding" in printed(report)
    own = cufuse.recipes["torch"].derive("mine", norm={"round_normalised": False})
    mine = analyse(layer, x[:3], recipes=[], reference=own)
    assert list(mine.recipes) == ["mine"]
    assert mine.options == {}
    assert "Only mine itself was run." in printed(mine)


def test_a_layer_without_head_norms() -> None:
    layer, x = small_layer(head_norms=False), random_bf16(7, 5, 512)
    report = analyse(layer, x)
    assert report.max_k_norm_weight is None
    expected = {"normalised", "q", "k", "v", "q_rotated", "k_rotated"}
    demand_schema(json.loads(json.dumps(report.to_json(), allow_nan=False)), expected)
    late = report.recipes["late-rounding"]
    assert late.amplification is None
    assert late.worst.stage == "k"
    assert late.worst.k_norm_weight is None
    assert {link.name for link in late.worst.chain} >= {"k, used", "k_rotated"}
    assert report.options["option 1: PyTorch's rounding points, one call"].all_bits_equal
    assert report.options["option 1: PyTorch's rounding points, one call"].k_normed is None
    text = printed(report)
    assert "after their norm" not in text
    assert "of the keys differ, by up to" in text


def test_positions_and_one_token() -> None:
    layer, x = small_layer(), random_bf16(7, 1, 512)
    report = analyse(layer, x, first_position=1000)
    assert report.tokens == 1
    assert report.layer == 3
    assert not report.synthetic
    assert report.model == "small"
    torch, late = (stages_of(layer, x, name, first_position=1000) for name in ("torch", "late-rounding"))
    at_zero = analyse(layer, x)
    found = report.recipes["late-rounding"].stages["k_rotated"]
    assert found.mismatches == (bits(torch["k_rotated"]) != bits(as_bf16(late["k_rotated"]))).sum()
    assert report.recipes["late-rounding"].stages["k_normed"] == at_zero.recipes["late-rounding"].stages["k_normed"]
    assert found != at_zero.recipes["late-rounding"].stages["k_rotated"]


def test_float32_stages_are_compared_rounded_and_measured_unrounded() -> None:
    layer, x = small_layer(), random_bf16(7, 4, 512)
    stage = analyse(layer, x, recipes=["float32"]).recipes["float32"].stages["normalised"]
    assert stage.rms_error < 1e-6  # a rounding to bfloat16 would leave about 1e-3
    assert stage.max_ulp_error <= 1
    torch = stages_of(layer, x, "torch")["normalised"]
    wide = stages_of(layer, x, "float32")["normalised"]
    assert stage.mismatches == (bits(cufuse.round_to_bf16(wide)) != bits(torch)).sum()


def test_progress_and_notes() -> None:
    layer, x = small_layer(), random_bf16(7, 2, 512)
    seen: list[tuple[str, float]] = []
    report = analyse(layer, x, recipes=["gemma"], notes=["Mine."], progress=lambda name, done: seen.append((name, done)))
    assert seen == [("torch", 0.0), ("gemma", 0.5), ("oracle", 1.0)]
    assert report.notes[0] == "Mine."
    assert "K = 512 on sm_90 is not recorded" in " ".join(report.notes)


def test_values_that_are_no_numbers() -> None:
    """An infinity in the input: no crash, no invalid JSON; the rows without it are compared as ever."""
    layer, x = small_layer(), random_bf16(7, 3, 512)
    x[1, 5] = np.inf
    report = analyse(layer, x, recipes=["late-rounding"])
    content = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert content["recipes"]["late-rounding"]["stages"]["k"]["max_abs_error"] is None
    late = report.recipes["late-rounding"]
    assert 0 < late.stages["k"].mismatches <= 2 * 512
    assert late.worst.token != 1
    assert printed(report)


def test_wrong_input() -> None:
    layer, x = small_layer(), random_bf16(7, 3, 512)
    wrong = [
        (TypeError, "hidden_states is a list", {"hidden_states": x.tolist()}),
        (ValueError, r"hidden_states has shape \(0, 512\)", {"hidden_states": x[:0]}),
        (ValueError, r"hidden_states has shape \(512,\)", {"hidden_states": x[0]}),
        (ValueError, "norm_weight has shape", {"hidden_states": x[:, :128]}),
        (TypeError, "x has dtype float32", {"hidden_states": x.astype(np.float32)}),
        (ValueError, "recipe is 'pytorch'", {"recipes": ["pytorch"]}),
        (ValueError, "recipe is 'pytorch'", {"reference": "pytorch"}),
        (ValueError, "sm_75 has no bfloat16", {"arch": "sm_75"}),
        (ValueError, "core is 'sm_1'", {"arch": "sm_1"}),
    ]
    for kind, message, change in wrong:
        with pytest.raises(kind, match=message):
            analyse(layer, **{"hidden_states": x} | change)


def test_the_text_says_what_the_numbers_say() -> None:
    report = full_report()
    lines = verdict(report)
    exact = [name for name, result in report.recipes.items() if not any(stage.mismatches for stage in result.stages.values())]
    assert exact[0] == "torch"
    assert all(name in lines[0] for name in exact[1:])
    text = printed(report)
    for expected in ("late-rounding: ", "The largest K-norm weight of this layer is 96.5", "Cause", "Cure:", "worst element"):
        assert expected in text
    assert f"amplified {report.recipes['late-rounding'].amplification:.3g} times" in text
    errors = {name: result.stages["k_normed"].rms_error for name, result in report.recipes.items()}
    closest = min(errors, key=errors.__getitem__)
    assert f"their norm): {closest}, {errors[closest]:.3g}; torch: {errors['torch']:.3g}." in " ".join(text.split())
    console = Console(record=True, width=400, quiet=True)
    print_layers([report, dataclasses.replace(report, layer=1)], console)


def test_made_up_inputs() -> None:
    first, again = made_up_hidden_states(5, 300, 7), made_up_hidden_states(5, 300, 7)
    demand_bits(first, again)
    assert (bits(first) != bits(made_up_hidden_states(5, 300, 8))).any()
    assert 0.8 < first.astype(np.float64)[:, 8:200].std() < 1.2
    ids = random_token_ids(1000, 50, 3)
    assert set(ids.tolist()) == set(range(50))
    assert random_token_ids(3, 0, 3).tolist() == [0, 0, 0]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of a process from /proc")
def test_time_and_memory() -> None:
    """16 tokens, all recipes, in a process of their own: at most 20 s and 1 GB."""
    # getrusage would answer with the peak of the process that started this one, where that was higher
    program = (
        "import time; start = time.perf_counter()\n"
        "from cufuse.__main__ import main\n"
        "assert main(['report', '--json', '-']) == 0\n"
        "import sys; status = open('/proc/self/status').read()\n"
        "peak = status.split('VmHWM:')[1].split()[0]\n"
        "print(time.perf_counter() - start, peak, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    seconds, kilobytes = map(float, done.stderr.split())
    assert len(json.loads(done.stdout)["recipes"]) == 12
    assert seconds <= 20
    assert kilobytes <= 1e6
