"""The log file: one line of JSON per record, whatever the numbers are made of."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_sft_plugin.reporting.run_log import append_log, read_log, start_log


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is no JSON")


def test_every_record_is_one_line_of_json_in_order(tmp_path: Path) -> None:
    start_log(tmp_path)
    append_log(tmp_path, {"loss": 1.5, "step": 1})
    append_log(tmp_path, {"note": "two\nlines \u2028 \u00e4", "step": 2})
    lines = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"loss": 1.5, "step": 1},
        {"note": "two\nlines \u2028 \u00e4", "step": 2},
    ]
    assert read_log(tmp_path) == [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, 0.1),
        (3, 3),
        (True, True),
        (None, None),
        ("text", "text"),
        (math.nan, None),
        (math.inf, None),
        (-math.inf, None),
        (np.float64(0.1), 0.1),
        (np.float64("nan"), None),
        (np.float32(1.5), 1.5),
        (np.float32("inf"), None),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([1.0, math.nan]), [1.0, None]),
        (torch.tensor(2.5), 2.5),
        (torch.tensor(math.nan), None),
        (torch.tensor([1, 2]), [1, 2]),
        ([1.0, math.inf], [1.0, None]),
        ((1, np.int32(2)), [1, 2]),
        ({"a": {"b": math.nan}, 4: np.float32(0.5)}, {"a": {"b": None}, "4": 0.5}),
        (Path("folder"), "folder"),
    ],
)
def test_values_are_plain_and_what_is_not_finite_becomes_null(
    value: Any, expected: Any, tmp_path: Path
) -> None:
    start_log(tmp_path, [{"value": value}])
    append_log(tmp_path, {"value": value})
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line, parse_constant=refuse_constant)
        assert record == {"value": expected}
        assert type(record["value"]) is type(expected)


def test_a_new_log_replaces_the_old_and_may_begin_with_the_records_of_a_resumed_run(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "not" / "yet" / "there"
    start_log(folder)
    assert read_log(folder) == []
    append_log(folder, {"step": 9})
    start_log(folder, iter([{"step": 1}, {"step": 2}]))
    append_log(folder, {"step": 3})
    assert read_log(folder) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_an_absent_log_has_no_records(tmp_path: Path) -> None:
    assert read_log(tmp_path) == []
    assert read_log(tmp_path / "absent") == []
