"""Rows become tokens exactly as inference would read them, and what is lost is counted."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizer

from hf_sft_plugin import (
    RowError,
    prepare_dataset,
    tokenize_example,
    tokenize_prompt_and_output,
)
from hf_sft_plugin.tokens.tokenization import (
    make_options,
    tokenize_rows,
)
from hf_sft_plugin.tokens.truncation import max_row_length
from hf_sft_plugin.types import DataOptions

STOP = 2
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "world"}]
# Earlier responses are written in capitals once other turns follow.
REWRITING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last or m.role == 'user' else m.content | upper }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), min_size=1)


class TableTokenizer:
    """Looks texts up in a table, and puts `bos` before a text that asks for special tokens."""

    def __init__(self, table: dict[str, list[int]], eos_token_id: int, bos: list[int]) -> None:
        self.table = table
        self.eos_token_id = eos_token_id
        self.bos = bos

    def __call__(self, texts: list[str], add_special_tokens: bool = True, **_: Any) -> Any:
        bos = self.bos if add_special_tokens else []
        return {"input_ids": [bos + self.table[text] for text in texts]}


class CharacterTokenizer(PreTrainedTokenizer):
    """One token for each character; written in Python, so it cannot tell offsets."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(eos_token="\x02", pad_token="\x00", **kwargs)

    @property
    def vocab_size(self) -> int:
        """Number of characters."""
        return 300

    def get_vocab(self) -> dict[str, int]:
        """Every character is its own code."""
        return {chr(code): code for code in range(300)}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return ord(token)

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)


def parts(example: Any) -> tuple[list[int], list[int]]:
    """Tokens that are not trained, and tokens that are."""
    pairs = list(zip(example["input_ids"], example["response_mask"], strict=True))
    return [token for token, mark in pairs if not mark], [token for token, mark in pairs if mark]


def test_prompts_and_outputs_come_out_shifted_and_padded_as_in_the_contract() -> None:
    hello = [9707, 11, 1879, 0]
    table = {"Hello, world!": hello, "a": [1, 2, 3, 4, 5, 6], "b": [7, 8, 9, 10]}
    tokenizer: Any = TableTokenizer(table, eos_token_id=151643, bos=[])
    batch = tokenize_prompt_and_output(["Hello, world!", "a"], ["Hello, world!", "b"], tokenizer)
    assert batch["input_ids"].tolist() == [
        [9707, 11, 1879, 0, 9707, 11, 1879, 0, 151643],
        [1, 2, 3, 4, 5, 6, 7, 8, 9],
    ]
    assert batch["labels"].tolist() == [
        [11, 1879, 0, 9707, 11, 1879, 0, 151643, 151643],
        [2, 3, 4, 5, 6, 7, 8, 9, 10],
    ]
    assert batch["response_mask"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 0, 0], [0] * 5 + [1] * 4]
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.long,
        "labels": torch.long,
        "response_mask": torch.float32,
    }


def test_zeros_stand_before_the_eos_where_more_than_one_position_is_missing() -> None:
    table = {"a": [7, 8], "b": [9], "c": [3, 4, 5, 6], "": []}
    tokenizer: Any = TableTokenizer(table, eos_token_id=50, bos=[1])
    batch = tokenize_prompt_and_output(["a", "c"], ["b", "a"], tokenizer)
    assert batch["input_ids"].tolist() == [[1, 7, 8, 0, 0, 50], [1, 3, 4, 5, 6, 7]]
    assert batch["labels"].tolist() == [[7, 8, 9, 50, 50, 50], [3, 4, 5, 6, 7, 8]]
    assert batch["response_mask"].tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1]]


def test_an_empty_output_trains_nothing_and_an_empty_prompt_all_but_its_first_token() -> None:
    tokenizer: Any = TableTokenizer({"a": [7, 8, 9], "": []}, eos_token_id=50, bos=[])
    batch = tokenize_prompt_and_output(["a", ""], ["", "a"], tokenizer)
    assert batch["labels"].tolist() == [[8, 9], [8, 9]]
    assert batch["response_mask"].tolist() == [[0, 0], [1, 1]]


