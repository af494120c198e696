"""The orders of summation as macros of ``kernels/sums.cuh``, so that kernels add as the emulation does."""

import math

from cufuse.emulation.sums_torch import reduce_config

# values as in kernels/sums.cuh
_ONE, _PAIRS, _BY_POSITION, _BY_STEP, _MOMENTS = range(5)
_HALVE, _LINES_FIRST, _WARPS_IN_ORDER = range(3)


def sum_defines(order: str, rows: int, columns: int) -> dict[str, int]:
    """Macros SUM_THREADS, SUM_WIDTH, SUM_VECTOR, SUM_CHAINS, SUM_EDGES and SUM_TREE for a norm of [rows, columns].

    Raises ValueError for what no kernel does: several thread blocks on a row ("torch-mean" beyond 130,560 columns), and
    "llama.cpp-cpu".
    """
    if order in ("torch-mean", "torch-mean-2.9"):
        return _torch_mean(order, rows, columns)
    if order == "torch-rms-norm":
        return _macros(128, 32, 4, _ONE, _HALVE) if columns % 4 == 0 else _macros(512, 32, 1, _MOMENTS, _HALVE)
    vector = math.gcd(8, columns)
    most = 1024 if rows < 256 else 256
    if order == "vllm":
        return _macros(min(columns // vector, most), 32, vector, _ONE, _WARPS_IN_ORDER)
    if order == "vllm-add":
        chains = _PAIRS if vector == 8 else _ONE
        return _macros(min(columns, most), 32, 8 if vector == 8 else 1, chains, _WARPS_IN_ORDER)
    if order == "flashinfer":
        return _macros(-(-min(columns // vector, 1024) // 32) * 32, 32, vector, _ONE, _HALVE)
    if order == "llama.cpp":
        return _macros(1024 if columns >= 1024 else 256, 32, 1, _ONE, _HALVE)
    if order == "nano-vllm":
        threads = max(1, min(1 << (columns - 1).bit_length(), 2048) // 4)
        return _macros(threads, min(threads, 32), 4, _BY_POSITION, _HALVE)
    if order == "sequential":
        return _macros(1, 32, 1, _ONE, _HALVE)
    raise ValueError(f"order is {order!r}, which no kernel adds in; give NumPy arrays to the emulation")


def _torch_mean(order: str, rows: int, columns: int) -> dict[str, int]:
    old = order == "torch-mean-2.9"
    config = reduce_config(rows, columns, vectorised_from=129 if old else 128)
    if config.blocks > 1:
        raise ValueError(
            f"order {order!r} joins the sums of {config.blocks} thread blocks for {rows} rows of {columns} columns: no "
            "kernel does that; needed are at most 130560 columns, or the emulation (NumPy arrays)"
        )
    threads, tree = config.width * config.lines, _LINES_FIRST if old else _HALVE
    if not config.vectorised:
        return _macros(threads, config.width, 1, _BY_STEP, tree)
    return _macros(threads, config.width, 4, _BY_POSITION, tree, edges=columns % 4 != 0)


def _macros(threads: int, width: int, vector: int, chains: int, tree: int, edges: bool = False) -> dict[str, int]:
    return {
        "SUM_THREADS": threads,
        "SUM_WIDTH": width,
        "SUM_VECTOR": vector,
        "SUM_CHAINS": chains,
        "SUM_EDGES": int(edges),
        "SUM_TREE": tree,
    }
