"""Record a small Qwen3 of transformers with every intermediate: python3 -m tests.golden.record_model --out tests/golden

Nothing of cufuse takes part. The weights come from seeds (small_model.py), are written as a checkpoint and read by
``from_pretrained`` (which keeps RoPE's frequencies in float32), attention is eager. Of every intermediate one digest a token is
kept, of some prompts and decoding steps all bits. ``--device cpu`` tries the script without a GPU; its file is no golden one.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy
import torch
import transformers
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from . import cases, inputs, small_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    metadata = versions(arguments.device)
    print(json.dumps(metadata))
    start = time.time()
    model = load(torch.device(arguments.device))
    tensors: dict[str, np.ndarray] = {}
    for length in small_model.PROMPTS:
        record_prompt(model, length, tensors)
        print(f"prompt of {length}: {time.time() - start:.1f} s", flush=True)
    for batch in small_model.BATCHES:
        record_decoding(model, batch, tensors)
        print(f"{small_model.NEW_TOKENS} tokens at batch {batch}: {time.time() - start:.1f} s", flush=True)
    stored = {key: np.ascontiguousarray(cases.as_bits(value)) for key, value in tensors.items()}
    file = arguments.out / "model.safetensors"
    safetensors.numpy.save_file(stored, file, metadata=metadata)
    print(f"{file}: {len(stored)} tensors, {file.stat().st_size} bytes, {time.time() - start:.1f} s", flush=True)


def versions(device: str) -> dict[str, str]:
    if device == "cpu":
        return {"device": "cpu", "torch": torch.__version__, "transformers": transformers.__version__}
    from .record import versions as gpu_versions

    return gpu_versions() | {"script": "tests/golden/record_model.py"}


def to_numpy(x: torch.Tensor) -> np.ndarray:
    return x.detach().contiguous().view(torch.int16).cpu().numpy().view(ml_dtypes.bfloat16)


def load(device: torch.device) -> Any:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(small_model.CONFIG))
        safetensors.numpy.save_file(small_model.weights(), folder / "model.safetensors", metadata={"format": "pt"})
        model = qwen3.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    model = model.to(device).eval()
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    given = small_model.weights()
    for key, value in model.state_dict().items():
        assert (to_numpy(value).view(np.uint16) == given[key].view(np.uint16)).all(), key
    return model


@contextmanager
def recording(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """While open, every intermediate of a call of the model lands in the dictionary: [batch, tokens, ...], heads behind tokens."""
    found: dict[str, torch.Tensor] = {}
    current = {"layer": -1}
    handles = []

    def keep(stage: str, value: torch.Tensor, heads_first: bool = False) -> None:
        found[f"layers.{current['layer']}.{stage}"] = value.transpose(1, 2) if heads_first else value

    def on_output(module: Any, stage: str) -> None:
        handles.append(module.register_forward_hook(lambda m, args, out: keep(stage, out)))

    def on_input(module: Any, stage: str) -> None:
        handles.append(module.register_forward_pre_hook(lambda m, args: keep(stage, args[0])))

    for index, layer in enumerate(model.model.layers):

        def enter(module: Any, args: Any, kwargs: Any, index: int = index) -> None:
            current["layer"] = index
            keep("hidden", args[0] if args else kwargs["hidden_states"])

        handles.append(layer.register_forward_pre_hook(enter, with_kwargs=True))
        attention, mlp = layer.self_attn, layer.mlp
        on_output(layer.input_layernorm, "normalised")
        for name in "qkv":
            on_output(getattr(attention, f"{name}_proj"), name)
        on_output(attention.q_norm, "q_normed")
        on_output(attention.k_norm, "k_normed")
        on_output(attention.o_proj, "attention_output")
        on_input(layer.post_attention_layernorm, "attention_residual")
        on_output(layer.post_attention_layernorm, "mlp_normalised")
        on_output(mlp.gate_proj, "gate")
        on_output(mlp.up_proj, "up")
        on_output(mlp.act_fn, "activated")
        on_input(mlp.down_proj, "gated")
        on_output(mlp.down_proj, "down")
        handles.append(
            layer.register_forward_hook(lambda m, args, out: keep("mlp_residual", out if torch.is_tensor(out) else out[0]))
        )
    handles.append(model.model.norm.register_forward_hook(lambda m, args, out: found.__setitem__("final_normalised", out)))
    originals = qwen3.eager_attention_forward, qwen3.apply_rotary_pos_emb

    def rotary(*args: Any, **kwargs: Any) -> Any:
        rotated = originals[1](*args, **kwargs)
        for name, value in zip(("q_rotated", "k_rotated"), rotated, strict=True):
            keep(name, value, True)
        return rotated

    def attention_forward(
        module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> Any:
        # the same calls as transformers', one by one, and a proof that they give the same bits
        keys, values = (qwen3.repeat_kv(x, module.num_key_value_groups) for x in (key, value))
        scores = torch.matmul(query, keys.transpose(2, 3))
        scaled = scores * scaling
        masked = scaled if mask is None else scaled + mask[:, :, :, : keys.shape[-2]]
        weights = torch.nn.functional.softmax(masked, dim=-1, dtype=torch.float32).to(query.dtype)
        attended = torch.matmul(weights, values).transpose(1, 2).contiguous()
        expected = originals[0](module, query, key, value, mask, scaling, **kwargs)
        assert torch.equal(expected[0], attended) and torch.equal(expected[1], weights)
        for name, one in (("scores", scores), ("scaled_scores", scaled), ("masked_scores", masked), ("weights", weights)):
            keep(name, one, True)
        keep("attended", attended)
        return expected

    qwen3.eager_attention_forward, qwen3.apply_rotary_pos_emb = attention_forward, rotary
    try:
        yield found
    finally:
        qwen3.eager_attention_forward, qwen3.apply_rotary_pos_emb = originals
        for handle in handles:
            handle.remove()


def gather(found: dict[str, torch.Tensor], logits: torch.Tensor, tokens: int) -> dict[str, np.ndarray]:
    """Every intermediate as [tokens, values]; the logits' rows may be fewer."""
    rows = {name: small_model.as_rows(to_numpy(found[name]), tokens) for name in small_model.names()[:-1]}
    return rows | {"logits": small_model.as_rows(to_numpy(logits), logits.shape[0] * logits.shape[1])}


