"""What threads on one stream share: workspaces, counters, the order of launches; and what no two threads share."""

import contextlib
import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest

from cufuse import _driver, _gpu_decoder, launch
from cufuse.compiler import Kernel

PER_THREAD = 2  # cudaStreamPerThread
PATIENCE = 0.3  # seconds to wait for what must not happen


class Memory:
    """cupy.empty's result and cupy.cuda.MemoryPointer in one, with addresses that are never given again."""

    next_address = 1 << 20

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.ptr = nbytes, Memory.next_address
        self.data = self
        Memory.next_address += nbytes + 4096


class FakeStream(contextlib.nullcontext):
    def __init__(self, ptr: int = 7, non_blocking: bool = False) -> None:
        super().__init__(self)
        self.ptr = ptr

    def synchronize(self) -> None:
        pass


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CuPy with an allocator that hands out addresses, and empty books in ``launch``."""
    found: Any = types.ModuleType("cupy")
    found.current = FakeStream()
    found.empty = lambda shape, dtype: Memory(shape)
    found.cuda = types.SimpleNamespace(
        get_current_stream=lambda: found.current, Stream=FakeStream, Memory=Memory,
        MemoryPointer=lambda memory, offset: memory, runtime=types.SimpleNamespace(memsetAsync=lambda *_: None),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cupy", found)
    monkeypatch.setattr(launch, "_cupy", lambda: found)
    monkeypatch.setattr(launch, "_workspaces", {})
    monkeypatch.setattr(launch, "_counters", {})
    monkeypatch.setattr(_driver, "relaxed_capture", contextlib.nullcontext)
    return found


def in_threads(*functions: Any) -> list[Any]:
    """The results of functions that run at the same time."""
    results: list[Any] = [None] * len(functions)

    def work(index: int) -> None:
        results[index] = functions[index]()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_workspace_has_the_size_asked_for_whatever_other_threads_append(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads on one stream need more at once; the smaller block comes to the list after the larger one, before the larger
    one's thread looks there."""
    large, small = 3 << 20, 2 << 20
    both, large_is_there, small_is_there = threading.Barrier(2), threading.Event(), threading.Event()
    asked = threading.local()
    made: dict[int, int] = {}

    def empty(size: int, dtype: str) -> Memory:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(PATIENCE)
        if asked.size == small:
            large_is_there.wait(PATIENCE)
        memory = Memory(size)
        made[memory.ptr] = size
        return memory

    @contextlib.contextmanager
    def relaxed_capture() -> Iterator[None]:
        yield
        mine, other = (large_is_there, small_is_there) if asked.size == large else (small_is_there, large_is_there)
        mine.set()
        other.wait(PATIENCE)

    def ask(size: int) -> int:
        asked.size = size
        return launch.workspace(0, size)

    cupy.empty = empty
    monkeypatch.setattr(_driver, "relaxed_capture", relaxed_capture)
    found = in_threads(lambda: ask(large), lambda: ask(small))
    assert [made[pointer] >= size for pointer, size in zip(found, (large, small), strict=True)] == [True, True]
    sizes = [made[block.ptr] for block in launch._workspaces[0, 7, ""]]
    assert sizes == sorted(sizes), "a workspace only grows"
    assert made[launch.workspace(0, 1)] == sizes[-1]


def test_workspaces_of_streams_devices_and_purposes_are_apart(cupy: Any) -> None:
    first = launch.workspace(0, 100)
    assert launch.workspace(0, 1 << 20) == first
    others = {launch.workspace(1, 100), launch.workspace(0, 100, "scores")}
    cupy.current = FakeStream(8)
    others |= {launch.workspace(0, 100), launch.workspace(0, 100, "scores")}
    assert len(others) == 4 and first not in others
    cupy.current = FakeStream()
    grown = launch.workspace(0, (1 << 20) + 1)
    assert grown != first and launch._workspaces[0, 7, ""][-1].nbytes == 2 << 20
    assert launch._workspaces[0, 7, ""][0].ptr == first, "a captured graph may hold it"


