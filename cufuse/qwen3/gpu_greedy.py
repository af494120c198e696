"""Greedy decoding on a GPU as a replayed CUDA graph.

While tokens are decoded the host neither waits nor computes: ids, positions and cache slots live on the device, and one captured
step is replayed. From compute capability 9.0 on its kernels are a chain of programmatic dependents: each may begin before the one
in front of it has ended, fetches what no kernel of the step writes (weights, the cache's earlier positions), then waits. As every
kernel waits, one that has ended says that all in front of it have. The first one of a step is an ordinary launch.
"""

import contextlib
import types
from typing import Any, cast

import numpy as np

from cufuse import _gpu_decoder, _gpu_heads, _gpu_linear, _gpu_norm, _gpu_norm_linear, _gpu_quantised, launch, qkv
from cufuse._gpu_heads import Unsuited
from cufuse.bf16 import bfloat16
from cufuse.qkv import rms_norm_qkv
from cufuse.quantised.weight import QuantisedWeight
from cufuse.qwen3.gpu import GpuDecoder, norm_dtype, product_dtype, slices
from cufuse.qwen3.gpu_generation import GpuCache
from cufuse.recipe import Recipe


def replayable(decoder: GpuDecoder, recipe: Recipe, batch: int) -> bool:
    """Whether q, k and v leave the attention's front as bfloat16 and go straight into the cache: with quantised weights only where
    these are taken as they are and one launch serves the heads of q and k."""
    if any(qkv.output_dtype(recipe, name, True, True) != bfloat16 for name in "qkv"):
        return False
    if not decoder.quantised:
        return True
    config = decoder.config
    try:
        ends = _gpu_heads.ends(recipe, True, True)
        _gpu_heads._defines(ends, batch, config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    except Unsuited:
        return False
    return {recipe.gemm.quantised, (recipe.dense or recipe.gemm).quantised} == {"block-scaled"}


class GreedyGraph:
    """Decoding of one token for each sequence as a CUDA graph that feeds itself: argmax, cache, next position.

    After ``start`` each ``step`` is one on ``stream``, the first launched kernel by kernel, the others replayed; ``tokens`` [batch,
    steps] and ``logits`` [batch, V] are on the device. Nothing else may use the cache meanwhile.
    """

    def __init__(self, decoder: GpuDecoder, recipe: Recipe, cache: GpuCache, steps: int) -> None:
        self.decoder, self.recipe, self.cache = decoder, recipe, cache
        self.cupy = cupy = decoder.cupy
        batch, config = cache.batch, decoder.config
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.chained = launch.capability(decoder.device) >= 90
        self.behind, self.dense = recipe.mlp_norm or recipe.norm, recipe.dense or recipe.gemm
        self.tables = decoder.tables(0, cache.capacity, recipe)
        self.ids, self.steps, self.positions, self.slots = (cupy.zeros(batch, np.int64) for _ in range(4))
        self.before = cupy.zeros(1, np.int32)
        self.tokens = cupy.zeros((batch, steps), np.int64)
        hidden, size, heads = config.hidden_size, config.head_dim, config.num_attention_heads
        wide = np.dtype(np.float32)
        stream_dtype = wide if recipe.residual_sum == "float32" else bfloat16
        product, attention = product_dtype(self.dense), recipe.attention

        def empty(*shape: int, dtype: Any = bfloat16) -> Any:
            return cupy.empty(shape, dtype)

        self.embedded = empty(batch, hidden)
        self.residuals = [empty(batch, hidden, dtype=stream_dtype) for _ in range(2)]
        self.normalised = empty(batch, hidden, dtype=norm_dtype(self.behind))
        self.cos, self.sin = (empty(batch, size, dtype=table.dtype) for table in self.tables)
        self.q = empty(batch, heads, size)
        row = -(-cache.capacity // 8) * 8
        codes_of = (_gpu_decoder.order_codes(attention, batch * heads, 1, max(keys, 1)) for keys in range(cache.capacity + 1))
        self.orders = cupy.asarray(np.array(list(codes_of), np.int32))
        self.scores = empty(batch * heads, row, dtype=np.uint16 if attention.round_scaled else np.float32)
        self.weights: Any = None
        if not _gpu_decoder.fuses_softmax(1, row):
            self.weights = self.scores if attention.round_scaled else empty(batch * heads, row, dtype=np.uint16)
        self.attended = empty(batch, 1, heads, size, dtype=bfloat16 if attention.round_output else wide)
        self.output = empty(batch, hidden, dtype=product)
        mlp = config.intermediate_size or 0
        # rows of gate and up: of one product, one behind the other in a row; of two, apart
        self.gate_up = empty(batch, 2 * mlp, dtype=product)
        self.gated = empty(batch, mlp, dtype=bfloat16 if recipe.mlp.round_gated else wide)
        self.down = empty(batch, hidden, dtype=product)
        self.logits = empty(batch, len(decoder.head), dtype=product)
        if not replayable(decoder, recipe, cache.batch):
            raise ValueError(f"recipe {recipe.name!r} needs more than a graph can do with this model: decode step by step")
        self.qkv_slices = self._slices_of_all(("q_proj", "k_proj", "v_proj"), recipe.gemm)
        self.gate_up_slices = self._slices_of_all(("gate_proj", "up_proj"), self.dense)
        self.norms: dict[tuple[int, int], _gpu_norm.Plan] = {}
        self.together: dict[int, _gpu_norm_linear.Plan | None] = {}
        self.graph: Any = None

    def _slices_of_all(self, names: tuple[str, ...], numerics: Any) -> int | None:
        """Into how many slices cuBLAS cuts K in each of these products, or in the packed one that the recipe has in their place;
        None where they differ, so that one launch cannot take them all."""
        if self.decoder.quantised:
            return 1  # such weights are cut as the recipe says, whatever N is
        weights = [getattr(self.decoder.layers[0], name) for name in names]
        rows = [len(weight) for weight in weights]
        if self.recipe.packed_projections:
            rows = [sum(rows)]
        found = {slices(self.cache.batch, n, weights[0].shape[1], numerics) for n in rows}
        return found.pop() if len(found) == 1 else None

    def start(self, tokens: Any) -> None:
        """The first decoded tokens [batch], at the cache's length. Waits until all that the steps read is on the device."""
        cupy, length = self.cupy, self.cache.length
        self.ids[...] = tokens
        self.tokens[:, 0] = tokens
        self.steps[...] = 1
        self.positions[...] = length
        self.slots[...] = cupy.arange(self.cache.batch) * self.cache.capacity + length
        self.before[...] = length
        cupy.cuda.get_current_stream().synchronize()

    def step(self) -> None:
        """One token more for every sequence. The first call launches kernel by kernel, which compiles and loads them, and then
        captures the same launches; further ones replay."""
        with launch.on_device(self.decoder.device), self.stream:
            if self.cache.length + 1 > self.cache.capacity:
                raise ValueError(f"the cache has room for {self.cache.capacity} positions and is full: make a larger one")
            if self.graph is None:
                self._launch()
                self.graph = self._captured()
            else:
                self.graph.launch(self.stream)
        self.cache.length += 1

    def _captured(self) -> Any:
        self.stream.begin_capture()
        try:
            self._launch()
        except BaseException:
            with contextlib.suppress(Exception):  # what went wrong is said already; the stream shall not stay in its capture
                self.stream.end_capture()
            raise
        return self.stream.end_capture()

    def _launch(self) -> None:
        decoder = self.decoder
        _gpu_decoder.gather(decoder.embedding, self.ids, self.embedded)
        for table, out in zip(self.tables, (self.cos, self.sin), strict=True):
            # rows of 16-bit elements: a float32 counts twice
            _gpu_decoder.gather(table.view(np.uint16), self.positions, out.view(np.uint16), self.chained)
        x, residual = self.embedded, None
        spare = 0
        for index, weights in enumerate(decoder.layers):
            self._front(index, x, residual, self.residuals[spare])
            residual = x if residual is None else self.residuals[spare]
            spare = 1 - spare if residual is not x else spare
            self._attend(index)
            self._project(self.attended.reshape(len(self.q), -1), weights.o_proj, self.output)
            self._mlp(weights, residual, self.residuals[spare])
            residual = self.residuals[spare]
            spare = 1 - spare
            x = self.down
        self._add_norm(x, residual, decoder.final_norm, self.residuals[spare])
        self._project(self.normalised, decoder.head, self.logits)
        state = (self.tokens, self.steps, self.positions, self.slots, self.before)
        _gpu_decoder.argmax(self.logits, self.ids, state, self.chained)

    def _front(self, index: int, x: Any, residual: Any, total: Any) -> None:
        """Norm, projections, head norms and rotation; keys and values into the cache, the new residual into ``total``."""
        weights, config = self.decoder.layers[index], self.decoder.config
        outs: tuple[Any, ...] = (self.q, self.cache.keys[index], self.cache.values[index])
        together = self.qkv_slices is not None
        rms_norm_qkv(
            x, weights.input_norm, weights.qkv_proj if together else (weights.q_proj, weights.k_proj, weights.v_proj),
            weights.q_norm, weights.k_norm, eps=config.rms_norm_eps, heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads, cos=self.cos, sin=self.sin, residual=residual, recipe=self.recipe,
            k_slices=None if self.decoder.quantised else self.qkv_slices, cache_slots=self.slots, static_weights=True,
            out=outs if residual is None else (*outs, total),
        )  # fmt: skip

    def _attend(self, index: int) -> None:
        q = self.q.reshape(len(self.q), 1, *self.q.shape[1:])
        k, v = self.cache.layer(index)
        _gpu_decoder.run_decode(
            q, k, v, self.scores, self.weights, self.attended, 0, q.shape[-1] ** -0.5, self.recipe.attention, self.decoder.device,
            (0, 0), self.before.data.ptr, self.orders.data.ptr, self.chained,
        )  # fmt: skip

    def _mlp(self, weights: Any, residual: Any, total: Any) -> None:
        """The attention's output goes into the residual stream, ``total``; of that the MLP."""
        batch, columns = self.gated.shape
        size = self.gate_up.itemsize
        together = self._norm_and_products(residual)
        if together is not None:
            names = (self.output, residual, weights.mlp_norm, self.normalised, total)
            addresses = [array.data.ptr for array in names]
            last = (weights.gate_up_proj.data.ptr, self.gate_up.data.ptr)
            launch.one_by_one(together.launches((*addresses, launch.counters(self.decoder.device), *last)))
        else:
            self._add_norm(self.output, residual, weights.mlp_norm, total)
        row, apart = (columns, batch * columns) if self.gate_up_slices is None else (2 * columns, columns)
        if self.gate_up_slices is None:
            for weight, out in zip((weights.gate_proj, weights.up_proj), self.gate_up.reshape(2, batch, columns), strict=True):
                self._project(self.normalised, weight, out)
        elif together is None:
            self._project(self.normalised, weights.gate_up_proj, self.gate_up, self.gate_up_slices)
        gate = self.gate_up.data.ptr
        _gpu_decoder.run_swiglu(
            gate, gate + apart * size, self.gated, columns, row, size == 4, self.recipe.mlp, self.decoder.device, self.chained
        )
        self._project(self.gated, weights.down_proj, self.down)

    def _norm_and_products(self, residual: Any) -> _gpu_norm_linear.Plan | None:
        """Norm of the residual sum and product with gate and up in one launch; None where the kernel cannot do it."""
        if residual.itemsize not in self.together:
            self.together[residual.itemsize] = None
            weights, device, hidden = self.decoder.layers[0], self.decoder.device, residual.shape[1]
            bfloat16_in = self.output.itemsize == 2 and not self.decoder.quantised
            if self.chained and self.gate_up_slices is not None and bfloat16_in:
                alignment = (0, weights.gate_up_proj.data.ptr & 15, 0)
                problem = _gpu_linear.describe(
                    self.normalised, weights.gate_up_proj, self.gate_up, alignment, self.gate_up_slices, device, weights_ready=True
                )
                stated = cast(Recipe, types.SimpleNamespace(norm=self.behind))
                wide = (weights.mlp_norm.itemsize == 4, residual.itemsize == 4)
                rows = _gpu_norm_linear.Rows(stated, len(residual), hidden, self.recipe.residual_sum, *wide, (hidden,) * 3)
                with contextlib.suppress(Unsuited):
                    eps = self.decoder.config.rms_norm_eps
                    self.together[residual.itemsize] = _gpu_norm_linear.Plan(rows, problem, eps, device, weights_ready=True)
        return self.together[residual.itemsize]

    def _add_norm(self, x: Any, residual: Any, weight: Any, total: Any) -> None:
        outs = {"out[0]": self.normalised, "out[1]": total}
        inputs = {"x": x, "residual": residual, "weight": weight}
        pointers = [array.data.ptr for array in (*outs.values(), *inputs.values())]
        alignment = 0
        for pointer in pointers:
            alignment |= pointer & 15
        plan = self.norms.get((residual.itemsize, alignment))
        if plan is None:
            eps, device = self.decoder.config.rms_norm_eps, self.decoder.device
            plan = _gpu_norm.Plan(
                outs, inputs, alignment, eps, self.behind, self.recipe.residual_sum, device, self.chained, self.chained
            )
            self.norms[residual.itemsize, alignment] = plan
        plan.prepared(plan.arguments(pointers))

    def _project(self, x: Any, weight: Any, out: Any, k_slices: int | None = None) -> None:
        """x weight^T into out, K cut as given or as cuBLAS does (or as the recipe cuts quantised weights')."""
        if isinstance(weight, QuantisedWeight):
            _gpu_quantised.multiply(x, weight, out, self.dense.quantised_slices, programmatic=self.chained)
            return
        if k_slices is None:
            k_slices = slices(len(x), len(weight), weight.shape[1], self.dense)
        _gpu_linear.linear(x, weight, out, k_slices, weights_ready=self.chained)
