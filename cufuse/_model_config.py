"""What cufuse needs to know of a model: sizes, eps, RoPE base; the dense Qwen3 models; Hugging Face's config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from cufuse._safetensors_file import (
    CheckpointError,
    TensorEntry,
    failure,
    parse_json_object,
    printable,
    read_small_file,
)

MAX_CONFIG_BYTES = 1_000_000  # a real config.json has about 1,000
_MAX_SIZE = 1 << 31

UNSUPPORTED = "take a model without it, such as Qwen3"
_ITSELF = "take the config.json that belongs to the model"
_BESIDE = "put the model's config.json beside the file"

# the keys of the tensors' names behind "layers.<index>.", in AttentionLayer's order
ATTENTION_TENSORS = {
    "input_norm": "input_layernorm.weight",
    "q_proj": "self_attn.q_proj.weight",
    "k_proj": "self_attn.k_proj.weight",
    "v_proj": "self_attn.v_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}


@dataclass(frozen=True)
class ModelConfig:
    """The numbers of a decoder model that its attention layers depend on, named as in Hugging Face's config.json.

    ``vocab_size``, ``intermediate_size`` and ``max_position_embeddings`` are None where neither config.json nor a
    tensor tells them. ``assumed`` lists, as ``"rms_norm_eps=1e-06"``, what nothing in the checkpoint stated.
    """

    model_type: str
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_hidden_layers: int
    rms_norm_eps: float
    rope_theta: float
    vocab_size: int | None = None
    intermediate_size: int | None = None
    max_position_embeddings: int | None = None
    attention_bias: bool = False
    tie_word_embeddings: bool = False
    name: str = ""
    assumed: tuple[str, ...] = ()

    def attention_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight of an attention layer, by the field's name in ``AttentionLayer``."""
        k, d = self.hidden_size, self.head_dim
        q_rows, kv_rows = self.num_attention_heads * d, self.num_key_value_heads * d
        return {
            "input_norm": (k,),
            "q_proj": (q_rows, k),
            "k_proj": (kv_rows, k),
            "v_proj": (kv_rows, k),
            "q_norm": (d,),
            "k_norm": (d,),
        }


def _qwen3(size: str, hidden: int, heads: int, intermediate: int, layers: int, tied: bool) -> ModelConfig:
    return ModelConfig(
        model_type="qwen3", hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=8, head_dim=128,
        num_hidden_layers=layers, rms_norm_eps=1e-6, rope_theta=1_000_000.0, vocab_size=151_936,
        intermediate_size=intermediate, max_position_embeddings=40_960, tie_word_embeddings=tied,
        name=f"qwen3-{size}",
    )  # fmt: skip


# from the config.json of Qwen/Qwen3-0.6B ... Qwen/Qwen3-32B on huggingface.co
QWEN3: Mapping[str, ModelConfig] = MappingProxyType(
    {
        config.name: config
        for config in (
            _qwen3("0.6b", 1024, 16, 3072, 28, True),
            _qwen3("1.7b", 2048, 16, 6144, 28, True),
            _qwen3("4b", 2560, 32, 9728, 36, True),
            _qwen3("8b", 4096, 32, 12288, 36, False),
            _qwen3("14b", 5120, 40, 17408, 40, False),
            _qwen3("32b", 5120, 64, 25600, 64, False),
        )
    }
)
"""Name -> numbers of the dense Qwen3 models, 0.6B to 32B."""


