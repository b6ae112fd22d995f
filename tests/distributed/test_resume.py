"""Stopped runs on two processes go on as if they had not stopped, and so on one instead of two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import run_on_processes
from resume_worker import run_all

# Of 16 rows, four at a time on all processes together: an epoch has four steps.
CASES: dict[str, dict[str, Any]] = {
    "dropout": {"dropout": 0.2},
    "lengths": {"dropout": 0.2, "train_sampling_strategy": "group_by_length"},
    "prompts": {"group_by_prompt": True},
    "packing": {"packing": True, "max_length": 32, "per_device_train_batch_size": 1},
    "stream": {"num_shards": 1, "dropout": 0.2},
    "epochs": {"dropout": 0.2, "save_strategy": "epoch", "logging_strategy": "epoch"},
    "stream by epochs": {"num_shards": 1, "save_strategy": "epoch", "logging_strategy": "epoch"},
    "stream in shards": {"num_shards": 2},
    # Rows come 64 at a time, so 64 of 80 are not tokenized again.
    "long stream": {"num_shards": 1, "num_rows": 160, "per_device_train_batch_size": 8},
}
# In the middle of a window of the log, at the end of an epoch, and in the next one.
NO_SAVE = {"save_strategy": "no"}
STEPS = {"dropout": (3, 4, 5), "stream": (4, 5), "epochs": (4,), "stream by epochs": (4,)}


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    return save_model("resume", is_double=True)


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[Any, list[dict[str, Any]]]:
    """What every rank found, by case and step that was resumed from; 0 is the whole run."""
    runs = {}
    for case, settings in CASES.items():
        saves = {"save_steps": 1 if case in STEPS else 5}
        runs[case, 0] = {"name": f"{case} whole", **settings, **saves}
        for step in STEPS.get(case, (5,)):
            checkpoint = str(folder / f"{case} whole" / f"checkpoint-{step}")
            runs[case, step] = {
                "name": f"{case} {step}",
                "resume": checkpoint,
                **settings,
                **NO_SAVE,
            }
    by_rank = run_on_processes(2, run_all, folder, list(runs.values()))
    return dict(zip(runs, (list(found) for found in zip(*by_rank, strict=True)), strict=True))


def assert_goes_on(resumed: list[dict[str, Any]], whole: list[dict[str, Any]], step: int) -> None:
    """Whether on every process the run resumed after a step is the one that was not stopped."""
    for found, expected in zip(resumed, whole, strict=True):
        assert found["steps"] == {n: rows for n, rows in expected["steps"].items() if n > step}
        assert found["logs"] == expected["logs"]
        assert found["scheduler"] == expected["scheduler"]
        for kind in ("weights", "states"):
            assert found[kind].keys() == expected[kind].keys()
            for name, value in expected[kind].items():
                assert np.array_equal(found[kind][name], value), name


@pytest.mark.parametrize("case", CASES)
def test_two_processes_go_on_to_the_last_bit(
    case: str, results: dict[Any, list[dict[str, Any]]]
) -> None:
    for step in STEPS.get(case, (5,)):
        assert_goes_on(results[case, step], results[case, 0], step)


def rows_of(found: list[dict[str, Any]]) -> dict[int, list[list[int]]]:
    """The rows of every optimizer step over all processes."""
    return {n: sorted(row for rank in found for row in rank["steps"][n]) for n in found[0]["steps"]}


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("packing", "long stream")])
def test_every_row_is_trained_once_in_an_epoch(
    case: str, results: dict[Any, list[dict[str, Any]]]
) -> None:
    steps = rows_of(results[case, 0])
    rows = [row for step in range(1, 5) for row in steps[step]]
    assert len(rows) == len({str(row) for row in rows}) == 16


@pytest.fixture(scope="module")
def changed(folder: Path, results: Any) -> dict[str, list[Any]]:
    """Runs that began on another number of processes than they end on, after step 5."""
    to_one, to_two = [], []
    for case in ("prompts", "lengths", "stream", "stream in shards"):
        checkpoint = str(folder / f"{case} whole" / "checkpoint-5")
        settings = {
            **CASES[case],
            "resume": checkpoint,
            "gradient_accumulation_steps": 2,
            **NO_SAVE,
        }
        to_one.append({"name": f"one {case}", **settings})
    wider = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    to_one.append({**to_one[0], "name": "wider", **wider})
    to_one.append({**to_one[0], "name": "smaller", "gradient_accumulation_steps": 1})
    to_one.append({"name": "began on one", "gradient_accumulation_steps": 2, "save_steps": 5})
    checkpoint = str(folder / "began on one" / "checkpoint-5")
    to_two.append({"name": "two", "resume": checkpoint, **NO_SAVE})
    names = [each["name"] for each in (*to_one, *to_two)]
    found = [[each] for each in run_on_processes(1, run_all, folder, to_one)[0]]
    by_rank = run_on_processes(2, run_all, folder, to_two)
    return dict(
        zip(names, [*found, *(list(each) for each in zip(*by_rank, strict=True))], strict=True)
    )


@pytest.mark.parametrize(
    ("name", "before"),
    [
        ("one prompts", "prompts"),
        ("one lengths", "lengths"),
        ("one stream", "stream"),
        ("one stream in shards", "stream in shards"),
        ("wider", "prompts"),
        ("two", "began on one"),
    ],
)
def test_the_order_of_the_rows_outlives_a_change_of_processes(
    name: str, before: str, changed: dict[str, Any], results: dict[Any, Any]
) -> None:
    whole = changed[before] if before in changed else results[before, 0]
    expected = {6: rows_of(whole)[6]}
    assert rows_of(changed[name]) == expected
    if before in ("prompts", "began on one"):
        # Without dropout, the weights are those of the run that was not stopped.
        for weight, value in whole[0]["weights"].items():
            found = changed[name][0]["weights"][weight]
            assert np.linalg.norm(found - value) <= 1e-12 * np.linalg.norm(value)


def test_other_rows_per_step_are_refused_with_the_setting_that_keeps_them(
    changed: dict[str, Any],
) -> None:
    (message,) = changed["smaller"]
    assert "rows per optimizer step: 4 then, 2 now" in message
    assert "Set gradient_accumulation_steps to 2" in message


# The order of the files in a checkpoint is: model, optimizer, random numbers, state of the run.
DEATHS = {
    "between checkpoints": ("get_batch_samples", 0, 3),
    "within a checkpoint": ("_save_optimizer_and_scheduler", 0, 4),
    "the other process within a checkpoint": ("_save_rng_state", 1, 4),
}


@pytest.mark.parametrize("death", DEATHS)
def test_nothing_is_lost_when_a_process_is_killed(
    death: str, folder: Path, results: dict[Any, Any]
) -> None:
    # Of two checkpoints the older is removed only once the newer is complete.
    settings = {"name": death, "save_total_limit": 1, **CASES["dropout"]}
    with pytest.raises(AssertionError, match="-9"):
        run_on_processes(2, run_all, folder, [{**settings, "dies_in": DEATHS[death]}])
    left = sorted(path.name for path in (folder / death).glob("checkpoint-*"))
    assert left == ["checkpoint-3"] + ["checkpoint-4"] * (DEATHS[death][2] == 4)
    resumed = run_on_processes(2, run_all, folder, [{**settings, "resume": True}])
    assert_goes_on([found for (found,) in resumed], results["dropout", 0], 3)
