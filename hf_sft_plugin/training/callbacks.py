"""What happens around a run: the summary before it, the log during it, report and card after it."""

import importlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel
from torch import nn
from transformers import (
    SchedulerType,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.training_args import OptimizerNames

from hf_sft_plugin.preparation.ledger import Ledger
from hf_sft_plugin.reporting.model_card import CardFacts, write_model_card
from hf_sft_plugin.reporting.report import write_report
from hf_sft_plugin.reporting.run_log import append_log, read_log, start_log

logger = logging.getLogger(__name__)

_LIBRARIES = ("hf_sft_plugin", "torch", "transformers", "accelerate", "datasets", "peft")


class RunRecorder(TrainerCallback):
    """Leaves log, report, ledgers, mask certificates and a model card in the output folder.

    What a training left in the folder is only replaced by another training: a trainer that does
    nothing but evaluate the model there changes none of it.

    Args:
        ledgers: Accounts of the prepared datasets by name; `train` is the training data.
        describe_speed: Tells at the first step what speed and memory depend on, line by line.
    """

    def __init__(
        self, ledgers: Mapping[str, Ledger], describe_speed: Callable[[], Mapping[str, str]] = dict
    ) -> None:
        self.ledgers = ledgers
        self.describe_speed = describe_speed
        self._is_summary_due = False
        self._has_log = False
        self._has_trained = False
        self._is_foreign: bool | None = None
        self._num_records_of_training: int | None = None
        self._records_before: list[dict[str, Any]] = []
        self._optimizer: torch.optim.Optimizer | None = None
        self._before: Mapping[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins the log; a resumed run takes over the log that it continues."""
        continues = state.global_step > 0 or self._has_trained
        self._has_trained = True
        self._num_records_of_training = None
        self._optimizer = kwargs.get("optimizer")
        if not state.is_world_process_zero:
            return
        warn_of_rounding(self._optimizer)
        start_log(_output_dir(args), state.log_history if continues else self._records_before)
        self._has_log = True
        for name, ledger in self.ledgers.items():
            ledger.save(_output_dir(args) / f"data_ledger_{name}.json")
            write_certificate(_output_dir(args) / f"mask_certificate_{name}.json", ledger)
        self._is_summary_due = True

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Says what will be done, once the first batch has shown how."""
        if self._is_summary_due:
            self._is_summary_due = False
            ledger = self.ledgers.get("train")
            speed = self.describe_speed()
            # Imported here, because only one process prints, and not before its first step.
            summary = importlib.import_module("hf_sft_plugin.training.run_summary")
            summary.print_summary(args, state, kwargs["model"], ledger, speed, _rows(speed))

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Adds the newest log line to the file."""
        if not self._has_trained:
            self._records_before.append(state.log_history[-1])
        if not state.is_world_process_zero or self._keeps_records(args):
            return
        if not self._has_log:
            start_log(_output_dir(args))
            self._has_log = True
        append_log(_output_dir(args), state.log_history[-1])

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Brings report and card up to date: a run that is cut short leaves both."""
        if not self._has_trained and state.global_step == 0 and state.log_history:
            # Training begins with an empty history, but the card shows what was measured before.
            self._before = {**self._before, **state.log_history[-1]}
        if state.is_world_process_zero:
            self.write(args, state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Writes report and card."""
        self._num_records_of_training = len(state.log_history)
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
        if self._keeps_records(args):
            return
        output_dir = _output_dir(args)
        facts = card_facts(
            args,
            state,
            model,
            self.ledgers.get("train"),
            self._optimizer,
            self._num_records_of_training,
            _rows(self.describe_speed()),
        )
        facts.before = facts.before or self._before
        # Those of the model, as transformers has it, of the settings, and of the caller.
        named = [getattr(each, "model_tags", None) or () for each in (model, args)]
        facts.tags = [tag for tags in (*named, card.pop("tags", ())) for tag in tags]
        for name, value in card.items():
            setattr(facts, name, value)
        try:
            write_model_card(output_dir, facts, plots=write_report(output_dir))
        except (ImportError, OSError) as error:
            # A picture less is no reason to lose a model that is not saved yet.
            logger.warning("Report and model card could not be written: %s", error)

    def _keeps_records(self, args: TrainingArguments) -> bool:
        """Whether the folder tells of a training that was not this trainer's: that has to stay."""
        if self._has_trained:
            return False
        if self._is_foreign is None:
            self._is_foreign = _tells_of_a_training(_output_dir(args))
            if self._is_foreign:
                logger.warning(
                    "%s holds the records of a training, and nothing was trained since: log, "
                    "report and model card stay as they are. Choose another output_dir to keep "
                    "records of this evaluation.",
                    args.output_dir,
                )
        return self._is_foreign


def card_facts(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    ledger: Ledger | None,
    optimizer: torch.optim.Optimizer | None = None,
    num_records_of_training: int | None = None,
    rows: str = "rows",
) -> CardFacts:
    """Collects what a model card says from a run; nothing secret is among it.

    Args:
        args: Settings of the run.
        state: Holds the log.
        model: The trained model.
        ledger: Account of the training data; None where the data came prepared elsewhere.
        optimizer: The one that was used; None takes that of the settings.
        num_records_of_training: Log lines up to the end of training; None where it has not ended.
        rows: What a batch is made of.
    """
    is_best = (
        args.load_best_model_at_end
        and num_records_of_training is not None
        and state.best_model_checkpoint is not None
    )
    best_step = state.best_global_step if is_best else None
    # Each of several evaluation sets has a record of its own.
    evaluations: dict[int, dict[str, float]] = {}
    for index, record in enumerate(state.log_history):
        if any(key.startswith("eval_") for key in record):
            step = int(record["step"])
            # The log goes on counting from the last step, but the best model has been loaded.
            if best_step is not None and index >= (num_records_of_training or 0):
                step = best_step
            evaluations.setdefault(step, {}).update(record)
    last_step = max(evaluations, default=0) if best_step is None else best_step
    base_model = getattr(getattr(model, "config", None), "_name_or_path", "")
    return CardFacts(
        model_name=Path(args.hub_model_id or os.path.abspath(_output_dir(args))).name,
        base_model=base_model if _is_on_hub(base_model) else None,
        library_name="peft" if isinstance(model, PeftModel) else "transformers",
        settings={
            "learning rate": _learning_rate(args, optimizer),
            "schedule": SchedulerType(args.lr_scheduler_type).value,
            "warm-up": f"{args.warmup_steps:g}",
            "optimizer": _optimizer_name(args, optimizer),
            "optimizer steps": f"{state.global_step:,}",
            f"{rows} per optimizer step": args.per_device_train_batch_size
            * args.gradient_accumulation_steps
            * args.world_size,
            "loss normalization": getattr(args, "loss_normalization", "token"),
            "precision": args.mixed_precision,
            "seed": args.seed,
        },
        versions={name: _version(name) for name in _LIBRARIES},
        ledger=describe_data(ledger) if ledger is not None else "",
        before=evaluations.get(0, {}),
        after=evaluations.get(last_step, {}) if last_step > 0 else {},
        best_step=best_step,
    )


def describe_data(ledger: Ledger) -> str:
    """The account of the training data, and the digests of what was trained."""
    masks, tokens = (ledger.certificate.get(f"{name}_sha256", "") for name in ("masks", "tokens"))
    proof = f"\nproof   masks {masks[:16]}, tokens {tokens[:16]} (mask_certificate_train.json)"
    return str(ledger) + (proof if masks else "")


def write_certificate(path: Path, ledger: Ledger) -> None:
    """Writes what was proven of the masks: digests, counts by kind, and the rows that stand out."""
    dropped = {reason: asdict(drop) for reason, drop in ledger.drops.items()}
    for drop in dropped.values():
        # What the row says stays out of a file that travels with the model.
        drop.pop("example")
    certificate = {
        **ledger.certificate,
        "num_rows": ledger.num_rows,
        "num_rows_trained": ledger.num_rows_trained,
        "num_examples_ending_with_a_stop_token": ledger.num_stopped,
        "num_examples_truncated_before_a_stop_token": ledger.num_cut_before_stop,
        "spans": ledger.spans,
        "control_tokens": ledger.control_tokens,
        "num_straddled_tokens": ledger.num_straddled_tokens,
        "remarks": {
            remark: {"num_rows": ledger.num_remarks[remark], "first_rows": rows}
            for remark, rows in ledger.remarks.items()
        },
        "dropped": dropped,
    }
    path.write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")


def warn_of_rounding(optimizer: torch.optim.Optimizer | None) -> None:
    """Warns where an optimizer of torch updates weights of 16 bits, which rounds to the nearest.

    Args:
        optimizer: As the Trainer made it; wrappers that keep weights of 32 bits are not torch's.
    """
    # Accelerate's wrapper carries the optimizer it wraps.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if optimizer is None or not type(optimizer).__module__.startswith("torch.optim"):
        return
    dtypes = {p.dtype for group in optimizer.param_groups for p in group["params"]}
    for dtype in sorted(dtypes & {torch.bfloat16, torch.float16}, key=str):
        logger.warning(
            "Weights that are trained are %s: updates smaller than about %.2f%% of a weight are "
            "rounded away. Load the model with dtype float32, and set bf16=True for speed.",
            str(dtype).removeprefix("torch."),
            50 * torch.finfo(dtype).eps,
        )


def _rows(speed: Mapping[str, str]) -> str:
    return "packed rows" if "packing" in speed else "rows"


def _optimizer_name(args: TrainingArguments, optimizer: torch.optim.Optimizer | None) -> str:
    """That of the optimizer which was used, be it of the settings or the user's own."""
    if optimizer is None:
        return OptimizerNames(args.optim).value
    # Accelerate's wrapper carries the optimizer it wraps.
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _learning_rate(args: TrainingArguments, optimizer: torch.optim.Optimizer | None) -> float:
    if optimizer is None:
        return args.learning_rate
    # Schedulers keep the rate that they scale as `initial_lr`.
    return max(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)


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


def _tells_of_a_training(output_dir: Path) -> bool:
    try:
        return any(record.get("step", 0) > 0 for record in read_log(output_dir))
    except ValueError:
        # A line was cut off in the middle: something was running here when it was killed.
        return True


def _output_dir(args: TrainingArguments) -> Path:
    assert args.output_dir is not None, "TrainingArguments sets a default"
    return Path(args.output_dir)
