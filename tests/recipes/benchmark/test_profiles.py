"""What a step spends its time on, by kind of work."""

from types import SimpleNamespace
from typing import Any

import profiles
import pytest
import torch
from profiles import StepProfile, profile_result, sum_up, take_profiled_part
from steps import make_step_rows
from torch.profiler import ProfilerActivity, profile
from workload import Setup

SETUP = Setup("tiny", None, 2, 1, 1, "float32", 1)


class Connection:
    """Gives two turns, and keeps what is said of them."""

    def __init__(self) -> None:
        self.num_left, self.sent = 2, []

    def recv(self) -> None:
        if not self.num_left:
            raise EOFError
        self.num_left -= 1

    def send(self, record: Any) -> None:
        self.sent.append(record)


def test_products_are_counted_as_they_were_called() -> None:
    a, b, c = torch.ones(40, 20), torch.ones(20, 30), torch.ones(40, 30)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        torch.mm(a, b)
        torch.mm(a, b, out=c)
        torch.addmm(c, a, b)
        c.addmm_(a, b)
        torch.nn.functional.linear(a, b.t(), torch.ones(30))
        torch.bmm(a[None], b[None])
    found = sum_up(recorded.key_averages(group_by_input_shape=True), best_rate=1.0)
    assert found.operations == 5 * 2 * 40 * 20 * 30
    assert all(found.seconds[kind] > 0 for kind in ("products", "attention", "rest"))
    assert found.seconds["optimizer"] == 0


def test_a_step_of_a_real_trainer_is_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "_SIZE", 16)
    connection = Connection()
    rows = make_step_rows(SETUP)
    with pytest.raises(SystemExit):
        take_profiled_part("ours", SETUP, rows, SimpleNamespace(connection=connection))  # type: ignore[arg-type]
    first, second = connection.sent
    for each in (first, second):
        assert all(seconds > 0 for seconds in each.seconds.values())
        # Weights of linear layers, forward and both of backward, are seen by every token.
        assert each.operations > 6 * 2 * 128 * (2 * 128 + 3 * 384) * 100


def test_the_table_has_medians_and_shares(cells_of: Any) -> None:
    def record(products: float) -> StepProfile:
        seconds = {"products": products, "attention": 1.0, "optimizer": 0.5, "rest": 0.5}
        return StepProfile(seconds, operations=4e12, best_rate=2e12)

    records = {"ours": [record(99.0), record(2.0)], "other": [record(99.0), record(6.0)]}
    result = profile_result(SETUP, make_step_rows(SETUP), records)
    assert cells_of(result.table) == [
        ["ours", "2.00", "1.00", "0.50", "0.50", "50%", "4.00", "2,000"],
        ["other", "6.00", "1.00", "0.50", "0.50", "75%", "4.00", "667"],
    ]
    assert result.ratios == {"ours": [0.5], "other": [0.75]}
    assert "reached 2,000 GFLOP/s" in str(result.table.caption)
