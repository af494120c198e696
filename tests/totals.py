"""pytest plugin: how many inputs the properties tried and how many outputs they compared, by area, at the end of a run.

The README's table is made of what this prints. ``count`` is called by the tests, once for each comparison that has passed.
Processes of pytest-xdist hand their sums to the one that prints.
"""

import os
from collections import Counter
from typing import Any

import pytest
from hypothesis import settings

INPUTS: Counter[str] = Counter()
OUTPUTS: Counter[str] = Counter()
WORST: dict[str, float] = {}
"""Largest ratios of an error to its bound, by area."""


def part_of_profile(divisor: int) -> settings:
    """So many times fewer examples than the profile has, for properties whose examples take long."""
    return settings(max_examples=max(1, settings().max_examples // divisor))


def count(area: str, *, inputs: int, outputs: int) -> None:
    """So many inputs (values, or rows and columns of a problem) were tried, and so many outputs compared and found right."""
    INPUTS[area] += inputs
    OUTPUTS[area] += outputs


def ratio(area: str, error_to_bound: float) -> None:
    """An error as a part of what its bound allows; the largest is printed."""
    WORST[area] = max(WORST.get(area, 0.0), error_to_bound)


def lines() -> list[str]:
    """The table, and the ratios."""
    width = max(map(len, (*INPUTS, *WORST)), default=0)
    table = [f"{area:{width}}  {INPUTS[area]:>16,} inputs  {OUTPUTS[area]:>16,} outputs compared" for area in sorted(INPUTS)]
    return table + [f"{area:{width}}  largest error: {worst:.3f} of its bound" for area, worst in sorted(WORST.items())]


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        sums = ({area: int(number) for area, number in counter.items()} for counter in (INPUTS, OUTPUTS))
        output["cufuse_totals"] = [*sums, {area: float(worst) for area, worst in WORST.items()}]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    inputs, outputs, worst = getattr(node, "workeroutput", {}).get("cufuse_totals", ({}, {}, {}))
    INPUTS.update(inputs)
    OUTPUTS.update(outputs)
    for area, largest in worst.items():
        ratio(area, largest)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if INPUTS or WORST:
        profile = os.environ.get("CUFUSE_HYPOTHESIS_PROFILE", "cufuse-dev")
        terminalreporter.section(f"properties, profile {profile}")
        for line in lines():
            terminalreporter.write_line(line)
