"""The named recipes, each with the implementation, version and source that it states: ``cufuse.recipes``.

Division under nvcc's -use_fast_math is multiplication by the rounded reciprocal for all row lengths that were measured
(emulation/data/division.json). Where a source leaves an order open (Triton's reductions as compiled, the contraction of a
product), the recipe says which it takes. ``get`` accepts a name or a Recipe, so every operation takes both.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from cufuse.recipe import Attention, Gemm, Mlp, Norm, Recipe, Rope

_TORCH_NORM = Norm(
    sum_order="torch-mean", mean="factor", round_normalised=True, round_weighted=True, float32_weight="promote"
)
_FUSED_NORM = Norm(sum_order="torch-rms-norm", contract=True, mean="divide", round_normalised=False, round_weighted=True)
_FLOAT32_NORM = Norm(
    sum_order="torch-mean", mean="factor", round_normalised=False, round_weighted=False, float32_weight="accept"
)
_FLOAT32_GEMM = Gemm(input="float32", k_slices=1, output="float32", quantised="block-scaled")
_FLOAT32_ROPE = Rope(tables="float32", round_products=False, round_sum=False)
_ROUND_ONCE_ROPE = Rope(round_products=False, contract=True)
_FLOAT32_ATTENTION = Attention(products="blocks", round_scores=False, round_scaled=False, round_output=False)
_FLOAT32_MLP = Mlp(round_activated=False, round_gated=False)

_TORCH = Recipe(
    name="torch",
    summary="Hugging Face Qwen3 and Llama, eager attention in bfloat16 on CUDA (transformers 5.17, torch 2.10 and newer).",
    source="transformers models/qwen3/modeling_qwen3.py; ATen/native/cuda/Reduce.cuh; bits recorded on an H200, tests/golden.",
    norm=_TORCH_NORM,
    head_norm=_TORCH_NORM,
)
_LATE = Recipe(
    name="late-rounding",
    summary="The faulty fused kernel: torch's sums, all in float32 from the norm to the rotation, one rounding at the end.",
    source="the rounding study that cufuse grew from, 'fused kernel'; GEMM order: cufuse's own.",
    norm=_FLOAT32_NORM,
    gemm=_FLOAT32_GEMM,
    head_norm=_FLOAT32_NORM,
    rope=_FLOAT32_ROPE,
    round_output=True,
    float32_activations=True,
    mlp_norm=_TORCH_NORM,
    dense=Gemm(),
)
_RECIPES = (
    _TORCH,
    _TORCH.derive(
        "torch-rms-norm",
        summary="torch.nn.functional.rms_norm on CUDA (torch 2.9 and newer) for both norms, the rest as torch.",
        source="ATen/native/cuda/layer_norm_kernel.cu, vectorized_layer_norm_kernel_impl; recorded on an H200, tests/golden.",
        norm=_FUSED_NORM,
        head_norm=_FUSED_NORM,
    ),
    _LATE.derive(
        "float32",
        summary="Option 2 of the study: everything float32 and kept float32; the caller rounds.",
        source="the rounding study that cufuse grew from, 'option 2'; GEMM order: cufuse's own.",
        residual_sum="float32",
        round_output=False,
        attention=_FLOAT32_ATTENTION,
        mlp=_FLOAT32_MLP,
        mlp_norm=None,
        dense=None,
    ),
    _LATE,
    _LATE.derive(
        "separate-k-norm",
        summary="Option 3 of the study: norm and projection fused in float32 and rounded, then Q/K norm and rotation as torch.",
        source="the rounding study that cufuse grew from, 'option 3'; GEMM order: cufuse's own.",
        gemm={"output": "bfloat16"},
        head_norm=_TORCH_NORM,
        rope=Rope(),
        round_output=False,
    ),
    Recipe(
        name="llama.cpp",
        summary="llama.cpp on CUDA: float32 activations and norm weights, nothing rounded, weights of bfloat16 or quantised.",
        source="ggml/src/ggml-cuda/norm.cu rms_norm_f32 at 0129866, -use_fast_math; rotation by correctly rounded tables and "
        "the GEMM's order are cufuse's choice: cuBLAS or ggml's own kernel runs there.",
        residual_sum="float32",
        norm=Norm(
            sum_order="llama.cpp",
            contract=True,
            mean="reciprocal",
            round_normalised=False,
            round_weighted=False,
            float32_weight="accept",
        ),
        gemm=_FLOAT32_GEMM,
        head_norm=Norm(
            sum_order="llama.cpp",
            contract=True,
            mean="reciprocal",
            round_normalised=False,
            round_weighted=False,
            float32_weight="accept",
        ),
        rope=Rope(tables="float32", round_products=False, contract=True, round_sum=False),
        float32_activations=True,
        attention=_FLOAT32_ATTENTION,
        mlp=_FLOAT32_MLP,
    ),
    _TORCH.derive(
        "vllm-0.19",
        summary="vLLM up to 0.19.1, CUDA kernels (enforce_eager; the compiled mode fuses otherwise): two roundings in the norm.",
        source="vllm csrc/layernorm_kernels.cu rms_norm_kernel, cub::BlockReduce; rotation in bfloat16 as of "
        "pos_encoding_kernels.cu.",
        norm={"sum_order": "vllm", "sum_order_after_residual": "vllm-add", "mean": "divide", "float32_weight": "refuse"},
        head_norm={"sum_order": "vllm", "mean": "divide", "float32_weight": "refuse"},
        packed_projections=True,
    ),
    _TORCH.derive(
        "vllm-0.20",
        summary="vLLM 0.20, CUDA kernels (enforce_eager): one rounding in the norm, rotation in float32.",
        source="vllm csrc/libtorch_stable/layernorm_kernels.cu (PR 40860); which product the rotation fuses is cufuse's choice.",
        norm={
            "sum_order": "vllm",
            "sum_order_after_residual": "vllm-add",
            "mean": "divide",
            "round_normalised": False,
            "float32_weight": "refuse",
        },
        head_norm={"sum_order": "vllm", "mean": "divide", "round_normalised": False, "float32_weight": "refuse"},
        rope=_ROUND_ONCE_ROPE,
        packed_projections=True,
    ),
    _TORCH.derive(
        "flashinfer",
        summary="FlashInfer's CUDA norms and rotation around torch's projection: statistic of the unrounded residual sum.",
        source="flashinfer include/flashinfer/norm.cuh, pos_enc.cuh, -use_fast_math; the fused product of the rotation is cufuse's "
        "choice.",
        residual_sum="stored rounded",
        norm={
            "sum_order": "flashinfer",
            "contract": True,
            "mean": "reciprocal",
            "round_normalised": False,
            "float32_weight": "refuse",
        },
        head_norm={
            "sum_order": "flashinfer",
            "contract": True,
            "mean": "reciprocal",
            "round_normalised": False,
            "float32_weight": "refuse",
        },
        rope=Rope(tables="float32", round_products=False, contract=True),
    ),
    _TORCH.derive(
        "gemma",
        summary="Hugging Face Gemma 3's norm (weight 1 + w in float32, one rounding) in the place of Qwen3's.",
        source="transformers models/gemma3/modeling_gemma3.py Gemma3RMSNorm; order of ATen/native/cuda/Reduce.cuh.",
        norm={"round_normalised": False, "weight_offset": 1.0, "float32_weight": "accept"},
        head_norm={"round_normalised": False, "weight_offset": 1.0, "float32_weight": "accept"},
    ),
    _TORCH.derive(
        "nano-vllm",
        summary="nano-vLLM as Inductor compiles it: unrounded residual sum, one rounding in the norm, rotation in float32.",
        source="nano-vllm layers/layernorm.py and rotary_embedding.py at 76c0390; Triton's order of the sum is cufuse's choice.",
        residual_sum="stored rounded",
        norm={
            "sum_order": "nano-vllm",
            "contract": True,
            "mean": "divide",
            "round_normalised": False,
            "float32_weight": "refuse",
        },
        head_norm={
            "sum_order": "nano-vllm",
            "contract": True,
            "mean": "divide",
            "round_normalised": False,
            "float32_weight": "refuse",
        },
        rope=Rope(tables="float32", round_products=False, contract=True),
        packed_projections=True,
        mlp={"round_activated": False},
    ),
    _TORCH.derive(
        "batch-invariant",
        summary="torch's rounding points in orders that do not depend on the number of rows: one slice of K, F.rms_norm's sum.",
        source="cufuse's own.",
        norm={"sum_order": "torch-rms-norm", "contract": True, "mean": "divide"},
        gemm={"k_slices": 1},
        head_norm={"sum_order": "torch-rms-norm", "contract": True, "mean": "divide"},
        attention={"products": "blocks"},
    ),
    _TORCH.derive(
        "block-scaled",
        summary="torch, but quantised weights enter the tensor core as integers and their scales are applied in float32.",
        source="cufuse's own: what its kernels for quantised weights compute.",
        gemm={"quantised": "block-scaled"},
    ),
)

_LLAMA: Final = next(recipe for recipe in _RECIPES if recipe.name == "llama.cpp")
_QUANTISED = (
    _LLAMA.derive(
        "llama.cpp-q8_1",
        summary="llama.cpp on CUDA as it runs quantised weights for up to eight tokens: activations in blocks of 32 bytes.",
        source="ggml/src/ggml-cuda/quantize.cu, mmvq.cu and vecdotq.cuh at 000f4625, norm.cu at 0129866; contraction read from the "
        "source; more tokens, which take mmq there, go in calls of eight.",
        gemm={"quantised": "q8_1"},
    ),
)

RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType({recipe.name: recipe for recipe in (*_RECIPES, *_QUANTISED)})
"""Every named recipe by its name, read-only: ``cufuse.recipes``."""

QUANTISED_ONLY: Final = ("block-scaled", "llama.cpp-q8_1")
"""Recipes that differ from another one ("torch", "llama.cpp") for quantised weights alone."""


def get(recipe: str | Recipe) -> Recipe:
    """The recipe of this name, or the recipe itself. ValueError for an unknown name, TypeError for another type."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(f"recipe is a {type(recipe).__name__}; needed is a name or a cufuse.Recipe")
    if recipe not in RECIPES:
        raise ValueError(f"recipe is {recipe!r}; known are {', '.join(RECIPES)}")
    return RECIPES[recipe]
