"""A random Qwen3 in transformers, its attention's front replaced by cufuse, and greedy generation: python3 -m tests.qwen3_model

The model has four layers and K-norm weights as extreme as Qwen3-0.6B's (up to 96.5, 44.5, 44.0, 41.75). With recipe ``torch`` every
logit keeps its bits and every token is the same; with ``late-rounding`` the text leaves the road, and where it does is printed.
"""

import argparse
import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import cufuse
from cufuse.named_recipes import get
from cufuse.recipe import Recipe

K_NORM_MAXIMA = (96.5, 44.5, 44.0, 41.75)
VOCABULARY = 4096

Front = Callable[[Any, Any, Any, Any, Any], tuple[Any, Any, Any]]
"""(attention, its norm, hidden states [B, T, K], (cos, sin), position ids) -> q, k, v, [B, H, T, D]."""


def build(device: str = "cuda", seed: int = 0) -> Any:
    """Qwen3ForCausalLM, eager attention, bfloat16: hidden 512, eight heads and four of keys and values of 128, MLP 1024."""
    import torch
    from transformers.models.qwen3 import modeling_qwen3

    config = modeling_qwen3.Qwen3Config(
        hidden_size=512,
        num_hidden_layers=len(K_NORM_MAXIMA),
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=1024,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    config._attn_implementation = "eager"
    model = modeling_qwen3.Qwen3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.copy_(_values(name, parameter.shape, generator))
    model.to(torch.bfloat16)
    # the conversion above rounds the rotation's frequencies too, which from_pretrained(dtype=...) does not
    model.model.rotary_emb = modeling_qwen3.Qwen3RotaryEmbedding(config=config)
    return model.to(device)


def _values(name: str, shape: Any, generator: Any) -> Any:
    """Weights of which activations keep their size; a few entries of the norms are large."""
    import torch

    bell = torch.randn(shape, generator=generator)
    if not name.endswith("norm.weight"):
        return bell if "embed_tokens" in name else bell * shape[-1] ** -0.5
    weight = (1 + 0.25 * bell).abs()
    if "k_norm" in name:
        largest = K_NORM_MAXIMA[int(name.split(".")[2])]
        weight[5::16] = torch.linspace(largest, 2.0, len(weight[5::16]))
    elif "q_norm" in name:
        weight[5::16] *= 2
    elif "input_layernorm" in name:
        weight[3::64] = 8.0
    return weight


def cufuse_front(model: Any, recipe: str | Recipe = "torch", **options: Any) -> Front:
    """The front through ``cufuse.rms_norm_qkv``, arrays exchanged by DLPack without a copy. q, k and v are projected apart, as in
    transformers: cuBLAS cuts K otherwise than for a packed weight."""
    import cupy
    import torch

    numerics = get(recipe)
    rounded = numerics.rope.tables == "bfloat16"
    weights = [_arrays(cupy.from_dlpack, layer) for layer in model.model.layers]

    def front(attention: Any, norm: Any, hidden: Any, rotation: Any, positions: Any) -> tuple[Any, Any, Any]:
        # float32 tables are made anew: transformers hands out bfloat16
        pair = rotation if rounded else model.model.rotary_emb(hidden.float(), positions)
        cos, sin = (cupy.from_dlpack(table.expand(*hidden.shape[:2], -1).contiguous()) for table in pair)
        x = cupy.from_dlpack(hidden.contiguous())
        given = weights[attention.layer_idx]
        found = cufuse.rms_norm_qkv(x, *given, eps=norm.variance_epsilon, cos=cos, sin=sin, recipe=recipe, **options)
        return tuple(_by_head(torch.from_dlpack(one)) for one in found)  # type: ignore[return-value]

    return front


def _arrays(convert: Callable[[Any], Any], layer: Any) -> tuple[Any, ...]:
    """norm weight, (Wq, Wk, Wv), q and k norm weights of a decoder layer."""
    attention = layer.self_attn
    projections = tuple(convert(one.weight.detach()) for one in (attention.q_proj, attention.k_proj, attention.v_proj))
    norms = [convert(one.weight.detach()) for one in (layer.input_layernorm, attention.q_norm, attention.k_norm)]
    return norms[0], projections, norms[1], norms[2]


def _by_head(tensor: Any) -> Any:
    """[B, T, H, D] as [B, H, T, D] with the strides that transformers' own q has, which decide about cuBLAS's kernel."""
    batch, count, heads, size = tensor.shape
    return tensor.transpose(1, 2) if count > 1 else tensor.reshape(batch, heads, 1, size)


@contextlib.contextmanager
def replaced(model: Any, front: Front) -> Iterator[Any]:
    """The model with ``front`` in the place of input_layernorm, q_proj, k_proj, v_proj, q_norm, k_norm and the rotation. Everything
    else stays transformers' own: cache, attention, output projection, MLP."""
    import torch
    from transformers.models.qwen3.modeling_qwen3 import eager_attention_forward

    layers = list(model.model.layers)
    norms = [layer.input_layernorm for layer in layers]

    def forward_of(attention: Any, norm: Any) -> Callable[..., Any]:
        def forward(
            hidden_states: Any, position_embeddings: Any, attention_mask: Any, past_key_values: Any = None, **options: Any
        ) -> tuple[Any, Any]:
            q, k, v = front(attention, norm, hidden_states, position_embeddings, options["position_ids"])
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, attention.layer_idx)
            found, weights = eager_attention_forward(
                attention, q, k, v, attention_mask, scaling=attention.scaling, dropout=0.0, **options
            )
            found = found.reshape(*hidden_states.shape[:-1], -1).contiguous()
            return attention.o_proj(found), weights

        return forward

    try:
        for layer, norm in zip(layers, norms, strict=True):
            layer.self_attn.forward = forward_of(layer.self_attn, norm)
            layer.input_layernorm = torch.nn.Identity()
        yield model
    finally:
        for layer, norm in zip(layers, norms, strict=True):
            layer.self_attn.__dict__.pop("forward", None)
            layer.input_layernorm = norm


