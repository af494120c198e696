"""The named recipes field by field, from a table of their own, and the lines that describe them."""

import inspect

import pytest

import cufuse
from cufuse import recipe

NORMS = {
    # order, FMA, mean, h rounded, weight offset, y rounded, float32 weight: numerics read from each project's source
    "torch": ("torch-mean", False, "factor", True, 0.0, True, "promote"),
    "torch-rms-norm": ("torch-rms-norm", True, "divide", False, 0.0, True, "refuse"),
    "float32": ("torch-mean", False, "factor", False, 0.0, False, "accept"),
    "late-rounding": ("torch-mean", False, "factor", False, 0.0, False, "accept"),
    "separate-k-norm": ("torch-mean", False, "factor", False, 0.0, False, "accept"),
    "llama.cpp": ("llama.cpp", True, "reciprocal", False, 0.0, False, "accept"),
    "vllm-0.19": ("vllm", False, "divide", True, 0.0, True, "refuse"),
    "vllm-0.20": ("vllm", False, "divide", False, 0.0, True, "refuse"),
    "flashinfer": ("flashinfer", True, "reciprocal", False, 0.0, True, "refuse"),
    "gemma": ("torch-mean", False, "factor", False, 1.0, True, "accept"),
    "nano-vllm": ("nano-vllm", True, "divide", False, 0.0, True, "refuse"),
    "batch-invariant": ("torch-rms-norm", True, "divide", True, 0.0, True, "promote"),
}
TORCH_ROPE = ("bfloat16", True, False, True)
ROPES = {
    # tables, products rounded, FMA, sum rounded
    "float32": ("float32", False, False, False),
    "late-rounding": ("float32", False, False, False),
    "llama.cpp": ("float32", False, True, False),
    "vllm-0.20": ("bfloat16", False, True, True),
    "flashinfer": ("float32", False, True, True),
    "nano-vllm": ("float32", False, True, True),
}
FLOAT32_INPUT = ("float32", "late-rounding", "separate-k-norm", "llama.cpp")
RESIDUALS = {"float32": "float32", "llama.cpp": "float32", "flashinfer": "stored rounded", "nano-vllm": "stored rounded"}


@pytest.mark.parametrize("name", NORMS)
def test_recipes_field_by_field(name: str) -> None:
    found = cufuse.recipes[name]

    def told(norm: recipe.Norm) -> tuple[object, ...]:
        return (
            norm.sum_order, norm.contract, norm.mean, norm.round_normalised, norm.weight_offset, norm.round_weighted,
            norm.float32_weight,
        )  # fmt: skip

    assert told(found.norm) == NORMS[name]
    assert told(found.head_norm) == NORMS["torch" if name == "separate-k-norm" else name]
    assert {found.norm.rsqrt, found.head_norm.rsqrt} == {"hardware"}
    assert found.norm.sum_order_after_residual == ("vllm-add" if name.startswith("vllm") else None)
    assert found.head_norm.sum_order_after_residual is None
    rope = found.rope
    assert (rope.tables, rope.round_products, rope.contract, rope.round_sum) == ROPES.get(name, TORCH_ROPE)
    gemm = found.gemm
    assert (gemm.input, gemm.core) == ("float32" if name in FLOAT32_INPUT else "bfloat16", "sm_90")
    assert gemm.k_slices == (1 if name in (*FLOAT32_INPUT, "batch-invariant") else "cublas")
    assert gemm.output == ("float32" if name in FLOAT32_INPUT and name != "separate-k-norm" else "bfloat16")
    assert found.residual_sum == RESIDUALS.get(name, "rounded")
    assert found.round_output is (name == "late-rounding")
    assert found.float32_activations is (name in FLOAT32_INPUT)


@pytest.mark.parametrize("name", NORMS)
def test_the_decoder_s_fields(name: str) -> None:
    """float32 and llama.cpp round nothing behind the attention but w; late rounding and the separate K norm go on like torch."""
    found, torch = cufuse.recipes[name], cufuse.recipes["torch"]
    rounds = name not in ("float32", "llama.cpp")
    attention, mlp = found.attention, found.mlp
    assert (attention.round_scores, attention.round_scaled, attention.round_output, mlp.round_gated) == (rounds,) * 4
    assert mlp.round_activated is (rounds and name != "nano-vllm")
    assert found.packed_projections is (name in ("vllm-0.19", "vllm-0.20", "nano-vllm"))
    like_torch = name in ("late-rounding", "separate-k-norm")
    assert (found.mlp_norm, found.dense) == ((torch.norm, recipe.Gemm()) if like_torch else (None, None))
    lines = found.decoder_points()
    expected = {
        "attention: s =": rounds, "attention: s' =": rounds, "attention: o =": rounds, "MLP: a =": mlp.round_activated,
        "MLP: y =": rounds, "output, gate, up, down, head: accumulator": rounds,
    }  # fmt: skip
    for start, rounded in expected.items():
        (line,) = (line for line in lines if line.startswith(start))
        assert line.endswith(" -> bfloat16" if rounded else " in float32")
    norm = torch.norm if like_torch else found.norm
    assert any(line.startswith("MLP's norm, final norm: s =") and f"order {norm.sum_order} (" in line for line in lines)


