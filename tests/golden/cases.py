"""What is recorded, and from which inputs: read by the recording script and by the test, so that both mean the same."""

from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from . import inputs

NORM_K = (1, 2, 7, 33, 64, 100, 127, 128, 129, 130, 896, 1000, 1001, 1024, 1536, 2048, 2560, 3584, 4096, 5120, 8192, 10000, 16384)
NORM_M = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 64)
NORM_CASES = (
    [(m, k) for k in NORM_K for m in NORM_M]
    + [(m, 65536) for m in (1, 2, 3, 5, 8, 16)]
    + [(m, k) for m in (256, 1000) for k in (64, 128, 1024)]
    + [(5000, 128)]
)
EPS = 1e-6


def norm_input(m: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """x [m, k] with outliers and weight [k] with one weight of 96.5."""
    seed = inputs.seed_of("norm", m, k)
    return inputs.heavy((m, k), seed), inputs.norm_weight(k, seed + 1, 96.5)


@dataclass(frozen=True)
class Product:
    """x [m, k] times weight [n, k]^T; ``columns`` of the output are compared (all where None)."""

    m: int
    n: int
    k: int
    columns: int | None = None

    @property
    def name(self) -> str:
        return f"m{self.m}_n{self.n}_k{self.k}"

    def chosen(self) -> np.ndarray:
        """The compared columns, spread over the width so that every tile position occurs."""
        if self.columns is None:
            return np.arange(self.n)
        return np.unique(np.arange(self.columns) * self.n // self.columns + np.arange(self.columns) % 8).clip(max=self.n - 1)

    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        seed = inputs.seed_of("linear", self.m, self.n, self.k)
        return inputs.heavy((self.m, self.k), seed), inputs.bell((self.n, self.k), seed + 1, 0.03)


def products() -> Iterator[Product]:
    for m in (1, 2, 3, 4, 8, 16, 17, 33):
        for n in (4096, 2048, 1024):
            yield Product(m, n, 1024)
    for m in (1, 3, 16):
        for n in (4096, 1024, 6144):
            yield Product(m, n, 2560, 512)
            yield Product(m, n, 4096, 512)
    for m in (64, 128, 256, 777):
        for n, k in ((4096, 4096), (1024, 4096), (1024, 5120), (6144, 2560), (4096, 1024)):
            yield Product(m, n, k, 24)
    for m in (8, 32, 64, 128):
        yield Product(m, 4096, 12288, 32)
    for m in (24, 64, 200, 777):
        yield Product(m, 1024, 8192, 32)
    for m in (1, 16, 130):
        yield Product(m, 5120, 8192, 64)
        yield Product(m, 10240, 5120, 64)


@dataclass(frozen=True)
class Block:
    """The front of a Qwen3 attention: norm, q/k/v, Q/K norm, RoPE."""

    model: str
    hidden: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int = 128

    @property
    def name(self) -> str:
        return f"{self.model}_t{self.tokens}"

    def inputs(self) -> dict[str, np.ndarray]:
        seed = inputs.seed_of("block", self.model)
        width = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "x": inputs.heavy((self.tokens, self.hidden), seed + self.tokens),
            "norm_weight": inputs.norm_weight(self.hidden, seed + 1, 8.0),
            "qkv_weight": inputs.bell((width, self.hidden), seed + 2, 0.03),
            "q_norm_weight": inputs.norm_weight(self.head_dim, seed + 3, 6.0),
            "k_norm_weight": inputs.norm_weight(self.head_dim, seed + 4, 96.5),
        }


BLOCKS = [
    Block(model, hidden, heads, 8, tokens)
    for model, hidden, heads in (("qwen3-0.6b", 1024, 16), ("qwen3-4b", 2560, 32), ("qwen3-8b", 4096, 32))
    for tokens in (1, 3, 16)
]
STAGES = ("normalised", "q", "k", "v", "q_normed", "k_normed", "q_rotated", "k_rotated")

RESIDUAL_SHAPES = ((1, 1024), (3, 2560), (16, 4096), (64, 1024))


def residual_input(m: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    seed = inputs.seed_of("residual", m, k)
    return inputs.heavy((m, k), seed), inputs.heavy((m, k), seed + 1, 3.0)


def cast_input() -> np.ndarray:
    return inputs.special_float32()


def as_bits(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x
