"""What decides on the rows of a step is written down, and compared before a run goes on."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset
from transformers import TrainingArguments

from hf_sft_plugin import MaskedSFTConfig
from hf_sft_plugin.batches.packing import pack_dataset
from hf_sft_plugin.checkpoints.data_order import describe_order, digest_rows, refuse_other_order


def make_rows(num_rows: int = 4, last: int = 2) -> list[dict[str, Any]]:
    ids = [[5, 6 + number, last] for number in range(num_rows)]
    return [{"input_ids": row, "response_mask": [0, 1, 1]} for row in ids]


def test_a_digest_changes_with_tokens_masks_order_and_packing() -> None:
    rows = make_rows()
    masked = [*rows[:3], {**rows[3], "response_mask": [0, 0, 1]}]
    found = [
        digest_rows(each)
        for each in (
            Dataset.from_list(rows),
            Dataset.from_list(make_rows(last=3)),
            Dataset.from_list(masked),
            Dataset.from_list(rows[::-1]),
            pack_dataset(rows, 6),
            pack_dataset(rows, 9),
        )
    ]
    assert len(set(found)) == 6
    assert None not in found


def test_a_digest_is_the_same_in_every_format_and_reads_at_most_1000_rows() -> None:
    rows = Dataset.from_list(make_rows())
    assert digest_rows(rows.with_format("torch")) == digest_rows(rows)
    many = Dataset.from_dict({"input_ids": [[number] for number in range(2001)]})
    read: list[int] = []

    class Counted(Dataset):
        def __getitem__(self, key: Any) -> Any:
            read.append(key)
            return super().__getitem__(key)

        def with_format(self, *args: Any, **kwargs: Any) -> Any:
            return self

    assert digest_rows(Counted(many.data)) == digest_rows(many)
    assert len(read) == 1000
    assert read[0] == 0
    assert read[-1] == 2000


def test_rows_that_may_differ_every_time_have_no_digest() -> None:
    rows = Dataset.from_list(make_rows())
    assert digest_rows(rows.with_transform(lambda batch: batch)) is None
    assert digest_rows(make_rows()) is None
    dated = Dataset.from_dict({"day": [1]}).map(lambda row: {"raw": b"bytes"})
    assert digest_rows(dated) is None


def describe(
    dataset: Any, tokenizer: Any = None, config: Any = TrainingArguments, **settings: Any
) -> dict[str, Any]:
    given = {"output_dir": "run", "use_cpu": True, "report_to": "none", **settings}
    trainer: Any = SimpleNamespace(
        args=config(**given), train_dataset=dataset, processing_class=tokenizer
    )
    return describe_order(trainer, rows_per_batch=2, steps_per_epoch=3)


def test_the_order_of_rows_is_told_by_what_decides_on_it() -> None:
    rows = Dataset.from_list(make_rows())
    expected = {
        "rows per optimizer step": 8,
        "training rows": 4,
        "digest of the training rows": digest_rows(rows),
        "optimizer steps per epoch": 3,
        "order": "random",
        "data_seed": 42,
    }
    assert describe(rows, gradient_accumulation_steps=4) == expected
    del expected["data_seed"]
    found = describe(rows, gradient_accumulation_steps=4, train_sampling_strategy="sequential")
    assert found == {**expected, "order": "sequential"}
    assert describe(rows, data_seed=7)["data_seed"] == 7
    found = describe(rows, auto_find_batch_size=True)
    assert set(found) == {"training rows", "digest of the training rows", "order", "data_seed"}


def test_a_stream_in_shards_is_bound_to_workers_and_their_processes_and_another_is_not() -> None:
    rows = Dataset.from_list(make_rows())
    settings = {"max_steps": 3, "dataloader_num_workers": 2}
    assert describe(rows.to_iterable_dataset(), **settings) == {"rows per optimizer step": 2}
    assert describe(rows.to_iterable_dataset(2), **settings) == {
        "rows per optimizer step": 2,
        "processes": 1,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 2,
    }
    # One reader takes the shards one after the other.
    found = describe(rows.to_iterable_dataset(2), max_steps=3)
    assert found == {"rows per optimizer step": 2, "dataloader_num_workers": 0}


def test_a_stream_is_told_by_what_makes_its_tokens(tokenizer_factory: Callable[..., Any]) -> None:
    stream = Dataset.from_list(make_rows()).to_iterable_dataset()
    found = [
        describe(stream, tokenizer_factory(**changes), MaskedSFTConfig, max_steps=3, **settings)
        for changes, settings in (
            ({}, {}),
            ({"eos_token": "<|endoftext|>"}, {}),
            ({"chat_template": "{{ messages }}"}, {}),
            ({}, {"max_length": 9}),
        )
    ]
    changed = [{name for name in each if each[name] != found[0][name]} for each in found]
    assert changed == [set(), {"tokenizer"}, {"chat template"}, {"data options"}]


BEFORE = {"rows per optimizer step": 8, "optimizer steps per epoch": 3, "order": "random"}


def test_the_same_order_is_let_through() -> None:
    refuse_other_order("checkpoint-1", BEFORE, dict(BEFORE), 2)


@pytest.mark.parametrize(
    ("changes", "rows_per_batch", "remedy"),
    [
        ({"rows per optimizer step": 4}, 4, "Set gradient_accumulation_steps to 2, or"),
        (
            {"rows per optimizer step": 2, "optimizer steps per epoch": 12},
            2,
            "Set gradient_accumulation_steps to 4, or",
        ),
        ({"rows per optimizer step": 3}, 3, "Make it as it was, or"),
        ({"rows per optimizer step": 4, "order": "sequential"}, 4, "Make it as it was, or"),
    ],
)
def test_a_change_is_named_with_the_setting_that_undoes_it(
    changes: dict[str, Any], rows_per_batch: int, remedy: str
) -> None:
    with pytest.raises(ValueError, match="checkpoint-1 cannot be resumed") as caught:
        refuse_other_order("checkpoint-1", BEFORE, {**BEFORE, **changes}, rows_per_batch)
    assert remedy in str(caught.value)
    assert "set ignore_data_skip" in str(caught.value)
    for name, value in changes.items():
        assert f"{name}: {BEFORE[name]} then, {value} now" in str(caught.value)


def test_an_order_without_a_seed_is_refused() -> None:
    rows = Dataset.from_list(make_rows())
    order = describe(rows, accelerator_config={"use_seedable_sampler": False})
    with pytest.raises(ValueError, match="use_seedable_sampler False, nobody knows in which order"):
        refuse_other_order("checkpoint-1", order, order, 2)
