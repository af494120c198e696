"""The emulation against what PyTorch gave on an H200: 0 differing bits, and how many outputs were compared.

The files are in tests/golden; tests/golden/record.py made them, with PyTorch and transformers alone. Where only digests of
rows are stored, a row counts as compared with all its outputs: its digest covers every bit.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors

import cufuse
from cufuse import qkv
from cufuse.norm import reciprocal_rms
from tests.golden import cases, inputs

FOLDER = Path(__file__).parent / "golden"
COMPARED: Counter[str] = Counter()


def load(name: str) -> dict[str, np.ndarray]:
    with safetensors.safe_open(FOLDER / f"{name}.safetensors", "numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view({2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize])


def demand_equal(area: str, found: np.ndarray, expected: np.ndarray, what: str) -> None:
    """0 differing bits, the first one named; counts the outputs."""
    found, expected = bits(found).reshape(-1), bits(expected).reshape(-1)
    assert found.shape == expected.shape, what
    differ = np.flatnonzero(found != expected)
    COMPARED[area] += found.size
    if differ.size:
        first = differ[0]
        both = f"{found[first]:#x}, PyTorch {expected[first]:#x}"
        pytest.fail(f"{what}: {differ.size} of {found.size} differ, first at {first}: {both}")


def demand_stored(area: str, found: np.ndarray, tensors: dict[str, np.ndarray], key: str) -> None:
    """Against bits where they are stored, against the digests of the rows otherwise."""
    if f"{key}/bits" in tensors:
        demand_equal(area, found, tensors[f"{key}/bits"], key)
        return
    differ = np.flatnonzero(inputs.row_digests(found) != tensors[f"{key}/digest"])
    COMPARED[area] += found.size
    assert differ.size == 0, f"{key}: {differ.size} of {len(found)} rows differ, first {differ[:5]}"


@pytest.fixture(scope="module")
def norms() -> dict[str, np.ndarray]:
    return load("norms")


@pytest.mark.parametrize("k", sorted({k for _, k in cases.NORM_CASES}))
def test_norms(norms: dict[str, np.ndarray], k: int) -> None:
    for m in (m for m, columns in cases.NORM_CASES if columns == k):
        x, weight = cases.norm_input(m, k)
        assert (inputs.row_digests(x) == norms[f"input/m{m}_k{k}"]).all(), "the seeded inputs are not those of the recording"
        for recipe, key in (("torch", "hf"), ("torch-rms-norm", "f")):
            found = cufuse.rms_norm(x, weight, eps=cases.EPS, recipe=recipe)
            demand_stored(recipe + " norm", found, norms, f"{key}/m{m}_k{k}")
            factor = reciprocal_rms(x.astype(np.float32), cases.EPS, cufuse.recipes[recipe].norm)
            demand_equal(recipe + " factor", factor, norms[f"{key}/m{m}_k{k}/factor"], f"{key}/m{m}_k{k}, factor")


@pytest.mark.parametrize("k", [64, 128, 1000, 1024, 4096])
def test_special_rows_and_float32_weights(norms: dict[str, np.ndarray], k: int) -> None:
    rows, weight = inputs.special_rows(k), cases.norm_input(8, k)[1]
    for recipe, key in (("torch", "hf"), ("torch-rms-norm", "f")):
        found = cufuse.rms_norm(rows, weight, eps=cases.EPS, recipe=recipe)
        demand_equal("special rows", found, norms[f"special_{key}/k{k}"], f"special_{key}/k{k}")
    wide = weight.astype(np.float32) * np.float32(1.001)
    found = cufuse.rms_norm(cases.norm_input(5, k)[0], wide, eps=cases.EPS)
    demand_equal("float32 weights", found, norms[f"float32_weight_hf/k{k}"], f"float32 weight, k{k}")


def test_casts() -> None:
    tensors = load("casts")
    x = cases.cast_input()
    codes = bits(cufuse.round_to_bf16(x))
    demand_equal("casts on CUDA", codes, tensors["cuda"], "cast on CUDA")
    numbers = ~np.isnan(x)
    demand_equal("casts on a CPU", codes[numbers], tensors["cpu"].reshape(-1)[numbers], "cast on a CPU")
    # PyTorch's vectorised loop on a CPU gives another NaN than its GPU: not a bit that a recipe promises
    assert set(tensors["cpu"].reshape(-1)[~numbers]) == {0xFFFF}
    # PyTorch rounds float64 twice; ours once: the known deviation is still there
    near = np.array([np.float64(1) + np.ldexp(1.0, -8) + np.ldexp(1.0, -40)])
    assert tensors["float64_near_tie_cuda"].item() == 0x3F80
    assert bits(cufuse.round_to_bf16(near)).item() == 0x3F81


def test_residual_sum() -> None:
    tensors = load("residual")
    for m, k in cases.RESIDUAL_SHAPES:
        x, other = cases.residual_input(m, k)
        normalised, total = cufuse.add_rms_norm(x, other, cases.norm_input(m, k)[1], eps=cases.EPS)
        demand_equal("residual sums", total, tensors[f"sum/m{m}_k{k}"], f"sum {m}x{k}")
        demand_equal("torch norm", normalised, tensors[f"normalised/m{m}_k{k}"], f"norm of the sum {m}x{k}")


def products() -> Iterator[cases.Product]:
    return cases.products()


@pytest.mark.parametrize("case", list(products()), ids=lambda case: case.name)
def test_linear(case: cases.Product) -> None:
    """F.linear with cuBLAS's slices: recorded where the shape is a Qwen3 projection, else 6, 3, 4, 1 as cuBLASLt names them."""
    x, weight = case.inputs()
    expected = load_linear()[case.name]
    slices = cufuse_slices(case)
    found = cufuse.linear(x, weight[case.chosen()], k_slices=slices)
    demand_equal(f"linear, {'one slice' if slices == 1 else 'split K'}", found, expected, f"{case.name}, {slices} slices")


