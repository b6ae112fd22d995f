"""Checkpoints: the totals survive, and a resumed run is the run that was never interrupted."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer
from hf_sft_plugin.checkpoints.checkpoint import (
    find_checkpoint,
    is_complete,
    load_order,
    load_switch,
    load_totals,
    require_resumable,
    save_order,
    save_switch,
    save_totals,
)
from hf_sft_plugin.loss.totals import NUM_TOTALS, Totals, WindowedTotals
from hf_sft_plugin.reporting.run_log import read_log

CLOSED = [0.1, 3.0, 0.3, math.pi, 5.0, 7.0, 11.0, 2.0, 13.5, 11.0]
OPEN = [1e-300, 2.0, 0.7, 1 / 3, 1.0, 2.0, 2.0**40 + 1, 1.0, 0.1, 2.0]


def make_totals(accelerator: Accelerator, *, has_window: bool = True) -> WindowedTotals:
    totals = WindowedTotals()
    totals.add(torch.tensor(CLOSED, dtype=torch.float64))
    totals.close(accelerator)
    if has_window:
        totals.add(torch.tensor(OPEN, dtype=torch.float64))
    return totals


@pytest.mark.parametrize("has_window", [True, False])
def test_totals_come_back_to_the_last_bit(has_window: bool, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    totals = make_totals(accelerator, has_window=has_window)
    window = OPEN if has_window else [0.0] * NUM_TOTALS
    save_totals(str(tmp_path), totals, accelerator)
    loaded = WindowedTotals()
    load_totals(str(tmp_path), loaded, accelerator)
    for found in (totals, loaded):
        assert found.run == Totals(*CLOSED)
        assert found.peek(accelerator) == Totals(*window)
        assert found.close(accelerator) == Totals(*window)
        assert found.run == Totals(*CLOSED) + Totals(*window)


@pytest.mark.parametrize("is_on", [True, False, None])
def test_whether_gradient_checkpointing_was_switched_on_comes_back(
    is_on: bool | None, tmp_path: Path
) -> None:
    accelerator = Accelerator(cpu=True)
    assert load_switch(str(tmp_path), accelerator) is None
    save_switch(str(tmp_path), is_on, accelerator)
    assert load_switch(str(tmp_path), accelerator) is is_on


@pytest.mark.parametrize(("num_processes", "expected"), [(2, [False, True]), (3, [True] * 3)])
def test_every_process_finds_its_own_switch_and_others_that_of_any(
    num_processes: int, expected: list[bool], tmp_path: Path
) -> None:
    (tmp_path / "gradient_checkpointing.json").write_text("[false, true]")
    processes = [
        SimpleNamespace(num_processes=num_processes, process_index=rank)
        for rank in range(num_processes)
    ]
    assert [load_switch(str(tmp_path), each) for each in processes] == expected  # type: ignore[arg-type]


def test_totals_that_are_not_finite_come_back(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    totals = WindowedTotals()
    totals.add(torch.tensor([math.nan, math.inf, *[1.0] * 8], dtype=torch.float64))
    save_totals(str(tmp_path), totals, accelerator)
    loaded = WindowedTotals()
    load_totals(str(tmp_path), loaded, accelerator)
    values = loaded.peek(accelerator).to_list()
    assert math.isnan(values[0])
    assert values[1:] == [math.inf, *[1.0] * 8]


def test_loading_replaces_what_was_counted_before(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    save_totals(str(tmp_path), make_totals(accelerator), accelerator)
    loaded = make_totals(accelerator)
    load_totals(str(tmp_path), loaded, accelerator)
    assert loaded.run == Totals(*CLOSED)
    assert loaded.peek(accelerator) == Totals(*OPEN)


def test_a_checkpoint_from_before_there_were_as_many_totals_comes_back(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    state = {"run": CLOSED[:8], "windows": [OPEN[:8]]}
    (tmp_path / "response_totals.json").write_text(json.dumps(state))
    loaded = WindowedTotals()
    load_totals(str(tmp_path), loaded, accelerator)
    assert loaded.run == Totals(*CLOSED[:8])
    assert loaded.peek(accelerator) == Totals(*OPEN[:8])


def test_a_checkpoint_without_totals_starts_the_counts_at_0(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    loaded = WindowedTotals()
    load_totals(str(tmp_path), loaded, accelerator)
    assert loaded.run == Totals()
    assert loaded.peek(accelerator) == Totals()


def make_checkpoint(folder: Path, step: int, state: str | None = "{}") -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "rng_state_0.pth").touch()
    if state is not None:
        (checkpoint / "trainer_state.json").write_text(state)
    return checkpoint


def test_the_order_of_the_rows_comes_back(tmp_path: Path) -> None:
    assert load_order(str(tmp_path)) is None
    order = {"training rows": 3, "position": [0, 2]}
    save_order(str(tmp_path), order, Accelerator(cpu=True))
    assert load_order(str(tmp_path)) == order


@pytest.mark.parametrize("state", [None, "", '{"epoch": 1.', "3", "\0"])
def test_a_checkpoint_without_a_whole_state_is_incomplete(
    state: str | None, tmp_path: Path
) -> None:
    checkpoint = str(make_checkpoint(tmp_path, 20, state))
    assert not is_complete(checkpoint)
    with pytest.raises(
        ValueError, match=r"no complete checkpoint.* resume_from_checkpoint to True"
    ):
        require_resumable(checkpoint)
    with pytest.raises(ValueError, match=r"holds 1, none of them complete\. Leave it out to start"):
        find_checkpoint(str(tmp_path))
    # 9 comes before 20, as numbers do.
    for step in (3, 9):
        make_checkpoint(tmp_path, step)
    assert find_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-9")


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 3)
    require_resumable(str(checkpoint))
    (checkpoint / "rng_state_0.pth").unlink()
    with pytest.raises(ValueError, match="was saved with save_only_model"):
        require_resumable(str(checkpoint))


Make = Callable[..., MaskedSFTConfig]
TIMES = {"train_runtime", "train_samples_per_second", "train_steps_per_second"}


@pytest.fixture
def train(
    chat_rows: list[dict[str, Any]], model_factory: Any, tokenizer_factory: Any, make_config: Make
) -> Callable[..., MaskedSFTTrainer]:
    """Trains 6 steps of 2 accumulated batches, with a log line after step 4."""

    def run(resume: str | None = None, seed: int = 0, **overrides: Any) -> MaskedSFTTrainer:
        args = make_config(
            max_steps=6,
            logging_steps=4,
            save_strategy="steps",
            save_steps=3,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            **overrides,
        )
        trainer = MaskedSFTTrainer(
            model_factory(seed=seed, attention_dropout=0.1),
            args,
            train_dataset=Dataset.from_list(chat_rows),
            processing_class=tokenizer_factory(),
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


def without_times(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in r.items() if key not in TIMES} for r in records]


def test_a_resumed_run_is_the_uninterrupted_run_to_the_last_bit(
    train: Callable[..., MaskedSFTTrainer], tmp_path: Path
) -> None:
    whole = train(output_dir=str(tmp_path / "whole"))
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    # The window of steps 1 to 4 is open here, so no log line holds it yet.
    state = json.loads((checkpoint / "response_totals.json").read_text())
    assert state["run"] == [0.0] * NUM_TOTALS
    assert Totals(*state["windows"][0]).num_tokens > 0
    resumed = train(resume=str(checkpoint), seed=1, output_dir=str(tmp_path / "resumed"))
    logs = without_times(whole.state.log_history)
    assert without_times(resumed.state.log_history) == logs
    assert [record["step"] for record in logs] == [4, 6]
    assert {"loss", "token_entropy", "token_accuracy", "num_response_tokens", "num_tokens"} < set(
        logs[0]
    )
    assert {"train_loss", "train_token_entropy", "train_token_accuracy"} < set(logs[1])
    assert read_log(tmp_path / "resumed") == resumed.state.log_history
    weights = resumed.model.state_dict()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weights[name], weight), name


def test_a_checkpoint_of_another_trainer_trains_on_with_counts_from_0(
    train: Callable[..., MaskedSFTTrainer], tmp_path: Path
) -> None:
    whole = train(output_dir=str(tmp_path / "whole"))
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    (checkpoint / "response_totals.json").unlink()
    resumed = train(resume=str(checkpoint), seed=1, output_dir=str(tmp_path / "resumed"))
    counts = [t.state.log_history[0]["num_response_tokens"] for t in (whole, resumed)]
    # Of the steps 1 to 4, only the last was counted.
    assert 0 < counts[1] < counts[0]
    weights = resumed.model.state_dict()
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weights[name], weight), name
