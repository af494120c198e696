"""``cufuse bench``: the attention front on this GPU beside cuBLAS and PyTorch."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from cufuse import named_recipes
from cufuse.bench_results import CUFUSE, Results
from cufuse.bench_text import WIDTH, print_results
from cufuse.commands.output import check_writable, whole_file
from cufuse.commands.progress import progress_bar
from cufuse.quantised import FORMATS, formats

_MOST_TOKENS = 65536


class BenchError(ValueError):
    """cufuse itself could not be measured."""


def add(commands: Any) -> None:
    """Describe the command to the parser."""
    parser = commands.add_parser(
        "bench",
        help="on this machine's GPU: the attention front beside cuBLAS, torch.compile and others, times and differing bits",
        description="Times cufuse.rms_norm_qkv (norm, packed Q/K/V projection, Q/K norm, rotation) in CUDA graphs over 1 GB of "
        "distinct weights, in turn with cuBLAS's projection alone, PyTorch's and Liger's ways where they are installed, and "
        "a kernel that only reads the weights; and counts for each how many outputs differ from eager PyTorch. With --quantised "
        "also the same with its weights in the formats of GGUF beside bf16.",
        epilog="Exit codes: 0 done, 2 wrong usage, no GPU, or cufuse could not be measured in some cell (the rest is printed and "
        "written).",
    )
    parser.add_argument(
        "--model", default="0.6b,4b,8b,32b", metavar="M", help="of 0.6b, 1.7b, 4b, 8b, 14b, 32b, or all (default: %(default)s)"
    )
    parser.add_argument("--tokens", default="1,16,64,256,2048,8192", metavar="T", help="numbers of rows (default: %(default)s)")
    recipe_help = "of cufuse; several with commas: each further one in two columns of its own, and its price (default: %(default)s)"
    parser.add_argument("--recipe", default="torch", metavar="R", help=recipe_help)
    parser.add_argument(
        "--quantised",
        default="",
        metavar="F",
        help=f"also a table of weights in these formats beside bf16: of {', '.join(FORMATS)}, or all",
    )
    parser.add_argument("--quantised-tokens", metavar="T", help="numbers of rows of that table (default: those of --tokens)")
    parser.add_argument(
        "--only-quantised", dest="front", action="store_false", help="nothing but the table of --quantised (default: Q4_0,Q8_0)"
    )
    repeat_help = "turns, each of two replays a column (default: %(default)s)"
    parser.add_argument("--repeat", type=int, default=7, metavar="N", help=repeat_help)
    parser.add_argument(
        "--no-peers",
        dest="peers",
        action="store_false",
        help="leave out torch.compile, Liger and F.rms_norm (bits are compared with eager all the same)",
    )
    parser.add_argument(
        "--peer-seconds",
        type=float,
        default=120.0,
        metavar="S",
        help="prepare no more of these three once this much time went into it (default: %(default)g)",
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write everything as JSON, schema 1 (- for standard output)")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> None:
    # arguments first, then whether there is a GPU
    settings = _settings(given)
    check_writable(given.json)
    from cufuse import bench

    with progress_bar() as show:
        results = bench.run(settings, show, lambda partial: _write(given.json, partial))
    if given.json == Path("-"):
        sys.stdout.write(_json_text(results))
    else:
        print_results(results, Console(width=None if sys.stdout.isatty() else WIDTH))
    sys.stdout.flush()
    if not results.complete:
        # a hung kernel keeps the interpreter from ever ending: the driver would wait for it
        print(f"cufuse bench: {results.notes[-1]}", file=sys.stderr, flush=True)
        os._exit(2)
    _demand_measured(results)


def _settings(given: argparse.Namespace) -> Any:
    from cufuse.bench import MODELS, Settings

    models = tuple(MODELS) if given.model == "all" else _listed(given.model.lower())
    for name in models:
        if name not in MODELS:
            raise ValueError(f"--model names {name!r}; known are {', '.join(MODELS)}, or all")
    if not models:
        raise ValueError("--model names none")
    tokens = _rows("--tokens", given.tokens)
    quantised_tokens = None if given.quantised_tokens is None else _rows("--quantised-tokens", given.quantised_tokens)
    if given.repeat < 1:
        raise ValueError(f"--repeat is {given.repeat}; needed is an integer >= 1")
    if not given.peer_seconds >= 0:
        raise ValueError(f"--peer-seconds is {given.peer_seconds}; needed is a number >= 0")
    recipes = tuple(map(named_recipes.get, _listed(given.recipe)))
    if not recipes:
        raise ValueError("--recipe names none")
    names = tuple(FORMATS) if given.quantised == "all" else _listed(given.quantised)
    if given.quantised and not names:
        raise ValueError("--quantised names none")
    chosen = tuple(dict.fromkeys(formats.get(name).name for name in names or (() if given.front else ("Q4_0", "Q8_0"))))
    if quantised_tokens is not None and not chosen:
        raise ValueError("--quantised-tokens is for the table of --quantised; give --quantised too, such as --quantised all")
    timing = (given.repeat, given.peers, given.peer_seconds)
    return Settings(models, tokens, recipes, *timing, chosen, quantised_tokens, given.front)


def _rows(option: str, text: str) -> tuple[int, ...]:
    """The numbers of an option that has numbers of rows."""
    listed = _listed(text)
    if not listed:
        raise ValueError(f"{option} names none")
    if not all(count.isascii() and count.isdigit() and 1 <= int(count) <= _MOST_TOKENS for count in listed):
        raise ValueError(f"{option} is {text!r}; needed are numbers from 1 to {_MOST_TOKENS} with commas, such as 1,16,256")
    return tuple(dict.fromkeys(map(int, listed)))


def _listed(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _write(target: Path | None, results: Results) -> None:
    if target is not None and target != Path("-"):
        with whole_file(target) as partial:
            partial.write_text(_json_text(results), encoding="utf-8")


def _json_text(results: Results) -> str:
    return json.dumps(results.to_json(), indent=1) + "\n"


def _demand_measured(results: Results) -> None:
    failed = [line for line in results.failures() if line.split(", ")[2].startswith((CUFUSE, "weights in "))]
    empty = any(CUFUSE not in cell.columns for cell in results.cells) or any(not cell.formats for cell in results.quantised)
    if failed or empty or not (results.cells or results.quantised):
        raise BenchError((failed or results.notes or ["nothing was measured"])[0])
