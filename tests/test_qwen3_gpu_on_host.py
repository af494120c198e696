"""The whole decoder's way on a GPU, run on the host: every kernel's text, caches, the captured step, against the emulation.

The machines are tests/host_gpu.py and tests/linear_on_host.py; CuPy is a stand-in over NumPy. The recipes here take the correctly
rounded root and exponential, since the chip's own tables are not on the host.
"""

import contextlib
import ctypes
import functools
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _driver, _gpu_decoder, _gpu_gemm, _gpu_linear, _gpu_qkv, launch
from cufuse._model_config import ModelConfig
from cufuse.qwen3 import Qwen3
from cufuse.qwen3.gpu_greedy import GreedyGraph
from cufuse.qwen3.weights import assemble
from tests import host_gpu, linear_on_host
from tests.golden import inputs
from tests.witnesses import demand_bits

pytestmark = [
    pytest.mark.skipif(linear_on_host.COMPILER is None, reason="g++ is needed to run a kernel's text on the host"),
    pytest.mark.filterwarnings("ignore::cufuse.AssumedSlicesWarning"),
]
CONFIG = ModelConfig(
    model_type="qwen3", hidden_size=64, num_attention_heads=2, num_key_value_heads=1, head_dim=64, num_hidden_layers=2,
    rms_norm_eps=1e-6, rope_theta=1e6, vocab_size=96, intermediate_size=96, max_position_embeddings=64, name="tiny",
)  # fmt: skip
CORRECT = {"rsqrt": "correct"}
EXACT = {"exponential": "correct"}


def exact(name: str, **changes: Any) -> cufuse.Recipe:
    """A named recipe without the chip's tables, one slice of K."""
    recipe = cufuse.recipes[name]
    dense = {"dense": {"k_slices": 1}} | ({"mlp_norm": CORRECT} if recipe.mlp_norm is not None else {})
    return recipe.derive(
        f"exact {name}", norm=CORRECT, head_norm=CORRECT, gemm={"k_slices": 1}, attention=EXACT, mlp=EXACT, **dense, **changes
    )


def tiny() -> Qwen3:
    def tensor(name: str) -> np.ndarray:
        seed, kind = inputs.seed_of("tiny", name), name.split(".")[-2]
        hidden, mlp = 64, 96
        shapes = {"embed_tokens": (96, hidden), "lm_head": (96, hidden), "q_proj": (128, hidden), "k_proj": (64, hidden),
                  "v_proj": (64, hidden), "o_proj": (hidden, 128), "gate_proj": (mlp, hidden), "up_proj": (mlp, hidden),
                  "down_proj": (hidden, mlp)}  # fmt: skip
        if kind in shapes:
            return inputs.bell(shapes[kind], seed, 0.5 if kind == "embed_tokens" else 0.12)
        return inputs.norm_weight(64, seed, 40.0 if kind == "k_norm" else 3.0)

    return Qwen3(assemble(CONFIG, tensor, {"source": "tiny", "synthetic": True}))


class DeviceArray(np.ndarray):
    """cupy.ndarray over host memory."""

    def __new__(cls, shape: Any, dtype: Any = float, memptr: Any = None) -> "DeviceArray":
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return super().__new__(cls, shape, dtype, (ctypes.c_char * size).from_address(memptr.ptr))

    @property
    def data(self) -> Any:  # type: ignore[override]
        return host_gpu.Pointer(self.__array_interface__["data"][0], 0)

    @property
    def device(self) -> Any:
        return host_gpu.Device(0)

    def get(self) -> np.ndarray:
        return np.array(self)

    def __setitem__(self, key: Any, value: Any) -> None:
        if Stream.capturing is None:
            super().__setitem__(key, value)
        else:
            Stream.capturing.append((lambda _: np.ndarray.__setitem__(self, key, value), b""))


class Stream:
    """cupy.cuda.Stream: what is launched while capturing is kept, not run."""

    ptr = 0
    capturing: list[tuple[Any, bytes]] | None = None

    def __init__(self, non_blocking: bool = False) -> None:
        pass

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def is_capturing(self) -> bool:
        return Stream.capturing is not None

    def begin_capture(self) -> None:
        Stream.capturing = []

    def end_capture(self) -> Any:
        kept, Stream.capturing = Stream.capturing or [], None
        assert kept
        return types.SimpleNamespace(launch=lambda stream: [prepared(arguments) for prepared, arguments in kept])


def _on_device(function: Any, *given: Any, **named: Any) -> DeviceArray:
    return function(*given, **named).view(DeviceArray)


def pretended_cupy() -> Any:
    cupy: Any = types.ModuleType("cupy")
    cupy.ndarray = DeviceArray
    cupy.dtype = np.dtype

    def empty(shape: Any, dtype: Any = float) -> Any:
        host = np.empty(shape, dtype)
        host.view(np.uint8).fill(0xA5) if host.ndim else None
        return host.view(DeviceArray)

    cupy.empty = empty
    for function in (np.zeros, np.arange, np.tile, np.ascontiguousarray):
        setattr(cupy, function.__name__, functools.partial(_on_device, function))
    cupy.asarray = lambda x, dtype=None: np.array(x, dtype).view(DeviceArray)
    runtime = types.SimpleNamespace(memGetInfo=lambda: (1 << 30, 1 << 30))
    stream = Stream()
    cupy.cuda = types.SimpleNamespace(get_current_stream=lambda: stream, Stream=Stream, runtime=runtime)
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_bytes=lambda: 0)
    return cupy


