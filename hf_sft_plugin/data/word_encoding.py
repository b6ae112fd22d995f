"""Byte-level texts, one word at a time: every distinct word goes to the tokenizer once.

Byte-level tokenizers cut a text into words by a pattern and encode each word by itself, so a word
has the same tokens wherever it stands. Here the words are cut by the tokenizer's own pattern, and
only those that were not seen before are encoded by the tokenizer. This is done for ASCII text
alone, where such a pattern means the same to Python as to the tokenizer: what stands between two
control tokens and is not ASCII goes to the tokenizer as if it were one word. One text in a hundred
is encoded both ways and compared.
"""

import json
import re
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

# With fewer texts than this at a time, words hardly repeat.
_MIN_TEXTS = 64
_AUDIT_EVERY = 100
_MAX_WORDS = 2**18
_MAX_WORD_LENGTH = 64
# Normal forms that leave ASCII as it is.
_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")
# The pattern of the ByteLevel pre-tokenizer, which is GPT-2's.
_BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same where each digit is cut off first: then space before a digit is space at an end.
_DIGITS_BYTE_LEVEL = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
)
# What Unicode classes hold of ASCII; a character beyond it stands for nothing.
_NOTHING = "\u0100"
_ASCII_CLASSES = {
    "L": "A-Za-z",
    "Lu": "A-Z",
    "Ll": "a-z",
    "N": "0-9",
    "Nd": "0-9",
    "P": r"!-#%-*,-/:;?@\[-\]_{}",
    "S": "$+<=>^`|~",
    **dict.fromkeys(("Lt", "Lm", "Lo", "M", "Mn"), _NOTHING),
}
_PATTERN_PARTS = re.compile(r"\\p\{(\w+)\}|\\.|.", re.DOTALL)
# What means the same to Python's patterns as to the tokenizer's.
_KNOWN_ESCAPES = re.compile(r"\\[rntfvsSdDwW\W]")
_OTHER_MEANINGS = re.compile(r"\{[\d,]+}\+|&&|\|\||--|~~|\(\?[^:!=i]|\(\?i[^:]")


class WordEncoding:
    """A text that was encoded word by word; see `TextEncoding`."""

    tells_characters = True

    def __init__(self, ids: list[int], ends: list[int]) -> None:
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


class WordEncoder:
    """Encodes texts word by word, where a tokenizer is known to work that way.

    Args:
        backend: The tokenizer; its added tokens and pre-tokenizer must not change any more.
    """

    def __init__(self, backend: Tokenizer) -> None:
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        contents = sorted((token.content for token in added.values()), key=len, reverse=True)
        self._added = re.compile(f"({'|'.join(map(re.escape, contents)) or '(?!)'})")
        self._cutters = _cutters(backend)
        # Of each word the pairs of a token and how many characters further it reaches, as bytes,
        # because bytes are joined faster than lists.
        self._pairs = {
            token.content: _to_bytes([token_id], [len(token.content)])
            for token_id, token in added.items()
        }

    def __call__(self, texts: Sequence[str]) -> list[WordEncoding | None]:
        """Encodes many texts, control tokens included.

        Args:
            texts: The texts.

        Returns:
            One encoding per text; None where the tokenizer itself has to be asked.
        """
        if self._cutters is None or len(texts) < _MIN_TEXTS:
            return [None] * len(texts)
        cut = [self._cut(text) for text in texts]
        long = self._learn(set(chain.from_iterable(cut)).difference(self._pairs))
        encodings = [self._join(*pair) for pair in zip(texts, cut, strict=True)]
        for word in long:
            del self._pairs[word]
        self._audit(texts, encodings)
        return encodings

    def _cut(self, text: str) -> list[str]:
        """The words of a text, and the added tokens between them; some of it may be missing."""
        assert self._cutters is not None
        first, *others = self._cutters
        words: list[str] = []
        for number, piece in enumerate(self._added.split(text)):
            # Every second piece is an added token.
            if number % 2 or not piece.isascii():
                words.append(piece)
                continue
            pieces = first.findall(piece)
            for cutter in others:
                pieces = [*chain.from_iterable(map(cutter.findall, pieces))]
            words += pieces
        return words

    def _join(self, text: str, words: list[str]) -> WordEncoding | None:
        try:
            joined = b"".join(map(self._pairs.__getitem__, words))
        except KeyError:
            return None
        ids, advances = np.frombuffer(joined, dtype=np.uint32).reshape(-1, 2).T
        ends = advances.cumsum()
        is_whole = len(ends) > 0 and ends[-1] == len(text)
        return WordEncoding(ids.tolist(), ends.tolist()) if is_whole else None

    def _learn(self, words: Iterable[str]) -> list[str]:
        """Has the tokenizer encode words that were not seen before; says which not to keep."""
        new = [*words]
        for word, encoding in zip(new, self._encode(new), strict=True):
            # An ASCII word is one word to the tokenizer too; others may have another normal form.
            is_known = _is_one_word(encoding) if word.isascii() else self._is_normal(word)
            advances = _advances(word, encoding.tokens) if is_known else None
            if advances is not None:
                self._pairs[word] = _to_bytes(encoding.ids, advances)
        is_full = len(self._pairs) > _MAX_WORDS
        known = (word for word in new if word in self._pairs)
        return [word for word in known if is_full or len(word) > _MAX_WORD_LENGTH]

    def _is_normal(self, text: str) -> bool:
        normalizer = self._backend.normalizer
        return normalizer is None or bool(normalizer.normalize_str(text) == text)

    def _encode(self, texts: list[str]) -> Any:
        return self._backend.encode_batch(texts, add_special_tokens=False)

    def _audit(self, texts: Sequence[str], encodings: Sequence[WordEncoding | None]) -> None:
        pairs = zip(texts, encodings, strict=True)
        made = [(text, encoding.ids) for text, encoding in pairs if encoding is not None]
        chosen = made[::_AUDIT_EVERY]
        whole = self._encode([text for text, _ in chosen])
        for (text, ids), expected in zip(chosen, whole, strict=True):
            assert ids == expected.ids, f"words make other tokens than {text[:200]!r}"


