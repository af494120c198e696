"""Traces and comparisons: planted differences are found where they are, and the command line shows them."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import cufuse
from cufuse import qwen3
from cufuse.__main__ import main
from cufuse.trace import first_difference, run, trace
from tests.golden import small_model
from tests.small_qwen3 import small_qwen3, write_folder
from tests.witnesses import bits

pytestmark = pytest.mark.filterwarnings("ignore::cufuse.AssumedSlicesWarning")
PROMPT = small_model.prompt(7)
TORCH = cufuse.recipes["torch"]


def test_late_rounding_parts_in_the_first_norm() -> None:
    found = trace(small_qwen3(), PROMPT, 40, "torch", "late-rounding")
    assert found.first is not None and found.first.name == "layers.0.normalised" and found.first.step == 0
    assert any("h = x * r -> bfloat16" in cause for cause in found.causes)
    assert found.worst is not None and found.chain[-1].reference != found.chain[-1].recipe
    assert found.first_token is not None and found.tokens[0][: found.first_token] == found.tokens[1][: found.first_token]
    assert found.tokens[0][found.first_token] != found.tokens[1][found.first_token]
    shares = [row.share for row in found.growth if row.stage == "mlp_residual"]
    assert len(shares) == 4 and 0 < shares[0] < shares[-1]
    (_, mine, a, _), (_, other, c, _) = found.logits
    assert a >= c and (mine, other) == tuple(tokens[found.first_token] for tokens in found.tokens)


@pytest.mark.parametrize(
    ("change", "stage"),
    [
        ({"rope": {"round_products": False}}, "0.q_rotated"),
        ({"attention": {"round_scores": False}}, "0.scores"),
        ({"attention": {"round_scaled": False}}, "0.scaled_scores"),
        ({"mlp": {"round_activated": False}}, "0.activated"),
        ({"head_norm": {"round_normalised": False}}, "0.q_normed"),
        ({"mlp_norm": {"round_normalised": False}}, "0.mlp_normalised"),
        ({"gemm": {"core": "sm_80"}}, "1.q"),  # no accumulator of layer 0 is near enough to a tie
    ],
)
def test_each_rounding_is_named(change: dict[str, Any], stage: str) -> None:
    found = trace(small_qwen3(), PROMPT, 2, "torch", TORCH.derive("changed", **change))
    assert found.first is not None and found.first.name == f"layers.{stage}"
    assert found.causes and found.chain


def test_equal_runs_have_no_difference() -> None:
    found = trace(small_qwen3(), PROMPT, 3, "torch", TORCH.derive("the same"))
    assert found.first is None and found.first_token is None and not found.causes and not found.chain
    assert all(row.share == 0 and row.max_ulp == 0 for row in found.growth)


def test_a_difference_in_decoding_is_dated() -> None:
    """One changed bit in the step of the second decoded token, and nothing before it."""
    expected = run(small_qwen3(), PROMPT, 4, "torch")
    steps = [dict(step) for step in expected.steps]
    changed = steps[2]["layers.1.v"].copy()
    bits(changed)
    changed.view(np.uint16)[0, 1, 5] ^= 1
    steps[2]["layers.1.v"] = changed
    found = trace(small_qwen3(), PROMPT, 4, "torch", TORCH.derive("same"), known=dataclasses.replace(expected, steps=steps))
    assert found.first is not None
    assert (found.first.name, found.first.step, found.first.token, found.first.index) == ("layers.1.v", 2, 0, (1, 5))
    assert (found.first.differing, found.first.size) == (1, 256)


def test_first_difference_counts_values_not_bits() -> None:
    a = np.array([[0.0, np.nan, 1.0]], np.float32)
    assert first_difference("x", a, np.array([[-0.0, np.nan, 1.0]], np.float32), exact=True) is None
    near = np.array([[0.0, np.nan, 1.0 + 2.0**-20]], np.float32)
    assert first_difference("x", a, near, exact=False) is None
    difference = first_difference("layers.3.k", a, near, exact=True)
    assert difference is not None and difference.index == (2,) and (difference.layer, difference.operation) == (3, "k")


def test_texts_come_from_the_tokenizer() -> None:
    class Words:
        def decode(self, ids: list[int]) -> str:
            return " ".join(map(str, ids))

    found = trace(small_qwen3(), PROMPT, 3, tokenizer=Words())
    assert found.texts is not None and found.texts[0] == " ".join(map(str, found.tokens[0]))
    assert json.loads(json.dumps(found.to_json()))["schema"] == 1


def dumped(recipe: str) -> dict[str, np.ndarray]:
    found: dict[str, Any] = {}
    small_qwen3().forward(PROMPT, recipe=recipe, intermediates=found)
    chosen = ("hidden", "normalised", "k", "k_normed", "logits")
    return {name: np.ascontiguousarray(value) for name, value in found.items() if name.rpartition(".")[2] in chosen}


def test_compare_names_the_recipe_and_where_it_is_left(tmp_path: Path) -> None:
    recipes = ["torch", "vllm-0.20", "late-rounding", "flashinfer"]
    arrays = dumped("vllm-0.20")
    whole = qwen3.compare(arrays, model=small_qwen3(), token_ids=PROMPT, recipes=recipes)
    assert [one.recipe for one in whole.best] == ["vllm-0.20"] and whole.best[0].first is None
    assert "your engine computes vllm-0.20: all 17 arrays" in str(whole)

    arrays["layers.3.k_normed"] = arrays["layers.3.k_normed"].copy()
    arrays["layers.3.k_normed"].view(np.uint16)[4, 1, 9] += 1
    flat = {name: value.reshape(1, 7, -1) for name, value in arrays.items()}  # as an engine with a batch would dump it
    safetensors.numpy.save_file({**flat, "token_ids": PROMPT}, tmp_path / "dump.safetensors")
    parted = qwen3.compare(tmp_path / "dump.safetensors", model=small_qwen3(), recipes=recipes)
    assert "computes vllm-0.20 up to layer 3, k; it leaves at layer 3, k_normed" in str(parted)
    first = parted.best[0].first
    assert first is not None and (first.token, first.index, first.differing) == (4, (1, 9), 1)
    assert parted.recipes[0].recipe == "vllm-0.20"


def test_compare_takes_what_does_not_tell_recipes_apart() -> None:
    found: dict[str, Any] = {}
    small_qwen3().forward(PROMPT, intermediates=found)
    hidden = {"layers.0.hidden": found["layers.0.hidden"]}
    assert len(qwen3.compare(hidden, model=small_qwen3(), token_ids=PROMPT).best) == len(cufuse.recipes)
    noise = {"layers.0.k": np.zeros((7, 2, 128), cufuse.bfloat16)}
    assert "none of these" in str(qwen3.compare(noise, model=small_qwen3(), token_ids=PROMPT, recipes=["torch"]))


def test_compare_refuses_what_it_cannot_compare(tmp_path: Path) -> None:
    model = small_qwen3()
    with pytest.raises(ValueError, match=r"'layers\.9\.k'"):
        qwen3.compare({"layers.9.k": np.zeros((7, 256), cufuse.bfloat16)}, model=model, token_ids=PROMPT)
    with pytest.raises(ValueError, match=r"needed is \(7, 2, 128\)"):
        qwen3.compare({"layers.0.k": np.zeros((6, 256), cufuse.bfloat16)}, model=model, token_ids=PROMPT)
    with pytest.raises(TypeError, match="float64"):
        qwen3.compare({"layers.0.k": np.zeros((7, 256))}, model=model, token_ids=PROMPT)
    with pytest.raises(ValueError, match="token_ids are missing"):
        qwen3.compare({"layers.0.k": np.zeros((7, 256), cufuse.bfloat16)}, model=model)
    with pytest.raises(ValueError, match="nothing to compare"):
        qwen3.compare({}, model=model, token_ids=PROMPT)
    safetensors.numpy.save_file({"layers.0.k": np.zeros((7, 256), np.float16)}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match="F16"):
        qwen3.compare(tmp_path / "half.safetensors", model=model, token_ids=PROMPT)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, picture = tmp_path / "trace.json", tmp_path / "trace.png"
    code = main(["trace", "--new-tokens", "20", "--json", str(target), "--plot", str(picture)])
    out, err = capsys.readouterr()
    assert code == 0 and not err, err
    assert "First difference: layer 0, normalised" in out and "The text changes at new token" in out
    assert len(out.splitlines()) <= 50, "one screen"
    content = json.loads(target.read_text())
    assert content["schema"] == 1 and content["first"]["name"] == "layers.0.normalised" and content["synthetic"]
    assert len(content["tokens"][0]) == 20 and picture.stat().st_size > 10_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace.json", "trace.png"]


def test_command_on_a_folder_and_three_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_folder(tmp_path / "model")
    arguments = ["--recipes", "torch,vllm-0.19,float32", "--token-ids", "1,2,3", "--new-tokens", "2", "--json", "-"]
    assert main(["trace", str(folder), *arguments]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [one["recipe"] for one in content["traces"]] == ["vllm-0.19", "float32"]
    assert content["traces"][0]["prompt"] == [1, 2, 3] and not content["traces"][0]["synthetic"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipes", "torch"], "two different names"),
        (["--recipes", "torch,torch"], "two different names"),
        (["--recipes", "torch,quick"], "'quick'"),
        (["--token-ids", "1,x"], "numbers with commas"),
        (["--token-ids", "1,99999"], "0..511"),
        (["--tokens", "0"], "1 to 2048"),
        (["--new-tokens", "0"], "1 to 4096"),
        (["--seed", "-1"], "--seed is -1"),
        (["--layers", "9"], "layers is 9"),
        (["--plot", "trace.doc"], "doc"),
        (["/nonexistent/model"], "cannot be opened"),
    ],
)
def test_command_errors(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", *arguments]) == 2
    out, err = capsys.readouterr()
    assert message in err and len(err.splitlines()) == 1 and not out


def test_command_refuses_other_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trace", str(write_folder(tmp_path / "m", model_type="llama"))]) == 2
    assert "only plain Qwen3" in capsys.readouterr().err
    folder = write_folder(tmp_path / "q")
    (folder / "tokenizer.json").write_text("{")
    pytest.importorskip("tokenizers")
    assert main(["trace", str(folder), "--new-tokens", "1"]) == 2
