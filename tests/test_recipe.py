"""Recipes: what they promise of one another, what they refuse, and that they do not change."""

import copy
import dataclasses
import itertools
import pickle

import numpy as np
import pytest

import cufuse
from cufuse import named_recipes, qkv
from cufuse.emulation.sums import sum_of_squares
from cufuse.recipe import Gemm, Norm, Recipe, Rope
from tests.witnesses import bits, demand_bits, random_bf16, without_rounding

NAMES = (
    "torch", "torch-rms-norm", "float32", "late-rounding", "separate-k-norm", "llama.cpp", "vllm-0.19", "vllm-0.20", "flashinfer",
    "gemma", "nano-vllm", "batch-invariant", "block-scaled", "llama.cpp-q8_1",
)  # fmt: skip


def block_inputs(recipe: str, tokens: int = 6, head_norms: bool = True, rotation: bool = True, head_dim: int = 64) -> dict:
    """Arguments of rms_norm_qkv: 2 query heads and 1 key/value head, head norm weights as large as Qwen3's."""
    dtype = cufuse.recipes[recipe].rope.tables
    cos, sin = cufuse.rope_tables(np.arange(3, 3 + tokens), head_dim, dtype=np.float32 if dtype == "float32" else cufuse.bfloat16)
    return {
        "x": random_bf16(1, tokens, 256),
        "norm_weight": random_bf16(2, 256),
        "qkv_weight": random_bf16(3, 4 * head_dim, 256, scale=0.05),
        "q_norm_weight": random_bf16(4, head_dim, scale=3) if head_norms else None,
        "k_norm_weight": random_bf16(5, head_dim, scale=40) if head_norms else None,
        "heads": 2,
        "head_dim": head_dim,
        "recipe": recipe,
        "k_slices": 1,
    } | ({"cos": cos, "sin": sin} if rotation else {})


def stages(recipe: str | Recipe, given: dict) -> dict[str, np.ndarray]:
    heads = qkv.Heads(2, 1, 64)
    return qkv.stages(given, (given["qkv_weight"],), heads, 1e-6, named_recipes.get(recipe), 1)


def differing(a: np.ndarray, b: np.ndarray) -> float:
    """Share of differing bits, float32 rounded to bfloat16 first."""
    rounded = [cufuse.round_to_bf16(one) if one.dtype == np.float32 else one for one in (a, b)]
    return float((bits(rounded[0]) != bits(rounded[1])).mean())


def test_the_names() -> None:
    assert tuple(cufuse.recipes) == NAMES
    with pytest.raises(ValueError, match=r"recipe is 'pytorch'; known are torch, .*batch-invariant"):
        named_recipes.get("pytorch")
    with pytest.raises(TypeError, match="recipe is a int"):
        named_recipes.get(3)
    assert named_recipes.get(cufuse.recipes["gemma"]) is cufuse.recipes["gemma"] is named_recipes.get("gemma")


@pytest.mark.parametrize("name", NAMES)
def test_each_recipe_says_what_it_is(name: str) -> None:
    recipe = cufuse.recipes[name]
    assert recipe.name == name
    assert recipe.summary.endswith(".")
    assert recipe.source.endswith(".")
    assert recipe.__doc__ == f"{name}: {recipe.summary} Source: {recipe.source}"
    printed = str(recipe)
    assert printed.startswith(f"{name}: {recipe.summary}")
    assert recipe.source in printed
    points = recipe.rounding_points()
    assert [line.split(":")[0] for line in points] == [
        "residual", "norm", "norm", "norm", "norm", "projection", "projection",
        "head norm", "head norm", "head norm", "head norm", "rotation", "output",
    ]  # fmt: skip
    assert all(point in printed for point in points)


