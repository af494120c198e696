"""``rope`` on a GPU: bits of Hugging Face's apply_rotary_pos_emb and of the emulation."""

from functools import partial
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse.bf16 import bfloat16
from cufuse.recipe import Rope
from tests import gpu_support
from tests.golden import inputs
from tests.gpu_support import Case, Guarded, against_numpy, demand_cases, demand_same, given_by, to_gpu, to_host, values

pytestmark = gpu_support.MARKS

HEADS = ((16, 8), (32, 8), (40, 8), (64, 8), (1, 1), (3, 2))
TORCH = cufuse.recipes["torch"]
DERIVED = [
    TORCH.derive("float32 tables, rounded on the fly", rope={"tables": "bfloat16"}),
    TORCH.derive("products unrounded", rope={"round_products": False}),
    TORCH.derive("products unrounded, float32 tables", rope={"round_products": False, "tables": "float32"}),
    TORCH.derive("products rounded, float32 tables", rope={"tables": "float32"}),
]
RECIPES = {recipe.name: recipe for recipe in (*{one.rope: one for one in cufuse.recipes.values()}.values(), *DERIVED)}


def tables(shape: tuple[int, ...], dimensions: int, rope: Rope, first: int = 1000) -> tuple[np.ndarray, np.ndarray]:
    positions = first + np.arange(int(np.prod(shape))).reshape(shape)
    dtype = np.float32 if rope.tables == "float32" else bfloat16
    return cufuse.rope_tables(positions, dimensions, dtype=dtype)


def rotate_by_hugging_face(q: Any, k: Any, cos: Any, sin: Any) -> tuple[Any, Any]:
    """apply_rotary_pos_emb takes [batch, heads, tokens, D]."""
    rotated = gpu_support.qwen3().apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return rotated[0].transpose(1, 2), rotated[1].transpose(1, 2)


@pytest.mark.parametrize("heads", HEADS)
def test_hugging_face(heads: tuple[int, int]) -> None:
    cases = []
    for tokens in (1, 2, 17, 130, 4096):
        for dimensions in (64, 128, 256):
            q, k = (values((1, tokens, count, dimensions), count + tokens) for count in heads)
            cos, sin = map(to_gpu, tables((1, tokens), dimensions, TORCH.rope))
            call, peer = partial(cufuse.rope, q, k, cos, sin), partial(given_by, rotate_by_hugging_face, q, k, cos, sin)
            cases.append(Case(f"{tokens} tokens, heads {heads}, D {dimensions}", call, peer))
    demand_cases("rotation, Hugging Face", cases)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_against_the_emulation(name: str) -> None:
    recipe, rng = RECIPES[name], np.random.default_rng(3)
    wide = not recipe.head_norm.round_weighted
    cases = []
    for dimensions in (2, 6, 20, 64, 128, 256):
        for tokens, heads, kv_heads in ((1, 16, 8), (3, 5, 1), (19, 40, 8), (600, 4, 2)):
            q, k = (inputs.heavy((tokens, count, dimensions), count + tokens) for count in (heads, kv_heads))
            cos, sin = tables((tokens,), dimensions, recipe.rope)
            given = [(q, k, cos, sin)]
            if recipe.rope.tables == "bfloat16":  # other tables: not those of float32 angles rounded twice
                given.append((q, k, *(rng.standard_normal(cos.shape, np.float32) for _ in range(2))))
                given.append((q, k, cos, rng.standard_normal(cos.shape, np.float32)))
            if wide:
                q, k = (rng.standard_normal(x.shape, np.float32) for x in (q, k))
                given += [(q, k, cos, sin), (given[0][0], k, cos, sin)]
            for arrays in given:
                types = ", ".join(str(array.dtype) for array in arrays)
                what = f"{name}, {tokens} tokens, {heads} and {kv_heads} heads, D {dimensions}: {types}"
                cases.append(against_numpy(what, cufuse.rope, *arrays, recipe=recipe))
    demand_cases("rotation, emulation", cases)


