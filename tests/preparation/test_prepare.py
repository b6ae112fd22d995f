"""A whole dataset is prepared, and every row and every token of it is accounted for."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from hf_sft_plugin import RowError, prepare_dataset, tokenize_example
from hf_sft_plugin.preparation import certificate
from hf_sft_plugin.preparation import prepare as prepare_module
from hf_sft_plugin.preparation.ledger import Ledger
from hf_sft_plugin.preparation.prepare import name_in_errors
from hf_sft_plugin.tokens.tokenization import make_options, tokenize_rows

GOOD = {"prompt": "hello", "response": "world"}


def prepare(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> Any:
    return prepare_dataset(Dataset.from_list(rows), tokenizer, **options)


def tokenized(num_prompt: int, num_response: int) -> dict[str, Any]:
    return {
        "input_ids": list(range(5, 5 + num_prompt + num_response)),
        "response_mask": [0] * num_prompt + [1] * num_response,
    }


def test_the_rows_are_those_of_the_tokenizer_in_their_order(
    tokenizer: Any, chat_rows: list[dict[str, Any]]
) -> None:
    dataset, ledger = prepare(chat_rows, tokenizer)
    assert dataset.column_names == ["input_ids", "response_mask"]
    assert dataset.to_list() == [tokenize_example(row, tokenizer)[0] for row in chat_rows]
    num_tokens = sum(len(row["input_ids"]) for row in dataset)
    num_response_tokens = sum(sum(row["response_mask"]) for row in dataset)
    assert ledger.certificate.pop("num_examples") == 8
    assert ledger == Ledger(
        certificate=ledger.certificate,
        columns="messages: messages",
        num_stopped=8,
        spans={"exact": 12},
        num_rows=8,
        num_rows_trained=8,
        num_examples=8,
        num_tokens=num_tokens,
        num_response_tokens=num_response_tokens,
        num_context_tokens=num_tokens - num_response_tokens,
        longest=max(len(row["input_ids"]) for row in dataset),
    )
    assert ledger.trained_share == num_response_tokens / num_tokens


def test_the_ledger_of_known_rows_is_as_counted_by_hand(tokenizer: Any) -> None:
    rows = [tokenized(3, 3), tokenized(3, 5), tokenized(6, 2), tokenized(4, 0), tokenized(1, 1)]
    dataset, ledger = prepare(rows, tokenizer, max_length=6, max_dropped_share=0.5)
    assert [len(row["input_ids"]) for row in dataset] == [6, 6, 2]
    late = ledger.drops.pop("no response left within max_length")
    never = ledger.drops.pop("no trained token")
    assert (late.num_rows, late.num_tokens, late.first_rows) == (1, 8, [2])
    assert (never.num_rows, never.num_tokens, never.first_rows) == (1, 4, [3])
    assert late.example.startswith("Row 2: the response begins after the first 6 tokens of 8")
    assert never.example.startswith("Row 3: no token of the row is trained")
    assert ledger == Ledger(
        certificate=ledger.certificate,
        columns="tokenized: input_ids, response_mask",
        spans={"given": 3},
        num_rows=5,
        num_rows_trained=3,
        num_examples=3,
        num_rows_truncated=1,
        num_tokens=28,
        num_response_tokens=7,
        num_context_tokens=7,
        num_truncated_tokens=2,
        longest=6,
        max_length=6,
    )


def test_responses_cut_before_their_stop_token_are_counted(tokenizer: Any) -> None:
    _, ledger = prepare([GOOD, {**GOOD, "response": "9" * 40}], tokenizer, max_length=12)
    assert (ledger.num_stopped, ledger.num_cut_before_stop) == (1, 1)
    assert ledger.to_dict()["num_cut_before_stop"] == 1
    assert "        50.0% lost theirs to truncation" in str(ledger).splitlines()


@pytest.mark.parametrize(("pad", "is_pad_eos"), [("<|im_end|>", True), ("<|endoftext|>", False)])
def test_padding_with_the_eos_token_is_noted(
    pad: str, is_pad_eos: bool, tokenizer_factory: Callable[..., Any]
) -> None:
    _, ledger = prepare([GOOD], tokenizer_factory(pad_token=pad))
    assert ledger.is_pad_eos == is_pad_eos
    assert ("pad is the eos token too" in str(ledger)) == is_pad_eos


def test_without_a_pad_token_rows_are_padded_with_the_eos_token(
    tokenizer_factory: Callable[..., Any],
) -> None:
    _, ledger = prepare([GOOD], tokenizer_factory(pad_token=None))
    assert ledger.is_pad_eos


@pytest.mark.parametrize("num_bad", [1, 5])
def test_a_twentieth_of_the_rows_may_be_dropped(num_bad: int, tokenizer: Any) -> None:
    rows = [GOOD] * (100 - num_bad) + [{**GOOD, "response": " "}] * num_bad
    dataset, ledger = prepare(rows, tokenizer)
    assert (len(dataset), ledger.num_rows_dropped) == (100 - num_bad, num_bad)


def test_more_bad_rows_than_allowed_stop_the_run_and_are_named(tokenizer: Any) -> None:
    rows = [GOOD] * 94 + [{**GOOD, "response": " "}] * 5 + [{**GOOD, "response": None}]
    with pytest.raises(ValueError, match=r"6 of 100 rows cannot be trained") as info:
        prepare(rows, tokenizer)
    message = str(info.value)
    assert "- 5 rows, empty response: Row 94: the response is empty" in message
    assert "- 1 row, response is NoneType, not text: Row 99: column 'response' holds" in message
    assert message.endswith("allow more than 5% of them to be dropped with max_dropped_share.")
    assert len(prepare(rows, tokenizer, max_dropped_share=0.06)[0]) == 94


def test_a_dataset_without_a_trained_token_is_refused_whatever_is_allowed(tokenizer: Any) -> None:
    rows = [tokenized(4, 0)] * 3
    with pytest.raises(ValueError, match="3 of 3 rows cannot be trained, so nothing is left"):
        prepare(rows, tokenizer, max_dropped_share=1.0)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"prompt": [], "response": []}), "The dataset is empty"),
        (Dataset.from_list([{"words": "hello"}]), "No known format.*The columns are words"),
        (Dataset.from_list([{"prompt": "a"}]), "no column 'response'.*The columns are prompt"),
        (
            Dataset.from_list([{**GOOD, "messages": []}]),
            "both a prompt and a messages column",
        ),
        (IterableDataset.from_generator(lambda: iter([GOOD])), "streaming dataset cannot be"),
        (DatasetDict({"train": Dataset.from_list([GOOD])}), "is a DatasetDict.*give each split by"),
        ([GOOD], "dataset is a list, but a datasets.Dataset is needed"),
    ],
)
def test_a_dataset_that_is_none_is_refused(dataset: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_dataset(dataset, tokenizer)


def test_a_row_that_may_not_be_cut_is_named_by_its_place_in_the_dataset(tokenizer: Any) -> None:
    rows = [tokenized(2, 2)] * 1200 + [tokenized(2, 9)]
    with pytest.raises(RowError, match="Row 1200: the row has 11 tokens, but max_length is 4"):
        prepare(rows, tokenizer, max_length=4, overflow="error")


def test_weights_and_source_come_along_and_other_columns_do_not(tokenizer: Any) -> None:
    row = {**tokenized(1, 2), "loss_weights": [0.0, 1.0, 0.5], "source": "book", "id": 7}
    dataset, _ = prepare([row], tokenizer)
    assert dataset.to_list() == [{name: value for name, value in row.items() if name != "id"}]


def test_a_prepared_dataset_prepared_again_is_the_same(
    tokenizer: Any, chat_rows: list[dict[str, Any]]
) -> None:
    once, ledger = prepare(chat_rows, tokenizer)
    twice, again = prepare_dataset(once, tokenizer)
    assert twice.to_list() == once.to_list()
    assert again.certificate["masks_sha256"] == ledger.certificate["masks_sha256"]
    assert again.num_tokens == ledger.num_tokens


def test_the_format_of_the_users_dataset_does_not_matter(
    tokenizer: Any, chat_rows: list[dict[str, Any]]
) -> None:
    rows = [tokenized(3, 3), tokenized(2, 5)]
    dataset = Dataset.from_list(rows)
    assert prepare_dataset(dataset.with_format("torch"), tokenizer)[0].to_list() == rows
    assert prepare_dataset(dataset.with_format("numpy"), tokenizer)[0].to_list() == rows


def test_two_processes_give_the_rows_and_the_ledger_of_one(
    tokenizer_factory: Callable[..., Any], chat_rows: list[dict[str, Any]]
) -> None:
    tokenizer = tokenizer_factory()
    rows = [*chat_rows, {"messages": []}, *chat_rows]
    one = prepare(rows, tokenizer, max_length=20, max_dropped_share=0.9)
    two = prepare(rows, tokenizer, max_length=20, max_dropped_share=0.9, num_proc=2)
    assert one[1].drops
    assert one[1].num_truncated_tokens
    assert two[0].to_list() == one[0].to_list()
    assert two[1] == one[1]


def test_weights_are_a_column_just_when_some_row_has_them(tokenizer: Any) -> None:
    weighted = {**tokenized(1, 2), "loss_weights": [1.0, 1.0, 0.5]}
    without = {**tokenized(1, 1), "loss_weights": None}
    assert prepare([without], tokenizer)[0].column_names == ["input_ids", "response_mask"]
    dataset, _ = prepare([without, weighted], tokenizer)
    assert dataset["loss_weights"][:] == [None, [1.0, 1.0, 0.5]]
    # Every response counts 1 unless its row says otherwise.
    rows = [{**GOOD, "weight": 1.0}, {**GOOD, "weight": 1.0}]
    assert "loss_weights" not in prepare(rows, tokenizer)[0].column_names
    rows[1]["weight"] = 0.5
    dataset, _ = prepare(rows, tokenizer)
    assert dataset["loss_weights"][0] is None
    marked = zip(dataset["response_mask"][1], dataset["loss_weights"][1], strict=True)
    assert {weight for mark, weight in marked if mark} == {0.5}


def test_the_source_of_each_row_stays_with_it(tokenizer: Any) -> None:
    rows = [
        {**GOOD, "source": "book"},
        {**GOOD, "response": "", "source": "dropped"},
        {**GOOD, "source": None},
        {**GOOD, "source": "web"},
    ]
    dataset, _ = prepare(rows, tokenizer, max_dropped_share=0.5)
    assert dataset["source"][:] == ["book", None, "web"]
    numbered, _ = prepare_dataset(Dataset.from_list([{**GOOD, "source": 3}]), tokenizer)
    assert numbered["source"][:] == ["3"]
    long = {**tokenized(1, 5), "source": "book"}
    dataset, ledger = prepare([long], tokenizer, max_length=3, overflow="split")
    assert dataset["source"][:] == ["book", "book"]
    assert (ledger.num_rows_trained, ledger.num_examples) == (1, 2)


@pytest.fixture
def rows_on_disk(chat_rows: list[dict[str, Any]], tmp_path: Path) -> Any:
    """Rows whose preparation is cached: those that were made in memory are not."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_rows), encoding="utf-8")
    return Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))


