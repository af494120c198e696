"""Which launches take a projection and its heads (cufuse/_gpu_linear_heads.py), and how blocks of heads are dealt out: no GPU."""

from dataclasses import replace
from typing import Any

import pytest

import cufuse
from cufuse import _gpu_heads, _gpu_linear_heads, compiler, launch
from cufuse._gpu_heads import Block, Described, Unsuited, dense
from cufuse._linear_problem import Problem
from tests.test_linear_heads_host import D


def layouts(m: int, heads: int, kv_heads: int, k: int, /, **changed: Any) -> tuple[Block, Problem]:
    """Of a call's arrays, on a machine with 132 multiprocessors."""
    outs = tuple(dense((m, count, D), 2) for count in (heads, kv_heads, kv_heads))
    table, weight = dense((m, D), 2), dense((D,), 2)
    block = Block(outs, outs, weight, weight, table, table, slots=None, move_v=True)
    block = block._replace(**{name: one for name, one in changed.items() if name in Block._fields})
    n = (heads + 2 * kv_heads) * D
    problem = Problem(
        m, n, k, k, k, float32_x=False, out_float32=False, aligned_x=True, aligned_weight=True, aligned_out=True, mappable=True,
        pairs=True, slice_k=k, capability=90, multiprocessors=132, shared_memory=compiler.shared_memory_limit(90),
    )  # fmt: skip
    return block, replace(problem, **{name: one for name, one in changed.items() if name not in Block._fields})


def planned(block: Block, problem: Problem, recipe: str = "torch", eps: float = 1e-6, alignment: int = 0) -> Any:
    last = _gpu_heads.ends(cufuse.recipes[recipe], block.q_weight is not None, block.cos is not None)
    return _gpu_linear_heads.Plan(block, last, problem, eps, 0, alignment)


def test_what_it_leaves_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "prepare", lambda kernel, *arguments, **options: kernel)
    shape = (2048, 32, 8, 4096)
    for recipe in ("torch", "torch-rms-norm", "batch-invariant", "gemma"):
        assert planned(*layouts(*shape), recipe=recipe).tile_n == 256
    for recipe in ("late-rounding", "float32", "vllm-0.19", "flashinfer", "nano-vllm"):
        with pytest.raises(Unsuited):
            planned(*layouts(*shape), recipe=recipe)
    with pytest.raises(Unsuited, match="eps"):
        planned(*layouts(*shape), eps=1e-30)
    with pytest.raises(Unsuited, match="alignment"):
        planned(*layouts(*shape), alignment=8)
    wide, narrow = dense((2048, 32, D), 4), dense((2048, 32, 64), 2)
    outs = layouts(*shape)[0].target
    # two groups of tokens with a gap between them
    apart = tuple(Described((2, 1024, count, D), (1 << 24, count * 256, 256, 2), 2) for count in (32, 8, 8))
    for reason, changed in {
        "Hopper": {"capability": 100},
        "64 rows": {"m": 64},
        "slices": {"slice_k": 2048},
        "float32": {"target": (wide, *outs[1:])},
        "another size": {"target": (narrow, *outs[1:])},
        "strides or alignment": {"aligned_x": False},
        "slots": {"slots": dense((2048,), 8)},
        "float32 somewhere": {"cos": dense((2048, D), 4)},
        "two levels": {"target": apart, "cos": None, "sin": None},
        "one behind the other": {"target": (outs[0], outs[1]._replace(strides=(4096, 512, 2)), outs[2])},
        "16 bytes": {"cos": Described((2048, D), (0, 2), 2)},
        "fewer stages": {"k": 448, "slice_k": 448},
    }.items():
        with pytest.raises(Unsuited, match=reason):
            planned(*layouts(*shape, **changed))


def test_choice_of_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide tiles for many rows, separate launches where a machine's multiprocessors would stay idle."""
    monkeypatch.setattr(launch, "prepare", lambda kernel, *arguments, **options: kernel)
    for heads, kv_heads, k in ((16, 8, 1024), (32, 8, 4096), (64, 8, 5120)):
        assert planned(*layouts(8192, heads, kv_heads, k)).tile_n == 256
    with pytest.raises(Unsuited, match="too few tiles"):
        planned(*layouts(66, 32, 8, 4096))


def test_quarters_are_three_stages_apart_where_a_tile_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "prepare", lambda kernel, *arguments, **options: kernel)
    for k, stages in ((960, 2), (1024, 2), (1088, 2), (1096, 3), (4096, 3)):
        assert dict(planned(*layouts(8192, 16, 8, k)).prepared.defines)["PART_STAGES"] == stages
    without = {"cos": None, "sin": None}
    assert dict(planned(*layouts(8192, 16, 8, 4096, **without)).prepared.defines)["PART_STAGES"] == 1


def test_blocks_of_heads_are_dealt_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block asks for lets a multiprocessor hold its share of all blocks and no more."""
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 132)
    monkeypatch.setattr(launch, "capability", lambda device: 90)
    whole = compiler.shared_memory_limit(90) + 1024
    for tokens, blocks in ((65, 1), (65, 8), (200, 8), (256, 6), (352, 6)):
        share = -(-tokens * blocks // 132)
        room = _gpu_heads._room(tokens, blocks, 0)
        assert 0 < room <= compiler.shared_memory_limit(90) and whole // (room + 1024) == share
    assert _gpu_heads._room(64, 8, 0) == 0  # few rows
    assert _gpu_heads._room(353, 6, 0) == 0  # more than fit at once
    monkeypatch.setattr(launch, "capability", lambda device: 80)
    assert _gpu_heads._room(200, 8, 0) == 0
