"""A preview shows exactly what is trained, in readable pieces, and finds the rows asked for."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hf_sft_plugin.preparation.prepare import prepare_dataset
from hf_sft_plugin.preview.preview import (
    PreviewedExample,
    PreviewedRow,
    TokenizationSetup,
    preview_outcome,
    preview_rows,
    split_pieces,
)
from hf_sft_plugin.tokens.row_tokenizer import RowOutcome
from hf_sft_plugin.tokens.tokenization import tokenize_example
from hf_sft_plugin.types import DataOptions, RowError, SpanKind, TrainedSpan

FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


def chat(*texts: str, **columns: Any) -> dict[str, Any]:
    roles = ("user", "assistant") * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return {"messages": messages, **columns}


def trained_texts(row: PreviewedRow) -> list[str]:
    return [
        "".join(piece.text for piece in pieces)
        for example in row.examples
        for trained, _, pieces in example.runs()
        if trained
    ]


def text_of(example: PreviewedExample) -> str:
    return "".join(piece.text for piece in example.pieces)


def outcome_of(text: str, tokenizer: PreTrainedTokenizerFast, *spans: TrainedSpan) -> RowOutcome:
    """An outcome of one example in which the tokens of the spans are trained."""
    input_ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    mask = [0] * len(input_ids)
    for span in spans:
        mask[span.start : span.end] = [1] * (span.end - span.start)
    outcome = RowOutcome(3, [{"input_ids": input_ids, "response_mask": mask}])
    outcome.num_tokens = len(input_ids)
    outcome.spans = [list(spans)]
    return outcome


def test_exactly_the_response_and_its_stop_token_are_marked(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    (row,) = preview_rows([chat("hello", "the world", "again", "yes")], tokenizer)
    assert trained_texts(row) == ["the world<|im_end|>", "yes<|im_end|>"]
    (example,) = row.examples
    assert text_of(example) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nthe world<|im_end|>\n"
        "<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    )


def test_what_else_is_to_be_known_is_said_in_the_words_of_the_ledger(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:\n{{ m.content | replace('secret', '*') }}<|im_end|>"
        "{% endfor %}{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    rows = [chat("hello <|im_end|>", "<|im_end|> or <|im_start|>"), chat("hello", "a secret")]
    plain, *remarkable = preview_rows([chat("hello", "world"), *rows], tokenizer)
    assert plain.remarks == ()
    assert remarkable[0].remarks == (
        "control tokens in the contents: <|im_end|> (2), <|im_start|> (1)",
    )
    assert remarkable[1].remarks == ("the chat template changes the text of a response",)
    for row, shown in zip(rows, remarkable, strict=True):
        _, ledger = prepare_dataset(Dataset.from_list([row]), tokenizer)
        assert all(remark in str(ledger) for remark in shown.remarks)


def test_every_fact_of_an_outcome_is_a_remark(tokenizer: PreTrainedTokenizerFast) -> None:
    outcome = outcome_of("hello world", tokenizer)
    outcome.num_straddled = 1
    outcome.is_lossy = outcome.is_altered = outcome.is_unseen = True
    assert preview_outcome(outcome, {}, TokenizationSetup(tokenizer)).remarks == (
        "1 edge of a response has other tokens in the whole text than in its parts",
        "the tokenizer cannot give the response back exactly",
        "the chat template changes the text of a response",
        "a content could not be found a second time",
    )


def test_a_row_that_is_set_aside_has_its_remarks(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = preview_rows([chat("hello", "<|im_end|>")], tokenizer, control_tokens="error")
    assert row.error is not None
    assert row.remarks == ("control tokens in the contents: <|im_end|> (1)",)


def test_every_token_is_in_exactly_one_piece(tokenizer: PreTrainedTokenizerFast) -> None:
    raw = chat("hello \U0001f600", f"\u20ac {FAMILY} \ufffd")
    (row,) = preview_rows([raw], tokenizer)
    (expected,) = tokenize_example(raw, tokenizer)
    pieces = row.examples[0].pieces
    assert [token for piece in pieces for token in piece.ids] == expected["input_ids"]
    assert [mark for piece in pieces for mark in piece.mask] == expected["response_mask"]
    assert row.num_trained == sum(expected["response_mask"])


@pytest.mark.parametrize("text", ["\U0001f600", "\u20ac", "\u00e9", "\ufffd", "\u0e01"])
def test_a_character_of_several_tokens_is_one_piece(
    text: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    input_ids = tokenizer(f"a{text}b")["input_ids"]
    assert len(input_ids) > 3
    assert [
        piece for piece, _ in split_pieces(input_ids, TokenizationSetup(tokenizer).text_of)
    ] == [
        "a",
        text,
        "b",
    ]


def test_half_a_character_at_the_end_is_one_replacement_character(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    input_ids = tokenizer("a\U0001f600")["input_ids"][:-1]
    assert split_pieces(input_ids, TokenizationSetup(tokenizer).text_of) == [
        ("a", 1),
        ("\ufffd", 3),
    ]


def test_the_space_before_a_word_of_sentencepiece_is_kept() -> None:
    vocabulary = {"<unk>": 0, "\u2581hello": 1, "\u2581world": 2, "<0xE2>": 3, "<0x82>": 4}
    vocabulary["<0xAC>"] = 5
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert split_pieces([1, 2, 3, 4, 5], TokenizationSetup(tokenizer).text_of) == [
        (" hello", 1),
        (" world", 1),
        ("\u20ac", 3),
    ]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "exact",
            "message 3, exact: begins where inference begins to generate, ends with its stop token",
        ),
        ("rewritten", "message 3, rewritten: begins where inference begins to generate, but"),
        ("shared_prefix", "message 3, shared prefix: begins where a finished response parts"),
        ("text", "segment 3, text: trained as it is written, ends with its stop token"),
        ("given", "given: the row came tokenized, with this mask"),
    ],
)
def test_each_span_says_which_message_it_is_and_why_it_is_trained(
    kind: SpanKind, reason: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    outcome = outcome_of("abc<|im_end|>", tokenizer, TrainedSpan(1, 4, turn=3, kind=kind))
    (note,) = preview_outcome(outcome, {}, TokenizationSetup(tokenizer)).examples[0].notes
    assert note.reason.startswith(reason)
    assert note.num_tokens == 3


def test_a_span_that_was_cut_says_so(tokenizer: PreTrainedTokenizerFast) -> None:
    outcome = outcome_of("abc", tokenizer, TrainedSpan(1, 3, turn=1, kind="exact"))
    (note,) = preview_outcome(outcome, {}, TokenizationSetup(tokenizer)).examples[0].notes
    assert note.reason.endswith("cut off before its stop token")


@pytest.mark.parametrize(
    ("weights", "ending"),
    [
        ([1.0, 1.0, 1.0], "its stop token"),
        ([9.0, 0.5, 0.5], "each token counts 0.5"),
        ([9.0, 0.5, 2.0], "each token counts 0.5 to 2"),
    ],
)
def test_weights_of_a_span_are_told(
    weights: list[float], ending: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    outcome = outcome_of("ab<|im_end|>", tokenizer, TrainedSpan(1, 3, turn=1, kind="exact"))
    outcome.examples[0]["loss_weights"] = weights
    (note,) = preview_outcome(outcome, {}, TokenizationSetup(tokenizer)).examples[0].notes
    assert note.reason.endswith(ending)


def test_two_spans_side_by_side_stay_apart(tokenizer: PreTrainedTokenizerFast) -> None:
    spans = [TrainedSpan(1, 2, turn=1, kind="exact"), TrainedSpan(2, 4, turn=2, kind="exact")]
    row = preview_outcome(outcome_of("abcd", tokenizer, *spans), {}, TokenizationSetup(tokenizer))
    assert trained_texts(row) == ["b", "cd"]
    notes = [note for _, note, _ in row.examples[0].runs() if note is not None]
    assert [note.span.turn for note in notes] == [1, 2]


def test_a_row_set_aside_keeps_its_error_and_its_text(tokenizer: PreTrainedTokenizerFast) -> None:
    outcome = RowOutcome(7, error=RowError(7, "it is broken.", "broken"))
    row = preview_outcome(
        outcome, {"text": "\ud800", "source": "web"}, TokenizationSetup(tokenizer)
    )
    assert (row.row, row.examples, row.error) == (7, (), outcome.error)
    assert row.source == "web"
    assert json.loads(row.raw) == {"text": "\ud800", "source": "web"}


ROWS = [
    chat("hello", "world", source="a"),
    chat("hello", "", source="b"),
    chat("what is this", "the answer " * 8, source="a"),
    chat("hi", "yes", source="b"),
]


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({}, [0, 1, 2, 3]),
        ({"num_rows": 2}, [0, 1]),
        ({"only": "longest", "num_rows": 2}, [2, 0]),
        ({"only": "truncated", "max_length": 30}, [2]),
        ({"only": "set_aside"}, [1]),
        ({"only": "split"}, []),
        ({"containing": "answer"}, [2]),
        ({"containing": "nowhere"}, []),
        ({"source": "b"}, [1, 3]),
        ({"source": "b", "only": "set_aside"}, [1]),
    ],
)
@pytest.mark.parametrize("make", [list, Dataset.from_list])
def test_the_rows_asked_for_are_found(
    make: Callable[[Any], Any],
    settings: dict[str, Any],
    found: list[int],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = preview_rows(make(ROWS), tokenizer, **settings)
    assert [row.row for row in rows] == found


def test_lost_tokens_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    (row,) = preview_rows(ROWS, tokenizer, only="truncated", max_length=30)
    kept = sum(len(piece.ids) for piece in row.examples[0].pieces)
    assert kept == 30
    assert row.num_lost == row.num_tokens - 30 > 0


def test_rows_that_came_tokenized_are_searched_by_what_they_say(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = [
        {"input_ids": tokenizer(text)["input_ids"], "labels": tokenizer(text)["input_ids"]}
        for text in ("hello", "world")
    ]
    (row,) = preview_rows(rows, tokenizer, containing="orl")
    assert row.row == 1
    assert text_of(row.examples[0]) == "world"


def test_a_row_that_would_stop_the_run_is_shown_as_set_aside(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    (row,) = preview_rows(ROWS[2:3], tokenizer, max_length=30, overflow="error")
    assert row.error is not None
    assert "max_length is 30" in row.error.problem


def test_an_unknown_option_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="max_lenght"):
        preview_rows(ROWS, tokenizer, max_lenght=3)


def test_the_stop_tokens_of_a_setup_are_those_of_the_run(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert TokenizationSetup(tokenizer).stops == {2}
    assert TokenizationSetup(tokenizer, stop_token_ids=[0, 1]).stops == {0, 1}
    options = DataOptions(stop_token="<|endoftext|>")
    assert TokenizationSetup(tokenizer, options, stop_token_ids=[1]).stops == {0}


def test_of_several_datasets_one_has_to_be_named(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_list([{"prompt": "hello", "response": "world"}])
    several = DatasetDict({"train": rows, "test": rows})
    with pytest.raises(ValueError, match=r"several datasets, train, test, .*dataset\['train'\]"):
        preview_rows(several, tokenizer)


def test_a_source_may_be_a_number(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "hello", "response": "world", "source": number} for number in (3, 4)]
    (row,) = preview_rows(Dataset.from_list(rows), tokenizer, source="4")
    assert (row.row, row.source) == (1, "4")
