"""``cufuse check``: the kernels on this GPU against the emulation, bit for bit."""

import argparse
import time
from typing import Any

from cufuse.commands.progress import progress_bar


class DifferingBitsError(ValueError):
    """A kernel gave other bits than the emulation on this GPU."""


def add(commands: Any) -> None:
    """Describe the command to the parser."""
    parser = commands.add_parser(
        "check",
        help="on this machine's GPU: kernels against the emulation, every bit; seconds once the kernels are compiled",
        description="Runs every operation under every recipe on the GPU and in NumPy and compares the bits.",
        epilog="Exit codes: 0 all bits equal, 2 some differ, or no GPU.",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the inputs (default: %(default)s)")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> None:
    from cufuse import selfcheck

    if given.seed < 0:
        raise ValueError(f"--seed is {given.seed}; needed is an integer >= 0")
    start = time.perf_counter()
    with progress_bar() as show:
        rows = selfcheck.run(show, given.seed)
    print(f"{'operation':16} {'outputs compared':>18} {'differing':>10}")
    for row in rows:
        print(f"{row.area:16} {row.outputs:18,} {row.differing:10,}")
    total, differing = sum(row.outputs for row in rows), sum(row.differing for row in rows)
    print(f"{'together':16} {total:18,} {differing:10,}   {time.perf_counter() - start:.0f} s")
    if differing:
        raise DifferingBitsError(f"{differing} of {total} outputs differ from the emulation; please report the GPU and this table")
