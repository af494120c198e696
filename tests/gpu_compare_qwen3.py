"""The whole decoder on a GPU beside transformers: differing bits and speed: python3 -m tests.gpu_compare_qwen3 [--quick] [--speed]

A Qwen3-0.6B with random weights (28 layers; both sides get the same arrays). Prompts and greedy decoding are compared with
transformers (eager, bfloat16) in the same process: every logit's bits, every token, and the first intermediate that differs.
--speed: decoding at batch 1 and 8 under CUDA graphs: cufuse, also with its layers' projections as Q4_0, transformers eager,
transformers compiled; tokens per second beside what reading the weights once a token allows. Results go to --json.
"""

import argparse
import functools
import json
import statistics
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from cufuse import qwen3
from tests.gpu_support import codes, cupy, from_torch, to_gpu, torch

PROMPTS = (1, 2, 7, 13, 16, 100, 129, 512, 1024, 1025, 2048)
STREAM_BYTES_A_SECOND = 4.2e12  # copy bandwidth measured on an H200, see the README


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers, prompts up to 129, 16 tokens")
    parser.add_argument("--speed", action="store_true", help="speed too")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    start = time.time()
    ours = qwen3.synthetic("qwen3-0.6b", layers=4 if given.quick else None)
    theirs = transformers_model(ours)
    print(f"models: {time.time() - start:.1f} s", flush=True)
    results: dict[str, Any] = {"prompts": {}, "decoding": {}}
    for length in (p for p in PROMPTS if p <= (129 if given.quick else 2048)):
        results["prompts"][length] = compare_prompt(ours, theirs, length)
        print(f"prompt of {length}: {results['prompts'][length]}, {time.time() - start:.1f} s", flush=True)
    for batch in (1, 8):
        results["decoding"][batch] = compare_decoding(ours, theirs, batch, 16 if given.quick else 256)
        print(f"batch {batch}: {results['decoding'][batch]}, {time.time() - start:.1f} s", flush=True)
    if given.speed:
        results["speed"] = {batch: speed(ours, theirs, batch, not given.no_compile) for batch in (1, 8)}
        print(json.dumps(results["speed"], indent=1), f"{time.time() - start:.1f} s", flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(results, indent=1) + "\n")


def transformers_model(ours: qwen3.Qwen3) -> Any:
    """The same weights in transformers, RoPE's frequencies in float32 as ``from_pretrained`` leaves them.

    It computes them on the CPU and copies them to the device: transformers 5.17.0, modeling_utils.py, moves non-persistent buffers
    off the meta device empty (``_move_missing_keys_from_meta_to_device``), then ``_init_weights`` fills ``inv_freq`` with
    ``rope_fn(module.config)``, no device given. Under ``torch.device("cuda")`` the GPU's pow would make them, whose results differ
    from the CPU's by an ulp here and there.
    """
    from transformers import Qwen3Config
    from transformers.models.qwen3 import modeling_qwen3

    library, config = torch(), ours.config
    numbers = {
        name: getattr(config, name)
        for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "rms_norm_eps")
    } | {"intermediate_size": config.intermediate_size, "vocab_size": config.vocab_size}
    theirs = Qwen3Config(
        **numbers, max_position_embeddings=40960, tie_word_embeddings=config.tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta}, attn_implementation="eager",
    )  # fmt: skip
    with library.device("cuda"):
        model = modeling_qwen3.Qwen3ForCausalLM(theirs).eval()
    rotary = model.model.rotary_emb
    frequencies = rotary.compute_default_rope_parameters(theirs)[0]
    assert frequencies.device.type == "cpu" and frequencies.dtype == library.float32
    print(f"frequencies that the GPU computes otherwise: {int((rotary.inv_freq.cpu() != frequencies).sum())} of {len(frequencies)}")
    model = model.to(library.bfloat16)
    model.model.rotary_emb.inv_freq = frequencies.cuda()
    weights = ours.weights
    state = {"model.embed_tokens.weight": weights.embedding, "model.norm.weight": weights.final_norm}
    if not config.tie_word_embeddings:
        state["lm_head.weight"] = weights.head
    for index, layer in enumerate(weights.layers):
        for field, middle in qwen3.weights.FIELDS.items():
            state[f"model.layers.{index}.{middle}.weight"] = getattr(layer, field)
    parameters = dict(model.named_parameters())
    with library.no_grad():
        for name, parameter in parameters.items():
            bits = np.ascontiguousarray(state.pop(name)).view(np.int16)
            parameter.copy_(library.from_numpy(bits.copy()).cuda().view(library.bfloat16))
    assert not state, sorted(state)
    return model


