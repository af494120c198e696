"""``rms_norm_qkv`` on a GPU, how it is called: what may be left out, where outputs may lie, slots of a cache, allocations.

Its bits at the sizes of Qwen3 are in test_gpu_block.py.
"""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse.bench_timing import allocated
from cufuse.bf16 import bfloat16
from tests import gpu_support
from tests.golden import inputs
from tests.gpu_support import Guarded, against_numpy, codes, demand_cases, demand_same, rehearse, to_gpu
from tests.qwen3_block import HEAD, MODELS, tables

pytestmark = gpu_support.MARKS


def small(leading: tuple[int, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arrays and options of a block with six heads of 64, with all that may be left out."""
    x, residual = (inputs.heavy((*leading, 192), seed) for seed in (1, 2))
    weights = inputs.norm_weight(192, 1, 8.0), inputs.bell((6 * 64, 192), 2, 0.05)
    cos, sin = cufuse.rope_tables(np.arange(int(np.prod(leading))).reshape(leading), 64)
    given = (x, *weights, inputs.norm_weight(64, 3, 6.0), inputs.norm_weight(64, 4, 96.5))
    return given, {"cos": cos, "sin": sin, "residual": residual, "heads": 4, "k_slices": 1}


@pytest.mark.parametrize("name", ["torch", "separate-k-norm", "late-rounding", "float32"])
def test_what_may_be_left_out(name: str) -> None:
    recipe = cufuse.recipes[name]
    cases = []
    for norms, rotation, residual, packed in itertools.product((True, False), repeat=4):
        (x, norm, qkv, *head_norms), options = small((2, 5))
        if recipe.rope.tables == "float32":
            options |= dict(zip(("cos", "sin"), cufuse.rope_tables(np.arange(10).reshape(2, 5), 64, dtype=np.float32), strict=True))
        options |= {} if rotation else {"cos": None, "sin": None}
        options |= {"head_dim": 64, "residual": options["residual"] if residual else None}
        weights = qkv if packed else (qkv[:256], qkv[256:320], qkv[320:])
        what = f"{name}: norms {norms}, rotation {rotation}, residual {residual}, packed {packed}"
        given = (x, norm, weights, *(head_norms if norms else (None, None)))
        cases.append(against_numpy(what, cufuse.rms_norm_qkv, *given, recipe=name, **options))
    demand_cases("block, emulation", cases)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "separate"])
def test_outputs_in_one_buffer_and_replayed(packed: bool) -> None:
    """q, k and v as views of one guarded buffer, launched, captured and replayed while the memory pool is in other use."""
    gpu = gpu_support.cupy()
    (x, norm, qkv, *head_norms), options = small((9,))
    weights = qkv if packed else (qkv[:256], qkv[256:320], qkv[320:])
    given = (x, norm, weights, *head_norms)
    expected = cufuse.rms_norm_qkv(*given, **options)
    on_gpu, named = tuple(map(to_gpu, given)), {key: to_gpu(value) for key, value in options.items()}
    guard, total = Guarded((9, 6, 64), bfloat16, gap=0), gpu.empty((9, 192), bfloat16)
    outs = (guard.out[:, :4], guard.out[:, 4:5], guard.out[:, 5:], total)
    found = cufuse.rms_norm_qkv(*on_gpu, **named, out=outs)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one is outs[index]
        demand_same("block, emulation", one, other, f"one buffer, result {index}")
    graph, stream = gpu_support.captured(lambda: cufuse.rms_norm_qkv(*on_gpu, **named, out=outs))
    others = [gpu.full(size, 0x5A, np.uint8) for size in (1 << 12, 1 << 14, 1 << 16) * 20]
    for turn in range(3):
        for out in outs:
            out.view(np.uint16)[...] = 0
        gpu.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        for index, (one, other) in enumerate(zip(outs, expected, strict=True)):
            demand_same("block, emulation", one, other, f"replay {turn}, result {index}")
    assert all(bool((other == 0x5A).all()) for other in others), "a replay wrote to memory that was given to others"
    guard.demand_intact("block")
    with pytest.raises(ValueError, match=r"out\[3\] overlaps residual in memory"):
        cufuse.rms_norm_qkv(*on_gpu, **named, out=(None, None, None, named["residual"]))


@pytest.mark.parametrize("size", ["0.6B", "4B", "14B"])
def test_views_at_the_sizes_of_a_model(size: str) -> None:
    """q, k and v side by side in rows that are longer, as vLLM has them; x as part of longer rows; all in a batch of two."""
    gpu, model = gpu_support.cupy(), MODELS[size]
    ends = (0, model.heads, model.heads + model.kv_heads, model.heads + 2 * model.kv_heads)
    for count in (1, 3, 16, 64, 300):
        x = model.tokens(2 * count).reshape(2, count, model.hidden)
        padded = gpu.zeros((2, count, model.hidden + 64), np.uint16)
        padded[..., : model.hidden] = codes(x)
        inside = padded.view(bfloat16)[..., : model.hidden]
        rotation = {name: table.reshape(2, count, HEAD) for name, table in tables(2 * count).items()}
        plain = cufuse.rms_norm_qkv(*model.given(x), **rotation, heads=model.heads)
        buffer = gpu.full((2, count, ends[-1] + 1, HEAD), 0xFFFF, np.uint16)
        outs = tuple(buffer.view(bfloat16)[:, :, first:last] for first, last in itertools.pairwise(ends))
        found = cufuse.rms_norm_qkv(*model.given(inside), **rotation, heads=model.heads, out=outs)
        for name, one, other in zip("qkv", found, plain, strict=True):
            demand_same("block, layouts", one, other, f"{size}, 2 x {count} tokens, {name} inside longer rows")
        assert bool((buffer[:, :, ends[-1]] == 0xFFFF).all()), f"{size}, {count} tokens: written beside the outputs"
    model.forget()


SLOT_CASES = [("torch", 1, True), ("torch", 5, True), ("torch", 64, False), ("torch", 300, True), ("batch-invariant", 17, True),
              ("late-rounding", 9, True), ("float32", 9, False), ("separate-k-norm", 20, True)]  # fmt: skip


@pytest.mark.parametrize(("name", "count", "packed"), SLOT_CASES)
def test_slots_of_a_cache(name: str, count: int, packed: bool) -> None:
    """Keys and values go to their rows of a paged cache, padding nowhere; a graph follows the slots that are written for it."""
    gpu, model, recipe = gpu_support.cupy(), MODELS["0.6B"], cufuse.recipes[name]
    dtype = np.dtype(bfloat16 if recipe.round_output or recipe.gemm.output == "bfloat16" else np.float32)
    x, rotation = model.tokens(count), tables(count, dtype=np.float32 if recipe.rope.tables == "float32" else bfloat16)
    call = partial(
        cufuse.rms_norm_qkv, *model.given(x, "packed" if packed else "separate"), **rotation, heads=model.heads, recipe=name
    )
    plain = call()
    size = count + 40
    caches = gpu.empty((size, 2, model.kv_heads, HEAD), dtype)  # k and v of a slot side by side
    q = gpu.empty(plain[0].shape, dtype)
    random = np.random.default_rng(count)
    slots = gpu.zeros(count, np.int64)

    def demand_stored(places: np.ndarray, what: str) -> None:
        demand_same("block, cache slots", q, plain[0], f"{name}, {count} tokens, {what}, q")
        stored = np.flatnonzero((places >= 0) & (places < size))
        untouched = np.setdiff1d(np.arange(size), places[stored])
        for index, value in enumerate(plain[1:]):
            kept = codes(caches)[:, index]
            pair = kept[gpu.asarray(places[stored])], codes(value)[gpu.asarray(stored)]
            demand_same("block, cache slots", *pair, f"{name}, {count} tokens, {what}, {'kv'[index]}")
            beside = kept[gpu.asarray(untouched)] == np.iinfo(kept.dtype).max
            assert bool(beside.all()), f"{what}: a slot that belongs to no token was written"

    def places() -> np.ndarray:
        found = random.permutation(size)[:count].astype(np.int64)
        found[random.random(count) < 0.2] = -1
        if count > 4:
            found[2] = size + 3
        return found

    def prepare(chosen: np.ndarray) -> None:
        codes(caches)[...] = np.iinfo(codes(caches).dtype).max
        codes(q)[...] = np.iinfo(codes(q).dtype).max
        slots[...] = gpu.asarray(chosen)
        gpu.cuda.Device().synchronize()

    into = partial(call, cache_slots=slots, out=(q, caches[:, 0], caches[:, 1]))
    for turn in range(3):
        prepare(chosen := places())
        into()
        demand_stored(chosen, f"turn {turn}")
    graph, stream = gpu_support.captured(into)
    for turn in range(3):
        prepare(chosen := places())
        graph.launch(stream)
        stream.synchronize()
        demand_stored(chosen, f"replay {turn}")
    if count == 64:
        model.forget()


@pytest.mark.parametrize("recipe", ["torch", "batch-invariant", "late-rounding", "float32", "separate-k-norm"])
@pytest.mark.parametrize("size", MODELS)
def test_nothing_is_allocated_with_out(size: str, recipe: str) -> None:
    """Neither kept nor given back: CuPy's memory pool is not asked at all once a call of the kind has been made."""
    gpu, model, numerics = gpu_support.cupy(), MODELS[size], cufuse.recipes[recipe]
    rotated = np.float32 if numerics.rope.tables == "float32" else bfloat16
    calls = {}
    for count, form, residual in itertools.product((1, 16, 64, 256, 2048), ("packed", "separate"), (False, True)):
        if recipe not in ("torch", "batch-invariant") and count > 64:
            continue
        x, added = model.tokens(count), model.tokens(count, 1) if residual else None
        options = {"heads": model.heads, "recipe": recipe, "residual": added, **tables(count, dtype=rotated)}
        calls[count, form, residual] = partial(cufuse.rms_norm_qkv, *model.given(x, form), **options)
    rehearse(calls.values())
    outs = {what: tuple(map(gpu.empty_like, call())) for what, call in calls.items()}
    asked = {what: allocated(partial(call, out=outs[what])) for what, call in calls.items()}
    assert not any(asked.values()), {what: number for what, number in asked.items() if number}
    model.forget()
