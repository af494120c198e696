"""Recipes: where a computation is rounded, and in which order every sum is taken. The one place that knows it.

A ``Recipe`` is read by the emulation, by the kernels and by the report; none of them rounds where the recipe does not say
so. The named ones are in ``cufuse.recipes``; another is derived with ``dataclasses.replace`` or ``Recipe.derive``::

    late_rsqrt = cufuse.recipes["torch"].derive("torch, correct rsqrt", norm={"rsqrt": "correct"})
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from cufuse import _decoder_recipe
from cufuse._decoder_recipe import Attention as Attention
from cufuse._decoder_recipe import Mlp as Mlp
from cufuse.emulation.sums import SUM_ORDERS
from cufuse.emulation.tensor_core import TENSOR_CORES

Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """The numerics of one RMSNorm over rows of K values, float32 but for the roundings named::

        s = sum of squares in sum_order;  m = mean(s);  r = rsqrt(m + float32(eps));
        h = x * r;  y = h * (float32(w) + weight_offset)
    """

    sum_order: str
    """A key of ``cufuse.emulation.sums.SUM_ORDERS``: which partial sums are formed and how they are joined."""
    sum_order_after_residual: str | None = None
    """The order where a residual was added first, if it is another one (vLLM has a kernel of its own for that)."""
    contract: bool = False
    """Whether ``accumulator + x*x`` is one fused multiply-add. Seen only where x is float32: bfloat16 squares are exact."""
    mean: Literal["factor", "reciprocal", "divide"]
    """``s * (float32(M) / float32(M K))`` for M rows (PyTorch's mean), ``s * float32(1/K)``, or ``s / K``."""
    rsqrt: Literal["hardware", "correct"] = "hardware"
    """``rsqrt.approx.f32`` as an H200 computes it, or the correctly rounded reciprocal square root."""
    round_normalised: bool
    """Whether h is rounded to bfloat16."""
    weight_offset: float = 0.0
    """Added to the weight in float32 (Gemma stores w - 1)."""
    round_weighted: bool
    """Whether y is rounded to bfloat16; float32 otherwise."""
    float32_weight: Literal["promote", "accept", "refuse"] = "refuse"
    """A float32 weight: makes y float32 (PyTorch's type promotion), is multiplied like any other, or is a TypeError."""


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """The numerics of ``x W^T`` on a tensor core: K ascending, one block of products at a time on one float32 accumulator."""

    input: Dtype = "bfloat16"
    """What enters. float32 activations are split exactly into three bfloat16 parts (high, middle, low), which enter in this
    order for every 16 steps of K, on the same accumulator; the weight is bfloat16."""
    core: str = "sm_90"
    """A key of ``cufuse.emulation.tensor_core.TENSOR_CORES``: terms a block, fraction bits kept, exponent floor."""
    k_slices: int | Literal["cublas"] = "cublas"
    """How many slices of K have accumulators of their own, added in float32 first to last; "cublas": as many as cuBLAS takes."""
    output: Dtype = "bfloat16"
    """Whether the accumulator is rounded to bfloat16."""
    quantised: Literal["decoded", "block-scaled", "q8_1"] = "decoded"
    """What becomes of a quantised weight. "decoded": its float32 values are rounded to bfloat16, then it is a weight like any
    other. "block-scaled": its integers enter the tensor core, exactly; each group's sum is multiplied by the group's scale and
    added by a fused multiply-add in float32 (``cufuse.emulation.block_scaled``). "q8_1": activations are quantised too and the
    products are integer dot products (``cufuse.emulation.q8_1``)."""
    quantised_slices: int = 8
    """k_slices of a "block-scaled" weight: ceil(pieces / 8) pieces of 64 k (256 for formats with blocks of 256) in each."""


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The numerics of rotary embedding, halves rotated: ``x * cos + rotate_half(x) * sin`` with rotate_half(x) = (-x2, x1)."""

    tables: Dtype = "bfloat16"
    """The type to which the float32 cos and sin are rounded before use."""
    round_products: bool = True
    """Whether each of the two products is rounded to bfloat16."""
    contract: bool = False
    """Whether the first product and the sum are one fused multiply-add, after the second product was rounded to float32."""
    round_sum: bool = True
    """Whether the sum is rounded to bfloat16."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An immutable description of one computation's numerics: residual sum, norm, projection, head norm, rotation.

    Contradictory or unknown fields raise ValueError when the recipe is made. ``print(recipe)`` lists the rounding points.
    """

    name: str
    summary: str
    """Which implementation and version this is."""
    source: str
    """Where that is known from."""
    residual_sum: Literal["rounded", "stored rounded", "float32"] = "rounded"
    """x + residual: rounded to bfloat16 before all else; normalised unrounded, rounded only in the new residual; or float32."""
    norm: Norm
    gemm: Gemm = field(default_factory=Gemm)
    head_norm: Norm
    rope: Rope = field(default_factory=Rope)
    round_output: bool = False
    """Whether q, k and v, where still float32, are rounded to bfloat16 at the very end."""
    float32_activations: bool = False
    """Whether x and residual may be float32."""
    packed_projections: bool = False
    """Whether a decoder has q, k, v in one projection, and gate and up in another: cuBLAS cuts the K of a packed one otherwise."""
    attention: Attention = field(default_factory=Attention)
    mlp: Mlp = field(default_factory=Mlp)
    mlp_norm: Norm | None = None
    """The norm before the MLP and the final one; None: as ``norm``."""
    dense: Gemm | None = None
    """The projections behind the attention (output, gate, up, down, head); None: as ``gemm``."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", f"{self.name}: {self.summary} Source: {self.source}")
        for part, kind in (("norm", Norm), ("gemm", Gemm), ("head_norm", Norm), ("rope", Rope)):
            if not isinstance(getattr(self, part), kind):
                raise TypeError(f"recipe {self.name!r}: {part} is {getattr(self, part)!r}; needed is a {kind.__name__}")
        for part, other in (("attention", Attention), ("mlp", Mlp), ("mlp_norm", Norm), ("dense", Gemm)):
            value = getattr(self, part)
            if not isinstance(value, other) and (value is not None or part in ("attention", "mlp")):
                raise TypeError(f"recipe {self.name!r}: {part} is {value!r}; needed is {other.__name__}")
        for fields in (self, self.norm, self.gemm, self.head_norm, self.rope, self.attention, self.mlp, self.mlp_norm, self.dense):
            if fields is not None:
                _check_choices(self.name, fields)
        for contradiction in _contradictions(self):
            raise ValueError(f"recipe {self.name!r}: {contradiction}")

    def __str__(self) -> str:
        lines = [f"{self.name}: {self.summary}", f"  source: {self.source}"]
        return "\n".join(lines + [f"  {number:2}. {point}" for number, point in enumerate(self.rounding_points(), 1)])

    def rounding_points(self) -> list[str]:
        """The computation in its order, one line a step, every rounding to bfloat16 marked with "-> bfloat16"."""
        residual = {
            "rounded": "x + residual -> bfloat16; this is stored and normalised",
            "stored rounded": "x + residual in float32 is normalised; the stored residual -> bfloat16",
            "float32": "x + residual in float32 is normalised and stored",
        }[self.residual_sum]
        return [
            f"residual: {residual}",
            *_describe_norm("norm", self.norm),
            *_describe_gemm(self.gemm),
            *_describe_norm("head norm", self.head_norm),
            *_describe_rope(self.rope),
            "output: q, k, v " + ("-> bfloat16 here, once" if self.round_output else "as they are"),
        ]

    def output(self, *, head_norm: bool, rotation: bool) -> Dtype:
        """The type in which a projection leaves the block after the steps that follow it: q and k after head norm and rotation,
        where the block has them, v after neither. The last of these steps rounds or does not; ``round_output`` always does."""
        rounded = self.gemm.output == "bfloat16"
        if head_norm:
            rounded = self.head_norm.round_weighted
        if rotation:
            rounded = self.rope.round_sum
        return "bfloat16" if rounded or self.round_output else "float32"

    def decoder_points(self) -> list[str]:
        """The steps behind those of ``rounding_points``, with which a decoder's layer ends, likewise."""
        return [
            *self.attention.points(),
            *(line.replace("projection", "output, gate, up, down, head", 1) for line in _describe_gemm(self.dense or self.gemm)),
            *_describe_norm("MLP's norm, final norm", self.mlp_norm or self.norm),
            *self.mlp.points(),
        ]

    def derive(self, name: str, **changes: Any) -> Self:
        """A copy under another name with some fields changed; norm, gemm, head_norm, rope, attention and mlp take a dict of theirs
        (mlp_norm and dense too, on top of norm and gemm where they are None).

        Raises ValueError for a contradiction, TypeError for an unknown field (from ``dataclasses.replace``).
        """
        for key, value in changes.items():
            if isinstance(value, dict):
                base = getattr(self, key)
                if base is None and key in ("mlp_norm", "dense"):
                    base = self.norm if key == "mlp_norm" else self.gemm
                changes[key] = dataclasses.replace(base, **value)
        return dataclasses.replace(self, name=name, **changes)

    def on(self, core: str) -> Self:
        """This recipe on another tensor core ("sm_80", ...), under its own name."""
        dense = None if self.dense is None else {"core": core}
        return self.derive(self.name, gemm={"core": core}, dense=dense)


