"""The numbers of a synthetic checkpoint: which tensors there are, how large their weights, and their random streams.

The random numbers are PCG64 (XSL RR 128/64), used through ``numpy.random.PCG64.random_raw``, whose stream NumPy
guarantees, unlike that of ``numpy.random.Generator`` (NEP 19). State and increment come from the SHA-256 of
``cufuse.synthetic/1|<model>|<seed>|<tensor name>``. Each weight takes one 64-bit word; all arithmetic behind it is in
integers and single float32 operations, so that a seed gives the same bits on every machine and with every NumPy.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from cufuse._model_config import ATTENTION_TENSORS, ModelConfig

Array = np.ndarray[Any, np.dtype[Any]]

WRITER = "cufuse.synthetic/1"  # the number changes when a seed's bits do

DOCUMENTED_K_NORM_MAXIMA = {0: 96.5, 1: 44.5, 2: 44.0, 4: 41.75, 5: 34.0}
"""Layer -> the largest K-norm weight of Qwen3-0.6B, where the rounding study documents it."""

# all are bfloat16 numbers
K_NORM_MAXIMA = (
    96.5, 44.5, 44.0, 33.0, 41.75, 34.0, 30.5, 27.0, 24.0, 21.5, 19.0, 17.0, 15.0, 13.5, 12.0, 11.0,
    9.5, 9.25, 9.0, 8.75, 8.5, 8.25, 8.0, 7.75, 7.5, 7.0, 6.5, 6.0,
)  # fmt: skip
"""The largest K-norm weight of each of Qwen3-0.6B's layers in the synthetic model: documented, or else invented."""
_DEEPER_K_NORM_MAXIMUM = 6.0

_CHUNK = 1 << 16  # weights generated at a time: half a megabyte of words, within a core's cache
_BLOCK = 1 << 22  # weights held at a time when writing

# standard deviations of the matrices; that of the embeddings is documented
_DEVIATIONS = {"embed_tokens": 0.027, "q_proj": 0.03, "k_proj": 0.03}
_OTHER_DEVIATION = 0.02

SMALL = "qwen3-small"
# a small model's rows are short: larger weights give its layers a say beside the residual stream
_SMALL_DEVIATIONS = {"embed_tokens": 0.5, "o_proj": 0.05, "down_proj": 0.05}
_OTHER_SMALL_DEVIATION = 0.06


@dataclass(frozen=True)
class SyntheticTensor:
    """One tensor of a synthetic checkpoint and its stream of random words."""

    name: str
    shape: tuple[int, ...]
    model: str
    seed: int

    @property
    def size(self) -> int:
        """Bytes."""
        return 2 * int(np.prod(self.shape, dtype=np.int64))

    def blocks(self) -> Iterator[Array]:
        """The bfloat16 bits, uint16, in order, in blocks of bounded size."""
        if len(self.shape) == 1:
            yield self._norm_bits()
            return
        total = self.size // 2
        for start in range(0, total, _BLOCK):
            yield self.matrix_bits(start, min(_BLOCK, total - start))

    def words(self, start: int, count: int) -> Iterator[Array]:
        """Words ``start`` to ``start + count`` of the stream, in chunks."""
        digest = hashlib.sha256(f"{WRITER}|{self.model}|{self.seed}|{self.name}".encode()).digest()
        stream = np.random.PCG64(0)
        state, increment = int.from_bytes(digest[:16], "little"), int.from_bytes(digest[16:], "little") | 1
        stream.state = {
            "bit_generator": "PCG64",
            "state": {"state": state, "inc": increment},
            "has_uint32": 0,
            "uinteger": 0,
        }
        stream.advance(start)
        for done in range(0, count, _CHUNK):
            yield stream.random_raw(min(_CHUNK, count - done))

    def matrix_bits(self, start: int, count: int) -> Array:
        """Weights ``start`` to ``start + count`` of a matrix: close to a normal distribution, mean 0.

        Formula: round_to_bf16(float32(f0 + f1 + f2 + f3 - 131070) * scale), where f are a word's 16-bit fields. The sum
        of four uniform numbers is nearly normal, up to 3.46 standard deviations; an integer below 2^18 is exact in
        float32.
        """
        kind = self.name.split(".")[-2]
        small = self.model == SMALL
        deviation = (_SMALL_DEVIATIONS if small else _DEVIATIONS).get(kind, _OTHER_SMALL_DEVIATION if small else _OTHER_DEVIATION)
        scale = np.float32(deviation / np.sqrt((65536.0**2 - 1) / 3))  # four times the variance of 0..65535
        bits = np.empty(count, np.uint16)
        done = 0
        for words in self.words(start, count):
            # two sums in parallel, in the lower and the upper half of a word, then the sum of the two
            halves = (words & _EVEN_FIELDS) + ((words >> np.uint64(16)) & _EVEN_FIELDS)
            sums = (halves + (halves >> np.uint64(32))).astype(np.uint32) & np.uint32(0x3FFFF)
            values = (sums.view(np.int32) - np.int32(131_070)).astype(np.float32) * scale
            bits[done : done + words.size] = _bf16_bits(values)
            done += words.size
        return bits

    def _norm_bits(self) -> Array:
        (count,) = self.shape
        fields = np.concatenate(list(self.words(0, count)))[:, None] >> np.array([0, 16, 32, 48], np.uint64)
        u = (fields & np.uint64(0xFFFF)).astype(np.float32) * np.float32(2.0**-16)  # uniform in [0, 1), exact
        kind = self.name.split(".")[-2]
        if kind == "k_norm":
            return _bf16_bits(_k_norm(u, int(self.name.split(".")[2])))
        # least, width, share of the channels that are larger, how many times larger
        least, width, share, factor = _NORMS[kind]
        weights = np.float32(least) + np.float32(width) * u[:, 0]
        return _bf16_bits(np.where(u[:, 1] < np.float32(share), weights * np.float32(factor), weights))


