"""The witness of a mask: marks around contents that tell where a template puts them."""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

# Private characters that no text means; one before and one after each content.
_SENTINEL, _LAST_SENTINEL = 0xF0000, 0xFFFFF
_PRIVATE = re.compile("[\U000f0000-\U000fffff]")
_REASONING_END = "</think>"

# Characters `[start, end)`.
Range = tuple[int, int]


def core_of(message: dict[str, Any]) -> Range:
    """Where the content stands in itself, without the space around it and without reasoning.

    Templates strip the one and may cut off the other.

    Examples:
        >>> core_of({"role": "assistant", "content": "<think>so</think> yes "})
        (18, 21)
    """
    content = message.get("content")
    if not isinstance(content, str):
        return (0, 0)
    thought = content.rfind(_REASONING_END) if message["role"] == "assistant" else -1
    start = thought + len(_REASONING_END) if thought >= 0 else 0
    start = len(content) - len(content[start:].lstrip())
    return (start, max(start, len(content.rstrip())))


def mark(
    messages: Sequence[dict[str, Any]], cores: Sequence[Range], base: int
) -> list[dict[str, Any]]:
    """The messages with each content between two sentinels; space stays outside.

    Args:
        messages: As the chat template takes them.
        cores: The content of each; see `core_of`.
        base: The first sentinel; see `free_base`.
    """
    marked = []
    for turn, (message, (start, end)) in enumerate(zip(messages, cores, strict=True)):
        if start < end:
            content = message["content"]
            opening, closing = chr(base + 2 * turn), chr(base + 2 * turn + 1)
            content = content[:start] + opening + content[start:end] + closing + content[end:]
            message = {**message, "content": content}
        marked.append(message)
    return marked


def free_base(text: str, count: int) -> int | None:
    """The first of so many private characters in a row that a text does not hold; None if none."""
    used = sorted({_SENTINEL - 1, *map(ord, _PRIVATE.findall(text)), _LAST_SENTINEL + 1})
    return next((a + 1 for a, b in pairwise(used) if b - a > count), None)


def unmark(marked: str, num_messages: int, base: int) -> tuple[str, tuple[Range | None, ...]]:
    """Takes the sentinels out of a rendered text.

    Args:
        marked: The rendered text.
        num_messages: How many messages were marked.
        base: As `mark` had it.

    Returns:
        The text without sentinels, and where each content stands in it; None for a content whose
        sentinels are not there exactly once.
    """
    sentinels = re.compile(f"[{chr(base)}-{chr(base + 2 * num_messages - 1)}]")
    places: dict[int, list[int]] = {}
    for number, match in enumerate(sentinels.finditer(marked)):
        places.setdefault(ord(match.group()) - base, []).append(match.start() - number)
    ranges: list[Range | None] = []
    for turn in range(num_messages):
        edges = places.get(2 * turn, []) + places.get(2 * turn + 1, [])
        is_found = len(edges) == 2 and edges[0] <= edges[1]
        ranges.append((edges[0], edges[1]) if is_found else None)
    return sentinels.sub("", marked), tuple(ranges)
