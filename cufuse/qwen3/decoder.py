"""One pass of the decoder over some tokens under a recipe, on NumPy arrays: the emulation behind ``Qwen3.forward``."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cufuse import gemm, mlp
from cufuse.attention import STAGES as ATTENTION_STAGES
from cufuse.attention import stages as attention_stages
from cufuse.bf16 import bfloat16, nearest
from cufuse.emulation import cublas, tensor_core
from cufuse.emulation.attention_products import one_slice
from cufuse.emulation.cublas import AssumedSlicesWarning
from cufuse.norm import add_residual, normalise
from cufuse.quantised.weight import QuantisedWeight
from cufuse.qwen3.weights import Layer, Weights
from cufuse.recipe import Gemm, Recipe
from cufuse.rope import rope_tables, rotate

Keep = Callable[[str, np.ndarray], None]
Progress = Callable[[str, float], None]

STAGES = (
    "hidden", "normalised", "q", "k", "v", "q_normed", "k_normed", "q_rotated", "k_rotated", *ATTENTION_STAGES,
    "attention_output", "attention_residual", "mlp_normalised", "gate", "up", "activated", "gated", "down", "mlp_residual",
)  # fmt: skip
"""A layer's intermediates in their order. "hidden" is the residual stream that enters, "mlp_residual" the one that leaves."""
LAST_STAGES = ("final_normalised", "logits")
"""What follows the last layer."""

_ONE_THREAD = 1 << 20  # multiply-adds below which threads cost more than they save


def intermediate_names(layers: int) -> list[str]:
    """``layers.0.hidden``, ``layers.0.normalised``, ... ``final_normalised``, ``logits``."""
    return [f"layers.{index}.{stage}" for index in range(layers) for stage in STAGES] + list(LAST_STAGES)


