"""A call like one that was checked and made twice is launched again without a check; whatever differs is checked. The launcher
is a stand-in that notes what it is given."""

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _arrays, _driver, _repeat, launch
from cufuse.bf16 import bfloat16
from cufuse.compiler import Kernel
from tests import host_gpu
from tests.host_gpu import Array


class Machine(host_gpu.HostGpu):
    """Devices and streams, and what was launched where: (kernel, device, stream, arguments)."""

    def __init__(self) -> None:
        super().__init__(Path())
        self.device, self.streams = 0, {0: 7, 1: 8}
        self.log: list[tuple[str, int, int, bytes]] = []
        self.again = 0
        self.status = 0

    def prepare(self, kernel: Kernel, device: int, grid: Any, **_: Any) -> Any:
        return Recorded(self, kernel.name)

    @contextlib.contextmanager
    def on_device(self, device: int) -> Iterator[None]:
        before, self.device = self.device, device
        yield
        self.device = before

    def new(self, function: Callable[..., Any], given: dict[str, Any], calls: int = 1) -> list[tuple[str, int, int, bytes]]:
        """What each of so many calls launches: all the same."""
        found = []
        for _ in range(calls):
            count = len(self.log)
            function(**given)
            found.append(self.log[count:])
        assert all(one == found[0] for one in found)
        return found[0]


class Recorded:
    """launch.Prepared."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name

    def __call__(self, arguments: bytes) -> None:
        self.machine.log.append((self.name, self.machine.device, self.machine.streams[self.machine.device], arguments))

    def bound(self, arguments: bytes, stream: int) -> Callable[[], int]:
        def again() -> int:
            self.machine.again += 1
            if not self.machine.status:
                self.machine.log.append((self.name, self.machine.device, stream, arguments))
            return self.machine.status

        return again

    def clusters_at_once(self) -> int:
        return 2


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    for found in host_gpu.installed(monkeypatch, made := Machine()):
        host_gpu.forget_plans(monkeypatch)
        monkeypatch.setattr(_repeat, "_met", set())
        monkeypatch.setattr(launch, "current_device", lambda: made.device)
        monkeypatch.setattr(launch, "current_stream", lambda: made.streams[made.device])
        monkeypatch.setattr(launch, "on_device", made.on_device)
        monkeypatch.setattr(launch, "workspace", lambda device, size, purpose="": (1 << 40) + made.streams[device] * (1 << 30))
        monkeypatch.setattr(launch, "counters", lambda device: 1 << 20)
        monkeypatch.setattr(_driver, "tensor_map", lambda *arguments, **options: repr(arguments).encode().ljust(128)[:128])
        assert found is made
        yield made


def array(*shape: int, dtype: Any = bfloat16, device: int = 0) -> Array:
    return Array(np.ones(shape, dtype), device)


def operations(device: int = 0) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Each with its arguments by name, ``out`` among them."""

    def made(*shape: int, dtype: Any = bfloat16) -> Array:
        return array(*shape, dtype=dtype, device=device)

    wide = {"x": made(4, 64, dtype=np.float32), "weight": made(48, 64), "recipe": "float32", "out": made(4, 48, dtype=np.float32)}
    return {
        "linear": (cufuse.linear, {"x": made(4, 64), "weight": made(48, 64), "k_slices": 1, "out": made(4, 48)}),
        "linear, two launches": (cufuse.linear, wide),
        "linear, three axes": (cufuse.linear, {"x": made(2, 2, 64), "weight": made(48, 64), "k_slices": 1, "out": made(2, 2, 48)}),
        "rms_norm": (cufuse.rms_norm, {"x": made(4, 64), "weight": made(64), "eps": 1e-5, "out": made(4, 64)}),
        "add_rms_norm": (
            cufuse.add_rms_norm,
            {"x": made(4, 64), "residual": made(4, 64), "weight": made(64), "out": (made(4, 64), made(4, 64))},
        ),
    }


NAMES = tuple(operations())


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("checked again")


