"""``rms_norm_qkv``'s chain of kernels run on the host: from the public call to the last store, bit for bit the emulation.

Nothing stands in for a kernel; the machines that run their texts are tests/host_gpu.py and tests/linear_on_host.py.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_linear, _gpu_norm_linear, _gpu_qkv, _gpu_qkv_chain, _gpu_qkv_steps, launch
from cufuse.bf16 import bfloat16
from tests import host_gpu, linear_on_host
from tests.golden import inputs
from tests.host_gpu import Array, HostGpu
from tests.linear_on_host import demand_noticed
from tests.test_device_path import RECIPES
from tests.witnesses import demand_bits, same_bits

pytestmark = pytest.mark.skipif(linear_on_host.COMPILER is None, reason="g++ is needed to run a kernel's text on the host")

HIDDEN, HEADS, KV_HEADS, D = 128, 4, 2, 64


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> HostGpu:
    return host_gpu.with_tensor_cores(tmp_path_factory)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, machines: HostGpu) -> Iterator[HostGpu]:
    monkeypatch.setattr(_gpu_linear, "_plans", {})
    monkeypatch.setattr(_gpu_qkv, "_calls", {})
    yield from host_gpu.installed_with_tensor_cores(monkeypatch, machines)


@pytest.fixture
def only_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("the operations were called one by one")

    monkeypatch.setattr(_gpu_qkv_steps, "rms_norm_qkv", refuse)


def block(
    recipe: Any, tokens: tuple[int, ...] = (2, 3), dimensions: int = D, seed: int = 1, hidden: int = HIDDEN
) -> dict[str, Any]:
    """Arguments of a call, with everything that a block can have."""
    dtype = np.float32 if recipe.rope.tables == "float32" else bfloat16
    count = int(np.prod(tokens))
    cos, sin = cufuse.rope_tables(np.arange(count).reshape(tokens), dimensions, dtype=dtype)
    return {
        "x": inputs.heavy((*tokens, hidden), seed),
        "norm_weight": inputs.norm_weight(hidden, seed + 1, 8.0),
        "qkv_weight": inputs.bell(((HEADS + 2 * KV_HEADS) * dimensions, hidden), seed + 2, 0.05),
        "q_norm_weight": inputs.norm_weight(dimensions, seed + 3, 6.0),
        "k_norm_weight": inputs.norm_weight(dimensions, seed + 4, 96.5),
        "cos": cos,
        "sin": sin,
        "residual": inputs.heavy((*tokens, hidden), seed + 5),
        "heads": HEADS,
        "head_dim": dimensions,
        "recipe": recipe,
        "k_slices": 1,
    }


def on_gpu(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(on_gpu(one) for one in value)
    return Array(value) if isinstance(value, np.ndarray) else value


def demand_block(given: dict[str, Any], what: str, bring: Callable[[Any], Any] = on_gpu) -> None:
    """The call on pretended arrays has the bits of the call on NumPy's."""
    expected = cufuse.rms_norm_qkv(**given)
    found = cufuse.rms_norm_qkv(**{name: bring(value) for name, value in given.items()})
    for name, one, other in zip(("q", "k", "v", "residual"), found, expected, strict=False):
        demand_bits(one.host, other, f"{what}: {name}")


# recipes whose head sums a warp can take, heads of 128 and 64
CHAINED = [
    *itertools.product(("torch", "vllm-0.20", "flashinfer", "late-rounding", "float32", "separate-k-norm", "gemma"), (128,)),
    *itertools.product(("torch-rms-norm", "batch-invariant", "nano-vllm"), (64, 128)),
]


@pytest.mark.parametrize(("name", "dimensions"), CHAINED)
def test_chain_of_every_recipe(gpu: HostGpu, only_the_chain: None, name: str, dimensions: int) -> None:
    given = block(RECIPES[name], dimensions=dimensions)
    rows = np.cumsum([HEADS, KV_HEADS]) * dimensions
    separate = {"qkv_weight": tuple(np.ascontiguousarray(part) for part in np.split(given["qkv_weight"], rows))}
    bare = {"q_norm_weight": None, "k_norm_weight": None}
    still = {"cos": None, "sin": None}
    kinds = {
        "packed": {},
        "separate": separate | {"residual": None, "heads": None},
        "no rotation": still,
        "no head norm": bare,
        "projection alone": bare | still | {"residual": None},
    }
    for what in kinds if name in ("torch", "late-rounding") else ("packed", "separate"):
        demand_block(given | kinds[what], f"{name}, {what}")


