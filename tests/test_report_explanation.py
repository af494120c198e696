"""The chain of values behind a worst element, against the stages computed without the report; and the cause it names."""

import numpy as np
import pytest

import cufuse
from cufuse import norm
from cufuse.report import analyse
from tests.report_layers import as_bf16, full_report, qwen3, small_layer, stages_of
from tests.witnesses import bits, random_bf16


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("source", ["qwen3", 9, 18, 36])
def test_the_chain_is_made_of_the_stages_values(source: str | int, packed: bool) -> None:
    """The large layer, or seeds of the small one's input, for which the orders of the sums of rows and heads show in the chain."""
    if source == "qwen3":
        layer, x = qwen3()
        x = x[:3] if packed else x
        recipes = ["late-rounding", "separate-k-norm", "vllm-0.20", "flashinfer"]  # one of each kind, for time
    else:
        layer, x = small_layer(), random_bf16(source, 9, 512, binades=13)
        recipes = [name for name in cufuse.recipes if name != "torch"]
    report = full_report() if len(x) == 16 else analyse(layer, x, recipes=recipes, separate=not packed)
    torch = stages_of(layer, x, "torch", packed)
    found = {name: stages_of(layer, x, name, packed) for name in recipes}
    explained = 0
    for name in recipes:
        worst = report.recipes[name].worst
        if worst is None:
            assert (bits(torch["k_normed"]) == bits(as_bf16(found[name]["k_normed"]))).all()
            continue
        explained += 1
        place = (worst.token, worst.head, worst.channel)
        partner = (worst.token, worst.head, (worst.channel + layer.config.head_dim // 2) % layer.config.head_dim)
        values = {link.name: (link.reference, link.recipe) for link in worst.chain}
        assert len(values) == len(worst.chain)
        entry = next(int(link.name[2:-1]) for link in worst.chain if link.name.startswith("x["))
        for number, stages, recipe in ((0, torch, "torch"), (1, found[name], name)):
            numerics = cufuse.recipes[recipe]
            eps, size = layer.config.rms_norm_eps, layer.config.head_dim
            factor = norm.reciprocal_rms(x.astype(np.float32), eps, numerics.norm)
            heads = norm.reciprocal_rms(stages["k"].reshape(-1, size).astype(np.float32), eps, numerics.head_norm)
            expected = {
                "r of the token": factor[worst.token],
                f"x[{entry}]": x[worst.token, entry],
                f"y[{entry}], used": stages["normalised"][worst.token, entry],
                f"weight[{entry}]": layer.input_norm[entry],
                "k, used": stages["k"][place],
                "r of the head": heads[worst.token * layer.config.num_key_value_heads + worst.head],
                "weight": layer.k_norm[worst.channel],
                "k_normed, used": stages["k_normed"][place],
                "other half's value": stages["k_normed"][partner],
                "k_rotated": stages["k_rotated"][place],
            }
            for link, value in expected.items():
                assert values[link][number] == float(value), f"{recipe}: {link}"
        weight = layer.k_proj[worst.head * layer.config.head_dim + worst.channel].astype(np.float64)
        shown = [as_bf16(stages["normalised"][worst.token]).astype(np.float64) for stages in (torch, found[name])]
        assert entry == np.argmax(np.abs(shown[0] - shown[1]) * np.abs(weight))
        assert worst.k_norm_weight == float(layer.k_norm[worst.channel])
        first = next((link.name for link in worst.chain if link.reference != link.recipe), worst.stage)
        assert worst.first_difference == first
        assert f"{name} '" in worst.cause or "not shown" in worst.cause
        differences = np.abs(as_bf16(found[name]["k_normed"]).astype(np.float64) - torch["k_normed"].astype(np.float64))
        assert worst.difference == differences.max() == differences[place]
        assert worst.stage == "k_normed"
    assert explained >= (4 if source == "qwen3" else 8)


def test_the_cause_names_the_rounding_point() -> None:
    causes = {name: result.worst.cause for name, result in full_report().recipes.items() if result.worst is not None}
    assert causes["late-rounding"] == "torch states 'norm: h = x * r -> bfloat16', late-rounding 'norm: h = x * r in float32'"
    assert causes["torch-rms-norm"].endswith("torch-rms-norm 'norm: h = x * r in float32'")
    # a recipe that differs in the head norm alone: its first difference is there
    mine = cufuse.recipes["torch"].derive("one head rounding", head_norm={"round_normalised": False})
    worst = analyse(*qwen3(), recipes=[mine]).recipes["one head rounding"].worst
    assert worst.first_difference == "k*r, used"
    assert "head norm: h = k * r" in worst.cause.replace("x * r", "k * r")
    other_sum = cufuse.recipes["torch"].derive("other root", norm={"rsqrt": "correct"})
    worst = analyse(*qwen3(), recipes=[other_sum]).recipes["other root"].worst
    if worst is not None:
        assert "rsqrt.approx.f32" in worst.cause
