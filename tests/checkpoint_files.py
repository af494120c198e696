"""Small checkpoints for the tests, written by the safetensors library or by cufuse.synthetic."""

import hashlib
import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from cufuse.checkpoint import CheckpointError
from cufuse.synthetic import write_synthetic

BF16 = ml_dtypes.bfloat16
K, HEADS, KV_HEADS, D, VOCABULARY = 64, 4, 2, 32, 50
SHAPES = {
    "input_layernorm": (K,),
    "self_attn.q_proj": (HEADS * D, K),
    "self_attn.k_proj": (KV_HEADS * D, K),
    "self_attn.v_proj": (KV_HEADS * D, K),
    "self_attn.q_norm": (D,),
    "self_attn.k_norm": (D,),
}
FIELDS = dict(zip(("input_norm", "q_proj", "k_proj", "v_proj", "q_norm", "k_norm"), SHAPES, strict=True))
CONFIG = {
    "model_type": "qwen3",
    "hidden_size": K,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": D,
    "num_hidden_layers": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "vocab_size": VOCABULARY,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
    "attention_bias": False,
    "tie_word_embeddings": True,
}
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def make_tensors(layers=3, prefix="model.", norms=True, dtype=BF16):
    """Random bit patterns, every bfloat16 code among them (NaN and infinities too)."""
    generator = np.random.default_rng(1)
    shapes = {f"{prefix}embed_tokens.weight": (VOCABULARY, K)}
    for layer in range(layers):
        for name, shape in SHAPES.items():
            if norms or not name.endswith(("q_norm", "k_norm")):
                shapes[f"{prefix}layers.{layer}.{name}.weight"] = shape
    codes = {name: generator.integers(0, 1 << 16, shape, dtype=np.uint16) for name, shape in shapes.items()}
    if dtype == np.float32:
        return {name: (code.astype(np.uint32) << 16).view(np.float32) for name, code in codes.items()}
    return {name: code.view(BF16) for name, code in codes.items()}


def write_folder(folder, tensors, config=CONFIG, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(folder, tensors, config=CONFIG):
    """Each layer in a file of its own, the embeddings in the first."""
    parts = {}
    for name, tensor in tensors.items():
        layer = int(name.split("layers.")[1].split(".")[0]) if "layers." in name else 0
        parts.setdefault(f"model-{layer + 1:05}-of-00003.safetensors", {})[name] = tensor
    for file, part in parts.items():
        write_folder(folder, part, config, file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_layer(layer, tensors, prefix="model."):
    for field, name in FIELDS.items():
        expected = tensors.get(f"{prefix}layers.{layer.index}.{name}.weight")
        found = getattr(layer, field)
        if expected is None:
            assert found is None
            continue
        assert found.dtype == BF16
        assert found.shape == expected.shape
        assert found.flags.c_contiguous
        np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


def error_of(action):
    with pytest.raises(CheckpointError) as caught:
        action()
    message = str(caught.value)
    assert message.isprintable(), "one line without control characters"
    return message


def codes(array):
    assert array.dtype == BF16
    return array.view(np.uint16)


def write_small(path, **options):
    """A synthetic checkpoint of 8 MB."""
    return write_synthetic(path, **{"layers": 1, "embeddings": 20, "attention_only": True, **options})


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(folder.iterdir())}
