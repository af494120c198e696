"""The decoder on a GPU: its steps and the whole model against the emulation, PyTorch and transformers in the same process."""

import functools
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import qwen3
from cufuse.attention import attention
from cufuse.bf16 import bfloat16
from cufuse.mlp import silu, swiglu
from cufuse.residual import add
from cufuse.softmax import softmax
from tests import gpu_support
from tests.golden import small_model
from tests.gpu_support import against_numpy, codes, demand_cases, demand_same, from_torch, given_by, to_gpu, to_host, to_torch
from tests.small_qwen3 import small_qwen3
from tests.witnesses import from_codes, random_bf16

pytestmark = [*gpu_support.MARKS, pytest.mark.filterwarnings("ignore::cufuse.AssumedSlicesWarning")]

LENGTHS = (1, 2, 13, 32, 33, 100, 1024, 1025, 2048, 2049, 4096, 9216, 9217, 9220, 12256, 12289, 16384)


def test_softmax_is_the_emulation_and_pytorch() -> None:
    torch = gpu_support.torch()
    cases = []
    for columns in LENGTHS:
        x = random_bf16(columns, 5, columns, scale=3)
        cases.append(against_numpy(f"softmax of {columns}", softmax, x))
        expected = given_by(functools.partial(torch.softmax, dim=-1, dtype=torch.float32), to_gpu(x))
        rounded = from_torch(to_torch(expected).to(torch.bfloat16))
        cases.append(gpu_support.Case(f"torch.softmax of {columns}", functools.partial(softmax, to_gpu(x)), lambda r=rounded: r))
    cases.append(against_numpy("float32 rows", softmax, random_bf16(1, 9, 300).astype(np.float32)))
    demand_cases("softmax", cases)


def test_silu_and_swiglu_of_every_bfloat16() -> None:
    torch = gpu_support.torch()
    every = from_codes(np.arange(65536))
    up = random_bf16(0, 65536)
    ours = to_gpu(every)
    cases = [against_numpy("silu", silu, every), against_numpy("swiglu", swiglu, every, up)]
    cases.append(against_numpy("swiglu, float32", functools.partial(swiglu, recipe="float32"), every, up))
    expected = given_by(torch.nn.functional.silu, ours)
    demand_cases("silu, swiglu", cases)
    # PyTorch's NaN has bits of its own; all other codes are its
    numbers = ~np.isnan(to_host(expected).astype(np.float32))
    assert (to_host(codes(silu(ours)))[numbers] == to_host(codes(expected))[numbers]).all()


def test_add() -> None:
    x, residual = random_bf16(1, 30, 257, binades=9), random_bf16(2, 30, 257, binades=9)
    wide = functools.partial(add, recipe="float32")
    mixed = against_numpy("float32 residual", wide, x, residual.astype(np.float32))
    demand_cases("residual sums", [against_numpy("add", add, x, residual), against_numpy("add, float32", wide, x, residual), mixed])


@pytest.mark.parametrize("size", [64, 128, 256])
def test_attention_is_the_emulation(size: int) -> None:
    cases = []
    for batch, queries, keys, heads, kv_heads in (
        (1, 1, 1, 4, 2), (1, 1, 77, 16, 8), (3, 1, 130, 4, 4), (1, 13, 13, 4, 2), (2, 33, 50, 8, 2), (1, 129, 129, 2, 1),
    ):  # fmt: skip
        q, k, v = (
            random_bf16(seed, batch, n, h, size, scale=2)
            for seed, (n, h) in enumerate(((queries, heads), (keys, kv_heads), (keys, kv_heads)))
        )
        for recipe in ("torch", "float32"):
            call = functools.partial(attention, recipe=recipe)
            cases.append(against_numpy(f"{recipe}, {batch} x {queries} x {keys}, {heads}/{kv_heads} of {size}", call, q, k, v))
    demand_cases("attention", cases)


