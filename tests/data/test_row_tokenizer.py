"""For any chat template, what is trained is what the model must write at inference, no more."""

from collections.abc import Callable
from itertools import groupby
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft_plugin import RowError, tokenize_example

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
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<|[")).filter(
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
        (CHATML.replace("<|im_end|>", ""), r"without a stop token \('<\|im_end\|>'\)"),
        (
            CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' else '' }}"),
            "writes nothing of the response but its stop token",
        ),
    ],
)
def test_a_template_that_does_not_fit_is_refused(
    template: str, message: str, tokenizer_factory: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_factory(chat_template=template)
    with pytest.raises(RowError, match=f"Row 0: .*{message}"):
        tokenize_example({"messages": TWO_TURNS}, tokenizer)
