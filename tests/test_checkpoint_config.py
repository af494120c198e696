"""config.json: transformers 4 and 5, what is assumed, what is refused, and what contradicts the weights."""

import json

import numpy as np
import pytest

from cufuse.checkpoint import Checkpoint
from tests.checkpoint_files import BF16, CONFIG, HEADS, KV_HEADS, Q_PROJ, D, K, error_of, make_tensors, write_folder


def with_config(tmp_path, **changes):
    config = {**CONFIG, **changes}
    config = {key: value for key, value in config.items() if value != "absent"}
    return lambda: Checkpoint(write_folder(tmp_path, make_tensors(), config))


def test_rope_base_of_transformers_4_and_5(tmp_path):
    for changes, base in (
        ({}, 500_000.0),
        ({"rope_scaling": None}, 500_000.0),
        ({"rope_scaling": {"type": "default"}}, 500_000.0),
        ({"rope_theta": "absent", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}, 1e6),
        ({"rope_parameters": {"rope_theta": 1000000}}, 1e6),
        ({"rope_parameters": {"rope_type": "default"}}, 500_000.0),
    ):
        config = with_config(tmp_path, **changes)().config
        assert (config.rope_theta, config.assumed) == (base, ())


def test_what_transformers_would_fill_in(tmp_path):
    absent = dict.fromkeys(("rope_theta", "rms_norm_eps", "vocab_size", "intermediate_size"), "absent")
    config = with_config(tmp_path, **absent)().config
    assert (config.rope_theta, config.rms_norm_eps, config.vocab_size) == (10_000.0, 1e-6, None)
    assert config.assumed == ("rms_norm_eps=1e-06", "rope_theta=10000.0")
    heads = with_config(tmp_path, model_type="llama", num_key_value_heads="absent", head_dim=None)().config
    assert (heads.num_key_value_heads, heads.head_dim) == (HEADS, K // HEADS)
    assert heads.assumed == ("num_key_value_heads=4", "head_dim=16")
    qwen = with_config(tmp_path, head_dim="absent")().config
    assert qwen.head_dim == 128


WRONG_CONFIG = [
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "'rope_scaling' is 'yarn', and only RoPE without scaling"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "'rope_scaling' is 'llama3'"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "'rope_parameters' is 'linear'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "'rope_parameters' is one per kind of layer"),
    ({"rope_parameters": [1]}, "'rope_parameters' is [1], needed is an object"),
    ({"partial_rotary_factor": 0.5}, "'partial_rotary_factor' is 0.5, and only full rotation"),
    ({"attention_bias": True}, "'attention_bias' is true"),
    ({"attention_bias": 1}, "'attention_bias' is 1, needed is true or false"),
    ({"model_type": "absent"}, "'model_type' is missing"),
    ({"hidden_size": "absent"}, "'hidden_size' is missing, needed is a positive integer"),
    ({"hidden_size": 64.0}, "'hidden_size' is 64.0"),
    ({"hidden_size": "64"}, "'hidden_size' is '64'"),
    ({"hidden_size": True}, "'hidden_size' is True"),
    ({"num_attention_heads": 0}, "'num_attention_heads' is 0"),
    ({"num_attention_heads": -4}, "'num_attention_heads' is -4"),
    ({"num_hidden_layers": 10**400}, "'num_hidden_layers' is 1000"),
    ({"num_attention_heads": 3}, "num_attention_heads 3 is no multiple of num_key_value_heads 2"),
    ({"head_dim": 31}, "head_dim 31 is odd"),
    ({"rms_norm_eps": 0}, "'rms_norm_eps' is 0, needed is a positive finite number"),
    ({"rms_norm_eps": "1e-6"}, "'rms_norm_eps' is '1e-6'"),
    ({"rope_theta": 10**400}, "'rope_theta' is 1000"),
    ({"num_attention_heads": "absent", "text_config": {}}, "is a multimodal model"),
    ({"padding": "x" * 1_000_000}, "bytes, more than the 1000000 allowed"),
]


@pytest.mark.parametrize(("changes", "problem"), WRONG_CONFIG, ids=[problem[:40] for _, problem in WRONG_CONFIG])
def test_wrong_config(changes, problem, tmp_path):
    message = error_of(with_config(tmp_path, **changes))
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    assert problem in message
    assert "; " in message


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is not valid JSON"),
        ("[]", "is a JSON list"),
        ('{"a": 1, "a": 2}', "duplicate key 'a'"),
        (json.dumps(CONFIG)[:-1] + ', "x": Infinity}', "Infinity is not JSON"),
        (json.dumps(CONFIG).replace("1e-05", "1e999"), "'rms_norm_eps' is inf"),
    ],
)
def test_config_that_is_no_proper_json(text, problem, tmp_path):
    write_folder(tmp_path, make_tensors())
    (tmp_path / "config.json").write_text(text)
    message = error_of(lambda: Checkpoint(tmp_path))
    assert message.startswith(f"{tmp_path / 'config.json'}: ")
    assert problem in message


@pytest.mark.parametrize(
    ("changes", "tensor", "problem"),
    [
        ({"hidden_size": 128}, "input_layernorm", "shape is [64], config says [128]"),
        ({"num_attention_heads": 8}, "self_attn.q_proj", "shape is [128, 64], config says [256, 64]"),
        ({"num_key_value_heads": 4}, "self_attn.k_proj", "shape is [64, 64], config says [128, 64]"),
        ({"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}, "self_attn.q_norm", "shape is [32]"),
    ],
)
def test_config_that_lies_about_shapes(changes, tensor, problem, tmp_path):
    checkpoint = with_config(tmp_path, **changes)()
    message = error_of(lambda: checkpoint.layer(0))
    assert message.startswith(f"{tmp_path / 'model.safetensors'}: tensor 'model.layers.0.{tensor}.weight': {problem}")


def test_config_that_lies_about_the_vocabulary(tmp_path):
    checkpoint = with_config(tmp_path, vocab_size=49)()
    message = error_of(lambda: checkpoint.embedding([0]))
    assert "tensor 'model.embed_tokens.weight': shape is [50, 64], config says [49, 64]" in message


def test_biases_are_refused(tmp_path):
    tensors = make_tensors()
    tensors["model.layers.1.self_attn.k_proj.bias"] = np.zeros(KV_HEADS * D, BF16)
    checkpoint = Checkpoint(write_folder(tmp_path, tensors))
    checkpoint.layer(0)
    message = error_of(lambda: checkpoint.layer(1))
    assert "tensor 'model.layers.1.self_attn.k_proj.bias': is there, and projections with biases" in message


def test_head_size_that_does_not_divide_the_projections(tmp_path):
    tensors = make_tensors(layers=1)
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(48, BF16)
    path = write_folder(tmp_path, tensors, None) / "model.safetensors"
    message = error_of(lambda: Checkpoint(path))
    assert f"{path}: tensor '{Q_PROJ}': has 128 rows, no multiple of the 48 weights of q_norm" in message


def test_head_size_must_be_known(tmp_path):
    path = write_folder(tmp_path, make_tensors(norms=False), None) / "model.safetensors"
    message = error_of(lambda: Checkpoint(path))
    assert message.startswith(f"{path}: tensor 'model.layers.0.self_attn.q_norm.weight': is missing")
    assert "put the model's config.json beside the file" in message
