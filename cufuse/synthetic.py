"""Made-up Qwen3 checkpoints from a seed, so that everything can be tried without a download.

    cufuse.synthetic.write_synthetic("try", "qwen3-0.6b", layers=2, embeddings=1000)
    layer = cufuse.synthetic.synthetic_layer("qwen3-8b", layer=0)         # the same weights, without a file

The weights are synthetic: names, shapes and dtypes are those of the model, the values are random numbers. A model with
them says nothing sensible; what is realistic is how large the weights are, and so how rounding errors grow.

Documented for Qwen3-0.6B (github.com/braidpool/braidinfer, .claude/NUMERICAL_INSTABILITY_INVESTIGATION.md and its
companion notes): the largest K-norm weights, 96.5, 44.5, 44.0, 41.75 and 34.0 in layers 0, 1, 2, 4 and 5; above 10 in
16 of the 28 layers; mean and standard deviation of the K-norm weights of layers 0 to 2 (3.56 and 9.13, 2.34 and 3.98,
2.47 and 3.94), which are met approximately; the standard deviation 0.027 of the embeddings.

Invented: everything else, namely the maxima of the other layers (below 34.0 and decreasing; above 10 up to layer 15),
that the five larger models have the same maxima, and the distributions of all other weights.

A seed gives the same bits on every machine and with every NumPy (see ``_synthetic_weights``: PCG64's raw stream,
integers and single float32 operations).
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from operator import index as integer
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cufuse._model_config import ATTENTION_TENSORS, MAX_CONFIG_BYTES
from cufuse._synthetic_weights import (
    DOCUMENTED_K_NORM_MAXIMA,
    K_NORM_MAXIMA,
    WRITER,
    Array,
    SyntheticTensor,
    checkpoint_tensors,
)
from cufuse.checkpoint import QWEN3, AttentionLayer, ModelConfig, checked_token_ids

__all__ = [
    "DOCUMENTED_K_NORM_MAXIMA",
    "K_NORM_MAXIMA",
    "synthetic_embedding",
    "synthetic_layer",
    "write_synthetic",
]


def synthetic_layer(model: str = "qwen3-0.6b", layer: int = 0, seed: int = 0) -> AttentionLayer:
    """The attention weights of one layer, without a file: bit for bit those that :func:`write_synthetic` writes.

    ``model`` is a key of ``cufuse.checkpoint.QWEN3``; ``layer`` may be any from 0 on. ValueError for other values.
    """
    config = _checked_model(model)
    layer, seed = _natural("layer", layer), _natural("seed", seed)
    weights: dict[str, Any] = {}
    for field, shape in config.attention_shapes().items():
        name = f"model.layers.{layer}.{ATTENTION_TENSORS[field]}"
        bits = np.concatenate(list(SyntheticTensor(name, shape, model, seed).blocks()))
        weights[field] = bits.view(ml_dtypes.bfloat16).reshape(shape)
    source = f"synthetic {model}, layer {layer}, seed {seed}"
    return AttentionLayer(index=layer, config=config, synthetic=True, source=source, **weights)


def synthetic_embedding(model: str, token_ids: Iterable[int] | Array, seed: int = 0) -> Array:
    """Rows ``token_ids`` [T] of the token embeddings, bfloat16 [T, K]: those that :func:`write_synthetic` writes.

    Finite values only; no ids give an array [0, K]. Raises ValueError for an unknown model, a negative seed and ids outside the
    vocabulary, TypeError for ids that are no integers.
    """
    config = _checked_model(model)
    vocabulary, hidden = config.vocab_size or 0, config.hidden_size
    table = SyntheticTensor("model.embed_tokens.weight", (vocabulary, hidden), model, _natural("seed", seed))
    rows = checked_token_ids(token_ids, vocabulary)
    bits = np.empty((len(rows), hidden), np.uint16)
    for position, row in enumerate(rows):
        bits[position] = table.matrix_bits(row * hidden, hidden)
    return bits.view(ml_dtypes.bfloat16)


def write_synthetic(
    path: str | os.PathLike[str],
    model: str = "qwen3-0.6b",
    *,
    layers: int | None = None,
    seed: int = 0,
    embeddings: bool | int = True,
    attention_only: bool = False,
    overwrite: bool = False,
    max_shard_bytes: int = 5_000_000_000,
    progress: Callable[[int, int, str], None] | None = None,
) -> Path:
    """Write a synthetic checkpoint in Hugging Face's layout into the new folder ``path``.

    Parameters
    ----------
    model : a key of ``cufuse.checkpoint.QWEN3``.
    layers : how many layers, from layer 0 on (default: as many as the model has).
    seed : a non-negative integer; the same seed gives the same files, byte for byte.
    embeddings : True for the whole vocabulary, a number for so many rows (``vocab_size`` in config.json follows), False
        for none (then there is no output head either).
    attention_only : leave out what cufuse's attention operations do not need (output projection, MLP, second norm,
        final norm, output head): a quarter of a 0.6B's layer remains; transformers then warns that weights are missing.
    overwrite : replace ``path`` if it holds a checkpoint that this function wrote; anything else is never touched.
    max_shard_bytes : above this, the weights are split over several files with an index.
    progress : called after each block as ``progress(bytes done, bytes in all, tensor name)``.

    Returns
    -------
    The folder, as a Path.

    config.json, the metadata of every safetensors file and README.md say that the weights are synthetic. Everything is
    written to a hidden folder beside ``path`` and renamed at the end, so that neither an interruption nor a full disk
    leaves half a checkpoint (what a killed process leaves is the hidden folder); at most 20 MB are in memory at a time.

    Raises ValueError and TypeError for the arguments, FileExistsError where ``path`` exists and must not be replaced,
    OSError (ENOSPC) before anything is written where the disk has too little room.
    """
    config = _checked_model(model)
    count = config.num_hidden_layers if layers is None else _natural("layers", layers)
    seed = _natural("seed", seed)
    max_shard_bytes = _natural("max_shard_bytes", max_shard_bytes)
    if not count or not max_shard_bytes:
        raise ValueError(f"layers is {layers} and max_shard_bytes {max_shard_bytes}; needed are 1 or more")
    rows = _embedding_rows(embeddings, config)
    config = replace(config, num_hidden_layers=count, vocab_size=rows or config.vocab_size)
    tensors = list(checkpoint_tensors(config, model, seed, rows > 0, attention_only))
    folder = Path(path)
    _refuse_existing(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _require_space(folder.parent, sum(tensor.size for tensor in tensors))

    partial = folder.parent / f".{folder.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir()
        _write_weights(partial, tensors, _metadata(model, seed), max_shard_bytes, progress)
        (partial / "config.json").write_text(_config_json(config, model, seed), encoding="utf-8", newline="\n")
        (partial / "README.md").write_text(_readme(model, count, seed), encoding="utf-8", newline="\n")
        _put_in_place(partial, folder, overwrite)
    finally:  # also on KeyboardInterrupt; nothing is left where the renaming succeeded
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _write_weights(
    folder: Path,
    tensors: list[SyntheticTensor],
    metadata: dict[str, str],
    max_shard_bytes: int,
    progress: Callable[[int, int, str], None] | None,
) -> None:
    """One safetensors file, or several with their index."""
    shards: list[list[SyntheticTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.size
    total = sum(tensor.size for tensor in tensors)
    done = 0
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
        with open(folder / name, "xb") as file:
            file.write(_header(shard, metadata))
            for tensor in shard:
                for bits in tensor.blocks():
                    file.write(bits.astype("<u2", copy=False).data)
                    done += bits.nbytes
                    if progress is not None:
                        progress(done, total, tensor.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(_json(index), encoding="utf-8", newline="\n")


def _header(tensors: list[SyntheticTensor], metadata: dict[str, str]) -> bytes:
    """A safetensors header: its length, then JSON, padded with spaces so that the tensors begin at a multiple of 8."""
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for tensor in tensors:
        end = start + tensor.size
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _metadata(model: str, seed: int) -> dict[str, str]:
    # transformers wants "format"; safetensors allows strings only
    return {"format": "pt", "synthetic": "true", "model": model, "seed": str(seed), "writer": WRITER}


def _config_json(config: ModelConfig, model: str, seed: int) -> str:
    """config.json as transformers 4 and 5 read it, and the statement that the weights are synthetic."""
    members: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_type": config.model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "synthetic": "true",
        "synthetic_model": model,
        "synthetic_seed": str(seed),
        "synthetic_writer": WRITER,
    }
    return _json(members)


def _json(members: dict[str, Any]) -> str:
    return json.dumps(members, indent=2) + "\n"


def _readme(model: str, layers: int, seed: int) -> str:
    return (
        f"# Synthetic weights\n\n{layers} layer(s) in the shape of {model}, seed {seed}, written by {WRITER}.\n"
        "The values are random numbers, not a trained model: only their sizes resemble one.\n"
        "What of them is documented and what is invented stands in the documentation of `cufuse.synthetic`.\n"
    )


def _checked_model(model: str) -> ModelConfig:
    if not isinstance(model, str):
        raise TypeError(f"model is a {type(model).__name__}; needed is one of {', '.join(QWEN3)}")
    if model not in QWEN3:
        raise ValueError(f"model is {model!r}; needed is one of {', '.join(QWEN3)}")
    return QWEN3[model]


def _natural(name: str, value: int) -> int:
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is a {type(value).__name__}; needed is an integer")
    if not 0 <= integer(value) < 1 << 63:
        raise ValueError(f"{name} is {value}; needed is an integer from 0 on, below 2^63")
    return integer(value)


def _embedding_rows(embeddings: bool | int, config: ModelConfig) -> int:
    vocabulary = config.vocab_size or 0
    if isinstance(embeddings, (bool, np.bool_)):
        return vocabulary if embeddings else 0
    rows = _natural("embeddings", embeddings)
    if rows > vocabulary:
        raise ValueError(f"embeddings is {rows}; {config.name} has {vocabulary} rows: give at most these, or True")
    return rows


def _refuse_existing(folder: Path, overwrite: bool) -> None:
    """Only an empty folder, or with ``overwrite`` a folder of nothing but this writer's files, may be replaced."""
    if folder.suffix == ".safetensors":
        raise ValueError(f"path is {folder}; needed is the name of a folder, which will hold model.safetensors")
    if not folder.exists() and not folder.is_symlink():
        return
    remedy = "give another path or remove it yourself"
    if folder.is_symlink() or not folder.is_dir():
        raise FileExistsError(errno.EEXIST, f"exists and is no folder; {remedy}", str(folder))
    if not any(folder.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(errno.EEXIST, f"exists and is not empty; pass overwrite=True, or {remedy}", str(folder))
    if not _written_here(folder):
        raise FileExistsError(errno.EEXIST, f"holds more than a synthetic checkpoint of cufuse; {remedy}", str(folder))


_OTHER_FILES = ("config.json", "README.md", "model.safetensors.index.json")


def _written_here(folder: Path) -> bool:
    config = folder / "config.json"
    ours = all(
        path.is_file() and not path.is_symlink() and (path.name in _OTHER_FILES or path.match("model*.safetensors"))
        for path in folder.iterdir()
    )
    if not ours or not config.is_file():
        return False
    with config.open("rb") as file:
        return b'"synthetic_writer": "cufuse.synthetic/' in file.read(MAX_CONFIG_BYTES)


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        problem = f"{needed} bytes are needed, {free} are free; take fewer layers, a smaller model or embeddings=False"
        raise OSError(errno.ENOSPC, problem, str(folder))


def _put_in_place(partial: Path, folder: Path, overwrite: bool) -> None:
    """Rename the finished folder; what it replaces is moved aside first and removed last."""
    _refuse_existing(folder, overwrite)  # again: writing may have taken minutes
    old = None
    if folder.exists() and any(folder.iterdir()):
        old = partial.with_suffix(".old")
        folder.rename(old)
    elif folder.exists():
        folder.rmdir()  # Windows does not rename onto an empty folder
    try:
        partial.rename(folder)
    except BaseException:
        if old is not None:
            old.rename(folder)
        raise
    if old is not None:
        shutil.rmtree(old)
