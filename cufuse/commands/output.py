"""Where commands write: files that are whole or not there, and a console whose reader may go away."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console


class PipeConsole(Console):
    """rich's Console, but for a reader of standard output that goes away."""

    def on_broken_pipe(self) -> None:
        # rich would exit with code 1; main treats a reader that has gone as nothing wrong
        raise BrokenPipeError


def check_writable(target: Path | None) -> None:
    """Before minutes of work: whether the file can be made where it shall go."""
    if target is None or target == Path("-"):
        return
    if target.is_dir():
        raise ValueError(f"{target} is a folder; needed is a file name")
    if target.exists() and not target.is_file():
        raise ValueError(f"{target} is no ordinary file, which a rename would replace; needed is a file name (--json - prints)")
    with whole_file(target, keep=False) as partial:
        partial.touch()


@contextlib.contextmanager
def whole_file(target: Path, keep: bool = True) -> Iterator[Path]:
    """A name to write to beside the target; renamed to it at the end, so that no half-written file is left."""
    partial = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        yield partial
        if keep:
            os.replace(partial, target)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    finally:
        partial.unlink(missing_ok=True)
