"""The commands on a machine with a GPU: ``check`` and what it notices, ``info``, ``report --device gpu``; and casts back."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cufuse
from cufuse import compiler, gpu_stages, launch, selfcheck
from cufuse.__main__ import main
from cufuse.bf16 import bfloat16
from cufuse.report_block import LayerBlock
from tests import gpu_support
from tests.commands_here import Command
from tests.gpu_support import COMPARED, demand_same, rehearse, to_gpu, to_host

pytestmark = gpu_support.MARKS

AREAS = {
    "round_to_bf16": "_casts",
    "rms_norm": "_norms",
    "add_rms_norm": "_residual_norms",
    "rope": "_ropes",
    "linear": "_linears",
    "rms_norm_qkv": "_blocks",
}
"""The rows of the table of ``cufuse check``, and where selfcheck has their pairs of results."""


def table(out: str) -> dict[str, tuple[int, int]]:
    """Area -> (outputs compared, differing)."""
    title, *lines = out.splitlines()
    assert title.split() == ["operation", "outputs", "compared", "differing"]
    rows = (line.split()[:3] for line in lines)
    return {area: (int(outputs.replace(",", "")), int(differing.replace(",", ""))) for area, outputs, differing in rows}


def test_check_finds_every_bit_equal(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def launched_alone(function: Callable[..., Any], *arrays: Any, **options: Any) -> Iterator[tuple[Any, Any]]:
        function(*map(to_gpu, arrays), **{name: to_gpu(value) for name, value in options.items()})
        yield from ()

    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, "_both", launched_alone)
        rehearse([selfcheck.run])
    done = command("check")
    assert (done.code, done.err) == (0, "")
    rows = table(done.out)
    assert set(AREAS) <= set(rows)
    outputs, differing = rows.pop("together")
    assert outputs == sum(number for number, _ in rows.values())
    assert all(number > 100_000 for number, _ in rows.values())
    assert differing == sum(number for _, number in rows.values()) == 0
    assert done.out.rstrip().endswith(" s")
    COMPARED["cufuse check"] += outputs


@pytest.mark.parametrize("area", AREAS)
def test_check_notices_one_bit(command: Command, monkeypatch: pytest.MonkeyPatch, area: str) -> None:
    """Of each area's first results alone, the last bit of one output turned over."""
    outputs = 0
    for name, function in AREAS.items():
        pairs = getattr(selfcheck, function)

        def first(generator: np.random.Generator, pairs: Any = pairs, here: bool = name == area) -> Iterator[tuple[Any, Any]]:
            nonlocal outputs
            expected, given = next(pairs(generator))
            outputs += expected.size
            if here:
                given.reshape(-1).view(f"u{given.dtype.itemsize}")[given.size // 2] ^= 1
            yield expected, given

        monkeypatch.setattr(selfcheck, function, first)
    done = command("check")
    assert done.code == 2
    assert done.err == f"cufuse check: 1 of {outputs} outputs differ from the emulation; please report the GPU and this table\n"
    rows = table(done.out)
    assert {name: differing for name, (_, differing) in rows.items()} == {name: int(name in (area, "together")) for name in rows}


def test_info_names_the_gpu_and_its_library(command: Command) -> None:
    done = command("info")
    assert (done.code, done.err) == (0, "")
    lines = {line.split("  ")[0].strip(): line.split("  ", 1)[1].strip() for line in done.out.splitlines()}
    properties = gpu_support.cupy().cuda.runtime.getDeviceProperties(0)
    assert lines["GPU"].split("; ")[0] == (
        f"{properties['name'].decode()}, compute capability {properties['major']}.{properties['minor']}"
    )
    assert len(lines["GPU"].split("; ")) == gpu_support.cupy().cuda.runtime.getDeviceCount()
    assert lines["cufuse"] == cufuse.__version__
    assert lines["numpy"] == np.__version__
    assert gpu_support.cupy().__version__ in lines.values()
    assert lines["compiled kernels"].startswith(str(compiler.cache_folder()))


def own_architecture() -> str:
    return f"sm_{launch.capability(launch.current_device())}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers and 64 embeddings of a synthetic 0.6B."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    assert main(["synthesise", str(folder), "--layers", "2", "--embedding-rows", "64", "--attention-only"]) == 0
    return folder


@pytest.mark.parametrize("form", ["--separate", "--packed"])
def test_report_on_the_kernels(command: Command, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """It says that no bit differs, and has the figures of the report without a GPU."""

    def launched_alone(block: LayerBlock, given: dict[str, Any], recipe: cufuse.Recipe, expected: Any) -> Any:
        gpu_stages.stages(given, block.weights, block.heads, block.eps, recipe)
        return expected

    options = ("--tokens", "5", "--arch", own_architecture(), form)
    with monkeypatch.context() as patch:
        patch.setattr(LayerBlock, "_on_gpu", launched_alone)
        rehearse([lambda: command("report", checkpoint, *options, "--device", "gpu")])
    done = command("report", checkpoint, *options, "--device", "gpu", "--json", "gpu.json")
    assert (done.code, done.err) == (0, "")
    assert "Computed by the kernels on " in " ".join(done.out.split())
    assert command("report", checkpoint, *options, "--json", "cpu.json").code == 0
    gpu, cpu = (json.loads(Path(name).read_text()) for name in ("gpu.json", "cpu.json"))
    [note] = [note for note in gpu.pop("notes") if note not in cpu["notes"]]
    del cpu["notes"]
    name = launch.device_name(launch.current_device())
    first, _, rest = note.partition(": of ")
    outputs, _, verdict = rest.partition(" outputs ")
    assert first == f"Computed by the kernels on {name}"
    assert verdict == "0 differ from the emulation."
    # for every recipe at least the norm, q, k and v, heads normed and rotated
    number = int(outputs.replace(",", ""))
    assert number >= len(gpu["recipes"]) * 5 * (1024 + 3 * 24 * 128) > 0
    assert gpu == cpu
    COMPARED["cufuse report --device gpu"] += number


def test_report_on_the_kernels_of_all_layers_goes_to_standard_output(command: Command, checkpoint: Path) -> None:
    chosen = ("--recipes", "torch,late-rounding", "--tokens", "3", "--arch", own_architecture())
    done = command("report", checkpoint, "--layer", "all", *chosen, "--device", "gpu", "--json", "-")
    assert (done.code, done.err) == (0, "")
    layers = json.loads(done.out)["layers"]
    assert [one["layer"] for one in layers] == [0, 1]
    for one in layers:
        [note] = [note for note in one["notes"] if note.startswith("Computed by the kernels")]
        assert note.endswith(" outputs 0 differ from the emulation.")


def test_report_refuses_another_architecture(command: Command, checkpoint: Path) -> None:
    other = "sm_80" if own_architecture() != "sm_80" else "sm_90"
    done = command("report", checkpoint, "--device", "gpu", "--arch", other, "--json", "r.json")
    assert done.code == 2
    assert done.out == ""
    assert done.err.startswith(f"cufuse report: arch is {other}, but this GPU is {own_architecture()}; ")
    assert not Path("r.json").exists()


def value_of(code: int) -> float:
    """A bfloat16 by its definition: sign, eight bits of exponent, seven of fraction."""
    exponent, fraction = code >> 7 & 0xFF, code & 0x7F
    if exponent == 0xFF:
        magnitude = math.nan if fraction else math.inf
    else:
        magnitude = math.ldexp(fraction + (128 if exponent else 0), max(exponent, 1) - 127 - 7)
    return math.copysign(magnitude, -1 if code >> 15 else 1)


def test_casts_back_are_exact() -> None:
    """All 65,536 codes: the value that the definition gives, subnormals and the sign of zero too; NaN stays NaN."""
    codes = np.arange(65536).astype(np.uint16)
    wide = to_gpu(codes.view(bfloat16)).astype(np.float32)
    assert wide.dtype == np.float32
    found, expected = to_host(wide), (codes.astype(np.uint32) << 16).view(np.float32)
    for code in (0x0001, 0x8000, 0x3F80, 0x7F7F, 0xFF80):  # the shift is the definition
        assert expected[code] == np.float32(value_of(code))
    nan = np.isnan(expected)
    assert np.count_nonzero(nan) == 2 * 127
    np.testing.assert_array_equal(np.isnan(found), nan)
    wrong = (found.view(np.uint32) != expected.view(np.uint32)) & ~nan
    assert not wrong.any(), f"{np.count_nonzero(wrong)} of 65,536, first code {codes[wrong][0]:#06x}: {found[wrong][0]}"
    COMPARED["casts back"] += 65536
    back = np.where(nan, np.uint16(0x7FFF), codes).view(bfloat16)
    demand_same("casts back", cufuse.round_to_bf16(wide), back, "and rounded again")
