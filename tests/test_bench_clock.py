"""What the bench queues on the stream, and what of it is timed: a pretended CuPy, whose launches take as long as they say."""

import contextlib
import sys
import types
from typing import Any

import pytest

from cufuse import bench_timing
from cufuse.bench_timing import Clock, LostGpuError, Run


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
