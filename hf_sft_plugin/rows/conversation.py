"""Step 2 of the walk: a raw row, whatever its columns, becomes a `Conversation`."""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from inspect import signature
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.rows.formats import RowFormat, RowKind
from hf_sft_plugin.rows.messages import ROLES_HELP, calls_of, read_messages, reasoning_of
from hf_sft_plugin.rows.values import (
    RowSource,
    check_unicode,
    read_flag,
    read_weight,
    without_nulls,
)
from hf_sft_plugin.types import Conversation, DataOptions, RowError, Segment, Turn

# Names that `apply_chat_template` takes itself; a row cannot set them.
RESERVED_VARIABLES = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
RESERVED_VARIABLES -= {"self", "kwargs", "documents"}
# Roles that chat templates know; one that looks much like them may be a slip.
_ROLES = {"system", "developer", "user", "assistant", "tool"}
# The two prompts that the Alpaca dataset was published with.
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def to_conversation(
    row: Mapping[str, Any], index: int, row_format: RowFormat, options: DataOptions
) -> Conversation:
    """Brings one raw row into its normal form, and decides which of its texts are trained.

    Args:
        row: The raw row; it is not tokenized yet.
        index: Its position in the dataset, for error messages.
        row_format: As `detect_format` gave it.
        options: `prompt_format` decides whether plain text is wrapped in chat turns; `train_on`,
            `train_roles` and `use_loss_mask` decide what is trained.

    Returns:
        The conversation; its messages are those of the row wherever nothing had to be removed.

    Raises:
        RowError: If a value has the wrong type, is empty or holds broken Unicode, or if nothing
            of the row is trained.
        ValueError: If the rows are tokenized.

    Examples:
        >>> row_format = RowFormat("prompt_response", (("q", "prompt"), ("a", "response")))
        >>> to_conversation({"q": "2+2=", "a": "4"}, 0, row_format, DataOptions()).segments
        (Segment(text='2+2=', train=False, weight=1.0), Segment(text='4', train=True, weight=1.0))
    """
    _check_row(row, index)
    if row_format.kind not in _READERS:
        raise ValueError("Tokenized rows are no conversations: their tokens are used as they are.")
    source = RowSource(row, index, row_format, options)
    try:
        weight = source.value("weight")
        place = "" if weight is None else source.place("weight")
        weight = read_weight(weight, 1.0, source, place)
        return _READERS[row_format.kind](source, weight)
    except RecursionError:
        raise RowError(
            index,
            "its lists and dicts are nested too deep to be read. Flatten or remove the row.",
            "nested too deep",
        ) from None


def remarks_on(
    conversation: Conversation, row_format: RowFormat, options: DataOptions, has_template: bool
) -> list[str]:
    """Likely mistakes in a row that can be trained.

    Args:
        conversation: The row in its normal form.
        row_format: As `detect_format` gave it.
        options: See `DataOptions`.
        has_template: Whether the tokenizer has a chat template.
    """
    remarks = []
    if has_template and conversation.segments and row_format.kind in ("prompt_response", "alpaca"):
        remarks.append("plain text without the chat template; prompt_format='chat' uses it")
    for role in dict.fromkeys(turn.message["role"] for turn in conversation.turns):
        is_known = role in _ROLES or role in options.train_roles
        meant = None if is_known else _similar_role(role)
        if meant is not None:
            remarks.append(f"a message has the role {role!r}, which looks like {meant!r}")
    return remarks


@lru_cache(maxsize=1024)
def _similar_role(role: str) -> str | None:
    """The known role that another one looks like; None if it looks like none."""
    plain = role.strip().casefold()
    return next(iter(difflib.get_close_matches(plain, sorted(_ROLES), n=1, cutoff=0.82)), None)


def _check_row(row: Any, index: int) -> None:
    if not isinstance(row, Mapping):
        found = type(row).__name__
        raise RowError(index, f"the row is {found}, not a dict of columns.", "row is not a dict")


