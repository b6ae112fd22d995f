"""Encoded texts know their characters, whichever way and after whatever calls they were made."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AddedToken, ByT5Tokenizer, PreTrainedTokenizerFast

from hf_sft_plugin.encoding.decoding import TokenDecoder
from hf_sft_plugin.encoding.texts import JoinedEncoding, PartEncoder, TextEncoder, encode_parts

TEXT = "a \U0001f30d<|im_end|>\n\u00e9"


def encoded(text: str, tokenizer: Any) -> Any:
    return TextEncoder(tokenizer)([text])[0]


def test_no_text_is_no_encoding(tokenizer: Any) -> None:
    assert TextEncoder(tokenizer)([]) == []


def test_each_token_knows_its_characters_and_each_character_its_first_token(tokenizer: Any) -> None:
    """The globe is four tokens of one character; the control token is one of ten."""
    encoding = encoded(TEXT, tokenizer)
    assert len(encoding.ids) == 10
    assert [encoding.characters(token) for token in range(10)] == [
        (0, 1),
        (1, 2),
        *[(2, 3)] * 4,
        (3, 13),
        (13, 14),
        *[(14, 15)] * 2,
    ]
    joined = encode_parts([TEXT], tokenizer)
    assert [joined.token_at(char) for char in range(15)] == [0, 1, 2, *[6] * 10, 7, 8]


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(
        st.text(max_size=5)
        | st.sampled_from(["<|im_end|>", "hello world", "\U0001f468\u200d\U0001f469", "e\u0301"])
    ).map("".join)
)
def test_whole_and_joined_agree_on_the_same_text(
    text: str, tokenizer_factory: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_factory()
    whole, joined = encoded(text, tokenizer), encode_parts([text], tokenizer)
    assert whole.ids == joined.ids
    assert whole.tells_characters
    assert joined.tells_characters
    tokens = range(len(whole.ids))
    assert list(map(whole.characters, tokens)) == list(map(joined.characters, tokens))
    for char in range(len(text) + 1):
        token = joined.token_at(char)
        covering = [t for t in tokens if joined.characters(t)[0] <= char < joined.characters(t)[1]]
        assert token == (covering[0] if covering else None)
        assert whole.token_at(char) == token


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.text(alphabet="ab <\U0001f30d\u00e9", max_size=6), min_size=1, max_size=5))
def test_seams_stand_where_parts_begin_and_end(
    parts: list[str], tokenizer_factory: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_factory()
    joined = encode_parts(parts, tokenizer)
    assert joined.seams[0] == 0
    assert joined.seams[len("".join(parts))] == len(joined.ids)
    begin, ids = 0, []
    for part in parts:
        alone = encoded(part, tokenizer).ids
        ids += alone
        assert joined.seams[begin + len(part)] == len(ids)
        for token in range(len(ids) - len(alone), len(ids)):
            start, end = joined.characters(token)
            assert begin <= start <= end <= begin + len(part)
        begin += len(part)
    assert joined.ids == ids
    assert TokenDecoder(tokenizer)([joined.ids]) == ["".join(parts)]


def test_an_empty_part_shares_its_seam_with_its_neighbour(tokenizer: Any) -> None:
    joined = encode_parts(["", "ab", ""], tokenizer)
    assert joined.seams == {0: 0, 2: 2}
    assert joined.token_at(0) == 0
    assert joined.token_at(2) is None


def test_a_character_that_no_token_covers_has_none() -> None:
    joined = JoinedEncoding([([5, 6], [(1, 2), (3, 4)])], [5])
    assert [joined.token_at(char) for char in range(5)] == [None, 0, None, 1, None]


def test_a_tokenizer_without_characters_says_so_and_still_knows_the_seams() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    joined = encode_parts(["a\U0001f30d", "\u00e9"], tokenizer)
    assert joined.ids == [byte + 3 for byte in "a\U0001f30d\u00e9".encode()]
    assert joined.seams == {0: 0, 2: 5, 3: 7}
    assert not joined.tells_characters
    assert [joined.characters(token) for token in range(7)] == [(0, 2)] * 5 + [(2, 3)] * 2
    assert [joined.token_at(char) for char in range(4)] == [0, 0, 5, None]
    whole = encoded("a\U0001f30d\u00e9", tokenizer)
    assert (whole.ids, whole.seams) == (joined.ids, {0: 0, 3: 7})
    assert TokenDecoder(tokenizer)([joined.ids]) == ["a\U0001f30d\u00e9"]


@pytest.mark.parametrize(
    "settings_of_the_call",
    [
        {"padding": True},
        {"padding": "max_length", "max_length": 50},
        {"truncation": True, "max_length": 2},
        {"padding": True, "truncation": True, "max_length": 3},
        {"split_special_tokens": True},
        {"return_tensors": "np", "padding": True},
    ],
    ids=str,
)
def test_what_the_tokenizer_was_called_for_before_does_not_matter(
    settings_of_the_call: dict[str, Any], tokenizer_factory: Callable[..., Any]
) -> None:
    fresh, used = tokenizer_factory(), tokenizer_factory()
    used(["a", "hello world <|im_end|>"], **settings_of_the_call)
    ids = encoded(TEXT, fresh).ids
    assert encoded(TEXT, used).ids == ids
    used(["a", "hello world <|im_end|>"], **settings_of_the_call)
    assert [each.ids for each in TextEncoder(used)(["a", TEXT])] == [[67], ids]
    used(["a", "hello world <|im_end|>"], **settings_of_the_call)
    assert encode_parts(["a", TEXT], used).ids == [67, *ids]


def test_special_tokens_of_the_tokenizers_own_are_not_added(
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory(bos_token="<|endoftext|>", add_bos_token=True)
    assert encoded("a", tokenizer).ids == encode_parts(["a"], tokenizer).ids == [67]
    assert encoded("<|endoftext|>a", tokenizer).ids == [0, 67]


# Ways to cut a text into words; most of them look at what follows white space.
WORDS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "digits": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
                    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "none": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    "first": pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
    "always": pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
}


def tokenizer_of(words: str, **added: Any) -> Any:
    alphabet = sorted({*pre_tokenizers.ByteLevel.alphabet(), "\u2581", " ", "\n"})
    space, line = ("\u2581", "\n") if words in ("first", "always") else ("\u0120", "\u010a")
    merges = [(line, line), (space, space), (space, "a"), ("a", "b"), (line, space)]
    texts = [*alphabet, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({text: n for n, text in enumerate(texts)}, merges))
    backend.pre_tokenizer = WORDS[words]
    backend.decoder = decoders.ByteLevel()
    backend.normalizer = normalizers.NFC() if words == "llama3" else None
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    tokenizer.add_tokens([AddedToken("<|x y|>", **added)], special_tokens=True)
    return tokenizer


@settings(max_examples=500, deadline=None)
@given(
    words=st.sampled_from([*WORDS]),
    pieces=st.lists(
        st.sampled_from(
            ["</s>", "<|x y|>", "ab", "a", "b", " ", "  ", "\n", "\n\n", "1", "'s", "."]
        ),
        min_size=1,
        max_size=12,
    ),
    place=st.integers(0, 40),
    added=st.sampled_from([{}, {"lstrip": True}, {"rstrip": True}, {"single_word": True}]),
)
def test_the_start_of_a_text_is_known_to_have_other_tokens_alone(
    words: str, pieces: list[str], place: int, added: dict[str, bool]
) -> None:
    tokenizer = tokenizer_of(words, **added)
    text = "".join(pieces)
    encoding = encoded(text, tokenizer)
    end = min(place, len(text) - 1)
    token = encoding.token_at(end)
    if token is None or encoding.characters(token)[0] != end:
        return
    is_same = PartEncoder(tokenizer).is_same_alone(text, encoding, end)
    assert is_same == (encoded(text[:end], tokenizer).ids == [*encoding.ids[:token]])


@pytest.mark.parametrize("words", ["gpt2", "digits", "llama3", "none"])
def test_two_line_breaks_are_one_token_where_nothing_follows(words: str) -> None:
    tokenizer = tokenizer_of(words)
    encode = PartEncoder(tokenizer)
    assert tokenizer.tokenize("b\n\n") == ["b", "\u010a\u010a"]
    text = "b\n\nab"
    is_same = encode.is_same_alone(text, encoded(text, tokenizer), 3)
    assert is_same is (words in ("llama3", "none"))
    assert encode(["b\n\n", "ab"]).ids == tokenizer.convert_tokens_to_ids(
        ["b", "\u010a\u010a", "ab"]
    )
