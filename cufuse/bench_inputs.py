"""What ``cufuse bench`` multiplies: made-up weights of one model's attention front on the GPU, as many as exceed its cache many
times, and tokens for them. Neither PyTorch nor cuRAND is needed.

The values are a bell curve, the tokens with a few columns 16 times as large, one K-norm weight 96.5. Zeros would make a GPU
quicker than it is.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

import cufuse
from cufuse.bf16 import bfloat16
from cufuse.checkpoint import ModelConfig
from cufuse.qkv import output_dtype
from cufuse.quantised import QuantisedWeight
from cufuse.recipe import Recipe

TOTAL_BYTES: Final = 1 << 30
"""Of all distinct packed weights together."""

_CACHE_BYTES: Final = 240 << 20  # four times an H200's L2
_GRAPH_MICROSECONDS: Final = 5000.0
_FIRST_POSITION: Final = 1000
EPS: Final = 1e-6


class Layer:
    """The weights of one model: norms, and packed projections [N, K] one after the other; and tokens for all its cells."""

    def __init__(self, config: ModelConfig, most_tokens: int, seed: int = 0) -> None:
        self.config = config
        self.hidden, self.head_dim = config.hidden_size, config.head_dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.parts = (self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim)
        self.rows = sum(self.parts)
        generator = np.random.default_rng(seed)
        self.norm = _norm_weight(generator, self.hidden, 8.0)
        self.q_norm = _norm_weight(generator, self.head_dim, 6.0)
        self.k_norm = _norm_weight(generator, self.head_dim, 96.5)
        first = generator.standard_normal((self.rows, self.hidden), np.float32) * np.float32(self.hidden**-0.5)
        self.weights = _displaced(_rounded(first), distinct_weights(2 * first.size))
        tokens = generator.standard_normal((most_tokens, self.hidden), np.float32)
        tokens[:, 5::251] *= 16
        self.tokens = _rounded(tokens)


class Block:
    """One cell under one recipe: tokens, rotation tables, outputs, and the call of ``cufuse.rms_norm_qkv``."""

    def __init__(self, layer: Layer, tokens: int, recipe: Recipe, weights: Sequence[Any] | None = None) -> None:
        """weights: packed projections in the place of the layer's, such as quantised ones."""
        import cupy

        self.layer, self.recipe = layer, recipe
        self.weights = layer.weights if weights is None else weights
        self.x = layer.tokens[:tokens]
        dtype = np.float32 if recipe.rope.tables == "float32" else bfloat16
        self.cos, self.sin = map(upload, self.tables(dtype))
        counts = (layer.heads, layer.kv_heads, layer.kv_heads)
        self.out = tuple(
            cupy.empty((tokens, count, layer.head_dim), output_dtype(recipe, name, True, True))
            for name, count in zip("qkv", counts, strict=True)
        )
        self.calls = calls_of_a_graph(tokens, layer.rows, layer.hidden, len(self.weights), self.weights[0].nbytes)

    def tables(self, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin [tokens, D] of positions in the middle of a text."""
        positions = np.arange(_FIRST_POSITION, _FIRST_POSITION + len(self.x))
        return cufuse.rope_tables(positions, self.layer.head_dim, base=self.layer.config.rope_theta, dtype=dtype)

    def call(self, index: int, **options: Any) -> None:
        """The front with packed weight ``index``, into ``out``."""
        layer = self.layer
        cufuse.rms_norm_qkv(
            self.x,
            layer.norm,
            self.weights[index],
            layer.q_norm,
            layer.k_norm,
            eps=EPS,
            cos=self.cos,
            sin=self.sin,
            heads=layer.heads,
            recipe=self.recipe,
            out=self.out,
            **options,
        )

    def emulated(self, index: int) -> tuple[np.ndarray, ...]:
        """The same on NumPy arrays, its K cut as the cuBLAS installed here cuts it."""
        from cufuse import cublaslt

        layer, weight = self.layer, self.weights[index]
        arrays = (self.x, layer.norm, layer.q_norm, layer.k_norm, self.cos, self.sin)
        x, norm, q_norm, k_norm, cos, sin = (download(array) for array in arrays)
        slices: int | str | None = self.recipe.gemm.k_slices
        if isinstance(weight, QuantisedWeight):
            weight, slices = weight.on_cpu(), None
        else:
            weight = download(weight)
        if slices == "cublas":
            slices = cublaslt.k_slices(len(x), layer.rows, layer.hidden)
        options: dict[str, Any] = {"cos": cos, "sin": sin, "heads": layer.heads, "recipe": self.recipe, "k_slices": slices}
        return cufuse.rms_norm_qkv(x, norm, weight, q_norm, k_norm, eps=EPS, **options)


def distinct_weights(size: int) -> int:
    """How many weights of ``size`` bytes there are."""
    return max(3, math.ceil(TOTAL_BYTES / size))


def calls_of_a_graph(tokens: int, rows: int, hidden: int, weights: int, weight_bytes: int) -> int:
    """How many calls a graph has: all weights once, but where many tokens make a call long, no more than some milliseconds of them
    and four times the cache."""
    estimate = 2 + max(weight_bytes / 4e6, 2 * tokens * rows * hidden / 7e8)  # microseconds at 4 TB/s, 700 TFLOP/s
    wanted = max(3, math.ceil(_GRAPH_MICROSECONDS / estimate), math.ceil(_CACHE_BYTES / weight_bytes))
    return min(weights, wanted)


def poison(outputs: tuple[Any, ...]) -> None:
    """Fill outputs with a NaN that no recipe gives: what is not written will differ."""
    for array in outputs:
        codes(array)[...] = np.iinfo(f"u{array.itemsize}").max


def differing(found: tuple[Any, ...], expected: tuple[Any, ...]) -> int:
    """Outputs of q, k and v whose bits differ, compared on the GPU; bfloat16 is widened where the other is float32."""
    import cupy

    total = 0
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            raise ValueError(f"outputs have shape {one.shape}; expected is {other.shape}")
        wide = np.float32 in (one.dtype, other.dtype)
        pair = [array.astype(np.float32) if wide and array.dtype == bfloat16 else array for array in (one, other)]
        total += int(cupy.count_nonzero(codes(pair[0]) != codes(pair[1])))
    return total


def codes(array: Any) -> Any:
    """An array's bits as unsigned integers, a view."""
    return array.view(np.dtype(f"u{array.itemsize}"))


def upload(array: np.ndarray) -> Any:
    """A NumPy array as a CuPy array of the same bits."""
    import cupy

    if array.dtype == bfloat16:
        return cupy.asarray(np.ascontiguousarray(array).view(np.uint16)).view(bfloat16)
    return cupy.asarray(array)


def download(array: Any) -> np.ndarray:
    """A CuPy array as a NumPy array of the same bits."""
    import cupy

    return np.asarray(cupy.asnumpy(codes(array))).view(array.dtype)


def _rounded(values: np.ndarray) -> Any:
    return cufuse.round_to_bf16(upload(values))


def _norm_weight(generator: np.random.Generator, size: int, largest: float) -> Any:
    weight = 1 + 0.25 * generator.standard_normal(size, np.float32)
    weight[size // 3] = largest
    return upload(cufuse.round_to_bf16(weight))


def _displaced(first: Any, count: int) -> list[Any]:
    """``count`` arrays with the values of ``first``, each from another place on: other products, and other memory."""
    import cupy

    found = [first]
    flat = first.reshape(-1)
    for number in range(1, count):
        start = number * 104_729 % flat.size  # a prime, so that no row begins where another one did
        other = cupy.empty_like(flat)
        codes(other)[: flat.size - start] = codes(flat)[start:]
        codes(other)[flat.size - start :] = codes(flat)[:start]
        found.append(other.reshape(first.shape))
    return found
