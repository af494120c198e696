"""Attention weights of one layer from a Hugging Face checkpoint, as bfloat16, without reading the rest.

    with cufuse.checkpoint.open_checkpoint("Qwen3-0.6B") as checkpoint:
        layer = checkpoint.layer(0)
        layer.q_proj, layer.k_norm, layer.config.rms_norm_eps

A checkpoint is a folder with config.json and either one safetensors file or several with an index
(``model.safetensors.index.json``), or a single ``.safetensors`` file, with or without config.json beside it.

Files are untrusted input. Nothing is executed or unpickled; headers, indices and config.json are bounded in size and
checked before use; only the tensors asked for are read. Whatever is wrong with a file (damaged, truncated, incomplete,
inconsistent, hostile) ends in one :class:`CheckpointError`, a ValueError of one line that names the file, the tensor
and the remedy. Weights are never rounded: BF16 is taken as it is, F32 only where every value is a bfloat16 already.

Symbolic links: a file may link to a file of the same folder, or, as in Hugging Face's cache, from
``<repository>/snapshots/<revision>/`` to ``<repository>/blobs/``. Links that lead elsewhere are refused, so that a
folder from a stranger never has a file outside of it read. The path given to :func:`open_checkpoint` may be a link.
"""

import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from operator import index as integer
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import numpy as np

from cufuse._model_config import (
    ATTENTION_TENSORS,
    QWEN3,
    UNSUPPORTED,
    ModelConfig,
    embedding_names,
    infer_config,
    read_config,
)
from cufuse._safetensors_file import (
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    Array,
    CheckpointError,
    SafetensorsFile,
    failure,
    parse_json_object,
    printable,
    read_small_file,
)

__all__ = ["QWEN3", "AttentionLayer", "Checkpoint", "CheckpointError", "ModelConfig", "open_checkpoint"]

MAX_SHARDS = 10_000  # the largest published checkpoints have about 200

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_LAYER_NAME = re.compile(r"((?:model\.)?layers\.)(0|[1-9][0-9]{0,5})\.")


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """The weights of one layer up to the attention's scores; with K = hidden size and D = head size:

    ``input_norm`` [K], ``q_proj`` [Hq D, K], ``k_proj`` and ``v_proj`` [Hkv D, K], ``q_norm`` and ``k_norm`` [D] (None
    in models without them, such as Llama). All are contiguous NumPy arrays of ``ml_dtypes.bfloat16``, the caller's own.
    ``source`` says where they come from, ``synthetic`` whether they are made up.
    """

    index: int
    input_norm: Array
    q_proj: Array
    k_proj: Array
    v_proj: Array
    q_norm: Array | None
    k_norm: Array | None
    config: ModelConfig
    synthetic: bool
    source: str

    @property
    def qkv_proj(self) -> Array:
        """The three projections packed, [(Hq + 2 Hkv) D, K]: query rows first, then key, then value. A new array."""
        return np.concatenate([self.q_proj, self.k_proj, self.v_proj])


def open_checkpoint(path: str | os.PathLike[str]) -> "Checkpoint":
    """Open a folder or a single safetensors file and check its headers; weights are read later, a layer at a time.

    Raises CheckpointError, in one line, for everything that is wrong with the files, TypeError for a ``path`` that is no path.
    See :class:`Checkpoint`.
    """
    return Checkpoint(path)


