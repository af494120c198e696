"""One layer with its input in the form that every recipe runs on, emulated or on the kernels."""

import dataclasses
from typing import Any

import numpy as np

from cufuse import gemm, oracle, qkv
from cufuse.bf16 import nearest
from cufuse.checkpoint import AttentionLayer
from cufuse.quantised.gguf_checkpoint import QuantisedLayer, bfloat16_norms
from cufuse.quantised.weight import QuantisedWeight, dequantise
from cufuse.recipe import Recipe
from cufuse.rope import rope_tables

_NORMS = {"norm_weight": "input_norm", "q_norm_weight": "q_norm", "k_norm_weight": "k_norm"}


def _norms(layer: AttentionLayer) -> dict[str, Any]:
    return {name: getattr(layer, field) for name, field in _NORMS.items()}


class LayerBlock:
    """The layer's inputs in the form of ``qkv.stages``, and a memory of its projections: recipes that agree up to the
    projection share it."""

    def __init__(
        self, layer: AttentionLayer, hidden_states: np.ndarray, separate: bool, first_position: int, device: str
    ) -> None:
        config = layer.config
        self.device = device
        self.compared = self.differing = 0
        self.layer = layer
        self.heads = qkv.Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
        self.eps = config.rms_norm_eps
        self.separate: tuple[Any, ...] = (layer.q_proj, layer.k_proj, layer.v_proj)
        self.weights: tuple[Any, ...] = self.separate if separate else (layer.qkv_proj,)
        self.notes: tuple[str, ...] = ()
        self.positions = np.arange(first_position, first_position + len(hidden_states))
        self.tables = {
            dtype: rope_tables(self.positions, config.head_dim, base=config.rope_theta, dtype=dtype)
            for dtype in ("bfloat16", "float32")
        }
        self.inputs: dict[str, Any] = {"x": hidden_states, "residual": None}
        self.norms = _norms(layer)
        if isinstance(layer, QuantisedLayer):
            self._prepare_quantised(layer)
        self.products: dict[tuple[Any, ...], np.ndarray] = {}

    def _prepare_quantised(self, layer: QuantisedLayer) -> None:
        narrow, rounded = bfloat16_norms(layer)
        self.narrow_norms = {name: narrow[field] for name, field in _NORMS.items()}
        kinds = [weight.format.name if isinstance(weight, QuantisedWeight) else str(weight.dtype) for weight in self.separate]
        stored = ", ".join(f"{name} {kind}" for name, kind in zip("qkv", kinds, strict=True))
        self.notes = (f"Projections as stored: {stored}; the truth is that of their decoded values.",)
        if rounded:
            self.notes += (f"{rounded} norm weights are no bfloat16: recipes that take bfloat16 get them rounded.",)

    def given(self, recipe: Recipe) -> dict[str, Any]:
        """x, norm weights of the type that the recipe takes, and its tables."""
        cos, sin = self.tables[recipe.rope.tables]
        norms = self.norms
        if isinstance(self.layer, QuantisedLayer) and recipe.norm.float32_weight != "accept":
            norms = self.narrow_norms
        elif isinstance(self.layer, QuantisedLayer) and recipe.head_norm.float32_weight != "accept":
            norms = self.narrow_norms | {"norm_weight": norms["norm_weight"]}
        return self.inputs | norms | {"cos": cos, "sin": sin}

    def run(self, recipe: Recipe) -> dict[str, np.ndarray]:
        given = self.given(recipe)
        numbered = {f"qkv_weight[{index}]": gemm.memory_of(weight) for index, weight in enumerate(self.weights)}
        qkv.check(given | numbered, self.weights, recipe, self.heads.heads, self.heads.kv_heads, self.heads.head_dim)
        found = qkv.stages(given, self.weights, self.heads, self.eps, recipe, projected=self._project)
        return found if self.device == "cpu" else self._on_gpu(given, recipe, found)

    def _on_gpu(self, given: dict[str, Any], recipe: Recipe, expected: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The kernels' stages, after every bit was compared with the emulation's."""
        from cufuse import gpu_stages

        found = gpu_stages.stages(given, self.weights, self.heads, self.eps, recipe)
        for stage, value in expected.items():
            unsigned = f"u{value.dtype.itemsize}"
            self.compared += value.size
            self.differing += int(np.count_nonzero(value.view(unsigned) != found[stage].view(unsigned)))
        return found

    def one_call(self, recipe: Recipe) -> tuple[np.ndarray, ...]:
        given = self.given(recipe)
        weights: Any = self.weights if len(self.weights) == 3 else self.weights[0]
        return qkv.rms_norm_qkv(
            given["x"],
            given["norm_weight"],
            weights,
            given["q_norm_weight"],
            given["k_norm_weight"],
            eps=self.eps,
            cos=given["cos"],
            sin=given["sin"],
            heads=self.heads.heads,
            head_dim=self.heads.head_dim,
            recipe=recipe,
        )

    def oracle(self, weight_offset: float) -> dict[str, np.ndarray]:
        cos, sin = oracle.rope_angles(self.positions, self.heads.head_dim, base=self.layer.config.rope_theta)
        return oracle.qkv_stages(
            self.inputs["x"],
            self.layer.input_norm,
            tuple(dequantise(one) if isinstance(one, QuantisedWeight) else one for one in self.separate),
            self.layer.q_norm,
            self.layer.k_norm,
            self.heads.head_dim,
            eps=self.eps,
            cos=cos,
            sin=sin,
            weight_offset=weight_offset,
        )

    def _project(self, x: np.ndarray, weight: Any, numerics: Any, k_slices: int) -> np.ndarray:
        unrounded = dataclasses.replace(numerics, output="float32")
        key = (x.tobytes(), x.dtype.str, id(weight), unrounded.core, unrounded.quantised, k_slices)
        if key not in self.products:
            self.products[key] = gemm.project(x, weight, unrounded, k_slices)
        product = self.products[key]
        return nearest(product) if numerics.output == "bfloat16" else product
