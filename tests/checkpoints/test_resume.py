"""A run that was stopped after any optimizer step goes on as if it had not been stopped."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer
from hf_sft_plugin.batches.microbatches import Microbatches
from hf_sft_plugin.checkpoints.checkpoint import find_checkpoint
from hf_sft_plugin.reporting.run_log import read_log
from hf_sft_plugin.tokens.row_tokenizer import RowTokenizer

Make = Callable[..., Any]
TIMES = ("runtime", "samples_per_second", "steps_per_second")
# Of 13 rows, two at a time, every epoch has four steps, the last of them of one row.
SETTINGS: dict[str, Any] = {"max_steps": 10, "gradient_accumulation_steps": 2, "logging_steps": 3}
# Otherwise every run measures first what it needs.
SETTINGS["max_tokens_per_microbatch"] = 4096
EPOCHS = {"logging_strategy": "epoch", "eval_strategy": "epoch"}


def make_rows(num_rows: int = 13) -> list[dict[str, Any]]:
    """Rows of 4 to 16 tokens; each three begin with the same prompt."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(num_rows):
        prompt = [10 + number // 3] * (3 + number % 2)
        response = torch.randint(3, 300, (1 + 5 * number % 12,), generator=generator).tolist()
        mask = [0] * len(prompt) + [1] * len(response)
        rows.append({"input_ids": prompt + response, "response_mask": mask})
    return rows


class Recorder(MaskedSFTTrainer):
    """Keeps the rows of every optimizer step, as they go into the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.steps: dict[int, list[list[list[int]]]] = {}

    def get_batch_samples(self, *args: Any) -> Any:
        batches, count = super().get_batch_samples(*args)
        parts = [p for b in batches for p in (b if isinstance(b, Microbatches) else [b])]
        if parts:
            rows = [
                [ids[mask == 1].tolist() for ids, mask in zip(*tensors, strict=True)]
                for tensors in ((p["input_ids"], p["attention_mask"]) for p in parts)
            ]
            self.steps[self.state.global_step + 1] = rows
        return batches, count


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return dict(trainer.model.state_dict())


def history_of(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if not k.endswith(TIMES)} for record in records]


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    """Compares to the last bit, through dicts and lists."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{where}[{number}]")
    else:
        assert found == expected, where


def assert_goes_on(resumed: Recorder, whole: Recorder, step: int) -> None:
    """Whether a run resumed after a step is the one that was not stopped."""
    assert resumed.state.global_step == whole.state.global_step
    later = {number: rows for number, rows in whole.steps.items() if number > step}
    assert resumed.steps == later
    assert_same(weights_of(resumed), weights_of(whole), "weights")
    assert_same(resumed.optimizer.state_dict(), whole.optimizer.state_dict(), "optimizer")
    assert_same(resumed.lr_scheduler.state_dict(), whole.lr_scheduler.state_dict(), "scheduler")
    logs = [history_of(trainer.state.log_history) for trainer in (resumed, whole)]
    assert logs[0] == logs[1]
    files = [history_of(read_log(Path(t.args.output_dir))) for t in (resumed, whole)]
    assert files[0] == files[1]
    assert files[0] == logs[0]


