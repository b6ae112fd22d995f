"""Shard sets as their readers meet them: whole ones, and every way in which one can be damaged."""

import logging
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from hf_sft_plugin import DataCollatorForPromptResponse, MaskedSFTTrainer
from hf_sft_plugin.shards.dataset import ShardDataset, check_tokenizer, verify_shards
from hf_sft_plugin.shards.writer import write_shards

ROWS = [
    {"input_ids": [5, 6, 7, 2], "response_mask": [0, 0, 1, 1]},
    {"input_ids": [8, 9, 2], "response_mask": [0, 1, 1]},
    {"input_ids": [10, 11, 12, 13, 2], "response_mask": [0, 0, 0, 1, 1]},
    {"input_ids": [14, 2], "response_mask": [0, 1]},
]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Any) -> Path:
    """A set of four documents in two shards."""
    splits = {"train": Dataset.from_list(ROWS), "val": Dataset.from_list(ROWS[:2])}
    write_shards(tmp_path / "set", splits, tokenizer, max_tokens_per_shard=7)
    return tmp_path / "set"


@pytest.fixture
def sourced(tmp_path: Path, tokenizer: Any) -> Path:
    """A set of four documents in two shards, three of which say where they came from."""
    sources = ("web", "book", None, "web")
    rows = [{**row, "source": source} for row, source in zip(ROWS, sources, strict=True)]
    splits = {"train": Dataset.from_list(rows)}
    write_shards(tmp_path / "sourced", splits, tokenizer, max_tokens_per_shard=7)
    return tmp_path / "sourced"


@pytest.fixture(scope="module")
def shared_tokenizer(tokenizer_factory: Any) -> Any:
    return tokenizer_factory()


def stream(rows: Any, column: str) -> list[Any]:
    return [value for row in rows for value in row[column]]


def test_documents_come_back_as_they_were(folder: Path) -> None:
    dataset = ShardDataset(folder)
    assert len(dataset) == 4
    assert [dataset[index] for index in range(4)] == ROWS
    assert dataset[-1] == ROWS[-1]
    assert dataset[np.int64(1)] == ROWS[1]
    assert list(ShardDataset(folder, split="val")) == ROWS[:2]


def test_a_row_that_is_not_there_is_an_index_error(folder: Path) -> None:
    for index in (4, -5):
        with pytest.raises(IndexError, match=f"There is no row {index}: the split has 4"):
            ShardDataset(folder)[index]
    with pytest.raises(TypeError):
        ShardDataset(folder)[:2]  # type: ignore[index]


def test_documents_say_where_they_came_from_and_blocks_do_not(sourced: Path) -> None:
    dataset = ShardDataset(sourced)
    expected = [{**ROWS[0], "source": "web"}, {**ROWS[1], "source": "book"}]
    assert list(dataset) == [*expected, ROWS[2], {**ROWS[3], "source": "web"}]
    assert dataset.sources == ["web", "book", None, "web"]
    plain = ShardDataset(sourced, use_loss_mask=False)
    assert plain[1] == {**expected[1], "response_mask": [1, 1, 1]}
    assert list(pickle.loads(pickle.dumps(dataset))) == list(dataset)  # noqa: S301  # our bytes
    blocks = ShardDataset(sourced, block_size=4)
    assert blocks.sources is None
    assert all("source" not in block for block in blocks)
    verify_shards(sourced)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"sources\.bin is missing, which says where each document"),
        (
            lambda path: os.truncate(path, 8),
            r"sources of 2 documents \(8 bytes\), but the split has 4 \(16 bytes\)",
        ),
        (
            lambda path: path.write_bytes(b"\x00" * 12 + b"\x03\x00\x00\x00"),
            "names source 3, but the sources are numbered from 0 to 2",
        ),
    ],
)
def test_damaged_sources_are_found(
    damage: Callable[[Path], None], message: str, sourced: Path
) -> None:
    damage(sourced / "train" / "sources.bin")
    for read in (ShardDataset, verify_shards):
        with pytest.raises(ValueError, match=message):
            read(sourced)


def test_sources_that_were_exchanged_are_found_by_their_digest(sourced: Path) -> None:
    (sourced / "train" / "sources.bin").write_bytes(b"\x00" * 16)
    assert ShardDataset(sourced).sources == ["web"] * 4
    with pytest.raises(ValueError, match=r"sources\.bin has the SHA-256 "):
        verify_shards(sourced)


