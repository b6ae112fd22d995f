"""Words encoded one by one make the tokens, and know the characters, of the whole text."""

import json
import random
from array import array
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from hf_sft_plugin.encoding.words import WordEncoder

BYTE_LEVEL = {"add_prefix_space": False}
# The patterns of well-known tokenizers.
PATTERNS = {
    "llama3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
PIECES = [
    *(
        "Hello",
        " the",
        "the",
        "THE",
        "I'll",
        "it'S",
        "x'",
        "snake_case",
        "<<48/2=24>>",
        "1234",
        "0",
    ),
    *(
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        " \n",
        "\t",
        "\r\n",
        "\x0b",
        "\x1c",
        "\x00",
        "!",
        "...",
        " ?",
    ),
    *("caf\u00e9", "\u201cso\u201d", "\u4f60\u597d", "\U0001f600", "e\u0301", "\u00a0", "\u2028"),
    *("<|im_end|>", "<|im_start|>", "<|im_", "<tool>", "$5.50", "a\tb", "-->", "[x]", "\\n"),
]


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


def steps_of(name: str) -> list[Any]:
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    full = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return {
        "gpt2": [full],
        "digits": [pre_tokenizers.Digits(individual_digits=True), full],
        "grouped digits": [pre_tokenizers.Digits(individual_digits=False), full],
        "deepseek": [
            split(r"\p{N}{1,3}"),
            split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"),
            split(
                r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?"
                r"[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            plain,
        ],
        "removed": [split(PATTERNS["llama3"], "removed", invert=True), plain],
        **{key: [split(pattern), plain] for key, pattern in PATTERNS.items()},
    }[name]


def random_text(rng: random.Random, pieces: list[str] = PIECES) -> str:
    return "".join(rng.choice(pieces) for _ in range(rng.randint(1, 30)))


def make(steps: list[Any], normalizer: Any = None, **model: Any) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**model))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    rng = random.Random(0)
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((random_text(rng, PIECES[:-9]) for _ in range(300)), trainer)
    return tokenizer


NAMES = ["gpt2", "digits", "grouped digits", "deepseek", "removed", *PATTERNS]


@pytest.mark.parametrize("name", NAMES)
def test_words_make_the_tokens_and_characters_of_the_whole_text(name: str) -> None:
    tokenizer = make(steps_of(name), normalizers.NFC())
    encoder, rng = WordEncoder(tokenizer), random.Random(1)
    for _ in range(5):
        texts = [random_text(rng) for _ in range(200)]
        num_made = 0
        for text, made in zip(texts, encoder(texts), strict=True):
            whole = tokenizer.encode(text, add_special_tokens=False)
            if made is None:
                continue
            num_made += 1
            assert [*made.ids] == whole.ids
            first_of = {char: whole.char_to_token(char) for char in range(len(text))}
            assert {char: made.token_at(char) for char in first_of} == first_of
            for token in {*first_of.values()}:
                assert made.characters(token) == whole.token_to_chars(token)
            assert made.token_at(len(text)) is None
        # Decomposed characters change their length in NFC; those texts go to the tokenizer.
        assert num_made > 120


def test_what_has_another_normal_form_is_left_to_the_tokenizer() -> None:
    # NFC takes a byte away, which four bytes at the end would hide.
    text = "e\u0301 and then: \U0001f600"
    tokenizer = make(steps_of("qwen"), normalizers.NFC())
    assert WordEncoder(tokenizer)(["plain"] * 63 + [text])[-1] is None
    assert WordEncoder(make(steps_of("qwen")))(["plain"] * 63 + [text])[-1] is not None


TOKENIZER = make(steps_of("qwen"))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=40), min_size=64, max_size=80))
def test_any_text_has_the_tokens_of_the_tokenizer(texts: list[str]) -> None:
    texts = [text.encode("utf-8", "replace").decode() for text in texts]
    for text, made in zip(texts, WordEncoder(TOKENIZER)(texts), strict=True):
        assert made is None or [*made.ids] == TOKENIZER.encode(text, add_special_tokens=False).ids