_CHOICES: dict[str, tuple[Any, ...]] = {
    "residual_sum": ("rounded", "stored rounded", "float32"),
    "mean": ("factor", "reciprocal", "divide"),
    "rsqrt": ("hardware", "correct"),
    "float32_weight": ("promote", "accept", "refuse"),
    "input": ("bfloat16", "float32"),
    "output": ("bfloat16", "float32"),
    "quantised": ("decoded", "block-scaled", "q8_1"),
    "tables": ("bfloat16", "float32"),
    "sum_order": tuple(SUM_ORDERS),
    "sum_order_after_residual": (None, *SUM_ORDERS),
    "core": tuple(TENSOR_CORES),
} | _decoder_recipe.CHOICES


def _check_choices(recipe: str, part: Any) -> None:
    for one in dataclasses.fields(part):
        value = getattr(part, one.name)
        choices = (True, False) if one.type is bool else _CHOICES.get(one.name)
        if choices is not None and (value not in choices or isinstance(value, bool) != (one.type is bool)):
            allowed = ", ".join(map(repr, choices))
            raise ValueError(f"recipe {recipe!r}: {one.name} is {value!r}; needed is one of {allowed}")


def _contradictions(recipe: Recipe) -> list[str]:
    norm, gemm, rope = recipe.norm, recipe.gemm, recipe.rope
    slices = gemm.k_slices
    behind = (recipe.dense or gemm).input == "bfloat16", (recipe.mlp_norm or norm).round_weighted
    checks = {
        "gemm.input is bfloat16, but norm.round_weighted is False: the norm's float32 output would be rounded nowhere": (
            gemm.input == "bfloat16" and not norm.round_weighted
        ),
        "gemm.input is float32, but norm.round_weighted is True: what the norm rounded would be split for nothing": (
            gemm.input == "float32" and norm.round_weighted
        ),
        "norm.weight_offset and head_norm.weight_offset must be finite numbers": not all(
            isinstance(part.weight_offset, (int, float)) and math.isfinite(part.weight_offset) for part in (norm, recipe.head_norm)
        ),
        f"gemm.core {gemm.core} has no bfloat16; needed is sm_80 or newer": "bfloat16" not in TENSOR_CORES[gemm.core].dtypes,
        f"gemm.k_slices is {slices!r}; needed is 'cublas' or an integer >= 1": slices != "cublas" and not _is_count(slices),
        f"gemm.quantised_slices is {gemm.quantised_slices!r}; needed is an integer >= 1": not _is_count(gemm.quantised_slices),
        "the projections behind the attention (dense, or gemm) and the MLP's norm (mlp_norm, or norm) do not go together: bfloat16 "
        "input needs round_weighted, float32 input needs it False": behind[0] != behind[1],
        "dense takes bfloat16, but attention.round_output or mlp.round_gated is False: their float32 would be rounded nowhere": (
            behind[0] and not (recipe.attention.round_output and recipe.mlp.round_gated)
        ),
        "rope.contract with rope.round_products: a fused multiply-add has no product to round": (
            rope.contract and rope.round_products
        ),
        "rope.round_products without rope.round_sum: bfloat16 products are added into a bfloat16": (
            rope.round_products and not rope.round_sum
        ),
        "rope.round_products, but head_norm.round_weighted is False: what is rotated is float32": (
            rope.round_products and not recipe.head_norm.round_weighted
        ),
        "round_output, but nothing is float32 at the end": (
            recipe.round_output and gemm.output == "bfloat16" and rope.round_sum and recipe.head_norm.round_weighted
        ),
    }
    return [text for text, holds in checks.items() if holds]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _describe_norm(title: str, norm: Norm) -> list[str]:
    weight = "w" if norm.weight_offset == 0 else f"(w + {norm.weight_offset:g})"
    mean = {"factor": "s * (float32(M) / float32(M K))", "reciprocal": "s * float32(1/K)", "divide": "s / K"}[norm.mean]
    rsqrt = "rsqrt.approx.f32" if norm.rsqrt == "hardware" else "correctly rounded 1/sqrt"
    fma = ", accumulated by fused multiply-add" if norm.contract else ""
    if norm.sum_order_after_residual is not None:
        fma += f"; after a residual sum {norm.sum_order_after_residual}"
    return [
        f"{title}: s = sum of squares, order {norm.sum_order} ({SUM_ORDERS[norm.sum_order].summary}){fma}",
        f"{title}: m = {mean}; r = {rsqrt} of m + eps",
        f"{title}: h = x * r" + (" -> bfloat16" if norm.round_normalised else " in float32"),
        f"{title}: y = h * {weight}" + (" -> bfloat16" if norm.round_weighted else " in float32"),
    ]


