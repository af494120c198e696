"""Tests of rounding by bits: Hypothesis strategies, assertions, and the first place where two chains part.

``import cufuse.testing`` (``import cufuse`` alone loads neither it nor Hypothesis). The strategies need Hypothesis, the rest does
not.

A kernel of your own against a recipe. Say where it rounds and in which order it adds, and demand every bit; the function below
stands for a launch of a Triton or CuPy kernel (``xp=cupy`` draws CuPy arrays; PyTorch tensors are compared too):

>>> import numpy as np
>>> import cufuse
>>> from cufuse import testing
>>> from cufuse.emulation.rsqrt import rsqrt
>>> from hypothesis import given, settings
>>> def own_kernel(x, weight, eps):
...     stages = dict(own_stages(x, weight, eps))
...     return stages["y"]
>>> def own_stages(x, weight, eps):
...     wide = x.astype(np.float32)
...     total = np.zeros(len(wide), np.float32)
...     for column in wide.T:                              # one thread a row, first to last
...         total += column * column
...     r = rsqrt(total / np.float32(wide.shape[1]) + np.float32(eps))
...     yield "r", r
...     h = wide * r[:, None]                              # forgotten: the rounding to bfloat16
...     yield "h", h
...     yield "y", cufuse.round_to_bf16(h * weight.astype(np.float32))
>>> stated = cufuse.recipes["torch"].derive("first to last", norm={"sum_order": "sequential", "mean": "divide"})
>>> @settings(database=None, derandomize=True, report_multiple_bugs=False)
... @given(testing.rms_norm_inputs(rows=1, columns=4))
... def test_own_kernel(inputs):
...     testing.assert_bits_equal(own_kernel(**inputs), cufuse.rms_norm(**inputs, recipe=stated), what="y")

>>> try:
...     test_own_kernel()
... except AssertionError as error:
...     print(error)                                       # doctest: +ELLIPSIS
y: ... of ... differ
  first at (0, ...): 0x... (...), expected 0x... (...): 1 ulp apart
  distances: 1 ulp: ...

Hypothesis shows a small counterexample beside it. Which rounding it is, the stages tell:

>>> x = cufuse.round_to_bf16(np.linspace(-3, 3, 64, dtype=np.float32)[None])
>>> weight = cufuse.round_to_bf16(np.full(64, 1.7, np.float32))
>>> print(testing.find_first_difference(stated, own_stages, {"x": x, "weight": weight, "eps": 1e-6}))
the chains part at stage 'h' (equal up to 'r'): 64 of 64 elements differ
  first at (0, 0): 0xbfda (-1.703125) and 0xbfda3646 (-1.7047812938690186)
  dtypes bfloat16 and float32: the values are compared
  first to last states there: 'norm: h = x * r -> bfloat16'

Strategies: ``bf16_bits``, ``bf16_values``, ``bf16_arrays``, ``float32_near_ties``, ``float64_near_ties``, ``accumulation_hard``,
``rms_norm_inputs``, ``gemm_inputs``, ``recipes``. ``hypothesis.strategies.from_type`` knows ``cufuse.bfloat16`` and
``cufuse.Recipe`` once this module is imported. Assertions: ``assert_bits_equal``, ``assert_within_ulp``,
``assert_correctly_rounded``, ``assert_same_row_any_batch``. Chains: ``find_first_difference``, ``recipe_stages``.
"""

from typing import Any

from cufuse.testing._assertions import (
    assert_bits_equal,
    assert_correctly_rounded,
    assert_same_row_any_batch,
    assert_within_ulp,
)
from cufuse.testing._differences import Difference, find_first_difference
from cufuse.testing._stages import recipe_stages

__all__ = [
    "Difference",
    "accumulation_hard",
    "assert_bits_equal",
    "assert_correctly_rounded",
    "assert_same_row_any_batch",
    "assert_within_ulp",
    "bf16_arrays",
    "bf16_bits",
    "bf16_values",
    "find_first_difference",
    "float32_near_ties",
    "float64_near_ties",
    "gemm_inputs",
    "recipe_stages",
    "recipes",
    "rms_norm_inputs",
]

try:
    from hypothesis.strategies import register_type_strategy

    from cufuse.bf16 import bfloat16 as _bfloat16
    from cufuse.recipe import Recipe as _Recipe
    from cufuse.testing._inputs import accumulation_hard, gemm_inputs, rms_norm_inputs
    from cufuse.testing._recipes import recipes
    from cufuse.testing._strategies import bf16_arrays, bf16_bits, bf16_values, float32_near_ties, float64_near_ties

    register_type_strategy(_bfloat16, bf16_values())
    register_type_strategy(_Recipe, recipes())
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise ImportError(f"cufuse.testing.{name} needs Hypothesis, which is not installed: pip install hypothesis")
        raise AttributeError(f"module 'cufuse.testing' has no attribute {name!r}")
