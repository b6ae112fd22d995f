"""Column names tell how rows are written; where they do not, the error says what would."""

import pickle
from typing import Any

import pytest
from datasets import Audio, Dataset, Features, Image, LargeList, List, Value, Video

from hf_sft_plugin import prepare_dataset, prepare_stream, preview_rows
from hf_sft_plugin.rows.formats import TOKEN_MARKS, RowFormat, detect_format
from hf_sft_plugin.types import DataOptions


def describe(columns: list[str], **options: Any) -> str:
    return detect_format(columns, DataOptions(**options)).describe()


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        (["prompt", "response"], {}, "prompt_response: prompt, response"),
        (["prompt", "completion"], {}, "prompt_response: prompt, completion -> response"),
        (["prompt", "response", "completion"], {}, "prompt_response: prompt, response"),
        (["id", "response", "prompt"], {}, "prompt_response: prompt, response"),
        (["prompt", "response", "tools"], {}, "prompt_response: prompt, response, tools"),
        (["messages"], {}, "messages: messages"),
        (["messages", "response", "id"], {}, "messages: messages"),
        (["messages", "weight", "tools"], {}, "messages: messages, tools, weight"),
        (["conversations"], {}, "sharegpt: conversations"),
        (
            ["tools", "system", "conversations"],
            {},
            "sharegpt: conversations, system, tools",
        ),
        (["instruction", "output"], {}, "alpaca: instruction, output"),
        (["instruction", "input", "output"], {}, "alpaca: instruction, output, input"),
        (["instruction", "prompt", "response"], {}, "prompt_response: prompt, response"),
        (["text"], {}, "text: text"),
        (["text", "source", "label"], {}, "text: text, source"),
        (["segments", "weight"], {}, "segments: segments, weight"),
        (["input_ids", "response_mask"], {}, "tokenized: input_ids, response_mask"),
        (
            ["input_ids", "labels", "attention_mask"],
            {},
            "tokenized: input_ids, labels, attention_mask",
        ),
        (["input_ids", "completion_mask"], {}, "tokenized: input_ids, completion_mask"),
        (
            ["input_ids", "assistant_masks", "loss_weights"],
            {},
            "tokenized: input_ids, assistant_masks, loss_weights",
        ),
        (["input_ids", "labels", "prompt", "response"], {}, "tokenized: input_ids, labels"),
    ],
)
def test_the_columns_tell_the_format(
    columns: list[str], options: dict[str, Any], expected: str
) -> None:
    assert describe(columns, **options) == expected


