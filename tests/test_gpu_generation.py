"""End to end on a GPU: a Qwen3 in transformers whose attention's front is cufuse's gives the same logits and the same text."""

from typing import Any

import pytest

from tests import gpu_support, qwen3_model
from tests.gpu_support import COMPARED, rehearse
from tests.qwen3_model import Generated, cufuse_front, differing_logits, first_difference, generate, prompts, replaced, summary

pytestmark = gpu_support.MARKS

TOKENS = 256
PROMPT = 37


@pytest.fixture(scope="module")
def model() -> Any:
    gpu_support.qwen3()
    return qwen3_model.build()


@pytest.fixture(scope="module", params=[1, 8])
def expected(model: Any, request: pytest.FixtureRequest) -> tuple[Any, Generated]:
    """A prompt for each row of the batch, and what transformers' own modules make of it."""
    prompt = prompts(request.param, PROMPT)
    return prompt, generate(model, prompt, TOKENS)


def generated_by(model: Any, recipe: str, prompt: Any, **options: Any) -> Generated:
    with replaced(model, cufuse_front(model, recipe, **options)):
        rehearse([lambda: generate(model, prompt, 2)])
        return generate(model, prompt, TOKENS)


def said(capsys: pytest.CaptureFixture[str], line: str) -> None:
    with capsys.disabled():
        print(f"\n{line}", end="")


@pytest.mark.parametrize("static", [False, True], ids=["", "static weights"])
def test_every_logit_and_every_token(
    model: Any, expected: tuple[Any, Generated], static: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Prefill and decode with a cache."""
    prompt, own = expected
    found = generated_by(model, "torch", prompt, static_weights=static)
    said(capsys, summary("torch", own, found))
    for step, (one, other) in enumerate(zip(found.logits, own.logits, strict=True)):
        differ = one.view(gpu_support.torch().int16) != other.view(gpu_support.torch().int16)
        assert not bool(differ.any()), f"step {step}: {int(differ.sum())} of {one.numel()} logits differ"
        COMPARED["end to end, logits"] += one.numel()
    assert first_difference(own.tokens, found.tokens) == [None] * len(prompt)
    assert int((own.tokens == found.tokens).sum()) == TOKENS * len(prompt)
    COMPARED["end to end, tokens"] += own.tokens.numel()


def test_late_rounding_leaves_the_road(model: Any, expected: tuple[Any, Generated], capsys: pytest.CaptureFixture[str]) -> None:
    """The rounding study's gibberish: the same weights, one rounding at the end, another text in every row."""
    prompt, own = expected
    found = generated_by(model, "late-rounding", prompt)
    said(capsys, summary("late-rounding", own, found))
    places = first_difference(own.tokens, found.tokens)
    assert None not in places, f"rows that stay on the road: {[row for row, place in enumerate(places) if place is None]}"
    assert differing_logits(own, found)[0] > 0


def test_the_text_is_worth_comparing(expected: tuple[Any, Generated]) -> None:
    """A model that says the same token again and again would prove nothing."""
    for row in expected[1].tokens.cpu().numpy():
        assert len(set(row.tolist())) > TOKENS // 8, f"only {sorted(set(row.tolist()))}"


def test_the_model_is_itself_again_afterwards(model: Any, expected: tuple[Any, Generated]) -> None:
    prompt, own = expected
    again = generate(model, prompt, 8)
    assert int((again.tokens != own.tokens[:, :8]).sum()) == 0
