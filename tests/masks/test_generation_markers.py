"""Markers in a chat template are a witness: where they deny the mask, the row is set aside."""

from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from hf_sft_plugin import prepare_dataset
from hf_sft_plugin.masks.generation_markers import marked_ranges
from hf_sft_plugin.types import Conversation, DataOptions, Turn

LOOP = "{{% for m in messages %}}{}{{% endfor %}}"
OPEN = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HEAD, BODY = "<|im_start|>{{ m.role }}\n", "{{ m.content }}"
ON, OFF = "{% generation %}", "{% endgeneration %}"
IF, ELSE, END = "{% if m.role == 'assistant' %}", "{% else %}", "{% endif %}"
PLAIN = HEAD + BODY + "<|im_end|>\n"
NARROW = IF + HEAD + ON + BODY + OFF + "<|im_end|>\n" + ELSE + PLAIN + END
WIDE = IF + ON + PLAIN + OFF + ELSE + PLAIN + END
APART = IF + HEAD + ON + "{{ m.content[:2] }}" + OFF + ON + "{{ m.content[2:] }}<|im_end|>" + OFF
APART += "{{ '\n' }}" + ELSE + PLAIN + END
EVERYTHING = ON + PLAIN + OFF
NOT_EARLIER = "{% if m.role == 'assistant' and loop.last %}" + NARROW[len(IF) :]
ONE_TOO_FEW = IF + HEAD + ON + "{{ m.content[:-1] }}" + OFF + "{{ m.content[-1] }}<|im_end|>\n"
ONE_TOO_FEW += ELSE + PLAIN + END
REASON = "generation markers disagree with the mask"
CHAT = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hello world"},
    {"role": "user", "content": "again"},
    {"role": "assistant", "content": "this answer"},
]


@pytest.fixture
def prepare(tokenizer_factory: Callable[..., Any]) -> Callable[..., Any]:
    def run(template: str, chats: list[Any] | None = None, **options: Any) -> Any:
        tokenizer = tokenizer_factory(chat_template=LOOP.format(template) + OPEN)
        rows = Dataset.from_list([{"messages": chat} for chat in chats or [CHAT]])
        return prepare_dataset(rows, tokenizer, **options)

    return run


def test_marked_characters_are_those_that_transformers_reports(
    tokenizer_factory: Callable[..., Any],
) -> None:
    conversation = Conversation(tuple(Turn(m, m["role"] == "assistant") for m in CHAT))
    found = []
    for template in (NARROW, WIDE, APART, PLAIN):
        tokenizer = tokenizer_factory(chat_template=LOOP.format(template) + OPEN)
        text = tokenizer.apply_chat_template(CHAT, tokenize=False)
        ranges = marked_ranges(conversation, 4, text, tokenizer, DataOptions())
        found.append([text[start:end] for start, end in ranges])
        assert marked_ranges(conversation, 4, text + " ", tokenizer, DataOptions()) == []
    header, stop = "<|im_start|>assistant\n", "<|im_end|>"
    said = [CHAT[1]["content"], CHAT[3]["content"]]
    assert found == [
        said,
        [f"{header}{text}{stop}\n" for text in said],
        [f"{text}{stop}" for text in said],
        [],
    ]


@pytest.mark.parametrize("template", [NARROW, WIDE, APART])
def test_markers_around_the_content_agree_with_the_mask_however_wide(
    template: str, prepare: Callable[..., Any]
) -> None:
    marked, _ = prepare(template)
    plain, _ = prepare(PLAIN)
    assert marked[:] == plain[:]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (EVERYTHING, "reach into the content of message 0 (user)"),
        (NOT_EARLIER, "leave out the content of message 1 (assistant)"),
        (ONE_TOO_FEW, "leave out the content of message 1 (assistant)"),
    ],
)
def test_rows_are_set_aside_and_counted_where_markers_deny_the_mask(
    template: str, words: str, prepare: Callable[..., Any]
) -> None:
    # With the text of a tag, a chat takes the full way; the others would share a shape.
    odd = [{**message, "content": f"<{message['content']}>"} for message in CHAT]
    with pytest.raises(ValueError, match="6 of 6 rows cannot be trained") as caught:
        prepare(template, [CHAT] * 5 + [odd])
    assert f"6 rows, {REASON}" in str(caught.value)
    assert words in str(caught.value)
    assert "take them out of the template" in str(caught.value)


def test_only_what_is_trained_has_to_be_marked(prepare: Callable[..., Any]) -> None:
    _, ledger = prepare(NOT_EARLIER, train_on="last_response")
    assert ledger.num_rows_trained == 1
    _, ledger = prepare(EVERYTHING, train_roles=["user", "assistant"])
    assert ledger.num_rows_trained == 1
    _, ledger = prepare(EVERYTHING, train_on="all")
    assert ledger.num_rows_trained == 1


def test_what_the_markers_deny_at_a_trial_is_asked_of_every_row_of_its_shape(
    prepare: Callable[..., Any],
) -> None:
    # What is marked depends on the content, which no placeholder can show.
    template = IF + HEAD + "{% if 'world' in m.content %}" + BODY + ELSE + ON + BODY + OFF + END
    chats = [CHAT[2:]] * 2 + [CHAT[:2] + CHAT[2:]] * 8
    _, ledger = prepare(template + "<|im_end|>\n" + ELSE + PLAIN + END, chats, max_dropped_share=1)
    assert ledger.drops[REASON].num_rows == 8
    assert ledger.num_rows_trained == 2


def test_rows_of_one_shape_ask_the_markers_once_and_at_the_audits(
    prepare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    num_asked = 0

    def count(*args: Any) -> Any:
        nonlocal num_asked
        num_asked += 1
        return marked_ranges(*args)

    monkeypatch.setattr("hf_sft_plugin.masks.rendering.marked_ranges", count)
    prepare(NARROW, [CHAT] * 250)
    # The first row, one for the shape, three trials, and the hundredth and two hundredth rows.
    assert num_asked == 7
