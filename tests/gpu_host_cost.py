"""What a call from Python costs the host, on a GPU: python3 -m tests.gpu_host_cost

Microseconds of one call with ``out=`` and the same arrays again and again, its launches queued and not waited for: the median of
five batches of 200 calls (``cufuse.bench_timing.host_cost``). One row of Qwen3-0.6B's sizes.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

import cufuse
from cufuse.bench_inputs import upload
from cufuse.bench_timing import host_cost


def calls() -> dict[str, Callable[[], Any]]:
    """The operations by their names."""
    generator = np.random.default_rng(0)

    def made(*shape: int) -> Any:
        return cufuse.round_to_bf16(upload(generator.standard_normal(shape, np.float32)))

    x, y, wide = made(1, 1024), made(1, 1024), upload(np.zeros((1, 1024), np.float32))
    norm, head_norm, weight, packed = made(1024), made(128), made(1024, 1024), made(4096, 1024)
    q, k, v = made(1, 16, 128), made(1, 8, 128), made(1, 8, 128)
    rotated = made(1, 16, 128), made(1, 8, 128)
    cos, sin = map(upload, cufuse.rope_tables(np.arange(1), 128))
    residual = made(1, 1024), made(1, 1024)
    tables = {"cos": cos, "sin": sin}
    return {
        "linear": lambda: cufuse.linear(x, weight, out=y),
        "rms_norm": lambda: cufuse.rms_norm(x, norm, out=y),
        "add_rms_norm": lambda: cufuse.add_rms_norm(x, residual[0], norm, out=(y, residual[1])),
        "rope": lambda: cufuse.rope(q, k, cos, sin, out=rotated),
        "round_to_bf16": lambda: cufuse.round_to_bf16(wide, out=y),
        "rms_norm_qkv": lambda: cufuse.rms_norm_qkv(x, norm, packed, head_norm, head_norm, **tables, heads=16, out=(*rotated, v)),
    }


def main() -> None:
    import cupy

    for name, call in calls().items():
        print(f"{name:14} {host_cost(call, cupy.cuda.runtime.deviceSynchronize, calls=200):6.1f}")


if __name__ == "__main__":
    main()