@dataclass
class Generated:
    """Greedy text of a batch: tokens [B, count], and the logits that each step gave, the prompt's [B, T, V] first."""

    tokens: Any
    logits: list[Any]


def prompts(batch: int, length: int, seed: int = 1, device: str = "cuda") -> Any:
    """[batch, length] random token ids."""
    import torch

    return torch.from_numpy(np.random.default_rng(seed).integers(0, VOCABULARY, (batch, length))).to(device)


def generate(model: Any, prompt: Any, count: int) -> Generated:
    """``count`` greedy tokens with a DynamicCache: one prefill, then one token of every row at a time."""
    import torch
    from transformers import DynamicCache

    cache, given = DynamicCache(config=model.config), prompt
    tokens, logits = [], []
    with torch.no_grad():
        for _ in range(count):
            logits.append(model(input_ids=given, past_key_values=cache, use_cache=True).logits)
            given = logits[-1][:, -1:].argmax(-1)
            tokens.append(given)
    return Generated(torch.cat(tokens, 1), logits)


def first_difference(one: Any, other: Any) -> list[int | None]:
    """For each row of two token arrays [B, count] the place of the first token that differs; None where none does."""
    differ = (one != other).cpu().numpy()
    return [int(row.argmax()) if row.any() else None for row in differ]


def differing_logits(one: Generated, other: Generated) -> tuple[int, int]:
    """Logits whose bits differ, and all of them."""
    import torch

    pairs = list(zip(one.logits, other.logits, strict=True))
    wrong = sum(int((a.view(torch.int16) != b.view(torch.int16)).sum()) for a, b in pairs)
    return wrong, sum(a.numel() for a, _ in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256, help="greedy tokens of each row (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=37, help="tokens of each prompt (default: %(default)s)")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--recipes", nargs="*", default=["torch", "late-rounding"])
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    model = build()
    for batch in given.batch:
        prompt = prompts(batch, given.prompt)
        expected = generate(model, prompt, given.tokens)
        for recipe in given.recipes:
            with replaced(model, cufuse_front(model, recipe)):
                found = generate(model, prompt, given.tokens)
            print(summary(recipe, expected, found), flush=True)


def summary(recipe: str, expected: Generated, found: Generated) -> str:
    """One line about a recipe's text beside transformers' own."""
    batch, count = expected.tokens.shape
    same = int((expected.tokens == found.tokens).sum())
    places = first_difference(expected.tokens, found.tokens)
    wrong, total = differing_logits(expected, found)
    left = [place + 1 for place in places if place is not None]
    road = f"first other token of each row: {', '.join(map(str, left))}" if left else "no other token"
    text = f"batch {batch}, {recipe}: {same} of {batch * count} tokens are transformers' ({road})"
    return f"{text}; {wrong:,} of {total:,} logits differ"


if __name__ == "__main__":
    main()
