"""Attention weights of one layer from a GGUF file, projections as they are stored and norm weights as float32.

    with cufuse.quantised.open_gguf("Qwen3-0.6B-Q4_0.gguf") as checkpoint:
        layer = checkpoint.layer(0)
        layer.q_proj, layer.k_norm, layer.config.rms_norm_eps

Only Qwen3's kind is read ("general.architecture" qwen3 or qwen3moe): llama.cpp's converter keeps its rows as Hugging Face has
them, while those of Llama's queries and keys are permuted for another rotation.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from operator import index as integer
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np

from cufuse._model_config import ModelConfig
from cufuse._safetensors_file import failure, printable
from cufuse.bf16 import bfloat16, nearest
from cufuse.checkpoint import AttentionLayer, checked_token_ids
from cufuse.quantised.gguf_file import GgufFile
from cufuse.quantised.weight import QuantisedWeight, concatenate

ARCHITECTURES: Final = ("qwen3", "qwen3moe")

_NORMS: Final = {"input_norm": "attn_norm", "q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
_PROJECTIONS: Final = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v"}
_EMBEDDING: Final = "token_embd.weight"
_LAYER: Final = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.attn_q\.weight")


@dataclass(frozen=True, eq=False)
class QuantisedLayer(AttentionLayer):
    """An AttentionLayer whose projections are QuantisedWeights, or bfloat16 or float32 arrays where the file has these, and whose
    norm weights are float32."""

    @property
    def qkv_proj(self) -> Any:
        """The three projections packed; ValueError where their formats differ (Q4_K_M files): give them as a tuple then."""
        parts: list[Any] = [self.q_proj, self.k_proj, self.v_proj]
        if all(isinstance(part, QuantisedWeight) for part in parts):
            return concatenate(parts)
        kinds = [part.format.name if isinstance(part, QuantisedWeight) else str(part.dtype) for part in parts]
        if len(set(kinds)) > 1:
            listed = ", ".join(kinds)
            raise ValueError(f"q, k and v are stored as {listed}; a packed projection has one format: give a tuple of three")
        return np.concatenate(parts)


class GgufCheckpoint:
    """A GGUF file whose header has been read and checked; as ``cufuse.checkpoint.Checkpoint``.

    Attributes: ``path``; ``config``; ``layers``, the indices found, ascending; ``tensor_names``, sorted; ``synthetic``;
    ``formats``: type of each projection of each layer, {(layer, "q_proj"): "Q4_K"}.

    Raises CheckpointError for everything that is wrong with the file, TypeError for a ``path`` that is no path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path is a {type(path).__name__}; needed is the path of a .gguf file")
        self.path = Path(path)
        self._file = GgufFile(self.path)
        self.tensor_names = tuple(sorted(self._file.tensors))
        found = (match for match in map(_LAYER.fullmatch, self.tensor_names) if match)
        self.layers = tuple(sorted(int(match[1]) for match in found))
        if not self.layers:
            raise failure(self.path, "has no attention layer ('blk.0.attn_q.weight')", "give a decoder model")
        self.config = self._config()
        self.synthetic = self._file.metadata.get("cufuse.synthetic") is True
        self.formats = {
            (layer, field): self._file.tensors[f"blk.{layer}.{name}.weight"].type_name
            for layer in self.layers
            for field, name in _PROJECTIONS.items()
            if f"blk.{layer}.{name}.weight" in self._file.tensors
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held open between calls; for the sake of ``with``."""

    def layer(self, index: int) -> QuantisedLayer:
        """The attention weights of layer ``index``; reads these six tensors and nothing else."""
        if isinstance(index, (bool, np.bool_)) or not hasattr(index, "__index__"):
            raise TypeError(f"index is a {type(index).__name__}; needed is an integer, one of checkpoint.layers")
        index = integer(index)
        if index not in self.layers:
            available = f"available are {self.layers[0]} to {self.layers[-1]}"
            raise ValueError(f"layer {index} is not in {printable(self.path)}; {available}")
        shapes = self.config.attention_shapes()
        names = {field: f"blk.{index}.{name}.weight" for field, name in (_NORMS | _PROJECTIONS).items()}
        if not any(names[field] in self._file.tensors for field in ("q_norm", "k_norm")):
            raise failure(self.path, "is missing; Qwen3 has head norms", tensor=names["q_norm"])
        for field, name in names.items():
            self._check(name, shapes[field], f"{field} of layer {index}")
        for projection in "qkv":
            bias = f"blk.{index}.attn_{projection}.bias"
            if bias in self._file.tensors:
                raise failure(self.path, "is there, and projections with biases are not supported", "give a Qwen3", tensor=bias)
        weights: dict[str, Any] = {field: self._file.read_float32(names[field]) for field in _NORMS}
        weights |= {field: self._file.read_weight(names[field]) for field in _PROJECTIONS}
        source = printable(self.path)
        return QuantisedLayer(index=index, config=self.config, synthetic=self.synthetic, source=source, **weights)

    def embedding(self, token_ids: Iterable[int] | np.ndarray) -> np.ndarray:
        """Rows of the token embeddings, [T, K] bfloat16: decoded, then rounded."""
        if _EMBEDDING not in self._file.tensors:
            raise failure(self.path, "is missing", "take a whole model", tensor=_EMBEDDING)
        shape = self._file.tensors[_EMBEDDING].shape
        if len(shape) != 2 or shape[1] != self.config.hidden_size:
            problem = f"shape is {list(shape)}; needed is [vocabulary, {self.config.hidden_size}]"
            raise failure(self.path, problem, tensor=_EMBEDDING)
        return np.asarray(nearest(self._file.read_rows(_EMBEDDING, checked_token_ids(token_ids, shape[0]))))

    def _check(self, name: str, shape: tuple[int, ...], what: str) -> None:
        entry = self._file.tensors.get(name)
        if entry is None:
            raise failure(self.path, f"is missing ({what}): the file is incomplete", tensor=name)
        if entry.shape != shape:
            problem = f"shape is {list(entry.shape)}, the metadata say {list(shape)} ({what})"
            raise failure(self.path, problem, "convert the model again", tensor=name)

    def _config(self) -> ModelConfig:
        architecture = self._file.metadata.get("general.architecture")
        if architecture not in ARCHITECTURES:
            known = " and ".join(ARCHITECTURES)
            raise failure(self.path, f"general.architecture is {printable(architecture, 40)!r}; known are {known}", "give a Qwen3")
        assumed: list[str] = []

        def value(key: str, kind: Any, default: Any = None) -> Any:
            found = self._file.metadata.get(f"{architecture}.{key}")
            if found is None and default is not None:
                assumed.append(f"{key}={default}")
                return default
            if isinstance(found, bool) or not isinstance(found, kind) or not found > 0:
                raise failure(self.path, f"{architecture}.{key} is {printable(found, 40)}; a number above 0 is needed")
            return found

        hidden, heads = value("embedding_length", int), value("attention.head_count", int)
        embedding = self._file.tensors.get(_EMBEDDING)
        return ModelConfig(
            model_type=str(architecture),
            hidden_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=value("attention.head_count_kv", int, heads),
            head_dim=value("attention.key_length", int, max(hidden // heads, 1)),
            num_hidden_layers=value("block_count", int),
            rms_norm_eps=_shortest(value("attention.layer_norm_rms_epsilon", float)),
            rope_theta=_shortest(value("rope.freq_base", float, 10_000.0)),
            vocab_size=embedding.shape[0] if embedding is not None else None,
            name=self.path.stem,
            assumed=tuple(assumed),
        )


def open_gguf(path: str | os.PathLike[str]) -> GgufCheckpoint:
    """Open a GGUF file and check its tables; weights are read later, a layer at a time. Errors: see ``GgufCheckpoint``."""
    return GgufCheckpoint(path)


def quantise_layer(layer: AttentionLayer, format: str) -> QuantisedLayer:
    """A layer with its projections quantised ("Q4_0", ...; ``cufuse.quantised.quantise``, whose errors it has) and its norm
    weights as float32, unrounded."""
    from cufuse.quantised.weight import quantise

    projections: dict[str, Any] = {field: quantise(getattr(layer, field), format) for field in _PROJECTIONS}
    norms = {field: getattr(layer, field) for field in _NORMS}
    wide: dict[str, Any] = {field: None if one is None else one.astype(np.float32) for field, one in norms.items()}
    source = f"{layer.source}, quantised to {format.upper()}"
    return QuantisedLayer(index=layer.index, config=layer.config, synthetic=layer.synthetic, source=source, **projections, **wide)


def bfloat16_norms(layer: AttentionLayer) -> tuple[dict[str, Any], int]:
    """A layer's norm weights as bfloat16, and how many of their values that rounds: none of a model that was bfloat16 once."""
    norms, rounded = {}, 0
    for field in _NORMS:
        weight = getattr(layer, field)
        if weight is not None and weight.dtype != bfloat16:
            narrow = nearest(weight)
            rounded += int(np.count_nonzero(narrow.astype(np.float32) != weight))
            weight = narrow
        norms[field] = weight
    return norms, rounded


def _shortest(value: float) -> float:
    """A float32 number as the shortest decimal that gives it: 1e-6, not 9.99999997e-07."""
    return float(str(np.float32(value)))
