"""The committed notebooks: run from top to bottom, without errors, small, and without traces of the machine they ran on.

Continuous integration runs them; this looks at what is stored.
"""

import base64
import json
import re
import struct
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
    assert len(NOTEBOOKS) >= 7
    assert all(path.stat().st_size < 400_000 for path in NOTEBOOKS)
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


def test_nearly_all_have_pictures() -> None:
    drawn = [path.stem for path in NOTEBOOKS if '"image/png"' in path.read_text(encoding="utf-8")]
    assert len(drawn) >= 6  # 05 draws measurements, where they have been recorded


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_pictures_are_as_wide_as_a_page_and_described(path: Path) -> None:
    outputs = [output for cell in _code_cells(path) for output in cell["outputs"] if "image/png" in output.get("data", {})]
    for output in outputs:
        width = struct.unpack(">I", base64.b64decode(output["data"]["image/png"])[16:20])[0]
        assert width <= 1000 or (width <= 1800 and path.stem.startswith("03_")), (
            width
        )  # 03's is drawn twice as fine, for the README
        assert _texts(output).startswith("Picture: ")


def test_the_readmes_picture_is_the_notebooks() -> None:
    cells = _code_cells(FOLDER / "03_why_the_k_norm_amplifies.ipynb")
    (picture,) = [output["data"]["image/png"] for output in cells[-1]["outputs"]]
    assert base64.b64decode(picture) == (FOLDER / "story.png").read_bytes()


def test_what_the_committed_notebooks_say_of_the_studys_numbers() -> None:
    """The text of 02 and what its cells printed agree."""
    cells = json.loads((FOLDER / "02_rounding_points.ipynb").read_text(encoding="utf-8"))["cells"]
    said = " ".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    printed = "\n".join(_texts(output) for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"])
    (line,) = re.findall(r"largest with 96\.5, layer by layer: float32 (.*)  rounded (.*)", printed)
    in_float32, rounded = (sorted(map(float, numbers.split())) for numbers in line)
    assert f"**{rounded[0]:g} to {rounded[-1]:g}**" in said
    assert f"({in_float32[0]:.1f} to {in_float32[-1]:.1f} in float32)" in said
    assert "0.0697 needs 209 steps" in printed
    assert "fewer than 209 steps apart" in said
    assert re.findall(r"^[qkv]: (\d+) of", printed, re.MULTILINE) == ["0", "0", "0"]
