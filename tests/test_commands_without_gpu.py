"""``cufuse info``, ``check`` and ``report --device gpu`` on a machine without a GPU, and what ``check`` counts as a difference."""

import numpy as np
import pytest

import cufuse
from cufuse import compiler, selfcheck
from cufuse.__main__ import main
from tests.conftest import why_no_gpu


@pytest.fixture
def no_gpu() -> None:
    if why_no_gpu() is None:
        pytest.skip("this machine has a GPU")


def test_info(capsys: pytest.CaptureFixture[str], no_gpu: None) -> None:
    assert main(["info"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["cufuse"] == cufuse.__version__
    assert lines["numpy"] == np.__version__
    assert lines["GPU"].startswith("none: ")
    assert lines["compiled"].startswith("kernels") and str(compiler.cache_folder()) in lines["compiled"]


@pytest.mark.parametrize("command", [["check"], ["report", "--device", "gpu", "--tokens", "1"]])
def test_a_gpu_is_needed(capsys: pytest.CaptureFixture[str], no_gpu: None, command: list[str]) -> None:
    assert main(command) == 2
    done = capsys.readouterr()
    assert done.out == ""
    assert done.err.count("\n") == 1
    assert done.err.startswith(f"cufuse {command[0]}: CuPy ")


def test_every_bit_counts_but_those_of_a_float32_nan() -> None:
    codes = np.array([0x0000, 0x3F80, 0x7FFF], np.uint16)
    other = np.array([0x8000, 0x3F80, 0x7FC0], np.uint16)
    assert selfcheck._differing(codes.view(cufuse.bfloat16), codes.view(cufuse.bfloat16)) == 0
    assert selfcheck._differing(codes.view(cufuse.bfloat16), other.view(cufuse.bfloat16)) == 2
    wide, same = (np.array(one, np.uint32).view(np.float32) for one in ([0, 0x7FC00000, 1], [0x80000000, 0x7FFFFFFF, 1]))
    assert selfcheck._differing(wide, same) == 1
