"""One message of a raw row becomes a `Turn`, whatever dialect it is written in."""

import json
from collections.abc import Mapping
from typing import Any

from hf_sft_plugin.rows.values import RowSource, read_flag, read_weight, without_nulls
from hf_sft_plugin.types import Turn

ROLES_HELP = "a list like [{'role': 'user', 'content': '...'}, {'role': 'assistant', ...}]"

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bard", "model", "function_call"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
}
# Types of content parts that a text model cannot see.
_MEDIA = (
    *("image", "image_url", "input_image"),
    *("audio", "audio_url", "input_audio"),
    *("video", "video_url", "input_video"),
)
# Where datasets and templates keep the reasoning that goes with a content.
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# Keys of a message that are about training, not for the chat template.
_TRAINING_KEYS = ("train", "weight")


def read_messages(part: str, source: RowSource, weight: float) -> list[Turn]:
    """Reads a column of messages; each turn says whether its role and its flags train it.

    Args:
        part: The part of the row that holds the messages.
        source: The row.
        weight: How much the row counts.

    Raises:
        RowError: If a message is not one, or a value in it has the wrong type.
    """
    place = source.place(part)
    is_sharegpt = source.row_format.kind == "sharegpt"
    turns = []
    for position, message in enumerate(source.entries(part, ROLES_HELP)):
        here = f"{place}, message {position}"
        if is_sharegpt:
            message = _from_sharegpt(message, source, here)
        if type(message) is dict and len(message) == 2 and _is_clean(message):
            # The usual case: a role and a content need no further checks.
            train = message["role"] in source.options.train_roles
            turns.append(Turn(message, train, weight))
        else:
            turns.append(_read_turn(message, source, weight, here))
    return turns


