"""Run the README's Python examples as printed; each states its results in comments of the form ``# -> ...``."""

import contextlib
import io
import re
import sys
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def main() -> int:
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks, "the README has no Python examples"
    checked = 0
    for number, block in enumerate(blocks, 1):
        if "needs a GPU" in block.splitlines()[0]:
            print(f"example {number}: needs a GPU, compiled only")
            compile(block, f"README example {number}", "exec")
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block, f"README example {number}", "exec"), {})
        expected = [line.split("# -> ", 1)[1].strip() for line in block.splitlines() if "# -> " in line]
        found = [line.strip() for line in printed.getvalue().splitlines()]
        if found != expected:
            print(f"example {number} printed {found}, the README says {expected}")
            return 1
        checked += len(expected)
    print(f"{len(blocks)} examples, {checked} printed results as stated")
    return 0


if __name__ == "__main__":
    sys.exit(main())
