"""``python -m tests.mutation``: change the rounding, oracle, recipe and emulation modules and see whether a test notices.

Needs the test extra and cosmic-ray (``pip install cosmic-ray coverage``). Each mutant runs in a forked process with the module's
text replaced in memory; of the fast tests those that run the changed statement are taken, quickest first. A mutant is killed
where one of them fails, or ends in no time. Where no module is named all are taken; a table tells how many places each has and
how many of its mutants were killed. The exit code is 0 where at least 90 % of the mutants are killed and every survivor stands
in ``survivors.md``.
"""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

# heavy things that no mutant changes, so that a child need not import them
import hypothesis.extra.numpy  # noqa: F401
import ml_dtypes  # noqa: F401
import safetensors.numpy  # noqa: F401
from hypothesis import HealthCheck, Phase, settings
from hypothesis.configuration import set_hypothesis_home_dir

from tests.mutation import runs
from tests.mutation.mutants import MODULES, Mutant, mutants

REQUIRED = 0.9
SURVIVORS = Path(__file__).with_name("survivors.md")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split("\n\n")[0])
    parser.add_argument("module", nargs="*", help=f"these only (default: all): {', '.join(MODULES)}")
    parser.add_argument("--seed", type=int, default=0, help="which change is drawn at each place (default: %(default)s)")
    most_help = "places of a module, drawn where it has more (default: %(default)s; 0: all, about three times as long)"
    parser.add_argument("--most", type=int, default=60, help=most_help)
    parser.add_argument("--every", action="store_true", help="every change at every place (hours)")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of tests for a mutant (default: %(default)s)")
    parser.add_argument("--baseline", type=Path, metavar="F", help="keep what each test runs in this file, and take it from there")
    parser.add_argument("--results", type=Path, metavar="F", help="append every verdict to this file; skip what stands there")
    parser.add_argument("--list", action="store_true", help="print the mutants and stop")
    given = parser.parse_args()
    if unknown := set(given.module) - set(MODULES):
        parser.error(f"{', '.join(sorted(unknown))}: known are {', '.join(MODULES)}")
    return given


def _baseline(file: Path | None) -> runs.Baseline:
    if file is not None and file.exists():
        told = json.loads(file.read_text())
        tests = {module: {int(line): names for line, names in lines.items()} for module, lines in told["tests"].items()}
        return runs.Baseline(told["seconds"], tests)
    found = runs.measure()
    if file is not None:
        file.write_text(json.dumps({"seconds": found.seconds, "tests": found.tests}))
    return found


def _known(file: Path | None) -> dict[str, bool]:
    if file is None or not file.exists():
        return {}
    verdicts = map(json.loads, file.read_text().splitlines())
    return {verdict["key"]: verdict["survived"] for verdict in verdicts}


def _key(mutant: Mutant) -> str:
    return f"{mutant.module}: {mutant.operator} {mutant.occurrence}: {mutant.change}"


def _run(given: argparse.Namespace, chosen: list[Mutant]) -> list[Mutant]:
    """The survivors."""
    baseline = _baseline(given.baseline)
    known = _known(given.results)
    survivors = []
    start = time.monotonic()
    for number, mutant in enumerate(chosen, 1):
        key = _key(mutant)
        if key not in known:
            tests = baseline.chosen(mutant, given.budget)
            known[key] = runs.survives(mutant, tests, sum(baseline.seconds[test] for test in tests))
            if given.results is not None:
                with given.results.open("a") as file:
                    file.write(json.dumps({"key": key, "survived": known[key]}) + "\n")
        if known[key]:
            survivors.append(mutant)
            print(f"{mutant.module}:{mutant.line}: {mutant.change}", flush=True)
        if sys.stderr.isatty() or number % 50 == 0:
            told = f"{number} of {len(chosen)}, {len(survivors)} survived, {time.monotonic() - start:.0f} s"
            print(told, file=sys.stderr, end="\r" if sys.stderr.isatty() else "\n", flush=True)
    return survivors


def main() -> int:
    """Run and print the table; see the head of this module."""
    given = _arguments()
    start = time.monotonic()
    # few examples, the same each time, and no search for the smallest: one failure is enough
    settings.register_profile(
        runs.PROFILE, max_examples=50, derandomize=True, database=None, deadline=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    os.environ["CUFUSE_HYPOTHESIS_PROFILE"] = runs.PROFILE
    set_hypothesis_home_dir(os.devnull)
    given.module = given.module or list(MODULES)
    if importlib.util.find_spec("numba") is None:
        print(f"{runs.WITH_NUMBA} is left out: Numba is not installed", file=sys.stderr)
        given.module = [module for module in given.module if module != runs.WITH_NUMBA]
    most = None if given.most == 0 else given.most
    found = {module: mutants(module, given.seed, most, given.every) for module in given.module}
    chosen = [mutant for group, _ in found.values() for mutant in group]
    if given.list:
        for mutant in chosen:
            print(f"{mutant.module}:{mutant.line}: {mutant.change}")
        print(len(chosen))
        return 0
    survivors = _run(given, chosen)
    tried, left = (Counter(mutant.module for mutant in group) for group in (chosen, survivors))
    print(f"\n{'module':28} {'places':>8} {'mutants':>8} {'killed':>8} {'survived':>9}")
    for module, (_, places) in found.items():
        print(f"{module:28} {places:8} {tried[module]:8} {tried[module] - left[module]:8} {left[module]:9}")
    share = 1 - len(survivors) / max(len(chosen), 1)
    places = sum(count for _, count in found.values())
    print(f"{'together':28} {places:8} {len(chosen):8} {len(chosen) - len(survivors):8} {len(survivors):9}   {share:.1%} killed, "
          f"{time.monotonic() - start:.0f} s")  # fmt: skip
    explained = SURVIVORS.read_text(encoding="utf-8") if SURVIVORS.exists() else ""
    unexplained = [mutant for mutant in survivors if mutant.change not in explained]
    for mutant in unexplained:
        print(f"not explained in {SURVIVORS.name}: {mutant.module}:{mutant.line}: {mutant.change}")
    return 1 if share < REQUIRED or unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