def test_heads_of_256_and_of_both_tables(gpu: HostGpu, only_the_chain: None) -> None:
    given = block(RECIPES["torch"], tokens=(17,), dimensions=256)
    demand_block(given, "two vectors a lane")
    cos, sin = cufuse.rope_tables(np.arange(17), 256, dtype=np.float32)
    demand_block(given | {"cos": cos, "sin": sin}, "float32 tables")
    demand_block(given | {"cos": cos}, "tables of two types")


@pytest.mark.parametrize(
    ("tokens", "hidden", "multiprocessors"), [(1, 576, 2), (1, 1088, 40), (3, 320, 2), (33, 192, 3), (64, 64, 70)]
)
def test_few_rows_in_one_launch(
    gpu: HostGpu, only_the_chain: None, monkeypatch: pytest.MonkeyPatch, tokens: int, hidden: int, multiprocessors: int
) -> None:
    """Norm and projection in one kernel: one row in every CTA, or a row in each; several tiles a CTA, stages that end with K."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(_gpu_norm_linear, "_WITH_HEADS", 0)
    recipe = RECIPES["torch"]
    gpu.launched.clear()
    gpu.tensor_cores.launched.clear()
    for seed, changed in ((1, {}), (2, {"residual": None}), (3, {"static_weights": True})):
        gpu.tensor_cores.seed = seed
        demand_block(block(recipe, tokens=(tokens,), dimensions=128, seed=seed, hidden=hidden) | changed, f"seed {seed}")
    assert {kernel.source for kernel in gpu.tensor_cores.launched} == {"rms_norm_linear_sm90.cu"}
    assert {kernel.source for kernel in gpu.launched} == {"heads.cu"}


@pytest.mark.parametrize(
    ("name", "tokens", "hidden", "multiprocessors", "variant"),
    [
        ("torch", 16, 448, 4, "16 rows in each CTA"),
        ("torch-rms-norm", 11, 192, 3, "16 rows in each CTA"),
        ("vllm-0.19", 2, 576, 2, "8 rows in each CTA"),
        ("flashinfer", 8, 320, 2, "8 rows in each CTA"),
        ("nano-vllm", 5, 1088, 4, "8 rows in each CTA"),
    ],
)
def test_few_rows_in_every_cta(
    gpu: HostGpu, only_the_chain: None, monkeypatch: pytest.MonkeyPatch, name: str, tokens: int, hidden: int,
    multiprocessors: int, variant: str,
) -> None:  # fmt: skip
    """A warp a row in each order of a sum, two rows a warp, pieces of unequal length."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(_gpu_norm_linear, "_WITH_HEADS", 0)
    gpu.tensor_cores.launched.clear()
    for seed, changed in ((1, {}), (2, {"residual": None, "static_weights": True})):
        gpu.tensor_cores.seed = seed
        demand_block(block(RECIPES[name], tokens=(tokens,), dimensions=128, seed=seed, hidden=hidden) | changed, f"seed {seed}")
    assert all(f", {variant}, " in kernel.name for kernel in gpu.tensor_cores.launched)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("barrier_wait(ring.pieces + there * 8, 0)", "(void)there"),  # rows are read before they have come
        ("(row & 7) << 4", "(row & 3) << 4"),  # written elsewhere than the products look for them
        ("piece * PIECE_LINES, barrier", "0, barrier"),  # every piece the first one
        ("blockIdx.x * TILE_N, stage * LINES);", "TILE_N, (stage + 1) * LINES);"),  # other weights into the cache than are copied
    ],
)
def test_faults_in_few_rows_are_noticed(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(_gpu_norm_linear, "_WITH_HEADS", 0)
    given = block(RECIPES["torch"], tokens=(9,), dimensions=128, hidden=192) | {"residual": None}
    expected = cufuse.rms_norm_qkv(**given)

    def same(seed: int) -> bool:
        monkeypatch.setattr(_gpu_qkv, "_calls", {})
        gpu.tensor_cores.seed = seed
        found = cufuse.rms_norm_qkv(**{name: on_gpu(value) for name, value in given.items()})
        return all(same_bits(one.host, other) for one, other in zip(found, expected, strict=True) if other is not None)

    monkeypatch.setattr(gpu.tensor_cores, "change", gpu.tensor_cores.change)
    demand_noticed(gpu.tensor_cores, right, wrong, same)


@pytest.mark.parametrize(("name", "dimensions"), [("torch", 64), ("vllm-0.19", 96)])
def test_what_a_warp_cannot_take_goes_one_by_one(gpu: HostGpu, name: str, dimensions: int) -> None:
    demand_block(block(RECIPES[name], dimensions=dimensions), name)


def test_outputs_in_one_buffer(gpu: HostGpu, only_the_chain: None) -> None:
    given = block(RECIPES["torch"], dimensions=128)
    expected = cufuse.rms_norm_qkv(**given)
    buffer = host_gpu.empty((2, 3, 9, 128), bfloat16)
    outs = (buffer[:, :, :4], buffer[:, :, 5:7], buffer[:, :, 7:], host_gpu.empty((2, 3, HIDDEN), bfloat16))
    named = {name: on_gpu(value) for name, value in given.items()}
    for _ in range(2):  # the second call is one that has been seen
        found = cufuse.rms_norm_qkv(**named, out=outs)
        for one, out, other in zip(found, outs, expected, strict=True):
            assert one is out
            demand_bits(one.host, other)
            if one is not outs[3]:
                one.host[...] = bfloat16(-1)
    assert (buffer.host[:, :, 4].view(np.uint8) == 0xA5).all()
    with pytest.raises(ValueError, match=r"out\[0\] overlaps x in memory"):
        cufuse.rms_norm_qkv(**{**named, "x": buffer[:, :, :1, :][:, :, 0]}, out=outs)


@pytest.mark.parametrize(("name", "dimensions"), [("torch", 128), ("torch", 64), ("late-rounding", 128)])
def test_slots_of_a_cache(gpu: HostGpu, name: str, dimensions: int) -> None:
    """Keys and values go to their slots, padding nowhere, all else stays; NumPy and kernels alike."""
    given = block(RECIPES[name], dimensions=dimensions)
    q, k, v, _ = cufuse.rms_norm_qkv(**given)
    slots = np.array([[4, -1, 0], [7, 2, 100]])
    for bring in (lambda one: one, on_gpu):
        # slots of two interleaved caches
        both = np.full((9, 2, KV_HEADS, dimensions), 0.5, q.dtype)
        caches = bring(both[:, 0]), bring(both[:, 1])
        named = {key: bring(value) for key, value in given.items()}
        found = cufuse.rms_norm_qkv(**named, cache_slots=bring(slots), out=(None, *caches, None))
        expected = np.full_like(both, 0.5)
        for token, slot in enumerate(slots.ravel()):
            if 0 <= slot < 9:
                expected[slot, 0], expected[slot, 1] = k.reshape(6, KV_HEADS, -1)[token], v.reshape(6, KV_HEADS, -1)[token]
        demand_bits(both, expected)
        demand_bits(getattr(found[0], "host", found[0]), q)
        assert found[1] is caches[0]


def test_slots_refused() -> None:
    given = block(RECIPES["torch"])
    cache = np.zeros((9, KV_HEADS, D), bfloat16)
    slots = np.arange(6).reshape(2, 3)
    for changed, error, message in (
        ({"cache_slots": slots}, ValueError, r"out\[1\] is None; cache_slots needs a K cache"),
        ({"cache_slots": slots.astype(np.int32)}, TypeError, r"cache_slots has dtype int32; needed is int64"),
        ({"cache_slots": slots[0], "out": (None, cache, cache.copy(), None)}, ValueError, r"cache_slots has shape \(3,\)"),
        ({"cache_slots": slots, "out": (None, cache, cache[:8].copy(), None)}, ValueError, r"two caches .* of one size"),
        ({"cache_slots": slots, "out": (None, cache[:, :1], cache[:, :1], None)}, ValueError, r"out\[1\] has shape \(9, 1, 64\)"),
    ):
        with pytest.raises(error, match=message):
            cufuse.rms_norm_qkv(**{**given, **changed})


def test_repeated_calls_notice_what_changed(gpu: HostGpu, only_the_chain: None) -> None:
    """Another type or shape is checked anew, other contents and other addresses are followed."""
    given = block(RECIPES["torch"], dimensions=128)
    named = {name: on_gpu(value) for name, value in given.items()}
    cufuse.rms_norm_qkv(**named)
    for seed in (11, 21):
        demand_block(block(RECIPES["torch"], dimensions=128, seed=seed), "other contents")
    named["x"].host[...] = inputs.heavy(named["x"].shape, 31)
    expected = cufuse.rms_norm_qkv(**{**given, "x": named["x"].host})
    demand_bits(cufuse.rms_norm_qkv(**named)[1].host, expected[1], "changed in place")
    with pytest.raises(TypeError, match="x has dtype float16"):
        cufuse.rms_norm_qkv(**{**named, "x": Array(named["x"].host.astype(np.float16))})
    with pytest.raises(ValueError, match="norm_weight has shape"):
        cufuse.rms_norm_qkv(**{**named, "norm_weight": named["norm_weight"][:64]})
    with pytest.raises(ValueError, match="recipe is 'touch'"):
        cufuse.rms_norm_qkv(**{**named, "recipe": "touch"})
    with pytest.raises(TypeError, match="heads is a list"):
        cufuse.rms_norm_qkv(**{**named, "heads": [4]})


def test_a_mistake_in_the_chain_is_not_hidden(gpu: HostGpu, only_the_chain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only Unsuited leads to the operations one by one."""
    given = {name: on_gpu(value) for name, value in block(RECIPES["torch"], dimensions=128).items()}
    for step in ("_norm_and_projection", "_heads"):
        with monkeypatch.context() as patch:
            patch.setattr(_gpu_qkv_chain.Chain, step, lambda *arguments: int("planted"))
            for _ in range(2):  # nor is it remembered
                with pytest.raises(ValueError, match="planted"):
                    cufuse.rms_norm_qkv(**given)
    cufuse.rms_norm_qkv(**given)


def spread(array: np.ndarray) -> Array:
    """The same values with a gap behind each."""
    host = np.zeros((*array.shape, 2), array.dtype)
    host[..., 0] = array
    return Array(host[..., 0])


@pytest.mark.parametrize("dimensions", [128, 64])  # what a chain takes, and what goes one by one
def test_strides_are_refused_before_anything_is_written(gpu: HostGpu, dimensions: int) -> None:
    given = block(RECIPES["torch"], dimensions=dimensions)
    expected = cufuse.rms_norm_qkv(**given)
    named = {name: on_gpu(value) for name, value in given.items()}
    outs = tuple(host_gpu.empty(one.shape, bfloat16) for one in expected)
    arrays = ("x", "norm_weight", "qkv_weight", "q_norm_weight", "k_norm_weight", "cos", "sin", "residual")
    for name in arrays:
        with pytest.raises(ValueError, match=rf"{name}(\[0\])? has a stride of 4 bytes along its last axis; the kernels need 2"):
            cufuse.rms_norm_qkv(**named | {name: spread(given[name])}, out=outs)
    for index in (0, 1, 3):
        with pytest.raises(ValueError, match=rf"out\[{index}\] has a stride of 4 bytes.*give a contiguous array"):
            cufuse.rms_norm_qkv(**named, out=(*outs[:index], spread(expected[index]), *outs[index + 1 :]))
    cache = host_gpu.empty((8, KV_HEADS, dimensions), bfloat16)
    slots, apart = np.arange(6).reshape(2, 3), np.arange(12).reshape(2, 6)[:, :3]
    for changed, caches, message in (
        ({"cache_slots": spread(slots)}, (cache, cache[::-1]), r"cache_slots has strides .*cupy.ascontiguousarray\(cache_slots\)"),
        ({"cache_slots": Array(apart)}, (cache, cache[::-1]), "cache_slots has strides .*one slot behind the other"),
        ({"cache_slots": Array(slots)}, (cache, spread(cache.host)), r"out\[2\] has a stride of 4 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            cufuse.rms_norm_qkv(**named | changed, out=(outs[0], *caches, outs[3]))
    for array in (*outs, cache):
        assert (array.host.view(np.uint8) == 0xA5).all()


def test_outputs_that_are_copied_to(gpu: HostGpu) -> None:
    """v in any strides, and q and k where neither norm nor rotation follows: one operation after the other."""
    for changed, free in (({}, (2,)), ({"q_norm_weight": None, "k_norm_weight": None, "cos": None, "sin": None}, (0, 1, 2))):
        given = block(RECIPES["torch"]) | changed
        expected = cufuse.rms_norm_qkv(**given)
        outs = [spread(np.zeros_like(one)) if index in free else None for index, one in enumerate(expected)]
        found = cufuse.rms_norm_qkv(**{name: on_gpu(value) for name, value in given.items()}, out=tuple(outs))
        for one, other in zip(found, expected, strict=True):
            demand_bits(one.host, other)
        assert not any(out.host.base[..., 1].any() for out in outs if out is not None)
