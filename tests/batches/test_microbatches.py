"""However the rows of a step are distributed, every row runs once and the gradient is the same."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback

from hf_sft_plugin import MaskedLossMixin, MaskedSFTConfig, MaskedSFTTrainer
from hf_sft_plugin.batches.data_loaders import CollatorWithFacts
from hf_sft_plugin.batches.host_facts import HOST_FACTS, facts_of, find_layout
from hf_sft_plugin.batches.microbatch_plan import (
    can_regroup,
    row_extents,
)
from hf_sft_plugin.batches.microbatches import Microbatches, regroup, remember_tensors, share_out
from hf_sft_plugin.batches.padding_rows import as_repeat

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(st.integers(1, 9), st.integers(1, 9))
def test_every_micro_batch_has_a_place_and_the_last_place_is_taken(
    count: int, num_slots: int
) -> None:
    microbatches = [{"number": number} for number in range(count)]
    slots = share_out(microbatches, num_slots)
    assert len(slots) == num_slots
    assert [each for slot in slots for each in slot] == microbatches
    assert slots[-1]


def batch_of(*rows: list[int], **more: Any) -> dict[str, Any]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "labels": ids.where(mask == 1, -100), "attention_mask": mask, **more}


def test_rows_keep_their_values_and_lose_needless_padding() -> None:
    batches = [batch_of([5, 6, 7, 8, 9], [4]), batch_of([1, 2, 3], [8, 7])]
    lengths, extents = row_extents(batches)
    assert lengths == extents == [5, 1, 3, 2]
    first, second = regroup(batches, [[0], [1, 2, 3]], extents)
    assert first["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert second["input_ids"].tolist() == [[4, 0, 0], [1, 2, 3], [8, 7, 0]]
    assert second["labels"].tolist() == [[4, -100, -100], [1, 2, 3], [8, 7, -100]]
    assert second["attention_mask"].tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]


def test_micro_batches_come_with_their_layout() -> None:
    collate = CollatorWithFacts(lambda rows: batch_of(*rows))
    batches = [collate([[5, 6, 7], [4]]), collate([[1, 2], [8, 7, 9]])]
    lengths, extents = row_extents(batches)
    assert lengths == extents == [3, 1, 2, 3]
    for made in regroup(batches, [[0, 2], [1], [3]], extents):
        layout = made.pop(HOST_FACTS).layout
        expected = find_layout(made)
        assert expected is not None
        assert layout.are_rows
        assert layout.model_inputs().keys() == expected.model_inputs().keys()
        for name in ("shape", "document_lengths"):
            assert getattr(layout, name) == getattr(expected, name)
        for name in ("index", "position_ids", "boundaries"):
            found, wanted = getattr(layout, name), getattr(expected, name)
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)


def test_packed_rows_stay_as_they_are() -> None:
    packed = {
        "input_ids": torch.arange(6).view(1, 6),
        "labels": torch.arange(6).view(1, 6),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
    }
    assert not can_regroup([CollatorWithFacts(lambda rows: dict(packed))([])])
    # Nobody looked for documents.
    assert not can_regroup([packed])
    assert can_regroup([{**packed, "attention_mask": torch.ones(1, 6)}])


def test_batches_without_a_mask_get_one_when_their_rows_meet() -> None:
    batches = [batch_of([1, 2, 3]), batch_of([4])]
    for batch in batches:
        del batch["attention_mask"]
    (made,) = regroup(batches, [[0, 1]], row_extents(batches)[1])
    assert made["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_padding_on_the_left_stays_where_it_is() -> None:
    left = batch_of([1, 2, 3], [4])
    left = {name: value.flip(1) for name, value in left.items()}
    assert row_extents([left]) == ([3, 1], [3, 3])
    (made,) = regroup([left], [[1]], [3, 3])
    assert made["attention_mask"].tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    "more",
    [
        {"pixel_values": torch.zeros(2, 3, 4)},
        {"lengths": [3, 1]},
        {"cu_seqlens": torch.tensor([0, 3, 4])},
    ],
)
def test_batches_that_hold_more_than_rows_are_left_alone(more: dict[str, Any]) -> None:
    assert can_regroup([batch_of([1, 2, 3], [4])])
    assert not can_regroup([batch_of([1, 2, 3], [4], **more)])
    assert not can_regroup([batch_of([1]), {**batch_of([1]), "extra": torch.zeros(1, 1)}])


class Keeper(TrainerCallback):
    """Keeps gradients, and what ran."""

    def __init__(self) -> None:
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        grads = [p.grad.flatten().double() for p in kwargs["model"].parameters()]
        self.gradients.append(torch.cat(grads))


def rows(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(5)
    made = []
    for number in range(count):
        length = 3 + (number * 7) % 23
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "response_mask": [0, *[1] * (length - 1)]})
    return made


def train(
    tokenizer: Any, model_factory: Any, make_config: Any, *, count: int = 22, **settings: Any
) -> tuple[MaskedSFTTrainer, Keeper, list[int]]:
    keeper, sizes = Keeper(), []

    class Counting(MaskedSFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            tokens = inputs["attention_mask"]
            is_padded = self.args.padding_free == "off"
            sizes.append(tokens.numel() if is_padded else int(tokens.sum()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    torch.manual_seed(0)
    trainer = Counting(
        model_factory().double(),
        make_config(
            **{
                "per_device_train_batch_size": 3,
                "gradient_accumulation_steps": 2,
                "logging_steps": 1,
                "learning_rate": 1e-2,
                "num_train_epochs": 1,
                "max_steps": -1,
                **settings,
            }
        ),
        train_dataset=Dataset.from_list(rows(count)),
        processing_class=tokenizer,
        callbacks=[keeper],
    )
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    return trainer, keeper, sizes


def history(trainer: Any) -> list[dict[str, float]]:
    """The logs without what time and padding there was."""
    others = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    return [{k: v for k, v in log.items() if k not in others} for log in trainer.state.log_history]


@pytest.mark.parametrize("padding_free", ["on", "off"])
@pytest.mark.parametrize("max_tokens", [1, 40, 60, 10_000])
def test_gradients_steps_and_logs_are_those_of_the_plain_setting(
    max_tokens: int,
    padding_free: str,
    tokenizer: Any,
    model_factory: Callable[..., Any],
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    plain, plain_keeper, plain_sizes = train(
        tokenizer, model_factory, make_config, padding_free="off", max_tokens_per_microbatch=None
    )
    trainer, keeper, sizes = train(
        tokenizer,
        model_factory,
        make_config,
        max_tokens_per_microbatch=max_tokens,
        padding_free=padding_free,
    )
    # 22 rows: three steps of six, and one of four.
    assert len(plain_keeper.gradients) == len(keeper.gradients) == 4
    for found, expected in zip(keeper.gradients, plain_keeper.gradients, strict=True):
        assert (found - expected).norm() <= 1e-12 * expected.norm()
    assert len(plain_sizes) == 8
    if max_tokens == 10_000:
        assert len(sizes) == 4
    else:
        # The longest row has 25 tokens.
        assert max(sizes) <= max(max_tokens, 25)
        if padding_free == "off":
            assert sum(sizes) < sum(plain_sizes)
    for found_log, expected_log in zip(history(trainer), history(plain), strict=True):
        assert found_log == pytest.approx(expected_log, rel=1e-9)


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    tokenizer: Any,
    model_factory: Callable[..., Any],
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    settings = {"max_tokens_per_microbatch": 45, "max_steps": 7}
    settings |= {"save_strategy": "steps", "save_steps": 2}
    whole, _, _ = train(tokenizer, model_factory, make_config, **settings)
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    resumed, _, _ = train(
        tokenizer, model_factory, make_config, resume_from_checkpoint=checkpoint, **settings
    )
    assert resumed.state.global_step == 7
    assert history(resumed)[-2:] == history(whole)[-2:]
    pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_training_step_of_ones_own_sees_the_batches_as_they_come(
    tokenizer: Any,
    model_factory: Callable[..., Any],
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    seen: list[Any] = []

    class Own(MaskedLossMixin, Trainer):
        max_tokens_per_microbatch = 10

        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            seen.append(inputs)
            return super().training_step(model, inputs, *args)

    batches = [batch_of([1, 2, 3], [4]), batch_of([5, 6])]
    trainer = Own(model_factory(), make_config(), data_collator=lambda rows: batches[rows[0]])
    trainer.train_dataset = [0, 1]
    trainer.train()
    assert seen
    assert not any(isinstance(inputs, Microbatches) for inputs in seen)


@pytest.fixture
def own_trainer(
    model_factory: Callable[..., Any], make_config: Callable[..., MaskedSFTConfig]
) -> Any:
    class Own(MaskedLossMixin, Trainer):
        max_tokens_per_microbatch = 10

    return Own(model_factory(), make_config())


def test_repeats_do_not_run_where_there_are_rows(own_trainer: Any) -> None:
    batches = [batch_of([1, 2, 3]), as_repeat(batch_of([4, 5]))]
    empty, (made,) = own_trainer.regroup_step(batches, is_padded=False)
    assert not empty
    assert made["input_ids"].tolist() == [[1, 2, 3]]
    assert not facts_of(made).is_padding
    ((alone,),) = own_trainer.regroup_step(batches[1:], is_padded=False)
    assert facts_of(alone).is_padding
    assert alone["labels"].tolist() == [[-100, -100]]


def test_where_weights_are_sharded_every_process_runs_as_many_micro_batches(
    own_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    # Another process has three.
    monkeypatch.setattr(own_trainer.accelerator, "gather", lambda n: torch.tensor([int(n), 3]))
    row = batch_of([1, 2, 3])
    for batch, num_own in ((row, 1), (as_repeat(row), 0)):
        (made,) = own_trainer.regroup_step([batch], is_padded=False)
        assert [facts_of(each).is_padding for each in made] == [False] * num_own + [True] * (
            3 - num_own
        )
        trained = [int((each["labels"] != -100).sum()) for each in made]
        assert trained == [3] * num_own + [0] * (3 - num_own)


def test_the_last_step_of_a_stream_has_as_many_places_as_any_other(own_trainer: Any) -> None:
    batch = batch_of([1, 2])
    assert own_trainer.fill_step([batch], 3) == [[], [], batch]
    assert own_trainer.fill_step([batch, batch], 2) == [batch, batch]
    # The stream was at its end before.
    assert own_trainer.fill_step([], 3) == []


def test_what_was_found_in_a_batch_is_found_in_a_copy_of_it(
    own_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(self: Any, data: Any) -> Any:
        if isinstance(data, dict):
            return {name: copy(self, value) for name, value in data.items()}
        return data.clone() if isinstance(data, torch.Tensor) else data

    monkeypatch.setattr(Trainer, "_prepare_input", copy)
    batch = CollatorWithFacts(lambda rows: batch_of(*rows))([[5, 6, 7], [4]])
    remember_tensors([batch])
    prepared = own_trainer._prepare_inputs(batch)
    assert prepared["labels"] is not batch["labels"]
    assert facts_of(prepared).found_in.is_still_in(prepared)
    batch["labels"] = batch["labels"] + 0
    prepared = own_trainer._prepare_inputs(batch)
    assert not facts_of(prepared).found_in.is_still_in(prepared)


def test_no_process_regroups_where_one_cannot(
    own_trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(own_trainer.accelerator, "gather", lambda n: torch.tensor([int(n), 0]))
    batches = [batch_of([1, 2, 3]), batch_of([4, 5])]
    assert own_trainer.regroup_step(batches, is_padded=False) == batches
