"""The kernels that ``rms_norm_qkv`` takes for Qwen3's sizes on an H200, found without one: by calls whose launches do nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import cufuse
from cufuse import _driver, launch
from cufuse._model_config import QWEN3, ModelConfig
from cufuse.bf16 import bfloat16
from cufuse.compiler import Kernel
from cufuse.quantised import FORMATS, QuantisedWeight, tiles
from tests import host_gpu
from tests.gpu_support import Nothing
from tests.host_gpu import Array

MULTIPROCESSORS = 132


class Taken(NamedTuple):
    """A kernel, and what a launch of it was given."""

    kernel: Kernel
    threads: int
    smem: int


class Recorder(host_gpu.HostGpu):
    """Remembers what would be launched."""

    def __init__(self) -> None:
        super().__init__(Path())
        self.taken: dict[tuple[str, int, int], Taken] = {}

    def prepare(self, kernel: Kernel, device: int, grid: Any, **options: Any) -> Any:
        threads, smem = options.get("threads") or kernel.threads, options.get("smem")
        found = Taken(kernel, threads, kernel.dynamic_smem if smem is None else smem)
        self.taken.setdefault((kernel.name, *found[1:]), found)
        return Nothing()


def block(config: ModelConfig, tokens: int, form: str | None, residual: bool) -> dict[str, Any]:
    """Arguments of a call, never read: memory that is only reserved."""
    hidden, head = config.hidden_size, config.head_dim
    counts = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)

    def array(*shape: int) -> Array:
        return Array(np.empty(shape, bfloat16))

    rows = sum(counts) * head
    weight: Any = array(rows, hidden)
    if form is not None:
        layout = FORMATS[form]
        pieces = tiles.padded_columns(hidden, layout) // tiles.piece_columns(layout)
        data = Array(np.empty((rows // tiles.ROWS, pieces, tiles.piece_bytes(layout)), np.uint8))
        weight = QuantisedWeight(data, layout, (rows, hidden), "tiles")
    out = tuple(array(tokens, count, head) for count in counts)
    return {
        "x": array(tokens, hidden), "norm_weight": array(hidden), "qkv_weight": weight, "q_norm_weight": array(head),
        "k_norm_weight": array(head), "cos": array(tokens, head), "sin": array(tokens, head), "heads": counts[0],
        "recipe": "torch" if form is None else "block-scaled", "k_slices": 1 if form is None else None,
        "residual": array(tokens, hidden) if residual else None, "out": (*out, array(tokens, hidden)) if residual else out,
    }  # fmt: skip


def taken(patch: pytest.MonkeyPatch, calls: Iterator[dict[str, Any]]) -> list[Taken]:
    """What the calls launch, each once."""
    recorder = Recorder()
    for _ in host_gpu.installed(patch, recorder):
        patch.setattr(launch, "multiprocessors", lambda device: MULTIPROCESSORS)
        patch.setattr(launch, "workspace", lambda device, size, purpose="": 1 << 20)
        patch.setattr(launch, "counters", lambda device: 1 << 20)
        patch.setattr(launch, "current_stream", lambda: 0)
        patch.setattr(_driver, "tensor_map", lambda *arguments, **options: bytes(128))
        host_gpu.forget_plans(patch)
        for arguments in calls:
            cufuse.rms_norm_qkv(**arguments)
    return list(recorder.taken.values())


def qwen3_calls() -> Iterator[dict[str, Any]]:
    """Every size at numbers of rows on both sides of where kernels change; bfloat16 with and without a residual, quantised."""
    for config in QWEN3.values():
        for tokens in (1, 2, 8, 16, 17, 33, 64, 128, 256, 2048, 8192):
            yield block(config, tokens, None, residual=False)
            if tokens in (1, 16, 64):
                yield block(config, tokens, None, residual=True)
        for form in ("Q4_0", "Q8_0"):
            for tokens in (1, 8, 16, 64):
                yield block(config, tokens, form, residual=False)
