"""Byte-level texts, one word at a time: every distinct word goes to the tokenizer once.

Byte-level tokenizers cut a text into words by a pattern and encode each word by itself, so a word
has the same tokens wherever it stands. Here the words are cut by the tokenizer's own pattern, and
only those that were not seen before are encoded by the tokenizer. Where the pattern is known to
cut before every single space, what lies between two of them is remembered too. ASCII text alone is
cut, where such a pattern means the same to Python as to the tokenizer: other text, from one space
or control token to the next, goes to the tokenizer as if it were one word. One text in a hundred is
encoded both ways and compared.
"""

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, MutableSequence, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from hf_sft_plugin.encoding.word_patterns import cuts_before_spaces, word_patterns

# With fewer texts than this at a time, words hardly repeat.
_MIN_TEXTS = 64
_AUDIT_EVERY = 100
# What is remembered: of each kind so many texts, of so many characters.
_MAX_TEXTS = 2**18
_MAX_LENGTH = 64


class WordEncoding:
    """A text that was encoded word by word; see `TextEncoding`."""

    tells_characters = True

    def __init__(self, ids: MutableSequence[int], ends: Sequence[int]) -> None:
        self.ids = ids
        self.seams: dict[int, int] = {}
        self._ends = ends

    def token_at(self, char: int) -> int | None:
        """See `TextEncoding`."""
        token = bisect_right(self._ends, char)
        return token if token < len(self._ends) else None

    def characters(self, token: int) -> tuple[int, int]:
        """See `TextEncoding`."""
        return (self._ends[token - 1] if token else 0), self._ends[token]


class _Table(dict[str, Any]):
    """The tokens of texts, found when they are first asked for; None where they are not known.

    Args:
        find: Finds it.
    """

    def __init__(self, find: Callable[[str], bytes | None]) -> None:
        super().__init__()
        self._find = find

    def __missing__(self, text: str) -> Any:
        found = self._find(text)
        if len(text) <= _MAX_LENGTH and len(self) < _MAX_TEXTS:
            self[text] = found
        return found


