"""What every process of a distributed test runs: trainings and evaluations, one after the other.

The folder holds a model, a tokenizer and rows as JSON lines; what is asked for is told by plain
values, so that the test can say the same of rows that it trains by itself.
"""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    MaskedLossMixin,
    MaskedSFTConfig,
    MaskedSFTTrainer,
    pack_dataset,
)

# Where one process reads for all of them, batches have to be equally wide.
PADDED_TO = {"map": None, "stream": None, "dispatched": 80}


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of a user, whose rows may have no trained token."""


class Keeper(TrainerCallback):
    """Keeps what every optimizer step had and made of it, and counts forward passes."""

    def __init__(self, model: Any) -> None:
        self.gradients: list[torch.Tensor] = []
        self.weights: list[torch.Tensor] = []
        self.num_forwards = 0
        model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.num_forwards += torch.is_grad_enabled()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in kwargs["model"].parameters()]))

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.weights.append(torch.cat([p.detach().flatten() for p in kwargs["model"].parameters()]))


class CollectiveCounter(TrainerCallback):
    """Counts what processes ask each other during a training, gradients left aside."""

    NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "barrier")

    def __init__(self) -> None:
        self.count = 0
        self.own = {name: getattr(torch.distributed, name) for name in self.NAMES}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        for name, own in self.own.items():
            setattr(torch.distributed, name, partial(self._call, own))

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for name, own in self.own.items():
            setattr(torch.distributed, name, own)

    def _call(self, own: Any, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return own(*args, **kwargs)


def read_rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def make_dataset(rows: list[dict[str, Any]], kind: str) -> Any:
    if kind == "packed":
        return pack_dataset(rows, max_length=70)
    dataset = Dataset.from_list(rows)
    if kind in ("stream", "dispatched"):
        # As many parts as there may be processes, which could each read some of them.
        return dataset.to_iterable_dataset(num_shards=4)
    return dataset


def arguments(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "dataloader_pin_memory": False,
        **settings,
    }


def make_trainer(
    folder: Path,
    settings: dict[str, Any],
    *,
    rows: str = "rows",
    kind: str = "map",
    attributes: dict[str, Any] | None = None,
    dtype: str = "float64",
    pad_to: int | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    **more: Any,
) -> OwnTrainer:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype))
    trainer = OwnTrainer(
        model,
        TrainingArguments(**arguments(folder, settings)),
        data_collator=DataCollatorForPromptResponse(
            AutoTokenizer.from_pretrained(folder / "tokenizer"), pad_to_multiple_of=pad_to
        ),
        train_dataset=make_dataset(read_rows(folder, rows), kind),
        callbacks=[*callbacks],
        **more,
    )
    for name, value in (attributes or {}).items():
        setattr(trainer, name, value)
    return trainer


def train(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """One training; `case` holds the arguments of `make_trainer`."""
    case = copy.deepcopy(case)
    resume_at = case.pop("resume_at", None)
    if resume_at is not None:
        first = copy.deepcopy(case)
        first["settings"] |= {"max_steps": resume_at, "save_strategy": "steps", "save_steps": 1}
        make_trainer(folder, **first).train()
    collectives = CollectiveCounter()
    trainer = make_trainer(folder, **case, callbacks=(collectives,))
    keeper = Keeper(trainer.model)
    trainer.add_callback(keeper)
    checkpoint = None if resume_at is None else str(folder / "run" / f"checkpoint-{resume_at}")
    trainer.train(resume_from_checkpoint=checkpoint)
    return {
        "num_processes": trainer.accelerator.num_processes,
        "logs": [log for log in trainer.state.log_history if "loss" in log],
        "steps": trainer.state.global_step,
        "num_input_tokens": trainer.state.num_input_tokens_seen,
        "summary": trainer.state.log_history[-1],
        "num_collectives": collectives.count,
        "gradients": keeper.gradients,
        "weights": keeper.weights,
        "num_forwards": keeper.num_forwards,
    }


def describe_predictions(prediction: EvalPrediction) -> dict[str, float]:
    """Sums that tell how many rows there are, in which order, and what was predicted."""
    labels, found = prediction.label_ids, prediction.predictions
    first = [next(int(label) for label in row if label != -100) for row in labels]
    return {
        "rows": len(labels),
        "order": float(sum(place * label for place, label in enumerate(first))),
        "hits": float(((found[:, :-1] == labels[:, 1:]) & (labels[:, 1:] != -100)).sum()),
    }


def evaluate(
    folder: Path, rows: str, kind: str, batch_sizes: tuple[int, ...]
) -> dict[int, dict[str, Any]]:
    """The evaluation of one dataset with several batch sizes, with and without predictions."""
    found = {}
    dataset = make_dataset(read_rows(folder, rows), kind)
    for size in batch_sizes:
        settings = {
            "per_device_eval_batch_size": size,
            "remove_unused_columns": False,
            "accelerator_config": {"dispatch_batches": kind == "dispatched"},
        }
        trainer = make_trainer(
            folder, settings, pad_to=PADDED_TO[kind], compute_metrics=describe_predictions
        )
        trainer.args.prediction_loss_only = False
        metrics = trainer.evaluate(dataset)
        trainer.compute_metrics = None
        found[size] = {**metrics, "alone": trainer.evaluate(dataset)["eval_loss"]}
    return found


def generate(folder: Path) -> dict[str, Any]:
    """An evaluation of the trainer of the package, by answering."""
    trainer = MaskedSFTTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64),
        MaskedSFTConfig(
            **arguments(folder, {"per_device_eval_batch_size": 3}),
            predict_with_generate=True,
            generation_max_new_tokens=5,
            generation_metrics=["exact_match"],
        ),
        eval_dataset=Dataset.from_list(read_rows(folder, "eval")),
        processing_class=AutoTokenizer.from_pretrained(folder / "tokenizer"),
    )
    return {"metrics": trainer.evaluate(), "responses": trainer.responses}


def run(
    folder: Path, cases: dict[str, dict[str, Any]], evaluations: dict[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """All trainings and evaluations of a process."""
    return {
        "train": {name: train(folder, case) for name, case in cases.items()},
        "evaluate": {name: evaluate(folder, *case) for name, case in evaluations.items()},
        "generate": generate(folder),
    }
