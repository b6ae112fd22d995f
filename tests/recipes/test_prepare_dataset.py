"""The recipe as its users run it: rows in; shards, an account of them and a verdict out."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import prepare_dataset
import pytest
from datasets import Dataset, DatasetDict

from hf_sft_plugin.cli import prepare_files
from hf_sft_plugin.shards.dataset import ShardDataset, check_tokenizer

PAIRS = [{"prompt": f"Say {number}", "response": f"{number}!"} for number in range(20)]


@pytest.fixture
def run(
    tmp_path: Path,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., str]:
    """Runs the recipe in a folder with a tokenizer and two files, and returns what it printed."""
    monkeypatch.chdir(tmp_path)
    tokenizer.save_pretrained("tok")
    for name, rows in (("pairs", PAIRS), ("more", PAIRS[:5])):
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))

    def run_recipe(*argv: str) -> str:
        monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", *argv])
        prepare_dataset.main()
        return capsys.readouterr().out

    return run_recipe


COMMON = ("--out_dir", "data/set", "--tokenizer_name_or_path", "tok")


def test_rows_become_shards_with_an_account(
    run: Callable[..., str], tokenizer: Any, tmp_path: Path
) -> None:
    printed = run("--input_files", "pairs.jsonl", *COMMON)
    assert "--- train\nrows    20 in = 20 trained (0 truncated) + 0 dropped" in printed
    assert "data/set: token ids 0 to 299\ntrain   20 documents, " in printed
    dataset = ShardDataset("data/set")
    text = tokenizer.decode(dataset[3]["input_ids"])
    trained = [
        token
        for token, mark in zip(dataset[3]["input_ids"], dataset[3]["response_mask"], strict=True)
        if mark
    ]
    assert text.startswith("Say 3")
    assert tokenizer.decode(trained) == "3!<|im_end|>"
    check_tokenizer("data/set", tokenizer)
    metadata = json.loads((tmp_path / "data/set/dataset_metadata.json").read_text())
    assert metadata["splits"]["train"]["ledger"]["num_rows"] == 20
    assert metadata["splits"]["train"]["certificate"]["num_examples"] == 20


def test_conversations_become_shards(run: Callable[..., str], chat_rows: Any) -> None:
    Path("chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chat_rows))
    flags = ("--format", "chat", "--mask_role", "assistant", "--val_share", "0.25")
    printed = run("--input_files", "chat.jsonl", *COMMON, *flags)
    assert "--- val\nrows    2 in = 2 trained" in printed
    assert len(ShardDataset("data/set")) == 6
    assert len(ShardDataset("data/set", split="val")) == 2


def test_several_files_are_joined_and_others_held_out(run: Callable[..., str]) -> None:
    Dataset.from_list(PAIRS[:3]).to_parquet("val.parquet")
    run("--input_files", "pairs.jsonl", "more.jsonl", *COMMON, "--val_files", "val.parquet")
    assert len(ShardDataset("data/set")) == 25
    assert len(ShardDataset("data/set", split="val")) == 3


def test_the_seed_decides_which_rows_are_held_out(run: Callable[..., str]) -> None:
    held_out = []
    for seed in ("0", "0", "1"):
        flags = ("--val_share", "0.25", "--seed", seed, "--overwrite")
        run("--input_files", "pairs.jsonl", *COMMON, *flags)
        held_out.append(list(ShardDataset("data/set", split="val")))
    assert held_out[0] == held_out[1] != held_out[2]
    assert len(held_out[0]) == 5


def test_the_splits_of_a_folder_keep_their_names_and_are_joined_by_them(
    run: Callable[..., str],
) -> None:
    parts = {"train": PAIRS[:6], "test": PAIRS[6:10]}
    folder = DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()})
    folder.save_to_disk("splits")
    DatasetDict({"validation": Dataset.from_list(PAIRS)}).save_to_disk("single")
    run("--input_files", "splits", "more.jsonl", "single", *COMMON)
    assert len(ShardDataset("data/set")) == 31
    assert len(ShardDataset("data/set", split="test")) == 4
    run("--input_files", "splits", *COMMON, "--val_files", "single", "--overwrite")
    sizes = {name: len(ShardDataset("data/set", split=name)) for name in ("train", "test", "val")}
    assert sizes == {"train": 6, "test": 4, "val": 20}


@pytest.mark.parametrize(
    ("names", "flags", "message"),
    [
        (("train", "val"), ("--val_share", "0.5"), "splits train, val, to which val_files and"),
        (("a", "b"), ("--val_share", "0.5"), "The input files have the splits a, b, to which"),
        (("train", "test"), ("--val_files", "splits"), "val_files have the splits train, test"),
    ],
)
def test_splits_that_would_be_mixed_up_are_refused(
    names: tuple[str, ...], flags: tuple[str, ...], message: str, run: Callable[..., str]
) -> None:
    DatasetDict({name: Dataset.from_list(PAIRS) for name in names}).save_to_disk("splits")
    with pytest.raises(SystemExit, match=message):
        run("--input_files", "splits", *COMMON, *flags)


def test_the_source_of_a_row_stays_with_its_document(run: Callable[..., str]) -> None:
    rows = [{**row, "source": "ab"[number % 2]} for number, row in enumerate(PAIRS)]
    Path("mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("--input_files", "mixed.jsonl", *COMMON)
    assert ShardDataset("data/set").sources == ["a", "b"] * 10


def test_long_rows_are_cut_and_counted(run: Callable[..., str]) -> None:
    Path("long.jsonl").write_text(json.dumps({"prompt": "Say", "response": "9" * 40}) + "\n")
    printed = run("--input_files", "long.jsonl", *COMMON, "--max_length", "10")
    assert [len(row["input_ids"]) for row in ShardDataset("data/set")] == [10]
    assert "1 trained (1 truncated)" in printed


def test_shards_are_verified_on_request(run: Callable[..., str]) -> None:
    run("--input_files", "pairs.jsonl", *COMMON)
    printed = run("--verify", "data/set")
    assert "train   20 documents" in printed
    assert printed.endswith("Every file is as it was written.\n")
    mask = Path("data/set/train/shard_000_mask.bin")
    mask.write_bytes(b"\x02" + mask.read_bytes()[1:])
    with pytest.raises(SystemExit, match=r"shard_000_mask\.bin holds 2 at position 0"):
        run("--verify", "data/set")


def test_a_set_is_replaced_only_when_asked_and_the_answer_comes_before_the_work(
    run: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--input_files", "pairs.jsonl", *COMMON)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_files, "_read_all", lambda files: pytest.fail("it worked first"))
        with pytest.raises(SystemExit, match=r"already holds a shard set.*--overwrite"):
            run("--input_files", "more.jsonl", *COMMON)
    run("--input_files", "more.jsonl", *COMMON, "--overwrite")
    assert len(ShardDataset("data/set")) == 5


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--input_files", "none.jsonl", *COMMON), "There is no 'none.jsonl' to read rows from"),
        (
            ("--input_files", "pairs.jsonl", "other.jsonl", *COMMON),
            "'other.jsonl' has the columns q, but 'pairs.jsonl' has prompt, response",
        ),
        (("--input_files", "broken.jsonl", *COMMON), "'broken.jsonl', line 2 is not JSON"),
        (("--verify", "tok"), "tok has no dataset_metadata.json, so it is no shard set"),
        (
            ("--input_files", "pairs.jsonl", "--out_dir", "tok", *COMMON[2:], "--overwrite"),
            "tok exists and is no shard set, so it is not overwritten",
        ),
    ],
)
def test_a_mistake_ends_in_one_clear_message(
    argv: tuple[str, ...], message: str, run: Callable[..., str]
) -> None:
    Path("other.jsonl").write_text('{"q": 1}\n')
    Path("broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    assert str(caught.value).startswith("prepare_dataset.py: ")
    assert message in str(caught.value)
    assert not Path("data").exists()
