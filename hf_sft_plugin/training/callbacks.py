"""What happens around a run: the summary before it, the log during it, report and card after it."""

import importlib.metadata
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import (
    SchedulerType,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames

from hf_sft_plugin.data.prepare import Ledger
from hf_sft_plugin.reporting.model_card import CardFacts, write_model_card
from hf_sft_plugin.reporting.report import write_report
from hf_sft_plugin.reporting.run_log import append_log, start_log

_LIBRARIES = ("hf_sft_plugin", "torch", "transformers", "accelerate", "datasets", "peft")


class RunRecorder(TrainerCallback):
    """Leaves `metrics.jsonl`, `report/`, `data_ledger.json` and a model card in the output folder.

    Args:
        ledgers: Accounts of the prepared datasets by name; `train` is the training data.
    """

    def __init__(self, ledgers: Mapping[str, Ledger]) -> None:
        self.ledgers = ledgers
        self._has_log = False
        self._has_trained = False
        self._is_training = False
        self._before: Mapping[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says what will be done; a resumed run takes over the log that it continues."""
        begins_log = state.global_step > 0 or self._has_trained
        self._has_trained = self._is_training = True
        if not state.is_world_process_zero:
            return
        if begins_log:
            start_log(_output_dir(args), state.log_history)
            self._has_log = True
        for name, ledger in self.ledgers.items():
            ledger.save(_output_dir(args) / f"data_ledger_{name}.json")
        Console().print(summarize_run(args, state, kwargs["model"], self.ledgers.get("train")))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the newest log line to the file."""
        if not state.is_world_process_zero:
            return
        if not self._has_log:
            start_log(_output_dir(args))
            self._has_log = True
        append_log(_output_dir(args), state.log_history[-1])

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Brings report and card up to date, unless training will do it at its end."""
        if not self._has_trained and state.global_step == 0 and state.log_history:
            # Training begins with an empty history, but the card shows what was measured before.
            self._before = state.log_history[-1]
        if not self._is_training and state.is_world_process_zero:
            self.write(args, state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes report and card."""
        self._is_training = False
        if state.is_world_process_zero:
            self.write(args, state, kwargs["model"])

    def write(
        self,
        args: TrainingArguments,
        state: TrainerState,
        model: nn.Module,
        **card: Any,
    ) -> None:
        """Writes report and card from what has been logged so far.

        Args:
            args: Settings of the run.
            state: Holds the log.
            model: The trained model.
            **card: Facts for the card that only the caller knows, such as `license`.
        """
        output_dir = _output_dir(args)
        plots = write_report(output_dir)
        facts = card_facts(args, state, model, self.ledgers.get("train"))
        facts.before = facts.before or self._before
        for name, value in card.items():
            setattr(facts, name, value)
        write_model_card(output_dir, facts, plots)


def card_facts(
    args: TrainingArguments, state: TrainerState, model: nn.Module, ledger: Ledger | None
) -> CardFacts:
    """Collects what a model card says from a run; nothing secret is among it."""
    evaluations = [record for record in state.log_history if "eval_loss" in record]
    untrained = [record for record in evaluations if record["step"] == 0]
    num_devices = args.world_size
    base_model = getattr(getattr(model, "config", None), "_name_or_path", "")
    return CardFacts(
        model_name=Path(args.hub_model_id or os.path.abspath(_output_dir(args))).name,
        base_model=base_model if _is_on_hub(base_model) else None,
        library_name="peft" if isinstance(model, PeftModel) else "transformers",
        settings={
            "learning rate": args.learning_rate,
            "schedule": SchedulerType(args.lr_scheduler_type).value,
            "warm-up": f"{args.warmup_steps:g}",
            "optimizer": OptimizerNames(args.optim).value,
            "optimizer steps": f"{state.global_step:,}",
            "rows per optimizer step": args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * num_devices,
            "loss normalization": getattr(args, "loss_normalization", "token"),
            "precision": args.mixed_precision,
            "seed": args.seed,
        },
        versions={name: _version(name) for name in _LIBRARIES},
        ledger=str(ledger) if ledger is not None else "",
        before=untrained[0] if untrained else {},
        after=evaluations[-1] if evaluations and evaluations[-1]["step"] > 0 else {},
    )


def summarize_run(
    args: TrainingArguments, state: TrainerState, model: nn.Module, ledger: Ledger | None
) -> Table:
    """A table of what a run is about to do.

    Args:
        args: Settings of the run.
        state: Knows the number of steps.
        model: The model to train.
        ledger: Account of the training data; None where the data came prepared elsewhere.
    """
    table = Table(show_header=False, title="About to train", title_justify="left", box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    num_parameters = sum(p.numel() for p in model.parameters())
    num_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table.add_row(
        "model",
        f"{_model_name(model)}: {num_parameters:,} parameters, "
        + ("all" if num_trained == num_parameters else f"{num_trained:,} of them")
        + " trained",
    )
    if ledger is not None:
        # As text, or rich would take brackets in it for its markup.
        table.add_row("data", Text(str(ledger)))
    num_processes = PartialState().num_processes
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes
    # A stream has no length, for which the Trainer puts the largest integer in place of epochs.
    epochs = f", {state.num_train_epochs:g} epochs" if state.num_train_epochs < sys.maxsize else ""
    table.add_row(
        "steps",
        f"{state.max_steps:,} of {batch} rows ({args.per_device_train_batch_size} per batch x "
        f"{args.gradient_accumulation_steps} accumulated x {num_processes} processes){epochs}",
    )
    device = f"{args.device}" + (
        f" with {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    table.add_row("device", f"{device}, weights {dtype}, mixed precision {args.mixed_precision}")
    table.add_row("output", Text(str(args.output_dir)))
    return table


def _model_name(model: nn.Module) -> str:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return type(base).__name__ + (" with an adapter" if isinstance(model, PeftModel) else "")


def _is_on_hub(name: str) -> bool:
    """False for a folder of this machine, which would be a dead link to anybody else."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "from source"


def _output_dir(args: TrainingArguments) -> Path:
    assert args.output_dir is not None, "TrainingArguments sets a default"
    return Path(args.output_dir)
