"""The budget of memory: the same in every run where there is enough, smaller where there is not."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer
from hf_sft_plugin.batches.microbatch_plan import TokenBudget
from hf_sft_plugin.batches.padding_rows import as_repeat
from hf_sft_plugin.training import memory, memory_plan

Train = Callable[..., tuple[MaskedSFTTrainer, list[list[int]]]]


@pytest.fixture
def train(tokenizer: Any, model_factory: Any, make_config: Any) -> Train:
    """Two steps of three batches of two rows of 20 and 40 tokens; gives what ran at a time."""

    def run(resume: str | None = None, **settings: Any) -> tuple[MaskedSFTTrainer, list[list[int]]]:
        ran: list[list[int]] = []

        class Watched(MaskedSFTTrainer):
            def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
                ran.append(inputs["attention_mask"].sum(-1).tolist())
                return super().compute_loss(model, inputs, *args, **kwargs)

        rows = [
            # Rows that began alike would share what they have in common.
            {"input_ids": [3 + n, *range(4, 3 + size)], "response_mask": [0, *[1] * (size - 1)]}
            for n, size in enumerate((20, 40) * 6)
        ]
        peft_config = settings.pop("peft_config", None)
        torch.manual_seed(0)
        trainer = Watched(
            model_factory(attention_dropout=0.1),
            peft_config=peft_config,
            args=make_config(
                gradient_accumulation_steps=3, train_sampling_strategy="sequential", **settings
            ),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, ran

    return run


def test_a_step_runs_at_once_where_there_is_memory(train: Train) -> None:
    trainer, ran = train()
    assert trainer.args.max_tokens_per_microbatch == "auto"
    assert [sum(lengths) for lengths in ran] == [180, 180]
    assert trainer._budget is not None
    assert trainer._budget.wanted == 4096
    speed = trainer.describe_speed()
    assert speed["attention"] == "per-document SDPA, no padding, shared prompts once"
    assert speed["head"] == "3 products over response rows"
    assert "GB needed for 180 tokens, 174 of them trained, in 1 micro-batch" in speed["memory"]
    assert speed["memory"].endswith("gradient checkpointing off")
    # Of which most is the process.
    assert trainer.memory_estimate is not None
    assert 1e8 < trainer.memory_estimate < psutil.Process().memory_info().rss * 1.25


def test_little_memory_makes_small_micro_batches_and_a_warning(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory_plan, "available_memory", lambda device: 0)
    with caplog.at_level(logging.WARNING):
        _, ran = train()
    assert [len(lengths) for lengths in ran[:3]] != [6]
    assert max(sum(lengths) for lengths in ran) == 40
    (warning,) = [r.getMessage() for r in caplog.records if "the longest" in r.getMessage()]
    assert "one row of 40 tokens" in warning
    assert "gradient_checkpointing to true" in warning


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("is_adapter", [False, True], ids=["full", "lora"])
def test_gradient_checkpointing_is_switched_on_where_memory_is_short_and_it_was_asked_for(
    is_adapter: bool, train: Train, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    lora = LoraConfig(target_modules="all-linear") if is_adapter else None
    settings: dict[str, Any] = {"peft_config": lora, "auto_gradient_checkpointing": True}
    if not is_adapter:
        plenty, _ = train(**settings)
        assert plenty.describe_speed()["memory"].endswith("gradient checkpointing off")
    monkeypatch.setattr(memory_plan, "available_memory", lambda device: 0)
    plain, ran_plain = train(**{**settings, "auto_gradient_checkpointing": False})
    assert "auto_gradient_checkpointing to true, or max_length lower" in caplog.text
    found, ran = train(**settings)
    assert any(map(memory._is_checkpointed, found.model.modules()))
    assert found.describe_speed()["memory"].endswith("gradient checkpointing on")
    assert ran == ran_plain
    # Dropout included.
    for ours, theirs in zip(found.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-6, atol=1e-7)


def test_an_adapter_that_gradient_checkpointing_would_leave_out_goes_without(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory_plan, "available_memory", lambda device: 0)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    found, _ = train(peft_config=prefix, auto_gradient_checkpointing=True)
    assert not any(map(memory._is_checkpointed, found.model.modules()))
    assert "are left. Set max_length lower." in caplog.text


def test_the_size_of_the_users_batches_is_kept_where_there_is_memory(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_plan, "_CPU_TOKENS", 16)
    _, ran = train()
    assert [sum(lengths) for lengths in ran] == [60] * 6


@pytest.mark.parametrize(("largest", "expected"), [(10, 64), (100, 100), (1000, 256)])
def test_a_larger_batch_goes_up_to_what_is_possible(largest: int, expected: int) -> None:
    assert TokenBudget(wanted=64, possible=256).for_step(largest) == expected


def test_the_estimate_does_not_change_what_is_trained(train: Train) -> None:
    measured, _ = train(max_tokens_per_microbatch="auto")
    given, _ = train(max_tokens_per_microbatch=4096)
    pairs = zip(measured.model.parameters(), given.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_resumed_run_keeps_its_budget_whatever_memory_there_is(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1}
    whole, _ = train(output_dir=str(tmp_path / "whole"), **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-1"
    stored = json.loads((checkpoint / "microbatch_budget.json").read_text())
    assert stored["wanted"] == 4096
    monkeypatch.setattr(memory_plan, "available_memory", lambda device: 0)
    resumed, ran = train(str(checkpoint), output_dir=str(tmp_path / "resumed"), **settings)
    assert [sum(lengths) for lengths in ran] == [180]
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_resumed_run_keeps_gradient_checkpointing_as_it_was(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever memory there is, with dropout, to the last bit."""
    settings = {"save_strategy": "steps", "save_steps": 1, "auto_gradient_checkpointing": True}
    monkeypatch.setattr(memory_plan, "available_memory", lambda device: 0)
    whole, _ = train(output_dir=str(tmp_path / "whole"), **settings)
    monkeypatch.setattr(memory_plan, "available_memory", lambda device: 2**40)
    checkpoint = str(tmp_path / "whole" / "checkpoint-1")
    resumed, _ = train(checkpoint, output_dir=str(tmp_path / "resumed"), **settings)
    assert any(map(memory._is_checkpointed, resumed.model.modules()))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_process_that_has_nothing_but_a_repeat_in_the_first_step_gets_a_budget(
    train: Train,
) -> None:
    trainer, _ = train()
    trainer.forget_memory()
    batch = as_repeat(next(iter(trainer.get_train_dataloader())))
    trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    assert trainer._budget == TokenBudget(4096, trainer._budget.possible)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"max_tokens_per_microbatch": 64}, [60] * 3), ({"auto_find_batch_size": True}, [60] * 3)],
)
def test_other_settings_overrule_the_budget_of_a_checkpoint(
    settings: dict[str, Any], expected: list[int], train: Train, tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    train(output_dir=str(tmp_path / "whole"), **saving)
    checkpoint = str(tmp_path / "whole" / "checkpoint-1")
    _, ran = train(checkpoint, output_dir=str(tmp_path / "resumed"), **settings)
    assert [sum(lengths) for lengths in ran] == expected


@pytest.mark.parametrize("what", ["measure_step_memory", "available_memory"])
def test_a_measurement_that_fails_leaves_the_batches_as_they_come(
    what: str, train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: Any) -> None:
        raise IndexError("no such position")

    monkeypatch.setattr(memory_plan, what, fail)
    with caplog.at_level(logging.WARNING):
        trainer, ran = train()
    assert [sum(lengths) for lengths in ran] == [60] * 6
    assert trainer.describe_speed()["memory"] == "not estimated, so batches run as they come"
    assert "batches run as they come" in caplog.text
    assert "IndexError: no such position" in caplog.text


@pytest.mark.parametrize("value", ["most", "-5", "1.5"])
def test_a_budget_is_a_number_or_auto(
    value: str, make_config: Callable[..., MaskedSFTConfig]
) -> None:
    with pytest.raises(ValueError, match="give a number of tokens, 'auto', or None"):
        make_config(max_tokens_per_microbatch=value)
    assert make_config(max_tokens_per_microbatch="512").max_tokens_per_microbatch == 512
