"""Saving, evaluating, logging and stopping happen where a plain `Trainer` does them."""

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    MaskedLossMixin,
    MaskedSFTConfig,
    MaskedSFTTrainer,
)

Make = Callable[..., Any]
# Of rows with as many trained tokens each, a mean of means is the mean.
ROWS = [{"input_ids": [5 + n, 7, 9, 2], "response_mask": [0, 1, 1, 1]} for n in range(6)]
STRATEGIES = ("no", "steps", "epoch", "best")
# What one evaluation after the other finds; the best is neither the first nor the last.
SCORES = [0.2, 0.5, 0.3, 0.9, 0.4, 0.6, 0.1, 0.8, 0.7, 0.0]


class MixinTrainer(MaskedLossMixin, Trainer):
    """Any `Trainer` with the mixin."""


class Judge:
    """A metric that finds one score after the other."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, predictions: Any) -> dict[str, float]:
        self.count += 1
        return {"score": SCORES[(self.count - 1) % len(SCORES)]}


class Saves(TrainerCallback):
    """Which steps were saved, by `on_save`, and what checkpoints were there then."""

    def __init__(self) -> None:
        self.found: list[tuple[int, list[str]]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found.append((state.global_step, folders_of(args.output_dir)))


def folders_of(output_dir: str) -> list[str]:
    return sorted(path.name for path in Path(output_dir).glob("checkpoint-*"))


def logs_of(state: Any) -> list[tuple[int, float, list[str]]]:
    """Which lines were logged where, by what is in them; the mixin adds some figures."""
    kept = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_score", "train_loss")
    return [(log["step"], log["epoch"], sorted({*kept} & {*log})) for log in state.log_history]


@pytest.fixture
def train(model_factory: Make, tokenizer: Any, tmp_path: Path) -> Make:
    """Trains two epochs of three steps, or of two with accumulation."""

    def run(
        kind: type[Trainer],
        callbacks: Any = (),
        resume: str | None = None,
        name: str | None = None,
        **settings: Any,
    ) -> tuple[Any, Saves]:
        own = {
            "output_dir": str(tmp_path / (name or kind.__name__)),
            "num_train_epochs": 2,
            "per_device_train_batch_size": 2,
            "per_device_eval_batch_size": 6,
            "logging_strategy": "epoch",
            "learning_rate": 1e-2,
            "use_cpu": True,
            "report_to": "none",
            "disable_tqdm": True,
            "remove_unused_columns": False,
            **settings,
        }
        is_ours = kind is MaskedSFTTrainer
        collator = DataCollatorForPromptResponse(tokenizer, return_response_mask=False)
        saves = Saves()
        trainer = kind(
            model_factory(hidden_size=8, intermediate_size=8, num_hidden_layers=1),
            MaskedSFTConfig(**own) if is_ours else TrainingArguments(**own),
            data_collator=None if is_ours else collator,
            train_dataset=ROWS,
            eval_dataset=ROWS,
            processing_class=tokenizer,
            compute_metrics=Judge() if "metric_for_best_model" in settings else None,
            callbacks=[saves, *callbacks],
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, saves

    return run


def assert_same_run(ours: Any, plain: Any) -> None:
    """Whether two runs saved, logged and chose the same."""
    (found, saves), (expected, expected_saves) = ours, plain
    # A checkpoint that a plain trainer writes twice is written once.
    assert dict(saves.found) == dict(expected_saves.found)
    assert folders_of(found.args.output_dir) == folders_of(expected.args.output_dir)
    assert logs_of(found.state) == logs_of(expected.state)
    for name in ("global_step", "epoch", "best_metric", "best_global_step", "max_steps"):
        assert getattr(found.state, name) == getattr(expected.state, name), name
    if found.args.save_strategy in (found.args.eval_strategy, "best"):
        assert best_of(found) == best_of(expected)
    # The loss of either is the mean over the same tokens.
    pairs = zip(found.model.parameters(), expected.model.parameters(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)


def best_of(trainer: Any) -> str | None:
    folder = trainer.state.best_model_checkpoint
    return None if folder is None else Path(folder).name


def make_cases() -> dict[str, dict[str, Any]]:
    """Every way to save, to evaluate and to end that a plain `Trainer` admits."""
    cases = {}
    # Three steps make an epoch, so that the last epoch ends at step 6, and 5 is within it.
    for save, evaluate, end in product(STRATEGIES, ("no", "steps", "epoch"), (-1, 5)):
        if (save == "best" and evaluate == "no") or (save == "no" and end > 0):
            continue
        case = {"save_strategy": save, "eval_strategy": evaluate, "max_steps": end}
        case |= {"save_steps": 3, "eval_steps": 1}
        if evaluate != "no":
            case |= {"metric_for_best_model": "score", "greater_is_better": True}
            case["load_best_model_at_end"] = save in (evaluate, "best")
        cases[f"save {save}, evaluate {evaluate}, {end} steps"] = case
    best = {"metric_for_best_model": "score", "load_best_model_at_end": True}
    epochs = {"save_strategy": "epoch", "eval_strategy": "epoch", "num_train_epochs": 4}
    steps = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2}
    cases["accumulation"] = {"gradient_accumulation_steps": 2, **epochs, **best}
    cases["best of epochs with a limit"] = {"save_total_limit": 1, **epochs, **best}
    cases["best of steps with a limit"] = {"save_total_limit": 2, "save_steps": 2, **steps, **best}
    cases["logs of steps"] = {"logging_strategy": "steps", "logging_steps": 2, **epochs}
    cases["late evaluations"] = {"eval_delay": 2, "eval_on_start": True, **epochs, **best}
    cases["dropped rows"] = {"dataloader_drop_last": True, "per_device_train_batch_size": 4}
    cases["dropped rows"] |= epochs
    return cases


CASES = make_cases()


@pytest.mark.parametrize("name", CASES)
def test_a_trainer_with_the_mixin_saves_where_a_plain_one_does(name: str, train: Make) -> None:
    assert_same_run(train(MixinTrainer, **CASES[name]), train(Trainer, **CASES[name]))


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_the_trainer_saves_where_a_plain_one_does(strategy: str, train: Make) -> None:
    case = CASES[f"save {strategy}, evaluate {strategy.replace('best', 'epoch')}, -1 steps"]
    assert_same_run(train(MaskedSFTTrainer, **case), train(Trainer, **case))


@pytest.mark.parametrize("strategy", ["steps", "epoch", "best"])
def test_early_stopping_stops_where_a_plain_trainer_does(strategy: str, train: Make) -> None:
    evaluate = "epoch" if strategy == "best" else strategy
    case = {"save_strategy": strategy, "eval_strategy": evaluate, "num_train_epochs": 9}
    case |= {"eval_steps": 1, "save_steps": 1, "metric_for_best_model": "score"}
    case["load_best_model_at_end"] = True
    runs = [
        train(kind, callbacks=[EarlyStoppingCallback(2)], **case)
        for kind in (MixinTrainer, Trainer)
    ]
    assert_same_run(*runs)
    # The fourth was the best.
    assert runs[0][0].state.global_step == 6 * (1 if evaluate == "steps" else 3)
    assert best_of(runs[0][0]) == f"checkpoint-{4 * (1 if evaluate == 'steps' else 3)}"


class At(TrainerCallback):
    """Sets flags of the control at some event of some step."""

    def __init__(self, event: str, step: int, *flags: str) -> None:
        def set_flags(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                for flag in flags:
                    setattr(control, flag, True)

        setattr(self, event, set_flags)


@pytest.mark.parametrize(
    ("event", "step", "flags"),
    [
        ("on_step_end", 2, ["should_save", "should_evaluate"]),
        ("on_step_end", 3, ["should_save", "should_log"]),
        ("on_log", 3, ["should_save"]),
        ("on_evaluate", 3, ["should_save"]),
        ("on_epoch_end", 3, ["should_save"]),
        ("on_epoch_end", 3, ["should_save", "should_evaluate"]),
        ("on_step_end", 4, ["should_save", "should_epoch_stop"]),
        ("on_step_end", 4, ["should_save", "should_training_stop"]),
        ("on_evaluate", 3, ["should_training_stop"]),
    ],
)
def test_what_a_callback_asks_for_is_done_where_a_plain_trainer_does_it(
    event: str, step: int, flags: list[str], train: Make
) -> None:
    case = {"save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3}
    runs = [
        train(kind, callbacks=[At(event, step, *flags)], **case) for kind in (MixinTrainer, Trainer)
    ]
    assert_same_run(*runs)


def test_a_best_model_is_saved_though_its_epoch_is_evaluated_twice(train: Make) -> None:
    case = {"save_strategy": "best", "eval_strategy": "steps", "eval_steps": 3}
    case |= {"metric_for_best_model": "score", "load_best_model_at_end": True}
    runs = [
        train(kind, callbacks=[At("on_epoch_end", 6, "should_evaluate")], **case)
        for kind in (MixinTrainer, Trainer)
    ]
    assert_same_run(*runs)
    assert best_of(runs[0][0]) == "checkpoint-6"


SAME_STRATEGY = [("steps", "steps"), ("steps", "epoch"), ("epoch", "epoch"), ("best", "steps")]


@pytest.mark.parametrize(("save", "evaluate"), SAME_STRATEGY)
def test_a_checkpoint_holds_what_the_end_of_its_epoch_logs(
    save: str, evaluate: str, train: Make
) -> None:
    """So a run that goes on from it logs what the run that was not stopped logs."""
    case = {"save_strategy": save, "eval_strategy": evaluate, "save_steps": 3, "eval_steps": 3}
    case |= {"metric_for_best_model": "loss"}
    whole, _ = train(MixinTrainer, name="whole", **case)
    folder = Path(whole.args.output_dir, "checkpoint-3")
    state = json.loads((folder / "trainer_state.json").read_text())
    at_step = [log for log in state["log_history"] if log["step"] == 3]
    assert {"loss", "eval_loss"} <= {key for log in at_step for key in log}
    assert state["log_history"] == whole.state.log_history[: len(state["log_history"])]
    resumed, _ = train(MixinTrainer, name="resumed", resume=str(folder), **case)
    assert logs_of(resumed.state) == logs_of(whole.state)
    assert resumed.state.best_metric == whole.state.best_metric
    pairs = zip(resumed.model.parameters(), whole.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