def _to_bytes(ids: list[int], advances: list[int]) -> bytes:
    """Pairs of a token and how many characters further it reaches."""
    return array("I", chain.from_iterable(zip(ids, advances, strict=True))).tobytes()


def _is_one_word(encoding: Encoding) -> bool:
    """Whether the tokenizer did not cut a text before it encoded it."""
    return len(encoding) > 0 and encoding.token_to_word(len(encoding) - 1) == 0


def _advances(word: str, tokens: list[str]) -> list[int] | None:
    """How many characters further each token of a word reaches; one that ends within one has it.

    Args:
        word: The word.
        tokens: Its tokens in the byte-level alphabet, in which every byte is one character.

    Returns:
        As many numbers as tokens; None where not every byte is one of a token.
    """
    lengths = [*map(len, tokens)]
    if word.isascii():
        return lengths if sum(lengths) == len(word) else None
    codes = np.frombuffer(word.encode("utf-32-le"), dtype="<u4")
    last_bytes = np.cumsum(1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF))
    if sum(lengths) != last_bytes[-1]:
        return None
    ends = np.searchsorted(last_bytes, np.cumsum(lengths)) + 1
    advances: list[int] = np.diff(ends, prepend=0).tolist()
    return advances


def _cutters(backend: Tokenizer) -> list[re.Pattern[str]] | None:
    """The patterns that cut ASCII text into words, one after the other; None where unknown."""
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return None
    # Those matched before normalization win over the others, wherever they stand.
    if len({token.normalized for token in added}) > 1:
        return None
    normalizer, first = _state(backend.normalizer), _state(backend.pre_tokenizer)
    normal_forms = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if any(form["type"] not in _NORMAL_FORMS for form in normal_forms):
        return None
    # A dropout of merges gives one word other tokens each time.
    if getattr(backend.model, "dropout", None):
        return None
    steps = first.get("pretokenizers", [first])
    if steps[-1].get("type") != "ByteLevel":
        return None
    try:
        patterns = [pattern for step in steps for pattern in _patterns(step)]
        if patterns == ["[0-9]|[^0-9]+", _to_ascii(_BYTE_LEVEL)]:
            patterns = [_to_ascii(_DIGITS_BYTE_LEVEL)]
        return [re.compile(pattern, re.ASCII) for pattern in patterns]
    except (LookupError, ValueError, re.error):
        return None


def _state(part: Any) -> dict[str, Any]:
    """A part of a tokenizer as its file describes it."""
    state: dict[str, Any] = {} if part is None else json.loads(part.__getstate__())
    return state


def _patterns(step: dict[str, Any]) -> list[str]:
    """What the pieces match that one step of a pre-tokenizer makes of ASCII text.

    Raises:
        ValueError: If the step does something else.
        LookupError: If it names something unknown.
    """
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return [_to_ascii(_BYTE_LEVEL)] if step["use_regex"] else []
    if step["type"] == "Digits":
        return ["[0-9]|[^0-9]+" if step["individual_digits"] else "[0-9]+|[^0-9]+"]
    if step["type"] == "Split":
        pattern = _to_ascii(step["pattern"]["Regex"])
        if (step["behavior"], step["invert"]) == ("Isolated", False):
            # What lies between two matches is a piece as well.
            return [rf"(?:{pattern})|(?:(?!{pattern})[\s\S])+"]
        if (step["behavior"], step["invert"]) == ("Removed", True):
            return [pattern]
    raise ValueError(step["type"])


def _to_ascii(pattern: str) -> str:
    """A tokenizer's pattern as Python writes it, for ASCII text.

    Raises:
        ValueError: If a part of it could mean something else to Python.
        LookupError: If it names an unknown class of characters.
    """
    if _OTHER_MEANINGS.search(pattern):
        raise ValueError(pattern)
    parts = []
    is_class = False
    for part in _PATTERN_PARTS.finditer(pattern):
        text = part.group()
        if part.group(1):
            members = _ASCII_CLASSES[part.group(1)]
            text = members if is_class else f"[{members}]"
        elif text[0] == "\\" and not _KNOWN_ESCAPES.fullmatch(text):
            raise ValueError(pattern)
        elif text in ("[", "]"):
            if is_class == (text == "["):
                raise ValueError(pattern)
            is_class = not is_class
        elif text in "^$" and not is_class:
            raise ValueError(pattern)
        parts.append(text)
    return "".join(parts)