def ids(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 151936, (batch, length))


def differing(found: Any, expected: Any) -> int:
    return int(cupy().count_nonzero(codes(found) != codes(from_torch(expected.contiguous()))))


def compare_prompt(ours: qwen3.Qwen3, theirs: Any, length: int) -> dict[str, Any]:
    from tests.golden.record_model import recording

    library = torch()
    given = ids(1, length)
    with library.no_grad(), recording(theirs) as stages:
        expected = theirs(library.from_numpy(given).cuda(), use_cache=False).logits[0]
    found: dict[str, Any] = {}
    logits = ours.forward(to_gpu(given[0]), intermediates=found)
    first = None
    for name, value in found.items():
        if name in stages:
            other = stages[name].reshape(length, -1)
            count = differing(cupy().ascontiguousarray(codes(value)).reshape(length, -1), other.view(library.int16))
            if count:
                first = f"{name}: {count} of {value.size}"
                break
    return {"logits": int(logits.size), "differing": differing(logits, expected), "first": first}


def compare_decoding(ours: qwen3.Qwen3, theirs: Any, batch: int, n: int) -> dict[str, Any]:
    """Greedy decoding from prompts of 16; logits are compared up to the first differing token of a row."""
    import transformers

    library = torch()
    given = ids(batch, 16)
    found = ours.generate(to_gpu(given), n)
    cache = transformers.DynamicCache(config=theirs.config)
    step, tokens, differ = library.from_numpy(given).cuda(), [], []
    with library.no_grad():
        for index in range(n):
            logits = theirs(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            differ.append(differing(cupy().ascontiguousarray(codes(found.logits)[:, index]), logits.view(library.int16)))
            step = logits.float().argmax(-1)[:, None]
            tokens.append(step[:, 0].cpu().numpy())
    expected, mine = np.stack(tokens, axis=1), cupy().asnumpy(found.tokens)
    equal = expected == mine
    parted = [int(np.argmin(row)) if not row.all() else None for row in equal]
    bad = next((index for index, count in enumerate(differ) if count), None)
    counts = {"tokens": int(equal.size), "equal": int(equal.sum())}
    return counts | {"first_differing_token": parted, "first_step_with_a_differing_logit": bad}


def speed(ours: qwen3.Qwen3, theirs: Any, batch: int, compiled: bool) -> dict[str, Any]:
    """Milliseconds a step of decoding with 512 positions in the cache, medians; all under CUDA graphs."""
    found: dict[str, Any] = {"cufuse": cufuse_step(ours, batch, "torch")}
    found["cufuse, Q4_0 projections"] = cufuse_step(quantised(ours), batch, "block-scaled")
    peers = {"transformers eager, graph": eager_step} | ({"transformers compiled": compiled_step} if compiled else {})
    for name, peer in peers.items():
        try:
            found[name] = peer(theirs, batch)
        except Exception as error:  # a peer that cannot be captured must not hide the other figures
            print(f"{name}:", "".join(traceback.format_tb(error.__traceback__)[-5:]), repr(error)[:600], sep="\n", flush=True)
            found[name] = repr(error)[:100]
    weights = 2 * sum(parameter.numel() for parameter in theirs.parameters())
    floor = 1e3 * weights / STREAM_BYTES_A_SECOND
    rows: dict[str, Any] = {"weights_read_once_ms": round(floor, 4)}
    for name, ms in found.items():
        rows[name] = ms if isinstance(ms, str) else {"ms": round(ms, 4), "tokens_a_second": round(1e3 * batch / ms, 1)}
    return rows


@functools.cache
def quantised(ours: qwen3.Qwen3) -> qwen3.Qwen3:
    return ours.quantised("Q4_0")


def cufuse_step(ours: qwen3.Qwen3, batch: int, recipe: str) -> float:
    from cufuse import named_recipes
    from cufuse.qwen3.gpu_greedy import GreedyGraph

    decoder, numerics = ours._gpu().decoder, named_recipes.get(recipe)
    cache = decoder.new_cache(numerics, batch, 512 + 256)
    decoder.run(ids(batch, 512), numerics, cache=cache, last_only=True)
    graph = GreedyGraph(decoder, numerics, cache, 256)
    graph.start(cupy().zeros(batch, np.int64))
    graph.step()
    times = []
    with graph.stream:
        for _ in range(200):
            begin, end = cupy().cuda.Event(), cupy().cuda.Event()
            begin.record(graph.stream)
            graph.step()
            end.record(graph.stream)
            end.synchronize()
            times.append(cupy().cuda.get_elapsed_time(begin, end))
    return statistics.median(times)


def static_step(theirs: Any, batch: int, forward: Any, mask_too: bool) -> Any:
    """A function that decodes one token for each row into a static cache of 768 positions, 512 of them taken.

    mask_too : with a mask of its own, as ``generate`` prepares it (a dict, transformers 5.17.0, modeling_qwen3.py).
    The one that transformers makes copies a zero from the host (masking_utils.py, ``eager_mask``), which no capture allows.
    """
    import transformers

    library = torch()
    cache = transformers.StaticCache(config=theirs.config, max_cache_len=768)
    with library.no_grad():
        theirs(library.from_numpy(ids(batch, 512)).cuda(), past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = library.zeros((batch, 1), dtype=library.int64, device="cuda")
    position = library.full((batch, 1), 512, dtype=library.int64, device="cuda")
    places = library.arange(768, device="cuda")
    seen = library.zeros((), dtype=library.bfloat16, device="cuda")
    hidden = library.full((), library.finfo(library.bfloat16).min, dtype=library.bfloat16, device="cuda")

    def step() -> None:
        with library.no_grad():
            given = {"past_key_values": cache, "position_ids": position, "use_cache": True, "logits_to_keep": 1}
            if mask_too:
                mask = library.where(places <= position, seen, hidden)
                given["attention_mask"] = {"full_attention": mask[:, None, None, :]}
            logits = forward(token, **given).logits
            token.copy_(logits[:, -1:].argmax(-1))
            position.add_(1)

    return step


def timed(replay: Any) -> float:
    library = torch()
    times = []
    for _ in range(100):
        begin, end = library.cuda.Event(enable_timing=True), library.cuda.Event(enable_timing=True)
        begin.record()
        replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def eager_step(theirs: Any, batch: int) -> float:
    library = torch()
    step = static_step(theirs, batch, theirs, True)
    stream = library.cuda.Stream()
    stream.wait_stream(library.cuda.current_stream())
    with library.cuda.stream(stream):
        for _ in range(3):
            step()
    library.cuda.synchronize()
    graph = library.cuda.CUDAGraph()
    with library.cuda.graph(graph):
        step()
    return timed(graph.replay)


def compiled_step(theirs: Any, batch: int) -> float:
    library = torch()
    step = static_step(theirs, batch, library.compile(theirs, mode="reduce-overhead", fullgraph=False), False)
    for _ in range(4):
        step()
    library.cuda.synchronize()
    return timed(step)


if __name__ == "__main__":
    main()
