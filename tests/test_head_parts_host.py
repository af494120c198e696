"""Norm, projection and heads of a few rows in one launch: the kernel's text run on the host, bit for bit the emulation."""

from collections.abc import Iterator

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_linear, _gpu_norm_linear, _gpu_qkv, launch
from tests import host_gpu, linear_on_host
from tests.host_gpu import HostGpu
from tests.linear_on_host import demand_noticed
from tests.test_block_on_host import block, demand_block, on_gpu
from tests.test_device_path import RECIPES
from tests.witnesses import demand_bits, same_bits

pytestmark = pytest.mark.skipif(linear_on_host.COMPILER is None, reason="g++ is needed to run a kernel's text on the host")

STILL = {"cos": None, "sin": None}
BARE = {"q_norm_weight": None, "k_norm_weight": None}


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> HostGpu:
    return host_gpu.with_tensor_cores(tmp_path_factory)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, machines: HostGpu) -> Iterator[HostGpu]:
    monkeypatch.setattr(_gpu_linear, "_plans", {})
    monkeypatch.setattr(_gpu_qkv, "_calls", {})
    for found in host_gpu.installed_with_tensor_cores(monkeypatch, machines):
        found.tensor_cores.launched.clear()
        yield found


@pytest.mark.parametrize(
    ("name", "tokens", "hidden", "width", "cluster", "changed"),
    [
        ("torch", 1, 192, 32, 4, {}),
        ("torch", 3, 128, 64, 2, {"residual": None}),
        ("torch-rms-norm", 16, 192, 16, 8, {"residual": None}),
        ("torch", 21, 192, 32, 4, {}),
        ("torch", 29, 128, 64, 2, {"residual": None}),  # two heads a warp, one of some
        ("torch", 64, 128, 16, 8, STILL),
        ("torch", 64, 128, 64, 2, STILL),
        ("batch-invariant", 5, 128, 32, 4, BARE),
        ("torch-rms-norm", 8, 128, 128, 2, {"static_weights": True}),
        ("torch-rms-norm", 32, 128, 32, 4, {"static_weights": True}),
        ("torch-rms-norm", 33, 128, 128, 2, {"static_weights": True}),
    ],
)
def test_heads_in_the_same_launch(
    gpu: HostGpu, monkeypatch: pytest.MonkeyPatch, name: str, tokens: int, hidden: int, width: int, cluster: int,
    changed: dict[str, object],
) -> None:  # fmt: skip
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 2048 // width)
    monkeypatch.setattr(_gpu_norm_linear, "_HEADS_WIDTHS", (width,))
    for seed in (1, 2):
        gpu.tensor_cores.seed = seed
        demand_block(block(RECIPES[name], tokens=(tokens,), dimensions=128, seed=seed, hidden=hidden) | changed, f"seed {seed}")
    assert not gpu.launched
    assert all(f" by {cluster}, " in kernel.name for kernel in gpu.tensor_cores.launched)


