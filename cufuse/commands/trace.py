"""``cufuse trace``: a whole model under two recipes or more."""

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cufuse import named_recipes
from cufuse.commands.output import PipeConsole, check_writable, whole_file
from cufuse.commands.progress import progress_bar
from cufuse.emulation.cublas import AssumedSlicesWarning
from cufuse.qwen3 import MODELS, Qwen3, open_model, synthetic
from cufuse.report_inputs import random_token_ids
from cufuse.report_plot import check_target
from cufuse.trace import SCHEMA, Trace, run, trace
from cufuse.trace_plot import plot
from cufuse.trace_text import print_trace


def add(commands: Any) -> None:
    """Describe the command to the parser."""
    parser = commands.add_parser(
        "trace",
        help="a whole Qwen3 under two recipes: the first rounding that differs, how it grows, the token where the text changes",
        description="Decodes greedily under each recipe, with the bits of a GPU and without one, and compares every intermediate "
        "with those of the first recipe. Without a checkpoint: a small made-up Qwen3 with the documented K-norm weights.",
        epilog="Exit codes: 0 done, 2 wrong usage or input.",
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, help="folder of a dense Qwen3 in Hugging Face's layout")
    parser.add_argument("--model", choices=list(MODELS), default="qwen3-small", help="without a checkpoint (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="without a checkpoint: so many layers (default: all)")
    parser.add_argument("--recipes", default="torch,late-rounding", help="the reference, then the others (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tokens", type=int, default=16, help="so many random tokens as the prompt (default: %(default)s)")
    source.add_argument("--token-ids", help="these tokens, such as 9707,11")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to decode (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of made-up weights and random tokens (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="write what was found as JSON, schema 1 (- for standard output)")
    parser.add_argument("--plot", type=Path, metavar="F", help="draw growth and tokens (.png, .svg, .pdf)")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> None:
    names = [name.strip() for name in given.recipes.split(",") if name.strip()]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(f"--recipes is {given.recipes!r}; needed are two different names or more, such as torch,late-rounding")
    for name in names:
        named_recipes.get(name)
    if given.seed < 0:
        raise ValueError(f"--seed is {given.seed}; needed is an integer >= 0")
    if not 1 <= given.new_tokens <= 4096:
        raise ValueError(f"--new-tokens is {given.new_tokens}; needed is 1 to 4096")
    if given.checkpoint is not None and given.layers is not None:
        raise ValueError("--layers is for made-up models; a checkpoint runs with all of its layers")
    for target in (given.json, given.plot):
        check_writable(target)
    if given.plot is not None:
        check_target(given.plot)
    with progress_bar() as show, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", AssumedSlicesWarning)
        model, tokenizer = _model(given, show)
        ids = _token_ids(given, len(model.weights.embedding))
        parts = len(names)
        expected = run(model, ids, given.new_tokens, names[0], lambda what, done: show(f"{names[0]}: {what}", done / parts))
        found = []
        for number, name in enumerate(names[1:], 1):

            def share(what: str, done: float, number: int = number) -> None:
                show(what, (number + done) / parts)

            found.append(
                trace(model, ids, given.new_tokens, names[0], name, tokenizer=tokenizer, progress=share, known=expected)
            )
    _write(given, found)
    notes = {str(one.message) for one in caught if issubclass(one.category, AssumedSlicesWarning)}
    for note in sorted(notes):
        print(f"cufuse trace: note: {note}", file=sys.stderr)


def _model(given: argparse.Namespace, show: Any) -> tuple[Qwen3, Any]:
    """The model, and its tokenizer where the folder has one that can be read."""
    if given.checkpoint is None:
        return synthetic(given.model, given.seed, layers=given.layers, progress=show), None
    return open_model(given.checkpoint), _tokenizer(given.checkpoint)


def _tokenizer(folder: Path) -> Any:
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        from tokenizers import Tokenizer  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        print("cufuse trace: note: the folder has a tokenizer; pip install tokenizers shows texts", file=sys.stderr)
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for a damaged file
        raise ValueError(f"{path} cannot be read by tokenizers: {error}") from error


def _token_ids(given: argparse.Namespace, vocabulary: int) -> np.ndarray:
    if given.token_ids is None:
        if not 1 <= given.tokens <= 2048:
            raise ValueError(f"--tokens is {given.tokens}; needed is 1 to 2048")
        return random_token_ids(given.tokens, vocabulary, given.seed)
    try:
        return np.array([int(one) for one in given.token_ids.split(",")])
    except ValueError:
        raise ValueError(f"--token-ids is {given.token_ids!r}; needed are numbers with commas, such as 9707,11") from None


def _write(given: argparse.Namespace, found: list[Trace]) -> None:
    # files first: a reader of the text may go away in the middle of it
    if given.json is not None and given.json != Path("-"):
        with whole_file(given.json) as partial:
            partial.write_text(_json_text(found), encoding="utf-8")
    if given.plot is not None:
        with whole_file(given.plot) as partial:
            plot(found, partial)
    if given.json == Path("-"):
        sys.stdout.write(_json_text(found))
        return
    console = PipeConsole(width=None if sys.stdout.isatty() else 132)
    for one in found:
        print_trace(one, console)


def _json_text(found: list[Trace]) -> str:
    content = found[0].to_json() if len(found) == 1 else {"schema": SCHEMA, "traces": [one.to_json() for one in found]}
    return json.dumps(content, indent=1) + "\n"
