"""Where a finished response parts from the generation prompt, where the two are not alike."""

import re
from collections.abc import Collection

# What a template may write between the point where a finished response parts from the generation
# prompt and its content: an empty thought, but no role.
TAGS = re.compile(r"(\s|<[^<>]*>)*")
_CLOSING_TAG = re.compile(r"\s*(</[^<>]*>)")
_OPEN_TAG = re.compile(r"(<[^<>]*)?\Z")


def common_length(first: str, second: str) -> int:
    """Characters at the start that two texts share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def after_opening(
    text: str, base: int, opening: str, stops: Collection[str]
) -> tuple[int, str] | None:
    """How far a text and what opens a response agree, but for what closes the turn before.

    Args:
        text: The rendered text.
        base: Where the turns before the response end when they are all there is.
        opening: What the generation prompt writes behind them.
        stops: The tokens that may close the turn before, as text.

    Returns:
        Where they part, and what is left of the opening; None where they have nothing in common
        but space.
    """
    closing = re.compile("|".join([r"\s+", *map(re.escape, sorted(stops, key=len, reverse=True))]))
    places, opening = [base], opening.lstrip()
    while found := closing.match(text, places[-1]):
        places.append(found.end())
    # A header may begin with a stop token. Two tags that begin alike part where they begin.
    shared, place = max(
        (before_open_tag(text[: place + common_length(text[place:], opening)]) - place, place)
        for place in places
    )
    return (place + shared, opening[shared:]) if shared > 0 else None


def may_leave_out(rest: str, text: str, start: int) -> bool:
    """Whether a text may go on without the rest of an opening: it is an empty thought, or none.

    Args:
        rest: What of the opening is not written.
        text: The rendered text.
        start: Where it parts from the opening.
    """
    closing = _CLOSING_TAG.match(rest)
    tags = TAGS.match(text, start)
    assert tags is not None
    # A thought that the opening closes must not go on in the text.
    is_closed = closing is None or closing[1] in tags.group()
    return is_closed and TAGS.fullmatch(rest) is not None


def before_open_tag(text: str) -> int:
    """The length of a text without a tag at its end that is not closed."""
    opening = _OPEN_TAG.search(text)
    assert opening is not None
    return opening.start()