def _describe_gemm(gemm: Gemm) -> list[str]:
    core = TENSOR_CORES[gemm.core]
    slices = {"cublas": "as many slices as cuBLAS takes", 1: "one slice"}.get(gemm.k_slices, f"{gemm.k_slices} slices")
    parts = "" if gemm.input == "bfloat16" else "; float32 activations in three bfloat16 parts: high, middle, low for every 16 of K"
    quantised = {
        "decoded": "; quantised weights decoded -> bfloat16",
        "block-scaled": "; quantised weights as integers, each group's sum times its scale by fused multiply-add, in "
        f"{gemm.quantised_slices} slices",
        "q8_1": "; with quantised weights: activations in blocks of 32 bytes, integer dot products in llama.cpp's order",
    }[gemm.quantised]
    return [
        f"projection: {gemm.core} blocks of {core.terms} products, terms cut to {core.fraction_bits} bits below the largest "
        f"exponent, K ascending, {slices}{parts}{quantised}",
        "projection: accumulator" + (" -> bfloat16" if gemm.output == "bfloat16" else " in float32"),
    ]


def _describe_rope(rope: Rope) -> list[str]:
    tables = "cos, sin -> bfloat16" if rope.tables == "bfloat16" else "cos, sin in float32"
    products = "each product -> bfloat16" if rope.round_products else "products in float32"
    if rope.contract:
        products = "second product in float32, first one fused into the sum"
    return [f"rotation: {tables}; {products}; sum" + (" -> bfloat16" if rope.round_sum else " in float32")]
