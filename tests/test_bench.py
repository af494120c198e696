"""``cufuse bench`` without a GPU: arguments, the order of measuring, failures that stay where they are, tables, JSON."""

import contextlib
import json
import os
import re
import shutil
import struct
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import _gpu_stream, bench, bench_front, bench_inputs, bench_peers, bench_timing, launch
from cufuse.__main__ import main
from cufuse.bench_results import COMPILE, CUFUSE, EAGER, GEMM, SCHEMA, STATIC
from cufuse.bench_timing import LostGpuError, Run
from cufuse.commands import bench as bench_command
from tests import host_bench
from tests.conftest import why_no_gpu
from tests.host_bench import COMMAND
from tests.host_gpu import HostGpu


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The pretended GPU, without PyTorch, in an empty folder."""
    return host_bench.installed(monkeypatch, tmp_path)


def test_a_run(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND[:2], "small,other", *COMMAND[3:]]) == 0
    out = capsys.readouterr().out
    found = json.loads(Path("b.json").read_text())
    described = re.split(r"\W+", str(bench.__doc__))
    assert {*found, *found["cells"][0], *found["cells"][0]["columns"][CUFUSE]} <= set(described)
    assert (found["schema"], found["complete"], found["repeat"]) == (SCHEMA, True, 2)
    assert found["command"] == "cufuse bench --model small,other --tokens 1,3 --recipe torch --repeat 2 --peer-seconds 120"
    assert list(found["absent"]) == ["torch_compile", "liger", "f_rms_norm", "eager"]
    assert [(cell["model"], cell["tokens"]) for cell in found["cells"]] == [(m, t) for m in ("small", "other") for t in (1, 3)]
    for cell in found["cells"]:
        assert list(cell["columns"]) == [CUFUSE, STATIC, GEMM]
        ours, gemm = cell["columns"][CUFUSE], cell["columns"][GEMM]
        assert (ours["differing"], ours["outputs"], ours["against"]) == (0, cell["tokens"] * 8 * 64, "emulation")
        assert (ours["replays"], ours["failed"], gemm["differing"], gemm["against"]) == (2, False, None, None)
        assert 0 < ours["least"] <= ours["microseconds"] <= ours["most"]
        assert cell["ratios"][CUFUSE][GEMM] == ours["microseconds"] / gemm["microseconds"]
        assert cell["ratios"][CUFUSE][COMPILE] is None
        assert cell["allocated_bytes"] == 0
        assert cell["host_microseconds"] > 0
    assert "cufuse: 0 of 4,096 outputs differ from emulation." in out
    assert "compile, Liger, F.rms, eager absent: torch cannot be imported" in out.replace("\n", " ")


def test_json_on_standard_output_and_another_recipe(host: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMAND[:3], "--tokens", "2", "--repeat", "1", "--recipe", "float32", "--no-peers", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == "float32"
    assert found["absent"]["liger"] == "--no-peers"
    assert found["absent"]["eager"].startswith("torch cannot be imported")
    assert found["cells"][0]["columns"][CUFUSE]["differing"] == 0


def test_differing_bits_are_counted(host: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """One bit of v wrong in one column, nothing written at all in the other."""

    def spoil(call: Callable[[], Any], options: dict[str, Any]) -> None:
        if not options.get("static_weights"):
            call()
            options["out"][2].view(np.uint16)[0, 1, 5] ^= 1

    host_bench.change_calls(monkeypatch, spoil)
    assert main(COMMAND) == 0
    cells = json.loads(Path("b.json").read_text())["cells"]
    assert [cell["columns"][CUFUSE]["differing"] for cell in cells] == [1, 1]
    assert [cell["columns"][STATIC]["differing"] for cell in cells] == [512, 3 * 512]
    text = capsys.readouterr().out
    assert "cufuse: 2 of 2,048 outputs differ from emulation: small at 1, small at 3." in text
    assert "100.0 %" in text


def test_a_failure_stays_where_it_is(host: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(call: Callable[[], Any], options: dict[str, Any]) -> None:
        if options.get("static_weights") and len(options["out"][0]) == 3:
            raise ValueError("no such tile")
        call()

    host_bench.change_calls(monkeypatch, fail)
    assert main(COMMAND) == 2
    done = capsys.readouterr()
    assert done.err == "cufuse bench: small, 3 tokens, cufuse_static: ValueError: no such tile\n"
    assert "Failed: small, 3 tokens, cufuse_static: ValueError: no such tile" in done.out
    first, second = json.loads(Path("b.json").read_text())["cells"]
    assert not first["columns"][STATIC]["failed"]
    assert second["columns"][STATIC]["failed"]
    assert second["columns"][STATIC]["microseconds"] is None
    assert second["columns"][CUFUSE]["differing"] == 0
    assert second["host_microseconds"] > 0


def test_a_peer_that_fails_is_no_failure_of_the_run(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def gemm(*_: Any) -> Any:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED")

    monkeypatch.setattr(bench_front, "_gemm_call", gemm)
    assert main(COMMAND) == 0
    columns = [cell["columns"] for cell in json.loads(Path("b.json").read_text())["cells"]]
    assert [one[GEMM]["note"] for one in columns] == ["RuntimeError: CUBLAS_STATUS_NOT_SUPPORTED"] * 2
    assert all(one[CUFUSE]["microseconds"] > 0 for one in columns)


def test_a_model_that_does_not_fit(host: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = bench.Layer

    def layer(config: Any, *rest: Any) -> Any:
        if not tried:
            tried.append(config)
            raise MemoryError("out of memory allocating 1,073,741,824 bytes")
        return real(config, *rest)

    tried: list[Any] = []
    monkeypatch.setattr(bench, "Layer", layer)
    assert main(["bench", "--model", "small,other", "--tokens", "2", "--repeat", "1", "--json", "b.json"]) == 0
    found = json.loads(Path("b.json").read_text())
    assert [cell["model"] for cell in found["cells"]] == ["other"]
    assert found["notes"] == ["small: given up, MemoryError: out of memory allocating 1,073,741,824 bytes"]
    assert "Note: small: given up" in capsys.readouterr().out


def test_a_lost_gpu_ends_the_run_and_keeps_what_there_is(
    host: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def hang() -> None:
        if len(json.loads(Path("b.json").read_text())["cells"]) == 1 if Path("b.json").exists() else False:
            raise LostGpuError("a kernel has not ended within 30 s")

    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(host_bench.Clock, "spoil", staticmethod(hang))
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Left, match="2"):
        main(COMMAND)
    found = json.loads(Path("b.json").read_text())
    assert found["complete"] is False
    assert [cell["columns"][CUFUSE]["differing"] for cell in found["cells"]] == [0, None]
    done = capsys.readouterr()
    assert done.err.startswith("cufuse bench: the GPU was lost: small, 3 tokens, ")
    assert "a kernel has not ended within 30 s" in done.err
    assert "The run was not completed" in done.out


class PretendedPeers:
    """Eager PyTorch that gives what cufuse gave; ``log`` has what was called, ``fault`` is raised by the reference."""

    absent: dict[str, str] = {}  # noqa: RUF012
    names = (EAGER,)
    torch = object()
    fault: Exception | None = None

    def __init__(self, wanted: tuple[str, ...]) -> None:
        self.log: list[str] = []

    def block(self, block: Any) -> Any:
        self.made = block
        return self

    def run(self, name: str, clock: Any) -> Run:
        self.log.append(name)
        self.made.call(self.made.calls - 1)
        self.outputs = tuple(array.copy() for array in self.made.out)
        return Run(
            lambda: [np.copyto(one, kept) for one, kept in zip(self.copies(), self.outputs, strict=True)], outputs=self.copies()
        )

    def copies(self) -> tuple[Any, ...]:
        self.held = getattr(self, "held", None) or tuple(array.copy() for array in self.outputs)
        return self.held

    def reference(self) -> tuple[Any, ...]:
        if self.fault is not None:
            raise self.fault
        return self.outputs

    def release(self) -> None:
        self.log.append("release")
        self.held = None

    def forget(self) -> None:
        pass


@pytest.mark.parametrize(("fault", "log"), [
    (None, [EAGER, "release", EAGER, "release"]),
    (RuntimeError("no room"), [EAGER, "release", EAGER, "release"]),
    (LostGpuError("gone"), [EAGER]),
])  # fmt: skip
def test_graphs_of_peers_end_with_their_cell(
    host: Any, monkeypatch: pytest.MonkeyPatch, fault: Exception | None, log: list[str]
) -> None:
    """Also where the cell fails; a lost GPU is not asked for anything more."""
    made: list[PretendedPeers] = []

    def peers(wanted: tuple[str, ...]) -> PretendedPeers:
        made.append(PretendedPeers(wanted))
        made[0].fault = fault
        return made[0]

    monkeypatch.setattr(bench_front, "Peers", peers)
    settings = bench.Settings(("small",), (1, 3), (cufuse.recipes["torch"],), repeat=1, peers=False)
    results = bench.run(settings)
    assert made[0].log == log
    assert results.complete == (not isinstance(fault, LostGpuError))
    if fault is None:
        assert [cell.columns[name].differing for cell in results.cells for name in (CUFUSE, STATIC, EAGER)] == [0] * 6
        assert {cell.columns[CUFUSE].against for cell in results.cells} == {"eager"}
    else:
        assert str(fault) in results.notes[0]


def test_peers_keep_their_times_where_eager_fails(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only cufuse's columns have an emulation to be compared with."""

    class WithoutEager(PretendedPeers):
        names = (COMPILE, EAGER)

        def run(self, name: str, clock: Any) -> Run:
            if name == EAGER:
                raise RuntimeError("no room")
            return super().run(name, clock)

    monkeypatch.setattr(bench_front, "Peers", WithoutEager)
    [cell] = bench.run(bench.Settings(("small",), (3,), (cufuse.recipes["torch"],), repeat=1, peers=False)).cells
    assert {name: one.failed for name, one in cell.columns.items()} == {CUFUSE: False, STATIC: False, COMPILE: False, EAGER: True}
    assert (cell.columns[CUFUSE].differing, cell.columns[CUFUSE].against) == (0, "emulation")
    assert cell.columns[COMPILE].microseconds is not None
    assert cell.columns[COMPILE].against is None