@pytest.mark.parametrize(("batch", "heads", "kv_heads"), [(8, 16, 8), (1, 128, 64), (16, 16, 8)])
def test_prompts_around_those_summed_in_lanes_are_pytorch(batch: int, heads: int, kv_heads: int) -> None:
    """Transformers' eager attention at 128 and 256 products: scores of 13 and 15, and of 9 keys by lanes, their neighbours not."""
    torch = gpu_support.torch()
    cases = []
    for tokens in (7, 9, 11, 12, 13, 15, 17):
        host = [random_bf16(seed, batch, tokens, h, 128, scale=2) for seed, h in enumerate((heads, kv_heads, kv_heads))]
        q, k, v = (to_torch(to_gpu(one)).transpose(1, 2) for one in host)
        k, v = (one.repeat_interleave(heads // kv_heads, dim=1) for one in (k, v))
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        mask = torch.zeros(tokens, tokens, dtype=q.dtype, device=q.device).masked_fill(hidden, torch.finfo(q.dtype).min)
        scores = torch.matmul(q, k.transpose(2, 3)) * 128**-0.5 + mask
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        expected = from_torch(torch.matmul(weights, v).transpose(1, 2).contiguous())
        call = functools.partial(attention, *map(to_gpu, host))
        cases.append(gpu_support.Case(f"{tokens} tokens, PyTorch", call, lambda found=expected: found))
        cases.append(against_numpy(f"{tokens} tokens, emulation", attention, *host))
    demand_cases("attention, prompts", cases)


def test_attention_beyond_one_warp_of_keys() -> None:
    q, k, v = (random_bf16(seed, 1, n, h, 128) for seed, (n, h) in enumerate(((2, 2), (2100, 1), (2100, 1))))
    demand_cases("attention", [against_numpy("2100 keys", attention, q, k, v)])


@pytest.mark.parametrize(
    ("batch", "keys", "heads", "kv_heads", "size"),
    [
        (1, 513, 16, 8, 128), (1, 640, 16, 8, 128), (8, 641, 16, 8, 128), (8, 100, 16, 8, 128), (1, 700, 32, 4, 64),
        (1, 2047, 4, 2, 256), (1, 2051, 16, 8, 128), (1, 9300, 4, 2, 128), (1, 12301, 5, 1, 64),
    ],
)  # fmt: skip
def test_attention_of_one_query_is_the_emulation(batch: int, keys: int, heads: int, kv_heads: int, size: int) -> None:
    """Softmax in the same launch as the values, and apart (more than 2048 keys); chunks, several blocks of keys."""
    shapes = ((1, heads), (keys, kv_heads), (keys, kv_heads))
    q, k, v = (random_bf16(seed, batch, n, h, size, scale=2) for seed, (n, h) in enumerate(shapes))
    cases = [against_numpy(recipe, functools.partial(attention, recipe=recipe), q, k, v) for recipe in ("torch", "float32")]
    demand_cases("attention", cases)


def one_slice(name: str) -> cufuse.Recipe:
    """A recipe that does not ask cuBLAS, whose answers for the small model's shapes the emulation need not know."""
    recipe = cufuse.recipes[name]
    return recipe.derive(f"{name}, one slice", gemm={"k_slices": 1}, dense={"k_slices": 1})


@pytest.mark.parametrize("name", [name for name in cufuse.recipes if "q8_1" not in name])  # that one is for quantised weights
def test_intermediates_of_every_recipe(name: str) -> None:
    recipe = one_slice(name)
    for length in (1, 13, 100):
        expected: dict[str, Any] = {}
        found: dict[str, Any] = {}
        ids = small_model.prompt(length)
        small_qwen3().forward(ids, recipe=recipe, intermediates=expected)
        small_qwen3().forward(to_gpu(ids), recipe=recipe, intermediates=found)
        for key, value in found.items():
            demand_same("decoder, emulation", value, expected[key], f"{name}, {length} tokens, {key}")


@pytest.mark.parametrize("name", ["torch", "late-rounding", "vllm-0.20", "float32", "batch-invariant"])
@pytest.mark.parametrize("batch", [1, 4])
def test_greedy_decoding(name: str, batch: int) -> None:
    recipe, ids = one_slice(name), small_model.decode_prompts(batch)
    expected = small_qwen3().generate(ids, 40, recipe=recipe)
    found = small_qwen3().generate(to_gpu(ids), 40, recipe=recipe)
    assert to_host(found.tokens).tolist() == expected.tokens.tolist()
    demand_same("decoder, emulation", found.logits, expected.logits, f"{name}, batch {batch}, logits")


@pytest.mark.parametrize("batch", [1, 8])
def test_replayed_graph_is_step_by_step(batch: int) -> None:
    """At full width, where kernels that begin early overlap: what the chain of dependents gives, and one pass after the other."""
    ids = to_gpu(np.random.default_rng(batch).integers(0, 151936, (batch, 505)))
    model = qwen3.synthetic("qwen3-0.6b", layers=3)
    replayed = model.generate(ids, 40)
    passes = model.generate(ids, 40, intermediates=[])
    assert to_host(replayed.tokens).tolist() == to_host(passes.tokens).tolist()
    demand_same("decoder, graph and passes", replayed.logits, to_host(passes.logits), f"batch {batch}, logits")


@pytest.mark.parametrize("batch", [1, 4])
def test_quantised_projections(batch: int) -> None:
    """Taken as they are by the graph, and decoded step by step, against the emulation."""
    model = small_qwen3().quantised("Q4_0")
    ids = small_model.decode_prompts(batch)
    for name, steps in (("block-scaled", 24), ("torch", 4)):
        recipe = one_slice(name)
        expected, found = model.generate(ids, steps, recipe=recipe), model.generate(to_gpu(ids), steps, recipe=recipe)
        assert to_host(found.tokens).tolist() == expected.tokens.tolist()
        demand_same("decoder, emulation", found.logits, expected.logits, f"Q4_0, {name}, batch {batch}, logits")


@functools.cache
def transformers_model() -> Any:
    from tests.golden.record_model import load

    gpu_support.qwen3()
    return load(gpu_support.torch().device("cuda"))


@pytest.mark.parametrize("length", small_model.PROMPTS)
def test_small_model_is_transformers(length: int) -> None:
    torch = gpu_support.torch()
    ids = to_gpu(small_model.prompt(length))
    with torch.no_grad():
        expected = transformers_model()(to_torch(ids)[None], use_cache=False).logits[0]
    found = small_qwen3().forward(ids)
    assert found.dtype == bfloat16
    demand_same("decoder, transformers", found, from_torch(expected), f"logits of {length} tokens")
