"""Measures single optimizer steps of real Trainers: time, memory, loss."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from contestants import CONTESTANTS, import_ahead, trainer_settings
from measuring import peak_memory, reset_peak_memory, versions
from results import Result, make_table, median_and_range, note_on_losses, ratios
from transformers import TrainerCallback
from turns import Stopwatch, Usage, take_turns
from workload import Rows, Setup, describe, make_model, make_rows, row_lengths


@dataclass
class StepRecord(Usage):
    """One optimizer step of one contestant.

    Attributes:
        loss: What the trainer logged.
        beyond_weights: Of the peak, what is neither a weight of the model nor was there before it.
    """

    loss: float
    beyond_weights: int


def measure_steps(
    setup: Setup, contestants: Sequence[str], rows: Rows
) -> dict[str, list[StepRecord]]:
    """Lets the contestants take one optimizer step each, in turn, until all steps are done.

    Returns:
        The steps by contestant. The first builds optimizer states and caches and counts for
        nothing but its loss.
    """
    return take_turns(contestants, setup.repetitions + 1, take_part, setup, rows)


def make_step_rows(setup: Setup) -> Rows:
    """As many rows as `measure_steps` trains."""
    return make_rows(setup, setup.step_size * (setup.repetitions + 1))


def take_part(
    name: str,
    setup: Setup,
    rows: Rows,
    stopwatch: Stopwatch,
    turns: Callable[[Stopwatch, int], TrainerCallback] | None = None,
) -> None:
    """The process of one contestant: trains, and stops before every step until it is told to go.

    Args:
        name: Of the contestant.
        setup: What is trained.
        rows: What it is trained on.
        stopwatch: Measures a turn.
        turns: Made of the stopwatch and of the bytes held before the first step; None makes
            `TurnsOfOneStep`.
    """
    import_ahead(name)
    reset_peak_memory()
    before = peak_memory()
    model = make_model(setup, rows.tokenizer)
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    with tempfile.TemporaryDirectory() as folder:
        settings = trainer_settings(setup, folder, setup.repetitions + 1, logging_steps=1)
        trainer = CONTESTANTS[name](model, rows.tokenized, rows.tokenizer, settings)
        trainer.add_callback((turns or TurnsOfOneStep)(stopwatch, before + weights))
        trainer.train()


class TurnsOfOneStep(TrainerCallback):
    """Waits for its turn before a step, and reports the step when the next one would begin.

    Args:
        stopwatch: Measures a turn.
        held: Bytes of the model's weights and of what was there before them.
    """

    def __init__(self, stopwatch: Stopwatch, held: int) -> None:
        self.stopwatch = stopwatch
        self.held = held

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Waits for the first turn."""
        self.stopwatch.begin()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        """Ends the turn: logging is the last thing that belongs to a step."""
        logs = kwargs["logs"]
        if "loss" not in logs:
            return
        usage = self.stopwatch.read()
        beyond = usage.peak - self.held
        record = StepRecord(**asdict(usage), loss=float(logs["loss"]), beyond_weights=beyond)
        self.stopwatch.end(record)
        self.stopwatch.begin()


def step_result(setup: Setup, rows: Rows, records: dict[str, list[StepRecord]]) -> Result:
    """Medians, and the ratio of each contestant over the first, step by step."""
    losses = {name: steps[0].loss for name, steps in records.items()}
    what = describe(setup, row_lengths(rows))
    table = make_table(
        f"One optimizer step of {what}, medians of {setup.repetitions}",
        versions() + note_on_losses(losses, "first losses"),
        ("", "wall s", "ratio", "(range)", "cpu s", "peak GiB", "ratio", "first loss"),
    )
    first = next(iter(records.values()))[1:]
    slower: dict[str, list[float]] = {}
    for name, (_, *steps) in records.items():
        slower[name] = ratios([step.wall for step in steps], [step.wall for step in first])
        larger = ratios([step.peak for step in steps], [step.peak for step in first])
        table.add_row(
            name,
            f"{statistics.median(step.wall for step in steps):.3f}",
            *median_and_range(slower[name]),
            f"{statistics.median(step.cpu for step in steps):.2f}",
            f"{statistics.median(step.peak for step in steps) / 2**30:.2f}",
            f"{statistics.median(larger):.2f}",
            f"{losses[name]:.4f}",
        )
    unit = f"wall time of an optimizer step over that of {next(iter(records))}"
    return Result(table, slower, unit, setup, records)
