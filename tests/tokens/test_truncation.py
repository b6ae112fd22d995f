"""Of an example that is too long it is exactly known which tokens are kept."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft_plugin import RowError
from hf_sft_plugin.tokens.truncation import (
    keep,
    mask_runs,
    plan_truncation,
    without_oldest_exchange,
)
from hf_sft_plugin.types import Conversation, TrainedSpan, Turn

# Two turns: tokens 3 and 4 are the first response, 8 and 9 the second; token 10 follows it.
MASK = [0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0]


@pytest.mark.parametrize(
    ("overflow", "limit", "expected"),
    [
        ("keep_start", 4, [[(0, 4)]]),
        ("keep_start", 10, [[(0, 10)]]),
        ("keep_end", 4, [[(7, 11)]]),
        ("keep_end", 10, [[(1, 11)]]),
        ("split", 4, [[(0, 4)], [(4, 8)], [(8, 11)]]),
        ("split", 10, [[(0, 10)], [(10, 11)]]),
        # The last response and at least one token before it; the larger half of those is its end.
        ("keep_response", 3, [[(0, 0), (7, 10)]]),
        ("keep_response", 4, [[(0, 1), (7, 10)]]),
        ("keep_response", 5, [[(0, 1), (6, 10)]]),
        ("keep_response", 8, [[(0, 3), (5, 10)]]),
        # All of the prompt fits, and only what follows the response goes.
        ("keep_response", 10, [[(0, 10)]]),
    ],
)
def test_what_is_kept_is_as_the_table_says(
    overflow: Any, limit: int, expected: list[list[tuple[int, int]]]
) -> None:
    assert plan_truncation(MASK, limit, overflow, 0) == expected


@pytest.mark.parametrize("overflow", ["drop", "error"])
def test_a_row_that_may_not_be_cut_is_refused_with_both_lengths(overflow: Any) -> None:
    message = "Row 7: the row has 11 tokens, but max_length is 4. Raise max_length, or set overflow"
    with pytest.raises(RowError, match=re.escape(message)) as info:
        plan_truncation(MASK, 4, overflow, 7)
    assert info.value.reason == "longer than max_length"


@pytest.mark.parametrize("limit", [2, 3])
def test_a_response_without_room_for_its_context_is_not_cut(limit: int) -> None:
    message = f"Row 7: the response alone has 3 tokens, but max_length is {limit}, and a token of"
    with pytest.raises(RowError, match=re.escape(message)) as info:
        plan_truncation([0, 0, 1, 1, 1], limit, "keep_response", 7)
    assert info.value.reason == "response longer than max_length"


def test_a_row_without_a_response_keeps_its_start() -> None:
    assert plan_truncation([0] * 6, 4, "keep_response", 0) == [[(0, 4)]]


def test_a_response_at_the_very_start_is_kept_from_there() -> None:
    assert plan_truncation([1, 1, 0, 0, 0], 3, "keep_response", 0) == [[(0, 3)]]


@settings(max_examples=300, deadline=None)
@given(
    mask=st.lists(st.sampled_from([0, 1]), min_size=3, max_size=40),
    limit=st.integers(2, 40),
    overflow=st.sampled_from(["keep_start", "keep_end", "keep_response", "split"]),
)
def test_tokens_are_kept_once_in_order_and_within_the_limit(
    mask: list[int], limit: int, overflow: Any
) -> None:
    limit = min(limit, len(mask) - 1)
    runs = mask_runs(mask)
    try:
        plan = plan_truncation(mask, limit, overflow, 0)
    except RowError:
        assert overflow == "keep_response"
        assert runs[-1][1] - runs[-1][0] >= limit
        return
    kept = [[t for start, end in ranges for t in range(start, end)] for ranges in plan]
    together = [t for piece in kept for t in piece]
    assert together == sorted(set(together))
    assert set(together) <= set(range(len(mask)))
    assert all(0 < len(piece) <= limit for piece in kept)
    if overflow == "split":
        assert together == list(range(len(mask)))
        assert {len(piece) for piece in kept[:-1]} == {limit}
    else:
        assert len(plan) == 1
        assert len(together) == limit
    if overflow == "keep_response" and runs:
        start, end = runs[-1]
        assert set(range(start, end)) <= set(together)
        assert start == 0 or start - 1 in together


def test_an_example_keeps_ids_mask_and_weights_of_the_same_tokens() -> None:
    example: Any = {
        "input_ids": [5, 6, 7, 8, 9],
        "response_mask": [0, 0, 0, 1, 1],
        "loss_weights": [1.0, 2.0, 3.0, 4.0, 5.0],
    }
    kept, _ = keep(example, [], [(0, 1), (2, 4)])
    assert kept == {
        "input_ids": [5, 7, 8],
        "response_mask": [0, 0, 1],
        "loss_weights": [1.0, 3.0, 4.0],
    }
    assert example["input_ids"] == [5, 6, 7, 8, 9]
    assert "loss_weights" not in keep({"input_ids": [5], "response_mask": [1]}, [], [(0, 1)])[0]


@pytest.mark.parametrize(
    ("span", "ranges", "expected"),
    [
        ((2, 5), [(0, 8)], (2, 5)),
        ((2, 5), [(2, 8)], (0, 3)),
        ((2, 5), [(3, 8)], (0, 2)),
        ((2, 5), [(0, 3)], (2, 3)),
        ((2, 5), [(0, 1), (3, 8)], (1, 3)),
        # The middle is cut out of the span itself: what is left of it is one run.
        ((2, 7), [(0, 3), (6, 8)], (2, 4)),
        ((2, 5), [(0, 2), (5, 8)], None),
        ((2, 5), [(5, 8)], None),
        ((2, 5), [(0, 0), (1, 4)], (1, 3)),
    ],
)
def test_a_span_goes_where_its_tokens_go(
    span: tuple[int, int], ranges: list[tuple[int, int]], expected: tuple[int, int] | None
) -> None:
    example: Any = {"input_ids": list(range(8)), "response_mask": [0] * 8}
    _, left = keep(example, [TrainedSpan(*span, 3, "shared_prefix")], ranges)
    assert left == ([] if expected is None else [TrainedSpan(*expected, 3, "shared_prefix")])


@settings(max_examples=200, deadline=None)
@given(mask=st.lists(st.sampled_from([0, 1]), min_size=1, max_size=30), data=st.data())
def test_spans_and_mask_say_the_same_before_and_after(mask: list[int], data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(mask)), min_size=2, max_size=6)))
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    example: Any = {"input_ids": list(range(len(mask))), "response_mask": mask}
    spans = [TrainedSpan(*run, number, "given") for number, run in enumerate(mask_runs(mask))]
    kept, left = keep(example, spans, ranges)
    marked = [t for span in left for t in range(span.start, span.end)]
    assert marked == [t for t, mark in enumerate(kept["response_mask"]) if mark]
    assert all(mask[token] == mark for token, mark in zip(*kept.values(), strict=True))


@pytest.mark.parametrize(
    ("mask", "runs"),
    [
        ([], []),
        ([0, 0], []),
        ([1], [(0, 1)]),
        ([1, 1], [(0, 2)]),
        ([0, 1, 1, 0], [(1, 3)]),
        ([1, 0, 1, 1, 0, 0, 1], [(0, 1), (2, 4), (6, 7)]),
        ([False, True], [(1, 2)]),
    ],
)
def test_runs_of_a_mask(mask: list[int], runs: list[tuple[int, int]]) -> None:
    assert mask_runs(mask) == runs


@pytest.mark.parametrize(
    ("roles", "left"),
    [
        ("suauAuA", "suAuA"),
        ("uaatuA", "uA"),
        ("suA", None),
        ("suAu", None),
        ("auA", "uA"),
        ("s", None),
    ],
)
def test_a_chat_loses_its_oldest_exchange_as_long_as_something_is_left_to_train(
    roles: str, left: str | None
) -> None:
    """Upper case is trained."""
    names = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    turns = tuple(
        Turn({"role": names[role.lower()], "content": f"{role}{number}"}, role.isupper())
        for number, role in enumerate(roles)
    )
    shorter = without_oldest_exchange(Conversation(turns))
    told = shorter and "".join(turn.message["content"][0] for turn in shorter.turns)
    assert told == left