class Recorded:
    """A prepared launch that is run, or kept while a stream captures. What has an address within the stream's workspaces has to be
    launched by ``launch.one_by_one``: threads on one stream share them."""

    shared = 0  # such launches

    def __init__(self, prepared: Any, workspaces: list[np.ndarray]) -> None:
        self.prepared, self.workspaces = prepared, workspaces

    def __call__(self, arguments: bytes) -> None:
        words = set(np.frombuffer(arguments, np.uint64, len(arguments) // 8).tolist())
        if any(one.ctypes.data <= word < one.ctypes.data + one.nbytes for word in words for one in self.workspaces):
            Recorded.shared += 1
            assert launch._launching.locked(), "a launch with the stream's workspace, and another thread's may come between"
        if Stream.capturing is None:
            self.prepared(arguments)
        else:
            Stream.capturing.append((self.prepared, arguments))


OURS = ("attention_", "softmax", "swiglu", "add.", "gather", "argmax", "linear_", "rms_norm_linear", "sum_slices", "split_float32",
        "quantised_linear")  # fmt: skip


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    plain = host_gpu.HostGpu(tmp_path_factory.mktemp("host"))
    plain.tensor_cores = linear_on_host.HostGpu(tmp_path_factory.mktemp("tensor_cores"))
    return plain, plain.tensor_cores


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch, machines: tuple[Any, Any]) -> Iterator[Any]:
    plain, tensor = machines
    for _ in host_gpu.installed(monkeypatch, plain):
        found = pretended_cupy()
        monkeypatch.setitem(__import__("sys").modules, "cupy", found)

        def prepare(kernel: Any, device: int, grid: Any, **options: Any) -> Recorded:
            machine = tensor if kernel.source.startswith(OURS) else plain
            return Recorded(machine.prepare(kernel, device, grid, **options), tensor._workspaces)

        counters = np.zeros(4096, np.uint8).ctypes
        kept: list[Any] = []  # a graph holds addresses

        def temporary(shape: Any, dtype: Any, purpose: str, kept: list[Any] = kept, found: Any = found) -> Any:
            kept.append(found.empty(shape, dtype))
            return kept[-1]

        for name, value in (
            ("prepare", prepare),
            ("workspace", tensor.workspace),
            ("temporary", temporary),
            ("counters", lambda device, held=counters: held.data),
            ("current_device", lambda: 0),
            ("on_device", lambda device: contextlib.nullcontext()),
        ):
            monkeypatch.setattr(launch, name, value)
        monkeypatch.setattr(launch, "current_stream", lambda: 0)
        monkeypatch.setattr(_driver, "tensor_map", linear_on_host.tensor_map)
        monkeypatch.setattr(_driver, "relaxed_capture", contextlib.nullcontext)
        monkeypatch.setattr(_gpu_linear, "_plans", {})
        monkeypatch.setattr(_gpu_qkv, "_calls", {})
        monkeypatch.setattr(_gpu_gemm, "asked_slices", lambda m, n, k: 1)
        yield found


@pytest.mark.parametrize("name", ["torch", "late-rounding", "float32", "vllm-0.20"])
def test_intermediates(cupy: Any, name: str) -> None:
    recipe, model = exact(name), tiny()
    ids = np.arange(2 * 5).reshape(2, 5) * 7 % 96
    expected: dict[str, Any] = {}
    found: dict[str, Any] = {}
    logits = model.forward(ids, recipe=recipe, intermediates=expected)
    on_gpu = model.forward(cupy.asarray(ids), recipe=recipe, intermediates=found)
    missing = [one for one in expected if one not in found]
    assert {one.rpartition(".")[2] for one in missing} == {"scores", "scaled_scores", "activated"}
    for key, value in found.items():
        demand_bits(np.array(value), expected[key], key)
    demand_bits(np.array(on_gpu), logits, "logits")


@pytest.mark.parametrize(("name", "batch"), [("torch", 3), ("late-rounding", 1)])
def test_greedy_graph(cupy: Any, machines: tuple[Any, Any], name: str, batch: int) -> None:
    machines[1].launched.clear()
    recipe, model = exact(name), tiny()
    ids = (np.arange(batch * 3).reshape(batch, 3) * 11 + 5) % 96
    expected = model.generate(ids, 6, recipe=recipe)
    seen: list[int] = []
    found = model.generate(cupy.asarray(ids), 6, recipe=recipe, on_tokens=lambda step, tokens: seen.append(int(tokens[0])))
    assert np.array(found.tokens).tolist() == expected.tokens.tolist()
    demand_bits(np.array(found.logits), expected.logits, "logits")
    assert seen == expected.tokens[0].tolist()
    assert Recorded.shared > 0
    launched = {kernel.source for kernel in machines[1].launched}
    assert {"rms_norm_linear_sm90.cu", "attention_decode_scores.cu", "attention_decode_values.cu"} <= launched


def test_steps_that_are_interrupted_have_ended(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory goes back to the pool, for a stream that does not wait for theirs."""
    events: list[str] = []
    step = GreedyGraph.step
    monkeypatch.setattr(GreedyGraph, "step", lambda self: (events.append("step"), step(self)))
    monkeypatch.setattr(Stream, "synchronize", lambda self: events.append("synchronised"))

    def on_tokens(step: int, tokens: np.ndarray) -> None:
        if step == 2:
            events.append("interrupted")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny().generate(cupy.asarray(np.array([4, 90, 17])), 5, recipe=exact("torch"), on_tokens=on_tokens)
    assert events[-2:] == ["interrupted", "synchronised"]
    assert events.count("step") == 2


def test_a_capture_that_fails_is_ended(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    argmax = _gpu_decoder.argmax

    def fails_in_capture(*given: Any) -> Any:
        if Stream.capturing is not None:
            raise MemoryError("no room")
        return argmax(*given)

    ids = np.array([4, 90, 17])
    with monkeypatch.context() as patch:
        patch.setattr(_gpu_decoder, "argmax", fails_in_capture)
        with pytest.raises(MemoryError, match="no room"):
            tiny().generate(cupy.asarray(ids), 3, recipe=exact("torch"))
    assert Stream.capturing is None
    found = tiny().generate(cupy.asarray(ids), 3, recipe=exact("torch"))
    assert np.array(found.tokens).tolist() == tiny().generate(ids, 3, recipe=exact("torch")).tokens.tolist()


def test_a_pass_is_not_captured(cupy: Any) -> None:
    """Its intermediates come from the pool and are given to others when it is over."""
    model = tiny()
    ids = cupy.asarray(np.array([1, 2, 3]))
    cupy.cuda.get_current_stream().begin_capture()
    try:
        for call in (model.forward, lambda ids: model.generate(ids, 2)):
            with pytest.raises(ValueError, match="outside of the capture"):
                call(ids)
        assert Stream.capturing == []
    finally:
        Stream.capturing = None


@pytest.mark.parametrize(
    ("name", "one_order", "batch"),
    [("block-scaled", True, 1), ("block-scaled", True, 3), ("block-scaled", False, 1)],
)
def test_quantised_projections(
    cupy: Any, machines: tuple[Any, Any], name: str, one_order: bool, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the graph where head norms of q and k have one order, else step by step."""
    recipe, model = exact(name), tiny().quantised("Q4_0")
    if one_order:
        sums = {"sum_order": "torch-rms-norm", "contract": True, "mean": "divide"}
        recipe = recipe.derive("one order", head_norm=CORRECT | sums)
    replays: list[int] = []
    step = GreedyGraph.step
    monkeypatch.setattr(GreedyGraph, "step", lambda self: (replays.append(1), step(self)))
    ids = (np.arange(batch * 3).reshape(batch, 3) * 11 + 5) % 96
    expected = model.generate(ids, 4, recipe=recipe)
    found = model.generate(cupy.asarray(ids), 4, recipe=recipe)
    assert np.array(found.tokens).tolist() == expected.tokens.tolist()
    demand_bits(np.array(found.logits), expected.logits, "logits")
    assert len(replays) == (3 if one_order else 0)
    plain = tiny().generate(ids, 4, recipe=recipe)
    assert plain.logits.view(np.uint16).tolist() != expected.logits.view(np.uint16).tolist()
    with pytest.raises(TypeError, match="quantised already"):
        model.quantised("Q8_0")


def test_step_by_step_where_heads_are_float32(cupy: Any) -> None:
    recipe, model = exact("float32"), tiny()
    ids = np.array([4, 90, 17])
    expected = model.generate(ids, 4, recipe=recipe)
    found = model.generate(cupy.asarray(ids), 4, recipe=recipe)
    assert np.array(found.tokens).tolist() == expected.tokens.tolist()
    demand_bits(np.array(found.logits), expected.logits, "logits")


def test_caches_of_the_other_side(cupy: Any) -> None:
    model = tiny()
    ids = np.array([1, 2, 3])
    with pytest.raises(TypeError, match="gpu=True"):
        model.forward(cupy.asarray(ids), cache=model.new_cache(5))
    with pytest.raises(TypeError, match="on the host"):
        model.forward(ids, cache=model.new_cache(5, gpu=True))
    with pytest.raises(ValueError, match=r"0\.\.95"):
        model.forward(cupy.asarray(np.array([96])))


def test_too_little_memory_on_the_device(cupy: Any) -> None:
    cupy.cuda.runtime.memGetInfo = lambda: (1000, 1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "device_name", lambda device: "a small GPU")
        with pytest.raises(MemoryError, match="a small GPU"):
            tiny().forward(cupy.asarray(np.array([1])))
