"""Quantised weights in ggml's formats: decoding, encoding, products, and the order of bytes that the kernels read.

``QuantisedWeight`` holds one; ``quantise`` makes one of float values, ``open_gguf`` reads them from files, ``dequantise`` gives
their values, ``quantised_linear`` multiplies by one, and so does ``cufuse.rms_norm_qkv``.
"""

from cufuse.quantised.formats import FORMATS, Format
from cufuse.quantised.product import quantised_linear
from cufuse.quantised.weight import QuantisedWeight, concatenate, dequantise, quantise

__all__ = [
    "FORMATS", "Format", "QuantisedWeight", "concatenate", "dequantise", "open_gguf", "quantise", "quantise_layer",
    "quantised_linear",
]  # fmt: skip

# after the rest, for reading files asks it for its types
from cufuse.quantised.gguf_checkpoint import open_gguf, quantise_layer
