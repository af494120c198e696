"""A notebook's code cells run one after the other in this process, without Jupyter: what each prints.

On a machine with a GPU, from the repository's root: ``python3 -m tests.notebook_cells notebooks/06_test_your_own_kernel.ipynb``.
"""

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

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


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print("".join(printed(Path(name))), end="")