@pytest.mark.parametrize("name", NAMES)
def test_a_repeated_call_is_launched_alike_without_a_check(machine: Machine, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    function, given = operations()[name]
    first = machine.new(function, given, 2)
    assert len(first) == (2 if "two" in name else 1) and machine.again == 0
    monkeypatch.setattr(_arrays, "backend", forbidden)
    monkeypatch.setattr(_arrays, "output", forbidden)
    for count in (1, 2):
        assert machine.new(function, given) == first
        assert machine.again == count * len(first)
    found, out = function(**given), given["out"]
    assert (found[0] is out[0] and found[1] is out[1]) if isinstance(out, tuple) else found is out


@pytest.mark.parametrize("name", NAMES)
def test_another_address_is_followed(machine: Machine, name: str) -> None:
    function, given = operations()[name]
    known = {tuple(machine.new(function, given, 3))}
    outs = given["out"] if isinstance(given["out"], tuple) else (given["out"],)
    changes = [{key: Array(value.host.copy())} for key, value in given.items() if isinstance(value, Array) and key != "out"]
    for index in range(len(outs)):
        new = tuple(Array(one.host.copy()) if at == index else one for at, one in enumerate(outs))
        changes.append({"out": new if isinstance(given["out"], tuple) else new[0]})
    assert len(changes) >= 2
    for changed in changes:
        before = machine.again
        launched = tuple(machine.new(function, given | changed, 2))
        assert machine.again == before and launched not in known
        known.add(launched)
        assert tuple(machine.new(function, given | changed)) == launched
        assert machine.again == before + len(launched)


@pytest.mark.parametrize("name", NAMES)
def test_another_stream(machine: Machine, name: str) -> None:
    """The default streams of two threads have numbers of their own, below 0."""
    function, given = operations()[name]
    for stream in (7, 9, -1, -3):
        machine.streams[0] = stream
        before = machine.again
        launched = machine.new(function, given, 2)
        assert machine.again == before and {one[1:3] for one in launched} == {(0, stream)}
        assert machine.new(function, given) == launched
        assert machine.again == before + len(launched)


@pytest.mark.parametrize("name", NAMES)
def test_arrays_of_a_device_that_is_not_current(machine: Machine, name: str) -> None:
    function, given = operations(device=1)[name]
    first = machine.new(function, given, 3)
    assert {one[1:3] for one in first} == {(1, 8)}
    assert machine.again == len(first) and machine.device == 0
    machine.streams[1] = 11
    assert {one[1:3] for one in machine.new(function, given, 2)} == {(1, 11)}
    machine.device = 1
    assert {one[1:3] for one in machine.new(function, given)} == {(1, 11)}
    assert machine.again == 2 * len(first)


@pytest.mark.parametrize("name", NAMES)
def test_one_array_on_another_device_is_refused(machine: Machine, name: str) -> None:
    function, given = operations()[name]
    machine.new(function, given, 3)
    for key, value in given.items():
        if isinstance(value, Array):
            with pytest.raises(ValueError, match="is on device 1"):
                function(**given | {key: Array(value.host, 1)})


def test_what_a_call_is_known_by(machine: Machine) -> None:
    """Every part of it alone makes another call."""
    memory = np.zeros(4096, np.uint8)
    x = Array(memory[:256].view(bfloat16).reshape(8, 16))
    prepared = Recorded(machine, "one")

    def known(one: Array = x, recipe: Any = "torch", option: Any = 1, operation: str = "linear") -> bool:
        return _repeat.again(_repeat.described(operation, (x, one), recipe, option))

    for _ in range(2):
        assert not known()
        _repeat.remember(_repeat.described("linear", (x, x), "torch", 1), [(prepared, b"")])
    assert known() and known(Array(x.host))
    others = {
        "address": Array(memory[256:512].view(bfloat16).reshape(8, 16)),
        "shape": Array(x.host[:4]),
        "strides": Array(np.lib.stride_tricks.as_strided(x.host, (8, 16), (30, 2))),
        "dtype": x.view(np.uint16),
        "order of bytes": x.view(">u2"),
        "device": Array(x.host, 1),
    }
    for what, other in others.items():
        assert not known(other), what
    assert not known(operation="rms_norm")
    recipe = cufuse.recipes["torch"]
    for wrong in ("float32", recipe, id(recipe), None, ["torch"]):
        assert not known(recipe=wrong)
    for option in (True, 1.0, np.int64(1), np.float32(1), 2, None, [1], {}):
        assert not known(option=option), repr(option)
    for _ in range(2):
        _repeat.remember(_repeat.described("linear", (x, x), recipe, 1), [(prepared, b"")])
    assert known(recipe=recipe) and not known(recipe=id(recipe)) and not known(recipe=recipe.derive(recipe.name))


def test_a_recipe_lives_as_long_as_its_identity_is_known(machine: Machine) -> None:
    function, given = operations()["linear"]
    recipe = cufuse.recipes["torch"].derive("own")
    machine.new(function, given | {"recipe": recipe}, 2)
    alive = weakref.ref(recipe)
    del recipe
    gc.collect()
    assert alive() is not None
    machine.new(function, given | {"recipe": alive()})
    assert machine.again == 1
    _repeat._calls.clear()
    gc.collect()
    assert alive() is None


WRONG = {
    "linear": [
        *({"k_slices": wrong} for wrong in (True, 1.0, np.float64(1), [1], 0)),
        {"recipe": "touch"}, {"recipe": ["torch"]}, {"recipe": 5}, {"weight": [1.0]},
    ],
    "rms_norm": [
        *({"eps": wrong} for wrong in (float("nan"), "1e-5", [1e-5], {}, -1e-5, 1e-5 + 0j, None)),
        {"recipe": "touch"}, {"recipe": ["torch"]}, {"weight": None},
    ],
    "add_rms_norm": [{"eps": float("nan")}, {"eps": [1e-6]}, {"out": ()}, {"out": 5}, {"residual": [1.0]}],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_a_first_call(machine: Machine, name: str) -> None:
    """Wrong options and arrays, before good calls and after."""
    function, given = operations()[name]
    x, out = given["x"], given["out"]
    pair = isinstance(out, tuple)
    one = out[0] if pair else out
    cases = [
        *WRONG[name],
        {"out": (x, out[1]) if pair else x},
        {"out": (Array(one.host[:2]), out[1]) if pair else Array(one.host[:2])},
        {"out": (one.view(np.float16), out[1]) if pair else one.view(np.float16)},
        {"out": (one.host, out[1]) if pair else one.host},
        {"x": x.host},
        {"x": x.view(np.float16)},
    ]
    before = [refusal(function, given | changed) for changed in cases]
    machine.new(function, given, 3)
    assert machine.again == 1
    count = len(machine.log)
    assert [refusal(function, given | changed) for changed in cases] == before
    assert (machine.again, len(machine.log)) == (1, count)


def refusal(function: Any, given: dict[str, Any]) -> tuple[type[Exception], str]:
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**given)
    return caught.type, str(caught.value)


def test_float32_of_the_other_order_of_bytes_is_refused(machine: Machine) -> None:
    for name in ("linear, two launches", "rms_norm"):
        function, given = operations()[name]
        given = given | {"recipe": "float32", "x": array(4, 64, dtype=np.float32)}
        given["out"] = array(*given["out"].shape, dtype=np.float32)
        machine.new(function, given, 3)
        with pytest.raises(TypeError, match="x has dtype >f4"):
            function(**given | {"x": given["x"].view(">f4")})


def test_the_table_is_bounded(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_repeat, "_MOST_CALLS", 3)
    function, given = operations()["rms_norm"]
    kept = [Array(given["x"].host.copy()) for _ in range(20)]
    for x in kept:
        machine.new(function, given | {"x": x}, 3)
        assert 1 <= len(_repeat._calls) <= 3 and 1 <= len(_repeat._met) <= 3
    assert machine.again == 20


def test_nothing_is_prepared_for_an_address_that_comes_once(machine: Machine) -> None:
    function, given = operations()["rms_norm"]
    kept = [Array(given["out"].host.copy()) for _ in range(20)]
    for out in kept:
        machine.new(function, given | {"out": out})
    assert not _repeat._calls and len(_repeat._met) == 20


def test_what_copies_is_not_remembered(machine: Machine) -> None:
    """A copy lies where a call finds room, in a capture somewhere else than later."""
    function, given = operations()["linear"]
    gap = {"out": Array(np.ones((4, 51), bfloat16)[:, :48])}
    for _ in range(4):
        function(**given | gap)
    assert machine.again == 0 and not _repeat._calls


def test_only_calls_with_all_of_out(machine: Machine) -> None:
    for name in NAMES:
        function, given = operations()[name]
        outs = [None, (None, given["out"][1])] if isinstance(given["out"], tuple) else [None]
        for out in outs * 3:
            function(**given | {"out": out})
    assert machine.again == 0 and not _repeat._calls


def test_several_launches_go_without_another_thread_between(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    function, given = operations()["linear, two launches"]
    together: list[int] = []
    real = launch.one_by_one

    def one_by_one(launches: Any) -> None:
        together.append(len(launches))
        real(launches)

    monkeypatch.setattr(launch, "one_by_one", one_by_one)
    machine.new(function, given, 3)
    assert together == [2, 2, 2] and machine.again == 2


def test_a_refused_launch_goes_the_way_that_says_why(machine: Machine) -> None:
    """Or that gives a thread its context."""
    function, given = operations()["rms_norm"]
    first = machine.new(function, given, 2)
    machine.status = 201
    assert machine.new(function, given) == first
    assert machine.again == 1


def test_a_call_that_failed_is_not_remembered(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    function, given = operations()["linear"]
    with monkeypatch.context() as patch:
        patch.setattr(Recorded, "__call__", lambda *_: int("planted"))
        for _ in range(2):
            with pytest.raises(ValueError, match="planted"):
                function(**given)
    assert not _repeat._calls and not _repeat._met


def test_block_options_that_compare_equal(machine: Machine) -> None:
    """rms_norm_qkv remembers calls by itself."""
    out = tuple(array(3, count, 64) for count in (4, 1, 1))
    given = {
        "x": array(3, 128), "norm_weight": array(128), "qkv_weight": array(6 * 64, 128), "q_norm_weight": array(64),
        "k_norm_weight": array(64), "heads": 4, "k_slices": 1, "out": out, "eps": 0.5, "static_weights": np.array(False),
    }  # fmt: skip
    for _ in range(2):
        cufuse.rms_norm_qkv(**given)
    wrongs: list[dict[str, Any]] = [{"k_slices": one} for one in (True, 1.0, [1])]
    wrongs += [{"heads": 4.0}, *({"eps": one} for one in ([0.5], 0.5 + 0j, Fraction(1, 2)))]
    for wrong in wrongs:
        with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
            cufuse.rms_norm_qkv(**given | wrong)
    wide = given | {"recipe": "float32", "x": array(3, 128, dtype=np.float32)}
    wide["out"] = tuple(array(3, count, 64, dtype=np.float32) for count in (4, 1, 1))
    for _ in range(2):
        cufuse.rms_norm_qkv(**wide)
        with pytest.raises(TypeError, match="x has dtype >f4"):
            cufuse.rms_norm_qkv(**wide | {"x": wide["x"].view(">f4")})