def test_every_column_of_pytorch_has_a_stream_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = bench_peers.Peers.__new__(bench_peers.Peers)
    peers.torch, peers._streams = types.SimpleNamespace(cuda=types.SimpleNamespace(Stream=object)), {}
    first = peers.stream(EAGER)
    assert peers.stream(GEMM) is not first
    assert peers.stream(EAGER) is first


@pytest.mark.parametrize(("arguments", "message"), [
    ("--model 0.6b,7b", "--model names '7b'; known are 0.6b, 1.7b, 4b, 8b, 14b, 32b, or all"),
    ("--model ,", "--model names none"),
    ("--tokens ,", "--tokens names none"),
    ("--tokens 1,x", "--tokens is '1,x'; needed are numbers from 1 to 65536"),
    ("--tokens 0", "--tokens is '0'"),
    ("--tokens 65537", "--tokens is '65537'"),
    ("--tokens ²", "--tokens is '²'"),
    ("--repeat 0", "--repeat is 0; needed is an integer >= 1"),
    ("--peer-seconds -1", "--peer-seconds is -1.0; needed is a number >= 0"),
    ("--peer-seconds nan", "--peer-seconds is nan"),
    ("--recipe pytorch", "recipe is 'pytorch'; known are torch"),
    ("--recipe torch,pytorch", "recipe is 'pytorch'; known are torch"),
    ("--recipe ,", "--recipe names none"),
    ("--quantised Q5_0", "format is 'Q5_0'; known are Q4_0, Q8_0, Q4_K, Q6_K"),
    ("--quantised ,", "--quantised names none"),
    ("--quantised-tokens 1", "--quantised-tokens is for the table of --quantised; give --quantised too"),
    ("--quantised-tokens 1,x", "--quantised-tokens is '1,x'; needed are numbers from 1 to 65536"),
    ("--json nowhere/b.json", "nowhere/b.json: No such file or directory"),
    ("--repeat many", "argument --repeat: invalid int value: 'many'"),
])  # fmt: skip
def test_wrong_usage(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code: Any = None
    try:
        code = main(["bench", *arguments.split()])
    except SystemExit as stop:
        code = stop.code
    done = capsys.readouterr()
    assert (code, done.out, done.err.count("\n")) == (2, "", 1)
    assert message in done.err
    assert list(tmp_path.iterdir()) == []


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["bench", "--help"])
    out = capsys.readouterr().out
    options = ("--model", "--tokens", "--recipe", "--quantised", "--only-quantised", "--repeat", "--no-peers", "--json")
    assert all(option in out for option in options)


