"""The marks of tests/gpu_timeline.py still fit the kernels: their texts, and the arguments that are packed for them."""

import struct
import types
from typing import Any

import numpy as np
import pytest

from cufuse import (
    _driver,
    _gpu_heads,
    _gpu_norm,
    _gpu_norm_linear,
    _gpu_norm_quantised,
    _linear_quantised,
    _linear_quantised_wgmma,
    compiler,
    launch,
)
from cufuse.compiler import Kernel
from tests import gpu_timeline
from tests.gpu_timeline import marked, marked_kernels


def _one_of_each() -> list[Kernel]:
    """Of each marked kernel one, and one that finishes heads where there are such."""
    found: dict[tuple[str, bool], Kernel] = {}
    for kernel in launch.kernels():
        if kernel.entry in gpu_timeline._PLACES:
            found.setdefault((kernel.entry, bool(dict(kernel.defines).get("CLUSTER"))), kernel)
    return list(found.values())


def test_marked_kernels_compile(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path))
    kernels = _one_of_each()
    assert len(kernels) == 8
    plain = {kernel.name: compiler.compile_ptx(kernel, "sm_90a") for kernel in kernels}
    with marked_kernels():
        for kernel in kernels:
            text = compiler.compile_ptx(kernel, "sm_90a")
            assert "globaltimer" in text and "globaltimer" not in plain[kernel.name]
            assert compiler.compile_kernel(kernel, "sm_90a").spills == 0


def test_a_mark_without_its_place() -> None:
    with pytest.raises(ValueError, match=r"heads: 0 times 'a.eps\).write"):
        marked("heads", "struct Arguments {\n};\n    let_next_kernel_begin();\n    wait_for_previous_kernel();\n    if (!works)\n")


@pytest.mark.parametrize("kernel", _one_of_each(), ids=lambda kernel: kernel.name[:40])
def test_the_place_of_the_times_is_the_last_argument(kernel: Kernel, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel says itself where its structure has the member; what is packed has to end there."""
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path))
    packed = {
        "heads": _gpu_heads._ARGUMENTS.size,
        "quantised_row_sm90": _gpu_norm_quantised._ARGUMENTS.size,
        "quantised_linear_sm90": _linear_quantised._STREAMED.size + _driver._MAP_BYTES,
        "quantised_wgmma_sm90": _linear_quantised_wgmma._ARGUMENTS.size + _driver._MAP_BYTES,
        "rms_norm": _gpu_norm._POINTERS.size + _gpu_norm._NUMBERS.size,
        "rms_norm_linear_sm90": _gpu_norm_linear._ARGUMENTS.size + 2 * _driver._MAP_BYTES,
    }[kernel.entry]
    heads = kernel.entry in ("quantised_row_sm90", "rms_norm_linear_sm90") and dict(kernel.defines)["CLUSTER"] > 0
    with marked_kernels() as folder:
        path = folder / f"{kernel.entry}.cu"
        text = path.read_text(encoding="utf-8")
        at = packed + (120 if heads else 0)
        checks = f"__builtin_offsetof(Arguments, times) == {at} && sizeof(Arguments) <= {-(-(at + 8) // 64) * 64}"
        path.write_text(f'{text}\nstatic_assert({checks}, "place");\n', encoding="utf-8")
        compiler.compile_ptx(kernel, "sm_90a")


@pytest.mark.parametrize("wrong", [["--tokens", "1,256"], ["--tokens", "one"], ["--model", "9b"], ["--form", "Q9_0"]])
def test_wrong_options(wrong: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gpu_timeline", *wrong])
    with pytest.raises(SystemExit):
        gpu_timeline.main()
    assert f"error: {wrong[0]} {wrong[1]}: " in capsys.readouterr().err


@pytest.mark.parametrize("launched", [(), ("heads",), ("rms_norm",), ("rms_norm", "heads")])
def test_products_without_marks(launched: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit, match="64 rows of these weights go to kernels without marks"):
        gpu_timeline.require_products(launched, 64)
    for product in gpu_timeline._PLACES.keys() - {"heads", "rms_norm"}:
        gpu_timeline.require_products((*launched, product), 64)


def test_rows_of_times() -> None:
    """Two CTAs, four blocks a microsecond apart; one CTA's mark is missing."""
    times = np.zeros((4, 2, gpu_timeline.SLOTS), np.int64)
    for block in range(4):
        times[block, :, 0] = 10**12 + 1000 * block - np.array([400, 200])
        times[block, :, 1] = 10**12 + 1000 * block + np.array([0, 32])
        times[block, 0, 2] = 10**12 + 1000 * block + 500
    rows = gpu_timeline.rows_of({"rms_norm_linear_sm90": times})
    assert [(name, np.round(spread, 3).tolist()) for _, name, spread in rows] == [
        ("starts", [-0.4, -0.3, -0.2]),
        ("kernels in front ended", [0.0, 0.016, 0.032]),
        ("rows ready", [0.5, 0.5, 0.5]),
        ("starts", [0.6, 0.7, 0.8]),
        ("kernels in front ended", [1.0, 1.016, 1.032]),
    ]


def test_arguments_get_the_place() -> None:
    class Times:
        ptr = 4096
        data = property(lambda self: self)

        def __getitem__(self, call: int) -> "Times":
            return self

    marks = gpu_timeline.Marks.__new__(gpu_timeline.Marks)
    marks.call, marks.grids, marks.times = 0, {}, {entry: Times() for entry in gpu_timeline._PLACES}
    word = struct.pack("P", 4096)
    for kernel in _one_of_each():
        prepared = types.SimpleNamespace(kernel=kernel, _shape=((3, 2, 1), 32, 0, 1, True))
        padded = kernel.entry == "rms_norm_linear_sm90" and dict(kernel.defines)["CLUSTER"] > 0
        found = marks.add(prepared, b"12345678abcdefgh")
        assert found == ((b"12345678" if padded else b"12345678abcdefgh") + word).ljust(64, b"\0")
        assert marks.grids[kernel.entry] == 6
        prepared._shape = ((4097, 1, 1), 32, 0, 1, True)
        with pytest.raises(ValueError, match="4097 CTAs, and there is room for the marks of 4096"):
            marks.add(prepared, b"")
