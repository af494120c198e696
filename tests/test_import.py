"""Importing cufuse, and its work on NumPy arrays, need neither CuPy nor a GPU; each check in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

USE = """
import sys
import ml_dtypes, numpy
import cufuse, cufuse.report, cufuse.report_text, cufuse.report_plot, cufuse.explanation, cufuse.checkpoint, cufuse.synthetic
import cufuse.__main__
import cufuse.launch
x = numpy.ones((2, 64), cufuse.bfloat16)
cos, sin = cufuse.rope_tables(numpy.arange(2), 16)
y, _ = cufuse.add_rms_norm(x, x, x[0])
cufuse.linear(cufuse.rms_norm(x, x[0]), x, k_slices=1)
cufuse.rms_norm_qkv(x, x[0], numpy.ones((64, 64), cufuse.bfloat16), x[0, :16], x[0, :16], cos=cos, sin=sin, heads=2, k_slices=1)
cufuse.round_to_bf16(numpy.ones(3))
try:
    cufuse.rms_norm([1.0], [1.0])
except TypeError as error:
    assert "NumPy or CuPy" in str(error)
"""


def run(program: str, *path: Path) -> subprocess.CompletedProcess[str]:
    """A Python process with these folders first on its path."""
    python_path = os.pathsep.join(map(str, (*path, ROOT)))
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": python_path},
        check=False,
    )


def demand_success(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_nothing_imports_cupy() -> None:
    loaded = "print([name for name in sys.modules if name.split('.')[0] in ('cupy', 'cupy_backends', 'cuda', 'torch')])"
    demand_success(done := run(USE + loaded))
    assert done.stdout.strip() == "[]"


def test_a_broken_cupy_first_on_the_path_is_never_asked(tmp_path: Path) -> None:
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text("print('cupy imported')\nraise RuntimeError('a broken CuPy')\n")
    demand_success(done := run(USE, tmp_path))
    assert done.stdout == ""


def test_without_cupy_cuda_numba_and_matplotlib() -> None:
    """As where the extras are not installed: the finder knows none of them."""
    absent = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("cupy", "cupy_backends", "cuda", "numba", "matplotlib", "torch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""
    check = """
from cufuse.report_plot import check_target
try:
    check_target("x.png")
except ImportError as error:
    assert "cufuse[plot]" in str(error)
else:
    raise AssertionError
"""
    demand_success(run(absent + USE + check))


def test_the_public_names() -> None:
    import cufuse

    settled = "Recipe bfloat16 oracle recipes round_to_bf16 rms_norm add_rms_norm linear rope rope_tables rms_norm_qkv"
    assert set(settled.split()) <= set(cufuse.__all__)
    for name in cufuse.__all__:
        documented = getattr(cufuse, name)
        if callable(documented) and name != "bfloat16":
            assert documented.__doc__, name
    assert cufuse.__version__
