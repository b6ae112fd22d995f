"""Measures whole runs of real Trainers: data loader, optimizer, logs, and the time to start."""

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from contestants import CONTESTANTS, import_ahead, trainer_settings, with_labels
from measuring import versions
from results import Result, make_table, median_and_range, note_on_losses
from torch.nn.functional import cross_entropy
from transformers import TrainerCallback
from turns import Stopwatch, Usage, take_turns
from workload import Rows, Setup, describe, make_model, make_rows, row_lengths

from hf_sft_plugin import IGNORE_INDEX

_LOGGING_STEPS = 10
# Rows whose loss is worked out after a run.
_NUM_JUDGED = 16
_COLUMNS = (
    *("", "wall s", "ms/row", "us/token", "ratio", "(range)", "cpu s", "cpu ms/row"),
    *("cpu us/token", "peak GiB", "ratio", "start s", "first loss", "final loss"),
)


@dataclass
class TrainingRun:
    """One run of one contestant.

    Attributes:
        constructor: The constructor of the trainer, with the preparation of raw rows.
        start: From the constructor, with it, to the first step.
        turns: So many steps each.
        end: After the last step, such as a report.
        first_loss: What was logged for the first step.
        final_loss: Of the trained model on the first rows, worked out alike for everyone.
    """

    constructor: Usage
    start: Usage
    turns: list[Usage]
    end: Usage
    first_loss: float
    final_loss: float

    @property
    def wall(self) -> float:
        """Seconds of `train()`, without those in which others had their turns."""
        turns = sum(turn.wall for turn in [*self.turns, self.end])
        return self.start.wall - self.constructor.wall + turns

    @property
    def cpu(self) -> float:
        """Processor seconds of `train()`."""
        turns = sum(turn.cpu for turn in [*self.turns, self.end])
        return self.start.cpu - self.constructor.cpu + turns


def make_run_rows(setup: Setup) -> Rows:
    """The rows of a run: those of a file, all of them, of which it trains as many as it needs."""
    return make_rows(setup, _num_trained(setup), keeps_all=True)


def _num_trained(setup: Setup) -> int:
    return setup.step_size * setup.steps_per_turn * setup.repetitions


def measure_runs(setup: Setup, contestants: Sequence[str], rows: Rows) -> dict[str, TrainingRun]:
    """Lets the contestants train in turns of some steps; the first turn is the start."""
    records = take_turns(contestants, setup.repetitions + 1, take_part, setup, rows)
    return {name: messages[-1] for name, messages in records.items()}


def take_part(name: str, setup: Setup, rows: Rows, stopwatch: Stopwatch) -> None:
    """The process of one contestant: a whole run, in turns."""
    import_ahead(name)
    model = make_model(setup, rows.tokenizer)
    # These trainers prepare raw rows themselves; the others are given rows with labels.
    prepares = name.startswith(("ours", "trl"))
    dataset = rows.raw if prepares else with_labels(rows.tokenized)
    num_steps = setup.steps_per_turn * setup.repetitions
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(setup, folder, num_steps, _LOGGING_STEPS)
        stopwatch.begin()
        trainer = CONTESTANTS[name](model, dataset, rows.tokenizer, settings)
        constructor = stopwatch.read()
        turns = TurnsOfSteps(stopwatch, setup.steps_per_turn)
        # In front of all others, so that what they do after the last step is no part of a turn.
        trainer.callback_handler.callbacks.insert(0, turns)
        trainer.train()
        last = stopwatch.read()
    start, *steps = turns.usages
    end = Usage(last.wall - steps[-1].wall, last.cpu - steps[-1].cpu, last.peak)
    logged = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    final_loss = mean_loss(trainer.model, rows)
    stopwatch.end(TrainingRun(constructor, start, steps, end, float(logged[0]), final_loss))


class TurnsOfSteps(TrainerCallback):
    """Ends a turn before the first step, and then after every so many steps but the last.

    Args:
        stopwatch: Measures a turn.
        steps_per_turn: How many steps.

    Attributes:
        usages: What each turn took so far.
    """

    def __init__(self, stopwatch: Stopwatch, steps_per_turn: int) -> None:
        self.stopwatch = stopwatch
        self.steps_per_turn = steps_per_turn
        self.usages: list[Usage] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends the turn when its last step is logged and the next batch is there."""
        if state.global_step == len(self.usages) * self.steps_per_turn:
            self.usages.append(self.stopwatch.read())
            self.stopwatch.end(None)
            self.stopwatch.begin()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Reads what the last turn took, which goes on."""
        self.usages.append(self.stopwatch.read())


@torch.no_grad()
def mean_loss(model: Any, rows: Rows) -> float:
    """Mean negative log-likelihood per response token of the first rows, row by row."""
    model.eval()
    total, count = 0.0, 0
    chosen = rows.tokenized.select(range(min(_NUM_JUDGED, len(rows.tokenized))))
    for row in with_labels(chosen):
        tokens, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
        logits = model(tokens.to(model.device), use_cache=False).logits[0, :-1].float()
        targets = labels[0, 1:].to(logits.device)
        total += cross_entropy(logits, targets, reduction="sum").item()
        count += int((targets != IGNORE_INDEX).sum())
    return total / count


def run_result(setup: Setup, rows: Rows, runs: dict[str, TrainingRun]) -> Result:
    """Time per row and token, the time to start, and the ratio over the first, turn by turn."""
    num_rows = _num_trained(setup)
    lengths = row_lengths(rows)[:num_rows]
    name_of_first, first = next(iter(runs.items()))
    notes = note_on_losses({name: run.first_loss for name, run in runs.items()}, "first losses")
    notes += note_on_losses({name: run.final_loss for name, run in runs.items()}, "final losses")
    table = make_table(
        f"Training on {num_rows:,} rows with {sum(lengths):,} tokens in steps of "
        f"{describe(setup, lengths)}, {setup.repetitions} turns of {setup.steps_per_turn} steps",
        f"{versions()}; wall and cpu: all of train(); ratio: median of turns; start: from the "
        f"constructor to the first step, with the preparation of {len(rows.raw):,} raw rows, which "
        f"plain and liger leave to others{notes}",
        _COLUMNS,
    )
    slower: dict[str, list[float]] = {}
    for name, run in runs.items():
        pairs = list(zip(run.turns, first.turns, strict=True))
        slower[name] = [turn.wall / other.wall for turn, other in pairs]
        larger = [turn.peak / other.peak for turn, other in pairs]
        table.add_row(
            name,
            f"{run.wall:.2f}",
            f"{1e3 * run.wall / num_rows:.2f}",
            f"{1e6 * run.wall / sum(lengths):.1f}",
            *median_and_range(slower[name]),
            f"{run.cpu:.2f}",
            f"{1e3 * run.cpu / num_rows:.2f}",
            f"{1e6 * run.cpu / sum(lengths):.1f}",
            f"{max(turn.peak for turn in run.turns) / 2**30:.2f}",
            f"{statistics.median(larger):.2f}",
            f"{run.start.wall:.2f}",
            f"{run.first_loss:.4f}",
            f"{run.final_loss:.4f}",
        )
    return Result(table, slower, f"wall time of a turn over that of {name_of_first}", setup, runs)
