"""What a run is about to do, as a table for the terminal."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from transformers import TrainerState, TrainingArguments

from hf_sft_plugin.preparation.ledger import Ledger
from hf_sft_plugin.types import visible_lines


def print_summary(*args: Any) -> None:
    """Prints the table; the arguments are those of `summarize_run`."""
    Console(markup=False, emoji=False).print(summarize_run(*args))


def summarize_run(
    args: TrainingArguments,
    state: TrainerState,
    model: nn.Module,
    ledger: Ledger | None,
    speed: Mapping[str, str] | None = None,
    rows: str = "rows",
) -> Table:
    """A table of what a run is about to do.

    Args:
        args: Settings of the run.
        state: Knows the number of steps.
        model: The model to train.
        ledger: Account of the training data; None where the data came prepared elsewhere.
        speed: Lines about what speed and memory depend on, by name.
        rows: What a batch is made of.
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
        table.add_row("data", Text(str(ledger)))
    num_processes = PartialState().num_processes
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes
    # Those of the state are rounded up, and made up where the number of steps is given.
    epochs = f", {args.num_train_epochs:g} epochs" if args.max_steps <= 0 else ""
    table.add_row(
        "steps",
        f"{state.max_steps:,} of {batch} {rows} "
        f"({args.per_device_train_batch_size} per batch x "
        f"{args.gradient_accumulation_steps} accumulated x {num_processes} processes){epochs}",
    )
    device = f"{args.device}" + (
        f" with {torch.get_num_threads()} threads" if args.device.type == "cpu" else ""
    )
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    table.add_row("device", f"{device}, weights {dtype}, mixed precision {args.mixed_precision}")
    for name, line in (speed or {}).items():
        table.add_row(name, Text(visible_lines(line)))
    # As text, or rich would take brackets in it for its markup.
    table.add_row("output", Text(visible_lines(str(args.output_dir))))
    return table


def _model_name(model: nn.Module) -> str:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return type(base).__name__ + (" with an adapter" if isinstance(model, PeftModel) else "")