def test_what_is_printed_follows_the_fields() -> None:
    """Every field changes its line and no other."""
    torch, float32 = cufuse.recipes["torch"], cufuse.recipes["float32"]
    changes = [
        (torch, {"residual_sum": "stored rounded"}, [0]),
        (torch, {"norm": {"sum_order": "sequential"}}, [1]),
        (torch, {"norm": {"sum_order_after_residual": "vllm-add"}}, [1]),
        (torch, {"norm": {"contract": True}}, [1]),
        (torch, {"norm": {"mean": "divide"}}, [2]),
        (torch, {"norm": {"rsqrt": "correct"}}, [2]),
        (torch, {"norm": {"round_normalised": False}}, [3]),
        (torch, {"norm": {"weight_offset": 1.0}}, [4]),
        (torch, {"gemm": {"core": "sm_80"}}, [5]),
        (torch, {"gemm": {"k_slices": 3}}, [5]),
        (torch, {"gemm": {"output": "float32"}}, [6]),
        (torch, {"head_norm": {"mean": "reciprocal"}}, [8]),
        (torch, {"head_norm": {"round_normalised": False}}, [9]),
        (torch, {"rope": {"tables": "float32"}}, [11]),
        (torch, {"rope": {"round_products": False}}, [11]),
        (float32, {"rope": {"contract": True}}, [11]),
        (float32, {"head_norm": {"round_weighted": True}}, [10]),
        (float32, {"rope": {"round_sum": True}}, [11]),
        (float32, {"round_output": True}, [12]),
    ]
    for recipe, change, lines in changes:
        pairs = zip(recipe.rounding_points(), recipe.derive("changed", **change).rounding_points(), strict=True)
        assert [number for number, (a, b) in enumerate(pairs) if a != b] == lines, change


CONTRADICTIONS = [
    ("torch", {"norm": {"round_weighted": False}}, r"gemm\.input is bfloat16, but norm\.round_weighted is False"),
    ("torch", {"gemm": {"input": "float32"}}, r"gemm\.input is float32, but norm\.round_weighted is True"),
    ("torch", {"gemm": {"core": "sm_75"}}, r"gemm\.core sm_75 has no bfloat16"),
    ("torch", {"gemm": {"k_slices": 0}}, r"gemm\.k_slices is 0"),
    ("torch", {"gemm": {"k_slices": True}}, r"gemm\.k_slices is True"),
    ("torch", {"gemm": {"k_slices": "all"}}, r"gemm\.k_slices is 'all'"),
    ("torch", {"rope": {"contract": True}}, r"rope\.contract with rope\.round_products"),
    ("torch", {"rope": {"round_sum": False}}, r"rope\.round_products without rope\.round_sum"),
    ("torch", {"head_norm": {"round_weighted": False}}, r"rope\.round_products, but head_norm\.round_weighted is False"),
    ("torch", {"round_output": True}, "round_output, but nothing is float32"),
    ("torch", {"norm": {"weight_offset": float("nan")}}, r"norm\.weight_offset"),
    ("torch", {"head_norm": {"weight_offset": "1"}}, r"head_norm\.weight_offset"),
    ("torch", {"residual_sum": "twice"}, "residual_sum is 'twice'; needed is one of 'rounded', 'stored rounded', 'float32'"),
    ("torch", {"norm": {"sum_order": "alphabetical"}}, "sum_order is 'alphabetical'; needed is one of 'torch-mean'"),
    ("torch", {"norm": {"sum_order_after_residual": "x"}}, "sum_order_after_residual is 'x'; needed is one of None"),
    ("torch", {"head_norm": {"mean": "geometric"}}, "mean is 'geometric'; needed is one of 'factor', 'reciprocal', 'divide'"),
    ("torch", {"norm": {"rsqrt": "newton"}}, "rsqrt is 'newton'; needed is one of 'hardware', 'correct'"),
    ("torch", {"norm": {"float32_weight": "maybe"}}, "float32_weight is 'maybe'"),
    ("torch", {"norm": {"round_normalised": "bfloat16"}}, "round_normalised is 'bfloat16'; needed is one of True, False"),
    ("torch", {"norm": {"contract": 1}}, "contract is 1; needed is one of True, False"),
    ("torch", {"gemm": {"input": "float16"}}, "input is 'float16'; needed is one of 'bfloat16', 'float32'"),
    ("torch", {"gemm": {"output": "float16"}}, "output is 'float16'"),
    ("torch", {"gemm": {"core": "sm_91"}}, "core is 'sm_91'; needed is one of 'sm_70'"),
    ("torch", {"rope": {"tables": None}}, "tables is None"),
    ("torch", {"float32_activations": "yes"}, "float32_activations is 'yes'"),
]


@pytest.mark.parametrize(("base", "change", "message"), CONTRADICTIONS, ids=[message[:40] for _, _, message in CONTRADICTIONS])
def test_contradictions_and_unknown_values(base: str, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"recipe 'mine': .*{message}"):
        cufuse.recipes[base].derive("mine", **change)


def test_wrong_kinds() -> None:
    torch = cufuse.recipes["torch"]
    with pytest.raises(TypeError, match="rounding"):
        torch.derive("mine", norm={"rounding": True})
    with pytest.raises(TypeError, match="precision"):
        torch.derive("mine", precision=32)
    with pytest.raises(TypeError, match="norm is 'torch'; needed is a Norm"):
        torch.derive("mine", norm="torch")
    with pytest.raises(TypeError, match=r"rope is Gemm.*; needed is a Rope"):
        dataclasses.replace(torch, rope=Gemm())
    with pytest.raises(TypeError):
        Recipe(name="mine", summary="", source="")  # no norms


