"""What a data loader gives each of two processes: its own rows, and repeats that say so."""

from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.data_loader import skip_first_batches
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_sft_plugin import DataCollatorForPromptResponse, MaskedLossMixin
from hf_sft_plugin.batches.host_facts import HOST_FACTS, facts_of

# The model knows no `note`, and a collator could not pad it.
ROWS = [{"input_ids": [5, 6, 10 + n], "labels": [-100, 6, 10 + n], "note": "x"} for n in range(5)]
OWN = [[[10, 11], [14]], [[12, 13], []]]


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of a user."""


@pytest.fixture
def make_trainer(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Any:
    def make(kind: str = "dataset", rank: int | None = 0, **settings: Any) -> OwnTrainer:
        if rank is not None:
            monkeypatch.setattr(Accelerator, "num_processes", property(lambda self: 2))
            monkeypatch.setattr(Accelerator, "process_index", property(lambda self: rank))
        rows = {
            "dataset": Dataset.from_list(ROWS),
            "list": ROWS,
            "stream": Dataset.from_list(ROWS).to_iterable_dataset(num_shards=2),
        }
        usual = {
            "max_steps": 1,
            "per_device_train_batch_size": 2,
            "train_sampling_strategy": "sequential",
        }
        return OwnTrainer(
            model,
            TrainingArguments(
                output_dir=str(tmp_path),
                use_cpu=True,
                report_to="none",
                dataloader_pin_memory=False,
                accelerator_config={"dispatch_batches": False},
                **{**usual, **settings},
            ),
            data_collator=DataCollatorForPromptResponse(tokenizer),
            train_dataset=rows[kind],
        )

    return make


def own_rows(loader: Any) -> list[list[int]]:
    """The last token of each row that is trained, batch by batch."""
    found = []
    for batch in loader:
        assert set(batch) - {HOST_FACTS} == {
            *("input_ids", "attention_mask", "labels", "response_mask")
        }
        is_padding = facts_of(batch).is_padding
        assert is_padding == bool((batch["labels"] == -100).all())
        found.append([] if is_padding else batch["input_ids"][:, -1].tolist())
    return found


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["dataset", "list", "stream"])
def test_every_process_gets_its_own_rows_and_as_many_batches(
    kind: str, rank: int, make_trainer: Any
) -> None:
    trainer = make_trainer(kind, rank)
    collator = trainer.data_collator
    loader = trainer.get_train_dataloader()
    # In every epoch.
    assert own_rows(loader) == own_rows(loader) == OWN[rank]
    assert trainer.data_collator is collator
    if kind != "stream":
        assert own_rows(skip_first_batches(loader, 1)) == OWN[rank][1:]
        assert len(loader) == 2


def test_an_epoch_that_is_resumed_has_its_own_order(make_trainer: Any) -> None:
    trainer = make_trainer()
    trainer.group_by_prompt = True
    loader = trainer.get_train_dataloader()
    orders = []
    for epoch in range(4):
        loader.set_epoch(epoch)
        orders.append(own_rows(loader))
        rest = skip_first_batches(loader, 1)
        rest.set_epoch(epoch)
        assert own_rows(rest) == orders[-1][1:]
    assert len({str(order) for order in orders}) > 1


def test_a_batch_that_is_shared_out_is_filled_up(make_trainer: Any) -> None:
    trainer = make_trainer(rank=1)
    trainer.accelerator.dataloader_config.split_batches = True
    assert own_rows(trainer.get_train_dataloader()) == [[11], [13], []]


def test_rows_that_are_dropped_are_not_repeated(make_trainer: Any) -> None:
    trainer = make_trainer(rank=0, dataloader_drop_last=True)
    assert own_rows(trainer.get_train_dataloader()) == [[10, 11]]


def test_one_process_keeps_its_dataset(make_trainer: Any) -> None:
    trainer = make_trainer("list", None)
    loader = trainer.get_train_dataloader()
    assert loader.dataset is ROWS
    assert own_rows(loader) == [[10, 11], [12, 13], [14]]


def test_rows_that_rebalancing_repeats_count_for_nothing(make_trainer: Any) -> None:
    # Of five rows in steps of four batches the second step has one, and three repeats.
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 1}
    trainer = make_trainer(
        rank=None, train_sampling_strategy="batch_rebalance", max_steps=2, **settings
    )
    trainer.train()
    assert trainer.state.global_step == 2
    log = trainer.state.log_history[-1]
    assert log["train_loss"] > 0
    assert trainer._train_totals.run.counts() == {"num_response_tokens": 10, "num_tokens": 15}
