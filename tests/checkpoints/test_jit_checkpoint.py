"""A run that SIGTERM stopped at any place of a step goes on as if it had not been stopped."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

from hf_sft_plugin import MaskedSFTTrainer
from hf_sft_plugin.checkpoints.jit_checkpoint import StepEndCheckpoint

Make = Callable[..., Any]
TIMES = ("runtime", "samples_per_second", "steps_per_second")


class Killer(TrainerCallback):
    """Sends SIGTERM to the process at one of the events of one step, and waits until it is seen."""

    def __init__(self, event: str, step: int) -> None:
        self.step = step
        self.trainer: Any = None
        setattr(self, event, self.kill)

    def kill(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (own,) = [c for c in self.trainer.callback_handler.callbacks if hasattr(c, "manager")]
        if state.global_step != self.step or own.manager.is_checkpoint_requested:
            return
        own.manager.kill_wait = 0
        os.kill(os.getpid(), signal.SIGTERM)
        while not own.manager.is_checkpoint_requested:
            time.sleep(0.01)


@pytest.fixture
def train(model_factory: Make, make_config: Make, tokenizer: Any, tmp_path: Path) -> Make:
    """Two epochs of three steps, with dropout, logs and evaluations at the end of each."""
    rows = Dataset.from_list(
        [{"input_ids": [*range(5, 9 + n)], "response_mask": [0, *[1] * (3 + n)]} for n in range(11)]
    )

    def run(name: str, killer: Killer | None = None, resume: Any = None, **settings: Any) -> Any:
        trainer = MaskedSFTTrainer(
            model_factory(attention_dropout=0.2),
            make_config(
                output_dir=str(tmp_path / name),
                max_steps=6,
                gradient_accumulation_steps=2,
                logging_steps=2,
                eval_strategy="epoch",
                # Rows of a step one batch at a time, as they come.
                max_tokens_per_microbatch=None,
                enable_jit_checkpoint=killer is not None,
                **settings,
            ),
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizer,
            callbacks=[] if killer is None else [killer],
        )
        if killer is not None:
            killer.trainer = trainer
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def history_of(trainer: Any) -> list[dict[str, Any]]:
    logs = trainer.state.log_history
    return [{k: v for k, v in log.items() if not k.endswith(TIMES)} for log in logs]


def test_the_resumed_run_is_the_one_that_was_not_stopped(train: Make, tmp_path: Path) -> None:
    """Killed within a step, before the optimizer has its turn, and in the last step of an epoch."""
    whole = train("whole")
    callbacks = whole.callback_handler.callbacks
    assert not any(isinstance(c, StepEndCheckpoint | JITCheckpointCallback) for c in callbacks)
    for event, step in [("on_substep_end", 1), ("on_pre_optimizer_step", 2)]:
        before, name = signal.getsignal(signal.SIGTERM), f"{event}{step}"
        stopped = train(name, Killer(event, step))
        assert signal.getsignal(signal.SIGTERM) is before
        assert stopped.state.global_step == step + 1
        folders = [path.name for path in (tmp_path / name).glob("checkpoint-*")]
        assert folders == [f"checkpoint-{step + 1}"]
        resumed = train(f"{name}-resumed", resume=str(tmp_path / name / folders[0]))
        assert history_of(resumed) == history_of(whole)
        pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_checkpoint_of_every_epoch_is_not_written_where_an_epoch_was_broken_off(
    train: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped = train("run", Killer("on_step_begin", 1), save_strategy="epoch")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
    assert not any("eval_loss" in log for log in stopped.state.log_history)
    assert "SIGTERM stopped the run after step 2 of 6, with a checkpoint." in caplog.text


@pytest.mark.parametrize(("others", "is_asked"), [([False, True], True), ([False, False], False)])
def test_all_processes_save_where_one_was_asked(others: list[bool], is_asked: bool) -> None:
    accelerator = SimpleNamespace(
        num_processes=2, device="cpu", gather=lambda found: torch.tensor([*others, *found])
    )
    trainer: Any = SimpleNamespace(accelerator=accelerator)
    callback, control = StepEndCheckpoint(trainer, CheckpointManager(trainer)), TrainerControl()
    callback.on_step_end(None, None, control)
    assert control.should_save == is_asked
    callback.on_save(None, TrainerState(), control)
    assert control.should_training_stop == is_asked
