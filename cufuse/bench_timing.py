"""Measuring on a GPU: graphs captured by CuPy, their replays timed in turn between events, what a call costs the host.

A graph goes once through all calls of a column. Replays of all columns take turns in random order, because a GPU's clocks follow
the work of the last second: from 2048 rows on an H200 would draw more than its 700 W, and lowers them. What runs first, or always
behind a column that needs little power (eager), looks quicker. In random order none is favoured; replays spread all the same
(README.md), and the mean clock depends on which columns there are: only columns of one run may be compared.
"""

import contextlib
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

_NOT_READY: Final = 600  # cudaErrorNotReady
_LONGEST_WAIT: Final = 30.0
_REPLAYS: Final = 2
_OWN_LOAD: Final = 2_000.0
"""Microseconds of a column's own work in front of its timed replays, so that these are queued before they begin."""
_MOST_QUEUED: Final = 200
"""Replays of it that are queued: with some 1000 of its commands the driver's queue is full, and a launch waits without a limit."""
WARM_SECONDS: Final = 0.7
"""Of all columns' work in turn before any counts: clocks fall most in the beginning."""

Launch = Callable[[], None]


@dataclass(frozen=True)
class Run:
    """All calls of one column, ready to be launched as a whole."""

    launch: Launch
    before: Launch | None = None
    """Launched in front of every timed launch; where None, the run itself, for a while, in front of the first."""
    outputs: tuple[Any, ...] = ()
    """What the last call writes: q, k and v, CuPy arrays [M, H, D]."""


class LostGpuError(RuntimeError):
    """A kernel has hung or broken the context: nothing more can be measured in this process."""


class Clock:
    """One stream on which everything is replayed, and events around the replays."""

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._capturing = cupy.cuda.Stream(non_blocking=True)

    def capture(self, calls: Iterable[Callable[[], Any]]) -> Launch:
        """A graph of what the calls launch. They must have been made once before, so that kernels are loaded."""
        self.settle()
        stream = self._capturing
        with stream:
            stream.begin_capture()
            try:
                for call in calls:
                    call()
            except BaseException:
                # the next capture shall not inherit what is wrong with this one
                with contextlib.suppress(Exception):
                    stream.end_capture()
                self._capturing = self.cupy.cuda.Stream(non_blocking=True)
                raise
            graph = stream.end_capture()
        return lambda: graph.launch(self.stream)

    def time(self, run: Run) -> list[float]:
        """Microseconds of each of some launches, queued without a gap."""
        load: list[Run] = []
        if run.before is None:
            (alone,) = self._timed([run])
            load = [run] * min(_MOST_QUEUED, math.ceil(_OWN_LOAD / max(alone, 1.0)))
        return self._timed([*load, *[run] * _REPLAYS])[-_REPLAYS:]

    def _timed(self, runs: list[Run]) -> list[float]:
        """Microseconds of each launch; the stream has come to its end behind them."""
        pairs = []
        with self.stream:
            for run in runs:
                if run.before is not None:
                    run.before()
                start, end = self.cupy.cuda.Event(), self.cupy.cuda.Event()
                start.record(self.stream)
                run.launch()
                end.record(self.stream)
                pairs.append((start, end))
        self.wait(pairs[-1][1])
        return [1000 * float(self.cupy.cuda.get_elapsed_time(*pair)) for pair in pairs]

    def settle(self) -> None:
        """Wait for everything on the device; LostGpuError where that does not end, or ends in an error."""
        null = self.cupy.cuda.Stream.null
        try:
            for stream in (self.stream, self._capturing):
                null.wait_event(stream.record())
            event = null.record()
        except self.cupy.cuda.runtime.CUDARuntimeError as error:
            raise LostGpuError(f"{error}: a kernel has broken the context") from error
        self.wait(event)

    def wait(self, event: Any) -> None:
        """Until the event is reached, without the blind wait of a synchronisation."""
        runtime = self.cupy.cuda.runtime
        limit = time.monotonic() + _LONGEST_WAIT
        while status := runtime.eventQuery(event.ptr):
            if status != _NOT_READY:
                raise LostGpuError(f"CUDA error {status}: a kernel has broken the context")
            if time.monotonic() > limit:
                raise LostGpuError(f"a kernel has not ended within {_LONGEST_WAIT:g} s")
            time.sleep(5e-5)


@dataclass
class Samples:
    """Microseconds of every replay of one column, or why there are none."""

    times: list[float] = field(default_factory=list)
    error: Exception | None = None


def in_turn(clock: Callable[[Run], list[float]], runs: Mapping[str, Run], turns: int, warm: float = 0.0) -> dict[str, Samples]:
    """Time every run ``turns`` times, each turn in another random order, behind ``warm`` seconds of turns that do not count. A run
    that fails is left out from then on; LostGpuError goes through."""
    samples = {name: Samples() for name in runs}
    orders = random.Random(0)  # the same ones each time

    def turn() -> None:
        for name in orders.sample(list(runs), len(runs)):
            if samples[name].error is None:
                try:
                    samples[name].times += clock(runs[name])
                except LostGpuError as error:
                    raise LostGpuError(f"{name}: {error}") from error
                except Exception as error:
                    # its traceback would keep this frame, and with it every graph and array
                    samples[name].error = error.with_traceback(None)

    begin = time.monotonic()
    while time.monotonic() - begin < warm and any(one.error is None for one in samples.values()):
        turn()
    for one in samples.values():
        one.times.clear()
    for _ in range(turns):
        turn()
    return samples


def host_cost(call: Callable[[], Any], settle: Callable[[], None], calls: int = 100, batches: int = 5) -> float:
    """Microseconds of Python for one call, the launches queued: the median over batches."""
    for _ in range(10):
        call()
    times = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(batches):
            settle()
            begin = time.perf_counter()
            for _ in range(calls):
                call()
            times.append((time.perf_counter() - begin) / calls * 1e6)
    finally:
        if collecting:
            gc.enable()
    settle()
    return statistics.median(times)


def allocated(call: Callable[[], Any]) -> int:
    """Bytes that one call asks of CuPy's memory pool, given back at its end or not."""
    import cupy

    class Counter(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "cufuse bench"
        requested = 0

        def malloc_preprocess(self, device_id: int, size: int, mem_size: int) -> None:
            self.requested += size

    call()
    with Counter() as counter:
        call()
    return int(counter.requested)
