"""Step 2 of the walk, before its first row: which columns of a dataset hold what."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from datasets import Audio, Image, Video

from hf_sft_plugin.types import DataOptions

RowKind = Literal[
    "prompt_response", "messages", "sharegpt", "alpaca", "text", "segments", "tokenized"
]

# Columns of tokenized rows that say which tokens are trained.
TOKEN_MARKS = ("response_mask", "labels", "completion_mask", "assistant_masks")
# Columns of what a text model cannot see.
_MEDIA = ("image", "images", "audio", "audios", "video", "videos", "pixel_values")

_REQUIRED: dict[RowKind, tuple[str, ...]] = {
    "prompt_response": ("prompt", "response"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "text": ("text",),
    "segments": ("segments",),
    "tokenized": ("input_ids",),
}
_OPTIONAL: dict[RowKind, tuple[str, ...]] = {
    "prompt_response": ("tools", "chat_template_kwargs", "weight", "source"),
    "messages": ("tools", "chat_template_kwargs", "weight", "source"),
    "sharegpt": ("system", "tools", "chat_template_kwargs", "weight", "source"),
    "alpaca": ("input", "chat_template_kwargs", "weight", "source"),
    "text": ("weight", "source"),
    "segments": ("weight", "source"),
    "tokenized": (*TOKEN_MARKS, "attention_mask", "loss_weights", "eval_masks", "source"),
}
# Columns that give a format away. A prompt alone does: its response may go by any name.
_SIGNS: dict[RowKind, tuple[str, ...]] = {**_REQUIRED, "prompt_response": ("prompt",)}
_NAMING = {
    "prompt_response": ("prompt_column", "response_column"),
    "messages": ("messages_column",),
    "sharegpt": ("messages_column",),
}


@dataclass(frozen=True)
class RowFormat:
    """How the rows of a dataset are written, and which of its columns hold what.

    Attributes:
        kind: How the rows are written.
        columns: Pairs of a column and the part of the row that it holds.
        absent: Parts that no column holds so far, but that a row may bring under their own name.

    Examples:
        >>> row_format = detect_format(["prompt", "answer", "id"],
        ...                            DataOptions(response_column="answer"))
        >>> row_format.value({"prompt": "2+2=", "answer": "4", "id": 7}, "response")
        '4'
    """

    kind: RowKind
    columns: tuple[tuple[str, str], ...]
    absent: tuple[str, ...] = ()

    @property
    def used_columns(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(column for column, _ in self.columns)

    def column(self, part: str) -> str:
        """The name of the column that holds a part of the row."""
        return self._columns_by_part.get(part, part)

    def value(self, row: Mapping[str, Any], part: str) -> Any:
        """What a row holds of a part; None where it has none."""
        column = self._columns_by_part.get(part)
        return None if column is None else row.get(column)

    @cached_property
    def _columns_by_part(self) -> dict[str, str]:
        return {part: part for part in self.absent} | {part: name for name, part in self.columns}

    def unused(self, columns: Collection[str], options: DataOptions) -> list[str]:
        """The columns that are neither read nor named in `options.ignored_columns`.

        Examples:
            >>> row_format = detect_format(["messages", "id", "url"], DataOptions())
            >>> row_format.unused(["messages", "id", "url"], DataOptions(ignored_columns=["id"]))
            ['url']
        """
        known = {*self.used_columns, *(options.ignored_columns or ())}
        return [column for column in columns if column not in known]

    def describe(self) -> str:
        """One line that says which column was taken for what.

        Examples:
            >>> options = DataOptions(prompt_column="question", response_column="answer")
            >>> detect_format(["question", "answer", "weight"], options).describe()
            'prompt_response: question -> prompt, answer -> response, weight'
        """
        parts = [
            column if column == part else f"{column} -> {part}" for column, part in self.columns
        ]
        return f"{self.kind}: {', '.join(parts)}"


def detect_format(
    columns: Collection[str], options: DataOptions, features: Mapping[str, Any] | None = None
) -> RowFormat:
    """Decides from the column names how rows are written.

    Args:
        columns: The column names of the dataset, or the keys of one row.
        options: `data_format`, `prompt_column`, `response_column` and `messages_column` overrule
            the usual names; `ignored_columns` are as good as absent.
        features: The types of the columns; None where they are not known.

    Raises:
        ValueError: If no format fits, more than one does, or options contradict each other.

    Examples:
        >>> detect_format(["prompt", "completion", "id"], DataOptions()).describe()
        'prompt_response: prompt, completion -> response'
    """
    ignored = options.ignored_columns or ()
    usable = [column for column in columns if column not in ignored]
    found = f"The columns are {', '.join(sorted(map(str, usable))) or 'none'}."
    if ignored:
        found = f"{found} Ignored are {', '.join(sorted(ignored))}."
    kind = _choose_kind(usable, options, found)
    if kind != "tokenized" and "loss_weights" in usable:
        raise ValueError(
            "Column 'loss_weights' has one number for each token, but the rows are not tokenized. "
            "Use a column 'weight' with one number for each row, or name loss_weights in "
            "ignored_columns."
        )
    held_by = dict(zip(_REQUIRED[kind], _required_columns(kind, usable, options), strict=True))
    for part, column in held_by.items():
        if column not in usable:
            raise ValueError(_missing(kind, part, column, found))
    taken = set(held_by.values())
    if len(taken) < len(held_by):
        raise ValueError(f"prompt and response are both column {taken.pop()!r}. Name two columns.")
    has_marks = any(mark in usable for mark in TOKEN_MARKS)
    if kind == "tokenized" and not has_marks and options.trained_mask != "all":
        raise ValueError(
            f"The rows have input_ids but neither {', '.join(TOKEN_MARKS[:-1])} nor "
            f"{TOKEN_MARKS[-1]}, so nothing says which tokens to train. Add one of these columns, "
            "set use_loss_mask=False to train every token, or set data_format to train on other "
            f"columns. {found}"
        )
    media = {*_MEDIA, *(name for name, each in (features or {}).items() if _holds_media(each))}
    unseen = [column for column in usable if column in media and column not in taken]
    if unseen:
        raise ValueError(
            f"Column {unseen[0]!r} is not text, and this package trains on text alone: the model "
            "would learn to answer about something that it does not see. Use a trainer for "
            f"multimodal models, or name {unseen[0]} in ignored_columns to train without it."
        )
    optional = [part for part in _OPTIONAL[kind] if part not in taken and part not in ignored]
    pairs = [(column, part) for part, column in held_by.items()]
    pairs += [(part, part) for part in optional if part in usable]
    return RowFormat(kind, tuple(pairs), tuple(part for part in optional if part not in usable))


def _holds_media(feature: Any) -> bool:
    """Whether values of a type are images, audio or video, or hold any."""
    if isinstance(feature, Mapping):
        return any(map(_holds_media, feature.values()))
    inner = getattr(feature, "feature", None)
    return isinstance(feature, Image | Audio | Video) or (inner is not None and _holds_media(inner))


def _choose_kind(usable: Collection[str], options: DataOptions, found: str) -> RowKind:
    naming = [
        name
        for name in ("prompt_column", "response_column", "messages_column")
        if getattr(options, name)
    ]
    if options.data_format != "auto":
        idle = [name for name in naming if name not in _NAMING.get(options.data_format, ())]
        if idle:
            raise ValueError(
                f"{idle[0]} has no effect where data_format is {options.data_format!r}. Give one "
                "or the other."
            )
        return options.data_format
    if options.messages_column:
        return "sharegpt" if options.messages_column == "conversations" else "messages"
    if naming:
        return "prompt_response"
    if "input_ids" in usable:
        return "tokenized"
    claims = [kind for kind, signs in _SIGNS.items() if all(sign in usable for sign in signs)]
    if len(claims) > 1:
        signs = [_SIGNS[kind][0] for kind in claims]
        named = [f"{'an' if sign[0] in 'aeiou' else 'a'} {sign}" for sign in signs]
        choices = " or ".join(f"data_format={kind!r}" for kind in claims)
        raise ValueError(
            f"The rows have both {' and '.join(named)} column, and each is a format of its own. "
            f"Say which one to train on: {choices}; or name the others in ignored_columns. {found}"
        )
    if not claims:
        raise ValueError(
            "No known format: rows need prompt and response (or completion), or messages, or "
            "conversations, or instruction and output, or text, or segments, or input_ids with "
            "response_mask or labels. Name other columns with prompt_column and response_column, "
            f"or messages_column. {found}"
        )
    return claims[0]


def _required_columns(
    kind: RowKind, usable: Collection[str], options: DataOptions
) -> tuple[str, ...]:
    """The columns that should hold the required parts, in their order."""
    if kind == "prompt_response":
        usual = "completion" if "completion" in usable and "response" not in usable else "response"
        return options.prompt_column or "prompt", options.response_column or usual
    if kind in _NAMING:
        return (options.messages_column or _REQUIRED[kind][0],)
    return _REQUIRED[kind]


def _missing(kind: RowKind, part: str, column: str, found: str) -> str:
    if kind in _NAMING:
        cure = f"Name the right ones with {' and '.join(_NAMING[kind])}"
        cure += ", or messages_column." if kind == "prompt_response" else "."
    else:
        cure = "Rename the right one, or choose another data_format."
    role = "" if column == part else f" to be the {part}"
    return f"There is no column {column!r}{role}, which data_format {kind!r} needs. {found} {cure}"
