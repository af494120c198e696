"""``rms_norm_qkv`` on a GPU, its bits: Hugging Face's modules at all sizes, the emulation, one row alone, the same call again."""

import itertools
from functools import partial
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse.bf16 import bfloat16
from cufuse.recipe import Recipe
from tests import gpu_support
from tests.golden import inputs
from tests.gpu_support import COMPARED, EPS, Case, against_numpy, codes, demand_cases, demand_same, rehearse, to_host
from tests.qwen3_block import HEAD, MODELS, Model, Peer, bell, norm_weight, tables

pytestmark = gpu_support.MARKS

ROWS = (1, 2, 3, 5, 8, 16, 17, 33, 64, 130, 256, 2048, 8192)
BATCHES = (1, 2, 3, 8, 16, 17, 64, 65, 256, 1000)
OPTIONS = ("batch-invariant", "float32", "late-rounding", "separate-k-norm")
REPETITIONS = 50


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """One of the six sizes; its memory is given back."""
    yield request.param
    request.param.forget()
    gpu_support.cupy().get_default_memory_pool().free_all_blocks()


def test_hugging_face(model: Model) -> None:
    """Projections packed and separate, with and without a residual, weights static or not."""
    peer = Peer(model)
    for form in ("separate", "packed"):
        cases = []
        for count, residual in itertools.product(ROWS, (False, True)):
            x, rotation = model.tokens(count), tables(count, first=3 * count)
            options: dict[str, Any] = {"heads": model.heads, "eps": EPS, "static_weights": residual == (form == "packed")}
            added = model.tokens(count, seed=1) if residual else None
            call = partial(cufuse.rms_norm_qkv, *model.given(x, form), residual=added, **rotation, **options)
            what = f"{model.name}, {form}, {count} tokens, {'residual' if residual else 'no residual'}"
            cases.append(Case(what, call, partial(peer, form, x, rotation["cos"], rotation["sin"], added)))
        demand_cases(f"block, Hugging Face, {form}", cases)


def against_emulation(model: Model, name: str, count: int, form: str, residual: bool) -> Case:
    """The same weights and tokens, on the GPU and brought to NumPy."""
    x, added = model.tokens(count), model.tokens(count, seed=1) if residual else None
    dtype = np.float32 if cufuse.recipes[name].rope.tables == "float32" else bfloat16
    rotation = tables(count, dtype=dtype)
    given = model.given(x, form)
    options: dict[str, Any] = {"heads": model.heads, "recipe": name, "eps": EPS}
    call = partial(cufuse.rms_norm_qkv, *given, residual=added, **rotation, **options)
    on_host = {key: to_host(array) for key, array in rotation.items()}
    expected = partial(cufuse.rms_norm_qkv, *map(brought, given), residual=brought(added), **on_host, **options)
    return Case(f"{model.name}, {name}, {form}, {count} tokens, residual {residual}", call, expected)


def brought(value: Any) -> Any:
    """A CuPy array, or a tuple of them, as NumPy arrays."""
    if isinstance(value, tuple):
        return tuple(map(brought, value))
    return None if value is None else to_host(value)


@pytest.mark.parametrize("name", ["torch", *OPTIONS])
@pytest.mark.parametrize("size", ["0.6B", "4B"])
def test_emulation(size: str, name: str) -> None:
    """The number of slices is the recorded one on NumPy's side and cuBLASLt's own answer on the GPU's."""
    forms = ("packed", "separate") if name == "torch" or size == "0.6B" else ("packed",)
    cases = [
        against_emulation(MODELS[size], name, count, form, residual)
        for form, (count, residual) in itertools.product(forms, ((1, False), (1, True), (3, True), (16, False)))
    ]
    demand_cases("block, emulation", cases)
    MODELS[size].forget()


