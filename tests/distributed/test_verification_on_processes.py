"""Two processes verify their first step together, and train on as if they had not."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from processes import run_on_processes
from verification_worker import WAYS, run_all, run_unequal, run_uneven


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    """A model, a tokenizer and 12 rows of which some are a good deal longer than others."""
    folder = save_model("verified")
    rows = [
        {
            "input_ids": [*range(5 + n, 9 + n), *range(90, 91 + 3 * n), 2],
            "response_mask": [0] * 4 + [1] * (3 * n + 2),
        }
        for n in range(12)
    ]
    Dataset.from_list(rows).save_to_disk(folder / "train")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> Any:
    """What both processes found: of an adapter, and with weights in parts."""
    return run_on_processes(2, run_all, folder)


@pytest.mark.parametrize("is_sharded", [False, True], ids=["DDP, adapter", "FSDP2"])
def test_verified_runs_of_two_processes_are_the_same_runs(found: Any, is_sharded: bool) -> None:
    for of_process in found:
        runs = of_process[is_sharded]
        checks = {name: (value, bound) for name, value, bound in runs["before"]["checks"]}
        assert len(checks) == 10
        assert [name for name, (value, _) in checks.items() if value is None] == []
        assert [name for name, (value, bound) in checks.items() if value > bound] == []
        for way in WAYS[:2]:
            assert runs[way]["weights"] == runs["never"]["weights"]
            assert runs[way]["log"] == runs["never"]["log"]


def test_what_fails_on_one_process_fails_on_all(folder: Path) -> None:
    # Of the four rows of the second process none ends with its stop token.
    assert run_on_processes(2, run_unequal, folder) == ["stop tokens 4"] * 2


def test_a_process_with_one_row_takes_part_in_the_split_of_the_others(folder: Path) -> None:
    # The second process has a repeat beside its row, and so nothing to split.
    checks, others = run_on_processes(2, run_uneven, folder, timeout=60)
    assert checks == others
    assert [name for name, value in checks if value is None] == []
