"""On a GPU: what a captured graph, a thread or a fresh stream finds when the memory pool has gone on to other things."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _repeat, launch
from cufuse.attention import attention
from cufuse.bf16 import bfloat16
from cufuse.quantised import QuantisedWeight, quantised_linear
from tests import gpu_support
from tests.golden import inputs
from tests.gpu_support import codes, demand_same, to_gpu
from tests.quantised_weights import random_weight
from tests.witnesses import random_bf16

pytestmark = gpu_support.MARKS

AREA = "captured calls"


def apart(shape: tuple[int, ...], dtype: Any = bfloat16) -> Any:
    """An array whose rows have a gap: nothing is computed into it directly."""
    wide = gpu_support.cupy().zeros((*shape[:-1], shape[-1] + 3), np.dtype(f"u{np.dtype(dtype).itemsize}"))
    return wide.view(dtype)[..., : shape[-1]]


def product() -> tuple[Callable[[], Any], Any, Any]:
    x, weight = inputs.bell((5, 256), 1), inputs.bell((48, 256), 2, 0.05)
    given, out = tuple(map(to_gpu, (x, weight))), apart((5, 48))
    return lambda: cufuse.linear(*given, k_slices=2, out=out), out, cufuse.linear(x, weight, k_slices=2)


def cast() -> tuple[Callable[[], Any], Any, Any]:
    x = np.random.default_rng(1).standard_normal((7, 130)).astype(np.float32)
    given, out = apart(x.shape, np.float32), apart(x.shape)
    codes(given)[...] = codes(to_gpu(x))
    return lambda: cufuse.round_to_bf16(given, out=out), out, cufuse.round_to_bf16(x)


def on_device(weight: QuantisedWeight) -> QuantisedWeight:
    return QuantisedWeight(to_gpu(weight.data), weight.format, weight.shape, weight.layout)


def decoded_product() -> tuple[Callable[[], Any], Any, Any]:
    """Recipe torch decodes the weight to bfloat16 first."""
    weight, x = random_weight("Q4_0", 96, 512), inputs.bell((9, 512), 3)
    device, given, out = on_device(weight), to_gpu(x), apart((9, 96))
    expected = quantised_linear(x, weight, recipe="torch", k_slices=1)
    return lambda: quantised_linear(given, device, recipe="torch", k_slices=1, out=out), out, expected


def attended() -> tuple[Callable[[], Any], Any, Any]:
    q, k, v = (random_bf16(seed, 1, n, heads, 64) for seed, (n, heads) in enumerate(((3, 4), (21, 2), (21, 2))))
    given, out = tuple(map(to_gpu, (q, k, v))), apart(q.shape)
    return lambda: attention(*given, out=out), out, attention(q, k, v)


def cached_block() -> tuple[Callable[[], Any], Any, Any]:
    """Keys into slots of a cache, under a recipe whose last roundings the chain does not do (k and v in memory in between)."""
    x, weight = inputs.heavy((4, 192), 1), inputs.bell((6 * 64, 192), 2, 0.05)
    norms = inputs.norm_weight(192, 1, 8.0), inputs.norm_weight(64, 2, 6.0), inputs.norm_weight(64, 3, 96.5)
    cos, sin = cufuse.rope_tables(np.arange(4), 64)
    slots = np.array([3, 0, 7, 5])
    given = (x, norms[0], tuple(np.split(weight, (256, 320))), *norms[1:])
    options: dict[str, Any] = {"heads": 4, "k_slices": 1, "cos": cos, "sin": sin}
    q, k, v = cufuse.rms_norm_qkv(*given, **options)
    caches = [np.zeros((8, 1, 64), bfloat16) for _ in "kv"]
    for cache, value in zip(caches, (k, v), strict=True):
        cache[slots] = value
    on_gpu = tuple(map(to_gpu, given))
    named = {name: to_gpu(value) for name, value in options.items()} | {"cache_slots": to_gpu(slots)}
    # rows of q apart from each other as no kernel writes them: one operation after the other, q copied at the end
    outs = (apart(q.shape), *map(to_gpu, caches))
    return lambda: cufuse.rms_norm_qkv(*on_gpu, **named, out=outs), outs, (q, *caches)


@pytest.mark.parametrize("make", [product, cast, decoded_product, attended, cached_block])
def test_a_graph_does_not_meet_what_the_pool_gave_to_others(make: Callable[[], Any]) -> None:
    """Captured, then the stream's part of the pool is emptied, taken anew and filled; then replayed."""
    gpu = gpu_support.cupy()
    call, out, expected = make()
    graph, stream = gpu_support.captured(call)
    outs = out if isinstance(out, tuple) else (out,)
    with stream:
        gpu.get_default_memory_pool().free_all_blocks()
        others = [gpu.full(size, 0x5A, np.uint8) for size in (512, 4096, 1 << 16, 1 << 20) for _ in range(8)]
        for one in outs:
            codes(one)[...] = 0
        graph.launch(stream)
        stream.synchronize()
        assert all(bool((other == 0x5A).all()) for other in others), "the graph wrote into memory of others"
    for one, other in zip(outs, expected if isinstance(expected, tuple) else (expected,), strict=True):
        demand_same(AREA, gpu.ascontiguousarray(codes(one)).view(one.dtype), other, make.__name__)