class Checkpoint:
    """A checkpoint whose headers have been read and checked. Weights are read by :meth:`layer` and :meth:`embedding`.

    Attributes: ``path`` as given; ``config`` (:class:`ModelConfig`; ``config.assumed`` names what no file stated);
    ``layers``, the indices found, ascending; ``tensor_names``, sorted; ``synthetic``, whether config.json or the
    metadata of a file says that the weights are made up. Between calls no file stays open; several threads may read at
    a time.

    Raises CheckpointError for everything that is wrong with the files, TypeError for a ``path`` that is no path.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"path is a {type(path).__name__}; needed is the path of a folder or a .safetensors file")
        self.path = Path(path)
        try:
            is_folder = stat.S_ISDIR(self.path.stat().st_mode)
        except OSError as error:
            remedy = "download a model and give its folder, or make one with cufuse.synthetic.write_synthetic"
            raise failure(self.path, f"cannot be opened: {error.strerror}", remedy) from error
        if is_folder:
            folder = self.path
            self._files = _open_folder(folder)
        else:
            folder = self.path.parent
            file = SafetensorsFile(self.path)
            self._files = dict.fromkeys(file.tensors, file)
        self._closed = False
        self.tensor_names = tuple(sorted(self._files))
        self._bases = self._layer_bases()
        self.layers = tuple(sorted(self._bases))
        self.config, synthetic = self._find_config(folder)
        marked = any(file.metadata.get("synthetic") == "true" for file in set(self._files.values()))
        self.synthetic = synthetic or marked

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the headers; reading afterwards is a ValueError."""
        self._closed = True
        self._files = {}

    def layer(self, index: int) -> AttentionLayer:
        """The attention weights of layer ``index``; reads these six tensors and nothing else.

        ValueError for an index that is not in ``layers``; CheckpointError for a tensor that is missing, has a shape
        other than ``config`` says, or is neither BF16 nor F32 with bfloat16 values.
        """
        index = self._checked_layer(index)
        base = self._bases[index]
        shapes = self.config.attention_shapes()
        if self._without_head_norms(base):
            del shapes["q_norm"], shapes["k_norm"]
        for field, shape in shapes.items():  # all six before the first is read
            self._check_tensor(base + ATTENTION_TENSORS[field], shape, f"{field} of layer {index}")
        for projection in "qkv":
            name = f"{base}self_attn.{projection}_proj.bias"
            if name in self._files:
                problem = "is there, and projections with biases are not supported"
                raise failure(self._files[name].path, problem, UNSUPPORTED, tensor=name)
        weights: dict[str, Any] = dict.fromkeys(ATTENTION_TENSORS)
        for field in shapes:
            name = base + ATTENTION_TENSORS[field]
            weights[field] = self._files[name].read_bfloat16(name)
        source = printable(self._files[base + ATTENTION_TENSORS["q_proj"]].path)
        return AttentionLayer(index=index, config=self.config, synthetic=self.synthetic, source=source, **weights)

    def embedding(self, token_ids: Iterable[int] | Array) -> Array:
        """Rows ``token_ids`` (one dimension, T of them) of the token embeddings, [T, K]; reads only these rows.

        TypeError for ids that are no integers, ValueError for ids outside the table.
        """
        self._require_open()
        name = next((name for name in embedding_names() if name in self._files), None)
        if name is None:
            remedy = "take a checkpoint, or the file of it, with the embeddings"
            raise failure(self.path, "is missing", remedy, tensor=embedding_names()[0])
        entry = self._files[name].tensors[name]
        vocabulary = self.config.vocab_size or (entry.shape[0] if entry.shape else 0)
        self._check_tensor(name, (vocabulary, self.config.hidden_size), "token embeddings")
        return self._files[name].read_bfloat16(name, checked_token_ids(token_ids, vocabulary))

    def mapped(self, name: str, shape: tuple[int, ...], what: str) -> Array:
        """The tensor of this name, of this shape, as a read-only bfloat16 array over the file (``map_bfloat16``); CheckpointError,
        with ``what`` it is, for one that is missing or has another shape or dtype."""
        self._require_open()
        self._check_tensor(name, shape, what)
        return self._files[name].map_bfloat16(name)

    def _layer_bases(self) -> dict[int, str]:
        """From layer index to what its tensors' names begin with, e.g. ``model.layers.0.``"""
        bases: dict[int, str] = {}
        attention = tuple(ATTENTION_TENSORS.values())
        for name in self.tensor_names:
            if not name.endswith(attention):  # what most of 100,000 names are, told faster than by the expression
                continue
            match = _LAYER_NAME.match(name)
            if match is None or name[match.end() :] not in attention:
                continue
            index = int(match[2])
            if bases.setdefault(index, match[0]) != match[0]:
                problem = f"layer {index} is there twice, also as '{bases[index]}...'"
                raise failure(self._files[name].path, problem, "keep one of the two", tensor=name)
        if not bases:
            found = f"tensors such as '{printable(self.tensor_names[0], 80)}'" if self.tensor_names else "no tensors"
            problem = f"has {found}, but none of an attention layer ('model.layers.0.self_attn.q_proj.weight')"
            raise failure(self.path, problem, "give a plain decoder model in Hugging Face's naming")
        return bases

    def _find_config(self, folder: Path) -> tuple[ModelConfig, bool]:
        """The model's numbers, and whether config.json says that the weights are synthetic."""
        name = _model_name(folder) if folder == self.path else self.path.stem
        config_path = folder / "config.json"
        if config_path.exists() or config_path.is_symlink():
            return read_config(_inside(folder, "config.json"), name)
        if folder == self.path:
            raise failure(config_path, "is missing", "put the model's config.json into the folder")
        (file,) = set(self._files.values())
        first = self._bases[self.layers[0]]
        return infer_config(file.tensors, first, self.layers[-1] + 1, self.path, name), False

    def _checked_layer(self, index: int) -> int:
        self._require_open()
        if isinstance(index, (bool, np.bool_)) or not hasattr(index, "__index__"):
            raise TypeError(f"index is a {type(index).__name__}; needed is an integer, one of checkpoint.layers")
        index = integer(index)
        if index not in self._bases:
            problem = f"layer {index} is not in {printable(self.path)}; available: {_ranges(self.layers)}"
            if 0 <= index < self.config.num_hidden_layers:
                problem += f" (config.json promises {self.config.num_hidden_layers}: the checkpoint is incomplete)"
            raise ValueError(problem)
        return index

    def _without_head_norms(self, base: str) -> bool:
        """Whether the layer has no Q/K norms and, not being a Qwen3, needs none."""
        present = [base + ATTENTION_TENSORS[field] in self._files for field in ("q_norm", "k_norm")]
        return not any(present) and not self.config.model_type.startswith("qwen3")

    def _check_tensor(self, name: str, shape: tuple[int, ...], what: str) -> None:
        file = self._files.get(name)
        if file is None:
            raise failure(self.path, f"is missing ({what}): the checkpoint is incomplete", tensor=name)
        found = file.tensors[name].shape
        if found != shape:
            problem = f"shape is {printable(list(found), 80)}, config says {list(shape)} ({what})"
            raise failure(file.path, problem, "take weights and config.json of one model", tensor=name)

    def _require_open(self) -> None:
        if self._closed:
            raise ValueError(f"checkpoint {printable(self.path)} is closed; open it again")