def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    if why_no_gpu() is None:
        pytest.skip("this machine has a GPU")
    assert main(["bench"]) == 2
    done = capsys.readouterr()
    assert (done.out, done.err.count("\n")) == ("", 1)
    assert done.err.startswith("cufuse bench: CuPy ")


def test_the_command_says_all_settings() -> None:
    parser = bench_command.argparse.ArgumentParser()
    bench_command.add(parser.add_subparsers())
    lines = (
        "", "--model all --tokens 3,3,5", "--no-peers --recipe batch-invariant", "--peer-seconds 7.5 --repeat 2 --model 8B",
        "--recipe torch,batch-invariant --quantised q8_0,Q8_0,Q4_0", "--quantised all", "--only-quantised",
        "--quantised Q6_K --quantised-tokens 1,2,64 --model 0.6b",
    )  # fmt: skip
    for line in lines:
        settings = bench_command._settings(parser.parse_args(["bench", *line.split()]))
        again = bench_command._settings(parser.parse_args(settings.command.split()[1:]))
        assert again.command == settings.command
        if settings.peers:
            assert again == settings
    settings = bench_command._settings(parser.parse_args(["bench", "--only-quantised"]))
    assert (settings.formats, settings.front) == (("Q4_0", "Q8_0"), False)
    assert bench_command._settings(parser.parse_args(["bench", "--quantised", "all"])).formats == tuple(cufuse.quantised.FORMATS)
    assert bench_command._settings(parser.parse_args(["bench"])).models == ("0.6b", "4b", "8b", "32b")
    assert bench_command._settings(parser.parse_args(["bench", "--model", "all"])).models == tuple(bench.MODELS)


