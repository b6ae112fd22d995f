"""The nouns of the walk, in the order in which one row meets them, and the legend of shapes.

Shapes, everywhere in the package:

    B  rows of a batch            N  tokens kept for the loss, over all rows of a batch
    S  positions of a row         V  vocabulary
    D  hidden size

Up to the batch everything is token-aligned: index `t` talks about token `t`, never about the
prediction made at `t`. `loss.token_stats.shift_labels` is the one place that changes this.
"""

import json
import unicodedata
from collections.abc import MutableSequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal, NotRequired, TypedDict, get_args

# The label of a position that carries no loss: the value Hugging Face models and torch share.
IGNORE_INDEX = -100


def visible(text: str) -> str:
    r"""Writes what cannot be seen, or would act on the reader's screen, so that it can be read.

    Examples:
        >>> ascii(visible("a\x1b[31m b\u202e"))
        "'a\\u241b[31m b<U+202E>'"
    """
    return "".join(map(_visible_character, text))


@cache
def _visible_character(character: str) -> str:
    if character == "\n":
        return "\u21b5\n"
    if character == "\t":
        return "\u2192\t"
    if ord(character) < 32 or ord(character) == 127:
        # The pictures of control characters stand in the same order.
        return chr(0x2400 + ord(character)) if ord(character) < 32 else "\u2421"
    # Joiners hold emoji and some scripts together.
    is_hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp")
    return (
        f"<U+{ord(character):04X}>" if is_hidden and character not in "\u200c\u200d" else character
    )


def visible_lines(text: str) -> str:
    r"""Text from data, names or errors as lines for a terminal: shown, but never obeyed.

    Text that went through it already stays as it is.

    Examples:
        >>> ascii(visible_lines("a\x1b[31m\nb"))
        "'a\\u241b[31m\\nb'"
    """
    return "\n".join(map(visible, text.replace("\u2192\t", "\t").split("\n")))


class RowError(ValueError):
    """One row of a dataset cannot be used.

    Args:
        row: Position of the row in its dataset.
        problem: What was found, why it matters and what to do, in one or two sentences.
        reason: A few words under which rows with the same problem are counted.

    Examples:
        >>> str(RowError(17, "the response is empty.", "empty response"))
        'Row 17: the response is empty.'
    """

    def __init__(self, row: int, problem: str, reason: str) -> None:
        # It may quote what the row says, and end up in a terminal.
        super().__init__(visible_lines(f"Row {row}: {problem}"))
        self.row = row
        self.problem = problem
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[int, str, str]]:
        """Lets the error cross from a worker process; `ValueError` alone would lose the parts."""
        return type(self), (self.row, self.problem, self.reason)


DataFormat = Literal[
    "auto",
    "prompt_response",
    "messages",
    "sharegpt",
    "alpaca",
    "text",
    "segments",
    "tokenized",
]
Overflow = Literal["keep_start", "keep_end", "keep_response", "split", "drop", "error"]
PromptFormat = Literal["plain", "chat"]
TrainOn = Literal["response", "last_response", "all"]
MultiTurn = Literal["auto", "joint", "split"]
Boundary = Literal["split", "include", "exclude"]
SpanKind = Literal["exact", "shared_prefix", "rewritten", "text", "given"]
ControlTokens = Literal["text", "keep", "error"]
_CHOICES: dict[str, Any] = {
    "data_format": DataFormat,
    "overflow": Overflow,
    "prompt_format": PromptFormat,
    "train_on": TrainOn,
    "multi_turn": MultiTurn,
    "boundary": Boundary,
    "control_tokens": ControlTokens,
}


