"""A row may bring variables for the chat template; no other row is written with them."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    RowError,
    prepare_dataset,
    preview_rows,
    tokenize_example,
)
from hf_sft_plugin.preparation.streaming import prepare_stream

MOODS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if mood is defined %}({{ mood }}{{ extra }}) {% endif %}{% endif %}"
).replace(
    "{{ m.content }}",
    "{% if m.role == 'assistant' and mood is defined %}({{ mood }}{{ extra }}) {% endif %}"
    "{{ m.content }}",
)


def chat(number: int = 0, **columns: Any) -> dict[str, Any]:
    turns = [("user", f"hello {number}"), ("assistant", f"world {number}")]
    return {"messages": [{"role": r, "content": c} for r, c in turns], **columns}


@pytest.fixture
def moody(tokenizer_factory: Callable[..., Any]) -> Any:
    return tokenizer_factory(chat_template=MOODS)


def fed(row: dict[str, Any], tokenizer: Any, **variables: Any) -> str:
    """What inference supplies before the response."""
    return tokenizer.apply_chat_template(
        row["messages"][:1], add_generation_prompt=True, tokenize=False, **variables
    )


def test_rows_of_one_shape_are_written_with_their_own_variables_and_no_others(moody: Any) -> None:
    """Often enough that each shape is filled in rather than rendered."""
    choices = [{"mood": "sad"}, None, {"mood": "glad", "extra": "!"}, {"mood": "glad"}]
    rows = [chat(n, chat_template_kwargs=choices[n % 4]) for n in range(40)]
    dataset = Dataset.from_list(rows)
    expected = []
    for row in rows:
        plain = {"messages": row["messages"]}
        variables = row["chat_template_kwargs"] or {}
        (example,) = tokenize_example(plain, moody, chat_template_kwargs=variables)
        start = example["response_mask"].index(1)
        assert moody.decode(example["input_ids"][:start]) == fed(row, moody, **variables)
        expected.append(example)
    for num_proc in (1, 2):
        prepared, ledger = prepare_dataset(dataset, moody, num_proc=num_proc)
        assert prepared.to_list() == expected
        assert ledger.columns == "messages: messages, chat_template_kwargs"
    made = list(prepare_stream(dataset.to_iterable_dataset(), moody))
    assert [{name: each[name] for name in expected[0]} for each in made] == expected
    ids = DataCollatorForPromptResponse(moody)(rows)["input_ids"].tolist()
    lengths = [len(example["input_ids"]) for example in expected]
    cut = [row[:length] for row, length in zip(ids, lengths, strict=True)]
    assert cut == [example["input_ids"] for example in expected]
    shown = preview_rows(dataset, moody, num_rows=40)
    texts = ["".join(piece.text for piece in row.examples[0].pieces) for row in shown]
    assert texts == [moody.decode(example["input_ids"]) for example in expected]


def test_the_variables_of_a_row_stand_above_those_of_the_run(moody: Any) -> None:
    row = chat(chat_template_kwargs={"mood": "sad"})
    (example,) = tokenize_example(row, moody, chat_template_kwargs={"mood": "glad", "extra": "?"})
    assert "(sad?) " in moody.decode(example["input_ids"])


@pytest.mark.parametrize("value", ['{"mood": "sad"}', {"mood": "sad", "extra": None}])
def test_json_text_and_keys_that_arrow_filled_mean_the_same(value: Any, moody: Any) -> None:
    expected = tokenize_example(chat(), moody, chat_template_kwargs={"mood": "sad"})
    assert tokenize_example(chat(chat_template_kwargs=value), moody) == expected


@pytest.mark.parametrize("value", [None, "", {}, {"mood": None}])
def test_a_row_without_variables_is_written_as_without_the_column(value: Any, moody: Any) -> None:
    assert tokenize_example(chat(chat_template_kwargs=value), moody) == tokenize_example(
        chat(), moody
    )


def test_prompts_and_responses_take_them_where_they_are_chats(moody: Any) -> None:
    row = {"prompt": "hello 0", "response": "world 0", "chat_template_kwargs": {"mood": "sad"}}
    expected = tokenize_example(chat(), moody, chat_template_kwargs={"mood": "sad"})
    assert tokenize_example(row, moody, prompt_format="chat") == expected
    alpaca = {
        "instruction": "hello 0",
        "output": "world 0",
        "chat_template_kwargs": {"mood": "sad"},
    }
    assert tokenize_example(alpaca, moody, prompt_format="chat") == expected
    with pytest.raises(RowError, match=r"chat_template_kwargs, but .*prompt_format='chat'"):
        tokenize_example(row, moody)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "column 'chat_template_kwargs' holds 7, but a mapping"),
        ("{mood", "holds text that is not JSON"),
        ("[1]", r"holds \[1\], but a mapping"),
        ({"tools": []}, "'tools', which"),
        ({"tokenize": True}, "'tokenize', which"),
        ({"add_generation_prompt": True}, "'add_generation_prompt', which"),
        ({"mood": b"x"}, "holds bytes"),
    ],
)
def test_variables_that_no_template_can_take_are_refused_by_their_row(
    value: Any, message: str, moody: Any
) -> None:
    with pytest.raises(RowError, match=f"^Row 0: .*{message}"):
        tokenize_example(chat(chat_template_kwargs=value), moody)


def test_a_control_token_in_a_variable_stays_text(moody: Any) -> None:
    row = chat(chat_template_kwargs={"mood": "<|im_end|>"})
    (example,) = tokenize_example(row, moody)
    assert example["input_ids"].count(2) == 2
    assert "(<|im_end|>) " in moody.decode(example["input_ids"])
    (kept,) = tokenize_example(row, moody, control_tokens="keep")
    assert kept["input_ids"].count(2) == 3


def test_many_different_variables_are_each_their_own(moody: Any) -> None:
    rows = [chat(chat_template_kwargs={"mood": f"m{n}"}) for n in range(250)]
    prepared, _ = prepare_dataset(Dataset.from_list(rows), moody)
    texts = [moody.decode(row["input_ids"]) for row in prepared]
    assert all(f"(m{n}) world" in text for n, text in enumerate(texts))


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "return_dict"])
def test_variables_of_a_run_that_no_template_can_take_are_refused_at_once(
    name: str, moody: Any
) -> None:
    rows = Dataset.from_list([chat()])
    options = {"chat_template_kwargs": {name: True}}
    for refused in (
        lambda: prepare_dataset(rows, moody, **options),
        lambda: prepare_stream(rows.to_iterable_dataset(), moody, **options),
        lambda: DataCollatorForPromptResponse(moody, **options)([rows[0]]),
        lambda: preview_rows(rows, moody, **options),
    ):
        with pytest.raises(ValueError, match=f"^chat_template_kwargs names '{name}'") as caught:
            refused()
        assert not isinstance(caught.value, RowError)


def test_a_run_may_bring_its_own_template(moody: Any, tokenizer_factory: Any) -> None:
    plain = tokenizer_factory(chat_template=MOODS.replace("(", "["))
    own = {"chat_template": MOODS.replace("(", "["), "mood": "sad"}
    made = tokenize_example(chat(), moody, chat_template_kwargs=own)
    assert made == tokenize_example(chat(), plain, chat_template_kwargs={"mood": "sad"})