def test_recipes_do_not_change() -> None:
    torch = cufuse.recipes["torch"]
    for owner, field in ((torch, "name"), (torch, "norm"), (torch.norm, "mean"), (torch.gemm, "core"), (torch.rope, "tables")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, field, "x")
    with pytest.raises(TypeError):
        cufuse.recipes["torch"] = torch
    assert len({hash(recipe) for recipe in cufuse.recipes.values()}) == 14
    for twin in (copy.deepcopy(torch), pickle.loads(pickle.dumps(torch)), dataclasses.replace(torch)):
        assert twin == torch
        assert twin.__doc__ == torch.__doc__


def test_deriving() -> None:
    torch = cufuse.recipes["torch"]
    mine = torch.derive("mine", norm={"rsqrt": "correct"}, gemm=Gemm(k_slices=2), summary="Mine.")
    assert (mine.name, mine.summary, mine.source) == ("mine", "Mine.", torch.source)
    assert mine.norm == dataclasses.replace(torch.norm, rsqrt="correct")
    assert (mine.gemm, mine.head_norm, mine.rope) == (Gemm(k_slices=2), torch.head_norm, torch.rope)
    assert mine.__doc__.startswith("mine: Mine.")
    assert torch == cufuse.recipes["torch"]
    on = torch.on("sm_80")
    assert on == dataclasses.replace(torch, gemm=dataclasses.replace(torch.gemm, core="sm_80"))
    with pytest.raises(ValueError, match="sm_70"):
        torch.on("sm_70")
    own = Recipe(
        name="own",
        summary="Own.",
        source="Here.",
        norm=Norm(sum_order="sequential", mean="divide", round_normalised=False, round_weighted=True),
        head_norm=Norm(sum_order="sequential", mean="divide", round_normalised=False, round_weighted=True),
        rope=Rope(round_products=False),
    )
    x, weight = random_bf16(1, 3, 64), random_bf16(2, 64)
    assert (bits(cufuse.rms_norm(x, weight, recipe=own)) != bits(cufuse.rms_norm(x, weight))).any()


@pytest.mark.parametrize("head_norms", [True, False])
@pytest.mark.parametrize("rotation", [True, False])
def test_late_rounding_is_float32_rounded(head_norms: bool, rotation: bool) -> None:
    late = cufuse.rms_norm_qkv(**block_inputs("late-rounding", head_norms=head_norms, rotation=rotation))
    wide = cufuse.rms_norm_qkv(**block_inputs("float32", head_norms=head_norms, rotation=rotation))
    for a, b in zip(late, wide, strict=True):
        assert b.dtype == np.float32
        demand_bits(a, cufuse.round_to_bf16(b))


@pytest.mark.parametrize("head_norm", [True, False])
@pytest.mark.parametrize("rotation", [True, False])
def test_output_is_the_type_of_the_last_stage(head_norm: bool, rotation: bool) -> None:
    """Whatever rounds before it."""
    given, seen = block_inputs("torch", head_norms=head_norm, rotation=rotation), set()
    for name, norm_rounds, sum_rounds in itertools.product(("torch", "late-rounding"), (True, False), (True, False)):
        rope = {"round_products": False, "round_sum": sum_rounds}
        recipe = cufuse.recipes[name].derive("own", head_norm={"round_weighted": norm_rounds}, rope=rope, round_output=False)
        found = stages(recipe, given)
        for part, names in zip("qkv", qkv.LAST_STAGES, strict=True):
            followed = {"head_norm": head_norm and part != "v", "rotation": rotation and part != "v"}
            last = next(found[one].dtype.name for one in names if one in found)
            assert recipe.output(**followed) == last
            seen.add(last)
            if name == "late-rounding":
                assert recipe.derive("own", round_output=True).output(**followed) == "bfloat16"
    assert seen == {"bfloat16", "float32"}