def test_calls_of_a_graph() -> None:
    for tokens in (1, 64, 256, 2048, 8192):
        for rows, hidden in ((4096, 1024), (10240, 5120)):
            weights = max(3, -(-(1 << 30) // (2 * rows * hidden)))
            calls = bench_inputs.calls_of_a_graph(tokens, rows, hidden, weights, 2 * rows * hidden)
            assert 3 <= calls <= weights
            assert calls == weights or calls * 2 * rows * hidden >= 240 << 20
            assert calls == weights or tokens > 256


def test_host_cost_and_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(np.arange(1000) * 1e-3)
    monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: next(ticks))
    calls: list[int] = []
    settled: list[int] = []
    assert bench_timing.host_cost(lambda: calls.append(1), lambda: settled.append(len(calls)), 100, 3) == pytest.approx(10.0)
    assert (len(calls), settled) == (310, [10, 110, 210, 310])


@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is needed to run a kernel's text on the host")
@pytest.mark.parametrize("loads", [2, 4, 8])
def test_the_reading_kernel_reads_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loads: int) -> None:
    """The exclusive or of all words, for numbers of units that fit no wave of the grid."""
    reader = _gpu_stream.Reader(32, loads, 1)
    gpu = HostGpu(tmp_path)
    monkeypatch.setattr(launch, "prepare", gpu.prepare)
    monkeypatch.setattr(launch, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(launch, "device_of", lambda **arrays: 0)
    monkeypatch.setattr(launch, "on_device", lambda device: contextlib.nullcontext())
    for units in (1, 31, 96, 97, 96 * loads, 96 * loads + 1, 1000):
        words = np.random.default_rng(units).integers(0, 2**32, 4 * units, np.uint32)
        joined = np.zeros(1, np.uint32)
        _gpu_stream.read(Pretended(words), reader, Pretended(joined))
        assert joined[0] == np.bitwise_xor.reduce(words), units
        _gpu_stream.read(Pretended(words), reader)
    with pytest.raises(ValueError, match="needed are contiguous units of 16 bytes"):
        _gpu_stream.read(Pretended(words[:3]), reader)
    assert struct.calcsize("PqP") == 24


class Pretended:
    """A CuPy array as far as a launch looks at it."""

    def __init__(self, host: np.ndarray) -> None:
        self.flags, self.nbytes, self.strides = host.flags, host.nbytes, host.strides
        self.data = type("Pointer", (), {"ptr": host.__array_interface__["data"][0]})
