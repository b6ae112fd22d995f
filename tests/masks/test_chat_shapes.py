"""Chats of one shape share their renderings, and no chat can tell that they do."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_sft_plugin import RowError
from hf_sft_plugin.masks.chat_shapes import ChatRenderer
from hf_sft_plugin.masks.rendering import render_chat
from hf_sft_plugin.tokens.tokenization import make_options
from hf_sft_plugin.types import Conversation, Turn

TAGS = [
    "<think>",
    "</think>",
    "<tool_response>",
    "</tool_response>",
    "\n",
    " ",
    "{",
    "}",
    "[",
    "<|",
]
# Without the characters that stand for the edges of contents: see test_rendering.py.
ANY = st.text(st.characters(exclude_categories=["Cs", "Co"]), max_size=12)
CONTENT = st.one_of(
    ANY,
    st.sampled_from(["", " ", "a", "echo", "user", "assistant", "\u3000x\u3000", "\x1cx\x1f"]),
    st.lists(st.one_of(st.sampled_from(TAGS), ANY), max_size=4).map("".join),
    st.builds("<think>{}</think>{}".format, ANY, ANY),
)
ROLES = (
    ("user", "assistant"),
    ("system", "user", "assistant"),
    ("user", "assistant") * 2,
    ("user", "assistant", "assistant"),
)


def conversation_of(roles: tuple[str, ...], contents: list[str]) -> Conversation:
    return Conversation(
        tuple(
            Turn({"role": role, "content": content}, role == "assistant")
            for role, content in zip(roles, contents, strict=False)
        )
    )


def both(conversations: list[Conversation], tokenizer: Any, stops: Any, **options: Any) -> Any:
    """What the fast way and the full way make of each chat, in order."""
    given_options = make_options(options)
    render = ChatRenderer(tokenizer, given_options, stops)
    half = len(conversations) // 2
    # Rows come in batches; what the first has shown is known to the second.
    fast = render(conversations[:half], range(half))
    fast += render(conversations[half:], range(half, len(conversations)))
    found = []
    for index, (chat, texts) in enumerate(zip(conversations, fast, strict=True)):
        try:
            full: Any = render_chat(chat, tokenizer, index, given_options, stops)
        except RowError as error:
            full = (error.reason, error.problem)
        if isinstance(texts, RowError):
            found.append([(texts.reason, texts.problem), full])
        else:
            found.append([texts, full])
    return found


WARM = ["one", "two two", "three.", "four"]


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    roles=st.sampled_from(ROLES),
    rows=st.lists(st.lists(CONTENT, min_size=4, max_size=4), min_size=1, max_size=5),
    at=st.integers(0, 4),
)
def test_the_fast_way_and_the_full_way_agree_whatever_the_rows_and_their_order(
    any_family: str,
    roles: tuple[str, ...],
    rows: list[list[str]],
    at: int,
    families: dict[str, Any],
    tokenizer_of_family: Callable[[str], Any],
) -> None:
    each = families[any_family]
    # Enough plain rows before the others that the fast way is past its trials.
    contents = [*rows[:at], *[WARM] * 4, *rows[at:], *rows]
    conversations = [conversation_of(roles, row) for row in contents]
    for fast, full in both(
        conversations,
        tokenizer_of_family(any_family),
        each.stops,
        chat_template_kwargs=each.kwargs,
    ):
        assert fast == full


def test_plain_chats_take_the_fast_way(
    any_family: str,
    families: dict[str, Any],
    tokenizer_of_family: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer, each = tokenizer_of_family(any_family), families[any_family]
    options = make_options({"chat_template_kwargs": each.kwargs})
    render = ChatRenderer(tokenizer, options, each.stops)
    num_full = 0

    def count(*args: Any) -> Any:
        nonlocal num_full
        num_full += 1
        return render_chat(*args)

    monkeypatch.setattr("hf_sft_plugin.masks.chat_shapes.render_chat", count)
    for number in range(250):
        chat = conversation_of(ROLES[0], [f"question {number}", "answer " * (number % 5) + "."])
        full = render_chat(chat, tokenizer, number, options, each.stops)
        assert render([chat], [number]) == [full]
    # The first row, one for the shape, three trials, and one of every hundred rows.
    assert num_full == 7


@pytest.mark.parametrize("text", ["\u00a0x", "x\u3000", "\x1cx"])
def test_white_space_beyond_ascii_is_treated_alike_by_both_ways(text: str, tokenizer: Any) -> None:
    conversations = [conversation_of(ROLES[0], ["q", content]) for content in (*WARM, text)]
    fast, full = both(conversations, tokenizer, ["<|im_end|>"])[-1]
    assert fast == full


def test_a_generation_prompt_that_depends_on_a_content_is_seen(
    tokenizer_factory: Callable[..., Any],
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if '/no_think' in messages[-1].content %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    )
    tokenizer = tokenizer_factory(chat_template=template)
    conversations = [conversation_of(ROLES[0], [text, "a"]) for text in (*WARM, "q /no_think")]
    fast, full = both(conversations, tokenizer, ["<|im_end|>"])[-1]
    assert full[0].spans[0].kind == "shared_prefix"
    assert fast == full


def test_a_template_that_looks_into_contents_is_taken_at_its_word(
    tokenizer_factory: Callable[..., Any],
) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content | upper if 'loud' in m.content else m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = tokenizer_factory(chat_template=template)
    texts = [*WARM, "loud", "one", "loud and clear"]
    conversations = [conversation_of(ROLES[0], [text, text]) for text in texts]
    for fast, full in both(conversations, tokenizer, ["<|im_end|>"]):
        assert fast == full


def test_shapes_differ_by_role_flag_and_weight(tokenizer: Any) -> None:
    def chat(train: bool, weight: float, last: str) -> Conversation:
        turns = [("user", False), ("assistant", train), ("user", False), (last, True)]
        return Conversation(
            tuple(Turn({"role": role, "content": f"{role}."}, flag, weight) for role, flag in turns)
        )

    conversations = [
        chat(train, weight, last)
        for _ in range(5)
        for train in (True, False)
        for weight in (1.0, 0.5, 0.0)
        for last in ("assistant", "tool")
    ]
    for fast, full in both(conversations, tokenizer, ["<|im_end|>"]):
        assert fast == full
