"""The whole Qwen3 under a recipe: logits, intermediates, greedy text."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cufuse import named_recipes
from cufuse._model_config import ModelConfig
from cufuse.quantised.weight import QuantisedWeight
from cufuse.qwen3.decoder import Cache, Decoder, Progress, greedy, intermediate_names
from cufuse.qwen3.gpu_generation import GpuCache, GpuModel, is_cupy
from cufuse.qwen3.weights import Weights, read_weights, with_quantised_projections
from cufuse.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Generation:
    """Greedily decoded tokens [n] and the logits [n, V] that chose them; with a batch in front where the prompts have one."""

    tokens: np.ndarray
    logits: np.ndarray


class Qwen3:
    """A Qwen3 whose every rounding point and order of summation is a recipe's: ``cufuse.qwen3.open_model`` makes one.

    With the recipe "torch" the logits are those of transformers' Qwen3ForCausalLM (eager attention, bfloat16) on an H200.
    Weights stay where they are (mapped files, or arrays); nothing is copied.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._decoder = Decoder(weights)
        self._on_gpu: GpuModel | None = None

    @property
    def config(self) -> ModelConfig:
        """The model's numbers."""
        return self.weights.config

    def quantised(self, format: str) -> "Qwen3":
        """The same model with the projections of its layers in a block format ("Q4_0", "Q8_0", "Q4_K", "Q6_K"), quantised here, on
        the CPU (``cufuse.quantised.quantise``); embedding, head and norms stay bfloat16.

        What becomes of such weights is the recipe's ``gemm.quantised``: the recipe "block-scaled" takes them as they are (on a GPU
        decoding then reads as few bytes), "torch" decodes them to bfloat16 at each product.

        Raises ValueError for an unknown format and rows that are no multiple of its block; TypeError for a model that is quantised.
        """
        if any(isinstance(layer.q_proj, QuantisedWeight) for layer in self.weights.layers):
            raise TypeError("the model's projections are quantised already; quantise the one that it was made of")
        return Qwen3(with_quantised_projections(self.weights, format))

    def forward(
        self,
        token_ids: Any,
        *,
        recipe: str | Recipe = "torch",
        intermediates: dict[str, Any] | None = None,
        cache: Cache | GpuCache | None = None,
        last_only: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """Logits of every position.

        Parameters
        ----------
        token_ids : [T] or [batch, T] integers in [0, vocab_size): NumPy array or sequence (the emulation runs), or CuPy array (the
            kernels run; the weights are copied to the current device at the first call). All sequences have one length.
            PyTorch's orders of summation depend on how many rows are computed at a time, so that a batch may give other bits than
            its sequences one by one.
        recipe : name or Recipe; ``recipe.decoder_points()`` adds to ``rounding_points()`` what the decoder does behind q, k and v.
        intermediates : a dictionary that is filled with every intermediate, by the names of ``intermediate_names``, in the order
            of the computation: [T, ...] or [batch, T, ...], heads behind the tokens, scores and weights [..., Hq, keys].
        cache : keys and values of the positions before these (``new_cache``); these are added to it.
        last_only : the head is applied to the last position alone, as ``generate`` of transformers does: [1, V].
        progress : called as ``progress(what, fraction)``.

        Returns
        -------
        [T, V] or [batch, T, V]: bfloat16, or float32 where the recipe's projections give that. On a GPU the intermediates lack
        "scores", "scaled_scores" and "activated", which its kernels keep to themselves.

        Raises TypeError for ids that are no integers, ValueError for shapes, ids out of range, positions beyond the model's and a
        cache of another recipe, batch or length, MemoryError where what is asked for does not fit; all before the work starts.
        """
        numerics = named_recipes.get(recipe)
        ids, single = self._checked_ids(token_ids)
        start = 0
        if cache is not None:
            start = _checked_cache(cache, numerics, ids)
        self._check_length(start + ids.shape[1])
        if not is_cupy(token_ids):
            self._require_memory(ids, start, intermediates is not None, last_only)
        keep = None
        if intermediates is not None:
            target = intermediates

            def keep(name: str, value: np.ndarray) -> None:
                target[name] = value[0] if single else value

        if is_cupy(token_ids):
            if isinstance(cache, Cache):
                raise TypeError("the cache is on the host and token_ids on a GPU: make the cache with new_cache(..., gpu=True)")
            logits = self._gpu().decoder.run(ids, numerics, cache=cache, keep=keep, last_only=last_only)
            return logits[0] if single else logits
        if isinstance(cache, GpuCache):
            raise TypeError("the cache is on a GPU and token_ids on the host: make the cache with new_cache(...)")
        logits = self._decoder.run(ids, numerics, cache=cache, keep=keep, last_only=last_only, progress=progress)
        return logits[0] if single else logits

    def generate(
        self,
        token_ids: Any,
        n: int,
        *,
        recipe: str | Recipe = "torch",
        intermediates: list[dict[str, Any]] | None = None,
        on_tokens: Callable[[int, np.ndarray], None] | None = None,
        progress: Progress | None = None,
    ) -> Generation:
        """``n`` tokens decoded greedily with a K/V cache, as transformers' ``generate(do_sample=False)`` without an end token.

        Parameters
        ----------
        token_ids, recipe : as in ``forward``.
        n : how many tokens, >= 1.
        intermediates : a list to which one dictionary a step is added, as ``forward`` fills them; the first is the prompt's.
        on_tokens : called after each step as ``on_tokens(step, tokens [batch])``.
        progress : called as ``progress(what, fraction)`` over all steps.

        Of equal logits the first token is taken, as ``torch.argmax`` does. On a GPU the steps are one replayed CUDA graph, unless
        intermediates are asked for or the recipe leaves queries or keys in float32. Errors as ``forward``.
        """
        numerics = named_recipes.get(recipe)
        ids, single = self._checked_ids(token_ids)
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
            raise ValueError(f"n is {n!r}; needed is an integer >= 1")
        self._check_length(ids.shape[1] + int(n) - 1)
        if is_cupy(token_ids):
            found_tokens, found_logits = self._gpu().generate(ids, int(n), numerics, intermediates, on_tokens)
            both = (found_tokens, found_logits)
            return Generation(*(value[0] for value in both)) if single else Generation(*both)
        cache = self.new_cache(ids.shape[1] + int(n) - 1, recipe=numerics, batch=len(ids))
        tokens, logits = [], []
        for step in range(int(n)):
            found: dict[str, Any] | None = None if intermediates is None else {}

            def share(what: str, done: float, step: int = step) -> None:
                if progress is not None:
                    progress(f"token {step + 1} of {n}, {what}", (step + done) / n)

            logits.append(
                self.forward(ids, recipe=numerics, intermediates=found, cache=cache, last_only=True, progress=share)[:, -1]
            )
            chosen = greedy(logits[-1])
            tokens.append(chosen)
            if intermediates is not None and found is not None:
                intermediates.append({name: value[0] for name, value in found.items()} if single else found)
            if on_tokens is not None:
                on_tokens(step, chosen)
            ids = chosen[:, None]
        both = np.stack(tokens, axis=1), np.stack(logits, axis=1)
        return Generation(*(value[0] for value in both)) if single else Generation(*both)

    def new_cache(
        self, capacity: int, *, recipe: str | Recipe = "torch", batch: int = 1, gpu: bool = False
    ) -> Cache | GpuCache:
        """An empty cache for so many positions of ``batch`` sequences under one recipe, for ``forward`` with NumPy or CuPy ids."""
        numerics = named_recipes.get(recipe)
        if gpu:
            return self._gpu().decoder.new_cache(numerics, batch, capacity)
        return Cache(numerics.name, batch, capacity)

    def _gpu(self) -> GpuModel:
        """The model on CuPy's current device, where it is copied once."""
        if self._on_gpu is None or not self._on_gpu.is_here():
            self._on_gpu = GpuModel(self.weights)
        return self._on_gpu

    def intermediate_names(self) -> list[str]:
        """The names of all intermediates in the order of the computation."""
        return intermediate_names(len(self.weights.layers))

    def _checked_ids(self, token_ids: Any) -> tuple[np.ndarray, bool]:
        """[batch, T] int64 on the host, and whether one sequence without a batch was given."""
        ids = np.asarray(token_ids.get() if is_cupy(token_ids) else token_ids)
        if ids.dtype.kind not in "iu":
            raise TypeError(f"token_ids have dtype {ids.dtype}; needed are integers")
        if ids.ndim not in (1, 2) or ids.size == 0:
            raise ValueError(f"token_ids have shape {ids.shape}; needed is [T] or [batch, T] with at least one token")
        vocabulary = len(self.weights.embedding)
        outside = ids[(ids < 0) | (ids >= vocabulary)]
        if outside.size:
            raise ValueError(f"token_ids hold {outside.flat[0]}; needed are ids in 0..{vocabulary - 1}, the model's vocabulary")
        return np.atleast_2d(ids).astype(np.int64), ids.ndim == 1

    def _check_length(self, length: int) -> None:
        most = self.config.max_position_embeddings
        if most is not None and length > most:
            raise ValueError(f"{length} positions are asked for; {self.config.name or 'the model'} has {most}")

    def _require_memory(self, ids: np.ndarray, start: int, keep: bool, last_only: bool) -> None:
        """MemoryError where activations, logits and cache would not fit into the memory that is free."""
        config, (batch, tokens) = self.config, ids.shape
        keys, mlp = start + tokens, config.intermediate_size or 0
        values = 4 * config.hidden_size + 5 * mlp + 6 * config.num_attention_heads * config.head_dim
        scores = config.num_attention_heads * keys
        layers = len(self.weights.layers)
        needed = 8 * batch * tokens * (values + 4 * scores // config.num_key_value_heads)
        needed += 6 * batch * (1 if last_only else tokens) * len(self.weights.head)
        needed += 4 * layers * batch * tokens * config.num_key_value_heads * config.head_dim
        if keep:
            needed += 4 * layers * batch * tokens * (values + 4 * scores)
        free = available_memory()
        if free is not None and needed > free:
            raise MemoryError(
                f"about {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free; give fewer tokens"
                + (", or ask for no intermediates" if keep else "")
            )


def open_model(path: str | os.PathLike[str]) -> Qwen3:
    """A Hugging Face folder (config.json, safetensors) of a dense Qwen3; its weights stay mapped.

    Raises CheckpointError (a ValueError) for whatever is wrong with the files, one line that names the file, the tensor, the
    remedy.
    """
    return Qwen3(read_weights(path))


def available_memory() -> int | None:
    """Bytes that can be had without swapping, or None where the system does not say (it does on Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _checked_cache(cache: Cache | GpuCache, recipe: Recipe, ids: np.ndarray) -> int:
    """The positions that a cache holds, after a check that it can take these tokens."""
    if not isinstance(cache, (Cache, GpuCache)):
        raise TypeError(f"cache is a {type(cache).__name__}; needed is what new_cache returns")
    if cache.recipe != recipe.name:
        raise ValueError(f"the cache was filled under recipe {cache.recipe!r}, not {recipe.name!r}: make a new one")
    if cache.batch != len(ids):
        raise ValueError(f"the cache is for a batch of {cache.batch}, token_ids have {len(ids)}: make a new one")
    if cache.length + ids.shape[1] > cache.capacity:
        raise ValueError(
            f"the cache has room for {cache.capacity} positions, {cache.length} are taken and {ids.shape[1]} more are given: "
            "make a larger one"
        )
    return cache.length
