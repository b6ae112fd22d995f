"""The speed of preparation is measured on the same rows, with the same tokens trained."""

import json
from pathlib import Path
from typing import Any

import preparation
import pytest


@pytest.mark.parametrize("num_proc", [None, 2])
def test_both_prepare_the_same_rows_and_train_the_same_tokens(
    num_proc: int | None, tmp_path: Path
) -> None:
    pytest.importorskip("trl", reason="TRL, the extra `bench`, is not installed")
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(30)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    measured = preparation.measure_preparation(str(path), repetitions=1, num_proc=num_proc)
    assert [each.num_rows for each in measured] == [30, 10]
    for each in measured:
        assert each.num_trained[0] == each.num_trained[1] > 30 * 5
        assert len(each.ours) == len(each.theirs) == 1


def test_the_table_shows_rows_per_second_and_their_ratio(cells_of: Any) -> None:
    measured = preparation.Preparation("rows", 100, [1.0, 2.0, 1.0], [4.0, 4.0, 2.0], (7, 8))
    result = preparation.preparation_result({"num_proc": None}, [measured])
    assert cells_of(result.table) == [["rows", "100", "100", "25", "2.00", "2.00-4.00", "7", "8"]]
    assert result.ratios == {"rows": [4.0, 2.0, 2.0]}
