"""Runs of pytest in forked processes, each with one module's text replaced in memory: no file is ever changed.

The parent has imported what does not change (NumPy, pytest, Hypothesis) and no module of cufuse, so that a child begins at once
and imports cufuse anew. A child's tests are chosen by the lines that they run, learnt from one traced run of all of them.
"""

import contextlib
import importlib.abc
import importlib.util
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import coverage
import pytest

from tests.mutation.mutants import MODULES, ROOT, Mutant, path_of, source_of, statement_lines

PROFILE = "cufuse-mutation"
MEMORY = 8 << 30
"""Bytes of address space of a child: a changed shift may ask for anything."""

TESTS = (
    "test_bf16.py", "test_oracle.py", "test_recipe.py", "test_sums.py", "test_tensor_core.py", "test_tensor_core_interface.py",
    "test_operations.py", "test_operation_errors.py", "test_rms_norm_qkv.py", "test_sum_macros.py", "test_mutation_gaps.py",
    "test_mutation_gaps_decoder.py",
    "test_recipe_fields.py",
    "test_exponential.py", "test_softmax.py", "test_attention.py", "test_mlp.py", "test_quantised_formats.py",
    "test_quantised_linear.py",
)  # fmt: skip
"""The fast tests: what compiles kernels for the host, reads the golden records or compares all float32 is left out."""

WITH_NUMBA = "emulation._tiles_numba"
OK = 0


@dataclass(frozen=True)
class Baseline:
    """What a run of all tests showed: seconds by test, and for each module and line the tests that run it."""

    seconds: dict[str, float]
    tests: dict[str, dict[int, list[str]]]

    def chosen(self, mutant: Mutant, budget: float) -> list[str]:
        """The tests that run the mutant's statement, up to a budget: those of a millisecond, then the others, quickest first,
        every function once before any twice.

        A line that runs at import, of a constant or a signature, belongs to all tests.
        """
        by_line = self.tests.get(mutant.module, {})
        line = mutant.line
        lines = statement_lines(source_of(mutant.module)).get(line, range(line, line + 1))
        found = {test for line in lines for test in by_line.get(line, ()) if test in self.seconds}
        if not found:
            found = set(by_line.get(0, ())) or set(self.seconds)
        elif len(found) < 5:  # what is kept behind functools.cache runs in the first test alone
            found |= {test for tests in by_line.values() for test in tests if test in self.seconds}
        ordered = sorted(found, key=lambda test: (self.seconds[test], test))
        times_seen: dict[str, int] = {}
        rank = {}
        for test in ordered:
            function = test.split("[")[0]
            times_seen[function] = times_seen.get(function, 0) + 1
            rank[test] = 0 if self.seconds[test] < 0.001 else times_seen[function]
        ordered.sort(key=lambda test: rank[test])  # stable: within a rank still quickest first
        chosen, spent = [], 0.0
        for test in ordered:
            if spent + self.seconds[test] <= budget or not chosen:
                chosen.append(test)
                spent += self.seconds[test]
        return chosen


class _Changed(SourceFileLoader):
    """Loads another text under the module's own name and path."""

    def __init__(self, name: str, path: str, text: str) -> None:
        super().__init__(name, path)
        self.text = text

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.text, self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, text: str) -> None:
        self.name, self.path, self.text = f"cufuse.{module}", str(path_of(module)), text

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        return importlib.util.spec_from_file_location(name, self.path, loader=_Changed(name, self.path, self.text))