@pytest.mark.parametrize(
    ("prompts", "outputs", "message"),
    [
        (["a", "b"], ["c"], "There are 2 prompts but 1 outputs"),
        ([], [], "There are no prompts"),
        ([""], [""], "Row 0: prompt and output are both empty"),
        (["a", "b"], ["c", None], "Row 1: output_strs holds NoneType, but text is needed"),
        (["a", 3], ["c", "d"], "Row 1: prompt_strs holds int"),
        (["a\ud800"], ["c"], "Row 0: prompt_strs holds half of a surrogate pair"),
        ("ab", ["c", "d"], "prompt_strs is one text"),
    ],
)
def test_prompts_and_outputs_that_do_not_fit_are_refused(
    prompts: Any, outputs: Any, message: str, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        tokenize_prompt_and_output(prompts, outputs, tokenizer)


def test_a_tokenizer_without_eos_is_refused_where_text_has_to_end(
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory(eos_token=None)
    with pytest.raises(ValueError, match="no eos token"):
        tokenize_prompt_and_output(["a"], ["b"], tokenizer)
    with pytest.raises(ValueError, match=r"never learn to stop\. Set tokenizer\.eos_token"):
        tokenize_example({"prompt": "a", "response": "b"}, tokenizer)


@settings(deadline=None, max_examples=60)
@given(prompt=TEXTS, response=TEXTS.filter(str.strip))
def test_plain_text_is_joined_as_inference_does(
    prompt: str, response: str, tokenizer_factory: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_factory()
    (example,) = tokenize_example({"prompt": prompt, "response": response}, tokenizer)
    context, trained = parts(example)
    assert context == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(trained) == response + "<|im_end|>"
    assert trained.index(STOP) == len(trained) - 1


def test_a_response_that_ends_in_the_stop_token_gets_no_second_one(tokenizer: Any) -> None:
    (example,) = tokenize_example({"prompt": "a", "response": "b<|im_end|>"}, tokenizer)
    assert parts(example)[1] == tokenizer("b")["input_ids"] + [STOP]


def test_the_eos_that_a_tokenizer_puts_after_the_prompt_is_taken_away(
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory()
    plain = tokenizer("hello")["input_ids"]
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A <|im_end|>",
        special_tokens=[("<|endoftext|>", 0), ("<|im_end|>", 2)],
    )
    assert tokenizer("hello")["input_ids"] == [0, *plain, 2]
    (example,) = tokenize_example({"prompt": "hello", "response": "b"}, tokenizer)
    response = tokenizer("b", add_special_tokens=False)["input_ids"]
    assert parts(example) == ([0, *plain], [*response, 2])


@pytest.mark.parametrize(
    ("options", "stop_token_ids", "expected"),
    [
        ({}, None, 2),
        ({"stop_token": "<|endoftext|>"}, None, 0),
        ({}, [0], 0),
        ({}, [1, 2], 2),
        ({}, [1, 0], 0),
        ({"stop_token": "<|im_start|>"}, [0], 1),
    ],
)
def test_plain_responses_end_in_the_token_that_inference_waits_for(
    options: dict[str, Any], stop_token_ids: list[int] | None, expected: int, tokenizer: Any
) -> None:
    row = {"prompt": "a", "response": "b"}
    (example,) = tokenize_example(row, tokenizer, stop_token_ids=stop_token_ids, **options)
    assert example["input_ids"][-1] == expected


def test_text_becomes_turns_where_the_prompt_format_is_chat(tokenizer: Any) -> None:
    row = {"prompt": "hello", "response": "world"}
    as_text = tokenize_example(row, tokenizer, prompt_format="chat")
    assert as_text == tokenize_example({"messages": CHAT}, tokenizer)
    assert as_text == tokenize_example({"prompt": CHAT[:1], "completion": CHAT[1:]}, tokenizer)
    assert as_text != tokenize_example(row, tokenizer)


def test_a_rewriting_template_gives_each_response_its_own_example(
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory(chat_template=REWRITING)
    first, second = tokenize_example({"messages": CHAT + CHAT}, tokenizer)
    assert tokenizer.decode(parts(first)[1]) == "world<|im_end|>"
    assert tokenizer.decode(parts(second)[1]) == "world<|im_end|>"
    assert "WORLD" in tokenizer.decode(second["input_ids"])
    assert "WORLD" not in tokenizer.decode(first["input_ids"])


@pytest.mark.parametrize("columns", ["messages", "prompt"])
def test_a_tokenizer_without_offsets_gives_the_same_mask(columns: str) -> None:
    template = (
        "{% for m in messages %}\x01{{ m.role }}\n{{ m.content }}\x02\n{% endfor %}"
        "{% if add_generation_prompt %}\x01assistant\n{% endif %}"
    )
    tokenizer: Any = CharacterTokenizer(chat_template=template)
    row = {"messages": CHAT + CHAT} if columns == "messages" else {"prompt": "hi", "response": "yo"}
    (example,) = tokenize_example(row, tokenizer)
    context, trained = parts(example)
    if columns == "messages":
        turn = "\x01user\nhello\x02\n\x01assistant\n"
        assert "".join(map(chr, context)) == turn + "\n" + turn + "\n"
        assert "".join(map(chr, trained)) == "world\x02world\x02"
    else:
        assert "".join(map(chr, context + trained)) == "hiyo\x02"
        assert len(trained) == 3


def test_a_missing_chat_template_is_an_error_of_the_whole_dataset(
    tokenizer_factory: Callable[..., Any],
) -> None:
    with pytest.raises(ValueError, match=r"has no chat template.*chat_template_path"):
        tokenize_example({"messages": CHAT}, tokenizer_factory(chat_template=None))


def lengths_of(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> list[Any]:
    """Per row: tokens before, tokens lost, tokens kept, reason for a drop."""
    outcomes = tokenize_rows(rows, range(len(rows)), tokenizer, make_options(options))
    return [
        (
            outcome.num_tokens,
            outcome.num_lost,
            sum(len(example["input_ids"]) for example in outcome.examples),
            outcome.error and outcome.error.reason,
        )
        for outcome in outcomes
    ]


def row_of(num_prompt: int, num_response: int, **columns: Any) -> dict[str, Any]:
    return {
        "input_ids": list(range(5, 5 + num_prompt + num_response)),
        "response_mask": [0] * num_prompt + [1] * num_response,
        **columns,
    }


def test_a_long_row_keeps_its_start_and_the_loss_of_tokens_is_counted(tokenizer: Any) -> None:
    rows = [row_of(3, 3), row_of(3, 4), row_of(2, 9), row_of(6, 1), row_of(9, 2)]
    no_response = "no response left within max_length"
    assert lengths_of(rows, tokenizer, max_length=6) == [
        (6, 0, 6, None),
        (7, 1, 6, None),
        (11, 5, 6, None),
        (7, 7, 0, no_response),
        (11, 11, 0, no_response),
    ]


def test_a_cut_row_is_cut_in_all_its_lists(tokenizer: Any) -> None:
    row = row_of(2, 3, loss_weights=[0.0, 0.0, 1.0, 2.0, 3.0], source="book")
    (example,) = tokenize_example(row, tokenizer, max_length=4)
    assert example == {
        "input_ids": [5, 6, 7, 8],
        "response_mask": [0, 0, 1, 1],
        "loss_weights": [0.0, 0.0, 1.0, 2.0],
        "source": "book",
    }


def test_a_long_row_is_dropped_or_refused_where_asked(tokenizer: Any) -> None:
    rows = [row_of(3, 3), row_of(3, 4)]
    assert lengths_of(rows, tokenizer, max_length=6, overflow="drop") == [
        (6, 0, 6, None),
        (7, 7, 0, "longer than max_length"),
    ]
    with pytest.raises(RowError, match="Row 1: the row has 7 tokens, but max_length is 6"):
        lengths_of(rows, tokenizer, max_length=6, overflow="error")


def test_of_a_split_conversation_only_the_examples_that_lose_their_response_go(
    tokenizer_factory: Callable[..., Any],
) -> None:
    tokenizer = tokenizer_factory(chat_template=REWRITING)
    messages = {"messages": CHAT + CHAT}
    whole = tokenize_example(messages, tokenizer)
    num_first = len(whole[0]["input_ids"])
    assert tokenize_example(messages, tokenizer, max_length=num_first) == whole[:1]
    num_all = sum(len(example["input_ids"]) for example in whole)
    assert lengths_of([messages], tokenizer, max_length=num_first) == [
        (num_all, num_all - num_first, num_first, None)
    ]


def test_the_first_token_is_never_trained_because_nothing_predicts_it(tokenizer: Any) -> None:
    (example,) = tokenize_example(row_of(0, 3), tokenizer)
    assert example["response_mask"] == [0, 1, 1]
    with pytest.raises(RowError, match="no token of the row is trained"):
        tokenize_example(row_of(0, 1), tokenizer)
    with pytest.raises(RowError, match="no token of the row is trained"):
        tokenize_example(row_of(3, 0), tokenizer)


def test_the_limit_is_the_users_or_else_the_tokenizers(
    tokenizer_factory: Callable[..., Any],
) -> None:
    assert max_row_length(tokenizer_factory(), None) is None
    assert max_row_length(tokenizer_factory(model_max_length=8), None) == 8
    assert max_row_length(tokenizer_factory(model_max_length=8), 9) == 9


def test_an_unknown_option_names_the_known_ones() -> None:
    assert make_options({"max_length": 5}) == DataOptions(max_length=5)
    with pytest.raises(ValueError, match="Unknown option 'max_len'; the options are max_length,"):
        make_options({"max_len": 5})


def test_one_bad_row_leaves_the_others_as_they_are(tokenizer: Any) -> None:
    good = {"prompt": "hello", "response": "world"}
    bad: list[Any] = ["", "   ", None, 5, "a\ud83d"]
    rows = [row for value in bad for row in (good, {"prompt": "hello", "response": value})]
    outcomes = tokenize_rows(rows, range(10, 20), tokenizer, DataOptions())
    (alone,) = tokenize_example(good, tokenizer)
    assert [outcome.examples for outcome in outcomes] == [[alone], []] * 5
    assert [outcome.row for outcome in outcomes] == list(range(10, 20))
    assert [str(outcome.error).split(":")[0] for outcome in outcomes[1::2]] == [
        f"Row {row}" for row in range(11, 20, 2)
    ]


def test_rows_tokenized_together_are_the_rows_tokenized_alone(
    tokenizer: Any, chat_rows: list[dict[str, Any]]
) -> None:
    random.Random(0).shuffle(chat_rows)
    together = tokenize_rows(chat_rows, range(len(chat_rows)), tokenizer, DataOptions())
    assert [o.examples for o in together] == [tokenize_example(r, tokenizer) for r in chat_rows]


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{% for m in messages %}", r"Unexpected end of template.*\(line 1 of it\)"),
        ("{{ messages[0].content }}\n{{ x | nofilter }}", r"'nofilter'.*\(line 2 of it\)"),
    ],
)
def test_a_chat_template_that_is_none_is_one_error_of_the_whole_dataset(
    template: str, problem: str, tokenizer_factory: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_factory(chat_template=template)
    with pytest.raises(
        ValueError, match=f"^The chat template cannot be read: .*{problem}"
    ) as found:
        prepare_dataset(Dataset.from_list([{"messages": CHAT}] * 5), tokenizer)
    assert not isinstance(found.value, RowError)
    assert "Row" not in str(found.value)
