"""The decoder on a GPU: the kernels of the single operations, one after the other.

The same bits as ``decoder.py`` gives without a GPU, for every recipe whose kernels exist, where cuBLAS cuts K as was recorded.
Weights are copied to the device once. Greedy decoding as a replayed CUDA graph is in ``gpu_greedy.py``.
"""

import types
from typing import Any, cast

import numpy as np

from cufuse import _gpu_decoder, _gpu_gemm, _gpu_linear, _gpu_norm, _gpu_quantised, _gpu_rope, launch
from cufuse._gpu_decoder import codes
from cufuse.bf16 import bfloat16
from cufuse.quantised.weight import QuantisedWeight, concatenate
from cufuse.qwen3.decoder import Keep
from cufuse.qwen3.gpu_generation import GpuCache
from cufuse.qwen3.weights import FIELDS, Layer, Weights
from cufuse.recipe import Gemm, Norm, Recipe
from cufuse.rope import rope_tables


class GpuDecoder:
    """A model's weights on CuPy's current device, ready to be run under any recipe."""

    def __init__(self, weights: Weights) -> None:
        import cupy

        _refuse_capture()
        self.cupy = cupy
        self.device = launch.current_device()
        self.config = weights.config
        self._require_memory(weights)
        self.embedding = _uploaded(weights.embedding)
        tied = weights.head is weights.embedding
        self.head = self.embedding if tied else _uploaded(weights.head)
        self.final_norm = _uploaded(weights.final_norm)
        self.layers = [_uploaded_layer(layer) for layer in weights.layers]
        self.quantised = any(isinstance(layer.q_proj, QuantisedWeight) for layer in weights.layers)

    def _require_memory(self, weights: Weights) -> None:
        """MemoryError before anything is copied to a device that it does not fit on."""
        parts = [weights.embedding, weights.final_norm, *(getattr(layer, name) for layer in weights.layers for name in FIELDS)]
        needed = sum(part.nbytes for part in parts) + (0 if weights.head is weights.embedding else weights.head.nbytes)
        free = self.cupy.cuda.runtime.memGetInfo()[0] + self.cupy.get_default_memory_pool().free_bytes()
        if needed > free:
            name = launch.device_name(self.device)
            raise MemoryError(f"the weights take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on {name}")

    def new_cache(self, recipe: Recipe, batch: int, capacity: int) -> GpuCache:
        """An empty cache for so many positions."""
        shape = (len(self.layers), batch * capacity, self.config.num_key_value_heads, self.config.head_dim)
        return GpuCache(recipe.name, batch, capacity, *(self.cupy.zeros(shape, "u2").view(bfloat16) for _ in range(2)))

    def run(
        self, token_ids: Any, recipe: Recipe, *, cache: GpuCache | None = None, keep: Keep | None = None, last_only: bool = False
    ) -> Any:
        """Logits [batch, T, V] of checked ids [batch, T] (NumPy or CuPy, int64), as ``Decoder.run``; intermediates are CuPy
        arrays. ValueError in a stream capture: the graph would hold the memory of intermediates, which others are given."""
        _refuse_capture()
        return _Pass(self, self.cupy.asarray(token_ids), recipe, cache, keep).run(last_only)

    def tables(self, first: int, count: int, recipe: Recipe) -> tuple[Any, Any]:
        """cos and sin [count, D] of the positions from ``first`` on."""
        dtype = bfloat16 if recipe.rope.tables == "bfloat16" else np.float32
        positions = np.arange(first, first + count)
        cos, sin = rope_tables(positions, self.config.head_dim, base=self.config.rope_theta, dtype=dtype)
        return _uploaded(cos), _uploaded(sin)


def _refuse_capture() -> None:
    import cupy

    if cupy.cuda.get_current_stream().is_capturing():
        raise ValueError(
            "the current stream is being captured, and a model copies its weights and allocates its intermediates: run it outside "
            "of the capture; generate replays its decoding steps as a graph itself"
        )


def _uploaded(x: Any) -> Any:
    """A NumPy array or quantised weight on the current device; bfloat16 travels as its codes."""
    if isinstance(x, QuantisedWeight):
        return x.on_gpu()
    import cupy

    dense = np.ascontiguousarray(x)
    return cupy.asarray(dense.view(np.uint16)).view(bfloat16) if dense.dtype == bfloat16 else cupy.asarray(dense)


STACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Projections of one input, whose weights lie one behind the other: what one launch can multiply by."""


def _uploaded_layer(layer: Layer) -> Any:
    """A layer's weights on the current device, by their names and those of STACKED."""
    import cupy

    found = {name: _uploaded(getattr(layer, name)) for name in FIELDS if not any(name in names for names in STACKED.values())}
    for together, names in STACKED.items():
        parts = [getattr(layer, name) for name in names]
        if isinstance(parts[0], QuantisedWeight):
            found |= {name: part.on_gpu() for name, part in zip(names, parts, strict=True)}
            found[together] = concatenate(parts).on_gpu()
            continue
        ends = np.cumsum([len(part) for part in parts])
        stack = cupy.empty((int(ends[-1]), parts[0].shape[1]), np.uint16)
        for name, part, end in zip(names, parts, ends, strict=True):
            stack[end - len(part) : end] = codes(_uploaded(part))
            found[name] = stack[end - len(part) : end].view(bfloat16)
        found[together] = stack.view(bfloat16)
    return types.SimpleNamespace(**found)


def slices(m: int, n: int, k: int, numerics: Gemm) -> int:
    """Slices of K of one projection: the recipe's number, or cuBLAS's answer."""
    return _gpu_gemm.asked_slices(m, n, k) if numerics.k_slices == "cublas" else numerics.k_slices


def norm_dtype(numerics: Norm) -> Any:
    """The type that a norm with bfloat16 weights leaves."""
    return bfloat16 if numerics.round_weighted else np.dtype(np.float32)


def product_dtype(numerics: Gemm) -> Any:
    """The type that a projection leaves."""
    return bfloat16 if numerics.output == "bfloat16" else np.dtype(np.float32)


