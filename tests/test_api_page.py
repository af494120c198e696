"""notebooks/api.md is current, complete, and everything on it says what it is."""

import cufuse
from tests import api_page


def test_the_page_is_current() -> None:
    assert api_page.PAGE.read_text(encoding="utf-8") == api_page.page(), "stale: run python -m tests.api_page"


def test_every_public_name_has_a_docstring() -> None:
    silent = [f"{module}.{name}" for module, entries in api_page.listing().items() for name, text in entries if not text]
    assert not silent


def test_nothing_is_missing() -> None:
    found = api_page.listing()
    assert {name for name, _ in found["cufuse"]} == set(cufuse.__all__)
    assert "assert_bits_equal" in dict(found["cufuse.testing"])
    assert found["cufuse.report"][-1][0] == "analyse"
    everywhere = [name for entries in found.values() for name, _ in entries]
    assert everywhere.count("round_to_bf16") == 1  # named where users import it, not again where it is defined


def test_only_the_first_sentence_is_taken() -> None:
    assert api_page._sentence("A sum of a, b. c ends.\nAnd 2.5 more. Not this.\n\nNor this.") == "A sum of a, b. c ends."