def read_config(path: Path, name: str) -> tuple[ModelConfig, bool]:
    """``ModelConfig`` from a config.json, and whether the file says that the weights are synthetic.

    What transformers fills in itself is filled in the same way and listed in ``assumed``: ``num_key_value_heads`` (as
    many as query heads), ``head_dim`` (128 for Qwen3, else hidden size / heads), ``rms_norm_eps`` (1e-6),
    ``rope_theta`` (1e4).
    """
    raw = parse_json_object(read_small_file(path, MAX_CONFIG_BYTES), path, "config.json")
    reader = _ConfigReader(raw, path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise failure(path, "'model_type' is missing or no string", _ITSELF)
    if "num_attention_heads" not in raw and isinstance(raw.get("text_config"), dict):
        raise failure(path, f"'{printable(model_type)}' is a multimodal model", "give a plain decoder model")
    hidden = reader.size("hidden_size")
    heads = reader.size("num_attention_heads")
    kv_heads = reader.size("num_key_value_heads", default=heads)
    head_dim = reader.size("head_dim", default=128 if model_type == "qwen3" else max(hidden // heads, 1))
    if heads % kv_heads:
        raise failure(path, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}", _ITSELF)
    if head_dim % 2:
        raise failure(path, f"head_dim {head_dim} is odd, RoPE needs pairs", _ITSELF)
    config = ModelConfig(
        model_type=model_type,
        hidden_size=hidden,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        num_hidden_layers=reader.size("num_hidden_layers"),
        rms_norm_eps=reader.positive("rms_norm_eps", raw, default=1e-6),
        rope_theta=reader.rope_theta(),
        vocab_size=reader.optional_size("vocab_size"),
        intermediate_size=reader.optional_size("intermediate_size"),
        max_position_embeddings=reader.optional_size("max_position_embeddings"),
        attention_bias=reader.flag("attention_bias"),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        name=name,
        assumed=tuple(reader.assumed),
    )
    if config.attention_bias:
        raise failure(path, "'attention_bias' is true, and biases are not supported", UNSUPPORTED)
    return config, raw.get("synthetic") in (True, "true")


class _ConfigReader:
    """Typed access to a config.json; collects what had to be assumed."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self.raw, self.path = raw, path
        self.assumed: list[str] = []

    def size(self, key: str, default: int | None = None) -> int:
        value = self.raw.get(key)
        if value is None and default is not None:
            self.assumed.append(f"{key}={default}")
            return default
        if type(value) is not int or not 0 < value < _MAX_SIZE:
            raise self._wrong(key, value, f"a positive integer below {_MAX_SIZE}")
        return value

    def optional_size(self, key: str) -> int | None:
        return None if self.raw.get(key) is None else self.size(key)

    def positive(self, key: str, members: dict[str, Any], default: float) -> float:
        value = members.get(key)
        if value is None:
            self.assumed.append(f"{key}={default}")
            return default
        if type(value) not in (int, float) or not 0 < value < 1e300:  # JSON's 1e999 is infinity in Python
            raise self._wrong(key, value, "a positive finite number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def rope_theta(self) -> float:
        """RoPE's base: in ``rope_parameters`` (transformers 5), or ``rope_theta`` beside ``rope_scaling`` (4)."""
        members = self.raw
        for key in ("rope_parameters", "rope_scaling"):
            rope = self.raw.get(key)
            if rope is None:
                continue
            if not isinstance(rope, dict):
                raise self._wrong(key, rope, "an object")
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default" or any(isinstance(member, dict) for member in rope.values()):
                kind = "one per kind of layer" if kind == "default" else f"'{printable(kind, 40)}'"
                raise failure(self.path, f"'{key}' is {kind}, and only RoPE without scaling is supported", UNSUPPORTED)
            if rope.get("rope_theta") is not None:
                members = rope
        rotary = members.get("partial_rotary_factor", self.raw.get("partial_rotary_factor", 1))
        if rotary not in (None, 1):
            problem = f"'partial_rotary_factor' is {printable(rotary, 40)}, and only full rotation is supported"
            raise failure(self.path, problem, UNSUPPORTED)
        return self.positive("rope_theta", members, default=10_000.0)

    def _wrong(self, key: str, value: object, needed: str) -> CheckpointError:
        shown = "missing" if value is None else printable(repr(value), 60)
        return failure(self.path, f"'{key}' is {shown}, needed is {needed}", _ITSELF)


def infer_config(tensors: Mapping[str, TensorEntry], base: str, layers: int, path: Path, name: str) -> ModelConfig:
    """``ModelConfig`` from the shapes of one layer's tensors (names ``base + ...``), for a file without config.json.

    Only models with Q/K norms (Qwen3) can be told so, since nothing else states the head size. eps 1e-6 and RoPE base
    1e6, which are Qwen3's, are assumed.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for field, rank in (("q_norm", 1), ("q_proj", 2), ("k_proj", 2)):
        tensor = base + ATTENTION_TENSORS[field]
        if tensor not in tensors:
            problem = "is missing, and no config.json tells the sizes without it"
            raise failure(path, problem, _BESIDE, tensor=tensor)
        shapes[field] = tensors[tensor].shape
        if len(shapes[field]) != rank or 0 in shapes[field]:
            problem = f"shape {list(shapes[field])} is not {'[D]' if rank == 1 else '[rows, K]'} with sizes above 0"
            raise failure(path, problem, tensor=tensor)
    head_dim = shapes["q_norm"][0]
    for field in ("q_proj", "k_proj"):
        rows = shapes[field][0]
        if rows % head_dim:
            problem = f"has {rows} rows, no multiple of the {head_dim} weights of q_norm"
            raise failure(path, problem, _BESIDE, tensor=base + ATTENTION_TENSORS[field])
    embedding = next((tensors[key] for key in embedding_names() if key in tensors), None)
    gate = tensors.get(f"{base}mlp.gate_proj.weight")
    return ModelConfig(
        model_type="qwen3",
        hidden_size=shapes["q_proj"][1],
        num_attention_heads=shapes["q_proj"][0] // head_dim,
        num_key_value_heads=shapes["k_proj"][0] // head_dim,
        head_dim=head_dim,
        num_hidden_layers=layers,
        rms_norm_eps=1e-6,
        rope_theta=1_000_000.0,
        vocab_size=embedding.shape[0] if embedding and len(embedding.shape) == 2 else None,
        intermediate_size=gate.shape[0] if gate and len(gate.shape) == 2 else None,
        name=name,
        assumed=("model_type=qwen3", "rms_norm_eps=1e-06", "rope_theta=1000000.0", f"num_hidden_layers={layers}"),
    )


def embedding_names() -> tuple[str, str]:
    """The names under which the table of token embeddings is stored."""
    return "model.embed_tokens.weight", "embed_tokens.weight"