def test_blocks_are_cut_from_one_stream_across_documents_and_shards(folder: Path) -> None:
    assert list(ShardDataset(folder, block_size=9)) == [
        {
            "input_ids": [5, 6, 7, 2, 8, 9, 2, 10, 11],
            "response_mask": [0, 0, 1, 1, 0, 1, 1, 0, 0],
        },
        {"input_ids": [12, 13, 2, 14, 2], "response_mask": [0, 1, 1, 0, 1]},
    ]


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(
        st.lists(
            st.tuples(st.integers(0, 299), st.booleans(), st.sampled_from([0.0, 0.5, 1.0, 3.0])),
            min_size=1,
            max_size=9,
        ),
        min_size=1,
        max_size=7,
    ).filter(lambda rows: any(mask for row in rows for _, mask, _ in row)),
    max_tokens=st.integers(1, 30),
    block_size=st.integers(2, 40),
)
def test_what_is_written_is_read_by_documents_and_by_blocks_of_any_size(
    documents: list[Any], max_tokens: int, block_size: int, shared_tokenizer: Any
) -> None:
    rows = [
        {
            "input_ids": [token for token, _, _ in document],
            "response_mask": [int(mask) for _, mask, _ in document],
            "loss_weights": [weight for _, _, weight in document],
        }
        for document in documents
    ]
    with TemporaryDirectory() as place:
        folder = Path(place) / "set"
        written = write_shards(
            folder,
            {"train": Dataset.from_list(rows)},
            shared_tokenizer,
            max_tokens_per_shard=max_tokens,
        )
        assert all(
            shard.num_tokens <= max_tokens or len(shard.document_lengths) == 1
            for shard in written.splits["train"]
        )
        assert str(verify_shards(folder)) == str(written)
        assert list(ShardDataset(folder)) == rows
        blocks = list(ShardDataset(folder, block_size=block_size))
    for column in rows[0]:
        assert stream(blocks, column) == stream(rows, column)
    assert {len(block["input_ids"]) for block in blocks[:-1]} <= {block_size}
    assert 1 <= len(blocks[-1]["input_ids"]) <= block_size


def test_without_the_loss_mask_everything_is_trained_and_no_mask_file_is_needed(
    folder: Path,
) -> None:
    for path in folder.rglob("*_mask.bin"):
        path.unlink()
    dataset = ShardDataset(folder, use_loss_mask=False)
    assert [row["response_mask"] for row in dataset] == [[1] * 4, [1] * 3, [1] * 5, [1] * 2]


def test_a_set_written_without_masks_is_trained_whole(tmp_path: Path, tokenizer: Any) -> None:
    rows = Dataset.from_list(ROWS).remove_columns("response_mask")
    written = write_shards(tmp_path / "set", {"train": rows}, tokenizer)
    assert written.counts("train").trained_share == 1.0
    assert not list(tmp_path.rglob("*_mask.bin"))
    assert stream(ShardDataset(tmp_path / "set"), "response_mask") == [1] * 14


def test_it_pickles_small_and_opens_again(folder: Path) -> None:
    dataset = ShardDataset(folder, "val", block_size=4)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 400
    assert list(pickle.loads(pickled)) == list(dataset)  # noqa: S301  # our own bytes


