"""What the parts of a block cost on a GPU: python3 -m tests.gpu_bench_parts --model 8b,0.6b --tokens 2048,8192

Microseconds of ``rms_norm_qkv`` (recipe ``torch``) whole, without rotation, without head norm and without both, of its norm and its
projection alone and one behind the other, and of cuBLAS's projection: CUDA graphs over distinct weights, replayed in turn in random
order (``cufuse.bench_timing``), medians. What the heads add to norm and projection is what other work does not hide. No column
needs little power here, as eager does in ``cufuse bench``: times of the two are not to be compared. Bits are not compared.
"""

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import cufuse
from cufuse import _gpu_linear
from cufuse.bench import MODELS
from cufuse.bench_inputs import EPS, Block, Layer
from cufuse.bench_peers import Peers
from cufuse.bench_results import GEMM
from cufuse.bench_timing import WARM_SECONDS, Clock, Run, in_turn
from cufuse.named_recipes import RECIPES
from tests import gpu_support

TURNS = 20
RECIPE = RECIPES["torch"]


def front(block: Block, head_norm: bool, rotation: bool, index: int) -> None:
    """The block, or what is left of it."""
    layer = block.layer
    norms = (layer.q_norm, layer.k_norm) if head_norm else (None, None)
    tables = {"cos": block.cos, "sin": block.sin} if rotation else {}
    cufuse.rms_norm_qkv(
        block.x, layer.norm, block.weights[index], *norms, eps=EPS, heads=layer.heads, head_dim=layer.head_dim, recipe=RECIPE,
        out=block.out, **tables,
    )  # fmt: skip


def ways(block: Block) -> dict[str, Callable[[int], Any]]:
    """What is timed, as functions of a weight's number."""
    cupy = gpu_support.cupy()
    y = cupy.empty_like(block.x)
    products = cupy.empty((len(block.x), block.layer.rows), cufuse.bfloat16)

    def norm(index: int) -> None:
        cufuse.rms_norm(block.x, block.layer.norm, eps=EPS, recipe=RECIPE, out=y)

    def projection(index: int) -> None:
        _gpu_linear.linear(y, block.weights[index], products)

    def both(index: int) -> None:
        norm(index)
        projection(index)

    norm(0)
    return {
        "block": partial(front, block, True, True), "no rotation": partial(front, block, True, False),
        "no head norm": partial(front, block, False, True), "neither": partial(front, block, False, False),
        "norm": norm, "projection": projection, "norm, projection": both,
    }  # fmt: skip


def measure(layer: Layer, tokens: int, clock: Clock, peers: Peers) -> dict[str, float]:
    """Microseconds of each way."""
    block = Block(layer, tokens, RECIPE)
    torch_block = peers.block(block)
    runs = {}
    for name, call in ways(block).items():
        call(0)
        runs[name] = Run(clock.capture([partial(call, index) for index in range(block.calls)]))
    runs["cuBLAS"] = torch_block.run(GEMM, clock)
    found = {}
    for name, samples in in_turn(clock.time, runs, TURNS, WARM_SECONDS).items():
        if samples.error is not None:
            raise samples.error
        found[name] = statistics.median(samples.times) / block.calls
    clock.settle()
    torch_block.release()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="8b,4b,0.6b", help=f"of {', '.join(MODELS)} (default: %(default)s)")
    parser.add_argument("--tokens", default="2048,8192", help="rows (default: %(default)s)")
    given = parser.parse_args()
    tokens = [int(number) for number in given.tokens.split(",")]
    clock, peers = Clock(), Peers(())
    for model in given.model.split(","):
        layer = Layer(MODELS[model], max(tokens))
        for number in tokens:
            times = measure(layer, number, clock, peers)
            print(f"{model}, {number} rows: {'; '.join(f'{name} {time:.4g}' for name, time in times.items())}", flush=True)


if __name__ == "__main__":
    main()
