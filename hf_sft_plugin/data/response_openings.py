"""Where a finished response parts from the generation prompt, where the two are not alike."""

import re
from collections.abc import Collection

# What a template may write between the point where a finished response parts from the generation
# prompt and its content: an empty thought, but no role.
TAGS = re.compile(r"(\s|<[^<>]*>)*")
_OPEN_TAG = re.compile(r"(<[^<>]*)?\Z")


def common_length(first: str, second: str) -> int:
    """Characters at the start that two texts share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def after_opening(text: str, base: int, opening: str, stops: Collection[str]) -> int | None:
    """How far a text and what opens a response agree, but for what closes the turn before.

    Args:
        text: The rendered text.
        base: Where the turns before the response end when they are all there is.
        opening: What the generation prompt writes behind them.
        stops: The tokens at which inference stops, as text.

    Returns:
        None where they have nothing in common but space.
    """
    closing = re.match(f"(?:\\s|{'|'.join(map(re.escape, stops)) or '(?!)'})*", text[base:])
    assert closing is not None
    header, opening = base + closing.end(), opening.lstrip()
    # Two tags that begin alike part where they begin.
    start = before_open_tag(text[: header + common_length(text[header:], opening)])
    return start if start > header else None


def before_open_tag(text: str) -> int:
    """The length of a text without a tag at its end that is not closed."""
    opening = _OPEN_TAG.search(text)
    assert opening is not None
    return opening.start()
