"""Fused RMSNorm and GEMM whose every rounding point and order of summation is stated, with PyTorch's bits.

NumPy arrays run an emulation that predicts the bits of a GPU; CuPy arrays run the kernels, with the same bits.
"""

from cufuse import oracle
from cufuse.bf16 import bfloat16, round_to_bf16
from cufuse.emulation.cublas import AssumedSlicesWarning
from cufuse.gemm import linear
from cufuse.named_recipes import RECIPES as recipes
from cufuse.norm import add_rms_norm, rms_norm
from cufuse.qkv import rms_norm_qkv
from cufuse.recipe import Recipe
from cufuse.rope import rope, rope_tables

__version__ = "0.1.0"

__all__ = [
    "AssumedSlicesWarning",
    "Recipe",
    "add_rms_norm",
    "bfloat16",
    "linear",
    "oracle",
    "recipes",
    "rms_norm",
    "rms_norm_qkv",
    "rope",
    "rope_tables",
    "round_to_bf16",
]
