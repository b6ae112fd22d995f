"""Single values of a row: text that can be encoded, weights, flags, and dicts without nulls."""

import math
from typing import Any

import pytest

from hf_sft_plugin import RowError
from hf_sft_plugin.rows.formats import RowFormat
from hf_sft_plugin.rows.values import (
    RowSource,
    check_texts,
    check_unicode,
    read_flag,
    read_weight,
    without_nulls,
)
from hf_sft_plugin.types import DataOptions

SOURCE = RowSource({"t": "a"}, 3, RowFormat("text", (("t", "text"),)), DataOptions())


def test_text_that_can_be_encoded_passes() -> None:
    check_unicode("a\u00e9\U0001f600\x00", 0, "prompt")
    check_texts(["", "a\U0001f600"], "prompts")
    check_texts([], "prompts")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ("abc", "prompts is one text, but a list of texts is needed"),
        (["a", None], "Row 1: prompts holds NoneType, but text is needed"),
        ([["a", "b"]], "Row 0: prompts holds list, but text is needed"),
        (["a", "\udc00"], "Row 1: prompts holds half of a surrogate pair at character 0"),
    ],
)
def test_a_list_of_anything_but_text_is_refused_by_its_row(texts: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_texts(texts, "prompts")


@pytest.mark.parametrize(
    "value",
    [
        "a",
        7,
        1.5,
        True,
        {},
        [],
        {"a": {"b": ["c", {"d": 1}]}},
        # A null within a list is a value of its own: its place would be lost with it.
        [1, None, 2],
    ],
)
def test_what_holds_no_null_is_returned_as_the_very_same_object(value: Any) -> None:
    assert without_nulls(value, SOURCE, "here") is value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": None}, {}),
        ({"a": None, "b": 1}, {"b": 1}),
        ({"a": {"b": None, "c": [{"d": None}]}}, {"a": {"c": [{}]}}),
        ([{"a": None}, {"b": 2}], [{}, {"b": 2}]),
        (({"a": None}, 1), [{}, 1]),
    ],
)
def test_keys_without_a_value_are_gone_at_any_depth(value: Any, expected: Any) -> None:
    before = repr(value)
    assert without_nulls(value, SOURCE, "here") == expected
    assert repr(value) == before


@pytest.mark.parametrize(
    ("value", "message", "reason"),
    [
        ({"a": b"x"}, "here holds bytes b'x', which no chat template", "a message holds bytes"),
        ({1: "a"}, "here holds int 1", "a message holds int"),
        ([{2, 3}], "here holds set", "a message holds set"),
        ({"a": "\ud800"}, "here holds half of a surrogate pair", "broken Unicode"),
        ({"\ud800": "a"}, "here holds half of a surrogate pair", "broken Unicode"),
        (["\ud800"], "here holds half of a surrogate pair", "broken Unicode"),
    ],
)
def test_what_no_template_can_write_is_refused_by_its_place(
    value: Any, message: str, reason: str
) -> None:
    with pytest.raises(RowError) as info:
        without_nulls(value, SOURCE, "here")
    assert str(info.value).startswith(f"Row 3: {message}")
    assert info.value.reason == reason


@pytest.mark.parametrize(
    ("value", "share", "expected"),
    [(None, 1.0, 1.0), (None, 0.5, 0.5), (2, 0.5, 1.0), (0, 3.0, 0.0), (0.25, 2.0, 0.5)],
)
def test_a_weight_is_its_own_times_that_of_the_whole(
    value: Any, share: float, expected: float
) -> None:
    assert read_weight(value, share, SOURCE, "here") == expected


@pytest.mark.parametrize(
    "value", [-1, -0.5, math.nan, math.inf, -math.inf, True, "1", [1.0], {}, b"1", 10**400, 1e308]
)
def test_a_weight_that_cannot_be_counted_with_is_refused(value: Any) -> None:
    with pytest.raises(RowError, match=r"Row 3: here has the weight .* finite number of 0 or"):
        read_weight(value, 10.0, SOURCE, "here")


def test_a_flag_is_true_false_or_absent() -> None:
    assert [read_flag(value, SOURCE, "here") for value in (True, False, None)] == [
        True,
        False,
        None,
    ]
    for value in (0, 1, "true", [], 1.0):
        with pytest.raises(RowError, match=r"here has 'train': .* true or false is needed"):
            read_flag(value, SOURCE, "here")


def test_a_part_of_the_wrong_type_is_refused_by_row_and_column() -> None:
    source = RowSource({"t": 7}, 3, SOURCE.row_format, DataOptions())
    with pytest.raises(RowError, match="Row 3: column 't' holds int, but text is needed") as info:
        source.text("text")
    assert info.value.reason == "t is int, not text"
    with pytest.raises(RowError, match="Row 3: column 't' holds int, but a list is needed") as info:
        source.entries("text", "a list")
    assert info.value.reason == "t is int, not text"
