"""The kernels on this machine's GPU against the emulation: the same inputs, every bit compared.

``run`` is behind ``cufuse check``. Inputs come from a seed; each area has sizes that fit no tile, several numbers of rows
(the order of a sum may depend on them), zeros, subnormals, infinities and NaN.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import cufuse
from cufuse import named_recipes
from cufuse.bf16 import ROUNDING_MODES, from_bits
from cufuse.synthetic import synthetic_layer


@dataclass(frozen=True)
class Comparison:
    """Outputs of one area that were compared, and how many of them differ in a bit."""

    area: str
    outputs: int
    differing: int


def run(progress: Callable[[str, float], None] | None = None, seed: int = 0) -> list[Comparison]:
    """Compare everything; some seconds once the kernels are compiled. Raises NoGpuError without a GPU."""
    from cufuse import launch

    launch.device_count()
    generator = np.random.default_rng(seed)
    areas: list[tuple[str, Callable[[np.random.Generator], Iterator[tuple[Any, Any]]]]] = [
        ("round_to_bf16", _casts),
        ("rms_norm", _norms),
        ("add_rms_norm", _residual_norms),
        ("rope", _ropes),
        ("linear", _linears),
        ("rms_norm_qkv", _blocks),
    ]
    found = []
    for number, (area, pairs) in enumerate(areas):
        if progress is not None:
            progress(area, number / len(areas))
        outputs = differing = 0
        for expected, given in pairs(generator):
            outputs += expected.size
            differing += _differing(expected, given)
        found.append(Comparison(area, outputs, differing))
    return found


def _both(function: Callable[..., Any], *arrays: Any, **options: Any) -> Iterator[tuple[Any, Any]]:
    """(emulation's, kernel's) results of a call, output by output."""
    import cupy

    def to_gpu(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(to_gpu, value))
        return cupy.asarray(value) if isinstance(value, np.ndarray) else value

    expected = function(*arrays, **options)
    given = function(*map(to_gpu, arrays), **{name: to_gpu(value) for name, value in options.items()})
    if not isinstance(expected, tuple):
        expected, given = (expected,), (given,)
    yield from zip(expected, map(cupy.asnumpy, given), strict=True)


def _differing(expected: np.ndarray, given: np.ndarray) -> int:
    unsigned = np.dtype(f"u{expected.dtype.itemsize}")
    differ = np.ascontiguousarray(expected).view(unsigned) != np.ascontiguousarray(given).view(unsigned)
    if expected.dtype == np.float32:
        # a float32 NaN has no bits that a recipe promises
        differ &= ~(np.isnan(expected) & np.isnan(given))
    return int(np.count_nonzero(differ))


def _values(generator: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    wide = generator.standard_normal(shape, np.float32) * np.exp2(generator.integers(-3, 4, shape)).astype(np.float32)
    return cufuse.round_to_bf16(wide * np.float32(scale))  # type: ignore[no-any-return]


def _casts(generator: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    single = generator.integers(0, 2**32, 2_000_000, np.uint32).view(np.float32)
    with np.errstate(invalid="ignore"):
        double = single.astype(np.float64) * (1 + generator.standard_normal(single.size) * 2.0**-40)
    for mode in ROUNDING_MODES:
        for x, unsigned in ((single, np.uint16), (double, np.uint32)):
            bits = generator.integers(0, np.iinfo(unsigned).max, x.size, unsigned, endpoint=True)
            yield from _both(cufuse.round_to_bf16, x, mode=mode, **({"random_bits": bits} if mode == "stochastic" else {}))


def _norms(generator: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    for name in named_recipes.RECIPES:
        for k in (1, 7, 100, 128, 1000, 1024, 2560, 5120, 8192):
            for m in (1, 3, 5, 8, 17):
                yield from _both(cufuse.rms_norm, _values(generator, m, k), _values(generator, k), recipe=name)
    rows = np.zeros((4, 1024), np.uint16)
    rows[1], rows[2, 3], rows[3, 5] = np.arange(1024) % 128, 0x7F80, 0x7FC1
    yield from _both(cufuse.rms_norm, from_bits(rows), _values(generator, 1024))


def _residual_norms(generator: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    for name in named_recipes.RECIPES:
        for m, k in ((1, 1024), (6, 1000), (17, 4096)):
            x, residual = _values(generator, m, k), _values(generator, m, k, scale=3.0)
            yield from _both(cufuse.add_rms_norm, x, residual, _values(generator, k), recipe=name)


def _ropes(generator: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    for name, recipe in named_recipes.RECIPES.items():
        for d in (64, 128, 256):
            cos, sin = cufuse.rope_tables(np.arange(1000, 1019), d, dtype=recipe.rope.tables)
            q, k = _values(generator, 19, 6, d), _values(generator, 19, 2, d)
            yield from _both(cufuse.rope, q, k, cos, sin, recipe=name)


def _linears(generator: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    for m, n, k, slices in (
        (1, 4096, 1024, 1),
        (3, 1024, 1024, 1),
        (16, 4096, 1024, 1),
        (65, 1024, 1024, 1),
        (33, 8, 1000, 1),
        (777, 24, 96, 1),
        (5, 257, 97, 1),
        (8, 1024, 4096, 3),
        (130, 256, 2560, 4),
    ):
        x, weight = _values(generator, m, k), _values(generator, n, k, scale=0.05)
        for name in ("torch", "float32"):
            yield from _both(cufuse.linear, x, weight, recipe=name, k_slices=slices)
    codes = generator.integers(0, 2**16, (24, 320), np.uint16)
    yield from _both(cufuse.linear, from_bits(codes), from_bits(codes[::-1].copy()), k_slices=1)
    wide = generator.standard_normal((9, 512), np.float32)
    yield from _both(cufuse.linear, wide, _values(generator, 96, 512), recipe="float32")


def _blocks(generator: np.random.Generator) -> Iterator[tuple[Any, Any]]:
    layer = synthetic_layer("qwen3-0.6b", 0, 0)
    for name, recipe in named_recipes.RECIPES.items():
        for m in (1, 17):
            cos, sin = cufuse.rope_tables(np.arange(m), 128, dtype=recipe.rope.tables)
            weights: Any = (layer.q_proj, layer.k_proj, layer.v_proj) if m == 1 else layer.qkv_proj
            yield from _both(
                cufuse.rms_norm_qkv,
                _values(generator, m, 1024),
                layer.input_norm,
                weights,
                layer.q_norm,
                layer.k_norm,
                cos=cos,
                sin=sin,
                heads=16,
                recipe=name,
                k_slices=1,
            )