def test_where_the_study_s_recipes_part() -> None:
    """torch, late rounding, and option 3 between them, on the same input, stage by stage."""
    given = block_inputs("float32", tokens=64)
    found = {name: stages(name, given) for name in NAMES}
    torch, late, apart = found["torch"], found["late-rounding"], found["separate-k-norm"]
    assert tuple(torch) == qkv.STAGES
    assert all(value.dtype == cufuse.bfloat16 for value in torch.values())
    assert all(value.dtype == np.float32 for value in late.values())
    # one rounding in the place of two changes about a quarter of a norm's outputs, and the projection spreads it to most
    assert 0.15 < differing(torch["normalised"], late["normalised"]) < 0.35
    assert all(differing(torch[stage], late[stage]) > 0.25 for stage in qkv.STAGES[1:])
    for stage in late:
        demand_bits(late[stage], found["float32"][stage], stage)
    # option 3: late rounding up to the projection, rounded there, torch from there on
    demand_bits(apart["normalised"], late["normalised"])
    for name in "qkv":
        demand_bits(apart[name], cufuse.round_to_bf16(late[name]))
    demand_bits(apart["k_normed"], cufuse.rms_norm(apart["k"], given["k_norm_weight"]))
    rotated = cufuse.rope(apart["q_normed"], apart["k_normed"], given["cos"], given["sin"])
    demand_bits(apart["q_rotated"], rotated[0])
    demand_bits(apart["k_rotated"], rotated[1])
    # one rounding in the norm alone
    assert 0.15 < differing(torch["normalised"], found["torch-rms-norm"]["normalised"]) < 0.35
    # the same rounding points in other orders: rarely another bit
    for name in ("vllm-0.19", "batch-invariant"):
        assert differing(torch["normalised"], found[name]["normalised"]) < 0.001
    assert differing(torch["normalised"], found["gemma"]["normalised"]) > 0.9


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16, 17, 64, 65])
@pytest.mark.parametrize("recipe", ["batch-invariant", without_rounding("batch-invariant")], ids=["rounded", "float32"])
def test_batch_invariant_rows_do_not_know_their_batch(rows: int, recipe: str | Recipe) -> None:
    # heads of 256: those up to 128 are added in the same order in any batch by torch, too
    given = block_inputs("batch-invariant", tokens=rows, head_dim=256)
    given |= {"k_slices": None, "x": random_bf16(1, rows, 256, binades=13), "qkv_weight": random_bf16(3, 1024, 256, binades=13)}
    weight = given["qkv_weight"]
    residual = random_bf16(6, rows, 256)

    def functions(part: slice) -> list[np.ndarray]:
        x, other = given["x"][part], residual[part]
        tables = {name: given[name][part] for name in ("cos", "sin")}
        return [
            cufuse.rms_norm(x, given["norm_weight"], recipe=recipe),
            *cufuse.add_rms_norm(x, other, given["norm_weight"], recipe=recipe),
            cufuse.linear(x, weight, recipe=recipe),
            *cufuse.rms_norm_qkv(**given | tables | {"x": x, "residual": other, "recipe": recipe}),
        ]

    whole = functions(slice(None))
    for row in range(rows):
        for alone, together in zip(functions(slice(row, row + 1)), whole, strict=True):
            demand_bits(alone, together[row : row + 1], f"row {row} of {rows}")


def test_torch_s_norm_depends_on_its_batch() -> None:
    """15 rows are added in another order than 16 and more: many sums differ, and of some rows the norm's output, too."""
    weight = random_bf16(12, 256)
    for seed in range(20):
        x = random_bf16(seed, 15000, 256, binades=13)
        parts = np.split(x, len(x) // 15)
        sums = np.concatenate([sum_of_squares(part, "torch-mean") for part in parts])
        assert (bits(sums) != bits(sum_of_squares(x, "torch-mean"))).mean() > 0.1
        found = {
            recipe: np.concatenate([cufuse.rms_norm(part, weight, recipe=recipe) for part in parts])
            for recipe in ("torch", "batch-invariant")
        }
        demand_bits(found["batch-invariant"], cufuse.rms_norm(x, weight, recipe="batch-invariant"))
        if (bits(found["torch"]) != bits(cufuse.rms_norm(x, weight))).any():
            return
    pytest.fail("no row of 300,000 depends on its batch")


def test_torch_s_projection_depends_on_its_batch() -> None:
    """Qwen3-8B's key projection: cuBLAS cuts K in 3 at 47 tokens, in 2 at 48."""
    x, weight = random_bf16(13, 48, 4096), random_bf16(14, 1024, 4096, scale=0.02)
    whole, without_last = cufuse.linear(x, weight), cufuse.linear(x[:47], weight)
    assert 0 < differing(whole[:47], without_last) < 0.1
    demand_bits(whole, cufuse.linear(x, weight, k_slices=2))
    demand_bits(without_last, cufuse.linear(x[:47], weight, k_slices=3))
