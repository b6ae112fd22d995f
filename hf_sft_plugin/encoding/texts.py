"""Texts to tokens that know their characters, and back."""

from bisect import bisect_right
from collections.abc import Callable, MutableSequence, Sequence
from typing import Protocol

from tokenizers import Encoding
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.encoding.words import WordEncoder

# How many beginnings of texts are remembered.
_MAX_BEGINNINGS = 4096


class TextEncoding(Protocol):
    """A text as tokens that know their characters.

    Attributes:
        ids: The token ids.
        seams: Characters at which the text was cut before it was encoded, and the token that
            begins there: known for certain, whatever else is.
        tells_characters: Whether the characters of each single token are known.
    """

    ids: MutableSequence[int]
    seams: dict[int, int]
    tells_characters: bool

    def token_at(self, char: int) -> int | None:
        """The first token that covers a character; None where none does."""

    def characters(self, token: int) -> tuple[int, int]:
        """The characters `[start, end)` of a token."""


class WholeEncoding:
    """A text that was encoded in one piece.

    Args:
        encoding: What the tokenizer made of it.
    """

    def __init__(self, encoding: Encoding) -> None:
        self.ids: MutableSequence[int] = encoding.ids
        self.seams: dict[int, int] = {}
        self.tells_characters = True
        self._encoding = encoding

    def token_at(self, char: int) -> int | None:
        """See `TextEncoding`."""
        token: int | None = self._encoding.char_to_token(char)
        return token

    def characters(self, token: int) -> tuple[int, int]:
        """See `TextEncoding`."""
        characters: tuple[int, int] | None = self._encoding.token_to_chars(token)
        # Only special tokens that a tokenizer adds itself have none, and it adds none here.
        assert characters is not None
        return characters


class JoinedEncoding:
    """Parts of a text that were encoded apart.

    Args:
        parts: Token ids of each part, and the characters of each token within it. A tokenizer that
            cannot tell characters gives every token the whole part.
        lengths: Characters of each part.
        tells_characters: See `TextEncoding`.
    """

    def __init__(
        self,
        parts: Sequence[tuple[list[int], list[tuple[int, int]]]],
        lengths: Sequence[int],
        tells_characters: bool = True,
    ) -> None:
        self.ids: MutableSequence[int] = []
        self.seams: dict[int, int] = {0: 0}
        self.tells_characters = tells_characters
        self._places: list[tuple[int, int]] = []
        begin = 0
        for (input_ids, places), length in zip(parts, lengths, strict=True):
            self.ids += input_ids
            self._places += [(begin + start, begin + end) for start, end in places]
            begin += length
            self.seams[begin] = len(self.ids)
        self._starts = [start for start, _ in self._places]

    def token_at(self, char: int) -> int | None:
        """See `TextEncoding`."""
        token = bisect_right(self._starts, char) - 1
        while token > 0 and self._places[token - 1][1] > char:
            token -= 1
        return token if token >= 0 and char < self._places[token][1] else None

    def characters(self, token: int) -> tuple[int, int]:
        """See `TextEncoding`."""
        return self._places[token]


class TextEncoder:
    """Encodes whole texts, control tokens included.

    Args:
        tokenizer: Encodes them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._encode_words = WordEncoder(tokenizer.backend_tokenizer) if tokenizer.is_fast else None

    @property
    def cuts_before_spaces(self) -> bool:
        """Whether a word is known to begin at a space that stands alone, whatever is around it."""
        return self._encode_words is not None and self._encode_words.cuts_before_spaces

    def __call__(self, texts: list[str]) -> list[TextEncoding]:
        """One encoding per text."""
        if self._encode_words is None:
            return [encode_parts([text], self._tokenizer) for text in texts]
        # The backend itself: transformers would copy every list and lose the characters.
        backend = self._tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = False
        by_words = self._encode_words(texts)
        others = [text for text, made in zip(texts, by_words, strict=True) if made is None]
        whole = iter(backend.encode_batch(others, add_special_tokens=False))
        return [made or WholeEncoding(next(whole)) for made in by_words]


def encode_parts(parts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> JoinedEncoding:
    """Encodes consecutive parts of a text, control tokens included."""
    encoded = tokenizer(
        list(parts),
        add_special_tokens=False,
        return_offsets_mapping=tokenizer.is_fast,
        return_attention_mask=False,
        verbose=False,
    )
    ids = encoded["input_ids"]
    # A tokenizer without offsets gives every token the whole part.
    places = (
        encoded["offset_mapping"]
        if tokenizer.is_fast
        else [[(0, len(part))] * len(tokens) for part, tokens in zip(parts, ids, strict=True)]
    )
    lengths = [len(part) for part in parts]
    return JoinedEncoding(list(zip(ids, places, strict=True)), lengths, tokenizer.is_fast)


class PartEncoder:
    """Encodes parts of a text apart, as inference encodes a prompt without the response.

    Args:
        tokenizer: Its added tokens are found in a text before all others.
        encode: Encodes consecutive parts of a text; None: the tokenizer does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encode: Callable[[Sequence[str]], JoinedEncoding] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._encode = encode
        self._encode_whole = TextEncoder(tokenizer)
        self._added = frozenset(tokenizer.added_tokens_decoder)
        self._known: dict[str, MutableSequence[int]] = {}

    def __call__(self, parts: Sequence[str]) -> JoinedEncoding:
        """One encoding of all parts."""
        return encode_parts(parts, self._tokenizer) if self._encode is None else self._encode(parts)

    def is_same_alone(self, text: str, encoding: TextEncoding, end: int) -> bool:
        """Whether the start of a text has the same tokens where nothing follows it.

        Args:
            text: The whole text.
            encoding: Its encoding.
            end: Where the start ends; a token begins there.
        """
        after = encoding.token_at(end)
        assert after is not None
        ids = encoding.ids[:after]
        # Added tokens part a text before anything else looks at it, so the last one will do for a
        # beginning. It and what follows are mostly the template's, and the same in many rows.
        first = self._last_word(text, encoding, end)
        first = next((t for t in range(after - 1, first, -1) if ids[t] in self._added), first)
        told = text[encoding.characters(first)[0] if first else 0 : end]
        if told not in self._known:
            if len(self._known) >= _MAX_BEGINNINGS:
                self._known.clear()
            self._known[told] = self._encode_alone(told)
        return [*ids[first:]] == [*self._known[told][first - after :]]

    def _last_word(self, text: str, encoding: TextEncoding, end: int) -> int:
        """The token of the last space at which a word begins whatever is around it; 0 if none."""
        if not self._encode_whole.cuts_before_spaces:
            return 0
        place = text.rfind(" ", 1, end - 1)
        while place > 0 and (text[place - 1].isspace() or text[place + 1].isspace()):
            place = text.rfind(" ", 1, place)
        return encoding.token_at(place) or 0 if place > 0 else 0

    def _encode_alone(self, text: str) -> MutableSequence[int]:
        if self._encode is not None:
            return self._encode([text]).ids
        return self._encode_whole([text])[0].ids
