"""Calls at small sizes, every operation and recipe, for tests/sanitizer_suite.py: each against the emulation."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

import cufuse
from cufuse.bf16 import ROUNDING_MODES, bfloat16
from tests.golden import inputs
from tests.gpu_support import Case, against_numpy


def cases() -> Iterator[Case]:
    rng = np.random.default_rng(1)
    for mode, dtype, unsigned in itertools.product(ROUNDING_MODES, (np.float32, np.float64), (np.uint16, np.uint32)):
        if (dtype == np.float32) == (unsigned == np.uint16):
            bits = rng.integers(0, np.iinfo(unsigned).max, 1001, unsigned) if mode == "stochastic" else None
            x = rng.standard_normal(1001).astype(dtype)
            yield against_numpy(f"cast {mode}", cufuse.round_to_bf16, x, mode=mode, random_bits=bits)
    shapes = ((1, 1), (3, 1001), (5, 128), (17, 100), (2, 4096), (33, 512))
    for recipe, (rows, columns) in itertools.product(cufuse.recipes, shapes):
        weight = inputs.norm_weight(columns, 1, 96.5)
        pair = inputs.heavy((rows, columns), 2), inputs.heavy((rows, columns), 3)
        yield against_numpy(f"norm {recipe} {rows}x{columns}", cufuse.rms_norm, pair[0], weight, recipe=recipe)
        yield against_numpy(f"residual {recipe} {rows}x{columns}", cufuse.add_rms_norm, *pair, weight, recipe=recipe)
    for (name, recipe), dimensions in itertools.product(cufuse.recipes.items(), (2, 20, 128)):
        dtype = np.float32 if recipe.rope.tables == "float32" else bfloat16
        tables = cufuse.rope_tables(np.arange(7), dimensions, dtype=dtype)
        heads = inputs.heavy((7, 5, dimensions), 4), inputs.heavy((7, 1, dimensions), 5)
        yield against_numpy(f"rope {name} {dimensions}", cufuse.rope, *heads, *tables, recipe=name)
    for (m, n, k), slices in itertools.product(((1, 256, 512), (5, 100, 97), (17, 264, 192), (130, 384, 256)), (1, 3)):
        x, weight = inputs.bell((m, k), 6), inputs.bell((n, k), 7, 0.05)
        for name in ("torch", "float32"):
            what = f"linear {name} {m}x{n}x{k}, {slices} slices"
            yield against_numpy(what, cufuse.linear, x, weight, recipe=name, k_slices=slices)
    for name, packed in itertools.product(("torch", "flashinfer", "late-rounding"), (True, False)):
        weight: Any = inputs.bell((6 * 64, 192), 8, 0.05)
        weight = weight if packed else tuple(np.split(weight, (256, 320)))
        dtype = bfloat16 if cufuse.recipes[name].rope.tables == "bfloat16" else np.float32
        given = (inputs.heavy((9, 192), 9), inputs.norm_weight(192, 1, 8.0), weight)
        tables = dict(zip(("cos", "sin"), cufuse.rope_tables(np.arange(9), 64, dtype=dtype), strict=True))
        options: dict[str, Any] = {"heads": 4, "recipe": name, "k_slices": 1, "residual": inputs.heavy((9, 192), 10), **tables}
        norms = inputs.norm_weight(64, 2, 6.0), inputs.norm_weight(64, 3, 96.5)
        yield against_numpy(f"block {name}, packed {packed}", cufuse.rms_norm_qkv, *given, *norms, **options)
