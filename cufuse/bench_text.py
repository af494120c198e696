"""Results of ``cufuse bench`` as a terminal shows them: times, ratios, differing bits, what is absent and why."""

from collections.abc import Callable
from functools import partial
from itertools import groupby

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cufuse.bench_results import (
    COLUMNS,
    COMPILE,
    CUFUSE,
    EAGER,
    F_RMS_NORM,
    GEMM,
    LIGER,
    MEASURED_AGAINST_NOTHING,
    RATIOS,
    STATIC,
    Cell,
    FormatMeasurement,
    QuantisedCell,
    Results,
    column_of,
    needed,
)

WIDTH = 100
"""Columns of text that the tables need at the most."""

_TITLES = {
    GEMM: "cuBLAS", CUFUSE: "cufuse", STATIC: "static", COMPILE: "compile", LIGER: "Liger", F_RMS_NORM: "F.rms",
    EAGER: "eager", "floor": "floor",
}  # fmt: skip


def print_results(results: Results, console: Console) -> None:
    """The tables and everything that has to be said beside them."""
    device = results.device
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    console.print(f"{escape(str(device.get('name')))}, driver {device.get('driver')}; {results.date}", highlight=False)
    console.print(escape(versions), style="dim", highlight=False)
    if not results.complete:
        console.print("[bold]The run was not completed: this is what was measured before it ended.[/bold]", highlight=False)
    if results.cells:
        for title, table in (_times(results), _ratios(results), _bits(results)):
            _print_table(title, table, console)
        for line in bits(results):
            console.print(line, highlight=False)
        for recipe in results.recipes[1:]:
            _print_table(*_price(results, recipe), console)
    if results.quantised:
        _print_table(*_quantised(results), console)
        for line in goals(results):
            console.print(line, highlight=False)
    shown = _columns(results)
    for name in shown:
        console.print(f"[bold]{_TITLES[name]}[/bold]: {escape(COLUMNS[name])}.", highlight=False)
    for reason, names in groupby(sorted(results.absent, key=results.absent.__getitem__), key=results.absent.__getitem__):
        console.print(f"[bold]{', '.join(map(_TITLES.__getitem__, names))}[/bold] absent: {escape(reason)}.", highlight=False)
    for line in (*_skipped(results), *results.notes):
        console.print(f"Note: {escape(line)}.", highlight=False)
    for line in results.failures():
        console.print(f"[bold]Failed:[/bold] {escape(line)}", highlight=False)


def _print_table(title: str, table: Table, console: Console) -> None:
    console.print(f"\n[bold]{title}[/bold]", highlight=False)
    console.print(table)


def bits(results: Results) -> list[str]:
    """In one line a column of cufuse: in how many cells its bits are those of what it was compared with."""
    lines = []
    for name in (CUFUSE, STATIC):
        found = [(cell, cell.columns[name]) for cell in results.cells if name in cell.columns]
        compared = [(cell, one) for cell, one in found if one.differing is not None]
        if not compared:
            continue
        total = sum(one.outputs for _, one in compared)
        wrong = [f"{cell.model} at {cell.tokens}" for cell, one in compared if one.differing]
        against = " and ".join(sorted({str(one.against) for _, one in compared}))
        number = sum(one.differing or 0 for _, one in compared)
        text = f"{_TITLES[name]}: {number:,} of {total:,} outputs differ from {against}"
        if wrong:
            text = f"[bold]{text}: {', '.join(wrong)}[/bold]"
        missing = len(results.cells) - len(compared)
        lines.append(text + (f"; {missing} cells not compared." if missing else "."))
    return lines


def _columns(results: Results) -> list[str]:
    """Those of the first recipe and of others, of which some cell has a time."""
    return [name for name in COLUMNS if any(cell.time(name) is not None for cell in results.cells)]


