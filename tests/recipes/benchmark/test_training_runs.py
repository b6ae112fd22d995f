"""A run is measured from the constructor to its end, in turns of some steps."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs
from contestants import why_impossible
from training_runs import TrainingRun, make_run_rows, mean_loss, run_result
from turns import Usage
from workload import Setup, make_model, row_lengths

SETUP = Setup("tiny", None, 2, 2, 2, "float32", 1, steps_per_turn=2)


class CountingStopwatch:
    """Every reading is one second later, and a turn begins again at 0."""

    def __init__(self) -> None:
        self.seconds, self.sent = 0, []

    def begin(self) -> None:
        self.seconds = 0

    def read(self) -> Usage:
        self.seconds += 1
        return Usage(float(self.seconds), self.seconds / 2, 100)

    def end(self, record: Any) -> None:
        self.sent.append(record)


def run(name: str, setup: Setup = SETUP) -> tuple[list[Any], TrainingRun]:
    stopwatch = CountingStopwatch()
    training_runs.take_part(name, setup, make_run_rows(setup), stopwatch)
    *turns, last = stopwatch.sent
    return turns, last


def test_a_run_has_a_start_turns_and_an_end() -> None:
    turns, measured = run("ours")
    # The start and the first turn end in between, the last with the run.
    assert turns == [None, None]
    assert measured.constructor.wall == 1
    assert measured.start.wall == 2
    assert [turn.wall for turn in measured.turns] == [1, 1]
    assert measured.end.wall == 1
    # train() is all but the constructor.
    assert measured.wall == (2 - 1) + 1 + 1 + 1
    assert measured.cpu == measured.wall / 2


@pytest.mark.parametrize("name", ["plain", "trl-default", "trl-best"])
def test_everyone_ends_with_the_same_losses_from_raw_rows_or_labels(name: str) -> None:
    reason = why_impossible([name])
    if reason:
        pytest.skip(reason)
    _, ours = run("ours")
    _, other = run(name)
    assert ours.final_loss < ours.first_loss
    assert other.first_loss == pytest.approx(ours.first_loss, rel=1e-5)
    assert other.final_loss == pytest.approx(ours.final_loss, rel=1e-4)


def test_the_final_loss_is_the_mean_over_response_tokens() -> None:
    rows = make_run_rows(SETUP)
    model = make_model(SETUP, rows.tokenizer).double()
    total, count = 0.0, 0
    for row in rows.tokenized:
        log_p = torch.log_softmax(model(torch.tensor([row["input_ids"]])).logits[0], dim=-1)
        for place in range(1, len(row["input_ids"])):
            if row["response_mask"][place]:
                total -= log_p[place - 1, row["input_ids"][place]].item()
                count += 1
    assert len(rows.tokenized) == 16
    assert mean_loss(model, rows) == pytest.approx(total / count, rel=1e-6)


def test_a_file_is_prepared_whole_and_trained_as_far_as_needed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "one and one", "answer": "two"}\n' * 20)
    setup = Setup("tiny", str(path), 2, 1, 2, "float32", 1, steps_per_turn=3)
    rows = make_run_rows(setup)
    assert len(rows.raw) == 20
    usage = Usage(6.0, 3.0, 2**30)
    measured = TrainingRun(Usage(0.5, 0, 0), Usage(1.5, 1.0, 0), [usage, usage], usage, 3.0, 2.0)
    table = run_result(setup, rows, {"ours": measured}).table
    assert f"Training on 12 rows with {sum(row_lengths(rows)[:12])} tokens" in str(table.title)
    assert "the preparation of 20 raw rows" in str(table.caption)


def test_the_table_divides_a_run_by_its_rows_and_tokens(cells_of: Any) -> None:
    rows = make_run_rows(SETUP)
    tokens = sum(row_lengths(rows))

    def measured(*walls: float, final_loss: float = 2.0) -> TrainingRun:
        turns = [Usage(wall, wall / 2, 2**30) for wall in walls]
        start = Usage(2.0, 2.0, 2**32)
        return TrainingRun(Usage(1.0, 1.5, 2**32), start, turns, Usage(0, 0, 0), 3.0, final_loss)

    runs = {"ours": measured(2.0, 5.0), "slow": measured(4.0, 20.0, final_loss=2.2)}
    result = run_result(SETUP, rows, runs)
    ours, slow = cells_of(result.table)
    per_token = f"{8e6 / tokens:.1f}"
    assert ours[:6] == ["ours", "8.00", "500.00", per_token, "1.00", "1.00-1.00"]
    assert ours[6:9] == ["4.00", "250.00", f"{4e6 / tokens:.1f}"]
    assert ours[9:] == ["1.00", "1.00", "2.00", "3.0000", "2.0000"]
    assert slow[4:6] == ["3.00", "2.00-4.00"]
    assert "final losses differ from that of ours: slow by 10.0%" in str(result.table.caption)
    assert "first losses" not in str(result.table.caption)
    assert result.ratios == {"ours": [1.0, 1.0], "slow": [2.0, 4.0]}


def test_a_loss_that_is_not_finite_is_no_equal_one() -> None:
    rows = make_run_rows(SETUP)
    usage = Usage(1.0, 1.0, 1)
    runs = {
        name: TrainingRun(usage, usage, [usage] * 2, usage, 3.0, final_loss)
        for name, final_loss in (("ours", 2.0), ("broken", math.nan))
    }
    assert "broken by nan%" in str(run_result(SETUP, rows, runs).table.caption)
