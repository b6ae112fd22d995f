"""What surrounds a run: the summary before it, the log during it, report and card after it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig
from run_examples import LEDGER, with_lora
from transformers import TrainerControl, TrainerState

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer
from hf_sft_plugin.reporting.run_log import read_log, start_log
from hf_sft_plugin.training.callbacks import (
    RunRecorder,
    card_facts,
    warn_of_rounding,
)

Make = Callable[..., MaskedSFTConfig]
TOKEN = "hf_" + "s" * 34


def make_state(step: int = 0, *records: dict[str, Any], **fields: Any) -> TrainerState:
    state = TrainerState(**{"max_steps": 1234, "num_train_epochs": 3, **fields})
    state.global_step = step
    state.log_history = list(records)
    return state


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


BEFORE = {"eval_loss": 5.0, "eval_token_accuracy": 0.0, "step": 0}
MIDDLE = {"eval_loss": 4.0, "eval_token_accuracy": 0.25, "step": 3}
AFTER = {"eval_loss": 3.0, "eval_token_accuracy": 0.5, "step": 6}
TRAIN = {"loss": 4.5, "step": 2}


def test_the_card_says_what_was_set(model: Any, make_config: Make) -> None:
    args = make_config(
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        learning_rate=3e-4,
        lr_scheduler_type="cosine",
        warmup_steps=7,
        optim="adamw_torch",
        loss_normalization="example",
        bf16=True,
        seed=11,
    )
    facts = card_facts(args, make_state(1234), model, LEDGER)
    assert facts.settings == {
        "learning rate": 3e-4,
        "schedule": "cosine",
        "warm-up": "7",
        "optimizer": "adamw_torch",
        "optimizer steps": "1,234",
        "rows per optimizer step": 15,
        "loss normalization": "example",
        "precision": "bf16",
        "seed": 11,
    }
    assert list(facts.versions) == [
        "hf_sft_plugin",
        "torch",
        "transformers",
        "accelerate",
        "datasets",
        "peft",
    ]
    assert facts.versions["torch"] == torch.__version__
    assert facts.ledger == str(LEDGER)
    assert facts.model_name == "run"
    assert facts.library_name == "transformers"
    assert card_facts(args, make_state(), with_lora(model), None).library_name == "peft"
    assert card_facts(args, make_state(), model, None).ledger == ""


@pytest.mark.parametrize(
    ("records", "before", "after"),
    [
        ([], {}, {}),
        ([TRAIN], {}, {}),
        ([BEFORE], BEFORE, {}),
        ([BEFORE, TRAIN], BEFORE, {}),
        ([TRAIN, AFTER], {}, AFTER),
        ([BEFORE, TRAIN, MIDDLE, TRAIN, AFTER, TRAIN], BEFORE, AFTER),
    ],
)
def test_the_card_takes_the_evaluation_at_step_0_and_the_last_one(
    records: Any, before: Any, after: Any, model: Any, make_config: Make
) -> None:
    facts = card_facts(make_config(), make_state(6, *records), model, None)
    assert (facts.before, facts.after) == (before, after)


@pytest.mark.parametrize(
    ("output_dir", "hub_model_id", "name"),
    [
        ("out/my-run", None, "my-run"),
        ("out/my-run/", None, "my-run"),
        ("my-run/checkpoints/..", None, "my-run"),
        ("out", "somebody/my-run", "my-run"),
        ("out", "my-run", "my-run"),
    ],
)
def test_the_result_has_the_name_of_its_repository_or_folder(
    output_dir: str, hub_model_id: str | None, name: str, model: Any, make_config: Make
) -> None:
    args = make_config(output_dir=output_dir, hub_model_id=hub_model_id)
    assert card_facts(args, make_state(), model, None).model_name == name


@pytest.mark.parametrize(
    ("name_or_path", "base_model"),
    [
        ("", None),
        ("gpt2", "gpt2"),
        ("some-lab/base-model", "some-lab/base-model"),
        ("/no/longer/there", None),
        ("./no/longer/there", None),
        ("../no-longer-there", None),
        ("models/no/longer/there", None),
        (".", None),
    ],
)
@pytest.mark.parametrize("adapt", [lambda model: model, with_lora], ids=["model", "adapter"])
def test_the_base_model_is_a_name_on_the_hub_and_never_a_folder(
    name_or_path: str, base_model: str | None, adapt: Any, model: Any, make_config: Make
) -> None:
    model.config._name_or_path = name_or_path
    facts = card_facts(make_config(), make_state(), adapt(model), None)
    assert facts.base_model == base_model


def test_a_local_folder_that_looks_like_a_name_is_a_folder(
    model: Any, make_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lab", "model").mkdir(parents=True)
    model.config._name_or_path = "lab/model"
    assert card_facts(make_config(), make_state(), model, None).base_model is None


class Run:
    """The callbacks of a run, called by hand."""

    def __init__(self, args: MaskedSFTConfig, model: Any, state: TrainerState) -> None:
        self.recorder = RunRecorder({"train": LEDGER, "eval_short": LEDGER})
        self.args = args
        self.state = state
        self.model = model
        self.folder = Path(str(args.output_dir))

    def call(self, event: str) -> None:
        getattr(self.recorder, event)(self.args, self.state, TrainerControl(), model=self.model)

    def log(self, **record: Any) -> None:
        self.state.log_history.append(record)
        self.call("on_log")


@pytest.fixture
def run(make_config: Make, model: Any) -> Run:
    state = make_state()
    state.is_world_process_zero = True
    return Run(make_config(), model, state)


def test_training_begins_with_the_summary_and_the_ledgers(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.call("on_train_begin")
    run.recorder.describe_speed = lambda: {"attention": "[padded]"}
    run.call("on_step_begin")
    found = capsys.readouterr().out
    assert "attention" in found
    assert "[padded]" in found
    run.call("on_step_begin")
    assert capsys.readouterr().out == ""
    run.call("on_train_begin")
    run.call("on_step_begin")
    assert "1,234 of 2 rows" in capsys.readouterr().out
    ledgers = {"data_ledger_train.json", "data_ledger_eval_short.json"}
    certificates = {"mask_certificate_train.json", "mask_certificate_eval_short.json"}
    assert files_below(run.folder) == {*ledgers, *certificates, "metrics.jsonl"}
    for name in ledgers:
        assert json.loads((run.folder / name).read_text()) == LEDGER.to_dict()


def test_each_log_line_is_in_the_file_at_once(run: Run) -> None:
    run.call("on_train_begin")
    for step in (1, 2):
        run.log(loss=4.0 - step, step=step)
        assert read_log(run.folder) == run.state.log_history


def test_a_fresh_run_begins_the_log_anew(run: Run) -> None:
    start_log(run.folder, [{"loss": 9.0, "step": 99}])
    run.call("on_train_begin")
    run.log(loss=3.0, step=1)
    assert read_log(run.folder) == [{"loss": 3.0, "step": 1}]


def test_a_second_run_of_the_same_trainer_begins_the_log_anew(run: Run) -> None:
    run.call("on_train_begin")
    run.log(loss=3.0, step=1)
    run.call("on_train_end")
    run.log(eval_loss=2.0, step=1)
    assert len(read_log(run.folder)) == 2
    run.state.log_history = []
    run.call("on_train_begin")
    run.log(loss=2.5, step=1)
    assert read_log(run.folder) == [{"loss": 2.5, "step": 1}]


def test_a_resumed_run_continues_the_log_of_its_checkpoint(run: Run) -> None:
    start_log(run.folder, [{"loss": 9.0, "step": step} for step in range(1, 6)])
    run.state.global_step = 3
    run.state.log_history = [{"loss": 4.0, "step": 1}, {"loss": 3.0, "step": 3}]
    run.call("on_train_begin")
    assert read_log(run.folder) == run.state.log_history
    run.log(loss=2.0, step=4)
    assert [record["step"] for record in read_log(run.folder)] == [1, 3, 4]


def train_and_forget(run: Run) -> dict[str, bytes]:
    """Trains, and gives what is in the folder then; the recorder is a fresh trainer's."""
    run.call("on_train_begin")
    run.state.global_step = 6
    run.log(loss=3.5, token_entropy=2.0, token_accuracy=0.5, step=6)
    run.log(**AFTER)
    run.call("on_train_end")
    run.recorder = RunRecorder({"eval": LEDGER})
    run.state.log_history, run.state.global_step = [], 0
    return {name: (run.folder / name).read_bytes() for name in files_below(run.folder)}


