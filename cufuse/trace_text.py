"""A trace as a terminal shows it, on one screen."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cufuse.trace import Difference, Growth, Trace

_TOKENS_SHOWN = 8


def print_trace(found: Trace, console: Console) -> None:
    """The first differing rounding, its chain of values, the growth over the layers, the token where the text changes."""
    made_up = ", made-up weights" if found.synthetic else ""
    console.rule(escape(f"{found.model}{made_up}: {found.reference} against {found.recipe}, {len(found.prompt)} tokens of prompt"))
    if found.first is None:
        console.print(f"No difference: every intermediate and all {len(found.tokens[0])} tokens have the same bits.")
        return
    console.print(f"[bold]First difference:[/bold] {escape(describe(found.first, found))}", highlight=False)
    for cause in found.causes:
        console.print(f"  {escape(cause)}", highlight=False)
    if found.first_rounded is not None and found.first_rounded.name != found.first.name:
        console.print(f"[bold]First on bfloat16:[/bold] {escape(describe(found.first_rounded, found))}", highlight=False)
    console.print(_chain(found))
    if found.growth:
        console.print(_growth(found.growth))
    _print_texts(found, console)


def describe(first: Difference, found: Trace) -> str:
    """One line about a differing value."""
    place = f"layer {first.layer}, {first.operation}" if first.layer is not None else first.operation
    when = f"token {first.token}" if first.step == 0 else f"decoded token {first.step}"
    index = ", ".join(map(str, first.index))
    values = f"{found.reference} {first.reference:.9g}, {found.recipe} {first.recipe:.9g}"
    return f"{place}, {when}, [{index}]: {values} ({first.differing:,} of {first.size:,} differ there)"


def _chain(found: Trace) -> Table:
    if found.worst is None:
        title = "The values that lead to it"
    else:
        worst = found.worst
        place = f"token {worst.token}, head {worst.head}, channel {worst.channel}"
        title = f"What becomes of it in the keys ({place}; K-norm weight {worst.k_norm_weight:g})"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("value")
    for name in (found.reference, found.recipe):
        table.add_column(escape(name), justify="right")
    table.add_column("")
    for link in found.chain:
        differs = "differs" if link.reference != link.recipe else ""
        table.add_row(escape(link.name), f"{link.reference:.9g}", f"{link.recipe:.9g}", differs)
    return table


def _growth(rows: tuple[Growth, ...]) -> Table:
    """Share of differing values, their median distance, the relative difference; at most eight layers."""
    stages = list(dict.fromkeys(row.stage for row in rows))
    title = "How it grows on the prompt: share of differing bfloat16, median ulp of those, relative difference"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("layer", justify="right")
    for stage in stages:
        table.add_column(stage, justify="right")
    layers = sorted({row.layer for row in rows})
    shown = layers if len(layers) <= 8 else sorted({layers[(len(layers) - 1) * i // 7] for i in range(8)})
    for layer in shown:
        mine = [row for stage in stages for row in rows if (row.layer, row.stage) == (layer, stage)]
        table.add_row(str(layer), *(f"{100 * row.share:.1f} %, {row.median_ulp:g}, {row.relative:.1e}" for row in mine))
    return table


def _print_texts(found: Trace, console: Console) -> None:
    if found.first_token is None:
        console.print(f"[bold]The text:[/bold] all {len(found.tokens[0])} tokens are equal.", highlight=False)
        return
    at = found.first_token
    (_, mine, a, b), (_, other, c, d) = found.logits
    console.print(
        f"[bold]The text changes at new token {at + 1} of {len(found.tokens[0])}:[/bold] {escape(found.reference)} takes {mine} "
        f"(logits {a:g} against {c:g}), {escape(found.recipe)} takes {other} ({d:g} against {b:g}).",
        highlight=False,
    )
    start = max(0, at - 3)
    for name, tokens in zip((found.reference, found.recipe), found.tokens, strict=True):
        window = tokens[start : start + _TOKENS_SHOWN]
        shown = " ".join(f"[bold]{t}[/bold]" if start + i == at else str(t) for i, t in enumerate(window))
        console.print(f"  {escape(name):16} ... {shown} ...", highlight=False)
    if found.texts is not None:
        for name, text in zip((found.reference, found.recipe), found.texts, strict=True):
            console.print(f"  [bold]{escape(name)}:[/bold] {escape(repr(text))}", highlight=False)
