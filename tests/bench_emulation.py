"""How fast the emulated tensor core is: python -m tests.bench_emulation

Million multiply-adds a second of ``cufuse.emulation.tensor_core.matmul``, best and median of several runs on all cores. The
two engines' bits are compared in the same run.
"""

import os
import statistics
import time

import numpy as np

from cufuse.emulation.tensor_core import matmul
from tests.golden.inputs import bell

SHAPES = ((1, 4096, 1024), (16, 4096, 1024), (16, 4096, 4096), (130, 4096, 1024))
RUNS = 9


def main() -> None:
    engines = ["numpy"]
    try:
        matmul(bell((1, 16), 0), bell((1, 16), 1), engine="numba")
        engines.append("numba")
    except ImportError as error:
        print(error)
    print(f"{os.cpu_count()} cores, million multiply-adds a second: best, median")
    for m, n, k in SHAPES:
        x, weight = bell((m, k), 1), bell((n, k), 2, 0.03)
        results, cells = [], []
        for engine in engines:
            seconds = []
            for _ in range(RUNS):
                start = time.perf_counter()
                result = matmul(x, weight, engine=engine)
                seconds.append(time.perf_counter() - start)
            results.append(result.view(np.uint32))
            work = m * n * k / 1e6
            cells.append(f"{engine} {work / min(seconds):7.0f} {work / statistics.median(seconds):7.0f}")
        differ = sum(int(np.count_nonzero(results[0] != other)) for other in results)
        print(f"{m:4} x {n} x {k}:  {'   '.join(cells)}   differing bits: {differ}")


if __name__ == "__main__":
    main()