class WordEncoder:
    """Encodes texts word by word, where a tokenizer is known to work that way.

    Args:
        backend: The tokenizer; its added tokens and pre-tokenizer must not change any more.

    Attributes:
        cuts_before_spaces: Whether a word is known to begin at every space that stands alone.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        self._model = backend.model
        added = backend.get_added_tokens_decoder()
        contents = sorted((token.content for token in added.values()), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, contents)) or '(?!)'})")
        self._cutters = word_patterns(backend)
        # Of each word the pairs of a token and how many characters further it reaches, as bytes,
        # because bytes are joined faster than lists; None where the tokenizer has to be asked.
        self._pairs = _Table(self._encode_word)
        for token_id, token in added.items():
            self._pairs[token.content] = _to_bytes([token_id], [len(token.content)])
        # There are fewer pieces between spaces than words, and it takes no pattern to find them.
        self._cut: Callable[[str], list[str]] = self._cut_by_steps
        self.cuts_before_spaces = False
        if self._cutters is not None and len(self._cutters) == 1:
            self._cut = self._cutters[0].findall
            self.cuts_before_spaces = cuts_before_spaces(self._cutters[0].pattern)
        self._pieces = _Table(self._encode_piece)
        # What stands between two added tokens; most of the short ones are the template's.
        self._segments = _Table(self._encode_segment)

    def __call__(self, texts: Sequence[str]) -> list[WordEncoding | None]:
        """Encodes many texts, control tokens included.

        Args:
            texts: The texts.

        Returns:
            One encoding per text; None where the tokenizer itself has to be asked.
        """
        if self._cutters is None or len(texts) < _MIN_TEXTS:
            return [None] * len(texts)
        encodings = [self._encode(text) for text in texts]
        self._audit(texts, encodings)
        return encodings

    def _encode(self, text: str) -> WordEncoding | None:
        parts: list[Any] = self._added.split(text)
        # Every second one is an added token.
        parts[::2] = map(self._segments.__getitem__, parts[::2])
        parts[1::2] = map(self._pairs.__getitem__, parts[1::2])
        try:
            joined = b"".join(parts)
        except TypeError:
            return None
        ids, advances = np.frombuffer(joined, dtype=np.int32).reshape(-1, 2).T
        ends = advances.cumsum()
        # Some of the text may be missing, where a pattern leaves it out.
        is_whole = len(ends) > 0 and ends[-1] == len(text)
        return WordEncoding(array("i", ids.tobytes()), ends.data) if is_whole else None

    def _encode_segment(self, segment: str) -> bytes | None:
        """What stands between two added tokens."""
        if not self.cuts_before_spaces:
            return self._encode_words(segment)
        first, *others = segment.split(" ")
        # Words may reach over several spaces, or over a line break and a space.
        if first != first.rstrip():
            return self._encode_words(segment)
        parts: list[Any] = [self._encode_words(first)]
        try:
            parts += map(self._pieces.__getitem__, others)
            return b"".join(parts)
        except LookupError:
            return self._encode_words(segment)
        except TypeError:
            return None

    def _encode_piece(self, piece: str) -> bytes | None:
        """A piece of text between two spaces, and the first of them."""
        if not piece or piece != piece.strip():
            raise LookupError(piece)
        return self._encode_words(" " + piece)

    def _encode_words(self, text: str) -> bytes | None:
        """A text that is cut into words; one that is not ASCII is taken for a word."""
        words: list[str] = self._cut(text) if text.isascii() else [text]
        try:
            return b"".join(map(self._pairs.__getitem__, words))
        except TypeError:
            return None

    def _cut_by_steps(self, text: str) -> list[str]:
        """The words of an ASCII text; some of it may be missing."""
        words = [text]
        for cutter in self._cutters or ():
            words = [*chain.from_iterable(map(cutter.findall, words))]
        return words

    def _encode_word(self, word: str) -> bytes | None:
        if not word.isascii():
            # It may be several words to the tokenizer, and have another normal form.
            (encoding,) = self._encode_batch([word])
            advances = _advances(word, encoding.tokens) if self._is_normal(word) else None
            return None if advances is None else _to_bytes(encoding.ids, advances)
        pieces = self._backend.pre_tokenizer.pre_tokenize_str(word)
        tokens = self._model.tokenize(pieces[0][0]) if len(pieces) == 1 else []
        # In the byte-level alphabet every byte is one character.
        pairs = [number for token in tokens for number in (token.id, len(token.value))]
        return array("i", pairs).tobytes() if sum(pairs[1::2]) == len(word) else None

    def _is_normal(self, text: str) -> bool:
        normalizer = self._backend.normalizer
        return normalizer is None or bool(normalizer.normalize_str(text) == text)

    def _encode_batch(self, texts: list[str]) -> Any:
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def _audit(self, texts: Sequence[str], encodings: Sequence[WordEncoding | None]) -> None:
        pairs = zip(texts, encodings, strict=True)
        made = [(text, encoding.ids) for text, encoding in pairs if encoding is not None]
        chosen = made[::_AUDIT_EVERY]
        whole = self._encode_batch([text for text, _ in chosen])
        for (text, ids), expected in zip(chosen, whole, strict=True):
            assert [*ids] == expected.ids, f"words make other tokens than {text[:200]!r}"


def _to_bytes(ids: list[int], advances: list[int]) -> bytes:
    """Pairs of a token and how many characters further it reaches."""
    return array("i", [*chain(*zip(ids, advances, strict=True))]).tobytes()


def _advances(word: str, tokens: list[str]) -> list[int] | None:
    """How many characters further each token of a word reaches; one that ends within one has it.

    Args:
        word: The word.
        tokens: Its tokens in the byte-level alphabet, in which every byte is one character.

    Returns:
        As many numbers as tokens; None where not every byte is one of a token.
    """
    lengths = [*map(len, tokens)]
    codes = np.frombuffer(word.encode("utf-32-le"), dtype="<u4")
    last_bytes = np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF))
    if sum(lengths) != last_bytes[-1]:
        return None
    ends = np.searchsorted(last_bytes, np.cumsum(lengths)) + 1
    advances: list[int] = np.diff(ends, prepend=0).tolist()
    return advances
