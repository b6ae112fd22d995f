"""A run that was verified is the run that was not, to the last bit; one that fails never begins."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments
from verified_trainers import make_rows

from hf_sft_plugin import (
    MaskedLossMixin,
    MaskedSFTConfig,
    MaskedSFTTrainer,
    VerificationError,
    verify_training,
)

NAMES = [
    *("labels", "stop tokens", "other documents", "changed token", "padding"),
    *("log-probabilities", "entropies", "gradient", "trained tensors", "updates"),
]
MakeTrainer = Callable[..., MaskedSFTTrainer]


class Events(TrainerCallback):
    """Keeps the names of what was called."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.names.append("train")

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.names.append("evaluate")


@pytest.fixture
def make_trainer(
    model_factory: Callable[..., Any],
    tokenizer: Any,
    chat_rows: list[dict[str, Any]],
    make_config: Callable[..., MaskedSFTConfig],
) -> MakeTrainer:
    """Trainers with dropout that accumulate; adapters only where they are asked for."""

    def make(lora: bool = False, model: Any = None, **settings: Any) -> MaskedSFTTrainer:
        args = make_config(
            **{"gradient_accumulation_steps": 2, "max_steps": 3, "warmup_steps": 2, **settings}
        )
        adapter = LoraConfig(target_modules="all-linear", lora_dropout=0.25)
        torch.manual_seed(1)
        return MaskedSFTTrainer(
            model or model_factory(attention_dropout=0.25),
            args,
            train_dataset=Dataset.from_list(chat_rows),
            eval_dataset=Dataset.from_list(chat_rows),
            processing_class=tokenizer,
            peft_config=adapter if lora else None,
            callbacks=[Events()],
        )

    return make


def weights_of(trainer: Trainer) -> list[Tensor]:
    assert isinstance(trainer.model, torch.nn.Module)
    return [p.detach() for p in trainer.model.parameters()]


def figures_of(trainer: Trainer) -> list[dict[str, float]]:
    """The log, without what depends on the clock."""
    speed = ("runtime", "per_second")
    return [
        {k: v for k, v in log.items() if not k.endswith(speed)} for log in trainer.state.log_history
    ]


SETTINGS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "adapter, autocast": {"lora": True, "bf16": True},
    "checkpointing, batches as they come": {
        "gradient_checkpointing": True,
        "max_tokens_per_microbatch": None,
    },
    "momentum, padded, full logits": {
        "optim": "sgd",
        "optim_args": "momentum=0.9",
        "padding_free": "off",
        "fused_head": "off",
    },
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_verified_run_is_the_same_run(name: str, make_trainer: MakeTrainer) -> None:
    settings = SETTINGS[name]
    # A constructor sets the seed, so each trains before the next is made.
    plain = make_trainer(**settings)
    plain.train()
    inside = make_trainer(**settings, verify_before_training=True)
    inside.train()
    before = make_trainer(**settings)
    checks = verify_training(before)
    assert [check.name for check in checks] == NAMES
    assert not before.state.log_history
    callbacks = before.callback_handler.callbacks
    assert [c.names for c in callbacks if isinstance(c, Events)] == [[]]
    before.train()
    for trainer in (inside, before):
        assert all(map(torch.equal, weights_of(trainer), weights_of(plain)))
        assert figures_of(trainer) == figures_of(plain)


