"""The whole Qwen3 under any recipe: which rounding becomes which text.

    model = cufuse.qwen3.open_model("Qwen3-0.6B")            # or cufuse.qwen3.synthetic()
    logits = model.forward([9707, 11, 1879], recipe="torch")
    text = model.generate([9707, 11, 1879], 64, recipe="late-rounding").tokens

``compare`` says which recipe another engine's intermediates follow, and up to where.
"""

from cufuse.qwen3.comparison import Agreement, Comparison, compare
from cufuse.qwen3.decoder import LAST_STAGES, STAGES, Cache, intermediate_names
from cufuse.qwen3.model import Generation, Qwen3, open_model
from cufuse.qwen3.synthetic import MODELS, synthetic
from cufuse.qwen3.weights import Layer, Weights, read_weights

__all__ = [
    "LAST_STAGES",
    "MODELS",
    "STAGES",
    "Agreement",
    "Cache",
    "Comparison",
    "Generation",
    "Layer",
    "Qwen3",
    "Weights",
    "compare",
    "intermediate_names",
    "open_model",
    "read_weights",
    "synthetic",
]