@pytest.fixture
def train(make_config: Make, model_factory: Make, tokenizer: Any, tmp_path: Path) -> Make:
    """Trains in a folder of its own, and checkpoints every step."""

    def run(
        name: str,
        resume: Any = None,
        rows: Any = None,
        model: dict[str, Any] | None = None,
        lora: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Recorder:
        own = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
        config: MaskedSFTConfig = make_config(
            **{**own, **SETTINGS, "output_dir": str(tmp_path / name), **settings}
        )
        trainer = Recorder(
            model_factory(**(model or {})),
            config,
            train_dataset=make_rows() if rows is None else rows,
            eval_dataset=make_rows(3),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **lora) if lora else None,
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    return run


DROPOUT = {"attention_dropout": 0.2}
LORA = {"r": 2, "lora_dropout": 0.3, "target_modules": "all-linear"}


def make_stream(num_shards: int = 1) -> Any:
    return Dataset.from_list(make_rows()).to_iterable_dataset(num_shards)


def make_shuffled(num_shards: int = 1) -> Any:
    return make_stream(num_shards).shuffle(seed=1, buffer_size=5)


def make_even_stream() -> Any:
    """No row is left over at the end of the last step."""
    return Dataset.from_list(make_rows(12)).to_iterable_dataset()


# Steps to resume from, and settings. Steps 4 and 8 end an epoch, and 10 all.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "dropout": ((3, 4, 6, 10), {"model": DROPOUT}),
    "LoRA": ((3,), {"lora": LORA}),
    "packing": ((3,), {"packing": True, "max_length": 32, "gradient_accumulation_steps": 1}),
    "prompts": ((6,), {"group_by_prompt": True}),
    "lengths": ((6,), {"train_sampling_strategy": "group_by_length", "model": DROPOUT}),
    "rebalanced": ((6,), {"train_sampling_strategy": "batch_rebalance"}),
    "budget": ((3,), {"max_tokens_per_microbatch": 24}),
    "as they come": ((3,), {"max_tokens_per_microbatch": None}),
    "as memory allows": ((6,), {"max_tokens_per_microbatch": "auto", "model": DROPOUT}),
    "workers": ((6,), {"dataloader_num_workers": 2, "model": DROPOUT}),
    "persistent workers": (
        (3,),
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "model": DROPOUT},
    ),
    "stream": ((4, 6, 10), {"make": make_stream}),
    "shuffled stream": ((6,), {"make": make_shuffled, "model": DROPOUT}),
    "stream with workers": (
        (6,),
        {"make": partial(make_shuffled, num_shards=2), "dataloader_num_workers": 2},
    ),
    "log of epochs": ((4, 8), {"max_steps": -1, "num_train_epochs": 2, **EPOCHS}),
    "checkpoints of epochs": (
        (4, 8),
        {"save_strategy": "epoch", "model": DROPOUT, **EPOCHS, "metric_for_best_model": "loss"},
    ),
    "checkpoints of the best": (
        (4,),
        {
            "save_strategy": "best",
            "eval_strategy": "steps",
            "eval_steps": 4,
            "metric_for_best_model": "loss",
            "logging_strategy": "epoch",
            "model": DROPOUT,
        },
    ),
    "stream by epochs": (
        (4, 8, 10),
        {"make": make_stream, "save_strategy": "epoch", "model": DROPOUT, **EPOCHS},
    ),
    "stream, log of epochs": ((3, 4), {"make": make_stream, "model": DROPOUT, **EPOCHS}),
    "even stream, log of epochs": (
        (3,),
        {"make": make_even_stream, "model": DROPOUT, **EPOCHS},
    ),
    "evaluation": (
        (3,),
        {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "model": DROPOUT},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_is_the_uninterrupted_run_to_the_last_bit(name: str, train: Make) -> None:
    steps, case = CASES[name]
    case = {"make": make_rows, **case}
    make = case.pop("make")
    whole = train("whole", rows=make(), **case)
    for step in steps:
        checkpoint = f"{whole.args.output_dir}/checkpoint-{step}"
        assert_goes_on(train("resumed", checkpoint, rows=make(), **case), whole, step)


def test_rows_of_a_stream_that_were_trained_are_not_tokenized_again(
    train: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized: list[int] = []
    tokenize = RowTokenizer.__call__

    def count(self: Any, rows: Any, indices: Any, *args: Any) -> Any:
        # Those of the stream, which come 64 at a time, and not what the collator checks.
        tokenized.extend(indices if len(rows) in (64, 22) else ())
        return tokenize(self, rows, indices, *args)

    monkeypatch.setattr(RowTokenizer, "__call__", count)
    rows = [{"prompt": f"{n} is", "response": f"{n}" if n % 9 else " "} for n in range(150)]

    def make() -> Any:
        return Dataset.from_list(rows).to_iterable_dataset().shuffle(seed=2, buffer_size=100)

    settings = {"per_device_train_batch_size": 8, "max_dropped_share": 0.5, "model": DROPOUT}
    # An epoch has 133 rows, 16 of them in a step; 80 come from the first two times 64.
    whole = train("whole", rows=make(), **settings)
    assert sorted({*tokenized}) == list(range(150))
    tokenized.clear()
    resumed = train("resumed", f"{whole.args.output_dir}/checkpoint-5", rows=make(), **settings)
    assert_goes_on(resumed, whole, 5)
    # Then comes the next pass, with the first 64 rows again.
    assert tokenized[:86] == list(range(64, 150))


def test_the_last_rows_of_a_stream_are_a_step_of_their_own(train: Make) -> None:
    stream = train("stream", rows=make_stream(), max_steps=4)
    rows = train("rows", train_sampling_strategy="sequential", max_steps=4)
    assert [len(batch) for batch in stream.steps[4]] == [1]
    assert stream.steps == rows.steps
    assert_same(weights_of(stream), weights_of(rows))


def test_true_takes_the_last_checkpoint_that_is_complete(
    train: Make, caplog: pytest.LogCaptureFixture
) -> None:
    whole = train("run", max_steps=4)
    folder = Path(whole.args.output_dir)
    # What is left when a process is killed while it writes.
    state = folder / "checkpoint-4" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:100])
    (folder / "checkpoint-3" / "trainer_state.json").unlink()
    resumed = train("run", True, max_steps=4)
    assert_goes_on(resumed, whole, 2)
    warned = [record.args for record in caplog.records if "passed over" in record.message]
    assert warned == [(str(folder / f"checkpoint-{step}"),) for step in (4, 3)]


