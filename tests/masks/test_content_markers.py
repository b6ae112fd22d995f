"""Marks around contents come out of a rendered text again, and tell where the contents went."""

import pytest

from hf_sft_plugin.masks.content_markers import core_of, free_base, mark, unmark

BASE = 0xF0000


@pytest.mark.parametrize(
    ("role", "content", "core"),
    [
        ("user", " a b ", (1, 4)),
        ("user", "", (0, 0)),
        ("user", " \n ", (3, 3)),
        ("user", None, (0, 0)),
        ("user", "x</think>y", (0, 10)),
        ("assistant", "x</think>\ny ", (10, 11)),
        ("assistant", "x</think>", (9, 9)),
    ],
)
def test_the_core_of_a_content_is_what_templates_leave_as_it_is(
    role: str, content: str | None, core: tuple[int, int]
) -> None:
    assert core_of({"role": role, "content": content}) == core


def test_what_is_marked_is_found_where_it_went() -> None:
    messages = [{"role": "user", "content": " ab "}, {"role": "assistant", "content": "c"}]
    cores = [core_of(message) for message in messages]
    marked = mark(messages, cores, BASE)
    text = "".join(f"<{message['role']}>{message['content']}" for message in marked)
    assert unmark(text, 2, BASE) == ("<user> ab <assistant>c", ((7, 9), (21, 22)))
    assert messages[0]["content"] == " ab "


def test_a_content_that_is_missing_repeated_or_turned_around_has_no_place() -> None:
    a, b, c, d = (chr(BASE + n) for n in range(4))
    assert unmark(f"{c}x{d}", 2, BASE) == ("x", (None, (0, 1)))
    assert unmark(f"{a}x{b}{a}x{b}", 1, BASE) == ("xx", (None,))
    assert unmark(f"{b}x{a}", 1, BASE) == ("x", (None,))


def test_sentinels_are_characters_that_the_text_does_not_hold() -> None:
    assert free_base("plain", 4) == 0xF0000
    assert free_base("\U000f0000\U000f0003", 2) == 0xF0001
    assert free_base("\U000f0000\U000f0003", 3) == 0xF0004