_EVEN_FIELDS = np.uint64(0x0000FFFF0000FFFF)

_NORMS = {
    "input_layernorm": (0.125, 1.375, 1 / 64, 6.0),
    "post_attention_layernorm": (0.5, 1.0, 1 / 64, 4.0),
    "q_norm": (1.0, 2.0, 1 / 32, 4.0),
    "norm": (1.0, 4.0, 1 / 64, 2.0),
}


def _k_norm(u: Array, layer: int) -> Array:
    """K-norm weights with a heavy tail: one channel at the layer's maximum, five from 0.3 of it downwards in steps of
    about 2^(-2/3), all others in [1, 2.6)."""
    maximum = K_NORM_MAXIMA[layer] if layer < len(K_NORM_MAXIMA) else _DEEPER_K_NORM_MAXIMUM
    weights = np.float32(1.0) + np.float32(1.6) * u[:, 0]
    channels = np.argsort(u[:, 1], kind="stable")[:6]
    tail = np.array([1.0, 0.30, 0.19, 0.12, 0.075, 0.047], np.float32) * np.float32(maximum)
    weights[channels] = np.maximum(tail[: channels.size], weights[channels] * np.float32(0.5))
    return weights


def _bf16_bits(values: Array) -> Array:
    """float32 rounded to nearest even; there are no NaN here."""
    bits = values.view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)


def checkpoint_tensors(
    config: ModelConfig, model: str, seed: int, embeddings: bool, attention_only: bool
) -> Iterator[SyntheticTensor]:
    """Every tensor of the checkpoint, in the order of the files."""
    hidden, rows = config.hidden_size, config.vocab_size or 0
    attention, mlp = config.num_attention_heads * config.head_dim, config.intermediate_size or 0
    shapes: dict[str, tuple[int, ...]] = {}
    if embeddings:
        shapes["model.embed_tokens.weight"] = (rows, hidden)
    for layer in range(config.num_hidden_layers):
        base = f"model.layers.{layer}."
        shapes |= {base + ATTENTION_TENSORS[field]: shape for field, shape in config.attention_shapes().items()}
        if not attention_only:
            shapes[base + "self_attn.o_proj.weight"] = (hidden, attention)
            shapes[base + "post_attention_layernorm.weight"] = (hidden,)
            shapes[base + "mlp.gate_proj.weight"] = (mlp, hidden)
            shapes[base + "mlp.up_proj.weight"] = (mlp, hidden)
            shapes[base + "mlp.down_proj.weight"] = (hidden, mlp)
    if not attention_only:
        shapes["model.norm.weight"] = (hidden,)
        if embeddings and not config.tie_word_embeddings:
            shapes["lm_head.weight"] = (rows, hidden)
    return (SyntheticTensor(name, shape, model, seed) for name, shape in shapes.items())
