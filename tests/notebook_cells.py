"""A notebook's code cells run one after the other in this process, without Jupyter: what each prints.

On a machine with a GPU, from the repository's root: ``python3 -m tests.notebook_cells notebooks/06_test_your_own_kernel.ipynb``.
"""

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import cufuse
from cufuse import launch

if TYPE_CHECKING:
    import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"


def printed(path: Path, *, pictures: bool | None = None) -> list[str]:
    """What every code cell prints, in order; an exception of a cell is raised.

    pictures : whether cells that draw are run; by default where matplotlib is installed.
    """
    draws = importlib.util.find_spec("matplotlib") is not None if pictures is None else pictures
    names: dict[str, object] = {"__name__": "__main__"}
    found = []
    for place, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] != "code" or ("plot.figure(" in text and not draws):
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(text, f"{path.name}, cell {place}", "exec"), names)  # the repository's own text
        found.append(out.getvalue())
    return found


def demand_same_without_gpu(path: Path, monkeypatch: "pytest.MonkeyPatch") -> None:
    """Notebook 06 prints through CuPy what it then prints where there is no GPU, the mistake that it looks for included."""
    first, *on_device = printed(path, pictures=False)
    assert first == "arrays of cupy\n"

    def none() -> int:
        raise cufuse.NoGpuError("no GPU for the second run")

    monkeypatch.setattr(launch, "device_count", none)
    first, *on_host = printed(path, pictures=False)
    assert first == "arrays of numpy\n"
    assert on_device == on_host
    assert any("found with x" in text for text in on_device)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print("".join(printed(Path(name))), end="")
