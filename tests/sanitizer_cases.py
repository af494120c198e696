"""Calls at small sizes, every operation and recipe, for tests/sanitizer_suite.py: each against the emulation."""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

import cufuse
from cufuse.attention import attention
from cufuse.bf16 import ROUNDING_MODES, bfloat16
from cufuse.mlp import swiglu
from cufuse.quantised import FORMATS, QuantisedWeight, quantised_linear
from cufuse.residual import add
from cufuse.softmax import softmax
from tests.golden import inputs
from tests.gpu_support import Case, against_numpy, to_gpu
from tests.quantised_weights import random_weight
from tests.witnesses import random_bf16


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
            # initcheck does not see what the copy engine stores: an output that it left out would still have other bits
            out = np.zeros((m, n), np.float32 if name == "float32" else bfloat16)
            yield against_numpy(what, cufuse.linear, x, weight, recipe=name, k_slices=slices, out=out)
    for name, packed in itertools.product(("torch", "flashinfer", "late-rounding"), (True, False)):
        weight: Any = inputs.bell((6 * 64, 192), 8, 0.05)
        weight = weight if packed else tuple(np.split(weight, (256, 320)))
        dtype = bfloat16 if cufuse.recipes[name].rope.tables == "bfloat16" else np.float32
        given = (inputs.heavy((9, 192), 9), inputs.norm_weight(192, 1, 8.0), weight)
        tables = dict(zip(("cos", "sin"), cufuse.rope_tables(np.arange(9), 64, dtype=dtype), strict=True))
        options: dict[str, Any] = {"heads": 4, "recipe": name, "k_slices": 1, "residual": inputs.heavy((9, 192), 10), **tables}
        norms = inputs.norm_weight(64, 2, 6.0), inputs.norm_weight(64, 3, 96.5)
        yield against_numpy(f"block {name}, packed {packed}", cufuse.rms_norm_qkv, *given, *norms, **options)
    yield from chains()
    yield from quantised_products()
    yield from decoder_steps()


def chains() -> Iterator[Case]:
    """The block where its kernels are chained: heads of 128, one row, few and many."""
    weight = inputs.bell((6 * 128, 192), 8, 0.05)
    norms = inputs.norm_weight(128, 2, 6.0), inputs.norm_weight(128, 3, 96.5)
    for name, tokens, static in itertools.product(("torch", "torch-rms-norm", "late-rounding"), (1, 9, 70), (False, True)):
        dtype = bfloat16 if cufuse.recipes[name].rope.tables == "bfloat16" else np.float32
        tables = dict(zip(("cos", "sin"), cufuse.rope_tables(np.arange(tokens), 128, dtype=dtype), strict=True))
        given = (inputs.heavy((tokens, 192), 9), inputs.norm_weight(192, 1, 8.0), weight)
        options: dict[str, Any] = {"heads": 4, "recipe": name, "k_slices": 1, "residual": inputs.heavy((tokens, 192), 10), **tables}
        what = f"chain {name}, {tokens} tokens, static {static}"
        yield against_numpy(what, cufuse.rms_norm_qkv, *given, *norms, **options, static_weights=static)


def quantised_products() -> Iterator[Case]:
    """Every format and road, few rows and many."""
    for form, (m, n, k) in itertools.product(FORMATS, ((1, 333, 256), (13, 40, 768), (33, 300, 512), (70, 18, 256))):
        weight, x = random_weight(form, n, k), inputs.bell((m, k), 11)
        packed = weight.packed()
        device = QuantisedWeight(to_gpu(packed.data), packed.format, packed.shape, packed.layout)
        for name in ("block-scaled", "torch", "llama.cpp", "llama.cpp-q8_1"):
            options: dict[str, Any] = {"recipe": name} | ({"k_slices": 2} if name == "torch" else {})
            found = partial(quantised_linear, to_gpu(x), device, **options)
            yield Case(f"quantised {form} {name} {m}x{n}x{k}", found, partial(quantised_linear, x, weight, **options))


def decoder_steps() -> Iterator[Case]:
    """Softmax of short and long rows, attention of a prompt and of one token, the activation, the residual sum."""
    for columns in (1, 33, 1025):
        yield against_numpy(f"softmax of {columns}", softmax, random_bf16(columns, 3, columns, scale=3))
    for batch, queries, keys in ((1, 1, 77), (1, 13, 13), (32, 13, 13)):  # the last one's scores are added in lanes
        q, k, v = (random_bf16(seed, batch, n, h, 64) for seed, (n, h) in enumerate(((queries, 4), (keys, 2), (keys, 2))))
        yield against_numpy(f"attention {batch} x {queries} x {keys}", attention, q, k, v)
    yield against_numpy("swiglu", swiglu, random_bf16(1, 3, 129), random_bf16(2, 3, 129))
    yield against_numpy("add", add, random_bf16(1, 3, 129), random_bf16(2, 3, 129))