def test_what_does_not_go_together_behind_the_attention() -> None:
    torch, wide = cufuse.recipes["torch"], cufuse.recipes["float32"]
    for base, change, message in (
        (torch, {"attention": {"round_output": False}}, "dense takes bfloat16, but"),
        (torch, {"mlp": {"round_gated": False}}, "dense takes bfloat16, but"),
        (torch, {"dense": {"input": "float32"}}, "do not go together"),
        (wide, {"dense": {"input": "bfloat16"}}, "do not go together"),
        (wide, {"mlp_norm": {"round_weighted": True}}, "do not go together"),
    ):
        with pytest.raises(ValueError, match=message):
            base.derive("x", **change)
    changed = torch.derive("x", mlp_norm={"mean": "divide"}, dense={"k_slices": 2})
    assert changed.mlp_norm == recipe.Norm(**(vars(torch.norm) | {"mean": "divide"}))
    assert changed.dense == recipe.Gemm(k_slices=2)
    assert changed.derive("y", dense={"core": "sm_80"}).dense == recipe.Gemm(k_slices=2, core="sm_80")
    assert changed.derive("y", norm={"mean": "reciprocal"}).mlp_norm == changed.mlp_norm


@pytest.mark.parametrize("part", [recipe.Attention, recipe.Mlp])
def test_parts_of_the_decoder_are_constants(part: type) -> None:
    made = part()
    name = next(iter(vars(made)))
    with pytest.raises(AttributeError):
        setattr(made, name, getattr(made, name))
    assert all(one.kind is one.KEYWORD_ONLY for one in inspect.signature(part).parameters.values())


@pytest.mark.parametrize("name", NORMS)
def test_the_lines_say_what_the_fields_do(name: str) -> None:
    found = cufuse.recipes[name]
    lines = {line.split(":")[0] + line.split(":")[1].split()[0]: line for line in found.rounding_points()}
    arrow = " -> bfloat16"
    for title, norm in (("norm", found.norm), ("head norm", found.head_norm)):
        assert (", accumulated by fused multiply-add" in lines[f"{title}s"]) is norm.contract
        told = "" if norm.sum_order_after_residual is None else f"; after a residual sum {norm.sum_order_after_residual}"
        assert lines[f"{title}s"].endswith((f"order {norm.sum_order} ({recipe.SUM_ORDERS[norm.sum_order].summary})"
                                            + ", accumulated by fused multiply-add" * norm.contract) + told)  # fmt: skip
        assert lines[f"{title}m"].endswith("; r = rsqrt.approx.f32 of m + eps")
        assert lines[f"{title}h"] == f"{title}: h = x * r" + (arrow if norm.round_normalised else " in float32")
        weight = "(w + 1)" if name == "gemma" else "w"
        assert lines[f"{title}y"] == f"{title}: y = h * {weight}" + (arrow if norm.round_weighted else " in float32")
    parts = "three bfloat16 parts: high, middle, low" in lines["projectionsm_90"]
    assert parts is (found.gemm.input == "float32")
    assert ("one slice" in lines["projectionsm_90"]) is (found.gemm.k_slices == 1)
    output = arrow if found.gemm.output == "bfloat16" else " in float32"
    assert lines["projectionaccumulator"] == "projection: accumulator" + output
    rope = found.rope
    rotation = lines["rotationcos,"]
    assert rotation.startswith("rotation: cos, sin" + (arrow if rope.tables == "bfloat16" else " in float32"))
    assert ("each product" + arrow in rotation) is rope.round_products
    assert ("first one fused into the sum" in rotation) is rope.contract
    assert rotation.endswith("sum" + (arrow if rope.round_sum else " in float32"))
    assert lines["outputq,"] == "output: q, k, v " + ("-> bfloat16 here, once" if found.round_output else "as they are")
    numbered = str(found).splitlines()[2:]
    assert [line.split(".")[0].strip() for line in numbered] == [str(number) for number in range(1, len(numbered) + 1)]


def test_the_correct_root_is_named() -> None:
    changed = cufuse.recipes["torch"].derive("x", norm={"rsqrt": "correct"}, gemm={"k_slices": 3})
    lines = "\n".join(changed.rounding_points())
    assert lines.count("correctly rounded 1/sqrt of m + eps") == 1 and "3 slices" in lines
