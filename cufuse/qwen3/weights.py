"""Every weight of a Qwen3, read from a Hugging Face folder without a copy, or made up."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cufuse._model_config import MAX_CONFIG_BYTES, UNSUPPORTED, ModelConfig, embedding_names
from cufuse._safetensors_file import Array, CheckpointError, failure, parse_json_object, printable, read_small_file
from cufuse.checkpoint import Checkpoint
from cufuse.quantised.weight import quantise

FIELDS = {
    "input_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}
"""Field of ``Layer`` -> the middle of the tensor's name, ``model.layers.<index>.<...>.weight``."""

PROJECTIONS = tuple(field for field in FIELDS if field.endswith("_proj"))
"""Those that are [N, K], which may be quantised."""

_BUFFER = re.compile(r"rotary_emb\.inv_freq$")  # old checkpoints store it; it is computed


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's weights, bfloat16 (projections may be a QuantisedWeight); with K hidden, D head size, F MLP size: ``input_norm``
    and ``mlp_norm`` [K], ``q_proj`` [Hq D, K], ``k_proj`` and ``v_proj`` [Hkv D, K], ``q_norm`` and ``k_norm`` [D], ``o_proj``
    [K, Hq D], ``gate_proj`` and ``up_proj`` [F, K], ``down_proj`` [K, F]."""

    input_norm: Array
    q_proj: Array
    k_proj: Array
    v_proj: Array
    q_norm: Array
    k_norm: Array
    o_proj: Array
    mlp_norm: Array
    gate_proj: Array
    up_proj: Array
    down_proj: Array


@dataclass(frozen=True, eq=False)
class Weights:
    """All of a model: token embeddings and output head [V, K] (one array where they are tied), layers, final norm [K]."""

    config: ModelConfig
    embedding: Array
    layers: tuple[Layer, ...]
    final_norm: Array
    head: Array
    source: str
    synthetic: bool


def read_weights(path: str | os.PathLike[str]) -> Weights:
    """The weights of a Qwen3 folder, mapped: pages are read when they are used, and stay the file's.

    CheckpointError for a model that is no plain Qwen3 (another ``model_type``, activation, sliding windows, biases), for a tensor
    that is missing, has another shape than config.json says, is no bfloat16, or does not belong to a Qwen3.
    """
    with Checkpoint(path) as checkpoint:
        config = checkpoint.config
        _check_architecture(checkpoint)
        prefix = "model." if any(name.startswith("model.") for name in checkpoint.tensor_names) else ""
        shapes = _shapes(config, prefix, checkpoint)
        _check_names(checkpoint, shapes)
        found = {name: checkpoint.mapped(name, shape, _meaning(name)) for name, shape in shapes.items()}
        return assemble(config, lambda name: found[prefix + name] if prefix + name in found else found[name], {
            "source": printable(checkpoint.path), "synthetic": checkpoint.synthetic,
        })  # fmt: skip


def assemble(config: ModelConfig, tensor: Callable[[str], Array], about: dict[str, Any]) -> Weights:
    """``Weights`` from a function that gives each tensor by its name (without "model.")."""
    layers = tuple(
        Layer(**{field: tensor(f"layers.{index}.{middle}.weight") for field, middle in FIELDS.items()})
        for index in range(config.num_hidden_layers)
    )
    embedding = tensor("embed_tokens.weight")
    head = embedding if config.tie_word_embeddings else tensor("lm_head.weight")
    return Weights(config=config, embedding=embedding, layers=layers, final_norm=tensor("norm.weight"), head=head, **about)


def with_quantised_projections(weights: Weights, form: str) -> Weights:
    """The same model with every layer's projections in a block format; embedding, head and norms stay as they are."""

    def quantised(layer: Layer) -> Layer:
        found: dict[str, Any] = {name: quantise(np.asarray(getattr(layer, name)), form) for name in PROJECTIONS}
        return replace(layer, **found)

    return replace(weights, layers=tuple(quantised(layer) for layer in weights.layers))


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of each field of ``Layer``."""
    hidden, mlp = config.hidden_size, config.intermediate_size or 0
    return config.attention_shapes() | {
        "o_proj": (hidden, config.num_attention_heads * config.head_dim),
        "mlp_norm": (hidden,),
        "gate_proj": (mlp, hidden),
        "up_proj": (mlp, hidden),
        "down_proj": (hidden, mlp),
    }


def _shapes(config: ModelConfig, prefix: str, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Every tensor that the model needs, with its shape."""
    if config.vocab_size is None or config.intermediate_size is None:
        missing = "vocab_size" if config.vocab_size is None else "intermediate_size"
        raise failure(checkpoint.path, f"nothing states {missing}", "put the model's config.json beside the weights")
    table = (config.vocab_size, config.hidden_size)
    shapes: dict[str, tuple[int, ...]] = {prefix + "embed_tokens.weight": table}
    for index in range(config.num_hidden_layers):
        for field, shape in layer_shapes(config).items():
            shapes[f"{prefix}layers.{index}.{FIELDS[field]}.weight"] = shape
    shapes[prefix + "norm.weight"] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = table
    return shapes


def _check_architecture(checkpoint: Checkpoint) -> None:
    path = checkpoint.path
    if checkpoint.config.model_type != "qwen3":
        problem = f"is a model of type '{printable(checkpoint.config.model_type, 40)}', and only plain Qwen3 can be run"
        raise failure(path, problem, "take a dense Qwen3, or 'cufuse report' for one layer of other models")
    config_path = path / "config.json"
    if not config_path.exists():
        return
    raw = parse_json_object(read_small_file(config_path, MAX_CONFIG_BYTES), config_path, "config.json")
    if raw.get("hidden_act", "silu") != "silu":
        raise failure(config_path, f"'hidden_act' is '{printable(raw['hidden_act'], 40)}', needed is 'silu'", UNSUPPORTED)
    kinds = raw.get("layer_types")
    sliding = isinstance(kinds, list) and any(kind != "full_attention" for kind in kinds)
    if sliding or raw.get("use_sliding_window") is True:
        raise failure(config_path, "some layers have sliding windows, which are not supported", UNSUPPORTED)


def _check_names(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    """No tensor may be missing, none left over (a head beside tied embeddings is ignored, as transformers does)."""
    names = set(checkpoint.tensor_names)
    missing = [name for name in shapes if name not in names]
    if missing:
        count = f" ({len(missing)} tensors are missing)" if len(missing) > 1 else ""
        raise failure(checkpoint.path, f"is missing: the checkpoint is incomplete{count}", tensor=missing[0])
    allowed = {"lm_head.weight"} if checkpoint.config.tie_word_embeddings else set()
    extra = sorted(name for name in names - set(shapes) - allowed if not _BUFFER.search(name))
    if extra:
        count = f" ({len(extra)} such tensors)" if len(extra) > 1 else ""
        raise failure(checkpoint.path, f"does not belong to a plain Qwen3{count}", UNSUPPORTED, tensor=extra[0])


def _meaning(name: str) -> str:
    if name in embedding_names():
        return "token embeddings"
    return "a weight of the decoder"


__all__ = ["FIELDS", "CheckpointError", "Layer", "Weights", "assemble", "layer_shapes", "read_weights"]
