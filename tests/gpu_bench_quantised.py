"""Which kernel multiplies by quantised weights fastest, for whom chooses between them: python3 -m tests.gpu_bench_quantised

The projection alone, every configuration that can take it beside the one that is chosen and beside bfloat16: microseconds inside
CUDA graphs over distinct weights of 1 GB in all, medians of replays in turn. ``--models 8b``, ``--rows 1,16`` and
``--formats Q4_0`` choose. The whole block, its errors and what it gains are in ``cufuse bench --quantised``.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import cufuse
from cufuse import _gpu_linear, _gpu_quantised, bench, launch
from cufuse import _linear_quantised as planning
from cufuse._linear_quantised_wgmma import WGMMA
from cufuse.bench_inputs import Layer
from cufuse.bench_quantised import Formats
from cufuse.bench_timing import Clock, Run, in_turn
from cufuse.named_recipes import RECIPES
from cufuse.quantised import FORMATS

SLICES = RECIPES["block-scaled"].gemm.quantised_slices
TURNS = 5


def configurations(form: str, m: int) -> list[Any]:
    """Every one for the format that may take so many rows of bfloat16."""
    both: tuple[Any, ...] = (*planning.STREAMED, *WGMMA, *planning.ANYWHERE)
    return [
        c for c in both if c.form == form and getattr(c, "parts", 1) == 1 and (m <= c.tokens or not getattr(c, "resident", False))
    ]


def captured(clock: Clock, multiply: Callable[..., Any], weights: list[Any], **options: Any) -> Run:
    """One call for each weight; the kernel is compiled and loaded before."""
    multiply(weights[0], **options)
    return Run(clock.capture(partial(multiply, weight, **options) for weight in weights))


def measure(clock: Clock, layer: Layer, formats: Formats, m: int) -> dict[str, float]:
    """Microseconds of one product: "bf16", each format, and each format with each kernel."""
    import cupy

    x = cufuse.rms_norm(layer.tokens[:m], layer.norm)
    out = cupy.empty((m, layer.rows), cufuse.bfloat16)
    runs = {"bf16": captured(clock, lambda weight: _gpu_linear.linear(x, weight, out), layer.weights)}

    def multiply(weight: Any, **options: Any) -> None:
        _gpu_quantised.multiply(x, weight, out, SLICES, **options)

    for name, weights in formats.weights.items():
        runs[name] = captured(clock, multiply, weights)
        for configuration in configurations(name, m):
            try:
                runs[f"{name}: {configuration.kernel.name}"] = captured(clock, multiply, weights, configuration=configuration)
            except ValueError:
                continue  # it cannot take this product
    counts = {name: len(formats.weights.get(name.split(":")[0], layer.weights)) for name in runs}
    found = in_turn(clock.time, runs, TURNS)
    return {name: statistics.median(one.times) / counts[name] for name, one in found.items() if one.times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=lambda text: text.lower().split(","), default=["8b"])
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 64])
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(FORMATS))
    given = parser.parse_args()
    clock = Clock()
    print(f"{launch.device_name(0)}; microseconds, and times as fast as bfloat16")
    for model in given.models:
        layer = Layer(bench.MODELS[model], max(given.rows))
        formats = Formats(layer, given.formats, lambda text: None)
        for name, error in formats.errors.items():
            print(f"{model:5} {name}: {type(error).__name__}: {error}")
        for m in given.rows:
            times = measure(clock, layer, formats, m)
            for name, time in times.items():
                print(f"{model:5} M={m:3} {name:75} {time:8.2f} {times['bf16'] / time:6.2f} x", flush=True)


if __name__ == "__main__":
    main()