def test_the_files_are_not_copied_into_memory(tmp_path: Path, tokenizer: Any) -> None:
    num_tokens = 2**24
    row = {"input_ids": np.ones(num_tokens, np.int32), "response_mask": np.ones(num_tokens, "i1")}
    write_shards(
        tmp_path / "set", {"train": Dataset.from_dict({k: [v] for k, v in row.items()})}, tokenizer
    )
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.bin")) == 5 * num_tokens
    before = resident_bytes()
    dataset = ShardDataset(tmp_path / "set", block_size=1024)
    assert dataset[len(dataset) // 2]["input_ids"] == [1] * 1024
    assert resident_bytes() - before < num_tokens // 2
    with pytest.raises(ValueError, match="read-only"):
        dataset._columns["input_ids"][0][0] = 1


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_workers_of_a_data_loader_read_it(folder: Path, tokenizer: Any) -> None:
    loader = DataLoader(
        ShardDataset(folder),
        batch_size=2,
        num_workers=2,
        collate_fn=DataCollatorForPromptResponse(tokenizer),
        multiprocessing_context="fork",
    )
    first, second = loader
    assert first["input_ids"].tolist() == [[5, 6, 7, 2], [8, 9, 2, 0]]
    assert second["labels"].tolist() == [[-100, -100, -100, 13, 2], [-100, 2, -100, -100, -100]]


def test_rows_that_would_be_cut_uncounted_are_refused_before_training(
    folder: Path, model: Any, tokenizer: Any, make_config: Any
) -> None:
    assert ShardDataset(folder).row_lengths.tolist() == [4, 3, 5, 2]
    message = r"split 'train': 2 of 4 rows are longer than max_length 3; the longest has 5 tokens"
    for name in ("train_dataset", "eval_dataset"):
        with pytest.raises(ValueError, match=message):
            MaskedSFTTrainer(
                model,
                make_config(max_length=3),
                processing_class=tokenizer,
                **{name: ShardDataset(folder)},
            )
    for fits in (ShardDataset(folder, block_size=3), ShardDataset(folder)):
        MaskedSFTTrainer(
            model,
            make_config(max_length=int(fits.row_lengths.max())),
            train_dataset=fits,
            processing_class=tokenizer,
        )


@pytest.mark.parametrize("block_size", [None, 6])
def test_both_trainers_take_it(
    block_size: int | None, folder: Path, model: Any, tokenizer: Any, make_config: Any
) -> None:
    dataset = ShardDataset(folder, block_size=block_size)
    trainer = MaskedSFTTrainer(
        model,
        make_config(),
        train_dataset=dataset,
        eval_dataset=ShardDataset(folder, "val"),
        processing_class=tokenizer,
    )
    assert torch.isfinite(torch.tensor(trainer.train().training_loss))
    plain = Trainer(
        model,
        TrainingArguments(
            str(folder.parent / "plain"),
            remove_unused_columns=False,
            max_steps=1,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        ),
        train_dataset=dataset,
        data_collator=DataCollatorForPromptResponse(tokenizer, return_response_mask=False),
    )
    assert torch.isfinite(torch.tensor(plain.train().training_loss))


def test_the_first_token_of_a_block_is_context(
    folder: Path, model: Any, tokenizer: Any, make_config: Any
) -> None:
    # The masks of the blocks are 0 0 1, 1 0 1 and 1.
    blocks = ShardDataset(folder, "val", block_size=3)
    trainer = MaskedSFTTrainer(
        model, make_config(), eval_dataset=blocks, processing_class=tokenizer
    )
    assert trainer.evaluate()["eval_num_response_tokens"] == 2


def test_generated_responses_are_judged_over_it(
    folder: Path, model: Any, tokenizer: Any, make_config: Any
) -> None:
    config = make_config(predict_with_generate=True, generation_max_new_tokens=2)
    trainer = MaskedSFTTrainer(
        model, config, eval_dataset=ShardDataset(folder, "val"), processing_class=tokenizer
    )
    assert "eval_loss" in trainer.evaluate()
    assert len(trainer.responses) == 2


def test_an_unusual_share_of_trained_tokens_is_said_once(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = Dataset.from_list([{"input_ids": [5] * 20, "response_mask": [0] * 19 + [1]}])
    write_shards(tmp_path / "set", {"train": rows}, tokenizer)
    with caplog.at_level(logging.WARNING):
        dataset = ShardDataset(tmp_path / "set")
        pickle.loads(pickle.dumps(dataset))  # noqa: S301  # our own bytes
        ShardDataset(tmp_path / "set", use_loss_mask=False)
    (message,) = caplog.messages
    assert "5.0% of the tokens are trained; 10 to 90% are usual" in message


def test_a_whole_set_is_verified_and_told(folder: Path) -> None:
    assert str(verify_shards(folder)) == (
        f"{folder}: token ids 0 to 299\n"
        "train   4 documents, 14 tokens, 7 trained (50.0%), 2 shards\n"
        "val     2 documents, 7 tokens, 4 trained (57.1%), 1 shard"
    )


def overwrite_bytes(name: str, position: int, data: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[position : position + len(data)] = data
        (folder / name).write_bytes(content)

    return damage


def test_masks_that_are_all_zero_are_found_on_opening(folder: Path) -> None:
    overwrite_bytes("train/shard_001_mask.bin", 0, b"\x00" * 7)(folder)
    with pytest.raises(ValueError, match=r"shard_001_mask.bin is all zero, but .* 3 tokens are"):
        ShardDataset(folder)
    assert len(ShardDataset(folder, use_loss_mask=False)) == 4
    assert len(ShardDataset(folder, "val")) == 2


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (
            overwrite_bytes("train/shard_000_mask.bin", 3, b"\x07"),
            ["shard_000_mask.bin holds 7 at position 3, but a token is trained (1) or not (0)."],
        ),
        (
            overwrite_bytes("train/shard_001_mask.bin", 0, b"\x00" * 7),
            ["shard_001_mask.bin is all zero, but dataset_metadata.json says that 3 are trained."],
        ),
        (
            overwrite_bytes("val/shard_000_mask.bin", 0, b"\x01"),
            ["val/shard_000_mask.bin marks 5 tokens as trained", "says that 4 are trained"],
        ),
        (
            overwrite_bytes("train/shard_000.bin", 8, b"\x2c\x01\x00\x00"),
            ["shard_000.bin holds 300 at position 2, but the ids of the tokenizer are 0 to 299."],
        ),
        (
            overwrite_bytes("train/shard_000.bin", 0, b"\x06"),
            ["train/shard_000.bin has the SHA-256 ", "it is not the file that was written."],
        ),
        (overwrite_bytes("tokenizer/tokenizer.json", 0, b" "), ["tokenizer.json has the SHA-256"]),
        (lambda folder: (folder / "tokenizer/tokenizer.json").unlink(), ["json is missing."]),
        (
            lambda folder: (folder / "val/shard_000.bin").unlink(),
            ["split 'val': expected 1 token shards, found 0"],
        ),
    ],
)
def test_every_damage_is_found_and_named(
    damage: Callable[[Path], None], messages: list[str], folder: Path
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match="is damaged; write the set again") as caught:
        verify_shards(folder)
    for message in messages:
        assert message in str(caught.value)


def test_all_damages_are_listed_together(folder: Path) -> None:
    overwrite_bytes("train/shard_000_mask.bin", 0, b"\x02")(folder)
    overwrite_bytes("val/shard_000.bin", 0, b"\xff\xff")(folder)
    with pytest.raises(ValueError, match="damaged") as caught:
        verify_shards(folder)
    assert str(caught.value).count("\n- ") == 4


def test_missing_masks_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = Dataset.from_list(ROWS[:1] * 10)
    write_shards(tmp_path / "set", {"train": rows}, tokenizer, max_tokens_per_shard=4)
    masks = sorted(tmp_path.rglob("*_mask.bin"))
    masks[3].unlink()
    with pytest.raises(ValueError, match=r"expected 10 mask shards, found 9; missing: .*003_mask"):
        ShardDataset(tmp_path / "set")
    for path in masks[:3] + masks[4:]:
        path.unlink()
    with pytest.raises(ValueError, match="expected 10 mask shards, found 0") as caught:
        ShardDataset(tmp_path / "set")
    assert "or train every token with use_loss_mask=False" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "size", "found"),
    [
        ("shard_000_mask.bin", 5, r"holds 5 mask entries \(5 bytes\), but the shard has 7 tokens"),
        ("shard_000.bin", 26, r"holds 6 token entries \(26 bytes\), but the shard has 7 tokens"),
        ("shard_000.bin", 32, r"holds 8 token entries \(32 bytes\), but the shard has 7 tokens"),
    ],
)
def test_unequal_lengths_are_told_with_both_numbers(
    name: str, size: int, found: str, folder: Path
) -> None:
    os.truncate(folder / "train" / name, size)
    with pytest.raises(ValueError, match=found):
        ShardDataset(folder)


def test_a_block_of_one_token_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="block_size is 1, but a block needs at least 2 tokens"):
        ShardDataset(folder, block_size=1)


def test_the_tokenizer_of_the_set_is_recognized(
    folder: Path, tokenizer: Any, tokenizer_factory: Any
) -> None:
    check_tokenizer(folder, tokenizer)
    check_tokenizer(folder, type(tokenizer).from_pretrained(folder / "tokenizer"))
    check_tokenizer(folder, tokenizer_factory(pad_token="<|im_end|>", chat_template=None))


def test_another_tokenizer_is_refused_with_the_first_difference(
    folder: Path, tokenizer: Any
) -> None:
    tokenizer.add_tokens(["<think>"])
    with pytest.raises(ValueError, match="the first is 300, None in the shards and '<think>' in"):
        check_tokenizer(folder, tokenizer)


def test_a_tokenizer_that_cuts_texts_differently_is_refused(folder: Path, tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    with pytest.raises(ValueError, match="the same tokens, but cuts texts differently"):
        check_tokenizer(folder, tokenizer)
