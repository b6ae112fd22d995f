"""Two setups are compared by the text that they train."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerFast

from hf_sft_plugin.preview.diff import compare_rows, diff_rows
from hf_sft_plugin.preview.preview import Piece, PreviewedExample, PreviewedRow, TokenizationSetup
from hf_sft_plugin.types import DataOptions, RowError

SHORT = {
    "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
}
LONG = {
    "messages": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "the answer is 42"},
    ]
}


def row_of(*examples: str, error: RowError | None = None) -> PreviewedRow:
    """A row whose text in angle quotes is trained: 'a {b} c'."""
    previewed = []
    for example in examples:
        pieces = []
        for number, text in enumerate(example.replace("}", "{").split("{")):
            trained = number % 2
            pieces += [Piece(character, (0,), (trained,), None) for character in text]
        previewed.append(PreviewedExample(tuple(pieces), ()))
    return PreviewedRow(0, tuple(previewed), 0, 0, error, None, "")


def differences(here: PreviewedRow, there: PreviewedRow) -> list[str]:
    change = compare_rows(here, there)
    assert change is not None
    return [("-" if part.here else "+") + part.text for part in change.changes]


def test_rows_that_are_trained_alike_do_not_differ() -> None:
    assert compare_rows(row_of("a {b} c"), row_of("a {b} c")) is None


def test_the_characters_that_only_one_trains_are_named_with_their_surroundings() -> None:
    change = compare_rows(
        row_of("user {one} user {two}"), row_of("user one user {two!}"[:-3] + "}")
    )
    assert change is not None
    (first, second) = change.changes
    assert (first.here, first.before, first.text, first.after) == (
        True,
        "user ",
        "one",
        " user two",
    )
    assert (second.here, second.text) == (True, "o")


def test_what_only_the_other_trains_is_told_apart() -> None:
    assert differences(row_of("a {b} c"), row_of("{a }b c")) == ["+a ", "-b"]


def test_the_same_responses_in_another_template_do_not_differ() -> None:
    assert compare_rows(row_of("user: a\n{yes}"), row_of("[INST] a [/INST]{yes}")) is None


def test_another_stop_token_is_the_only_difference() -> None:
    here, there = row_of("user: a\n{yes<|im_end|>}"), row_of("[INST] a [/INST]{yes</s>}")
    assert differences(here, there) == ["+</s>", "-<|im_end|>"] or differences(here, there) == [
        "-<|im_end|>",
        "+</s>",
    ]


def test_a_conversation_that_is_split_trains_the_same() -> None:
    here = row_of("a {b} c {d}")
    assert compare_rows(here, row_of("a {b}", "a b c {d}")) is None


def test_text_lost_at_the_end_is_named_exactly() -> None:
    assert differences(row_of("a {bcd}"), row_of("a {b}")) == ["-cd"]


def test_a_row_that_only_one_sets_aside_differs() -> None:
    error = RowError(0, "it is too long.", "too long")
    change = compare_rows(row_of("a {b}"), row_of(error=error))
    assert change is not None
    assert (change.here, change.there) == (None, error)
    assert [part.text for part in change.changes] == ["b"]


def test_changed_rows_are_counted_and_the_first_are_shown(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    num_tokens = len(tokenizer.apply_chat_template(SHORT["messages"])["input_ids"])
    there = TokenizationSetup(tokenizer, DataOptions(max_length=num_tokens))
    diff = diff_rows([SHORT, LONG, SHORT, LONG], TokenizationSetup(tokenizer), there, num_rows=1)
    assert (diff.num_rows, diff.num_changed) == (4, 2)
    (change,) = diff.rows
    assert change.row == 1
    (lost,) = change.changes
    assert lost.here
    assert lost.text.endswith("42<|im_end|>")


def test_another_tokenizer_with_the_same_template_trains_the_same_text(
    tokenizer: PreTrainedTokenizerFast, tokenizer_factory: Callable[..., Any]
) -> None:
    other = tokenizer_factory(
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    diff = diff_rows([SHORT, LONG], TokenizationSetup(tokenizer), TokenizationSetup(other))
    assert (diff.num_rows, diff.num_changed, diff.rows) == (2, 0, ())


def test_only_the_rows_asked_for_are_compared(tokenizer: PreTrainedTokenizerFast) -> None:
    setup = TokenizationSetup(tokenizer)
    rows = [{**SHORT, "source": "a"}, {**LONG, "source": "b"}]
    assert diff_rows(rows, setup, setup, source="a").num_rows == 1
    assert diff_rows(rows, setup, setup, containing="42").num_rows == 1