def refuse_to_tokenize(*_: Any, **__: Any) -> None:
    raise RuntimeError("not in the cache")


def files_of(dataset: Any) -> list[str]:
    return [file["filename"] for file in dataset.cache_files]


def test_a_cached_pass_has_the_ledger_of_the_first(
    tokenizer: Any, rows_on_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, ledger = prepare_dataset(rows_on_disk, tokenizer, max_length=20, max_dropped_share=0.9)
    monkeypatch.setattr(prepare_module, "_prepare_batch", refuse_to_tokenize)
    again, of_cache = prepare_dataset(rows_on_disk, tokenizer, max_length=20, max_dropped_share=0.9)
    assert files_of(again) == files_of(first)
    assert again.to_list() == first.to_list()
    assert of_cache == ledger
    assert str(of_cache) == str(ledger)


def test_a_tokenizer_that_has_padded_and_cut_in_between_still_hits_the_cache(
    tokenizer: Any, rows_on_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, ledger = prepare_dataset(rows_on_disk, tokenizer)
    monkeypatch.setattr(prepare_module, "_prepare_batch", refuse_to_tokenize)
    tokenizer(["a", "hello world"], padding=True, truncation=True, max_length=2)
    again, of_cache = prepare_dataset(rows_on_disk, tokenizer)
    assert (again.to_list(), of_cache) == (first.to_list(), ledger)


def test_a_tokenizer_that_pads_and_cuts_prepares_the_same_rows(
    tokenizer: Any, tokenizer_factory: Callable[..., Any], chat_rows: list[dict[str, Any]]
) -> None:
    used = tokenizer_factory()
    used(["a", "hello world"], padding="max_length", truncation=True, max_length=3)
    for rows in (chat_rows, [GOOD, {**GOOD, "prompt": "a longer one"}]):
        expected, ledger = prepare(rows, tokenizer)
        found, of_used = prepare(rows, used)
        assert (found.to_list(), of_used) == (expected.to_list(), ledger)


def test_changed_code_does_not_meet_an_old_cache(
    tokenizer: Any, rows_on_disk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = prepare_dataset(rows_on_disk, tokenizer)
    monkeypatch.setattr(certificate, "code_digest", lambda: "other")
    again, _ = prepare_dataset(rows_on_disk, tokenizer)
    assert files_of(again) != files_of(first)
    assert again.to_list() == first.to_list()


OTHER_PROCESS = """
import sys
from pathlib import Path
from datasets import Dataset
from transformers import AutoTokenizer
from hf_sft_plugin.preparation import prepare
folder = Path(sys.argv[1])
rows = Dataset.from_json(str(folder / "rows.jsonl"), cache_dir=str(folder / "cache"))
def refuse_to_tokenize(*args, **kwargs):
    raise RuntimeError("not in the cache")
prepare._prepare_batch = refuse_to_tokenize
dataset, ledger = prepare.prepare_dataset(rows, AutoTokenizer.from_pretrained(folder / "tokenizer"))
print([file["filename"] for file in dataset.cache_files], ledger.certificate["masks_sha256"])
"""


def test_another_process_finds_the_cache_of_this_one(
    tokenizer: Any, rows_on_disk: Any, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    command = [sys.executable, "-c", OTHER_PROCESS, str(tmp_path)]
    room = Path(certificate.__file__).parents[2]
    # Without a cache there is nothing for it to find, and it cannot tokenize.
    failed = subprocess.run(command, check=False, capture_output=True, text=True, cwd=room)
    assert "RuntimeError: not in the cache" in failed.stderr
    dataset, ledger = prepare_dataset(rows_on_disk, loaded)
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=room)
    expected = f"{files_of(dataset)} {ledger.certificate['masks_sha256']}"
    assert found.stdout.splitlines()[-1] == expected


TURN = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "assistant", "system"]),
        "content": st.text(max_size=30) | st.just("\ud83d"),
    }
)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.lists(st.lists(TURN, max_size=5), min_size=1, max_size=8),
    max_length=st.none() | st.integers(2, 60),
    overflow=st.sampled_from(["keep_start", "drop"]),
)
def test_whatever_the_rows_every_one_and_every_token_is_accounted_for(
    rows: list[list[dict[str, str]]],
    max_length: int | None,
    overflow: str,
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory()
    options = make_options({"max_length": max_length, "overflow": overflow})
    raw = [{"messages": messages} for messages in rows]
    for outcome in tokenize_rows(raw, range(len(raw)), tokenizer, options):
        kept = sum(len(example["input_ids"]) for example in outcome.examples)
        assert (outcome.error is None) == bool(outcome.examples)
        assert kept + outcome.num_lost == outcome.num_tokens or outcome.error is not None
        for example in outcome.examples:
            assert len(example["input_ids"]) == len(example["response_mask"])
            assert len(example["input_ids"]) <= (max_length or 10**9)
            assert any(example["response_mask"])
            assert not example["response_mask"][0]


def test_an_error_says_which_dataset_it_speaks_of(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"^val data: 1 of 1 row cannot"), name_in_errors("val"):
        prepare([tokenized(4, 0)], tokenizer)
    rows, options = [tokenized(4, 4)], {"max_length": 3, "overflow": "error"}
    with pytest.raises(RowError, match=r"^val data: Row 0: ") as caught, name_in_errors("val"):
        prepare(rows, tokenizer, **options)
    assert caught.value.row == 0
    with pytest.raises(RowError, match=r"^Row 0: "), name_in_errors("train"):
        prepare(rows, tokenizer, **options)