@dataclass
class Cache:
    """Keys and values of the positions so far, bfloat16 [batch, positions, Hkv, D] a layer: what ``generate`` keeps.

    ``recipe`` made them: another recipe may not go on with them.
    """

    recipe: str
    batch: int
    capacity: int
    keys: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    length: int = 0

    def take(self, layer: int, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Store the newest positions of a layer; all keys and values up to them."""
        end = self.length + k.shape[1]
        if layer == len(self.keys):
            for store in (self.keys, self.values):
                store.append(np.empty((self.batch, self.capacity, *k.shape[2:]), bfloat16))
        self.keys[layer][:, self.length : end], self.values[layer][:, self.length : end] = k, v
        return self.keys[layer][:, :end], self.values[layer][:, :end]


class Decoder:
    """The weights of a model, ready to be run under any recipe."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._assumed: set[tuple[int, int]] = set()

    def run(
        self,
        token_ids: np.ndarray,
        recipe: Recipe,
        *,
        cache: Cache | None = None,
        keep: Keep | None = None,
        last_only: bool = False,
        progress: Progress | None = None,
    ) -> np.ndarray:
        """Logits [batch, T, V] of the token ids [batch, T] (of the last position alone with ``last_only``: [batch, 1, V]).

        ``keep`` is given every intermediate, [batch, T, ...], by name; ``cache`` holds the positions before these.
        """
        assumed = set(self._assumed)
        step = _Pass(self, token_ids, recipe, cache, keep)
        layers = self.weights.layers
        for index, layer in enumerate(layers):
            step.layer(index, layer)
            if progress is not None:
                progress(f"layer {index}", (index + 1) / (len(layers) + 1))
        logits = step.head(last_only)
        if cache is not None:
            cache.length += token_ids.shape[1]
        if progress is not None:
            progress("head", 1.0)
        if self._assumed - assumed:
            shapes = ", ".join(f"{n}x{k}" for n, k in sorted(self._assumed - assumed))
            warnings.warn(
                f"how cuBLAS cuts K is not recorded for the projections N x K = {shapes}: one slice assumed",
                AssumedSlicesWarning,
                stacklevel=4,
            )
        return logits

    def slices(self, m: int, n: int, k: int, numerics: Gemm) -> int:
        """Slices of K for one projection: the recipe's number, cuBLAS's recorded one, or one."""
        if numerics.k_slices != "cublas":
            return numerics.k_slices
        recorded = cublas.recorded_slices(m, n, k) if numerics.core == "sm_90" else None
        if recorded is None and numerics.core == "sm_90" and one_slice(n, k):
            return 1
        if recorded is None:
            self._assumed.add((n, k))
            return 1
        return recorded


class _Pass:
    """What one pass carries from layer to layer."""

    def __init__(self, decoder: Decoder, token_ids: np.ndarray, recipe: Recipe, cache: Cache | None, keep: Keep | None) -> None:
        self.decoder, self.recipe, self.cache, self.keep = decoder, recipe, cache, keep
        self.batch, self.tokens = token_ids.shape
        self.rows = self.batch * self.tokens
        self.config = decoder.weights.config
        start = 0 if cache is None else cache.length
        positions = np.tile(np.arange(start, start + self.tokens), self.batch)
        dtype = bfloat16 if recipe.rope.tables == "bfloat16" else np.float32
        self.tables = rope_tables(positions, self.config.head_dim, base=self.config.rope_theta, dtype=dtype)
        self.addend = np.ascontiguousarray(decoder.weights.embedding[token_ids.reshape(-1)])
        self.residual: np.ndarray | None = None

    def layer(self, index: int, weights: Layer) -> None:
        """One layer: its MLP's output becomes ``addend``, which the next norm adds to the residual stream."""
        name = f"layers.{index}."
        wide, hidden = self._add(None if index == 0 else f"layers.{index - 1}.mlp_residual")
        self._kept(name + "hidden", hidden)
        normalised = normalise(wide, weights.input_norm, self.config.rms_norm_eps, self.recipe.norm, index > 0)
        self._kept(name + "normalised", normalised)
        attended = self._attention(index, name, normalised, weights)
        dense = self.recipe.dense or self.recipe.gemm
        self.addend = self._project(attended, weights.o_proj, dense)
        self.residual = hidden
        self._kept(name + "attention_output", self.addend)
        wide, self.residual = self._add(name + "attention_residual")
        numerics = self.recipe.mlp_norm or self.recipe.norm
        normalised = normalise(wide, weights.mlp_norm, self.config.rms_norm_eps, numerics, True)
        self._kept(name + "mlp_normalised", normalised)
        self._mlp(name, normalised, weights, dense)

    def _add(self, name: str | None) -> tuple[np.ndarray, np.ndarray]:
        """(what is normalised, what is stored) after addition of ``addend`` to the residual stream."""
        if self.residual is None:
            return self.addend.astype(np.float32), self.addend
        wide, stored = add_residual(self.addend, self.residual, self.recipe)
        if name is not None:
            self._kept(name, stored)
        return wide, stored

    def _attention(self, index: int, name: str, normalised: np.ndarray, weights: Layer) -> np.ndarray:
        """Projections, head norms, rotation, attention: [rows, Hq D]."""
        recipe, size = self.recipe, self.config.head_dim
        found: dict[str, np.ndarray] = {}
        projections = {"q": weights.q_proj, "k": weights.k_proj, "v": weights.v_proj}
        packed = sum(weight.shape[0] for weight in projections.values()) if recipe.packed_projections else None
        for key, weight in projections.items():
            found[key] = self._project(normalised, weight, recipe.gemm, packed).reshape(self.rows, -1, size)
            self._kept(name + key, found[key])
        for key, weight in (("q", weights.q_norm), ("k", weights.k_norm)):
            per_head = found[key].reshape(-1, size).astype(np.float32)
            normed = normalise(per_head, weight, self.config.rms_norm_eps, recipe.head_norm).reshape(found[key].shape)
            self._kept(f"{name}{key}_normed", normed)
            found[key] = rotate(normed, *self.tables, recipe.rope)
        q, k, v = (_rounded(found[key]).reshape(self.batch, self.tokens, -1, size) for key in "qkv")
        for key, value in (("q_rotated", q), ("k_rotated", k)):
            self._kept(name + key, value.reshape(self.rows, -1, size) if recipe.round_output else found[key[0]])
        if self.cache is not None:
            k, v = self.cache.take(index, k, v)
        steps = attention_stages(q, k, v, size**-0.5, True, recipe, keep=self.keep is not None)
        for key, value in steps.items():
            self._kept(name + key, value.reshape(self.rows, *value.shape[2:]))
        return steps["attended"].reshape(self.rows, -1)

    def _mlp(self, name: str, normalised: np.ndarray, weights: Layer, dense: Gemm) -> None:
        packed = 2 * weights.gate_proj.shape[0] if self.recipe.packed_projections else None
        gate = self._project(normalised, weights.gate_proj, dense, packed)
        up = self._project(normalised, weights.up_proj, dense, packed)
        activated = mlp.activated(gate, self.recipe.mlp)
        gated = mlp.gated(activated, up, self.recipe.mlp)
        self.addend = self._project(gated, weights.down_proj, dense)
        for key, value in (("gate", gate), ("up", up), ("activated", activated), ("gated", gated), ("down", self.addend)):
            self._kept(name + key, value)

    def head(self, last_only: bool) -> np.ndarray:
        """Final norm of every row, then the head of all rows or of each sequence's last."""
        weights = self.decoder.weights
        wide, _ = self._add(f"layers.{len(weights.layers) - 1}.mlp_residual")
        numerics = self.recipe.mlp_norm or self.recipe.norm
        normalised = normalise(wide, weights.final_norm, self.config.rms_norm_eps, numerics, True)
        self._kept("final_normalised", normalised)
        rows = normalised.reshape(self.batch, self.tokens, -1)
        if last_only:
            rows = np.ascontiguousarray(rows[:, -1:])
        logits = self._project(rows.reshape(-1, rows.shape[-1]), weights.head, self.recipe.dense or self.recipe.gemm)
        logits = logits.reshape(self.batch, rows.shape[1], -1)
        if self.keep is not None:
            self.keep("logits", logits)
        return logits

    def _project(self, x: np.ndarray, weight: Any, numerics: Gemm, packed: int | None = None) -> np.ndarray:
        """x W^T; ``packed``: the rows of the packed weight that this one is part of, by which cuBLAS chooses its slices."""
        (m, k), n = x.shape, weight.shape[0]
        quantised = isinstance(weight, QuantisedWeight)
        if quantised and numerics.quantised != "decoded":
            return gemm.project(x, weight, numerics, numerics.quantised_slices)
        slices = self.decoder.slices(m, packed or n, k, numerics)
        if quantised or x.dtype != bfloat16 or m * n * k >= _ONE_THREAD:
            return gemm.project(x, weight, numerics, slices)
        total = tensor_core.matmul(x, weight, core=numerics.core, k_slices=slices, threads=1)
        return nearest(total) if numerics.output == "bfloat16" else total

    def _kept(self, name: str, value: np.ndarray) -> None:
        """Hand over an intermediate [rows, ...]."""
        if self.keep is not None:
            self.keep(name, value.reshape(self.batch, self.tokens, *value.shape[1:]))


def _rounded(x: np.ndarray) -> np.ndarray:
    """Queries, keys and values as they enter the attention and its cache."""
    return x if x.dtype == bfloat16 else nearest(np.ascontiguousarray(x))


def greedy(logits: np.ndarray) -> np.ndarray:
    """The token of the largest logit [..., V] -> [...]; of equal ones the first, NaN before all: ``torch.argmax``."""
    wide: Any = logits.astype(np.float32)
    return np.asarray(np.argmax(wide, axis=-1), np.int64)