def test_evaluating_a_trained_model_in_its_own_folder_changes_nothing_there(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    left = train_and_forget(run)
    for _ in range(2):
        run.log(**BEFORE)
        run.call("on_evaluate")
    run.recorder.write(run.args, run.state, run.model, license="mit")
    assert {name: (run.folder / name).read_bytes() for name in files_below(run.folder)} == left
    assert caplog.text.count("holds the records of a training") == 1


def test_a_log_that_was_cut_off_in_the_middle_is_left_alone(run: Run) -> None:
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.jsonl").write_text('{"loss": 3.5, "step": 1}\n{"loss": 3.2, "st')
    run.log(**BEFORE)
    run.call("on_evaluate")
    assert files_below(run.folder) == {"metrics.jsonl"}


def test_training_after_that_evaluation_begins_the_log_with_it(run: Run) -> None:
    train_and_forget(run)
    run.log(**BEFORE)
    run.call("on_evaluate")
    run.state.log_history = []
    run.call("on_train_begin")
    assert read_log(run.folder) == [BEFORE]
    run.state.global_step = 6
    run.log(**{**AFTER, "eval_loss": 2.75})
    run.call("on_train_end")
    assert read_log(run.folder) == [BEFORE, {**AFTER, "eval_loss": 2.75}]
    assert "| 5.0000 | 2.7500 |" in (run.folder / "README.md").read_text()


def test_an_evaluation_without_any_training_is_recorded_in_a_folder_of_its_own(run: Run) -> None:
    for _ in range(2):
        run.recorder = RunRecorder({"eval": LEDGER})
        run.log(**BEFORE)
        run.call("on_evaluate")
        assert read_log(run.folder) == [BEFORE]
        assert "README.md" in files_below(run.folder)


def test_the_card_has_the_figures_of_the_best_step_where_its_weights_were_loaded(run: Run) -> None:
    run.args = run.args.__class__(
        output_dir=run.args.output_dir,
        use_cpu=True,
        report_to="none",
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
    )
    run.call("on_train_begin")
    for record in (BEFORE, MIDDLE, {**AFTER, "eval_loss": 4.5}):
        run.state.global_step = record["step"]
        run.log(**record)
    run.state.best_global_step, run.state.best_model_checkpoint = 3, "run/checkpoint-3"
    run.call("on_evaluate")
    card = (run.folder / "README.md").read_text()
    assert "|  | before training | after training |" in card
    assert "| 5.0000 | 4.5000 |" in card
    run.call("on_train_end")
    card = (run.folder / "README.md").read_text()
    assert "|  | before training | after step 3, the best |" in card
    assert "| 5.0000 | 4.0000 |" in card
    # What is evaluated now is the model of step 3, whatever the Trainer's counter says.
    run.log(eval_loss=3.75, step=6)
    run.call("on_evaluate")
    card = (run.folder / "README.md").read_text()
    assert "after step 3, the best" in card
    assert "| 5.0000 | 3.7500 |" in card


def test_without_a_best_checkpoint_the_card_has_the_figures_of_the_last_step(
    model: Any, make_config: Make
) -> None:
    args = make_config()
    args.load_best_model_at_end = True
    state = make_state(6, MIDDLE, AFTER, best_global_step=3)
    facts = card_facts(args, state, model, None, num_records_of_training=2)
    assert (facts.after, facts.best_step) == (AFTER, None)


@pytest.mark.parametrize(
    ("dtype", "optimizer", "message"),
    [
        (torch.bfloat16, torch.optim.AdamW, "are bfloat16: updates smaller than about 0.39%"),
        (torch.float16, torch.optim.SGD, "are float16: updates smaller than about 0.05%"),
        (torch.float32, torch.optim.AdamW, ""),
    ],
)
def test_updates_that_would_be_rounded_away_are_warned_of(
    dtype: torch.dtype,
    optimizer: Any,
    message: str,
    run: Run,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own = optimizer(run.model.to(dtype).parameters(), lr=2e-5)
    run.recorder.on_train_begin(run.args, run.state, None, model=run.model, optimizer=own)
    assert caplog.text.count("rounded away") == bool(message)
    assert message in caplog.text


def test_an_optimizer_that_is_not_torchs_may_round_as_it_likes(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Stochastic(torch.optim.AdamW):
        """Stands for those of other libraries."""

    warn_of_rounding(Stochastic(model.bfloat16().parameters()))
    warn_of_rounding(None)
    assert caplog.text == ""


REPORT = {f"report/{name}.png" for name in ("loss", "token_entropy", "token_accuracy")}


@pytest.mark.curves
def test_report_and_card_are_renewed_at_every_evaluation_and_at_the_end(run: Run) -> None:
    run.call("on_train_begin")
    run.log(**BEFORE)
    run.call("on_evaluate")
    assert {"report/loss.png", "README.md"} < files_below(run.folder)
    run.state.global_step = 6
    run.log(loss=4.0, token_entropy=2.0, token_accuracy=0.5, step=6)
    run.log(**AFTER)
    run.call("on_train_end")
    assert {*REPORT, "README.md", "metrics.jsonl"} < files_below(run.folder)
    card = ModelCard.load(run.folder / "README.md")
    assert "| 5.0000 | 3.0000 |" in card.text
    assert all(f"]({name})" in card.text for name in REPORT)
    assert str(LEDGER) in card.text


@pytest.mark.curves
def test_an_evaluation_after_training_renews_report_and_card(run: Run) -> None:
    run.call("on_train_begin")
    run.state.global_step = 6
    run.log(loss=3.5, step=6)
    run.call("on_train_end")
    assert "Evaluation" not in (run.folder / "README.md").read_text()
    old = (run.folder / "report" / "loss.png").read_bytes()
    run.log(**AFTER)
    run.call("on_evaluate")
    assert "| - | 3.0000 |" in (run.folder / "README.md").read_text()
    assert (run.folder / "report" / "loss.png").read_bytes() != old


@pytest.mark.curves
def test_a_report_that_cannot_be_written_does_not_end_the_run(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "report").write_text("a file where the folder should be")
    run.log(loss=3.5, step=6)
    run.call("on_train_end")
    assert "Report and model card could not be written" in caplog.text


def test_the_card_names_the_optimizer_that_was_used(run: Run) -> None:
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.25)
    run.recorder.on_train_begin(run.args, run.state, None, model=run.model, optimizer=optimizer)
    run.call("on_train_end")
    text = (run.folder / "README.md").read_text()
    assert "| optimizer | SGD |" in text
    assert "| learning rate | 0.25 |" in text


def test_every_evaluation_set_has_its_lines_in_the_card(run: Run) -> None:
    run.call("on_train_begin")
    run.state.global_step = 6
    run.log(eval_short_loss=1.5, step=6)
    run.log(eval_long_loss=2.5, step=6)
    run.call("on_train_end")
    text = (run.folder / "README.md").read_text()
    assert "| Loss (nats per response token), short | - | 1.5000 |" in text
    assert "| Loss (nats per response token), long | - | 2.5000 |" in text


def test_what_only_the_caller_knows_is_in_the_card(run: Run) -> None:
    run.recorder.write(run.args, run.state, run.model, license="mit", tags=["demo"])
    data = ModelCard.load(run.folder / "README.md").data
    assert data.license == "mit"
    assert data.tags == ["demo", "hf_sft_plugin", "sft"]


def test_only_the_main_process_writes_and_speaks(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.state.is_world_process_zero = False
    for event in ("on_evaluate", "on_train_begin"):
        run.call(event)
    run.log(**BEFORE)
    run.state.global_step = 6
    for event in ("on_evaluate", "on_train_end", "on_evaluate"):
        run.call(event)
    run.call("on_train_begin")
    assert files_below(run.folder) == set()
    assert capsys.readouterr().out == ""


@pytest.fixture
def base(model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """A saved model with its tokenizer."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("with_adapter", [False, True], ids=["model", "adapter"])
def test_the_card_of_a_run_has_figures_before_and_after_and_nothing_of_this_machine(
    with_adapter: bool,
    base: Path,
    chat_rows: list[dict[str, Any]],
    make_config: Make,
    tmp_path: Path,
) -> None:
    rows = Dataset.from_list(chat_rows)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    trainer = MaskedSFTTrainer(
        str(base),
        make_config(hub_token=TOKEN),
        train_dataset=rows,
        eval_dataset=rows,
        peft_config=lora if with_adapter else None,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    records = read_log(Path(str(trainer.args.output_dir)))
    assert [record["step"] for record in records] == [0, 1, 2, 2, 2]
    trainer.save_model()
    path = Path(str(trainer.args.output_dir)) / "README.md"
    card = ModelCard.load(path)
    assert (
        f"| Loss (nats per response token) | {before['eval_loss']:.4f} | {after['eval_loss']:.4f} |"
        in card.text
    )
    assert card.data.library_name == ("peft" if with_adapter else "transformers")
    assert card.data.base_model is None
    assert card.data.tags == ["hf_sft_plugin", "sft"]
    content = path.read_text()
    for secret in (TOKEN, str(tmp_path), str(Path.home()), str(Path.cwd())):
        assert secret not in content


def test_a_fresh_trainer_that_evaluates_a_saved_model_leaves_its_records_alone(
    base: Path, chat_rows: list[dict[str, Any]], make_config: Make
) -> None:
    rows = Dataset.from_list(chat_rows)
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear")
    trainer = MaskedSFTTrainer(
        str(base), make_config(), train_dataset=rows, eval_dataset=rows, peft_config=lora
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    folder = Path(str(trainer.args.output_dir))
    left = {name: (folder / name).read_bytes() for name in ("metrics.jsonl", "README.md")}
    assert "optimizer steps | 2 |" in left["README.md"].decode()
    fresh = MaskedSFTTrainer(trainer.model, make_config(), eval_dataset=rows, processing_class=None)
    fresh.evaluate()
    fresh.save_model()
    assert left == {name: (folder / name).read_bytes() for name in left}
