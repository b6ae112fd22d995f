"""Patterns are read as Python means them, and where text may be parted before it is cut."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from hf_sft_plugin.encoding.word_patterns import cuts_before_spaces, word_patterns

_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END,
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END,
}
FULL = pre_tokenizers.ByteLevel(add_prefix_space=False)
PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
STEPS = {
    "gpt2": [FULL],
    "digits": [pre_tokenizers.Digits(individual_digits=True), FULL],
    **{
        name: [pre_tokenizers.Split(Regex(pattern), "isolated"), PLAIN]
        for name, pattern in SPLITS.items()
    },
}


def patterns_of(steps: list[Any]) -> list[re.Pattern[str]]:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    patterns = word_patterns(backend)
    assert patterns is not None
    return patterns


# Any characters without white space at the ends, within which there may be some.
PIECE = st.text(
    st.sampled_from([*"abSTrRe'01!./_-<", " ", "\n", "\r", "\t", "\x0b", "\u00e9", "\u0301"]),
    min_size=1,
    max_size=8,
).filter(lambda text: text == text.strip())


@pytest.mark.parametrize("name", STEPS)
@settings(deadline=None, max_examples=150)
@given(pieces=st.lists(PIECE, min_size=2, max_size=4))
def test_text_is_cut_before_single_spaces_whatever_is_around_them(
    name: str, pieces: list[str]
) -> None:
    (pattern,) = patterns_of(STEPS[name])
    assert cuts_before_spaces(pattern.pattern)
    parts = [pieces[0], *(f" {piece}" for piece in pieces[1:])]
    # By the tokenizer itself, whose characters need not be ASCII.
    cut = pre_tokenizers.Sequence(STEPS[name]).pre_tokenize_str
    words = [word for part in parts for word, _ in cut(part)]
    assert [word for word, _ in cut("".join(parts))] == words
    if all(part.isascii() for part in parts):
        found = [word for part in parts for word in pattern.findall(part)]
        assert pattern.findall("".join(parts)) == found
        assert len(found) == len(words)


@pytest.mark.parametrize(
    "pattern",
    [
        # A word of two, words that look ahead, and characters that are left out.
        r"[A-Za-z]+(?: [A-Za-z]+)?| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+",
        r"[A-Za-z]+(?=\s)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+",
        r" ?[A-Za-z]+| ?[0-9]+|\s+",
        r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)",
    ],
)
def test_other_patterns_are_not_trusted_to_cut_before_spaces(pattern: str) -> None:
    assert not cuts_before_spaces(pattern)


def test_several_steps_are_several_patterns() -> None:
    digits = pre_tokenizers.Digits(individual_digits=False)
    assert [p.pattern[:6] for p in patterns_of([digits, FULL])] == ["[0-9]+", "'s|'t|"]