def test_the_per_thread_default_stream_is_another_one_in_each_thread(cupy: Any) -> None:
    """One pointer, but kernels of two threads run at the same time: nothing may be shared, nor come to a later thread."""
    cupy.current = FakeStream(PER_THREAD)

    def belongings() -> tuple[int, ...]:
        twice = [(launch.current_stream(), launch.workspace(0, 10), launch.counters(0)) for _ in range(2)]
        assert twice[0] == twice[1]
        return twice[0]

    found = [belongings(), *in_threads(belongings, belongings), *in_threads(belongings)]
    for one in zip(*found, strict=True):
        assert len(set(one)) == 4
    cupy.current = FakeStream()
    assert len({belongings(), *in_threads(belongings, belongings)}) == 1


def test_launches_go_to_the_per_thread_default_stream_under_its_own_name(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    streams: list[int] = []

    def called(config: Any, *_: Any) -> int:
        streams.append(config._obj.stream)
        return 0

    monkeypatch.setattr(launch, "_load", lambda kernel, device: None)
    monkeypatch.setattr(_driver, "library", lambda: types.SimpleNamespace(cuLaunchKernelEx=called))
    prepared = launch.Prepared(Kernel("one", "one.cu", "one", (), 32), 0, (1, 1, 1), 32, 0, 1, False)
    for pointer in (7, PER_THREAD):
        cupy.current = FakeStream(pointer)
        prepared(b"")
        prepared.bound(b"", launch.current_stream())()
    assert streams == [7, 7, PER_THREAD, PER_THREAD]


def test_a_thread_that_has_not_used_the_gpu_gets_its_context(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another thread has loaded the kernel: to launch, and to ask how many clusters fit."""
    ready: list[int] = []

    def called(*arguments: Any) -> int:
        if not ready:
            return _driver.INVALID_CONTEXT
        if len(arguments) == 3:  # how many clusters
            arguments[0]._obj.value = 66
        return 0

    driver = types.SimpleNamespace(cuLaunchKernelEx=called, cuOccupancyMaxActiveClusters=called)
    monkeypatch.setattr(launch, "_load", lambda kernel, device: None)
    monkeypatch.setattr(launch, "_make_context_current", ready.append)
    monkeypatch.setattr(_driver, "library", lambda: driver)
    prepared = launch.Prepared(Kernel("one", "one.cu", "one", (), 32), 3, (2, 1, 1), 32, 0, 2, False)
    assert prepared.clusters_at_once() == 66 and ready == [3]
    ready.clear()
    prepared(b"")
    assert ready == [3]


class Launches:
    """In the launcher's place: who launched which kernel, in turn; a thread's first launch waits for the other thread's."""

    def __init__(self) -> None:
        self.found: list[tuple[int, str]] = []
        self.both = threading.Barrier(2)

    def prepare(self, kernel: Kernel, *_: Any, **__: Any) -> Any:
        def launched(arguments: bytes) -> None:
            thread = threading.get_ident()
            first = all(thread != other for other, _ in self.found)
            self.found.append((thread, kernel.entry))
            if first:
                with contextlib.suppress(threading.BrokenBarrierError):
                    self.both.wait(PATIENCE)

        return launched


def test_no_launch_comes_between_the_two_of_argmax(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They hand the parts' winners over in the stream's workspace."""
    launches = Launches()
    monkeypatch.setattr(launch, "prepare", launches.prepare)
    array = types.SimpleNamespace(device=types.SimpleNamespace(id=0), shape=(1, 5000), itemsize=2, data=Memory(10000))
    in_threads(*[lambda: _gpu_decoder.argmax(array, array)] * 2)
    assert [entry for _, entry in launches.found] == ["largest_of_parts", "argmax"] * 2
    threads = [thread for thread, _ in launches.found]
    assert threads[0] == threads[1] != threads[2] == threads[3]