def test_each_word_goes_to_the_tokenizer_once(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = WordEncoder(make(steps_of("gpt2")))
    whole: list[str] = []
    words: list[str] = []
    encode, encode_word = encoder._encode_batch, encoder._pairs._find
    monkeypatch.setattr(encoder, "_encode_batch", lambda t: whole.extend(t) or encode(t))
    monkeypatch.setattr(encoder._pairs, "_find", lambda w: words.append(w) or encode_word(w))
    texts = [f"the same words again, and again<|im_end|>{number % 3}" for number in range(200)]
    assert None not in encoder(texts)
    assert sorted(words) == sorted(["the", " same", " words", " again", ",", " and", *"012"])
    # One text in a hundred is asked for as a whole, to compare.
    assert whole == [texts[0], texts[100]]
    encoder(texts)
    assert len(words) == 9


def test_long_words_are_not_kept() -> None:
    encoder = WordEncoder(make(steps_of("gpt2")))
    texts = ["x" * 65, "caf\u00e9  " * 20, *["y" * 64] * 70]
    assert None not in encoder(texts)
    assert "y" * 64 in encoder._pairs
    for table in (encoder._pairs, encoder._pieces, encoder._segments):
        assert not {*texts[:2]} & {*table}


def test_a_tokenizer_that_disagrees_is_noticed() -> None:
    encoder = WordEncoder(make(steps_of("gpt2")))
    texts = ["one two three"] * 64
    encoder(texts)
    ids = encoder._backend.encode(" three").ids
    encoder._pieces["two"] = array("I", [ids[0], 4, *chain(*((i, 0) for i in ids[1:]))]).tobytes()
    encoder._segments.clear()
    with pytest.raises(AssertionError, match="words make other tokens than 'one two three'"):
        encoder(texts)


def test_few_texts_go_to_the_tokenizer() -> None:
    assert WordEncoder(make(steps_of("gpt2")))(["few"] * 63) == [None] * 63


def other_kinds() -> dict[str, Tokenizer]:
    swallowing, mixed, dropping = (make(steps_of("gpt2")) for _ in range(3))
    swallowing.add_special_tokens([AddedToken("<end>", rstrip=True)])
    mixed.add_tokens([AddedToken("<tool>", normalized=True)])
    dropping.model.dropout = 0.1
    metaspace = make(steps_of("gpt2"))
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    prefixed = make(steps_of("gpt2"))
    prefixed.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return {
        "control tokens that swallow space": swallowing,
        "added tokens of two kinds": mixed,
        "dropout": dropping,
        "metaspace": metaspace,
        "a space before the text": prefixed,
        "no pre-tokenizer": Tokenizer(models.BPE()),
        "lower case": make(steps_of("gpt2"), normalizers.Lowercase()),
        "another split": make([split(r"\s", "merged_with_next"), *steps_of("gpt2")]),
        "an unknown class": make([split(r"\p{Han}+"), *steps_of("gpt2")]),
        "an unknown escape": make([split(r"\h+|\H+"), *steps_of("gpt2")]),
        "an anchor": make([split(r"^a|[^a]+"), *steps_of("gpt2")]),
        "a repeated repetition": make([split(r"(?:a{1,2})+|b{2}+|."), *steps_of("gpt2")]),
    }


@pytest.mark.parametrize("kind", other_kinds())
def test_other_tokenizers_are_asked_themselves(kind: str) -> None:
    tokenizer = other_kinds()[kind]
    assert WordEncoder(tokenizer)(["some text"] * 100) == [None] * 100


def test_the_pattern_for_digits_cuts_as_the_two_steps_do() -> None:
    tokenizer = make(steps_of("digits"))
    state = json.loads(tokenizer.pre_tokenizer.__getstate__())
    assert [step["type"] for step in state["pretokenizers"]] == ["Digits", "ByteLevel"]
    rng = random.Random(2)
    texts = [random_text(rng, [" ", "  ", "\n", "1", "23", "a", "!", "'s"]) for _ in range(2000)]
    for text, made in zip(texts, WordEncoder(tokenizer)(texts), strict=True):
        assert made is not None
        assert [*made.ids] == tokenizer.encode(text, add_special_tokens=False).ids
