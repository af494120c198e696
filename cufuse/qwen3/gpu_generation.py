"""The cache and the greedy loop of a model on a GPU. Importing this imports no CuPy."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from cufuse.qwen3.weights import Weights
from cufuse.recipe import Recipe


def is_cupy(array: Any) -> bool:
    """Whether this is a CuPy array; CuPy is looked up, not imported."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


@dataclass
class GpuCache:
    """Keys and values on the device, bfloat16 [layers, batch * capacity, Hkv, D] each: row b * capacity + p is position p of b."""

    recipe: str
    batch: int
    capacity: int
    keys: Any
    values: Any
    length: int = 0

    def layer(self, index: int) -> tuple[Any, Any]:
        """Both, [batch, capacity, Hkv, D]."""
        shape = (self.batch, self.capacity, *self.keys.shape[2:])
        return self.keys[index].reshape(shape), self.values[index].reshape(shape)


class GpuModel:
    """A model's weights on CuPy's current device."""

    def __init__(self, weights: Weights) -> None:
        from cufuse.qwen3.gpu import GpuDecoder

        self.decoder = GpuDecoder(weights)

    def is_here(self) -> bool:
        """Whether that device is still the current one."""
        from cufuse import launch

        return self.decoder.device == launch.current_device()

    def generate(
        self,
        ids: np.ndarray,
        n: int,
        recipe: Recipe,
        intermediates: list[dict[str, Any]] | None,
        on_tokens: Callable[[int, np.ndarray], None] | None,
    ) -> tuple[Any, Any]:
        """Tokens [batch, n] and logits [batch, n, V], CuPy arrays, decoded from checked ids [batch, T]; see ``Qwen3.generate``."""
        from cufuse._gpu_decoder import codes
        from cufuse.qwen3.gpu_greedy import replayable

        cupy = self.decoder.cupy
        cache = self.decoder.new_cache(recipe, len(ids), ids.shape[1] + n - 1)
        found: dict[str, Any] | None = None if intermediates is None else {}
        logits = self.decoder.run(ids, recipe, cache=cache, keep=_keeper(found), last_only=True)[:, -1]
        every = cupy.empty((len(ids), n, logits.shape[-1]), logits.dtype)
        tokens = cupy.empty((len(ids), n), np.int64)

        def take(step: int, logits: Any, chosen: Any) -> None:
            codes(every)[:, step], tokens[:, step] = codes(logits), chosen
            if intermediates is not None and found is not None:
                intermediates.append(dict(found))
            if on_tokens is not None:
                on_tokens(step, chosen.get())

        take(0, logits, self._greedy(logits))
        if n > 1 and intermediates is None and replayable(self.decoder, recipe, len(ids)):
            self._replayed(recipe, cache, every, tokens, on_tokens)
            return tokens, every
        for step in range(1, n):
            previous = cupy.ascontiguousarray(tokens[:, step - 1 : step])
            logits = self.decoder.run(previous, recipe, cache=cache, keep=_keeper(found), last_only=True)[:, -1]
            take(step, logits, self._greedy(logits))
        return tokens, every

    def _replayed(
        self, recipe: Recipe, cache: GpuCache, every: Any, tokens: Any, on_tokens: Callable[[int, np.ndarray], None] | None
    ) -> None:
        """All steps but the first by a CUDA graph; logits are copied behind each."""
        from cufuse._gpu_decoder import codes
        from cufuse.qwen3.gpu_greedy import GreedyGraph

        graph = GreedyGraph(self.decoder, recipe, cache, tokens.shape[1])
        graph.start(tokens[:, 0])
        try:
            for step in range(1, tokens.shape[1]):
                graph.step()
                with graph.stream:
                    codes(every)[:, step] = codes(graph.logits)
                if on_tokens is not None:
                    graph.stream.synchronize()
                    on_tokens(step, graph.tokens[:, step].get())
        finally:
            # however it ends: the memory of the steps goes back to the pool as another stream's, which does not wait for this one
            graph.stream.synchronize()
        tokens[...] = graph.tokens

    def _greedy(self, logits: Any) -> Any:
        from cufuse import _gpu_decoder

        cupy = self.decoder.cupy
        dense = cupy.ascontiguousarray(_gpu_decoder.codes(logits)).view(logits.dtype)
        return _gpu_decoder.argmax(dense, cupy.empty(len(dense), np.int64))


def _keeper(found: dict[str, Any] | None) -> Any:
    return None if found is None else found.__setitem__
