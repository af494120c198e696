"""The whole decoder without a GPU: its parts put together otherwise, caches, batches, folders and what is wrong with them."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import qwen3
from cufuse.attention import attention
from cufuse.checkpoint import CheckpointError
from cufuse.mlp import swiglu
from cufuse.qwen3 import model as model_module
from tests.golden import small_model
from tests.small_qwen3 import small_qwen3, write_folder
from tests.witnesses import bits, demand_bits

pytestmark = pytest.mark.filterwarnings("ignore::cufuse.AssumedSlicesWarning")
PROMPT = small_model.prompt(7)


def by_operations(ids: np.ndarray, recipe: str) -> np.ndarray:
    """Logits by the public operations, called one after the other as a user would."""
    weights, config = small_qwen3().weights, small_qwen3().config
    tables = cufuse.rope_tables(np.arange(len(ids)), 128, dtype=cufuse.recipes[recipe].rope.tables)
    x, residual = weights.embedding[ids], None
    for layer in weights.layers:
        arguments = (layer.input_norm, (layer.q_proj, layer.k_proj, layer.v_proj), layer.q_norm, layer.k_norm)
        found = cufuse.rms_norm_qkv(
            x, *arguments, cos=tables[0], sin=tables[1], residual=residual, recipe=recipe, k_slices=1
        )
        residual = x if residual is None else found[3]
        attended = attention(*found[:3], recipe="torch").reshape(len(ids), -1)
        output = cufuse.linear(attended, layer.o_proj, k_slices=1)
        normalised, residual = cufuse.add_rms_norm(output, residual, layer.mlp_norm)
        gate, up = (cufuse.linear(normalised, weight, k_slices=1) for weight in (layer.gate_proj, layer.up_proj))
        x = cufuse.linear(swiglu(gate, up), layer.down_proj, k_slices=1)
    normalised, _ = cufuse.add_rms_norm(x, residual, weights.final_norm, eps=config.rms_norm_eps)
    return cufuse.linear(normalised, weights.head, k_slices=1)


@pytest.mark.parametrize("recipe", ["torch", "late-rounding", "separate-k-norm"])
def test_forward_is_the_public_operations(recipe: str) -> None:
    demand_bits(small_qwen3().forward(PROMPT, recipe=recipe), by_operations(PROMPT, recipe))


@pytest.mark.parametrize("recipe", list(cufuse.recipes))
def test_every_recipe_runs(recipe: str) -> None:
    found: dict[str, Any] = {}
    logits = small_qwen3().forward(PROMPT, recipe=recipe, intermediates=found)
    assert list(found) == small_qwen3().intermediate_names() == qwen3.intermediate_names(4)
    assert logits.shape == (7, 512) and np.isfinite(logits.astype(np.float32)).all()
    assert logits.dtype == (np.float32 if recipe in ("float32", "llama.cpp", "llama.cpp-q8_1") else cufuse.bfloat16)
    demand_bits(found["logits"], logits)


def test_batch_invariant_recipe_is_what_its_name_says() -> None:
    """Token by token with a cache, in a batch, or all at once: the same bits. (PyTorch's own orders do not promise that.)"""
    ids = np.stack([PROMPT, small_model.prompt(8)[:7]])
    together = small_qwen3().forward(ids, recipe="batch-invariant")
    demand_bits(together[0], small_qwen3().forward(PROMPT, recipe="batch-invariant"))
    cache = small_qwen3().new_cache(7, recipe="batch-invariant")
    single = [small_qwen3().forward(PROMPT[i : i + 1], recipe="batch-invariant", cache=cache) for i in range(7)]
    assert cache.length == 7
    demand_bits(np.concatenate(single), together[0])


def test_generate_is_forward_again_and_again() -> None:
    found = small_qwen3().generate(PROMPT, 5, recipe="batch-invariant")
    ids = list(PROMPT)
    for step in range(5):
        logits = small_qwen3().forward(ids, recipe="batch-invariant")[-1]
        demand_bits(found.logits[step], logits)
        ids.append(int(logits.astype(np.float32).argmax()))
    assert found.tokens.tolist() == ids[7:]
    calls: list[int] = []
    progress: list[float] = []
    batch = small_qwen3().generate(
        np.stack([PROMPT, PROMPT]), 3, on_tokens=lambda step, _: calls.append(step), progress=lambda _, done: progress.append(done)
    )
    assert batch.tokens.shape == (2, 3) and batch.logits.shape == (2, 3, 512)
    assert calls == [0, 1, 2] and progress == sorted(progress) and progress[-1] == 1


def test_equal_logits_take_the_first_token() -> None:
    logits = np.array([[1, 3, 3, 2], [0, np.nan, 9, np.nan]], np.float32)
    assert qwen3.decoder.greedy(logits).tolist() == [1, 1]


def test_folder_is_read_without_a_copy(tmp_path: Path) -> None:
    model = qwen3.open_model(write_folder(tmp_path / "model"))
    demand_bits(model.forward(PROMPT), small_qwen3().forward(PROMPT))
    for array in (model.weights.embedding, model.weights.layers[3].down_proj, model.weights.head):
        assert not array.flags.writeable and not array.flags.owndata


def test_tied_embeddings(tmp_path: Path) -> None:
    model = qwen3.open_model(write_folder(tmp_path / "tied", drop=("lm_head.weight",), tie_word_embeddings=True))
    assert model.weights.head is model.weights.embedding
    demand_bits(model.forward(PROMPT), small_qwen3(tied=True).forward(PROMPT))
    # transformers ignores a head beside tied embeddings
    assert qwen3.open_model(write_folder(tmp_path / "both", tie_word_embeddings=True)).weights.head.shape == (512, 256)


def test_synthetic_models() -> None:
    model = qwen3.synthetic()
    again = qwen3.synthetic(seed=0, layers=1)
    demand_bits(model.weights.layers[0].k_norm, again.weights.layers[0].k_norm)
    assert [float(layer.k_norm.astype(np.float32).max()) for layer in model.weights.layers[:3]] == [96.5, 44.5, 44.0]
    tokens = model.generate(PROMPT, 8).tokens
    assert len(set(tokens.tolist())) > 3, "the text of the small model should not merely repeat"


def test_synthetic_model_is_the_written_one(tmp_path: Path) -> None:
    from cufuse.synthetic import write_synthetic

    path = write_synthetic(tmp_path / "q", "qwen3-0.6b", layers=1, embeddings=300)
    opened = qwen3.open_model(path)
    made = qwen3.synthetic("qwen3-0.6b", layers=1)
    demand_bits(np.array(opened.weights.layers[0].gate_proj), made.weights.layers[0].gate_proj)
    demand_bits(np.array(opened.weights.embedding), made.weights.embedding[:300])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "type 'llama'"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"use_sliding_window": True}, "sliding windows"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "sliding windows"),
        ({"num_hidden_layers": 5}, "layers.4.* is missing|incomplete"),
        ({"num_hidden_layers": 3}, "does not belong"),
        ({"num_attention_heads": 2}, "q_proj.*shape is"),
        ({"num_key_value_heads": 3}, "no multiple"),
        ({"vocab_size": 400}, "embed_tokens.*shape is"),
        ({"intermediate_size": 512}, "gate_proj.*shape is"),
        ({"vocab_size": None}, "vocab_size"),
        ({"attention_bias": True}, "biases"),
    ],
)
def test_folders_of_other_models(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        qwen3.open_model(write_folder(tmp_path / "model", **change))
    assert "\n" not in str(caught.value)


def test_missing_and_extra_tensors(tmp_path: Path) -> None:
    missing = "model.layers.2.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.up_proj.*is missing"):
        qwen3.open_model(write_folder(tmp_path / "a", drop=(missing,)))
    with pytest.raises(CheckpointError, match=r"lm_head.*is missing"):
        qwen3.open_model(write_folder(tmp_path / "b", drop=("lm_head.weight",)))
    bias = {"model.layers.0.self_attn.q_proj.bias": np.zeros(512, cufuse.bfloat16)}
    with pytest.raises(CheckpointError, match=r"q_proj\.bias.*does not belong"):
        qwen3.open_model(write_folder(tmp_path / "c", add=bias))
    buffer = {"model.rotary_emb.inv_freq": np.zeros(64, np.float32)}
    assert qwen3.open_model(write_folder(tmp_path / "d", add=buffer)).config.hidden_size == 256
    half = {"model.norm.weight": np.zeros(256, np.float16)}
    with pytest.raises(CheckpointError, match="F16"):
        qwen3.open_model(write_folder(tmp_path / "e", add=half))


