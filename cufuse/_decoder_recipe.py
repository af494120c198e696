"""What a recipe says about the decoder behind the attention's front: attention, MLP. Parts of ``cufuse.Recipe``."""

from dataclasses import dataclass
from typing import Literal

Exponential = Literal["hardware", "correct"]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The numerics of one head's attention; queries, keys and values enter as bfloat16 (the K/V cache holds nothing else)::

        s = q k^T;  s' = s * float32(1 / sqrt(D)), masked;  e = exp(s' - max(s'));  w = e / sum(e) -> bfloat16;  o = w V

    Both products are those of the projection's tensor core, one slice.
    """

    products: Literal["cublas", "blocks"] = "cublas"
    """The order of both products. "blocks": blocks of 16, ascending. "cublas": as cuBLAS takes them on an H200, which for sizes
    that 8 does not divide is another one (``cufuse.emulation.attention_products``)."""
    round_scores: bool = True
    """Whether s is rounded to bfloat16."""
    round_scaled: bool = True
    """Whether s' is rounded to bfloat16."""
    exponential: Exponential = "hardware"
    """``expf`` of CUDA on an H200 (a range reduction around ``ex2.approx``), or the correctly rounded exponential."""
    softmax_order: str = "torch-softmax"
    """The order in which e is added up, a key of ``cufuse.emulation.softmax_sums.SOFTMAX_ORDERS``."""
    round_output: bool = True
    """Whether o is rounded to bfloat16."""

    def points(self) -> list[str]:
        """One line a step."""
        return [
            "attention: q, k, v -> bfloat16 where they are not yet",
            f"attention: s = q k^T, {_PRODUCTS[self.products]}" + _rounded(self.round_scores),
            "attention: s' = s * float32(1/sqrt(D)), masked" + _rounded(self.round_scaled),
            f"attention: e = {_NAMES[self.exponential]} of s' - max; sum in order {self.softmax_order}; w = e / sum -> bfloat16",
            f"attention: o = w V over the keys, {_PRODUCTS[self.products]}" + _rounded(self.round_output),
        ]


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """The numerics of SwiGLU: ``a = g / (1 + exp(-g)); y = a * u``."""

    exponential: Exponential = "hardware"
    """As in ``Attention``."""
    round_activated: bool = True
    """Whether a is rounded to bfloat16."""
    round_gated: bool = True
    """Whether y is rounded to bfloat16."""

    def points(self) -> list[str]:
        """One line a step."""
        return [
            f"MLP: a = g / (1 + {_NAMES[self.exponential]} of -g)" + _rounded(self.round_activated),
            "MLP: y = a * u" + _rounded(self.round_gated),
        ]


CHOICES: dict[str, tuple[object, ...]] = {
    "products": ("cublas", "blocks"),
    "exponential": ("hardware", "correct"),
    "softmax_order": ("torch-softmax",),
}
"""What the fields may hold, for the recipe's check."""

_PRODUCTS = {"cublas": "in cuBLAS's order for the shape", "blocks": "blocks as in the projection, ascending"}
_NAMES = {"hardware": "CUDA's expf", "correct": "the correctly rounded exponential"}


def _rounded(rounded: bool) -> str:
    return " -> bfloat16" if rounded else " in float32"