def test_special_values() -> None:
    """All pairs of 41 codes (zeros, subnormals, the largest, infinities, NaN) under four pairs of tables."""
    codes = np.array(
        [0, 1, 2, 0x7F, 0x80, 0x81, 0x3F7F, 0x3F80, 0x3F81, 0x4049, 0x7F00, 0x7F7F, 0x7F80, 0x7F81, 0x7FC0, 0x7FFF], np.uint16
    )
    codes = np.concatenate([codes, codes | np.uint16(0x8000)])
    pairs = np.stack(np.meshgrid(codes, codes), axis=-1).reshape(1, -1, 2).view(bfloat16)
    cases = []
    for name, recipe in RECIPES.items():
        for cos, sin in ((1.0, 0.0), (0.0, -1.0), (0.7071, 0.7071), (-0.0, 2.0**-130)):
            two = [np.full((1, 2), value, np.float32) for value in (cos, sin)]
            if recipe.rope.tables == "bfloat16":
                two = [cufuse.round_to_bf16(table) for table in two]
            cases.append(against_numpy(f"{name}, cos {cos}, sin {sin}", cufuse.rope, pairs, pairs[:, :40], *two, recipe=recipe))
    demand_cases("rotation, special values", cases)


def test_strides() -> None:
    """Parts of a packed projection, a transposed batch, tables that are broadcast, strided and misplaced outputs."""
    gpu = gpu_support.cupy()
    guards: list[Guarded] = []
    cases = []
    for dimensions in (128, 20):
        packed = to_gpu(inputs.heavy((4, 6, 10 * dimensions), dimensions)).reshape(4, 6, 10, dimensions)
        cos, sin = (gpu.broadcast_to(to_gpu(table), (4, 6, dimensions)) for table in tables((6,), dimensions, TORCH.rope))
        turned = packed.transpose(1, 0, 2, 3)
        layouts = {
            "packed": (packed[:, :, :6], packed[:, :, 6:8], cos, sin),
            "transposed": (turned[:, :, :6], turned[:, :, 6:8], cos.transpose(1, 0, 2), sin.transpose(1, 0, 2)),
            "heads backwards": (packed[:, :, 5::-1], packed[:, :, 6:8], cos, sin),
            "columns 2 to 18": tuple(array[..., 2:18] for array in (packed, packed[:, :, :1], cos, sin)),
        }
        for what, arrays in layouts.items():
            for gap, misplaced in ((0, 0), (4, 1)):
                pair = [Guarded(array.shape, bfloat16, gap=gap, misplaced=misplaced) for array in arrays[:2]]
                guards += pair
                call = partial(cufuse.rope, *arrays, out=tuple(guard.out for guard in pair))
                cases.append(Case(f"{what}, D {dimensions}", call, partial(cufuse.rope, *map(to_host, arrays))))
    demand_cases("rotation, strided", cases)
    for guard in guards:
        guard.demand_intact("rotation")


def test_replayed_and_misused() -> None:
    gpu = gpu_support.cupy()
    q, k = (values((33, count, 128), count) for count in (32, 8))
    cos, sin = map(to_gpu, tables((33,), 128, TORCH.rope))
    outs = tuple(gpu.empty(x.shape, bfloat16) for x in (q, k))
    graph, stream = gpu_support.captured(lambda: cufuse.rope(q, k, cos, sin, out=outs))
    for out in outs:
        out.view(np.uint16)[...] = 0
    gpu.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    for out, expected in zip(outs, cufuse.rope(q, k, cos, sin), strict=True):
        demand_same("rotation, strided", out, expected, "replay")
    # q and k side by side in one buffer
    packed = gpu.empty((33, 40, 128), bfloat16)
    found = cufuse.rope(q, k, cos, sin, out=(packed[:, :32], packed[:, 32:]))
    for one, expected in zip(found, outs, strict=True):
        demand_same("rotation, strided", one, expected, "into one buffer")
    with pytest.raises(ValueError, match=r"out\[0\] overlaps q in memory"):
        cufuse.rope(q, k, cos, sin, out=(q, None))
    with pytest.raises(ValueError, match=r"out\[\d\] overlaps out\[\d\] in memory"):
        cufuse.rope(q, k, cos, sin, out=(packed[:, :32], packed[:, 31:39]))
    with pytest.raises(ValueError, match=r"sin has a stride of 4 bytes"):
        cufuse.rope(q[..., ::1], k, cos, gpu.concatenate([sin.view(np.uint16)] * 2, axis=1).view(bfloat16)[:, ::2])
    empty = cufuse.rope(q[:0], k[:0], cos[:0], sin[:0])
    assert [one.shape for one in empty] == [(0, 32, 128), (0, 8, 128)]