@pytest.mark.parametrize(("tokens", "cluster", "heads"), [(20, 8, 4), (64, 8, 4), (31, 4, 4), (20, 8, 1), (64, 8, 1), (33, 4, 1)])
def test_short_rings(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch, tokens: int, cluster: int, heads: int) -> None:
    """A ring of few stages that goes round several times; with one head there are fewer tiles than rows."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 1024)
    monkeypatch.setattr(_gpu_norm_linear, "_HEADS_WIDTHS", (128 // cluster,))
    monkeypatch.setattr(_gpu_norm_linear, "_ROOM", 170 * 1024)
    given = block(RECIPES["torch"], tokens=(tokens,), dimensions=128, hidden=1088) | {"residual": None}
    if heads == 1:
        given |= {"qkv_weight": np.ascontiguousarray(given["qkv_weight"][: 3 * 128]), "heads": 1}
    for seed in (1, 2):
        gpu.tensor_cores.seed = seed
        demand_block(given, f"seed {seed}")
    assert not gpu.launched
    assert all(f" by {cluster}, " in kernel.name for kernel in gpu.tensor_cores.launched)


def test_tiles_of_several_heads(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """48 columns a CTA: three heads of eight, of q, k and v mixed; slots, and outputs in one buffer."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 32)
    monkeypatch.setattr(_gpu_norm_linear, "_HEADS_WIDTHS", (48,))
    given = block(RECIPES["torch"], tokens=(11,), dimensions=128, hidden=128) | {"residual": None}
    weight = given["qkv_weight"]
    given |= {"qkv_weight": np.ascontiguousarray(weight[: 6 * 128]), "heads": 2}
    demand_block(given, "two heads each")
    q, k, v = cufuse.rms_norm_qkv(**given)[:3]
    slots = np.array([4, -1, 0, 7, 2, 100, 5, 1, 8, 3, 6])
    both = np.full((9, 2, 2, 128), 0.5, q.dtype)
    named = {key: on_gpu(value) for key, value in given.items()}
    caches = on_gpu(both[:, 0]), on_gpu(both[:, 1])
    found = cufuse.rms_norm_qkv(**named, cache_slots=on_gpu(slots), out=(None, *caches))
    expected = np.full_like(both, 0.5)
    for token, slot in enumerate(slots):
        if 0 <= slot < 9:
            expected[slot, 0], expected[slot, 1] = k[token], v[token]
    demand_bits(both, expected)
    demand_bits(found[0].host, q)
    assert not gpu.launched
    assert all("rotated by 8, " in kernel.name for kernel in gpu.tensor_cores.launched)


def test_more_rows_than_tiles(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is somebody's: none is left that all CTAs would wait for in vain, and then normalise each for itself."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    looked = "const u64 missing = all & ~*seen;"
    # clusters run one after the other here: those that have ended must have said that their rows are there
    trusted = """u64 missing = all & ~*seen;
        for (int r = 0; r < a.m; ++r)
            if ((missing >> r & 1) && r % gridDim.x < blockIdx.x / CLUSTER * CLUSTER) {
                missing &= ~(1ull << r);
                a.normalised[r * COLUMNS] = 0x7FFF;
            }
    """
    before = gpu.tensor_cores.change

    def change(source: str) -> str:
        assert looked in source
        return before(source).replace(looked, trusted)

    monkeypatch.setattr(gpu.tensor_cores, "change", change)
    demand_block(block(RECIPES["torch"], tokens=(64,), dimensions=128) | {"residual": None}, "16 tiles")
    assert not gpu.launched


def test_clusters_that_do_not_fit(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that cannot run all clusters at once gets the heads' own launch."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 32)
    monkeypatch.setattr(linear_on_host.Prepared, "clusters_at_once", lambda self: 7)
    demand_block(block(RECIPES["torch"], tokens=(2,), dimensions=128), "seven clusters")
    assert {kernel.source for kernel in gpu.launched} == {"heads.cu"}


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("if (own() > 0) barrier_wait(barrier, 0);", ""),  # finished before it is there
        ("barrier_init(barrier, 4 * 32 + 1)", "barrier_init(barrier, 1)"),  # tables are not waited for
        ("brought() const { barrier_arrive(barrier); }", "brought() const {}"),  # nobody says that they are there
        ("row / CLUSTER * CLUSTER_HEADS", "row % CLUSTER * CLUSTER_HEADS"),  # two tokens in one place
    ],
)
def test_faults_are_noticed(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch, right: str, wrong: str) -> None:
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 32)
    given = block(RECIPES["torch"], tokens=(9,), dimensions=128) | {"residual": None}
    expected = cufuse.rms_norm_qkv(**given)
    header = (linear_on_host.compiler.source_folder() / "head_parts.cuh").read_text(encoding="utf-8")

    def same(seed: int) -> bool:
        monkeypatch.setattr(_gpu_qkv, "_calls", {})
        gpu.tensor_cores.seed = seed
        found = cufuse.rms_norm_qkv(**{name: on_gpu(value) for name, value in given.items()})
        return all(same_bits(one.host, other) for one, other in zip(found, expected, strict=True) if other is not None)

    monkeypatch.setattr(gpu.tensor_cores, "change", gpu.tensor_cores.change)
    demand_noticed(gpu.tensor_cores, right, wrong, same, lambda text: text.replace('#include "head_parts.cuh"', header))