@pytest.mark.parametrize("head", [64, 128, 256])
@pytest.mark.parametrize("name", cufuse.recipes)
def test_every_recipe_and_head_size(name: str, head: int) -> None:
    """Hidden 512, four heads and two of keys and values."""
    recipe, cases = cufuse.recipes[name], []
    packed = inputs.bell((8 * head, 512), 2, 0.04)
    separate = packed[: 4 * head], packed[4 * head : 6 * head], packed[6 * head :]
    norms = inputs.norm_weight(head, 3, 6.0), inputs.norm_weight(head, 4, 96.5)
    for count, weight, residual, slices in (
        (1, packed, True, 1), (2, separate, False, 1), (5, packed, False, 3), (16, packed, False, 1), (17, separate, True, 2),
        (70, packed, True, 1),
    ):  # fmt: skip
        x, added = inputs.heavy((count, 512), count), inputs.heavy((count, 512), count + 1, 3.0) if residual else None
        dtype = np.float32 if recipe.rope.tables == "float32" else bfloat16
        cos, sin = cufuse.rope_tables(np.arange(1000, 1000 + count), head, dtype=dtype)
        what = f"{name}, heads of {head}, {count} tokens, {'packed' if weight is packed else 'separate'}, {slices} slices"
        given = (x, inputs.norm_weight(512, 1, 8.0), weight, *norms)
        options = {"cos": cos, "sin": sin, "residual": added, "heads": 4, "recipe": name, "k_slices": slices, "eps": EPS}
        cases.append(against_numpy(what, cufuse.rms_norm_qkv, *given, **options))
    demand_cases("block, emulation", cases)


