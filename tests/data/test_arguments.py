"""What is not what was asked for is refused everywhere, with the line to write."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    prepare_dataset,
    preview_rows,
    tokenize_example,
)
from hf_sft_plugin.data.arguments import refuse_name
from hf_sft_plugin.data.streaming import prepare_stream

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