@pytest.mark.parametrize(
    ("columns", "options", "expected"),
    [
        (
            ["question", "answer"],
            {"prompt_column": "question", "response_column": "answer"},
            "prompt_response: question -> prompt, answer -> response",
        ),
        (
            ["question", "completion"],
            {"prompt_column": "question"},
            "prompt_response: question -> prompt, completion -> response",
        ),
        (
            ["prompt", "answer"],
            {"response_column": "answer"},
            "prompt_response: prompt, answer -> response",
        ),
        (["chat"], {"messages_column": "chat"}, "messages: chat -> messages"),
        (
            ["prompt", "messages", "response"],
            {"messages_column": "messages"},
            "messages: messages",
        ),
        (
            ["prompt", "messages", "response"],
            {"prompt_column": "prompt"},
            "prompt_response: prompt, response",
        ),
        (
            ["input_ids", "labels", "prompt", "response"],
            {"prompt_column": "prompt"},
            "prompt_response: prompt, response",
        ),
        (
            ["conversations"],
            {"messages_column": "conversations"},
            "sharegpt: conversations",
        ),
        (
            ["chat"],
            {"messages_column": "chat", "data_format": "sharegpt"},
            "sharegpt: chat -> conversations",
        ),
        (["text", "prompt"], {"data_format": "text"}, "text: text"),
        (
            ["instruction", "input", "output", "text"],
            {"data_format": "alpaca"},
            "alpaca: instruction, output, input",
        ),
        (
            ["messages", "prompt", "completion"],
            {"ignored_columns": ["messages"]},
            "prompt_response: prompt, completion -> response",
        ),
        (["messages", "weight"], {"ignored_columns": ["weight"]}, "messages: messages"),
        # A column that is already the response is not a weight as well.
        (
            ["body", "weight"],
            {"prompt_column": "body", "response_column": "weight"},
            "prompt_response: body -> prompt, weight -> response",
        ),
    ],
)
def test_options_overrule_the_usual_names(
    columns: list[str], options: dict[str, Any], expected: str
) -> None:
    assert describe(columns, **options) == expected


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ([], {}, r"No known format.*The columns are none\."),
        (["q", "a"], {}, r"No known format: rows need prompt.*prompt_column.*columns are a, q\."),
        (["response"], {}, r"No known format.*The columns are response\."),
        (["instruction", "response"], {}, "No known format.*instruction and output"),
        (["prompt"], {}, r"no column 'response', which.*The columns are prompt\. Name the right"),
        (
            ["b", "a"],
            {"prompt_column": "q", "response_column": "a"},
            r"no column 'q' to be the prompt.*The columns are a, b\..*prompt_column and resp",
        ),
        (["q"], {"prompt_column": "q", "response_column": "a"}, "no column 'a'"),
        (["a"], {"response_column": "a"}, "no column 'prompt'"),
        (["messages"], {"messages_column": "chat"}, r"no column 'chat'.*The columns are messages"),
        (
            ["text"],
            {"data_format": "alpaca"},
            "no column 'instruction', which data_format 'alpaca' needs.*another data_format",
        ),
        (["text"], {"data_format": "segments"}, "no column 'segments'"),
        (["text"], {"data_format": "tokenized"}, "no column 'input_ids'"),
        (["text"], {"data_format": "sharegpt"}, "no column 'conversations'.*messages_column"),
        (
            ["messages", "text"],
            {"ignored_columns": ["messages", "text"]},
            r"No known format.*The columns are none\. Ignored are messages, text\.",
        ),
        (["q"], {"prompt_column": "q", "response_column": "q"}, "are both column 'q'. Name two"),
        (
            ["input_ids", "attention_mask"],
            {},
            "input_ids but neither response_mask, labels, completion_mask nor assistant_masks.*Add",
        ),
    ],
)
def test_columns_without_a_format_are_refused_with_the_columns_and_the_cure(
    columns: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        describe(columns, **options)


@pytest.mark.parametrize(
    ("columns", "signs", "choices"),
    [
        (["messages", "prompt"], "a prompt and a messages", ["prompt_response", "messages"]),
        (
            ["conversations", "messages"],
            "a messages and a conversations",
            ["messages", "sharegpt"],
        ),
        (["prompt", "text", "response"], "a prompt and a text", ["prompt_response", "text"]),
        (["instruction", "output", "text"], "an instruction and a text", ["alpaca", "text"]),
        (
            ["text", "segments", "messages"],
            "a messages and a text and a segments",
            ["messages", "text", "segments"],
        ),
    ],
)
def test_columns_of_two_formats_are_refused_with_the_options_that_decide(
    columns: list[str], signs: str, choices: list[str]
) -> None:
    with pytest.raises(ValueError, match=f"The rows have both {signs} column") as info:
        describe(columns)
    message = str(info.value)
    assert " or ".join(f"data_format='{choice}'" for choice in choices) in message
    assert "ignored_columns" in message
    assert f"The columns are {', '.join(sorted(columns))}." in message


@pytest.mark.parametrize(
    ("data_format", "naming"),
    [
        ("messages", "prompt_column"),
        ("prompt_response", "messages_column"),
        ("alpaca", "response_column"),
        ("tokenized", "messages_column"),
        ("text", "prompt_column"),
    ],
)
def test_a_name_that_the_chosen_format_does_not_read_is_refused(
    data_format: str, naming: str
) -> None:
    with pytest.raises(ValueError, match=f"{naming} has no effect where data_format is"):
        describe(["prompt", "response", "messages"], data_format=data_format, **{naming: "a"})


def test_columns_that_nobody_reads_or_ignores_are_listed_in_their_order() -> None:
    columns = ["url", "prompt", "id", "response", "attention_mask"]
    options = DataOptions(ignored_columns=["id"])
    row_format = detect_format(columns, options)
    assert row_format.used_columns == ("prompt", "response")
    assert row_format.unused(columns, options) == ["url", "attention_mask"]
    assert row_format.unused(columns, DataOptions()) == ["url", "id", "attention_mask"]


def test_every_mark_of_a_tokenized_row_counts_as_read() -> None:
    columns = ["input_ids", *TOKEN_MARKS]
    assert detect_format(columns, DataOptions()).unused(columns, DataOptions()) == []


def test_a_later_row_may_bring_a_part_that_the_first_had_not() -> None:
    row_format = detect_format(["messages"], DataOptions())
    assert row_format.value({"messages": [], "weight": 2.0}, "weight") == 2.0
    ignoring = detect_format(["messages"], DataOptions(ignored_columns=["weight"]))
    assert ignoring.value({"messages": [], "weight": 2.0}, "weight") is None
    assert row_format.value({"messages": [], "output": "a"}, "output") is None
    assert row_format.value({}, "messages") is None


def test_a_format_can_be_compared_hashed_and_sent_to_another_process() -> None:
    row_format = detect_format(["prompt", "response"], DataOptions())
    row_format.value({}, "prompt")
    assert row_format == RowFormat(
        "prompt_response",
        (("prompt", "prompt"), ("response", "response")),
        ("tools", "chat_template_kwargs", "weight", "source"),
    )
    assert pickle.loads(pickle.dumps(row_format)) == row_format  # noqa: S301
    assert len({row_format, detect_format(["prompt", "response"], DataOptions())}) == 1


@pytest.mark.parametrize("name", ["image", "images", "audio", "videos", "pixel_values"])
@pytest.mark.parametrize("columns", [["messages"], ["prompt", "response"], ["input_ids", "labels"]])
def test_a_column_that_a_text_model_cannot_see_is_refused(columns: list[str], name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"Column '{name}'.*trains on text alone.*ignored_columns"
    ):
        describe([*columns, name])
    assert describe([*columns, name], ignored_columns=[name]) == describe(columns)


MEDIA = [Image(), Audio(), Video(), List(Image()), LargeList(Audio()), {"first": Image()}]


@pytest.mark.parametrize("feature", MEDIA, ids=range(len(MEDIA)))
@pytest.mark.parametrize("kind", ["rows", "stream", "preview"])
def test_a_column_of_a_type_that_a_text_model_cannot_see_is_refused_whatever_its_name(
    feature: Any, kind: str, tokenizer: Any
) -> None:
    texts = {"prompt": ["q"] * 2, "response": ["a"] * 2}
    features = Features({**{name: Value("string") for name in texts}, "shot": feature})
    rows = Dataset.from_dict({**texts, "shot": [None] * 2}, features=features)

    def read(**options: Any) -> None:
        if kind == "rows":
            prepare_dataset(rows, tokenizer, **options)
        elif kind == "stream":
            next(iter(prepare_stream(rows.to_iterable_dataset(), tokenizer, **options)))
        else:
            preview_rows(rows, tokenizer, **options)

    with pytest.raises(ValueError, match=r"Column 'shot' is not text.*shot in ignored_columns"):
        read()
    read(ignored_columns=["shot"])


def test_a_column_without_such_a_type_may_hold_anything(tokenizer: Any) -> None:
    rows = [{"prompt": "q", "response": "a", "shot": {"path": "a.png", "sizes": [1, 2]}}]
    _, ledger = prepare_dataset(Dataset.from_list(rows), tokenizer)
    assert ledger.unused_columns == ["shot"]


def test_a_column_of_such_a_name_that_is_read_as_text_is_taken() -> None:
    assert describe(["images", "response"], prompt_column="images") == (
        "prompt_response: images -> prompt, response"
    )