def checked_token_ids(token_ids: Iterable[int] | Array, vocabulary: int) -> list[int]:
    """``token_ids`` as a list of Python integers in [0, vocabulary)."""
    ids = np.asarray(token_ids if isinstance(token_ids, np.ndarray) else list(token_ids))
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"token_ids has dtype {ids.dtype}; needed are integers")
    if ids.ndim != 1:
        raise ValueError(f"token_ids has shape {ids.shape}; needed is one dimension, (T,)")
    outside = ids[(ids < 0) | (ids >= vocabulary)] if ids.size else ids
    if outside.size:
        raise ValueError(f"token_ids holds {outside[0]}; needed are ids in 0..{vocabulary - 1}")
    return [int(token) for token in ids]


def _open_folder(folder: Path) -> dict[str, SafetensorsFile]:
    """From tensor name to the file that holds it. As transformers does, one file is preferred to an index."""
    if not (folder / _SINGLE_FILE).exists() and (folder / _INDEX_FILE).exists():
        return _open_shards(folder, _read_index(folder))
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    name = _SINGLE_FILE if _SINGLE_FILE in names else names[0] if len(names) == 1 else None
    if name is None:
        found = f"{len(names)} .safetensors files and no {_INDEX_FILE}" if names else "no .safetensors file"
        if any(folder.glob("*.bin")):
            found += " (PyTorch's .bin files are pickles and are never read)"
        raise failure(folder, f"has {found}", "download the model's safetensors files, with the index")
    file = SafetensorsFile(_inside(folder, name))
    return dict.fromkeys(file.tensors, file)


