"""Speed of products with quantised weights on a GPU beside bfloat16, with their errors: python3 -m tests.gpu_bench_quantised

Microseconds inside a CUDA graph over distinct weights of 1 GB in all, medians of the replays, formats in turn: the projection
alone; RMSNorm and packed QKV projection, two ordinary launches; the same, the projection a dependent launch; and all of
rms_norm_qkv with head norms and rotation, in its chain (recipes "torch" and "block-scaled"). Error: root mean square of the
difference of the projection from the float64 product with the unquantised weights, over that product's. ``--rows 1,64``,
``--models 8B`` and ``--formats Q4_0`` choose; ``--json FILE`` keeps everything; ``--configurations`` measures every kernel.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np

import cufuse
from cufuse import _gpu_linear, _gpu_quantised, compiler, launch, oracle, quantised
from cufuse import _linear_quantised as planning
from cufuse.bf16 import bfloat16
from cufuse.quantised import FORMATS, QuantisedWeight

MODELS = {
    "0.6B": (1024, 16), "1.7B": (2048, 16), "4B": (2560, 32), "8B": (4096, 32), "14B": (5120, 40), "32B": (5120, 64),
}  # fmt: skip
"""K, and query heads of 128, beside eight heads of keys and of values."""

HEAD, KV_HEADS = 128, 8
KINDS = ("projection", "norm, projection", "dependent", "block")
ROWS = (1, 2, 4, 8, 16, 32, 64)
BYTES = 1 << 30
MOST = 400
SLICES = 8


class Bench:
    """One model's weights in every format, and the measuring of calls over them."""

    def __init__(self, model: str, formats: list[str]) -> None:
        import cupy

        self.cupy = cupy
        self.k, self.heads = MODELS[model]
        self.n = (self.heads + 2 * KV_HEADS) * HEAD
        rng = np.random.default_rng(1)
        weight = (rng.standard_normal((self.n, self.k), np.float32) * np.float32(self.k**-0.5)).astype(bfloat16)
        self.values = weight.astype(np.float64)
        self.norm = (1 + 0.2 * rng.standard_normal(self.k)).astype(bfloat16)
        self.weights: dict[str, list[Any]] = {"bf16": self._copies(self._to_gpu(weight), lambda data: data)}
        self.one: dict[str, QuantisedWeight] = {}
        for name in formats:
            self.one[name] = quantised.quantise(weight, name)
            packed = self.one[name].packed()
            self.weights[name] = self._copies(
                cupy.asarray(packed.data), lambda data, packed=packed: QuantisedWeight(data, packed.format, packed.shape, "tiles")
            )

    def _to_gpu(self, array: np.ndarray) -> Any:
        return self.cupy.asarray(array.view(np.uint16)).view(bfloat16)

    def _copies(self, data: Any, wrap: Any) -> list[Any]:
        """Rows of tiles turned round: other memory, the same work."""
        count = min(max(3, -(-BYTES // data.nbytes)), MOST)
        code = data.view(np.uint16) if data.dtype == bfloat16 else data
        turned = [self.cupy.roll(code, index, axis=0) for index in range(count)]
        return [wrap(one.view(data.dtype)) for one in turned]

    def prepare(self, m: int) -> None:
        x = np.random.default_rng(m).standard_normal((m, self.k), np.float32).astype(bfloat16)
        self.x, self.norm_weight = self._to_gpu(x), self._to_gpu(self.norm)
        self.normalised = self.cupy.empty((m, self.k), bfloat16)
        self.out = self.cupy.empty((m, self.n), bfloat16)
        self.head_norm = self._to_gpu(np.full(HEAD, 2, bfloat16))
        self.tables = [self._to_gpu(table) for table in cufuse.rope_tables(np.arange(m), HEAD)]
        shapes = [(m, self.heads, HEAD), (m, KV_HEADS, HEAD), (m, KV_HEADS, HEAD)]
        self.parts = tuple(self.cupy.empty(shape, bfloat16) for shape in shapes)
        self.exact = oracle.linear(cufuse.rms_norm(x, self.norm), self.values)

    def project(self, name: str, index: int, configuration: Any = None, programmatic: bool = False) -> None:
        weight, options = self.weights[name][index], {"configuration": configuration, "programmatic": programmatic}
        if name == "bf16":
            _gpu_linear.linear(self.normalised, weight, self.out, **options)
        else:
            _gpu_quantised.multiply(self.normalised, weight, self.out, SLICES, **options)

    def call(self, kind: str, name: str, index: int, configuration: Any = None) -> None:
        """One call of a kind with a weight."""
        if kind == "block":
            cufuse.rms_norm_qkv(
                self.x, self.norm_weight, self.weights[name][index], self.head_norm, self.head_norm, cos=self.tables[0],
                sin=self.tables[1], heads=self.heads, recipe="torch" if name == "bf16" else "block-scaled",
                k_slices=self.slices(name), static_weights=True, out=self.parts,
            )  # fmt: skip
            return
        if kind != "projection":
            cufuse.rms_norm(self.x, self.norm_weight, out=self.normalised)
        self.project(name, index, configuration, programmatic=kind == "dependent")

    @staticmethod
    def slices(name: str) -> int:
        """One for bfloat16, as cuBLAS takes for these packed shapes."""
        return 1 if name == "bf16" else SLICES

    def measure(self, name: str, kind: str, configuration: Any = None) -> dict[str, float]:
        """Median microseconds of one call, and the error of the first weight's product."""
        count = len(self.weights[name])
        cufuse.rms_norm(self.x, self.norm_weight, out=self.normalised)
        self.out.view(np.uint16)[...] = 0x7FC0
        self.project(name, 0, configuration)
        found = self.cupy.asnumpy(self.out.view(np.uint16)).view(bfloat16).astype(np.float64)
        error = float(np.sqrt(np.mean((found - self.exact) ** 2) / np.mean(self.exact**2)))
        self.call(kind, name, 0, configuration)
        stream = self.cupy.cuda.Stream(non_blocking=True)
        self.cupy.cuda.Device().synchronize()
        with stream:
            self.call(kind, name, 0, configuration)  # what a stream keeps for itself is made here
            stream.synchronize()
            stream.begin_capture()
            for index in range(count):
                self.call(kind, name, index, configuration)
            graph = stream.end_capture()
            times = []
            for turn in range(12):
                start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
                start.record(stream)
                graph.launch(stream)
                end.record(stream)
                end.synchronize()
                if turn >= 2:
                    times.append(self.cupy.cuda.get_elapsed_time(start, end) * 1000 / count)
        return {"us": statistics.median(times), "least": min(times), "error": error}


def kernels_of(form: str, m: int) -> list[Any]:
    """Every configuration that takes so many rows."""
    both = (*planning.STREAMED, *planning.ANYWHERE)
    return [c for c in both if c.form == form and c.parts == 1 and (m <= c.tokens or not getattr(c, "resident", False))]


def compile_all(formats: list[str]) -> None:
    """Before measuring, so that no time limit hits the compiler."""
    target = compiler.architecture(launch.capability(0))
    for kernel in _gpu_quantised.KERNELS:
        if kernel.runs_on(launch.capability(0)) and "float32" not in kernel.name and any(name in kernel.name for name in formats):
            compiler.compile_kernel(kernel, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=list(ROWS))
    parser.add_argument("--models", type=lambda text: text.split(","), default=list(MODELS))
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(FORMATS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--configurations", action="store_true", help="every kernel that can do it, projection alone")
    given = parser.parse_args()
    compile_all(given.formats)
    results = []
    print(f"{launch.device_name(0)}; microseconds and times as fast as bf16: {'; '.join(KINDS)}; error")
    for model, m in itertools.product(given.models, given.rows):
        if m == given.rows[0]:
            bench = Bench(model, given.formats)
        bench.prepare(m)
        base: dict[str, float] = {}
        for name in ("bf16", *given.formats):
            found = {kind: bench.measure(name, kind) for kind in KINDS}
            base = base or {kind: one["us"] for kind, one in found.items()}
            error = found["projection"]["error"]
            results.append({"model": model, "m": m, "format": name, "error": error, "us": {k: v["us"] for k, v in found.items()}})
            cells = "; ".join(f"{one['us']:7.2f} {base[kind] / one['us']:5.2f} x" for kind, one in found.items())
            print(f"{model:5} M={m:3} {name:5} {cells}  {error:.1e}", flush=True)
            if given.configurations and name != "bf16":
                for configuration in kernels_of(name, m):
                    try:
                        one = bench.measure(name, "projection", configuration)
                    except ValueError:
                        continue
                    results.append({"model": model, "m": m, "format": name, "kernel": configuration.kernel.name, **one})
                    print(f"            {configuration.kernel.name:55} {one['us']:7.2f}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
