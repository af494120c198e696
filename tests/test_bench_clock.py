"""What the bench queues on the stream, what of it is timed, and in which order.

A pretended CuPy, whose launches take as long as they say.
"""

import contextlib
import itertools
import sys
import types
from typing import Any

import pytest

from cufuse import bench_timing
from cufuse.bench_timing import Clock, LostGpuError, Run, in_turn


class Pretended:
    """cupy with a clock of its own, in microseconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self.launched: list[str] = []
        self.status = 0
        pretended = self

        class Stream(contextlib.nullcontext[None]):
            def __init__(self, non_blocking: bool = False) -> None:
                super().__init__()

        class Event:
            ptr = 1
            at = 0.0

            def record(self, stream: Stream) -> None:
                self.at = pretended.now

        self.module: Any = types.ModuleType("cupy")
        runtime = types.SimpleNamespace(eventQuery=lambda ptr: self.status)
        elapsed = lambda start, end: (end.at - start.at) / 1000  # noqa: E731 - milliseconds, as CuPy has them
        self.module.cuda = types.SimpleNamespace(Stream=Stream, Event=Event, get_elapsed_time=elapsed, runtime=runtime)

    def launch(self, name: str, microseconds: float) -> Any:
        def launched() -> None:
            self.launched.append(name)
            self.now += microseconds

        return launched


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    pretended = Pretended()
    monkeypatch.setitem(sys.modules, "cupy", pretended.module)
    return pretended


@pytest.mark.parametrize(("microseconds", "load"), [(400.0, 5), (4000.0, 1), (5.0, bench_timing._MOST_QUEUED)])
def test_a_column_s_own_work_goes_in_front(cupy: Pretended, microseconds: float, load: int) -> None:
    """One replay to see how long it takes, 2 ms of it, then those that count."""
    found = Clock().time(Run(cupy.launch("column", microseconds)))
    assert found == pytest.approx([microseconds] * 2)
    assert len(cupy.launched) == 1 + load + 2


def test_what_is_launched_in_front_is_not_timed(cupy: Pretended) -> None:
    run = Run(cupy.launch("column", 30.0), before=cupy.launch("reading", 500.0))
    assert Clock().time(run) == pytest.approx([30.0, 30.0])
    assert cupy.launched == ["reading", "column"] * 2


def test_a_broken_context_ends_the_timing(cupy: Pretended) -> None:
    cupy.status = 700
    with pytest.raises(LostGpuError, match="700"):
        Clock().time(Run(cupy.launch("column", 30.0)))


def test_columns_take_turns() -> None:
    """Each once a turn, none always behind the same one, and what fails is not asked again."""
    order: list[str] = []
    runs = {name: Run(lambda: None) for name in "abcd"}

    def clock(run: Run) -> list[float]:
        name = next(name for name, one in runs.items() if one is run)
        order.append(name)
        if name == "c" and order.count("c") == 2:
            raise RuntimeError("gone")
        return [1.0, 2.0]

    samples = in_turn(clock, runs, 9)
    turns = ["".join(order[:4]), "".join(order[4:8]), *("".join(order[8 + 3 * turn : 11 + 3 * turn]) for turn in range(7))]
    assert [sorted(turn) for turn in turns] == [list("abcd")] * 2 + [list("abd")] * 7
    assert all(len({before for before, after in itertools.pairwise(order) if after == name}) >= 3 for name in "abd")
    assert samples["a"].times == [1.0, 2.0] * 9
    assert (samples["c"].times, str(samples["c"].error)) == ([1.0, 2.0], "gone")


def test_turns_to_warm_up_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count()
    monkeypatch.setattr(bench_timing.time, "monotonic", lambda: float(next(now)))
    asked = itertools.count()
    runs = {"a": Run(lambda: None)}
    samples = in_turn(lambda run: [float(next(asked))], runs, 2, warm=3.5)
    assert samples["a"].times == [3.0, 4.0]

    def fails(run: Run) -> list[float]:
        raise RuntimeError("gone")

    assert str(in_turn(fails, runs, 2, warm=1e9)["a"].error) == "gone"
