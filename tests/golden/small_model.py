"""A small random Qwen3 whose weights and prompts come from seeds: read by the recording script and by the tests.

Hidden size 256, 4 layers, 4 query heads and 2 key/value heads of 128, MLP 768, vocabulary 512; the largest K-norm weights are those
documented for Qwen3-0.6B. Nothing of it is stored: ``weights`` gives the same bits on every machine (see ``inputs``).
"""

from typing import Any

import ml_dtypes
import numpy as np

from . import inputs

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 768,
    "max_position_embeddings": 40960,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": False,
    "vocab_size": 512,
}
LAYERS, VOCABULARY = 4, 512
K_NORM_MAXIMA = (96.5, 44.5, 44.0, 41.75)

PROMPTS = (1, 2, 7, 8, 13, 16, 48, 100, 129)
STORED_WHOLE = (2, 13)
"""Prompts of which every intermediate is stored as bits; of the others a digest a token, and the hidden states of HIDDEN_STORED."""
HIDDEN_STORED = (129,)

NEW_TOKENS = 64
BATCHES = (1, 4)
DECODE_PROMPT = 11
"""Tokens of each prompt from which NEW_TOKENS are decoded greedily."""
DECODE_STORED = {1: (1, 2, 20), 4: (1, 20)}
"""Decoding steps (step 0 reads the prompt) of which every intermediate is stored as bits, by batch."""

STAGES = (
    "hidden", "normalised", "q", "k", "v", "q_normed", "k_normed", "q_rotated", "k_rotated", "scores", "scaled_scores",
    "masked_scores", "weights", "attended", "attention_output", "attention_residual", "mlp_normalised", "gate", "up", "activated",
    "gated", "down", "mlp_residual",
)  # fmt: skip
"""The intermediates of a layer in their order, recorded as [tokens, values]; scores and weights as [tokens, heads * keys]."""
LAST_STAGES = ("final_normalised", "logits")


def names() -> list[str]:
    """Every intermediate of the model, in order: ``layers.0.hidden`` ... ``logits``."""
    return [f"layers.{layer}.{stage}" for layer in range(LAYERS) for stage in STAGES] + list(LAST_STAGES)


def weights() -> dict[str, np.ndarray]:
    """Every tensor of the checkpoint, bfloat16, by Hugging Face's name."""
    hidden, mlp, q_rows, kv_rows = 256, 768, 512, 256
    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, rows: int, columns: int, scale: float) -> None:
        tensors[name] = inputs.bell((rows, columns), inputs.seed_of("small", name), scale)

    def norm(name: str, size: int, largest: float) -> None:
        tensors[name] = inputs.norm_weight(size, inputs.seed_of("small", name), largest)

    matrix("model.embed_tokens.weight", VOCABULARY, hidden, 0.5)
    for layer in range(LAYERS):
        base = f"model.layers.{layer}."
        norm(base + "input_layernorm.weight", hidden, 4.0)
        matrix(base + "self_attn.q_proj.weight", q_rows, hidden, 0.06)
        matrix(base + "self_attn.k_proj.weight", kv_rows, hidden, 0.06)
        matrix(base + "self_attn.v_proj.weight", kv_rows, hidden, 0.06)
        norm(base + "self_attn.q_norm.weight", 128, 4.0)
        norm(base + "self_attn.k_norm.weight", 128, K_NORM_MAXIMA[layer])
        matrix(base + "self_attn.o_proj.weight", hidden, q_rows, 0.05)
        norm(base + "post_attention_layernorm.weight", hidden, 4.0)
        matrix(base + "mlp.gate_proj.weight", mlp, hidden, 0.06)
        matrix(base + "mlp.up_proj.weight", mlp, hidden, 0.06)
        matrix(base + "mlp.down_proj.weight", hidden, mlp, 0.05)
    norm("model.norm.weight", hidden, 4.0)
    matrix("lm_head.weight", VOCABULARY, hidden, 0.06)
    return tensors


def prompt(length: int) -> np.ndarray:
    """Token ids [length], int64."""
    return _tokens((length,), "prompt")


def decode_prompts(batch: int) -> np.ndarray:
    """Token ids [batch, DECODE_PROMPT], int64."""
    return _tokens((batch, DECODE_PROMPT), "decode")


def _tokens(shape: tuple[int, ...], name: str) -> np.ndarray:
    count = int(np.prod(shape))
    raw = np.random.PCG64(inputs.seed_of("small", name, *shape)).random_raw(count)
    return ((raw >> np.uint64(32)) % np.uint64(VOCABULARY)).astype(np.int64).reshape(shape)


def as_rows(value: np.ndarray, tokens: int) -> np.ndarray:
    """An intermediate as bfloat16 [tokens, values]."""
    assert value.dtype == ml_dtypes.bfloat16, value.dtype
    return np.ascontiguousarray(value).reshape(tokens, -1)