def _read_pair(source: RowSource, weight: float) -> Conversation:
    prompt, response = source.value("prompt"), source.value("response")
    _check_side("prompt", prompt, source)
    _check_side("response", response, source)
    if isinstance(prompt, str) and isinstance(response, str):
        return _join_pair(prompt, response, source, weight)
    if isinstance(prompt, str):
        turns = [Turn({"role": "user", "content": prompt}, False, weight)]
    else:
        turns = read_messages("prompt", source, weight)
        turns = [dataclasses.replace(turn, train=False) for turn in turns]
    if isinstance(response, str):
        turns.append(_answer(response, source, weight))
    else:
        turns += read_messages("response", source, weight)
    return _make_chat(turns, source)


def _check_side(part: str, value: Any, source: RowSource) -> None:
    """Refuses a prompt or response that is neither text nor a list."""
    if isinstance(value, str):
        # ASCII says so of itself, without being read, and is never broken.
        if not value.isascii():
            check_unicode(value, source.index, source.place(part))
    elif not isinstance(value, list):
        found = type(value).__name__
        raise source.error(
            f"{source.place(part)} holds {found}, but text or {ROLES_HELP} is needed. "
            "Convert or remove the row.",
            f"{source.row_format.column(part)} is {found}, not text",
        )


def _join_pair(prompt: str, response: str, source: RowSource, weight: float) -> Conversation:
    """A prompt and its response that are both plain text."""
    if source.options.prompt_format == "chat":
        user = Turn({"role": "user", "content": prompt}, False, weight)
        return _make_chat([user, _answer(response, source, weight)], source)
    for part, is_there in (
        ("tools", _read_tools(source) is not None),
        ("chat_template_kwargs", _read_template_kwargs(source) is not None),
    ):
        if is_there:
            raise source.error(
                f"it has {part}, but its prompt and response are plain text that no chat template "
                "writes, so they would be lost. Set prompt_format='chat', or name the column in "
                "ignored_columns.",
                f"{part} without a chat",
            )
    return _make_text([Segment(prompt, False, weight), Segment(response, True, weight)], source)


def _answer(response: str, source: RowSource, weight: float) -> Turn:
    train = "assistant" in source.options.train_roles
    return Turn({"role": "assistant", "content": response}, train, weight)


def _read_chat(source: RowSource, weight: float) -> Conversation:
    return _make_chat(read_messages("messages", source, weight), source)


def _read_sharegpt(source: RowSource, weight: float) -> Conversation:
    turns = read_messages("conversations", source, weight)
    if source.value("system") not in (None, ""):
        system = {"role": "system", "content": source.text("system")}
        if turns[0].message["role"] != "system":
            turns.insert(0, Turn(system, "system" in source.options.train_roles, weight))
        elif turns[0].message.get("content") != system["content"]:
            raise source.error(
                f"{source.place('system')} and the first message are two different system "
                "prompts. Remove one, or name the column in ignored_columns.",
                "two system prompts",
            )
    return _make_chat(turns, source)


def _read_alpaca(source: RowSource, weight: float) -> Conversation:
    instruction, output = source.text("instruction"), source.text("output")
    extra = "" if source.value("input") is None else source.text("input")
    if source.options.prompt_format == "chat":
        prompt = f"{instruction}\n\n{extra}" if extra else instruction
    else:
        template = _ALPACA_WITH_INPUT if extra else _ALPACA
        prompt = template.format(instruction=instruction, input=extra)
    return _join_pair(prompt, output, source, weight)


def _read_text(source: RowSource, weight: float) -> Conversation:
    return _make_text([Segment(source.text("text"), True, weight)], source)


def _read_segments(source: RowSource, weight: float) -> Conversation:
    needed = "a list like [{'text': '...', 'train': False}, {'text': '...', 'train': True}]"
    segments = []
    for position, piece in enumerate(source.entries("segments", needed)):
        place = f"{source.place('segments')}, segment {position}"
        if not isinstance(piece, Mapping) or not isinstance(piece.get("text"), str):
            raise source.error(
                f"{place} is {piece!r:.80}, but a dict with 'text' and 'train' is needed. Convert "
                "or remove the row.",
                "a segment without text",
            )
        train = read_flag(piece.get("train"), source, place)
        if train is None:
            raise source.error(
                f"{place} does not say whether it is trained. Add 'train': true or false.",
                "a segment without train",
            )
        check_unicode(piece["text"], source.index, place)
        share = read_weight(piece.get("weight"), weight, source, place)
        if piece["text"]:
            segments.append(Segment(piece["text"], train, share))
    return _make_text(segments, source)


