"""What is not what was asked for is refused everywhere, with the line to write."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    mix_datasets,
    pack_dataset,
    prepare_dataset,
    preview_rows,
    tokenize_example,
    write_shards,
)
from hf_sft_plugin.preparation.streaming import prepare_stream
from hf_sft_plugin.rows.arguments import refuse_name

ROW = {"prompt": "hello", "response": "world"}
ROWS = Dataset.from_list([ROW])
CALLS = {
    "prepare_dataset": lambda tokenizer: prepare_dataset(ROWS, tokenizer),
    "prepare_stream": lambda tokenizer: prepare_stream(ROWS.to_iterable_dataset(), tokenizer),
    "tokenize_example": lambda tokenizer: tokenize_example(ROW, tokenizer),
    "preview_rows": lambda tokenizer: preview_rows(ROWS, tokenizer),
    "collator": lambda tokenizer: DataCollatorForPromptResponse(tokenizer),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_name_in_place_of_a_tokenizer_is_refused_with_the_line_that_loads_it(
    call: Any, tokenizer: Any, tmp_path: Path
) -> None:
    for name in (str(tmp_path), tmp_path):
        with pytest.raises(ValueError, match=r"tokenizer is .*, but a tokenizer itself") as caught:
            call(name)
        assert str(caught.value).endswith(
            f"Write AutoTokenizer.from_pretrained({str(tmp_path)!r})."
        )
    tokenizer.save_pretrained(tmp_path)
    call(AutoTokenizer.from_pretrained(str(tmp_path)))
    with pytest.raises(ValueError, match=r"tokenizer is a dict, .* needs a tokenizer"):
        call({})


@pytest.mark.parametrize("function", [prepare_dataset, preview_rows])
@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("gsm8k", "datasets.load_dataset('gsm8k', split='train')"),
        (Path("a/b"), "datasets.load_dataset('a/b', split='train')"),
        ("a.jsonl", "datasets.load_dataset('json', data_files='a.jsonl', split='train')"),
        ("a.csv", "datasets.load_dataset('csv', data_files='a.csv', split='train')"),
    ],
)
def test_a_name_in_place_of_rows_is_refused_with_the_line_that_loads_them(
    function: Any, name: Any, line: str, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=r"dataset is '.*', but the rows themselves") as caught:
        function(name, tokenizer)
    assert str(caught.value).endswith(f"Write {line}.")


def test_of_several_sets_the_one_that_is_a_name_is_named() -> None:
    refuse_name({"web": ROWS, "more": [ROW]}, "eval_dataset")
    with pytest.raises(ValueError, match=r"^eval_dataset\['web'\] is 'gsm8k', but"):
        refuse_name({"more": ROWS, "web": "gsm8k"}, "eval_dataset")


@pytest.mark.parametrize("row", ["hello", [ROW], None])
def test_what_is_no_row_is_refused(row: Any, tokenizer: Any) -> None:
    message = f"is {type(row).__name__}, but a row is a dict of columns"
    with pytest.raises(ValueError, match=f"^example {message}"):
        tokenize_example(row, tokenizer)
    with pytest.raises(ValueError, match=f"^Row 1 of the dataset {message}"):
        preview_rows([ROW, row], tokenizer)
    with pytest.raises(ValueError, match=f"^Row 1 of the batch {message}"):
        DataCollatorForPromptResponse(tokenizer)([ROW, row])


def test_a_single_row_is_no_dataset(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"^dataset is a single row, .* Write \[row\]\.$"):
        preview_rows(ROW, tokenizer)  # type: ignore[arg-type]


def test_an_unknown_filter_names_the_known_ones(tokenizer: Any) -> None:
    known = "None, 'longest', 'truncated', 'set_aside', 'split'"
    with pytest.raises(ValueError, match=rf"^only is 'short', .* one of {known}\.$"):
        preview_rows(ROWS, tokenizer, only="short")  # type: ignore[arg-type]


def shout(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return {**batch, "response": [text.upper() for text in batch["response"]]}


@pytest.mark.parametrize("place", ["prepare", "two processes", "preview", "mix", "pack", "shards"])
def test_a_transform_is_refused_with_the_cure_wherever_rows_are_stored(
    place: str, tokenizer: Any, tmp_path: Path
) -> None:
    prepared = prepare_dataset(ROWS, tokenizer)[0]
    calls: dict[str, Any] = {
        "prepare": lambda: prepare_dataset(ROWS.with_transform(shout), tokenizer),
        "two processes": lambda: prepare_dataset(ROWS.with_transform(shout), tokenizer, num_proc=2),
        "preview": lambda: preview_rows(ROWS.with_transform(shout), tokenizer),
        "mix": lambda: mix_datasets({"a": prepared, "b": prepared.with_transform(shout)}),
        "pack": lambda: pack_dataset(prepared.with_transform(shout), max_length=8),
        "shards": lambda: write_shards(
            tmp_path / "shards", {"train": prepared.with_transform(shout)}, tokenizer
        ),
    }
    with pytest.raises(
        ValueError, match=r"has a transform.*with_format\(None\)\.map\(transform"
    ) as e:
        calls[place]()
    # Shards are written and datasets mixed where no Trainer is involved.
    has_trainer = place not in ("mix", "shards")
    assert ("to a Trainer" in str(e.value)) == has_trainer
    assert ("remove_unused_columns=False" in str(e.value)) == has_trainer


def test_the_cure_for_a_transform_trains_what_it_makes(tokenizer: Any) -> None:
    cured = ROWS.with_transform(shout).with_format(None).map(shout, batched=True)
    expected = tokenize_example({**ROW, "response": "WORLD"}, tokenizer)
    assert prepare_dataset(cured, tokenizer)[0].to_list() == expected


def test_a_collator_collates_what_a_transform_made(tokenizer: Any) -> None:
    collator = DataCollatorForPromptResponse(tokenizer)
    made = collator([ROWS.with_transform(shout)[0]])
    assert (
        made["input_ids"].tolist() == collator([{**ROW, "response": "WORLD"}])["input_ids"].tolist()
    )


@pytest.mark.parametrize("kind", ["numpy", "torch", "arrow", None])
def test_rows_are_read_as_they_are_stored_whatever_their_format(kind: Any, tokenizer: Any) -> None:
    expected = tokenize_example({**ROW, "weight": 0.5}, tokenizer)
    rows = Dataset.from_list([{**ROW, "weight": 0.5}]).with_format(kind)
    assert prepare_dataset(rows, tokenizer)[0].to_list() == expected
    (row,) = preview_rows(rows, tokenizer)
    assert "each token counts 0.5" in row.examples[0].notes[0].reason


@pytest.mark.parametrize("kind", ["numpy", "torch", None])
def test_streams_too_are_read_as_they_are_stored(kind: Any, tokenizer: Any) -> None:
    expected = tokenize_example({**ROW, "weight": 0.5}, tokenizer)
    stream = Dataset.from_list([{**ROW, "weight": 0.5}]).to_iterable_dataset().with_format(kind)
    (made,) = prepare_stream(stream, tokenizer)
    assert [{name: made[name] for name in expected[0]}] == expected


def test_columns_that_a_format_hides_play_no_part(tokenizer: Any) -> None:
    rows = Dataset.from_list([{**ROW, "weight": 0.5, "url": "a"}])
    shown = rows.with_format("torch", columns=["prompt", "response"])
    prepared, ledger = prepare_dataset(shown, tokenizer)
    assert prepared.to_list() == tokenize_example(ROW, tokenizer)
    assert ledger.unused_columns == []
    whole = rows.with_format("torch", columns=["prompt"], output_all_columns=True)
    assert prepare_dataset(whole, tokenizer)[1].unused_columns == ["url"]
