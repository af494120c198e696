"""The command line: ``cufuse COMMAND --help`` explains each command.

Exit codes: 0 done, 2 wrong usage or input (one line on standard error, no traceback), 130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import cufuse
from cufuse.commands import bench, check, info, recipes, report, synthesise, trace
from cufuse.compiler import KernelCompileError
from cufuse.launch import NoGpuError


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = _OneLineParser(
        prog="cufuse", description="Where bfloat16 implementations of RMSNorm, projection and rotation round, and what it costs."
    )
    parser.add_argument("--version", action="version", version=f"cufuse {cufuse.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True, parser_class=_OneLineParser)
    for module in (report, trace, recipes, synthesise, check, bench, info):
        module.add(commands)
    given = parser.parse_args(arguments)
    try:
        given.run(given)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("cufuse: interrupted; nothing was written half", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader (head, less) has gone; nothing is wrong, but Python would complain while closing
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, TypeError, ImportError, OSError, MemoryError, NoGpuError, KernelCompileError) as error:
        print(f"cufuse {given.command}: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def run() -> NoReturn:
    """Entry point of the installed command."""
    sys.exit(main())


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "not enough memory; give fewer tokens or fewer recipes"
    return " ".join(str(error).split())


if __name__ == "__main__":
    run()
