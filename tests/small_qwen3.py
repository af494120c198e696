"""The small Qwen3 of the golden files, in memory and as a folder."""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from cufuse._model_config import ModelConfig
from cufuse.qwen3 import Qwen3
from cufuse.qwen3.weights import assemble
from tests.golden import small_model


@functools.cache
def small_qwen3(tied: bool = False) -> Qwen3:
    """The model of tests/golden/small_model.py; with the head tied to the embeddings on demand."""
    config = small_model.CONFIG
    names = {field: config[field] for field in ModelConfig.__dataclass_fields__ if field in config}
    tensors = small_model.weights()
    about = {"source": "tests/golden/small_model.py", "synthetic": True}
    numbers = ModelConfig(**names | {"tie_word_embeddings": tied, "name": "small"})
    return Qwen3(assemble(numbers, lambda name: tensors[name if name in tensors else f"model.{name}"], about))


def write_folder(folder: Path, *, drop: tuple[str, ...] = (), add: dict[str, np.ndarray] | None = None, **config: Any) -> Path:
    """A checkpoint folder of the small model, with tensors left out or added and members of config.json changed."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value for name, value in small_model.weights().items() if name not in drop} | (add or {})
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(small_model.CONFIG | config))
    return folder
