"""Proof that a chat template wrote all of a response: its content, its reasoning and its calls.

A template ignores a key of a message that it does not know. Then the rest of the response would be
trained as if it were all of it.
"""

import html
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_sft_plugin.masks.content_markers import Range
from hf_sft_plugin.rows.messages import calls_of, reasoning_of
from hf_sft_plugin.types import RowError, Turn

_THINK_TAG = re.compile(r"</?think>")
_BACKSLASHES = re.compile(r"\\+")
_ESCAPED_CODES = re.compile(r"(?:\\u[0-9a-fA-F]{4})+")
_ESCAPED_IN_PYTHON = re.compile(r"\\(?:x([0-9a-f]{2})|U(00(?:0[0-9a-f]|10)[0-9a-f]{4}))")
_ESCAPED_SPACE = re.compile(r"\\[nrtbf]")


def check_written(
    turn: Turn,
    number: int,
    core: Range,
    content: Range | None,
    text: str,
    chars: Range,
    has_reasoning: bool,
    index: int,
) -> None:
    """Finds the content, the reasoning and the tool calls of a trained turn in what was rendered.

    Calls may be written in any notation: names, keys and values are compared by their letters and
    digits alone.

    Args:
        turn: A turn that is trained.
        number: Its position.
        core: Where its content stands in itself; see `core_of`.
        content: Where its content stands in the text; None where that is unknown.
        text: What the chat template wrote.
        chars: The part of the text that belongs to the turn.
        has_reasoning: Whether the template ought to have written the reasoning too.
        index: Row of the dataset, for error messages.

    Raises:
        RowError: If any of it is missing.
    """
    message = turn.message
    given = message.get("content")
    given = given if isinstance(given, str) else ""
    calls = calls_of(message)
    reasoning = reasoning_of(message)
    if core[0] > 0 and all(weight for begin, _, weight in turn.weighted if begin < core[0]):
        reasoning.append(_THINK_TAG.sub("", given[: core[0]]))
    start, end = chars
    if content is None:
        parts = [text[start:end]]
    else:
        # The content may speak of a call that is missing.
        parts = [text[start : content[0]], text[content[1] : end]]
        if not calls and all(thought.strip() in parts[0] for thought in reasoning):
            return
    written = "\n".join(map(_bare, parts))
    if content is None:
        told = given[slice(*core)]
        if _bare(told) not in written or (not _bare(told) and told not in parts[0]):
            raise _dropped("the content", "a content", "writes it", number, index)
        written = written.replace(_bare(told), "\n", 1)
    for thought in map(_bare, reasoning if has_reasoning else ()):
        if thought not in written:
            raise _dropped("the reasoning", "reasoning", "writes it", number, index)
    for thought in map(_bare, reasoning):
        written = written.replace(thought, "\n", 1) if thought else written
    _check_calls(calls, written, number, index)


def _check_calls(calls: Sequence[Mapping[str, Any]], written: str, number: int, index: int) -> None:
    """Finds the names and arguments of calls in the letters and digits that were written."""
    functions = [
        call["function"] if isinstance(call.get("function"), Mapping) else call for call in calls
    ]
    names = Counter(_bare(str(function.get("name") or "")) for function in functions)
    for function in functions:
        name = str(function.get("name") or "")
        arguments = function.get("arguments", function.get("parameters"))
        is_named = written.count(_bare(name)) >= names[_bare(name)] if _bare(name) else True
        if not is_named or not _is_written(arguments, written, names):
            what = f"{'the arguments of ' if is_named else ''}the tool call {name!r:.60}"
            raise _dropped(what, "tool calls", "writes tool_calls", number, index)


def _dropped(what: str, kind: str, does: str, number: int, index: int) -> RowError:
    return RowError(
        index,
        f"the chat template does not write {what} of message {number}, so the model would learn a "
        f"response without it. Use a template that {does}, say it in the content, or remove it "
        "from the row.",
        f"the chat template drops {kind} of a response",
    )


def _is_written(arguments: Any, written: str, names: Mapping[str, int]) -> bool:
    """Whether all keys and values of a call are there beside the names, in whatever notation."""
    if isinstance(arguments, str):
        if _is_beside(_bare(arguments), written, names):
            return True
        try:
            arguments = json.loads(arguments)
        except ValueError:
            return False
    return all(
        any(_is_beside(_bare(form), written, names) for form in forms)
        for forms in _leaves(arguments)
    )


def _is_beside(part: str, written: str, names: Mapping[str, int]) -> bool:
    """Whether a part is written more often than the names of the calls hold it."""
    in_names = sum(count * name.count(part) for name, count in names.items())
    return not part or written.count(part) > in_names


def _leaves(value: Any) -> Iterator[list[str]]:
    """The keys and values within nested values, each in the forms in which it may be written."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if item is not None:
                yield [str(key)]
                yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, float):
        yield [str(value), *([str(int(value))] if value.is_integer() else [])]
    elif value is not None:
        yield [str(value)]


def _bare(text: str) -> str:
    """The letters and digits of a text, however it was quoted and escaped."""
    text = _BACKSLASHES.sub(r"\\", html.unescape(text))
    text = _ESCAPED_CODES.sub(lambda match: str(json.loads(f'"{match.group()}"')), text)
    text = _ESCAPED_IN_PYTHON.sub(lambda match: chr(int(match[1] or match[2], 16)), text)
    return "".join(filter(str.isalnum, _ESCAPED_SPACE.sub("", text))).casefold()