@torch.no_grad()
def record_prompt(model: Any, length: int, tensors: dict[str, np.ndarray]) -> None:
    ids = torch.from_numpy(small_model.prompt(length))[None].to(model.device)
    plain = model(ids, use_cache=False).logits
    with recording(model) as found:
        logits = model(ids, use_cache=False).logits
    assert torch.equal(plain, logits), "recording changed the result"
    rows = gather(found, logits, length)
    base = f"prompt{length}"
    tensors[f"{base}/tokens"] = small_model.prompt(length)
    tensors[f"{base}/digests"] = np.stack([inputs.row_digests(value) for value in rows.values()])
    tensors[f"{base}/logits"] = rows["logits"]
    for name, value in rows.items():
        hidden = name.endswith((".hidden", ".attention_residual")) and length in small_model.HIDDEN_STORED
        if length in small_model.STORED_WHOLE or hidden:
            tensors[f"{base}/{name}"] = value


@torch.no_grad()
def record_decoding(model: Any, batch: int, tensors: dict[str, np.ndarray]) -> None:
    """Greedy decoding with a K/V cache; the head sees the last position alone, as in ``generate``."""
    prompts = small_model.decode_prompts(batch)
    ids = torch.from_numpy(prompts).to(model.device)
    cache = transformers.DynamicCache(config=model.config)
    tokens, all_logits, digests = [], [], []
    step_ids = ids
    for step in range(small_model.NEW_TOKENS):
        with recording(model) as found:
            logits = model(step_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        rows = gather(found, logits, step_ids.numel())
        if step:
            digests.append(np.stack([inputs.row_digests(value) for value in rows.values()]))
        else:
            first = [inputs.row_digests(rows[name]) for name in small_model.names()[:-1]]
            tensors[f"decode{batch}/first_digests"] = np.stack(first)  # [intermediates, batch * tokens]
        if step in small_model.DECODE_STORED[batch]:
            for name, value in rows.items():
                tensors[f"decode{batch}/step{step}/{name}"] = value
        chosen = logits[:, -1].float().argmax(-1)
        tokens.append(chosen.cpu().numpy())
        all_logits.append(to_numpy(logits[:, -1]))
        step_ids = chosen[:, None]
    tensors[f"decode{batch}/prompts"] = prompts
    tensors[f"decode{batch}/tokens"] = np.stack(tokens, axis=1)  # [batch, steps]
    tensors[f"decode{batch}/logits"] = np.stack(all_logits, axis=1)  # [batch, steps, vocabulary]
    tensors[f"decode{batch}/digests"] = np.stack(digests)  # [steps - 1, intermediates, batch]
    generated = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=small_model.NEW_TOKENS,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    same = bool((generated[:, small_model.DECODE_PROMPT :].cpu().numpy() == tensors[f"decode{batch}/tokens"]).all())
    distinct = len(np.unique(tensors[f"decode{batch}/tokens"]))
    print(f"batch {batch}: generate gives the same tokens: {same}; {distinct} different tokens", flush=True)


if __name__ == "__main__":
    main()