def cufuse_slices(case: cases.Product) -> int:
    from cufuse.emulation.cublas import recorded_slices

    if (case.n, case.k) == (1024, 8192):
        return {24: 6, 64: 3, 200: 4, 777: 1}[case.m]
    recorded = recorded_slices(case.m, case.n, case.k)
    assert recorded is not None, case
    return recorded


_LINEAR: dict[str, np.ndarray] = {}


def load_linear() -> dict[str, np.ndarray]:
    if not _LINEAR:
        _LINEAR.update(load("linear"))
    return _LINEAR


@pytest.mark.parametrize("form", ["separate", "packed"])
@pytest.mark.parametrize("block", cases.BLOCKS, ids=lambda block: block.name)
def test_block(block: cases.Block, form: str) -> None:
    """Hugging Face's norm, projections, head norms and rotation, stage by stage."""
    tensors = load("blocks")
    given = block.inputs()
    cos, sin = cufuse.rope_tables(np.arange(1000, 1000 + block.tokens), block.head_dim)
    demand_equal("rotary tables", cos, tensors[f"{block.name}/cos"], "cos")
    demand_equal("rotary tables", sin, tensors[f"{block.name}/sin"], "sin")
    heads = qkv.Heads(block.heads, block.kv_heads, block.head_dim)
    weight = given.pop("qkv_weight")
    weights = tuple(np.split(weight, np.cumsum(heads.rows)[:2])) if form == "separate" else (weight,)
    found = qkv.stages(given | {"cos": cos, "sin": sin}, weights, heads, cases.EPS, cufuse.recipes["torch"])
    assert tuple(found) == cases.STAGES
    for stage, value in found.items():
        demand_stored(f"block, {form}", value.reshape(block.tokens, -1), tensors, f"{block.name}/{form}/{stage}")
    one_call = cufuse.rms_norm_qkv(
        *(given[name] for name in ("x", "norm_weight")),
        weights if form == "separate" else weight,
        given["q_norm_weight"],
        given["k_norm_weight"],
        cos=cos,
        sin=sin,
        heads=block.heads,
    )
    for stage, value in zip(("q_rotated", "k_rotated", "v"), one_call, strict=True):
        demand_equal("one call", value, found[stage], stage)


def test_enough_was_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """At least five million outputs, printed. Runs last in this file; alone it says so."""
    if not COMPARED:
        pytest.skip("the other tests of this file did not run in this process")
    total = sum(COMPARED.values())
    with capsys.disabled():
        print("\noutputs compared with PyTorch on an H200, 0 differing bits:")
        for area, count in sorted(COMPARED.items()):
            print(f"  {area:24} {count:>12,}")
        print(f"  {'together':24} {total:>12,}")
    assert total >= 5_000_000
    assert ml_dtypes.bfloat16 == cufuse.bfloat16