_READERS: dict[RowKind, Callable[[RowSource, float], Conversation]] = {
    "prompt_response": _read_pair,
    "messages": _read_chat,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "text": _read_text,
    "segments": _read_segments,
}


def _make_text(segments: list[Segment], source: RowSource) -> Conversation:
    """Segments as a conversation, provided that something of them is trained."""
    trained = [segment for segment in segments if segment.train]
    if not trained and not _trains_everything(source.options):
        raise source.error(
            "none of its segments is trained, so there is nothing to learn from it. Set "
            "'train': true on a segment, or remove the row.",
            "nothing is trained",
        )
    if not any(segment.text.strip() for segment in trained or segments):
        raise _empty_response(source)
    return Conversation(segments=tuple(segments))


def _make_chat(turns: list[Turn], source: RowSource) -> Conversation:
    """Turns as a conversation, provided that one of them is trained and none of those is empty."""
    trained = [position for position, turn in enumerate(turns) if turn.train]
    if not trained and not _trains_everything(source.options):
        wanted = " or ".join(repr(role) for role in source.options.train_roles)
        roles = ", ".join(turn.message["role"] for turn in turns)
        raise source.error(
            f"no message to train has the role {wanted} (the roles are {roles}; those in the "
            "prompt, or with 'train': false, do not count). Rename the role of the responses, "
            "name it in train_roles, or remove the row.",
            "no message to train",
        )
    if source.options.train_on == "last_response" and trained:
        turns = [
            turn if position == trained[-1] else dataclasses.replace(turn, train=False)
            for position, turn in enumerate(turns)
        ]
        trained = trained[-1:]
    for position in trained:
        message = turns[position].message
        content = message.get("content", "")
        if not content.strip() and not (calls_of(message) or reasoning_of(message)):
            raise _empty_response(source)
    return Conversation(
        turns=tuple(turns),
        tools=_read_tools(source),
        chat_template_kwargs=_read_template_kwargs(source),
    )


def _trains_everything(options: DataOptions) -> bool:
    return options.train_on == "all" or not options.use_loss_mask


def _empty_response(source: RowSource) -> RowError:
    what = "text" if source.row_format.kind == "text" else "response"
    return source.error(
        f"the {what} is empty, so there is nothing to learn from it. Fill or remove it.",
        f"empty {what}",
    )


def _read_tools(source: RowSource) -> tuple[dict[str, Any], ...] | None:
    """The schemas of the tools: a list of them, or its JSON text; None where there are none."""
    tools = _parsed("tools", source)
    if tools is None:
        return None
    place = source.place("tools")
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise source.error(
            f"{place} holds {tools!r:.60}, but a list of schemas, or its JSON text, is needed. "
            "Convert it, remove the row, or name the column in ignored_columns.",
            "tools is not a list of schemas",
        )
    return tuple(without_nulls(tools, source, place)) or None


def _read_template_kwargs(source: RowSource) -> dict[str, Any] | None:
    """Variables for the chat template: a mapping, or its JSON text; None where there are none."""
    variables = _parsed("chat_template_kwargs", source)
    if variables is None:
        return None
    place = source.place("chat_template_kwargs")
    if not isinstance(variables, Mapping):
        raise source.error(
            f"{place} holds {variables!r:.60}, but a mapping of names to values, or its JSON text, "
            "is needed. Convert it, remove the row, or name the column in ignored_columns.",
            "chat_template_kwargs is not a mapping",
        )
    kept: dict[str, Any] = without_nulls(variables, source, place)
    for name in kept:
        if name in RESERVED_VARIABLES:
            raise source.error(
                f"{place} names {name!r}, which says how the template is called and is no variable "
                "for it. Remove it.",
                "chat_template_kwargs names no variable",
            )
    return kept or None


def _parsed(part: str, source: RowSource) -> Any:
    """A part that may be JSON text; None where there is none."""
    value = source.value(part)
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except ValueError as error:
            raise source.error(
                f"{source.place(part)} holds text that is not JSON ({error}). Repair it or remove "
                "the row.",
                f"{part} is not JSON",
            ) from error
    return None if value == "" else value
