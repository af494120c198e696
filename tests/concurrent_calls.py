"""Every operation from many threads at once, in a process whose caches are cold: ``python -m tests.concurrent_calls numpy|cupy``.

Prints the number of calls, of outputs compared, and of outputs that differ from those of one thread, which come afterwards.
"""

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

import cufuse

THREADS, CALLS = 8, 200


def operations(bring: Callable[[np.ndarray], Any]) -> list[Callable[[], Any]]:
    """Small calls of every operation under several recipes; each gives an array or a tuple of them."""
    rng = np.random.default_rng(21)

    def values(*shape: int) -> Any:
        return bring(rng.standard_normal(shape).astype(np.float32).astype(cufuse.bfloat16))

    wide = bring(rng.standard_normal(1000).astype(np.float32))
    x, residual, weight, packed = values(5, 96), values(5, 96), values(96), values(6 * 16, 96)
    cos, sin = map(bring, cufuse.rope_tables(np.arange(5), 16))
    heads, query, key = values(16), values(5, 4, 16), values(5, 1, 16)
    calls: list[Callable[[], Any]] = [lambda: cufuse.round_to_bf16(wide), lambda: cufuse.round_to_bf16(wide, mode="up")]
    for name in ("torch", "torch-rms-norm", "vllm-0.20", "flashinfer", "nano-vllm", "batch-invariant"):
        calls += [
            lambda name=name: cufuse.rms_norm(x, weight, recipe=name),
            lambda name=name: cufuse.add_rms_norm(x, residual, weight, recipe=name),
            lambda name=name: cufuse.linear(x, packed, recipe=name, k_slices=1),
        ]
    for name in ("torch", "batch-invariant"):
        calls += [
            lambda name=name: cufuse.rope(query, key, cos, sin, recipe=name),
            lambda name=name: cufuse.rms_norm_qkv(
                x, weight, packed, heads, heads, cos=cos, sin=sin, heads=4, k_slices=1, recipe=name
            ),
        ]
    # heads of 128, whose few rows a GPU finishes by clusters
    tall, wide_weight, head = values(10, 128), values(3 * 128, 128), values(128)
    calls += [
        lambda rows=rows: cufuse.rms_norm_qkv(tall[:rows], head, wide_weight, head, head, heads=1, k_slices=1) for rows in (9, 10)
    ]
    return calls


def main() -> None:
    """See the head of this module."""
    bring: Callable[[np.ndarray], Any] = np.asarray
    take: Callable[[Any], np.ndarray] = np.asarray
    if sys.argv[1] == "cupy":
        from tests.gpu_support import to_gpu, to_host

        bring, take = to_gpu, to_host
    calls = operations(bring)
    together = threading.Barrier(THREADS)
    found: list[list[tuple[int, list[bytes]]]] = [[] for _ in range(THREADS)]
    errors: list[str] = []

    def work(number: int) -> None:
        together.wait()
        try:
            for turn in range(CALLS):
                which = (turn + number * 3) % len(calls)  # the first calls of the threads differ, and coincide later
                found[number].append((which, results(which)))
        except BaseException as error:
            errors.append(f"{type(error).__name__}: {error}")

    def results(which: int) -> list[bytes]:
        given = calls[which]()
        return [take(one).tobytes() for one in (given if isinstance(given, tuple) else (given,))]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [results(which) for which in range(len(calls))]
    done = [one for part in found for one in part]
    differing = sum(given != expected[which] for which, given in done)
    outputs = sum(len(one) // 2 for _, given in done for one in given)
    print(json.dumps({"calls": len(done), "outputs": outputs, "differing": differing, "errors": errors}))


if __name__ == "__main__":
    main()
