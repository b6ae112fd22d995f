"""A response begins behind its header, however much of the generation prompt is written."""

import pytest

from hf_sft_plugin.data.response_openings import TAGS, after_opening

BEFORE = "<|user|>q"


@pytest.mark.parametrize(
    ("written", "opening", "expected"),
    [
        # The template writes all of it, or all but the thought that it opens.
        ("<|a|>so", "<|a|>", "<|a|>"),
        ("<|a|>so", "<|a|><think>", "<|a|>"),
        ("<|a|><table>", "<|a|><think>", "<|a|>"),
        # The turn before is closed otherwise where more follows.
        ("\n<|a|>so", "<|a|>", "\n<|a|>"),
        ("</s>\n<|a|>so", "<|a|>", "</s>\n<|a|>"),
        ("<|a|>so", "\n<|a|>", "<|a|>"),
        # Two tags that begin alike are two tags.
        ("<|b|>so", "<|a|>", None),
        ("so", "<|a|>", None),
        ("</s>so", "<|a|>", None),
    ],
)
def test_the_response_begins_where_text_and_generation_prompt_part(
    written: str, opening: str, expected: str | None
) -> None:
    start = after_opening(BEFORE + written, len(BEFORE), opening, ["</s>"])
    assert start == (None if expected is None else len(BEFORE + expected))


def test_an_empty_thought_may_stand_before_a_content_but_no_role() -> None:
    assert TAGS.fullmatch("\n<think>\n\n</think>\n\n")
    assert not TAGS.fullmatch("<|header|>assistant<|/header|>")