def _read_index(folder: Path) -> Mapping[str, str]:
    """The index's ``weight_map``: from tensor name to a plain file name."""
    path = _inside(folder, _INDEX_FILE)
    weight_map = parse_json_object(read_small_file(path, MAX_HEADER_BYTES), path, "the index").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or len(weight_map) > MAX_TENSORS:
        raise failure(path, f"has no 'weight_map' of 1 to {MAX_TENSORS} tensors")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _is_plain_name(name):
            problem = f"is said to be in '{printable(name, 80)}', needed is a plain *.safetensors name without a path"
            raise failure(path, problem, tensor=tensor)
    return weight_map


def _is_plain_name(name: str) -> bool:
    """A file name without any path, on POSIX and on Windows (separators, drives, streams, reserved characters)."""
    return name.endswith(".safetensors") and not name.startswith(".") and not re.search(r'[\\/:*?"<>|\x00-\x1f]', name)


def _open_shards(folder: Path, weight_map: Mapping[str, str]) -> dict[str, SafetensorsFile]:
    names = sorted(set(weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise failure(folder / _INDEX_FILE, f"names {len(names)} files, more than the {MAX_SHARDS} allowed")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        listed = ", ".join(printable(name, 80) for name in missing[:4]) + (", ..." if len(missing) > 4 else "")
        tensor = next(tensor for tensor, name in weight_map.items() if name == missing[0])
        problem = f"{len(missing)} of {len(names)} files are missing: {listed}"
        raise failure(folder, problem, "download them, or give one of the others as a single file", tensor=tensor)
    files: dict[str, SafetensorsFile] = {}
    total = 0
    for name in names:
        files[name] = SafetensorsFile(_inside(folder, name))
        total += len(files[name].tensors)
        if total > MAX_TENSORS:
            raise failure(folder, f"its files hold more than the {MAX_TENSORS} tensors allowed")
    for tensor, name in weight_map.items():
        if tensor not in files[name].tensors:
            raise failure(folder / name, f"is not in this file, though {_INDEX_FILE} says so", tensor=tensor)
    return {tensor: files[name] for tensor, name in weight_map.items()}


def _inside(folder: Path, name: str) -> Path:
    """``folder / name`` after a check that no symbolic link leads out of the checkpoint (see the module's docstring)."""
    path = folder / name
    try:
        target, home = path.resolve(strict=True), folder.resolve(strict=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        _refuse_link(path, f"cannot be resolved ({printable(error, 80)})", error)
    blobs = [snapshots.parent / "blobs" for snapshots in home.parents if snapshots.name == "snapshots"]
    if target.parent != home and target.parent not in blobs:
        _refuse_link(path, f"is a symbolic link out of the checkpoint, to {printable(target)}", None)
    return path


def _refuse_link(path: Path, problem: str, cause: Exception | None) -> NoReturn:
    raise failure(path, problem, "put the file itself there, or give the folder that holds it") from cause


def _model_name(folder: Path) -> str:
    """The folder's name, or "owner/name" in Hugging Face's cache (``models--owner--name/snapshots/<revision>``)."""
    resolved = folder.resolve()
    repository = resolved.parent.parent.name
    if resolved.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.removeprefix("models--").replace("--", "/")
    return resolved.name


def _ranges(indices: tuple[int, ...], limit: int = 8) -> str:
    """``0-5, 7, 9-11``; at most ``limit`` ranges."""
    ranges: list[list[int]] = []
    for index in indices:
        if ranges and ranges[-1][1] == index - 1:
            ranges[-1][1] = index
        else:
            ranges.append([index, index])
    listed = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:limit]]
    return ", ".join(listed) + (", ..." if len(ranges) > limit else "")
