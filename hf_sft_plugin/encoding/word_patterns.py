"""The patterns by which byte-level tokenizers cut text into words, as Python writes them."""

import json
import re
from typing import Any

from tokenizers import Tokenizer

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

# Ways to match a word that match no space after anything else than white space, and that only
# after white space look at what follows.
_KNOWN_ALTERNATIVES = (
    "'s|'t|'re|'ve|'m|'ll|'d",
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)",
    r" ?\p{L}+",
    r" ?\p{N}+",
    r"\p{N}",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+(?![^\s\p{N}])",
    r"\s+",
)


def word_patterns(backend: Tokenizer) -> list[re.Pattern[str]] | None:
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


def cuts_before_spaces(pattern: str) -> bool:
    r"""Whether a word always begins at a space that stands alone, whatever is around it.

    Then the words of a text are those of its parts, if it is parted before such spaces.

    Args:
        pattern: Cuts ASCII text into words; see `word_patterns`.

    Examples:
        >>> cuts_before_spaces(r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+")
        True
        >>> cuts_before_spaces(r"[A-Z][a-z ]+|\s+")
        False
    """
    known = "|".join(re.escape(_to_ascii(each)) for each in _KNOWN_ALTERNATIVES)
    if not re.fullmatch(rf"(?:(?:{known})\|)+\\s\+", pattern):
        return False
    # Every character is matched, so there are no words that merely lie between two others.
    return all(re.fullmatch(pattern, chr(code), re.ASCII) for code in range(128))


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
            if cuts_before_spaces(pattern):
                return [pattern]
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