def _table(results: Results, columns: list[tuple[str, Callable[[Cell], str]]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("model", no_wrap=True)
    for title in ("M", *(title for title, _ in columns)):
        table.add_column(title, justify="right", no_wrap=True)
    for _, cells in groupby(results.cells, key=lambda cell: cell.model):
        for number, cell in enumerate(cells):
            table.add_row(cell.model if number == 0 else "", str(cell.tokens), *(show(cell) for _, show in columns))
    return table


def _times(results: Results) -> tuple[str, Table]:
    names = ("floor", *_columns(results))
    return "Microseconds of one call, medians", _table(results, [(_TITLES[name], partial(_column_time, name)) for name in names])


def _ratios(results: Results) -> tuple[str, Table]:
    columns: list[tuple[str, Callable[[Cell], str]]] = []
    for name in (CUFUSE, STATIC):
        if name in _columns(results):
            columns += [(f"/{_TITLES[other]}", partial(_ratio, name, other)) for other in RATIOS]
            columns[-len(RATIOS)] = (f"{_TITLES[name]}/{_TITLES[RATIOS[0]]}", columns[-len(RATIOS)][1])
    columns.append(("host us", lambda cell: microseconds(cell.host_microseconds)))
    columns.append(("bytes", lambda cell: "-" if cell.allocated_bytes is None else f"{cell.allocated_bytes:,}"))
    title = "cufuse's time divided by others'; Python's microseconds and the pool's bytes for one call with out="
    return title, _table(results, columns)


def _price(results: Results, recipe: str) -> tuple[str, Table]:
    """One more recipe beside the first."""
    columns: list[tuple[str, Callable[[Cell], str]]] = []
    for name in (CUFUSE, STATIC):
        other = column_of(name, recipe)
        columns += [(_TITLES[name], partial(_column_time, name)), (recipe, partial(_column_time, other))]
        columns += [("ratio", partial(_ratio, other, name))]
    columns.append(("differing", partial(_share, column_of(CUFUSE, recipe))))
    title = f"Recipe {recipe} beside {results.recipes[0]}: microseconds, time divided by time; outputs that differ from "
    found = {
        str(cell.columns[name].against) for cell in results.cells for name in (column_of(CUFUSE, recipe),) if name in cell.columns
    }
    return title + (" or ".join(sorted(found - {"None"})) or "nothing"), _table(results, columns)


def _quantised(results: Results) -> tuple[str, Table]:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("model", no_wrap=True)
    for title in ("M", "weights", "us", "bf16/it", "needed", "met", "bytes", "RMS error", "differing"):
        table.add_column(title, justify="left" if title == "weights" else "right", no_wrap=True)
    for _, cells in groupby(results.quantised, key=lambda cell: cell.model):
        for number, cell in enumerate(cells):
            for line, (name, one) in enumerate(cell.formats.items()):
                where = [cell.model if number == line == 0 else "", str(cell.tokens) if line == 0 else ""]
                table.add_row(*where, name, *_format_fields(cell, name, one))
    title = "The block with weights in other formats (block-scaled, static weights) beside bf16; needed: the goal on an H200"
    return title, table


def _format_fields(cell: QuantisedCell, name: str, one: FormatMeasurement) -> list[str]:
    goal, faster, met = needed(name, cell.model, cell.tokens), cell.faster(name), cell.met(name)
    return [
        microseconds(one.microseconds),
        "-" if faster is None else f"{faster:.2f}",
        "-" if goal is None else f"{goal:.2f}",
        "-" if met is None else "yes" if met else "[bold]no[/bold]",
        f"{one.bytes:,}" if one.bytes else "-",
        "-" if one.error is None else f"{one.error:.1e}",
        "-" if one.differing is None else f"{one.differing:,}",
    ]


def goals(results: Results) -> list[str]:
    """In one line each format with goals: in how many cells they are met."""
    lines = []
    for name in dict.fromkeys(name for cell in results.quantised for name in cell.formats):
        found = [(cell, met) for cell in results.quantised if (met := cell.met(name)) is not None]
        short = [f"{cell.model} at {cell.tokens}" for cell, met in found if not met]
        if found:
            text = f"{name}: the goal is met in {len(found) - len(short)} of {len(found)} cells"
            lines.append(f"[bold]{text}, not in {', '.join(short)}.[/bold]" if short else f"{text}.")
    return lines


def _bits(results: Results) -> tuple[str, Table]:
    names = [name for name in _columns(results) if name not in MEASURED_AGAINST_NOTHING]
    found = {str(cell.columns[name].against) for cell in results.cells for name in names if name in cell.columns}
    against = " or ".join(sorted(found - {"None"})) or "nothing"
    title = f"Outputs (q, k, v) whose bits are not those of {against}: share, or number where that is small"
    return title, _table(results, [(_TITLES[name], partial(_share, name)) for name in names])


def _skipped(results: Results) -> list[str]:
    """Notes of columns without a failure, each with the cells that it is about."""
    where: dict[str, list[str]] = {}
    for cell in results.cells:
        for name, one in cell.columns.items():
            if one.note and not one.failed:
                where.setdefault(f"{_TITLES.get(name, name)}: {one.note}", []).append(f"{cell.model} at {cell.tokens}")
    return [f"{text} ({'; '.join(cells) if len(cells) < len(results.cells) else 'every cell'})" for text, cells in where.items()]


def microseconds(value: float | None) -> str:
    """Three digits, a dash for nothing."""
    if value is None:
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _column_time(name: str, cell: Cell) -> str:
    return microseconds(cell.time(name))


def _ratio(name: str, other: str, cell: Cell) -> str:
    value = cell.ratio(name, other)
    return "-" if value is None else f"{value:.2f}"


def _share(name: str, cell: Cell) -> str:
    one = cell.columns.get(name)
    if one is None or one.differing is None:
        return "-"
    share = 100 * one.differing / one.outputs
    return f"{share:.1f} %" if share >= 0.1 else f"{one.differing:,}"
