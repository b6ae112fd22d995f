"""The nouns of the walk, in the order in which one row meets them, and the legend of shapes.

Shapes, everywhere in the package:

    B  rows of a batch            N  tokens kept for the loss, over all rows of a batch
    S  positions of a row         V  vocabulary
    D  hidden size

Up to the batch everything is token-aligned: index `t` talks about token `t`, never about the
prediction made at `t`. `loss.token_stats.shift_labels` is the one place that changes this.
"""

from dataclasses import dataclass, field
from typing import Any, Literal, NotRequired, TypedDict

# The label of a position that carries no loss: the value Hugging Face models and torch share.
IGNORE_INDEX = -100


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
        super().__init__(f"Row {row}: {problem}")
        self.row = row
        self.problem = problem
        self.reason = reason

    def __reduce__(self) -> tuple[type, tuple[int, str, str]]:
        """Lets the error cross from a worker process; `ValueError` alone would lose the parts."""
        return type(self), (self.row, self.problem, self.reason)


@dataclass
class DataOptions:
    """How rows become tokens; shared by the trainer's config, the collator and `prepare_dataset`.

    The help text of each field is its documentation, on the command line as well.
    """

    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest row in tokens. None: as long as the model and tokenizer allow."},
    )
    overflow: Literal["keep_start", "drop", "error"] = field(
        default="keep_start",
        metadata={
            "help": "What happens to a row longer than max_length: keep its start, drop it or "
            "stop. Rows and tokens lost this way are counted and printed."
        },
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
    prompt_format: Literal["plain", "chat"] = field(
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

    def __post_init__(self) -> None:
        """Refuses values that no row could satisfy."""
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(
                f"max_length is {self.max_length}, but a row needs at least 2 tokens: one of "
                "context and one to train."
            )
        for name, choices in (
            ("overflow", ("keep_start", "drop", "error")),
            ("prompt_format", ("plain", "chat")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}.")
        if self.messages_column and (self.prompt_column or self.response_column):
            raise ValueError(
                "messages_column was given together with prompt_column or response_column. A row "
                "is either one list of messages or a prompt and a response: give one or the other."
            )


@dataclass(frozen=True)
class Conversation:
    """One row in its normal form, whatever columns it came in.

    Attributes:
        messages: The turns in order. The turns of role `assistant` are the responses.
        num_context: How many of the first turns are given and never trained.
        is_chat: True where the chat template renders the turns; False where a prompt and its
            response are joined exactly as they are written.
    """

    messages: tuple[dict[str, Any], ...]
    num_context: int
    is_chat: bool


class TokenizedExample(TypedDict):
    """One row as the model sees it, token-aligned: all lists have one length.

    Attributes:
        input_ids: Token ids of prompt and response.
        response_mask: 1 where a token is trained, else 0.
        loss_weights: How much a trained token counts; absent where every one counts 1.
        source: Where the row came from; absent where the dataset does not say.
    """

    input_ids: list[int]
    response_mask: list[int]
    loss_weights: NotRequired[list[float]]
    source: NotRequired[str]
