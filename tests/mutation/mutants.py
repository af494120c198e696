"""Which mutants there are: every place that one of cosmic-ray's operators can change, one change drawn for each place.

cosmic-ray (https://github.com/sixty-north/cosmic-ray) would try eleven other operators for every ``+``, five comparisons for
every ``<`` and so on; most of these die together. Here each place (a token and a family of operators) gets one of its changes,
drawn from a seed that depends on nothing but the seed given and the place's text, or, with ``every``, all of them. Of a module
with more places than ``most`` so many are drawn.

Left out: annotations, which run nowhere, and changes that are no valid Python (a ``*`` of a parameter list taken for a
product) or draw a SyntaxWarning (``is`` between numbers); these would die for nothing.
"""

import ast
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.provider import OperatorProvider

ROOT = Path(__file__).resolve().parents[2]

MODULES = (
    "bf16", "oracle", "recipe", "_decoder_recipe", "named_recipes",
    *sorted(f"emulation.{path.stem}" for path in (ROOT / "cufuse/emulation").glob("*.py") if path.stem != "__init__"),
)  # fmt: skip
"""Rounding, oracle, recipes, and every module of the emulation."""


@dataclass(frozen=True)
class Mutant:
    """One change of one module: ``before`` and ``after`` are the lines that differ, without their indentation."""

    module: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str

    @property
    def change(self) -> str:
        """The change as the list of explained survivors has it."""
        return f"`{self.before}` → `{self.after}`"

    def code(self) -> str:
        """The module's text with the change."""
        changed = mutate_code(source_of(self.module), OperatorProvider()[self.operator](), self.occurrence)
        assert changed is not None
        return str(changed)


def path_of(module: str) -> Path:
    """Where the module's text is."""
    return ROOT / "cufuse" / (module.replace(".", "/") + ".py")


def source_of(module: str) -> str:
    """The module's text."""
    return path_of(module).read_text(encoding="utf-8")


def mutants(module: str, seed: int, most: int | None = None, every: bool = False) -> tuple[list[Mutant], int]:
    """The module's mutants in the order of its lines, one a place, or every one; and the number of its places."""
    source = source_of(module)
    places = _places(source)
    chosen = sorted(places)
    if most is not None and len(chosen) > most:
        chosen = sorted(random.Random(f"{seed}|{module}").sample(chosen, most))
    found = []
    for (line, column), family in chosen:
        changes = places[(line, column), family]
        text = source.splitlines()[line - 1]
        random.Random(f"{seed}|{module}|{text}|{column}|{family}").shuffle(changes)
        valid = (one for change in changes if (one := _mutant(module, source, line, *change)) is not None)
        found += list(valid) if every else [one for one in [next(valid, None)] if one is not None]
    return found, len(places)


def _places(source: str) -> dict[tuple[tuple[int, int], str], list[tuple[str, int]]]:
    """From a place, a position and a family of operators, to the operators of the family and which of their changes it is."""
    annotations = list(_annotations(source))
    places: dict[tuple[tuple[int, int], str], list[tuple[str, int]]] = {}
    nodes = list(ast_nodes(get_ast(source)))
    provider = OperatorProvider()
    for name in provider:
        if provider[name].arguments():
            continue
        operator = provider[name]()
        starts = (start for node in nodes for start, _ in operator.mutation_positions(node))
        for occurrence, start in enumerate(starts):
            if not any(first <= start < last for first, last in annotations):
                places.setdefault((start, name.split("_")[0]), []).append((name, occurrence))
    return places


def _mutant(module: str, source: str, line: int, operator: str, occurrence: int) -> Mutant | None:
    changed = mutate_code(source, OperatorProvider()[operator](), occurrence)
    assert changed is not None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SyntaxWarning)
            compile(changed, module, "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    before, after = _difference(source, changed)
    return Mutant(module, operator, occurrence, line, before, after)


def _difference(source: str, changed: str) -> tuple[str, str]:
    """The lines in which two texts differ, joined, without their indentation."""
    old, new = source.splitlines(), changed.splitlines()
    while old and new and old[0] == new[0]:
        del old[0], new[0]
    while old and new and old[-1] == new[-1]:
        del old[-1], new[-1]
    before, after = (" ".join(line.strip() for line in lines) for lines in (old, new))
    return before, after


def _annotations(source: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations of parameters, results and variables begin and end: line and column each."""
    for node in ast.walk(ast.parse(source)):
        for field in ("annotation", "returns"):
            part = getattr(node, field, None)
            if isinstance(part, ast.expr) and part.end_lineno is not None and part.end_col_offset is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def statement_lines(source: str) -> dict[int, range]:
    """From each line to the lines of the innermost statement on it, of a compound statement those of its head."""
    lines: dict[int, range] = {}
    for node in ast.walk(ast.parse(source)):  # outer statements before inner ones
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            for line in range(node.lineno, max(last, node.lineno) + 1):
                lines[line] = range(node.lineno, max(last, node.lineno) + 1)
    return lines
