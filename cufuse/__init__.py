"""Fused RMSNorm and GEMM whose every rounding point and order of summation is stated, with PyTorch's bits.

NumPy arrays run an emulation that predicts the bits of a GPU; CuPy arrays run the kernels, with the same bits. The operations are
``round_to_bf16``, ``rms_norm``, ``add_rms_norm``, ``linear``, ``rope`` and ``rms_norm_qkv``; ``recipes`` holds the named recipes,
``oracle`` the float64 references, ``checkpoint`` the reading of weights; ``quantise``, ``dequantise`` and ``quantised_linear`` are
for weights in 4 to 8 bits. Modules to import by name: ``cufuse.testing`` (Hypothesis strategies, assertions on bits),
``cufuse.qwen3`` (the whole decoder), ``cufuse.attention``, ``softmax``, ``mlp``, ``residual`` (its steps). Importing the package
does not import CuPy.
"""

from cufuse import checkpoint, oracle
from cufuse.bf16 import bfloat16, round_to_bf16
from cufuse.compiler import KernelCompileError
from cufuse.emulation.cublas import AssumedSlicesWarning
from cufuse.gemm import linear
from cufuse.named_recipes import RECIPES as recipes
from cufuse.norm import add_rms_norm, rms_norm
from cufuse.qkv import rms_norm_qkv
from cufuse.quantised import QuantisedWeight, dequantise, quantise, quantised_linear
from cufuse.recipe import Recipe
from cufuse.rope import rope, rope_tables

__version__ = "0.1.0"

__all__ = [
    "AssumedSlicesWarning",
    "KernelCompileError",
    "NoGpuError",
    "QuantisedWeight",
    "Recipe",
    "add_rms_norm",
    "bfloat16",
    "checkpoint",
    "dequantise",
    "linear",
    "oracle",
    "quantise",
    "quantised_linear",
    "recipes",
    "rms_norm",
    "rms_norm_qkv",
    "rope",
    "rope_tables",
    "round_to_bf16",
]

# last, for it asks the finished package for its modules
from cufuse.launch import NoGpuError