@pytest.mark.parametrize(("recipe", "packed"), [("torch", True), ("block-scaled", False)])
def test_a_weight_is_not_repacked_in_a_capture(recipe: str, packed: bool) -> None:
    gpu = gpu_support.cupy()
    weight, x = random_weight("Q4_0", 96, 512), to_gpu(inputs.bell((9, 512), 3))
    device = on_device(weight.packed() if packed else weight)
    expected = quantised_linear(x, device, recipe=recipe)
    stream = gpu.cuda.Stream(non_blocking=True)
    gpu.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        with pytest.raises(ValueError, match="before the capture"):
            quantised_linear(x, device, recipe=recipe)
        stream.end_capture()
    demand_same(AREA, quantised_linear(x, device, recipe=recipe), expected, "after the refusal")


def test_a_fresh_stream_with_work_on_the_way() -> None:
    """A block that the pool gives back may still be written to by the stream's earlier work: counters must not lie there."""
    gpu = gpu_support.cupy()
    x, weight = inputs.heavy((9, 1024), 1), inputs.bell((6 * 128, 1024), 2, 0.05)
    norms = inputs.norm_weight(1024, 1, 8.0), inputs.norm_weight(128, 2, 6.0), inputs.norm_weight(128, 3, 96.5)
    given, options = (x, norms[0], weight, *norms[1:]), {"heads": 4, "k_slices": 1}
    expected = cufuse.rms_norm_qkv(*given, **options)
    on_gpu = tuple(map(to_gpu, given))
    cufuse.rms_norm_qkv(*on_gpu, **options)  # compiled and loaded
    gpu.cuda.Device().synchronize()
    stream = gpu.cuda.Stream(non_blocking=True)
    with stream:
        held = gpu.empty(1 << 24, np.uint32)
        for _ in range(200):
            held.fill(1)  # milliseconds of work
        former = gpu.empty(4096, np.uint8)
        former.fill(0xFF)
        del former  # the next 4096 bytes of this stream
        found = cufuse.rms_norm_qkv(*on_gpu, **options)
        stream.synchronize()
    for one, other in zip(found, expected, strict=True):
        demand_same(AREA, one, other, "a fresh stream")


def test_threads_on_one_stream() -> None:
    """Calls of several launches, which share the stream's workspace, from eight threads at once."""
    x, weights = inputs.bell((6, 512), 1), [inputs.bell((256, 512), seed, 0.05) for seed in range(8)]
    expected = [cufuse.linear(x, weight, k_slices=4) for weight in weights]
    given, on_gpu = to_gpu(x), [to_gpu(weight) for weight in weights]
    cufuse.linear(given, on_gpu[0], k_slices=4)
    found: list[list[Any]] = [[] for _ in weights]
    begin = threading.Barrier(len(weights))

    def work(index: int) -> None:
        begin.wait()
        for _ in range(100):
            found[index].append(cufuse.linear(given, on_gpu[index], k_slices=4))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(weights))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, other in zip(found, expected, strict=True):
        assert len(results) == 100
        for one in results:
            demand_same(AREA, one, other, "threads on one stream")


def product_of_float32(seed: int) -> tuple[np.ndarray, ...]:
    return inputs.heavy((5, 256), seed).astype(np.float32) * np.float32(1.01), inputs.bell((48, 256), seed + 1, 0.05)


REPEATED: dict[str, tuple[Callable[..., Any], Callable[[int], tuple[np.ndarray, ...]], dict[str, Any]]] = {
    "linear": (cufuse.linear, lambda seed: (inputs.bell((5, 256), seed), inputs.bell((48, 256), seed + 1, 0.05)), {"k_slices": 2}),
    "linear, two launches": (cufuse.linear, product_of_float32, {"recipe": "float32"}),
    "rms_norm": (cufuse.rms_norm, lambda seed: (inputs.heavy((5, 256), seed), inputs.norm_weight(256, seed + 1, 8.0)), {}),
    "add_rms_norm": (
        cufuse.add_rms_norm,
        lambda seed: (inputs.heavy((5, 256), seed), inputs.heavy((5, 256), seed + 1), inputs.norm_weight(256, seed + 2, 8.0)),
        {},
    ),
}


@pytest.mark.parametrize("name", REPEATED)
def test_repeated_calls(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches that are remembered: with other contents, from a thread, on another stream, in a graph."""
    gpu = gpu_support.cupy()
    monkeypatch.setattr(_repeat, "_calls", {})
    function, made, options = REPEATED[name]
    given = tuple(map(to_gpu, made(1)))
    out = function(*given, **options)
    outs = out if isinstance(out, tuple) else (out,)

    def call() -> None:
        function(*given, **options, out=out)

    def demand_followed(seed: int, run: Callable[[], Any], what: str) -> None:
        arrays = made(seed)
        expected = function(*arrays, **options)
        for one, other in zip(given, arrays, strict=True):
            codes(one)[...] = codes(to_gpu(other))
        for one in outs:
            codes(one)[...] = 0
        gpu.cuda.Device().synchronize()
        run()
        gpu.cuda.Device().synchronize()
        for one, other in zip(outs, expected if isinstance(expected, tuple) else (expected,), strict=True):
            demand_same(AREA, one, other, f"{name}, {what}")

    def from_a_thread() -> None:
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()

    for seed in range(2, 6):
        demand_followed(seed, call, "again")
    demand_followed(6, from_a_thread, "from a thread")
    stream = gpu.cuda.Stream(non_blocking=True)
    with stream:
        for seed in range(7, 11):
            demand_followed(seed, call, "on a stream")
        stream.begin_capture()
        call()
        graph = stream.end_capture()
    demand_followed(11, lambda: graph.launch(stream), "in a graph")
    demand_followed(12, call, "after the graph")
    assert {known[0] for known in _repeat._calls} == {launch.current_stream(), stream.ptr}