def test_a_trainer_is_left_as_it_was(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(eval_on_start=True)
    attributes, random_state = dict(vars(trainer)), torch.get_rng_state()
    handler = dict(vars(trainer.callback_handler))
    verify_training(trainer)
    assert vars(trainer) == attributes
    assert vars(trainer.callback_handler) == handler
    assert trainer.args.eval_on_start
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not trainer.accelerator.gradient_state.in_dataloader


def test_the_table_is_printed_and_the_passes_in_it_are_those_that_ran(
    make_trainer: MakeTrainer,
    model: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "150")
    trainer = make_trainer(model=model, verify_before_training=True, max_steps=1)
    counts = {"forward": 0, "backward": 0}
    own_forward, own_verify = model.forward, trainer.verify_first_step

    def forward(*args: Any, **kwargs: Any) -> Any:
        counts["backward" if torch.is_grad_enabled() else "forward"] += 1
        return own_forward(*args, **kwargs)

    def verify_first_step(batches: Any, num_items: Any) -> None:
        model.forward = forward
        own_verify(batches, num_items)
        del model.__dict__["forward"]

    trainer.verify_first_step = verify_first_step  # type: ignore[method-assign]
    trainer.train()
    printed = " ".join(capsys.readouterr().out.split())
    assert counts == {"forward": 6, "backward": 3}
    assert "6 forward passes and 3 with backward in " in printed
    assert "those of the step itself, 1, took " in printed
    for name in NAMES:
        assert f" {name} " in printed
    assert printed.index("Verified before step 1") < printed.index("About to train")


def test_it_is_the_first_step_alone_that_is_verified_also_of_a_resumed_run(
    make_trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    plain = make_trainer(**settings)
    plain.train()
    capsys.readouterr()
    resumed = make_trainer(**settings, verify_before_training=True)
    resumed.train(resume_from_checkpoint=f"{plain.args.output_dir}/checkpoint-1")
    assert capsys.readouterr().out.count("Verified before step 1") == 1
    assert all(map(torch.equal, weights_of(resumed), weights_of(plain)))
    assert figures_of(resumed) == figures_of(plain)


def test_a_run_that_fails_says_why_and_trains_nothing(
    make_trainer: MakeTrainer, model: Any
) -> None:
    model.extra = torch.nn.Linear(2, 2, bias=False)
    trainer = make_trainer(model=model, verify_before_training=True, learning_rate=1.0)
    before = [p.clone() for p in weights_of(trainer)]
    with pytest.raises(VerificationError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith("Nothing was trained, because\ntrained tensors: 1 of 25 have no gra")
    assert "These are extra.weight." in message
    assert [check.name for check in caught.value.checks if check.has_failed] == ["trained tensors"]
    assert trainer.state.global_step == 0
    assert all(map(torch.equal, weights_of(trainer), before))


def test_the_function_stops_as_well_or_reports_alone(make_trainer: MakeTrainer, model: Any) -> None:
    model.extra = torch.nn.Linear(2, 2, bias=False)
    trainer = make_trainer(model=model)
    with pytest.raises(VerificationError):
        verify_training(trainer)
    checks = verify_training(trainer, stop_on_failure=False)
    assert [check.name for check in checks if check.has_failed] == ["trained tensors"]


def test_a_trainer_of_ones_own_with_its_own_data_and_collator_is_verified(
    model: Any, tokenizer: Any, tmp_path: Any
) -> None:
    class OwnTrainer(MaskedLossMixin, Trainer):
        """Adds a term of its own, which is one of the weights."""

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            norm = sum(p.square().sum() for p in model.parameters())
            return loss + self.decay * norm

        decay = 0.0

    rows = [
        {
            "input_ids": row["input_ids"],
            "labels": [
                token if is_trained else -100
                for token, is_trained in zip(row["input_ids"], row["response_mask"], strict=True)
            ],
        }
        for row in make_rows()
    ]
    args = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_steps": 1}
    trainer = OwnTrainer(
        model,
        TrainingArguments(str(tmp_path), per_device_train_batch_size=3, **args),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    checks = {check.name: check for check in verify_training(trainer)}
    assert [name for name, check in checks.items() if check.value is None] == []
    # Once for each micro-batch is a fault, as a term of a step would be one in all.
    trainer.decay = 0.1
    with pytest.raises(VerificationError, match="gradient: "):
        verify_training(trainer)


def test_a_trainer_without_the_mixin_is_told_what_to_do(model: Any, tmp_path: Any) -> None:
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="Put MaskedLossMixin in front of its class"):
        verify_training(trainer)


@pytest.mark.parametrize("engine", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_engines_that_take_a_model_apart_are_verified_within_the_training(
    engine: DistributedType,
    make_trainer: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = make_trainer()
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", engine)
    checks = verify_training(trainer)
    assert [check.name for check in checks] == NAMES
    assert all("set verify_before_training" in check.note for check in checks)
    assert "Nothing was run." in capsys.readouterr().out