def test_a_checkpoint_that_is_written_again_is_incomplete_until_it_is_whole(
    train: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("run", max_steps=3)

    def fail(*args: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr(Recorder, "_save_scaler", fail)
    with pytest.raises(RuntimeError, match="killed"):
        train("run", f"{whole.args.output_dir}/checkpoint-2", max_steps=3)
    monkeypatch.undo()
    assert find_checkpoint(whole.args.output_dir).endswith("checkpoint-2")


def test_what_cannot_be_resumed_is_refused_with_what_to_do(train: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'.*new' holds none\. Leave it out to start anew"):
        train("new", True)
    with pytest.raises(ValueError, match=r"no complete checkpoint.* Choose an earlier one"):
        train("new", str(tmp_path))
    bare = train("bare", max_steps=1, save_only_model=True)
    with pytest.raises(ValueError, match=r"save_only_model.* Start a new run with this folder"):
        train("new", f"{bare.args.output_dir}/checkpoint-1")


def test_other_rows_or_another_order_are_refused_unless_the_epoch_begins_anew(
    train: Make, tmp_path: Path
) -> None:
    checkpoint = train("run", max_steps=6).args.output_dir + "/checkpoint-6"
    edited = make_rows()
    edited[7]["input_ids"][-1] += 1
    for changed, message in (
        ({"rows": edited}, "digest of the training rows"),
        ({"rows": make_rows(15)}, "training rows: 13 then, 15 now"),
        ({"data_seed": 7}, "data_seed: 42 then, 7 now"),
        ({"group_by_prompt": True}, "order: random then, group_by_prompt now"),
        ({"gradient_accumulation_steps": 1}, "Set gradient_accumulation_steps to 2"),
    ):
        with pytest.raises(ValueError, match=message):
            train("other", checkpoint, **changed)
    anew = train("anew", checkpoint, rows=edited, ignore_data_skip=True)
    assert sorted(anew.steps) == [7, 8, 9, 10]
    # The rows of the second epoch, all of them.
    assert sorted(row for step in anew.steps.values() for part in step for row in part) == sorted(
        row["input_ids"] for row in edited
    )


def rates_of(trainer: Any) -> list[float]:
    """The learning rate of every step."""
    logs = trainer.state.log_history
    return [log["learning_rate"] for log in logs if "learning_rate" in log]


@pytest.mark.parametrize(
    ("schedule", "num_warmup"), [("linear", 0), ("cosine", 0), ("linear", 2), ("polynomial", 2)]
)
def test_a_run_that_is_made_longer_goes_on_with_the_longer_schedule(
    schedule: str, num_warmup: int, train: Make, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"logging_steps": 1, "lr_scheduler_type": schedule, "warmup_steps": num_warmup}
    short = train("short", max_steps=4, **settings)
    whole = train("whole", max_steps=7, **settings)
    caplog.clear()
    for step in (4, 3):
        checkpoint = f"{short.args.output_dir}/checkpoint-{step}"
        longer = train("longer", checkpoint, max_steps=7, **settings)
        assert rates_of(longer)[step:] == rates_of(whole)[step:]
        assert min(rates_of(longer)[step:]) > 0
        assert longer.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
        warned = [
            record.message for record in caplog.records if "learning rate is" in record.message
        ]
        assert len(warned) == 1
        assert checkpoint in warned[0]
        caplog.clear()


@pytest.mark.parametrize("schedule", ["constant", "constant_with_warmup", "inverse_sqrt"])
def test_a_longer_run_of_a_schedule_without_an_end_is_the_longer_run(
    schedule: str, train: Make, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"lr_scheduler_type": schedule, "warmup_steps": 2, "logging_steps": 1}
    short = train("short", max_steps=4, **settings)
    whole = train("whole", max_steps=7, **settings)
    longer = train("longer", f"{short.args.output_dir}/checkpoint-4", max_steps=7, **settings)
    assert_same(weights_of(longer), weights_of(whole), "weights")
    assert rates_of(longer) == rates_of(whole)
    assert not any("learning rate is" in record.message for record in caplog.records)


def test_a_run_goes_on_with_the_learning_rate_that_is_asked_for(
    train: Make, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"logging_steps": 1, "max_steps": 4}
    whole = train("whole", **settings)
    checkpoint = f"{whole.args.output_dir}/checkpoint-2"
    other = train("other", checkpoint, learning_rate=4e-3, **settings)
    assert rates_of(other)[2:] == pytest.approx([2e-3, 1e-3], rel=1e-12)
    assert "is 0.002" in caplog.text
    assert "it was 0.005" in caplog.text


def test_more_epochs_go_on_with_the_longer_schedule(train: Make) -> None:
    settings = {"logging_steps": 1, "max_steps": -1, "save_strategy": "epoch"}
    short = train("short", num_train_epochs=1, **settings)
    whole = train("whole", num_train_epochs=2, **settings)
    checkpoint = f"{short.args.output_dir}/checkpoint-4"
    longer = train("longer", checkpoint, num_train_epochs=2, **settings)
    assert rates_of(longer)[4:] == rates_of(whole)[4:]
    assert longer.steps == {n: rows for n, rows in whole.steps.items() if n > 4}
