"""``cufuse synthesise``: write a synthetic Qwen3-shaped checkpoint."""

import argparse
from pathlib import Path
from typing import Any

from cufuse.checkpoint import QWEN3
from cufuse.commands.progress import progress_bar
from cufuse.synthetic import write_synthetic


def add(commands: Any) -> None:
    """Describe the command to the parser."""
    parser = commands.add_parser(
        "synthesise",
        help="write a synthetic Qwen3-shaped checkpoint, so that everything can be tried without a download",
        description="Writes config.json and safetensors in Hugging Face's layout. Shapes and the largest K-norm weights are "
        "those of Qwen3, all other numbers come from the seed; the files say that they are synthetic.",
    )
    parser.add_argument("path", type=Path, help="folder to write")
    parser.add_argument("--model", choices=list(QWEN3), default="qwen3-0.6b", help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, help="number of layers (default: as many as the model has)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--embedding-rows", type=int, help="rows of the embedding (default: the whole vocabulary)")
    parser.add_argument("--attention-only", action="store_true", help="leave out what only the rest of the decoder needs")
    parser.add_argument("--overwrite", action="store_true", help="replace a synthetic checkpoint that is there")
    parser.set_defaults(run=_run)


def _run(given: argparse.Namespace) -> None:
    with progress_bar() as show:
        folder = write_synthetic(
            given.path,
            given.model,
            layers=given.layers,
            seed=given.seed,
            embeddings=True if given.embedding_rows is None else given.embedding_rows,
            attention_only=given.attention_only,
            overwrite=given.overwrite,
            progress=lambda done, total, name: show(name, done / max(total, 1)),
        )
    print(f"wrote {folder}: synthetic weights, seed {given.seed}; only the shapes and the largest K-norm weights are Qwen3's")