@dataclass
class DataOptions:
    """How rows become tokens; shared by the trainer's config, the collator and `prepare_dataset`.

    The help text of each field is its documentation, on the command line as well.
    """

    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest row in tokens. None: as long as the model and tokenizer allow."},
    )
    overflow: Overflow = field(
        default="keep_start",
        metadata={
            "help": "What happens to a row longer than max_length: keep its start, its end or its "
            "last response (the prompt loses its oldest turns or its middle), split it into rows "
            "that fit, drop it, or stop. Rows and tokens lost this way are counted and printed."
        },
    )
    data_format: DataFormat = field(
        default="auto",
        metadata={"help": "How rows are written. auto: found from the column names."},
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "Column with the prompt, text or messages. None: 'prompt'."},
    )
    response_column: str | None = field(
        default=None,
        metadata={"help": "Column with the response. None: 'response', else 'completion'."},
    )
    messages_column: str | None = field(
        default=None,
        metadata={"help": "Column with whole conversations. None: 'messages'."},
    )
    prompt_format: PromptFormat = field(
        default="plain",
        metadata={
            "help": "How prompts and responses that are plain text reach the model: 'plain' joins "
            "them as they are, 'chat' makes them a user and an assistant turn of the chat template."
        },
    )
    stop_token: str | None = field(
        default=None,
        metadata={
            "help": "Token that ends a response, e.g. '<|im_end|>'; becomes the tokenizer's "
            "eos_token. None: the tokenizer's and the model's own."
        },
    )

    ignored_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Columns that are known to play no part, and need no mention."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Variables for the chat template, as a mapping or JSON: "
            '{"enable_thinking": false}. Those of a row, in a column of this name, replace them.'
        },
    )
    train_on: TrainOn = field(
        default="response",
        metadata={
            "help": "What is trained: every response, only the last one of each conversation, or "
            "all text."
        },
    )
    train_roles: list[str] = field(
        default_factory=lambda: ["assistant"],
        metadata={"help": "Roles whose turns are responses."},
    )
    use_loss_mask: bool = field(
        default=True,
        metadata={"help": "False trains every token, whatever the masks say, as in base training."},
    )
    multi_turn: MultiTurn = field(
        default="auto",
        metadata={
            "help": "Conversations with several responses: 'joint' makes one example of them, "
            "'split' one per response; 'auto' splits only where the chat template writes an "
            "earlier turn differently once later turns follow."
        },
    )
    boundary: Boundary = field(
        default="split",
        metadata={
            "help": "A token that reaches across the edge of a response: 'split' cuts the text "
            "there, as inference does, 'include' trains the token, 'exclude' does not."
        },
    )
    control_tokens: ControlTokens = field(
        default="text",
        metadata={
            "help": "Contents in which a control token such as <|im_end|> is written: 'text' "
            "encodes it as ordinary text, 'keep' as the control token, 'error' drops the row. "
            "Prompts without a template are taken as they are written."
        },
    )

    def __post_init__(self) -> None:
        """Refuses values that no row could satisfy."""
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length is {self.max_length}, but a row needs at least 2 tokens: one of "
                "context and one to train."
            )
        if isinstance(self.chat_template_kwargs, str):
            self.chat_template_kwargs = _read_json(self.chat_template_kwargs)
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(choices):
                raise ValueError(
                    f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}."
                )
        if self.messages_column and (self.prompt_column or self.response_column):
            raise ValueError(
                "messages_column was given together with prompt_column or response_column. A row "
                "is either one list of messages or a prompt and a response: give one or the other."
            )

    @property
    def trained_mask(self) -> TrainOn:
        """What is trained, whichever of two options says so."""
        return self.train_on if self.use_loss_mask else "all"


def _read_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"chat_template_kwargs is {text!r}, which is not JSON ({error}). Write names in double "
            'quotes, as in {"enable_thinking": false}.'
        ) from error
    if not isinstance(value, dict):
        raise ValueError(
            f"chat_template_kwargs is {text!r}; a mapping of names to values is needed."
        )
    return value


@dataclass(frozen=True)
class Segment:
    """A piece of text that no chat template touches.

    Attributes:
        text: The text.
        train: Whether it is trained.
        weight: How much each of its tokens counts.
    """

    text: str
    train: bool
    weight: float = 1.0


@dataclass(frozen=True)
class Turn:
    """One message of a chat.

    Attributes:
        message: What the chat template sees; `content` is text, or absent.
        train: Whether it is trained.
        weight: How much each of its tokens counts.
        weighted: Characters `[start, end)` of the content whose tokens have another weight, with
            that weight; those with 0 are not trained.
    """

    message: dict[str, Any]
    train: bool
    weight: float = 1.0
    weighted: tuple[tuple[int, int, float], ...] = ()


@dataclass(frozen=True)
class Conversation:
    """One row in its normal form, whatever columns it came in: turns or segments, never both.

    Attributes:
        turns: A chat, which the chat template writes; empty where the row has segments.
        segments: Texts that are joined exactly as they are written; empty where the row is a chat.
        tools: Schemas of the tools that the chat template lists; None without any.
        chat_template_kwargs: Variables for the chat template, beside those of the run.
    """

    turns: tuple[Turn, ...] = ()
    segments: tuple[Segment, ...] = ()
    tools: tuple[dict[str, Any], ...] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The messages of the turns."""
        return [turn.message for turn in self.turns]

    def up_to(self, number: int) -> "Conversation":
        """The chat through a turn, with nothing but that turn to train.

        Examples:
            >>> chat = Conversation((Turn({}, True), Turn({}, True), Turn({}, False)))
            >>> [turn.train for turn in chat.up_to(1).turns]
            [False, True]
        """
        before = tuple(replace(turn, train=False) for turn in self.turns[:number])
        return replace(self, turns=(*before, self.turns[number]))


@dataclass(frozen=True)
class TrainedSpan:
    """A run of trained tokens of one example, and why it is trained.

    Attributes:
        start: First token.
        end: The token after the last.
        turn: The message it belongs to; the segment, where there are no messages.
        kind: `exact`: the model reads before it what inference would feed. `shared_prefix`: the
            chat template writes the generation prompt differently before a finished response; the
            span begins where the two part. `rewritten`: inference would have shown it other
            earlier turns, or other tokens of them. `text`: a segment. `given`: the row came
            tokenized.
    """

    start: int
    end: int
    turn: int
    kind: SpanKind


class TokenizedExample(TypedDict):
    """One row as the model sees it, token-aligned: all lists have one length.

    Attributes:
        input_ids: Token ids of prompt and response.
        response_mask: 1 where a token is trained, else 0.
        loss_weights: How much a trained token counts; absent where every one counts 1.
        eval_masks: To which masks of an evaluation each token belongs; see `tokens/eval_masks.py`.
        source: Where the row came from; absent where the dataset does not say.
    """

    input_ids: MutableSequence[int]
    response_mask: MutableSequence[int]
    loss_weights: NotRequired[list[float]]
    eval_masks: NotRequired[list[int]]
    source: NotRequired[str]


class PackedRow(TypedDict):
    """Whole rows that are run together, and know nothing of each other.

    Attributes:
        documents: The rows, in the order of the data.
    """

    documents: list[TokenizedExample]
