"""For any chat template, what is trained is what the model must write at inference, no more."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft_plugin import RowError, prepare_dataset, tokenize_example
from hf_sft_plugin.tokens.tokenization import make_options, tokenize_rows

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# A text starts with bos, headers are wrapped in two control tokens, contents are stripped.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|header|>{{ m.role }}<|/header|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
# No generation prompt: the model goes on right after the user, and writes the space itself.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|eot|>{% endif %}{% endfor %}"
)
# The assistant has another name, and its turn ends in the same token as every other.
RENAMED = (
    "{{ bos_token }}{% for m in messages %}<|turn|>"
    "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|eot|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>model\n{% endif %}"
)
# The system text stands inside the first user turn.
FOLDED = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content ~ '\n\n' %}"
    "{% elif m.role == 'user' %}<|turn|>{{ ns.system }}{{ m.content }}<|turn|>"
    "{% set ns.system = '' %}{% else %}{{ m.content }}<|eot|>{% endif %}{% endfor %}"
)
# Reasoning is shown in the last response only, so earlier turns are written anew as turns follow.
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] | trim }}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Writes an empty reasoning block before every response, which the model has to write as well.
EMPTY_REASONING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "brackets": BRACKETS,
    "renamed": RENAMED,
    "folded": FOLDED,
    "reasoning": REASONING,
    "empty_reasoning": EMPTY_REASONING,
}
STOPS = {name: "<|im_end|>" if "im_end" in text else "<|eot|>" for name, text in TEMPLATES.items()}
FIRST, SECOND = "  the answer\n", "<think>the world</think>\nanswer: 42 \U0001f30d"
THINK, END, EOT = "<think>\n\n</think>\n\n", "<|im_end|>", "<|eot|>"
TWO_TURNS = [
    {"role": "system", "content": "answer this"},
    {"role": "user", "content": " hello world "},
    {"role": "assistant", "content": FIRST},
    {"role": "user", "content": "answer 2"},
    {"role": "assistant", "content": SECOND},
]


@pytest.fixture(scope="session")
def tokenizer_of(tokenizer_factory: Callable[..., Any]) -> Callable[[str], Any]:
    """Makes the tokenizer of a template, whose stop token is its eos token."""

    def make(name: str) -> Any:
        fields = {"eos_token": STOPS[name], "bos_token": "<|bos|>"}
        tokenizer = tokenizer_factory(chat_template=TEMPLATES[name], **fields)
        extra = ["<|header|>", "<|/header|>", "<|turn|>", "<|eot|>", "[INST]", "[/INST]"]
        tokenizer.add_tokens(extra, special_tokens=True)
        return tokenizer

    return make


def trained_texts(example: Any, tokenizer: Any) -> list[str]:
    """The text of every run of trained tokens."""
    pairs = zip(example["response_mask"], example["input_ids"], strict=True)
    runs = groupby(pairs, key=lambda pair: pair[0])
    return [tokenizer.decode([token for _, token in run]) for mark, run in runs if mark]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("chatml", [[FIRST + END, SECOND + END]]),
        ("headers", [["the answer" + EOT, SECOND + EOT]]),
        ("brackets", [[" " + FIRST + EOT, " " + SECOND + EOT]]),
        ("renamed", [["the answer" + EOT, SECOND + EOT]]),
        ("folded", [[FIRST + EOT, SECOND + EOT]]),
        ("reasoning", [[FIRST + END], [SECOND + END]]),
        ("empty_reasoning", [[THINK + FIRST + END, THINK + SECOND + END]]),
    ],
)
def test_the_trained_text_is_the_response_and_its_stop_token(
    name: str, expected: list[list[str]], tokenizer_of: Callable[[str], Any]
) -> None:
    tokenizer = tokenizer_of(name)
    examples = tokenize_example({"messages": TWO_TURNS}, tokenizer)
    assert [trained_texts(example, tokenizer) for example in examples] == expected


def check_against_inference(messages: list[dict[str, str]], tokenizer: Any) -> None:
    """Before each response stand exactly the tokens that inference would feed."""
    examples = tokenize_example({"messages": messages}, tokenizer)
    starts = [
        (example["input_ids"], position)
        for example in examples
        for position, mark in enumerate(example["response_mask"])
        if mark and not example["response_mask"][position - 1]
    ]
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    for (input_ids, start), turn in zip(starts, turns, strict=True):
        prompt = tokenizer.apply_chat_template(
            messages[:turn], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert input_ids[:start] == prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_before_a_response_stands_what_inference_feeds(
    name: str, tokenizer_of: Callable[[str], Any]
) -> None:
    check_against_inference(TWO_TURNS, tokenizer_of(name))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_whole_conversation_is_kept_and_has_one_bos(
    name: str, tokenizer_of: Callable[[str], Any]
) -> None:
    tokenizer = tokenizer_of(name)
    last = tokenize_example({"messages": TWO_TURNS}, tokenizer)[-1]["input_ids"]
    text = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert tokenizer.decode(last) == text
    assert last.count(tokenizer.bos_token_id) == int("bos_token" in TEMPLATES[name])


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(TEMPLATES)),
    texts=st.lists(
        # Private characters: see test_rendering.py.
        st.text(st.characters(exclude_categories=["Cs", "Co"], exclude_characters="<|[")).filter(
            lambda text: text.strip()
        ),
        min_size=4,
        max_size=4,
    ),
)
def test_any_text_is_trained_whole_and_nothing_else_is(
    name: str, texts: list[str], tokenizer_of: Callable[[str], Any]
) -> None:
    tokenizer = tokenizer_of(name)
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": r, "content": text} for r, text in zip(roles, texts, strict=True)]
    examples = tokenize_example({"messages": messages}, tokenizer)
    trained = [text for example in examples for text in trained_texts(example, tokenizer)]
    strips = name in ("headers", "renamed")
    before = {"brackets": " ", "empty_reasoning": THINK}.get(name, "")
    expected = [before + (text.strip() if strips else text) + STOPS[name] for text in texts[1::2]]
    assert trained == expected
    check_against_inference(messages, tokenizer)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("assistant\n{% endif %}", "model\n{% endif %}"), "does not begin so"),
        ("{{ raise_exception('roles must alternate') }}", "refuses.*roles must alternate"),
        ("{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "refuses the conversation"),
        (CHATML.replace("<|im_end|>", "<|end|>"), r"without a stop token \('<\|im_end\|>'\)"),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else '' }}"),
            "does not write the content of message",
        ),
    ],
)
def test_a_template_that_does_not_fit_is_refused(
    template: str, message: str, tokenizer_factory: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_factory(chat_template=template)
    with pytest.raises(RowError, match=f"Row 0: .*{message}"):
        tokenize_example({"messages": TWO_TURNS}, tokenizer)


FOUR = [
    {"role": "system", "content": "sys"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "first"},
    {"role": "tool", "content": "two"},
    {"role": "assistant", "content": "second"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "third"},
]


def flagged(**flags: Any) -> list[dict[str, Any]]:
    """The messages, with keys added to those with these contents."""
    return [{**message, **flags.get(message["content"], {})} for message in FOUR]


def test_every_response_is_trained_or_the_last_one_or_everything(tokenizer: Any) -> None:
    def trained(**options: Any) -> list[str]:
        (example,) = tokenize_example({"messages": FOUR}, tokenizer, **options)
        return trained_texts(example, tokenizer)

    whole = tokenizer.apply_chat_template(FOUR, tokenize=False)
    # The first token is <|im_start|>, which nothing predicts.
    rest = whole.removeprefix("<|im_start|>")
    assert trained() == ["first" + END, "second" + END, "third" + END]
    assert trained(train_on="last_response") == ["third" + END]
    assert trained(train_on="all") == [rest]
    assert trained(use_loss_mask=False) == [rest]
    assert trained(use_loss_mask=False, train_on="last_response") == [rest]


def test_without_masks_a_rewritten_conversation_is_one_text(
    tokenizer_of: Callable[[str], Any],
) -> None:
    tokenizer = tokenizer_of("reasoning")
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>w</think>a"},
        {"role": "user", "content": "p"},
        {"role": "assistant", "content": "b"},
    ]
    (example,) = tokenize_example({"messages": messages}, tokenizer, use_loss_mask=False)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert trained_texts(example, tokenizer) == [text.removeprefix("<|im_start|>")]


def test_the_roles_that_are_trained_can_be_others(tokenizer: Any) -> None:
    def trained(*roles: str, **options: Any) -> list[str]:
        row = {"messages": FOUR}
        (example,) = tokenize_example(row, tokenizer, train_roles=list(roles), **options)
        return trained_texts(example, tokenizer)

    assert trained("tool") == ["two" + END]
    assert trained("user") == ["one" + END, "three" + END]
    assert trained("tool", "assistant") == [
        *("first" + END, "two" + END, "second" + END, "third" + END)
    ]
    assert trained("user", train_on="last_response") == ["three" + END]
    with pytest.raises(RowError, match="no message to train has the role 'developer'"):
        trained("developer")


def test_a_first_message_of_a_trained_role_is_trained(tokenizer: Any) -> None:
    options = {"train_roles": ["user", "assistant"]}
    (example,) = tokenize_example({"messages": FOUR[1:3]}, tokenizer, **options)
    assert trained_texts(example, tokenizer) == ["one" + END, "first" + END]


def test_flags_of_messages_overrule_roles(tokenizer: Any) -> None:
    row = {"messages": flagged(first={"train": False}, two={"train": True})}
    (example,) = tokenize_example(row, tokenizer)
    assert trained_texts(example, tokenizer) == ["two" + END, "second" + END, "third" + END]
    row = {"messages": flagged(**{t: {"train": False} for t in ("first", "second", "third")})}
    with pytest.raises(RowError, match="no message to train"):
        tokenize_example(row, tokenizer)
    (example,) = tokenize_example(row, tokenizer, use_loss_mask=False)
    assert not all(example["response_mask"])
    assert all(example["response_mask"][1:])


def test_weights_of_messages_and_rows_multiply_and_stand_on_their_tokens(tokenizer: Any) -> None:
    messages = flagged(first={"weight": 0.5}, second={"weight": 0}, one={"weight": 9})
    (example,) = tokenize_example({"messages": messages, "weight": 4}, tokenizer)
    assert trained_texts(example, tokenizer) == ["first" + END, "third" + END]
    pairs = zip(example["input_ids"], example["loss_weights"], strict=True)
    runs = [
        (tokenizer.decode([token for token, _ in run]), weight)
        for weight, run in groupby(pairs, key=lambda pair: pair[1])
        for run in [list(run)]
        if weight
    ]
    assert runs == [("first" + END, 2.0), ("third" + END, 4.0)]
    (plain,) = tokenize_example({"messages": FOUR, "weight": 1}, tokenizer)
    assert "loss_weights" not in plain


def lengths(messages: list[dict[str, Any]], tokenizer: Any) -> int:
    return len(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False))


def test_keep_response_loses_the_oldest_turns_first_and_keeps_the_system(tokenizer: Any) -> None:
    (whole,) = tokenize_example({"messages": FOUR}, tokenizer)
    left = [FOUR[0], *FOUR[5:]]
    num_left = lengths(left, tokenizer)
    for limit in (num_left, len(whole["input_ids"]) - 1):
        options = make_options({"max_length": limit, "overflow": "keep_response"})
        (outcome,) = tokenize_rows([{"messages": FOUR}], [0], tokenizer, options)
        (example,) = outcome.examples
        text = tokenizer.apply_chat_template(left, tokenize=False)
        assert tokenizer.decode(example["input_ids"]) == text
        assert trained_texts(example, tokenizer) == ["third" + END]
        assert outcome.num_tokens == len(whole["input_ids"])
        assert outcome.num_lost == len(whole["input_ids"]) - num_left
    # Below that the prompt loses its middle, and the response stays whole.
    limit = num_left - 5
    row, options = {"messages": FOUR}, {"max_length": limit, "overflow": "keep_response"}
    (example,) = tokenize_example(row, tokenizer, **options)
    assert len(example["input_ids"]) == limit
    assert trained_texts(example, tokenizer) == ["third" + END]
    with pytest.raises(RowError, match="the response alone has"):
        tokenize_example(row, tokenizer, max_length=3, overflow="keep_response")


def test_keep_response_leaves_examples_alone_that_fit(tokenizer_of: Callable[[str], Any]) -> None:
    tokenizer = tokenizer_of("reasoning")
    messages = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "<think>w</think>a"},
        {"role": "user", "content": "long " * 20},
        {"role": "assistant", "content": "b"},
    ]
    first, second = tokenize_example({"messages": messages}, tokenizer)
    limit = len(second["input_ids"]) - 1
    options = {"max_length": limit, "overflow": "keep_response"}
    examples = tokenize_example({"messages": messages}, tokenizer, **options)
    assert trained_texts(examples[0], tokenizer) == ["<think>w</think>a" + END]
    assert examples[0] == first


def test_split_makes_rows_that_join_to_the_whole_and_keep_end_keeps_the_end(tokenizer: Any) -> None:
    (whole,) = tokenize_example({"messages": FOUR}, tokenizer)
    ids, mask = whole["input_ids"], whole["response_mask"]
    for limit in (2, 7, 16, len(ids) - 1):
        options = make_options({"max_length": limit, "overflow": "split"})
        (outcome,) = tokenize_rows([{"messages": FOUR}], [0], tokenizer, options)
        pieces = [
            (ids[start : start + limit], [0, *mask[start + 1 : start + limit]])
            for start in range(0, len(ids), limit)
        ]
        assert [(e["input_ids"], e["response_mask"]) for e in outcome.examples] == [
            piece for piece in pieces if any(piece[1])
        ]
        assert outcome.num_tokens == len(ids)
        kept = sum(len(piece[0]) for piece in pieces if any(piece[1]))
        assert outcome.num_lost == len(ids) - kept
        options = make_options({"max_length": limit, "overflow": "keep_end"})
        (outcome,) = tokenize_rows([{"messages": FOUR}], [0], tokenizer, options)
        if any(mask[len(ids) - limit + 1 :]):
            (example,) = outcome.examples
            assert example["input_ids"] == ids[-limit:]
            assert example["response_mask"] == [0, *mask[len(ids) - limit + 1 :]]
        else:
            assert outcome.error is not None


@pytest.mark.parametrize(
    ("overflow", "num_lost", "audit"),
    [
        # The second response ends with "d", its stop token and a line end, which is not trained.
        ("keep_start", 0, (1, 0)),
        ("keep_start", 1, (1, 0)),
        ("keep_start", 2, (0, 1)),
        ("keep_end", 2, (1, 0)),
        ("keep_response", 2, (1, 0)),
        # A stop token that opens a piece has nothing before it that could predict it.
        ("split", 2, (0, 1)),
        ("split", 3, (2, 0)),
        # The whole second response is lost, and the first ends as it should.
        ("keep_start", 4, (1, 0)),
    ],
)
def test_a_stop_token_is_there_or_it_is_said_that_it_was_cut_off(
    overflow: str, num_lost: int, audit: tuple[int, int], tokenizer: Any
) -> None:
    messages = [
        {"role": role, "content": content}
        for role, content in zip(("user", "assistant") * 2, "abcd", strict=True)
    ]
    (whole,) = tokenize_example({"messages": messages}, tokenizer)
    limit = len(whole["input_ids"]) - num_lost
    options = make_options({"max_length": limit, "overflow": overflow})
    (outcome,) = tokenize_rows([{"messages": messages}], [0], tokenizer, options)
    assert (outcome.num_stopped, outcome.num_cut_before_stop) == audit


def test_a_row_that_never_had_a_stop_token_did_not_lose_it(tokenizer: Any) -> None:
    row = {"input_ids": [5, 6, 7, 8], "response_mask": [0, 1, 1, 1]}
    (outcome,) = tokenize_rows([row], [0], tokenizer, make_options({"max_length": 3}))
    assert (outcome.num_stopped, outcome.num_cut_before_stop, outcome.num_lost) == (0, 0, 1)


@pytest.mark.parametrize("overflow", ["keep_start", "keep_end", "keep_response", "split", "drop"])
@pytest.mark.parametrize("train_on", ["response", "last_response", "all"])
def test_the_first_token_is_never_trained_and_tokens_are_all_accounted_for(
    overflow: str, train_on: str, tokenizer: Any
) -> None:
    (whole,) = tokenize_example({"messages": FOUR}, tokenizer)
    for limit in range(2, len(whole["input_ids"]) + 2):
        options = {"max_length": limit, "overflow": overflow, "train_on": train_on}
        (outcome,) = tokenize_rows([{"messages": FOUR}], [0], tokenizer, make_options(options))
        assert outcome.num_tokens == len(whole["input_ids"])
        assert outcome.num_tokens == outcome.num_lost + outcome.num_example_tokens
        assert bool(outcome.examples) == (outcome.error is None)
        for example, spans in zip(outcome.examples, outcome.spans, strict=True):
            assert len(example["input_ids"]) == len(example["response_mask"]) <= limit
            assert example["response_mask"][0] == 0
            assert any(example["response_mask"])
            assert all(0 <= s.start < s.end <= len(example["input_ids"]) for s in spans)


# One entry is drawn per row: what is put in the place of a good value.
TEXTS = [
    *("", " ", "\n", "hello", "the answer", "<|im_end|>", "<|im_start|>assistant\n", "a\x00b"),
    *("\ufeff", "\u0301", "\U0001f468\u200d\U0001f469", "</think>", "<think>x</think>y", "{}"),
    *("\U000f0000", "\U00100000", "\U00100002<|im_end|>", "\ue000", "a" * 2000, "\u3000"),
]
WRONG = [
    *(None, 5, 1.5, True, [], {}, [None], {"a": None}, [{"type": "text", "text": "x"}], b"x"),
    *("a\ud83d", "\udc00", [{"type": "image"}], [[]], {"x": {"y": [None, {"z": None}]}}),
    *(float("nan"), 10**400, object(), {1: 2}, [{"type": "text", "text": None}]),
]
ROLES = ["user", "assistant", "system", "tool", "", "\u00e9", "<|im_end|>"]


def random_rows(num: int, seed: int) -> Iterator[dict[str, Any]]:
    maker = random.Random(seed)
    for _ in range(num):
        messages: list[Any] = []
        for place in range(maker.randint(0, 5)):
            role = ("user", "assistant")[place % 2]
            role = maker.choice(ROLES) if maker.random() < 0.2 else role
            message: Any = {"role": role, "content": maker.choice(TEXTS)}
            if maker.random() < 0.1:
                key = maker.choice(["role", "content", "train", "weight", "tool_calls", "name"])
                message[key] = maker.choice(WRONG)
            if maker.random() < 0.05:
                message.pop(maker.choice(["role", "content"]))
            if maker.random() < 0.02:
                message = maker.choice(WRONG)
            messages.append(message)
        row: dict[str, Any] = {"messages": messages}
        if maker.random() < 0.05:
            row["messages"] = maker.choice(WRONG)
        if maker.random() < 0.1:
            row[maker.choice(["tools", "weight", "source"])] = maker.choice(WRONG)
        yield row


def test_thousands_of_broken_rows_are_each_trained_or_dropped_for_a_reason(tokenizer: Any) -> None:
    rows = list(random_rows(5000, seed=0))
    rows[7] = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    }
    rows[7]["messages"][1]["content"] = "a long one " * 100_000
    outcomes = []
    for start in range(0, len(rows), 500):
        batch = rows[start : start + 500]
        indices = range(start, start + len(batch))
        outcomes += tokenize_rows(batch, indices, tokenizer, make_options({}))
    assert [outcome.row for outcome in outcomes] == list(range(5000))
    reasons = Counter(outcome.error.reason for outcome in outcomes if outcome.error)
    trained = [outcome for outcome in outcomes if outcome.error is None]
    assert len(trained) + reasons.total() == 5000
    assert len(trained) > 500
    assert len(outcomes[7].examples[0]["input_ids"]) > 100_000
    for outcome in outcomes:
        assert bool(outcome.examples) == (outcome.error is None)
        assert outcome.num_tokens == outcome.num_lost + outcome.num_example_tokens
        assert outcome.error is None or str(outcome.error).startswith(f"Row {outcome.row}: ")
        for example in outcome.examples:
            assert set(example["response_mask"]) == {0, 1}
            assert example["response_mask"][0] == 0
    assert set(reasons) >= {
        *("broken Unicode", "empty response", "no message to train"),
        *("a message without a role", "message content is not text"),
        "train is not true or false",
    }


def test_a_dataset_of_broken_rows_adds_up(tokenizer: Any) -> None:
    maker = random.Random(1)
    texts = [*TEXTS, None, None]
    rows = []
    for _ in range(5000):
        count = maker.choice([0, 1, 2, 2, 2, 4])
        messages = [
            {
                "role": maker.choice([*ROLES, None]) if maker.random() < 0.1 else role,
                "content": maker.choice(texts),
                "train": maker.choice([None] * 8 + [True, False]),
                "weight": maker.choice([None] * 8 + [0.0, -1.0, float("inf")]),
                "tool_calls": maker.choice([None] * 9 + [[], [None], [{"name": "f", "x": None}]]),
            }
            for role in ("user", "assistant", "user", "assistant")[:count]
        ]
        rows.append({"messages": messages if maker.random() > 0.02 else None})
    rows[7]["messages"] = [
        {"role": "user", "content": "q" * 1_000_000},
        {"role": "assistant", "content": "a"},
    ]
    dataset, ledger = prepare_dataset(Dataset.from_list(rows), tokenizer, max_dropped_share=1.0)
    assert ledger.num_rows == 5000 == ledger.num_rows_trained + ledger.num_rows_dropped
    assert ledger.num_rows_trained == ledger.num_examples == len(dataset) > 500
    assert sum(drop.num_rows for drop in ledger.drops.values()) == ledger.num_rows_dropped > 500
    dropped = sum(drop.num_tokens for drop in ledger.drops.values())
    tokens = ledger.num_response_tokens + ledger.num_context_tokens + dropped
    assert ledger.num_tokens == tokens + ledger.num_truncated_tokens
    assert ledger.longest > 100_000
    masks = dataset["response_mask"]
    assert all(mask[0] == 0 and any(mask) for mask in masks)


@pytest.mark.parametrize("row", [5, None, "text", [1]])
def test_a_row_that_is_no_dict_is_dropped_like_any_other(row: Any, tokenizer: Any) -> None:
    good: Any = {"messages": FOUR}
    outcomes = tokenize_rows([good, row], range(2), tokenizer, make_options({}))
    assert [outcome.error and outcome.error.reason for outcome in outcomes] == [
        None,
        "row is not a dict",
    ]