class Selection:
    """Plugin: keeps the chosen tests, in the chosen order, and notes how long each took; ``watch`` hears of each test."""

    def __init__(self, chosen: Iterable[str] | None, watch: Callable[[str], object] = lambda test: None) -> None:
        self.order = None if chosen is None else {test: place for place, test in enumerate(chosen)}
        self.watch = watch
        self.seconds: dict[str, float] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.order is not None:
            order = self.order
            items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.watch(item.nodeid)
        try:
            return (yield)
        finally:
            self.watch("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:  # what is skipped can kill nothing
            self.seconds[report.nodeid] = report.duration


def measure() -> Baseline:
    """Two runs of all tests on the unchanged modules: how long each takes, then, traced, which lines each runs.

    Numba compiles what no tracer sees: its module has every test that is named for it.
    """
    seconds = _told(_timed)
    tests = _told(_traced)
    by_module = {module: {int(line): names for line, names in lines.items()} for module, lines in tests.items()}
    if importlib.util.find_spec("numba") is not None:
        with_numba = _told(_timed_with_numba)
        by_module[WITH_NUMBA] = {0: list(with_numba)}
        seconds |= with_numba
    return Baseline(seconds, by_module)


def _timed() -> tuple[int, Any]:
    hide_numba()
    selection = Selection(None)
    return _pytest(selection, TESTS), selection.seconds


def _timed_with_numba() -> tuple[int, Any]:
    selection = Selection(None)
    code = _pytest(selection, [test for test in TESTS if "tensor_core" in test])
    return code, {test: spent for test, spent in selection.seconds.items() if "numba" in test}


def _traced() -> tuple[int, Any]:
    hide_numba()
    cover = coverage.Coverage(data_file=None, include=[str(path_of(module)) for module in MODULES], config_file=False)
    cover.start()
    code = _pytest(Selection(None, cover.switch_context), TESTS)
    cover.stop()
    data = cover.get_data()
    found: dict[str, dict[int, list[str]]] = {}
    for module in MODULES:
        contexts = data.contexts_by_lineno(str(path_of(module)))
        found[module] = {line: sorted(name for name in names if name) for line, names in contexts.items()}
    return code, found


def hide_numba() -> None:
    """Numba keeps machine code on disk by a key that knows no constants of other modules: a changed one would go unseen."""
    sys.modules["numba"] = None  # type: ignore[assignment]


def _told(job: Callable[[], tuple[int, Any]]) -> Any:
    """What a job tells from a child of its own."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")

        def child() -> int:
            code, told = job()
            answer.write_text(json.dumps(told))
            return code

        code = in_child(child, timeout=1200, quiet=False)
        if code != OK:
            raise RuntimeError(f"the tests fail (pytest's exit code {code}) without any change: mend them first")
        return json.loads(answer.read_text())


def survives(mutant: Mutant, chosen: list[str], seconds: float) -> bool:
    """Whether the chosen tests, which take so many seconds, all pass with the mutant in its module's place."""
    return passes(mutant.module, mutant.code(), chosen, 8 + 2 * seconds)


def passes(module: str, text: str, chosen: list[str], timeout: float) -> bool:
    """Whether the chosen tests pass with this text in the module's place. Running out of time, memory or luck is failing."""
    with tempfile.TemporaryDirectory(prefix="cufuse-mutant-") as folder:

        def child() -> int:
            sys.meta_path.insert(0, _Finder(module, text))
            if module != WITH_NUMBA:
                hide_numba()
            os.environ["NUMBA_CACHE_DIR"] = folder
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            return _pytest(Selection(chosen), sorted({test.split("::")[0].removeprefix("tests/") for test in chosen}))

        return in_child(child, timeout) == OK


def _pytest(selection: Selection, files: Iterable[str]) -> int:
    options = [
        "-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", f"--rootdir={ROOT}",
        "-W", "ignore::pytest.PytestAssertRewriteWarning",
    ]  # fmt: skip
    paths = [ROOT / "tests" / file for file in files]
    return int(pytest.main([*options, *(str(path) for path in paths if path.exists())], [selection]))


def in_child(job: Callable[[], int], timeout: float, quiet: bool = True) -> int:
    """The job's exit code from a forked process with a session of its own; -1 where it was killed or ran out of time."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            os.setsid()
            if quiet:
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
            code = job()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    end = time.monotonic() + timeout
    try:
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) if os.WIFEXITED(status) else -1
            if time.monotonic() > end:
                return -1
            time.sleep(0.005)
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