def reasoning_of(message: Mapping[str, Any]) -> list[str]:
    """The reasoning of a message that stands beside its content, by every name it may have.

    Examples:
        >>> reasoning_of({"role": "assistant", "content": "so", "thinking": "why"})
        ['why']
    """
    texts = [message.get(key) for key in _REASONING_KEYS]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def calls_of(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tool calls of a message; its `function_call`, as they were once written, if it has none.

    Examples:
        >>> calls_of({"role": "assistant", "function_call": {"name": "add", "arguments": "{}"}})
        [{'name': 'add', 'arguments': '{}'}]
    """
    old = message.get("function_call")
    olds = [old] if isinstance(old, Mapping) and old.get("name") else []
    return list(message.get("tool_calls") or olds)


def _is_clean(message: dict[Any, Any]) -> bool:
    """Whether a message of two keys is a role and a content, both text that cannot be broken."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        return False
    return role.isascii() and content.isascii()


def _read_turn(message: Any, source: RowSource, weight: float, place: str) -> Turn:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        is_sharegpt = isinstance(message, Mapping) and "from" in message
        hint = " Rows of 'from' and 'value' are data_format 'sharegpt'." if is_sharegpt else ""
        raise source.error(
            f"{place} is {message!r:.80}, but a dict with 'role' and 'content' is needed. "
            f"Convert or remove the row.{hint}",
            "a message without a role",
        )
    flag = read_flag(message.get("train"), source, place)
    train = role in source.options.train_roles if flag is None else flag
    share = read_weight(message.get("weight"), weight, source, place)
    _check_tool_calls(message, source, place)
    has_calls = bool(calls_of(message))
    dropped = [key for key in _TRAINING_KEYS if key in message]
    if "tool_calls" in message and not message["tool_calls"]:
        # An empty list says that there are none; templates test for presence.
        dropped.append("tool_calls")
    if dropped:
        message = {key: item for key, item in message.items() if key not in dropped}
    content = message.get("content")
    weighted: tuple[tuple[int, int, float], ...] = ()
    if isinstance(content, list):
        texts, weights = _read_parts(content, train, share, source, place)
        message = {**message, "content": "".join(texts)}
        weighted = _weighted_ranges(texts, weights, share)
        if flag is not False:
            # Without a trained part the text is not trained, but calls and reasoning still are.
            has_more = has_calls or bool(reasoning_of(message)) or not texts
            is_any_trained = any(weight is not None for weight in weights)
            train = is_any_trained or (train and has_more)
    elif not isinstance(content, str) and (content is not None or not has_calls):
        raise source.error(
            f"{place} has content of type {type(content).__name__}, but text is needed. Convert "
            "or remove the row.",
            "message content is not text",
        )
    cleaned = without_nulls(message, source, place)
    return Turn(cleaned, train, share, weighted if train else ())


def _check_tool_calls(message: Mapping[str, Any], source: RowSource, place: str) -> None:
    calls = message.get("tool_calls")
    if calls is None:
        return
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise source.error(
            f"{place} has tool_calls {calls!r:.60}, but a list of dicts is needed. Convert or "
            "remove the row.",
            "tool_calls is not a list of dicts",
        )


def _read_parts(
    parts: list[Any], train: bool, share: float, source: RowSource, place: str
) -> tuple[list[str], list[float | None]]:
    """The texts of a content that comes in parts, and how much each counts; None: not trained."""
    texts: list[str] = []
    weights: list[float | None] = []
    for position, part in enumerate(parts):
        here = f"{place}, part {position}"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _MEDIA:
            raise source.error(
                f"{here} is of type {kind!r}, but this package trains on text alone: the model "
                "would learn to answer about something that it does not see. Use a trainer for "
                "multimodal models, or remove the row.",
                f"a content part is {kind}",
            )
        if kind != "text" or not isinstance(part.get("text"), str):
            raise source.error(
                f"{here} is {part!r:.80}, but only text is supported: a dict with 'type': 'text' "
                "and 'text'. Remove the row, or its other parts.",
                "a content part is not text",
            )
        flag = read_flag(part.get("train"), source, here)
        weight = read_weight(part.get("weight"), share, source, here)
        is_trained = (train if flag is None else flag) and part.get("weight") != 0
        texts.append(part["text"])
        weights.append(weight if is_trained else None)
    return texts, weights


def _weighted_ranges(
    texts: list[str], weights: list[float | None], share: float
) -> tuple[tuple[int, int, float], ...]:
    """The characters `[start, end)` of the joined texts that do not count like the message."""
    ranges: list[tuple[int, int, float]] = []
    start = 0
    for text, given in zip(texts, weights, strict=True):
        end, weight = start + len(text), given or 0.0
        if text and weight != share:
            is_joined = bool(ranges) and ranges[-1][1:] == (start, weight)
            ranges.append((ranges.pop()[0] if is_joined else start, end, weight))
        start = end
    return tuple(ranges)


def _from_sharegpt(message: Any, source: RowSource, place: str) -> Any:
    """A message of 'from' and 'value' as one of 'role' and 'content'; others stay as they are."""
    if not isinstance(message, Mapping) or message.get("from") is None:
        return message
    sender, value = message["from"], message.get("value")
    if not isinstance(sender, str) or sender not in _SHAREGPT_ROLES:
        raise source.error(
            f"{place} is from {sender!r:.40}, but the known senders are "
            f"{', '.join(_SHAREGPT_ROLES)}. Rename the sender or remove the row.",
            "unknown sender of a message",
        )
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    role = _SHAREGPT_ROLES[sender]
    if sender == "function_call":
        return {**rest, "role": role, "tool_calls": _parse_calls(value, source, place)}
    return {**rest, "role": role, "content": value}


def _parse_calls(value: Any, source: RowSource, place: str) -> list[dict[str, Any]]:
    """The tool calls of a 'function_call' message, in the form chat templates expect."""
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        calls = None
    calls = [calls] if isinstance(calls, Mapping) else calls
    are_calls = isinstance(calls, list) and all(
        isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls
    )
    if not calls or not are_calls:
        raise source.error(
            f"{place} is a function_call with the value {value!r:.60}, but JSON like "
            '{"name": "...", "arguments": {...}} is needed. Repair or remove the row.',
            "a function_call is not JSON with a name",
        )
    return [
        {
            "type": "function",
            "function": {"name": call["name"], "arguments": call.get("arguments", {})},
        }
        for call in calls
    ]
