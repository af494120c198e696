"""A report as a terminal shows it: verdict, the study's table, stages of every recipe, the worst element explained."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cufuse.report import RecipeResult, Report
from cufuse.report_quantised import print_rows
from cufuse.report_stages import Stage


def print_report(report: Report, console: Console) -> None:
    """Everything about one layer."""
    made_up = ", synthetic weights" if report.synthetic else ""
    what = f"layer {report.layer}, {report.tokens} tokens, {report.arch}, {report.form} projections{made_up}"
    console.rule(f"{escape(report.model)}, {what}")
    for line in verdict(report):
        console.print(line, highlight=False)
    for note in report.notes:
        console.print(f"[dim]Note: {escape(note)}[/dim]", highlight=False)
    if report.options:
        console.print(_options(report))
    console.print(_shares(report))
    console.print(_errors(report))
    explained = _most_telling(report)
    if explained is not None:
        _print_worst(report, explained, console)
    if report.quantisation:
        print_rows(report.quantisation, console)


def print_layers(reports: Sequence[Report], console: Console) -> None:
    """Several layers, a line each."""
    table = Table(title=f"Keys{_after_norm(reports[0])}, per layer", box=box.SIMPLE_HEAD, title_justify="left")
    for title in ("layer", "largest K-norm weight", *(name for name in reports[0].recipes if name != reports[0].reference)):
        table.add_column(title, justify="right")
    for report in reports:
        cells = [str(report.layer), _number(report.max_k_norm_weight)]
        for name, result in report.recipes.items():
            if name != report.reference:
                last = result.stages.get("k_normed", result.stages["k"])
                cells.append(f"{_share(last)}, {_number(last.max_abs_diff)}")
        table.add_row(*cells)
    console.print(table)
    console.print("Share of differing bits, largest difference.", style="dim")


def verdict(report: Report) -> list[str]:
    """In plain words: which recipes give the reference's bits, what the others cost."""
    exact = [name for name, result in report.recipes.items() if name != report.reference and _exact(result)]
    other = {name: result for name, result in report.recipes.items() if not _exact(result)}
    reference = "PyTorch" if report.reference == "torch" else report.reference
    lines = []
    if exact:
        lines.append(f"[bold]Bit for bit {reference} in every stage, on this input:[/bold] {', '.join(exact)}.")
    if not other:
        return lines or [f"Only {reference} itself was run."]
    last = "k_normed" if _after_norm(report) else "k"
    lines.append(f"[bold]Not {reference}'s bits:[/bold]")
    for name, result in sorted(other.items(), key=lambda item: -item[1].stages[last].max_abs_diff):
        before, after = result.stages["k"], result.stages[last]
        text = f"  {name}: {_share(after)} of the keys differ{_after_norm(report)}, by up to {_number(after.max_abs_diff)}"
        if result.amplification is not None:
            text += f"; {_number(before.max_abs_diff)} before it, amplified {_number(result.amplification)} times"
        lines.append(text + ".")
    weight = report.max_k_norm_weight
    if weight is not None:
        lines.append(f"The largest K-norm weight of this layer is {_number(weight)}: it multiplies whatever differs before it.")
    lines += _cause_and_cure(report)
    closest = min(report.recipes, key=lambda name: report.recipes[name].stages[last].rms_error)
    mine = report.recipes[report.reference].stages[last].rms_error
    best = report.recipes[closest].stages[last].rms_error
    lines.append(
        f"Closest to the truth (root-mean-square error of the keys{_after_norm(report)}): {closest}, {_number(best)}; "
        f"{report.reference}: {_number(mine)}. Being near the truth and being {reference} are two different things."
    )
    return lines


def _cause_and_cure(report: Report) -> list[str]:
    """Which rounding point makes the most telling difference, and which option removes it."""
    name = _most_telling(report)
    lines = []
    if name is not None:
        worst = report.recipes[name].worst
        assert worst is not None
        lines.append(f"[bold]Cause[/bold] ({name}, its worst key, explained below): {escape(worst.cause)}.")
    cures = [title for title, option in report.options.items() if option.all_bits_equal and title.startswith("option")]
    if cures:
        lines.append(f"[bold]Cure:[/bold] {'; '.join(cures)}: every bit of the PyTorch path.")
    return lines


def _after_norm(report: Report) -> str:
    return " after their norm" if "k_normed" in report.recipes[report.reference].stages else ""


def _exact(result: RecipeResult) -> bool:
    return all(stage.mismatches == 0 for stage in result.stages.values())


def _options(report: Report) -> Table:
    table = Table(title="The study's options against the PyTorch path", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("option")
    table.add_column("recipe")
    for title in ("k differs", "by up to", "after the K norm", "by up to", "amplified", "every bit equal"):
        table.add_column(title, justify="right")
    for title, option in report.options.items():
        after = option.k_normed
        table.add_row(
            title,
            option.recipe,
            _share(option.k),
            _number(option.k.max_abs_diff),
            "" if after is None else _share(after),
            "" if after is None else _number(after.max_abs_diff),
            _number(option.amplification),
            "yes" if option.all_bits_equal else "no",
        )
    return table


def _shares(report: Report) -> Table:
    title = f"Share of outputs whose bits differ from {report.reference}, and largest difference"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("recipe")
    stages = list(report.recipes[report.reference].stages)
    for stage in stages:
        table.add_column(stage, justify="right")
    for name, result in report.recipes.items():
        cells = [
            "0" if stage.mismatches == 0 else f"{_share(stage)}, {_number(stage.max_abs_diff)}" for stage in result.stages.values()
        ]
        table.add_row(name, *cells)
    return table


def _errors(report: Report) -> Table:
    table = Table(
        title="Distance from the float64 oracle: root-mean-square, largest", box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("recipe")
    for stage in report.recipes[report.reference].stages:
        table.add_column(stage, justify="right")
    for name, result in report.recipes.items():
        table.add_row(name, *(f"{stage.rms_error:.1e}, {stage.max_abs_error:.1e}" for stage in result.stages.values()))
    return table


def _most_telling(report: Report) -> str | None:
    """late-rounding if it differs, otherwise the recipe with the largest difference."""
    differing = {name: result.worst for name, result in report.recipes.items() if result.worst is not None}
    if "late-rounding" in differing:
        return "late-rounding"
    return max(differing, key=lambda name: differing[name].difference, default=None)


def _print_worst(report: Report, name: str, console: Console) -> None:
    worst = report.recipes[name].worst
    assert worst is not None
    where = f"token {worst.token}, key head {worst.head}, channel {worst.channel}"
    weight = "" if worst.k_norm_weight is None else f", K-norm weight {_number(worst.k_norm_weight)}"
    table = Table(
        title=f"The worst element of {name}: {where}{weight}, {worst.stage} off by {_number(worst.difference)}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("value")
    for column in (report.reference, name, "difference"):
        table.add_column(column, justify="right")
    for link in worst.chain:
        differs = link.reference != link.recipe
        difference = f"{link.recipe - link.reference:+.3g}" if differs else ""
        style = "bold" if link.name == worst.first_difference else None
        table.add_row(link.name, f"{link.reference:.9g}", f"{link.recipe:.9g}", difference, style=style)
    console.print(table)
    console.print(f"First difference: {worst.first_difference}. {worst.cause}.", highlight=False)


def _share(stage: Stage) -> str:
    percent = 100 * stage.share
    return "0 %" if percent == 0 else f"{percent:.1f} %" if percent >= 0.1 else f"{percent:.1g} %"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