def test_ids_and_lengths() -> None:
    model = small_qwen3()
    for ids, kind, message in (
        ([1, 512], ValueError, "0..511"),
        ([-1], ValueError, "-1"),
        ([1.5], TypeError, "float64"),
        ([], (TypeError, ValueError), "needed"),
        (np.zeros((1, 1, 1), int), ValueError, r"\[T\]"),
    ):
        with pytest.raises(kind, match=message):
            model.forward(ids)
    with pytest.raises(ValueError, match="n is 0"):
        model.generate(PROMPT, 0)
    with pytest.raises(ValueError, match="40960"):
        model.generate(PROMPT, 40960)
    with pytest.raises(ValueError, match="known are"):
        model.forward(PROMPT, recipe="pytorch")


def test_caches_of_something_else() -> None:
    model = small_qwen3()
    cache = model.new_cache(8, recipe="torch")
    model.forward(PROMPT, cache=cache)
    with pytest.raises(ValueError, match="'late-rounding'"):
        model.forward(PROMPT[:1], cache=cache, recipe="late-rounding")
    with pytest.raises(ValueError, match="room for 8"):
        model.forward(PROMPT[:2], cache=cache)
    with pytest.raises(ValueError, match="batch of 1"):
        model.forward(np.stack([PROMPT[:1]] * 2), cache=cache)
    with pytest.raises(TypeError, match="new_cache"):
        model.forward(PROMPT, cache={})
    assert cache.length == 7
    model.forward(PROMPT[:1], cache=cache)


def test_too_little_memory_is_said_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "available_memory", lambda: 100_000)
    monkeypatch.setattr(model_module.Decoder, "run", lambda *_, **__: pytest.fail("the work began"))
    with pytest.raises(MemoryError, match="fewer tokens"):
        small_qwen3().forward(small_model.prompt(100))


def test_config_of_transformers_5(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    config["layer_types"] = ["full_attention"] * 4
    (folder / "config.json").write_text(json.dumps(config))
    demand_bits(qwen3.open_model(folder).forward(PROMPT[:2]), small_qwen3().forward(PROMPT[:2]))


def test_unrecorded_slices_are_said_once() -> None:
    model = qwen3.Qwen3(small_qwen3().weights)
    other_core = cufuse.recipes["torch"].on("sm_80")  # of which nothing is recorded
    with pytest.warns(cufuse.AssumedSlicesWarning, match="256x256"):
        model.forward(PROMPT, recipe=other_core)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bits(model.forward(PROMPT, recipe=other_core)).shape == (7, 512)
        model.forward(PROMPT)  # cuBLAS was asked about these shapes on an H200