class _Pass:
    """One pass over some tokens, stage by stage."""

    def __init__(self, decoder: GpuDecoder, ids: Any, recipe: Recipe, cache: GpuCache | None, keep: Keep | None) -> None:
        self.decoder, self.cupy, self.recipe, self.cache, self.keep = decoder, decoder.cupy, recipe, cache, keep
        self.batch, self.tokens = ids.shape
        self.rows = self.batch * self.tokens
        self.config = decoder.config
        self.start = 0 if cache is None else cache.length
        tables = decoder.tables(self.start, self.tokens, recipe)
        self.cos, self.sin = (self.cupy.tile(codes(table), (self.batch, 1)).view(table.dtype) for table in tables)
        self.addend = self._empty((self.rows, self.config.hidden_size), bfloat16)
        _gpu_decoder.gather(decoder.embedding, self.cupy.ascontiguousarray(ids.reshape(-1)), self.addend)
        self.residual: Any = None
        # what follows the attention's front has numerics of its own
        self.dense = recipe.dense or recipe.gemm
        self.behind = recipe.mlp_norm or recipe.norm

    def run(self, last_only: bool) -> Any:
        for index, weights in enumerate(self.decoder.layers):
            self._layer(index, f"layers.{index}.", weights)
        normalised = self._add_norm(self.decoder.final_norm, self.behind, f"layers.{len(self.decoder.layers) - 1}.mlp_residual")
        self._kept("final_normalised", normalised)
        rows = normalised.reshape(self.batch, self.tokens, -1)
        if last_only:
            rows = self.cupy.ascontiguousarray(codes(rows)[:, -1:]).view(rows.dtype)
        logits = self._project(rows.reshape(-1, rows.shape[-1]), self.decoder.head, self.dense)
        logits = logits.reshape(self.batch, rows.shape[1], -1)
        if self.keep is not None:
            self.keep("logits", logits)
        if self.cache is not None:
            self.cache.length += self.tokens
        return logits

    def _layer(self, index: int, name: str, weights: Any) -> None:
        if index == 0:
            normalised = self._empty(self.addend.shape, norm_dtype(self.recipe.norm))
            _gpu_norm.rms_norm(self.addend, weights.input_norm, self.config.rms_norm_eps, self.recipe.norm, normalised)
            self.residual = self.addend
        else:
            normalised = self._add_norm(weights.input_norm, self.recipe.norm, f"layers.{index - 1}.mlp_residual")
        self._kept(name + "hidden", self.residual)
        self._kept(name + "normalised", normalised)
        attended = self._attention(index, name, normalised, weights)
        self.addend = self._project(attended, weights.o_proj, self.dense)
        self._kept(name + "attention_output", self.addend)
        normalised = self._add_norm(weights.mlp_norm, self.behind, name + "attention_residual")
        self._kept(name + "mlp_normalised", normalised)
        self._mlp(name, normalised, weights)

    def _add_norm(self, weight: Any, numerics: Norm, name: str) -> Any:
        """``addend`` goes into the residual stream, whose norm is returned."""
        wide = self.recipe.residual_sum == "float32"
        total = self._empty(self.addend.shape, np.dtype(np.float32) if wide else bfloat16)
        normalised = self._empty(self.addend.shape, norm_dtype(numerics))
        stated = cast(Recipe, types.SimpleNamespace(norm=numerics, residual_sum=self.recipe.residual_sum))
        _gpu_norm.add_rms_norm(self.addend, self.residual, weight, self.config.rms_norm_eps, stated, normalised, total)
        self.residual = total
        self._kept(name, total)
        return normalised

    def _attention(self, index: int, name: str, normalised: Any, weights: Any) -> Any:
        recipe, size = self.recipe, self.config.head_dim
        projections = {"q": weights.q_proj, "k": weights.k_proj, "v": weights.v_proj}
        packed = sum(weight.shape[0] for weight in projections.values()) if recipe.packed_projections else None
        found = {}
        for key, weight in projections.items():
            found[key] = self._project(normalised, weight, recipe.gemm, packed).reshape(self.rows, -1, size)
            self._kept(name + key, found[key])
        for key, weight in (("q", weights.q_norm), ("k", weights.k_norm)):
            normed = self._empty(found[key].shape, norm_dtype(recipe.head_norm))
            _gpu_norm.rms_norm(found[key], weight, self.config.rms_norm_eps, recipe.head_norm, normed)
            self._kept(f"{name}{key}_normed", normed)
            found[key] = normed
        dtype = bfloat16 if recipe.rope.round_sum else np.dtype(np.float32)
        rotated = [self._empty(found[key].shape, dtype) for key in "qk"]
        _gpu_rope.rope(found["q"], found["k"], self.cos, self.sin, recipe.rope, *rotated)
        q, k, v = (_gpu_decoder.as_kernels_read(x, name) for name, x in zip("qkv", (*rotated, found["v"]), strict=True))
        for key, value, unrounded in zip(("q_rotated", "k_rotated"), (q, k), rotated, strict=True):
            self._kept(name + key, value if recipe.round_output else unrounded)
        q, k, v = (x.reshape(self.batch, self.tokens, -1, size) for x in (q, k, v))
        keys = self.start + self.tokens
        if self.cache is not None:
            held = self.cache.layer(index)
            for store, new in zip(held, (k, v), strict=True):
                codes(store)[:, self.start : keys] = codes(new)
            k, v = held
        return self._attend(name, q, k, v, keys)

    def _attend(self, name: str, q: Any, k: Any, v: Any, keys: int) -> Any:
        """Attention over the first ``keys`` of k and v: [rows, Hq D]."""
        numerics, heads, size = self.recipe.attention, self.config.num_attention_heads, self.config.head_dim
        shape = (self.rows * heads, -(-keys // 8) * 8)
        scores = self._empty(shape, np.dtype(np.uint16 if numerics.round_scaled else np.float32))
        # apart from the scores, which may be asked for; nowhere if nobody asks
        unseen = self.keep is None and _gpu_decoder.fuses_softmax(self.tokens, shape[1])
        weights: Any = None if unseen else self._empty(shape, np.dtype(np.uint16))
        attended = self._empty(q.shape, bfloat16 if numerics.round_output else np.dtype(np.float32))
        both = _gpu_decoder.order_codes(numerics, self.batch * heads, self.tokens, keys)
        _gpu_decoder.run_attention(
            q, k, v, scores, weights, attended, keys, size**-0.5, True, numerics, self.decoder.device, both
        )
        if self.keep is not None:
            for key, value in (("masked_scores", scores), ("weights", weights)):
                by_head = value.reshape(self.batch, heads, self.tokens, -1)[..., :keys]
                by_token = self.cupy.ascontiguousarray(by_head.transpose(0, 2, 1, 3)).reshape(self.rows, heads, keys)
                self._kept(name + key, by_token.view(bfloat16) if by_token.itemsize == 2 else by_token)
        self._kept(name + "attended", attended.reshape(self.rows, heads, size))
        return attended.reshape(self.rows, -1)

    def _mlp(self, name: str, normalised: Any, weights: Any) -> None:
        packed = 2 * weights.gate_proj.shape[0] if self.recipe.packed_projections else None
        gate = self._project(normalised, weights.gate_proj, self.dense, packed)
        up = self._project(normalised, weights.up_proj, self.dense, packed)
        gated = self._empty(gate.shape, bfloat16 if self.recipe.mlp.round_gated else np.dtype(np.float32))
        _gpu_decoder.swiglu(gate, up, self.recipe.mlp, gated)
        self.addend = self._project(gated, weights.down_proj, self.dense)
        for key, value in (("gate", gate), ("up", up), ("gated", gated), ("down", self.addend)):
            self._kept(name + key, value)

    def _project(self, x: Any, weight: Any, numerics: Gemm, packed: int | None = None) -> Any:
        n = weight.shape[0]
        out = self._empty((len(x), n), product_dtype(numerics))
        if isinstance(weight, QuantisedWeight):
            decoded = numerics.quantised == "decoded"
            cuts = slices(len(x), packed or n, x.shape[1], numerics) if decoded else None
            return _gpu_quantised.linear(x, weight, numerics, cuts, out)
        return _gpu_linear.linear(x, weight, out, slices(len(x), packed or n, x.shape[1], numerics))

    def _empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.cupy.empty(shape, dtype)

    def _kept(self, name: str, value: Any) -> None:
        if self.keep is not None:
            self.keep(name, value.reshape(self.batch, self.tokens, *value.shape[1:]))