def one_by_one(model: Model, x: Any, form: str, places: Any, recipe: str | Recipe) -> tuple[Any, ...]:
    """q, k and v of the rows of x at the places, each from a call of its own."""
    gpu = gpu_support.cupy()
    outs = tuple(gpu.empty((len(places), rows // HEAD, HEAD), bfloat16) for rows in model.rows)
    rotation = tables(len(x))
    for row, place in enumerate(places):
        alone = {name: table[place : place + 1] for name, table in rotation.items()}
        out = tuple(one[row : row + 1] for one in outs)
        cufuse.rms_norm_qkv(*model.given(x[place : place + 1], form), **alone, heads=model.heads, recipe=recipe, out=out)
    return outs


def whole(model: Model, x: Any, form: str, recipe: str | Recipe) -> tuple[Any, ...]:
    return cufuse.rms_norm_qkv(*model.given(x, form), **tables(len(x)), heads=model.heads, recipe=recipe)


@pytest.mark.parametrize("form", ["packed", "separate"])
def test_a_row_alone_gives_what_it_gives_in_a_batch(model: Model, form: str) -> None:
    """Recipe batch-invariant: all rows up to 65 tokens, 64 of them above. The batches begin with the same rows, too."""
    everything = model.tokens(max(BATCHES))
    rehearse(partial(whole, model, everything[:count], form, "batch-invariant") for count in BATCHES)
    random = np.random.default_rng(5)
    for count in BATCHES:
        places = np.arange(count) if count <= 65 else np.sort(random.choice(count, 64, replace=False))
        alone = one_by_one(model, everything[:count], form, places.tolist(), "batch-invariant")
        together = whole(model, everything[:count], form, "batch-invariant")
        for name, one, other in zip("qkv", alone, together, strict=True):
            same_rows = codes(other)[gpu_support.cupy().asarray(places)]
            demand_same("block, batch-invariant", same_rows, codes(one), f"{model.name}, {form}, {name}, {count} tokens")


def test_recipe_torch_does_depend_on_the_batch() -> None:
    """The test above would notice: PyTorch's own order changes with the number of rows."""
    model = MODELS["8B"]
    x = model.tokens(1000)
    alone, together = one_by_one(model, x, "separate", range(32), "torch"), whole(model, x, "separate", "torch")
    assert any(bool((codes(one) != codes(other[:32])).any()) for one, other in zip(alone, together, strict=True))
    model.forget()


def busy() -> Any:
    """Another stream with work for some milliseconds, so that the scheduling changes from call to call."""
    gpu = gpu_support.cupy()
    stream = gpu.cuda.Stream(non_blocking=True)
    blocks = [gpu.zeros(size, np.uint8) for size in (1 << 12, 1 << 20, 1 << 26)]
    with stream:
        for turn in range(60):
            blocks[turn % 3] += np.uint8(turn)
    return blocks, stream


@pytest.mark.parametrize("count", [1, 7, 16, 64, 200, 2048])
@pytest.mark.parametrize("size", ["0.6B", "8B", "32B"])
def test_the_same_call_gives_the_same_bits(size: str, count: int) -> None:
    """Fifty calls one behind the other, a different memory for each, with other work beside them; then replays of a graph."""
    gpu, model = gpu_support.cupy(), MODELS[size]
    x, rotation = model.tokens(count), tables(count)
    call = partial(cufuse.rms_norm_qkv, *model.given(x), **rotation, heads=model.heads)
    expected = Peer(model)("packed", x, rotation["cos"], rotation["sin"])
    shapes = [one.shape for one in expected]
    outs = [tuple(poisoned(shape) for shape in shapes) for _ in range(REPETITIONS if count <= 200 else 10)]
    wrong = gpu.zeros((), np.int64)

    def compare() -> None:
        for out in outs:
            for one, other in zip(out, expected, strict=True):
                wrong[...] += (codes(one) != codes(other)).sum()
                COMPARED["block, repeated"] += one.size
                codes(one)[...] = 0xFFFF
        gpu.cuda.Device().synchronize()

    def all_calls(static: bool) -> None:
        for out in outs:
            call(out=out, static_weights=static)

    for static in (False, True):
        all_calls(static)
        compare()
        held = busy()
        all_calls(static)
        compare()
        graph, stream = gpu_support.captured(partial(all_calls, static))
        compare()
        for _ in range(3):
            held = busy()
            graph.launch(stream)
            stream.synchronize()
            compare()
        assert int(wrong) == 0, f"{size}, {count} tokens, static {static}: {int(wrong)} outputs differ"
    del held
    if count == 2048:
        model.forget()


def poisoned(shape: tuple[int, ...]) -> Any:
    out = gpu_support.cupy().empty(shape, bfloat16)
    codes(out)[...] = 0xFFFF
    return out


@pytest.mark.parametrize("count", [1, 5, 64, 300])
def test_static_weights_leave_the_rest_to_the_call_before(count: int) -> None:
    """Calls without a gap, each x the q before (8B: as wide as the hidden state), each residual the new one before; every third x
    and its tables are written by a copy right in front of the call."""
    gpu, model = gpu_support.cupy(), MODELS["8B"]
    sources = [model.tokens(count, seed) for seed in range(12)]
    rotations = [tables(count, first=100 * seed) for seed in range(12)]
    shapes = [(count, rows // HEAD, HEAD) for rows in model.rows] + [sources[0].shape]
    weights = model.given(sources[0])[1:]

    def chain(static: bool) -> list[tuple[Any, ...]]:
        outs = [tuple(map(poisoned, shapes)) for _ in sources]
        copied, (cos, sin) = gpu.zeros_like(sources[0]), (gpu.zeros_like(table) for table in rotations[0].values())
        gpu.cuda.Device().synchronize()
        for number, (source, rotation, out) in enumerate(zip(sources, rotations, outs, strict=True)):
            before = outs[number - 1] if number else (sources[1], None, None, sources[2])
            x, given = before[0].reshape(source.shape), rotation
            if number % 3 == 0:
                given, x = {"cos": cos, "sin": sin}, copied
                for target, value in ((cos, rotation["cos"]), (sin, rotation["sin"]), (copied, source)):
                    codes(target)[...] = codes(value)
            options = {"heads": model.heads, "residual": before[3], "out": out, "static_weights": static}
            cufuse.rms_norm_qkv(x, *weights, **given, **options)
            if not static:
                gpu.cuda.Device().synchronize()
        return outs

    expected = chain(False)
    for _ in range(5):
        for number, (found, wanted) in enumerate(zip(chain(True), expected, strict=True)):
            for name, one, other in zip(("q", "k", "v", "residual"), found, wanted, strict=True):
                demand_same("block, chained", one, other, f"{count} tokens, call {number}, {name}")


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("size", ["0.6B", "4B", "32B"])
def test_many_rows_replayed(size: str, static: bool) -> None:
    """Last tiles of rows that are not whole, other tokens at each replay of one graph."""
    model, peer = MODELS[size], Peer(MODELS[size])
    for count, residual in ((1025, True), (2050, False), (6000, True)):
        x, rotation = model.tokens(count), tables(count)
        added = model.tokens(count, seed=1) if residual else None
        outs = tuple(poisoned((count, rows // HEAD, HEAD)) for rows in model.rows)
        total = poisoned(x.shape) if residual else None
        options: dict[str, Any] = {"heads": model.heads, "eps": EPS, "residual": added, "static_weights": static}
        options["out"] = (*outs, total) if residual else outs
        graph, stream = gpu_support.captured(partial(cufuse.rms_norm_qkv, *model.given(x), **rotation, **options))
        for turn in range(4):
            codes(x)[...] = codes(model.tokens(count, seed=10 + turn))
            gpu_support.cupy().cuda.Device().synchronize()
            graph.launch(stream)
            stream.synchronize()
            expected = peer("packed", x, rotation["cos"], rotation["sin"], added)
            for name, one, other in zip(("q", "k", "v", "residual"), (*outs, total), expected, strict=False):
                demand_same("block, replayed", one, other, f"{size}, {count} tokens, turn {turn}, {name}")
    model.forget()


def test_static_weights_that_a_call_has_just_written_are_not_promised() -> None:
    """Without the promise the weights may be written by the kernel in front of the call."""
    gpu, model = gpu_support.cupy(), MODELS["4B"]
    x, rotation = model.tokens(16), tables(16)
    expected = Peer(model)("packed", x, rotation["cos"], rotation["sin"])
    arrays = [gpu.empty_like(one) for one in model.given(x)[1:]]
    for turn in range(20):
        for array, value in zip(arrays, model.given(x)[1:], strict=True):
            codes(array)[...] = turn % 3
            codes(array)[...] = codes(value)
        found = cufuse.rms_norm_qkv(x, *arrays, **rotation, heads=model.heads)
        for name, one, other in zip("qkv", found, expected, strict=True):
            demand_same("block, chained", one, other, f"weights just written, turn {turn}, {name}")
    model.forget()


def test_layers_in_turn() -> None:
    """Other weights, tokens and addresses in calls of one kind: nothing of an earlier call is taken again."""
    model, peers = MODELS["0.6B"], []
    for seed in (11, 12, 13):
        weights = {"norm": norm_weight(model.hidden, seed, 8.0), "qkv": bell((sum(model.rows), model.hidden), seed, 0.03)}
        peers.append(Peer(model, weights | {name: norm_weight(HEAD, seed, 96.5) for name in ("q_norm", "k_norm")}))
    for turn, (count, peer) in enumerate(itertools.product((1, 64, 1, 4, 64), peers)):
        x, rotation = model.tokens(count, seed=turn), tables(count, first=turn)
        arrays = [gpu_support.from_torch(peer.weights[name]) for name in ("norm", "qkv", "q_norm", "k_norm")]
        found = cufuse.rms_norm_qkv(x, *arrays, **rotation, heads=model.heads)
        for name, one, other in zip("qkv", found, peer("packed", x, rotation["cos"], rotation["sin"]), strict=True):
            demand_same("block, repeated", one, other, f"layers in turn, turn {turn}, {name}")
    model.forget()
