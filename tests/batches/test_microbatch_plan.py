"""Few micro-batches, within the budget, and evenly."""

from hypothesis import example, given
from hypothesis import strategies as st

from hf_sft_plugin.batches.microbatch_plan import plan_microbatches, split_up

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 120), st.booleans(), st.integers(1, 8))
def test_every_row_is_planned_once_within_the_budget(
    lengths: list[int], max_tokens: int, is_padded: bool, num_at_least: int
) -> None:
    planned = plan_microbatches(lengths, max_tokens, is_padded)
    num_at_least = min(num_at_least, len(lengths))
    plan = split_up(planned, num_at_least)
    assert len(plan) == max(len(planned), num_at_least)
    assert sorted(row for rows in plan for row in rows) == list(range(len(lengths)))
    for rows in plan:
        assert rows
        sizes = [lengths[row] for row in rows]
        cost = max(sizes) * len(sizes) if is_padded else sum(sizes)
        assert cost <= max(max_tokens, max(lengths))


@example([3, 23, 23, 25, 25], 50)
@given(LENGTHS, st.integers(50, 200))
def test_no_more_micro_batches_than_rows_packed_as_they_come_would_need(
    lengths: list[int], max_tokens: int
) -> None:
    count, load = 1, 0
    for length in sorted(lengths, reverse=True):
        count, load = (count, load + length) if load + length <= max_tokens else (count + 1, length)
    assert len(plan_microbatches(lengths, max_tokens)) <= count


def test_the_load_is_even() -> None:
    plan = plan_microbatches([10] * 30, max_tokens=160)
    assert [len(rows) for rows in plan] == [15, 15]
