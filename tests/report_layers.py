"""Layers and inputs for the tests of the report, and their stages computed without it."""

import warnings
from functools import cache

import ml_dtypes
import numpy as np

import cufuse
from cufuse import qkv
from cufuse.checkpoint import AttentionLayer, ModelConfig
from cufuse.report import Report, analyse
from cufuse.report_inputs import random_token_ids
from cufuse.synthetic import synthetic_embedding, synthetic_layer
from tests.witnesses import random_bf16

BF16 = ml_dtypes.bfloat16


@cache
def qwen3() -> tuple[AttentionLayer, np.ndarray]:
    ids = random_token_ids(16, 151936, 0)
    return synthetic_layer("qwen3-0.6b", 0, 0), synthetic_embedding("qwen3-0.6b", ids, 0)


@cache
def full_report() -> Report:
    """Layer 0 of a synthetic 0.6B, all recipes, 16 tokens: what ``cufuse report`` shows."""
    return analyse(*qwen3())


def small_layer(head_norms: bool = True) -> AttentionLayer:
    """1 query and 2 key/value heads of 256 on 512 columns; no shape of Qwen3's, so nothing is recorded of cuBLAS.

    The keys differ in size, so that the sums of their norms round; shorter heads are added in the same order in any batch.
    """
    config = ModelConfig("qwen3" if head_norms else "llama", 512, 1, 2, 256, 1, 1e-5, 10000.0, name="small")
    return AttentionLayer(
        index=3,
        input_norm=random_bf16(1, 512),
        q_proj=random_bf16(2, 256, 512, scale=0.1),
        k_proj=(random_bf16(3, 512, 512, scale=0.01).astype(np.float32) * 2.0 ** (np.arange(512) % 9)[:, None]).astype(BF16),
        v_proj=random_bf16(4, 512, 512, scale=0.1),
        q_norm=random_bf16(5, 256) if head_norms else None,
        k_norm=random_bf16(6, 256, scale=40) if head_norms else None,
        config=config,
        synthetic=False,
        source="test",
    )


def inputs_of(layer: AttentionLayer, x: np.ndarray, recipe: str, first_position: int = 0) -> dict:
    """Arguments of rms_norm_qkv for the layer."""
    config = layer.config
    tables = cufuse.recipes[recipe].rope.tables
    positions = np.arange(first_position, first_position + len(x))
    dtype = np.float32 if tables == "float32" else BF16
    cos, sin = cufuse.rope_tables(positions, config.head_dim, base=config.rope_theta, dtype=dtype)
    weights = {"norm_weight": layer.input_norm, "q_norm_weight": layer.q_norm, "k_norm_weight": layer.k_norm}
    return {"x": x, "residual": None, "cos": cos, "sin": sin} | weights


def stages_of(
    layer: AttentionLayer, x: np.ndarray, recipe: str, packed: bool = False, **options: int
) -> dict[str, np.ndarray]:
    """Every stage of the block, from ``cufuse.qkv`` alone."""
    config = layer.config
    heads = qkv.Heads(config.num_attention_heads, config.num_key_value_heads, config.head_dim)
    weights = (layer.qkv_proj,) if packed else (layer.q_proj, layer.k_proj, layer.v_proj)
    given = inputs_of(layer, x, recipe, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cufuse.AssumedSlicesWarning)
        return qkv.stages(given, weights, heads, config.rms_norm_eps, cufuse.recipes[recipe])


def as_bf16(x: np.ndarray) -> np.ndarray:
    return cufuse.round_to_bf16(x) if x.dtype == np.float32 else x
