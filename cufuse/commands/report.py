"""``cufuse report``: one layer, or all, under every recipe."""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from cufuse import named_recipes
from cufuse.checkpoint import QWEN3, AttentionLayer, Checkpoint, CheckpointError, open_checkpoint
from cufuse.commands.output import PipeConsole, check_writable, whole_file
from cufuse.commands.progress import progress_bar
from cufuse.emulation.tensor_core import TENSOR_CORES
from cufuse.quantised import FORMATS, formats, open_gguf
from cufuse.quantised.gguf_checkpoint import GgufCheckpoint
from cufuse.report import SCHEMA, Report, analyse
from cufuse.report_inputs import hidden_states_from_file, made_up_hidden_states, random_token_ids
from cufuse.report_plot import check_target, plot
from cufuse.report_quantised import rows
from cufuse.report_text import print_layers, print_report
from cufuse.synthetic import synthetic_embedding, synthetic_layer

_ARCHITECTURES = [name for name, core in TENSOR_CORES.items() if "bfloat16" in core.dtypes]


def add(commands: Any) -> None:
    """Describe the command to the parser."""
    parser = commands.add_parser(
        "report",
        help="what every rounding recipe does to a layer: differing bits, amplification by the K norm, distance from the truth",
        description="Runs the front of one attention layer (norm, q/k/v projection, Q/K norm, rotation) under every recipe, with "
        "the bits of a GPU and without one, and compares. Without a checkpoint: a synthetic layer. Layer 0's input is the "
        "embedding of the token ids; a later layer's is made up unless --hidden-states gives it.",
        epilog="Exit codes: 0 done, 2 wrong usage or input.",
    )
    parser.add_argument("checkpoint", nargs="?", type=Path, help="Hugging Face folder, .safetensors file, or .gguf file")
    parser.add_argument("--model", choices=list(QWEN3), default="qwen3-0.6b", help="without a checkpoint (default: %(default)s)")
    parser.add_argument("--layer", default="0", help="a layer's number, or all (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--tokens", type=int, default=16, help="so many random tokens (default: %(default)s)")
    source.add_argument("--token-ids", help="these tokens, such as 9707,11")
    source.add_argument(
        "--hidden-states", type=Path, help="a safetensors file with the layer's input [T, K]: hidden_states, or hidden_states.I"
    )
    parser.add_argument("--recipes", help="these only, such as torch,late-rounding (default: all)")
    parser.add_argument("--reference", default="torch", help="what the others are compared with (default: %(default)s)")
    parser.add_argument("--arch", choices=_ARCHITECTURES, default="sm_90", help="whose tensor core (default: %(default)s)")
    parser.add_argument(
        "--device", choices=("cpu", "gpu"), default="cpu", help="emulation, or kernels compared with it (default: %(default)s)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--separate", dest="separate", action="store_true", default=True, help="q, k, v apart (default)")
    form.add_argument("--packed", dest="separate", action="store_false", help="q, k, v as one packed projection")
    parser.add_argument(
        "--quantise",
        metavar="F",
        help=f"also what quantising the projections costs, beside the roundings: {', '.join(FORMATS).lower()}, with commas, or all",
    )
    parser.add_argument("--seed", type=int, default=0, help="of synthetic weights, tokens, inputs (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="F", help="write the report as JSON, schema 1 (- for standard output)")
    parser.add_argument("--plot", type=Path, metavar="F", help="draw error and amplification (.png, .svg, .pdf)")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> None:
    names = None if given.recipes is None else [name.strip() for name in given.recipes.split(",") if name.strip()]
    if names == []:
        raise ValueError("--recipes names none; leave it out for all")
    for name in [*(names or []), given.reference]:
        named_recipes.get(name)
    kinds = _formats(given)
    if given.seed < 0:
        raise ValueError(f"--seed is {given.seed}; needed is an integer >= 0")
    source = _Synthetic(given) if given.checkpoint is None else _FromFile(given)
    layers = source.chosen_layers()
    if given.plot is not None and len(layers) > 1:
        raise ValueError("--plot draws one layer; give --layer a number")
    for target in (given.json, given.plot):
        check_writable(target)
    if given.plot is not None:
        check_target(given.plot)
    reports = []
    with progress_bar() as show:
        for number, index in enumerate(layers):
            layer = source.layer(index)
            states, note = source.hidden_states(layer, len(layers) > 1)

            def progress(text: str, done: float, number: int = number, index: int = index) -> None:
                show(f"layer {index}: {text}", (number + done) / len(layers))

            report = analyse(
                layer,
                states,
                recipes=names,
                reference=given.reference,
                arch=given.arch,
                separate=given.separate,
                device=given.device,
                notes=(note,) if note else (),
                progress=progress,
            )
            if kinds:
                table = rows(layer, states, kinds, arch=given.arch, separate=given.separate, progress=progress)
                report = dataclasses.replace(report, quantisation=tuple(table))
            reports.append(report)
    _write(given, reports)


def _write(given: argparse.Namespace, reports: list[Report]) -> None:
    # files first: a reader of the text may go away in the middle of it
    if given.json is not None and given.json != Path("-"):
        with whole_file(given.json) as partial:
            partial.write_text(_json_text(reports), encoding="utf-8")
    if given.plot is not None:
        with whole_file(given.plot) as partial:
            plot(reports[0], partial)
    if given.json == Path("-"):
        sys.stdout.write(_json_text(reports))
        return
    console = PipeConsole(width=None if sys.stdout.isatty() else 200)
    if len(reports) > 1:
        print_layers(reports, console)
    else:
        print_report(reports[0], console)


def _json_text(reports: list[Report]) -> str:
    content = reports[0].to_json()
    if len(reports) > 1:
        content = {"schema": SCHEMA, "layers": [report.to_json() for report in reports]}
    return json.dumps(content, indent=1) + "\n"


class _Synthetic:
    """Layers and inputs from a seed."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.config = QWEN3[given.model]

    def chosen_layers(self) -> list[int]:
        return _layers(self.given.layer, range(self.config.num_hidden_layers))

    def layer(self, index: int) -> AttentionLayer:
        return synthetic_layer(self.given.model, index, self.given.seed)

    def hidden_states(self, layer: AttentionLayer, several: bool) -> tuple[np.ndarray, str]:
        return _hidden_states(self.given, layer, several, lambda ids: synthetic_embedding(self.given.model, ids, self.given.seed))


class _FromFile:
    """Layers and inputs from a checkpoint."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.checkpoint: Checkpoint | GgufCheckpoint
        if given.checkpoint.suffix == ".gguf":
            self.checkpoint = open_gguf(given.checkpoint)
        else:
            self.checkpoint = open_checkpoint(given.checkpoint)

    def chosen_layers(self) -> list[int]:
        return _layers(self.given.layer, self.checkpoint.layers)

    def layer(self, index: int) -> AttentionLayer:
        return self.checkpoint.layer(index)

    def hidden_states(self, layer: AttentionLayer, several: bool) -> tuple[np.ndarray, str]:
        return _hidden_states(self.given, layer, several, self.checkpoint.embedding)


def _formats(given: argparse.Namespace) -> list[str]:
    """The formats of --quantise."""
    if given.quantise is None:
        return []
    if given.checkpoint is not None and given.checkpoint.suffix == ".gguf":
        raise ValueError("--quantise is for unquantised weights; the .gguf file's are quantised already: leave it out")
    if given.quantise == "all":
        return list(FORMATS)
    return [formats.get(name.strip()).name for name in given.quantise.split(",") if name.strip()]


def _layers(wanted: str, available: Any) -> list[int]:
    if wanted == "all":
        return list(available)
    try:
        index = int(wanted)
    except ValueError:
        raise ValueError(f"--layer is {wanted!r}; needed is a number or all") from None
    if index not in available:
        raise ValueError(f"--layer is {index}; available are {min(available)} to {max(available)}")
    return [index]


def _hidden_states(given: argparse.Namespace, layer: AttentionLayer, several: bool, embed: Any) -> tuple[np.ndarray, str]:
    """The layer's input and, where it is not what the model would see there, a note that says so."""
    if given.hidden_states is not None:
        name = f"hidden_states.{layer.index}" if several else "hidden_states"
        return hidden_states_from_file(given.hidden_states, name, layer.config.hidden_size), ""
    vocabulary = layer.config.vocab_size or 0
    ids = _token_ids(given, vocabulary)
    if layer.index == 0:
        try:
            return embed(ids), ""
        except CheckpointError:
            if given.token_ids is not None:
                raise
    if given.token_ids is not None and not several:
        raise ValueError("--token-ids are the input of layer 0; give --hidden-states for another layer")
    note = f"Layer {layer.index}'s input is made up (bell curve with outliers); --hidden-states gives the real one."
    return made_up_hidden_states(len(ids), layer.config.hidden_size, given.seed + layer.index), note


def _token_ids(given: argparse.Namespace, vocabulary: int) -> np.ndarray:
    if given.token_ids is None:
        if not 1 <= given.tokens <= 65536:
            raise ValueError(f"--tokens is {given.tokens}; needed is 1 to 65536")
        return random_token_ids(given.tokens, vocabulary, given.seed)
    try:
        return np.array([int(one) for one in given.token_ids.split(",")])
    except ValueError:
        raise ValueError(f"--token-ids is {given.token_ids!r}; needed are numbers with commas, such as 9707,11") from None
