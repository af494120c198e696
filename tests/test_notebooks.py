"""The committed notebooks: run from top to bottom, without errors, small, and without traces of the machine they ran on.

Continuous integration runs them; this looks at what is stored.
"""

import json
import re
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 1_000_000
_PATHS = re.compile(r"(?<![\w.:/])/(?:home|Users|root|opt|tmp|work|mnt|usr)/\w")


def _code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def _texts(output: dict[str, Any]) -> str:
    plain = output.get("data", {}).get("text/plain", "")
    return "".join(output.get("text", "")) + "".join(plain)


def test_there_are_notebooks_and_they_are_small() -> None:
    assert len(NOTEBOOKS) >= 6
    assert sum(path.stat().st_size for path in NOTEBOOKS) < MOST_BYTES
    assert (FOLDER / "story.png").stat().st_size < 100_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_was_run_from_top_to_bottom_without_errors(path: Path) -> None:
    cells = _code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert outputs
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert not [found for output in outputs for found in _PATHS.findall(_texts(output))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"\]\(([\w.]+\.ipynb)\)", text):
        assert (FOLDER / name).exists(), name
