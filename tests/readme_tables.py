"""The README's tables of speeds, made from notebooks/h200_bench.json: python -m tests.readme_tables

Writes what stands between ``<!-- NAME from h200_bench.json -->`` and ``<!-- end -->`` in README.md; tests/test_readme_tables.py
fails when it is not what the recorded bench gives. Microseconds have three digits.
"""

import json
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from cufuse._model_config import QWEN3
from cufuse.bench_text import microseconds

ROOT: Final = Path(__file__).parents[1]
BENCH: Final = ROOT / "notebooks" / "h200_bench.json"
README: Final = ROOT / "README.md"

_MODELS: Final = tuple(name.removeprefix("qwen3-") for name in QWEN3)
_AGAINST_GEMM: Final = {1: 0.95, 16: 1.0, 64: 1.0, 256: 1.1, 2048: 1.05, 8192: 1.05}
_AGAINST_COMPILE: Final = {1: 0.70, 16: 0.75, 64: 0.75, 256: 0.85, 2048: 0.97, 8192: 0.97}
_AGAINST_COMPILE_32B: Final = _AGAINST_COMPILE | {1: 0.78, 16: 0.80, 64: 0.80}
_PEERS: Final = {"torch_compile": "torch.compile", "f_rms_norm": "`F.rms_norm`", "liger": "Liger"}
_NONE: Final = microseconds(None)

Bench = dict[str, Any]


def block_table(bench: Bench) -> str:
    """All cells: times, and cufuse's divided by those of cuBLAS and torch.compile beside the goals."""
    head = (
        "model", "M", "floor", "cuBLAS, projection alone", "cufuse", "static weights", "torch.compile", "Liger", "F.rms_norm",
        "eager", "cufuse, static / cuBLAS (goal)", "cufuse / torch.compile (goal)",
    )  # fmt: skip
    columns = ("cublas_gemm", "cufuse", "cufuse_static", "torch_compile", "liger", "f_rms_norm", "eager")
    rows = []
    for cell in _cells(bench["cells"]):
        model, tokens = cell["model"], cell["tokens"]
        times = {name: _time(cell, name) for name in columns}
        against_compile = (_AGAINST_COMPILE_32B if model == "32b" else _AGAINST_COMPILE)[tokens]
        gemm = [_ratio(times[name], times["cublas_gemm"], _AGAINST_GEMM[tokens]) for name in ("cufuse", "cufuse_static")]
        compiled = _ratio(times["cufuse"], times["torch_compile"], against_compile)
        floor = microseconds(cell["floor"]) if tokens == 1 else ""
        ratios = (f"{' / '.join(gemm)} ({_AGAINST_GEMM[tokens]:g})", f"{compiled} ({against_compile:g})")
        rows.append((model.upper(), str(tokens), floor, *map(microseconds, times.values()), *ratios))
    return _table(head, rows)


def block_in_words(bench: Bench) -> str:
    """Bits, memory, the host's time, and the price of batch invariance, over all cells."""
    cells = bench["cells"]
    compared = sum(cell["columns"]["cufuse"]["outputs"] for cell in cells)
    differing = sum(cell["columns"]["cufuse"]["differing"] for cell in cells)
    peers = []
    for name, title in _PEERS.items():
        found = [cell["columns"][name] for cell in cells if _time(cell, name) is not None]
        shares = [100 * one["differing"] / one["outputs"] for one in found if one["differing"] is not None]
        if shares and max(shares) >= 1:
            peers.append(f"{title} {min(shares):.0f} to {max(shares):.0f} %")
        elif shares:
            peers.append(f"{title} up to {max(one['differing'] or 0 for one in found):,} in a cell")
    host = sorted(cell["host_microseconds"] for cell in cells)
    pool = max(cell["allocated_bytes"] for cell in cells)
    everybody = ", ".join([f"cufuse **{differing}** of {compared:,}", *peers])
    words = [
        f"Outputs whose bits are not eager PyTorch's, over all cells: {everybody}.",
        f"With `out=` a call allocates {pool} bytes of CuPy's pool; it costs the host {host[0]:.0f} to {host[-1]:.0f} us, "
        f"{statistics.median(host):.0f} in the median (wanted: 20).",
    ]
    prices = {}
    for name in ("cufuse", "cufuse_static"):
        # above, the clocks spread further
        ratios = [cell["ratios"].get(f"{name}:batch-invariant", {}).get(name) for cell in cells if cell["tokens"] <= 256]
        prices[name] = [ratio for ratio in ratios if ratio is not None]
    if all(prices.values()):
        default, static = (f"{min(found):.2f} to {max(found):.2f} x" for found in prices.values())
        words.append(f"Up to 256 rows recipe `batch-invariant` takes {default} `torch`'s time (static weights: {static}).")
    return "\n".join(words)


def quantised_table(bench: Bench) -> str:
    """The block with quantised weights beside bf16, and in how many cells a goal is met."""
    rows, met = [], []
    for cell in _cells(bench["quantised"]):
        formats = cell["formats"]
        row = [cell["model"].upper(), str(cell["tokens"]), microseconds(formats["bf16"]["microseconds"])]
        for name in ("Q4_0", "Q8_0"):
            found = formats[name]
            goal = "" if found["needed"] is None else f" ({found['needed']:g} x)"
            met += [] if found["met"] is None else [found["met"]]
            faster = f"{found['faster']:.2f} x"
            row.append(f"{microseconds(found['microseconds'])}, {f'**{faster}**' if found['met'] else faster}{goal}")
        rows.append(row)
    table = _table(("model", "M", "bf16", "Q4_0 (goal)", "Q8_0 (goal)"), rows)
    return f"{table}\n\nThe goals are met in {sum(met)} of {len(met)} cells (bold)."


BLOCKS: Final[dict[str, Callable[[Bench], str]]] = {
    "block": block_table,
    "block in words": block_in_words,
    "quantised block": quantised_table,
}


def written(readme: str, bench: Bench) -> str:
    """The README with every block made anew. ValueError for one that is not there exactly once."""
    for name, make in BLOCKS.items():
        begin, end = f"<!-- {name} from {BENCH.name} -->\n", "\n<!-- end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if len(pattern.findall(readme)) != 1:
            raise ValueError(f"README.md must have {begin.strip()} ... <!-- end --> once")
        text = begin + "\n" + make(bench) + "\n" + end
        readme = pattern.sub(lambda _, text=text: text, readme)
    return readme


def load() -> Bench:
    """The recorded bench."""
    bench: Bench = json.loads(BENCH.read_text(encoding="utf-8"))
    return bench


def _cells(cells: Iterable[Bench]) -> list[Bench]:
    return sorted(cells, key=lambda cell: (_MODELS.index(cell["model"]), cell["tokens"]))


def _time(cell: Bench, name: str) -> float | None:
    return (cell["columns"].get(name) or {}).get("microseconds")


def _ratio(time: float | None, other: float | None, goal: float) -> str:
    """Bold where what is shown meets the goal."""
    if time is None or other is None:
        return _NONE
    shown = f"{time / other:.2f}"
    return f"**{shown}**" if float(shown) <= goal else shown


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    names = tuple(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (names, ("---",) * len(names), *rows))


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8"), load()), encoding="utf-8")
