"""The account of a dataset adds up, can be read, and says nothing of what the rows hold."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_sft_plugin import RowError, prepare_dataset, preview_rows
from hf_sft_plugin.preparation.ledger import Drop, Ledger, account_of
from hf_sft_plugin.tokens.row_tokenizer import RowOutcome
from hf_sft_plugin.types import TrainedSpan

ALTERED = "the chat template changes the text of a response"


def trained_row(row: int, num_tokens: int = 4, num_lost: int = 0, **more: Any) -> dict[str, Any]:
    account = {"row": row, "num_tokens": num_tokens, "num_lost": num_lost, **more}
    return {"num_examples": 1, "num_stopped": 1, "spans": {"exact": 1}, **account}


def dropped_row(row: int, reason: str = "empty response", num_tokens: int = 0) -> dict[str, Any]:
    problem = f"Row {row}: it says 'my secret'."
    return {"row": row, "num_tokens": num_tokens, "reason": reason, "problem": problem}


def test_an_account_is_plain_and_leaves_out_what_is_zero() -> None:
    outcome = RowOutcome(3)
    outcome.add({"input_ids": [5, 6], "response_mask": [0, 1]}, [TrainedSpan(1, 2, 0, "given")])
    outcome.num_tokens = 2
    expected = {
        "row": 3,
        "num_tokens": 2,
        "num_examples": 1,
        "num_stopped": 0,
        "spans": {"given": 1},
    }
    assert account_of(outcome) == expected
    assert json.loads(json.dumps(account_of(outcome))) == expected


def test_the_account_of_row_0_has_its_number() -> None:
    assert account_of(RowOutcome(0))["row"] == 0


def test_an_account_has_everything_that_is_to_be_counted() -> None:
    outcome = RowOutcome(
        3,
        num_tokens=9,
        num_lost=4,
        num_stopped=2,
        num_cut_before_stop=1,
        control_tokens=["<a>", "<b>", "<a>"],
        num_straddled=1,
        is_lossy=True,
        is_altered=True,
        is_unseen=True,
    )
    spans = [TrainedSpan(0, 1, 0, "exact"), TrainedSpan(2, 3, 1, "exact")]
    outcome.add({"input_ids": [5, 6, 7], "response_mask": [1, 0, 1]}, spans)
    outcome.add({"input_ids": [5], "response_mask": [1]}, [TrainedSpan(0, 1, 0, "rewritten")])
    assert account_of(outcome) == {
        "row": 3,
        "num_tokens": 9,
        "num_lost": 4,
        "num_straddled": 1,
        "num_cut_before_stop": 1,
        "control_tokens": {"<a>": 2, "<b>": 1},
        "remarks": [
            "the tokenizer cannot give the response back exactly",
            ALTERED,
            "a content could not be found a second time",
        ],
        "num_examples": 2,
        "num_stopped": 2,
        "spans": {"exact": 2, "rewritten": 1},
    }


def test_the_account_of_a_dropped_row_has_its_reason_and_its_tokens() -> None:
    outcome = RowOutcome(3)
    outcome.add({"input_ids": [5, 6], "response_mask": [0, 1]}, [])
    outcome.drop(RowError(3, "it is bad.", "bad row"))
    assert account_of(outcome) == {
        "row": 3,
        "num_tokens": 2,
        "num_lost": 2,
        "reason": "bad row",
        "problem": "Row 3: it is bad.",
    }


def test_rows_are_entered_under_what_became_of_them() -> None:
    ledger = Ledger(num_rows=5)
    ledger.add_row(trained_row(0))
    more = {"control_tokens": {"<a>": 2}, "num_straddled": 1, "remarks": [ALTERED]}
    more |= {"num_cut_before_stop": 3}
    ledger.add_row(trained_row(1, 9, 3, **more))
    ledger.add_row({**trained_row(2, 5), "num_examples": 2, "num_stopped": 0, "spans": {"text": 2}})
    ledger.add_row(dropped_row(3))
    ledger.add_row(dropped_row(4, num_tokens=6))
    assert ledger == Ledger(
        num_rows=5,
        num_rows_trained=3,
        num_examples=4,
        num_rows_truncated=1,
        num_tokens=24,
        num_truncated_tokens=3,
        drops={"empty response": Drop(2, 6, [3, 4], "Row 3: it says 'my secret'.")},
        num_stopped=2,
        num_cut_before_stop=3,
        spans={"exact": 2, "text": 2},
        control_tokens={"<a>": 2},
        num_straddled_tokens=1,
        remarks={ALTERED: [1]},
        num_remarks={ALTERED: 1},
    )
    assert ledger.num_rows_dropped == 2


def test_the_first_five_rows_of_each_kind_are_named() -> None:
    ledger = Ledger(num_rows=14)
    for row in range(7):
        ledger.add_row(dropped_row(row))
        ledger.add_row(trained_row(7 + row, remarks=[ALTERED]))
    assert ledger.drops["empty response"].first_rows == [0, 1, 2, 3, 4]
    assert (ledger.remarks, ledger.num_remarks) == ({ALTERED: [7, 8, 9, 10, 11]}, {ALTERED: 7})
    assert "        dropped 7: empty response (rows 0, 1, 2, 3, 4, ...)" in str(ledger).splitlines()
    assert f"        7 rows: {ALTERED} (rows 7, 8, 9, 10, 11, ...)" in str(ledger).splitlines()


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(2, 900), st.integers(0, 900), st.integers(1, 900), st.booleans()),
        min_size=1,
        max_size=20,
    )
)
def test_the_numbers_of_each_printed_line_add_up(rows: list[tuple[int, int, int, bool]]) -> None:
    ledger = Ledger(num_rows=len(rows))
    for row, (kept, lost, trained, is_dropped) in enumerate(rows):
        if is_dropped:
            ledger.add_row(dropped_row(row, f"reason {kept % 3}", kept))
            continue
        ledger.add_row(trained_row(row, kept + lost, lost))
        ledger.num_response_tokens += min(trained, kept)
        ledger.num_context_tokens += kept - min(trained, kept)
    text = str(ledger).replace(",", "")
    drops = [line.split()[1].rstrip(":") for line in text.splitlines() if "        dropped" in line]
    words = text.split()
    equals = [place for place, word in enumerate(words) if word == "="]
    assert words[0] == "rows"
    num_rows = int(words[1])
    num_trained, num_dropped = int(words[equals[0] + 1]), int(words[words.index("dropped") - 1])
    assert num_rows == num_trained + num_dropped == len(rows)
    assert sum(map(int, drops)) == num_dropped
    tokens = words[words.index("tokens") :]
    parts = [int(tokens[place]) for place in (4, 7, 10, 13)]
    assert [tokens[place] for place in (5, 8, 11, 14)] == [
        "trained",
        "context",
        "truncated",
        "dropped",
    ]
    assert int(tokens[1]) == sum(parts) == ledger.num_tokens
    if num_trained:
        ledger.check(max_dropped_share=1.0)


def test_the_printed_account_adds_up_line_by_line() -> None:
    ledger = Ledger(
        columns="messages: messages, source",
        unused_columns=["id", "url"],
        num_stopped=1_200,
        num_cut_before_stop=297,
        is_pad_eos=True,
        spans={"exact": 1_400, "shared_prefix": 100},
        control_tokens={"<|im_end|>": 3},
        num_straddled_tokens=2,
        remarks={ALTERED: [7]},
        num_remarks={ALTERED: 1},
        num_rows=1010,
        num_rows_trained=1003,
        num_examples=1500,
        num_rows_truncated=2,
        num_tokens=20_000,
        num_response_tokens=4_000,
        num_context_tokens=12_000,
        num_truncated_tokens=3_000,
        longest=512,
        max_length=512,
        drops={
            "empty response": Drop(6, 0, [1, 2, 3, 4, 5], "Row 1: ..."),
            "no trained token": Drop(1, 1_000, [9], "Row 9: ..."),
        },
    )
    assert str(ledger).splitlines() == [
        "rows    1,010 in = 1,003 trained (2 truncated) + 7 dropped",
        "        dropped 6: empty response (rows 1, 2, 3, 4, 5, ...)",
        "        dropped 1: no trained token (row 9)",
        "        the trained rows are split into 1,500 examples",
        "tokens  20,000 in = 4,000 trained + 12,000 context",
        "        + 3,000 truncated + 1,000 dropped",
        "        25.0% of the tokens read are trained; longest row 512, limit 512",
        "masks   1,400 exact + 100 shared prefix spans; "
        "80.0% of the examples end with a stop token",
        "        19.8% lost theirs to truncation",
        "        pad is the eos token too, which is harmless: masks go by position",
        "        control tokens in the contents: <|im_end|> (3)",
        "        2 edges of responses have other tokens in the whole text than in its parts",
        f"        1 row: {ALTERED} (row 7)",
        "columns messages: messages, source",
        "        not used: id, url",
    ]


def test_an_account_without_anything_to_say_is_short() -> None:
    assert str(Ledger(num_rows=0)).splitlines() == [
        "rows    0 in = 0 trained (0 truncated) + 0 dropped",
        "tokens  0 in = 0 trained + 0 context",
        "        + 0 truncated + 0 dropped",
        "        0.0% of the tokens read are trained; longest row 0, no limit",
    ]


def test_where_every_example_ends_with_a_stop_token_none_lost_it() -> None:
    ledger = Ledger(num_rows=1, num_rows_trained=1, num_examples=1, spans={"exact": 1})
    ledger.num_stopped = 1
    assert "masks   1 exact spans; 100.0% of the examples end with a stop token" in str(ledger)
    assert "lost theirs" not in str(ledger)
    ledger.num_stopped = 0
    assert "        0.0% lost theirs to truncation" in str(ledger).splitlines()


def test_a_single_token_is_not_plural() -> None:
    ledger = Ledger(num_rows=1, num_rows_trained=1, num_examples=1, num_straddled_tokens=1)
    assert (
        "        1 edge of a response has other tokens in the whole text than in its parts"
        in str(ledger).splitlines()
    )


def test_what_is_saved_names_rows_and_reasons_but_quotes_no_data(tmp_path: Path) -> None:
    ledger = Ledger(num_rows=2)
    ledger.add_row(trained_row(0))
    ledger.num_response_tokens, ledger.num_context_tokens = 1, 3
    ledger.add_row(dropped_row(1))
    path = tmp_path / "new" / "data_ledger_train.json"
    ledger.save(path)
    saved = path.read_text(encoding="utf-8")
    assert "my secret" not in saved
    assert "my secret" not in str(ledger)
    assert json.loads(saved) == ledger.to_dict()
    drop = {"num_rows": 1, "num_tokens": 0, "first_rows": [1]}
    assert ledger.to_dict()["drops"] == {"empty response": drop}
    assert ledger.to_dict().keys() == Ledger.__dataclass_fields__.keys()
    # The account itself still has it, for whoever sits in front of the data.
    with pytest.raises(ValueError, match="- 1 row, empty response: Row 1: it says 'my secret'"):
        ledger.check(max_dropped_share=0.1)


@pytest.mark.parametrize(
    ("share", "written"), [(0.05, "5%"), (0.005, "0.5%"), (0.07, "7%"), (0.0, "0%")]
)
def test_the_share_is_written_as_it_was_given(share: float, written: str) -> None:
    ledger = Ledger(num_rows=2)
    ledger.add_row(trained_row(0, num_tokens=0))
    ledger.add_row(dropped_row(1))
    with pytest.raises(ValueError, match=f"or allow more than {written} of them to be dropped"):
        ledger.check(share)


@pytest.mark.parametrize("num_dropped", [7, 14, 28, 29, 55, 57, 58])
def test_a_share_that_is_just_reached_is_allowed(num_dropped: int) -> None:
    """In floating point 0.29 * 100 is less than 29."""
    ledger = Ledger(num_rows=100)
    for row in range(100):
        ledger.add_row(dropped_row(row) if row < num_dropped else trained_row(row, 0))
    ledger.check(num_dropped / 100)
    with pytest.raises(ValueError, match=f"{num_dropped} of 100 rows cannot be trained"):
        ledger.check((num_dropped - 1) / 100)


def test_an_account_that_does_not_add_up_is_our_mistake() -> None:
    ledger = Ledger(num_rows=2)
    ledger.add_row(trained_row(0, num_tokens=0))
    with pytest.raises(AssertionError):
        ledger.check(1.0)
    ledger.add_row(trained_row(1, num_tokens=4))
    with pytest.raises(AssertionError):
        ledger.check(1.0)
    ledger.num_context_tokens = 4
    ledger.check(0.0)


def test_an_account_is_read_back_from_its_record() -> None:
    ledger = Ledger(num_rows=2)
    ledger.add_row(trained_row(0, num_tokens=4))
    ledger.add_row(dropped_row(1))
    record = json.loads(json.dumps(asdict(ledger)))
    certificate = record.pop("certificate")
    assert Ledger.from_record(record, certificate) == ledger
    assert Ledger.from_record(record, {"masks_sha256": "0"}).certificate == {"masks_sha256": "0"}
    for other in (None, "text", {}, {**record, "more": 1}):
        assert Ledger.from_record(other, None) is None


def count_remarks(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> dict[str, int]:
    return prepare_dataset(Dataset.from_list(rows), tokenizer, **options)[1].num_remarks


ALPACA = {"instruction": "hello", "input": "", "output": "world"}
PAIR = {"prompt": "hello", "response": "world"}


@pytest.mark.parametrize("row", [PAIR, ALPACA])
def test_texts_that_are_joined_beside_a_chat_template_are_counted_with_the_cure(
    row: dict[str, Any], tokenizer: Any, tokenizer_factory: Any
) -> None:
    rows = [row] * 3
    (remark,) = count_remarks(rows, tokenizer)
    assert "chat template" in remark
    assert "prompt_format='chat'" in remark
    _, ledger = prepare_dataset(Dataset.from_list(rows), tokenizer, num_proc=2)
    assert ledger.num_remarks == {remark: 3}
    assert f"3 rows: {remark} (rows 0, 1, 2)" in str(ledger)
    assert preview_rows(rows, tokenizer)[0].remarks == (remark,)
    assert not count_remarks(rows, tokenizer, prompt_format="chat")
    assert not count_remarks(rows, tokenizer_factory(chat_template=None))


def test_texts_that_are_no_answers_need_no_chat_template(
    tokenizer: Any, chat_rows: list[dict[str, Any]]
) -> None:
    assert not count_remarks([{"text": "hello world"}], tokenizer)
    assert not count_remarks(chat_rows, tokenizer)
    assert not count_remarks(chat_rows, tokenizer, train_on="all")
    both = [{"prompt": row["messages"][:1], "response": row["messages"][1:]} for row in chat_rows]
    assert not count_remarks(both, tokenizer)


@pytest.mark.parametrize(
    ("role", "known"),
    [
        ("asistant", "assistant"),
        ("assitant", "assistant"),
        ("Assistant", "assistant"),
        ("assistant ", "assistant"),
        ("usr", "user"),
        ("sytem", "system"),
        ("tools", "tool"),
    ],
)
def test_a_role_that_looks_like_another_is_counted_and_named(
    role: str, known: str, tokenizer: Any, chat_rows: list[dict[str, Any]]
) -> None:
    odd = [{"role": role, "content": "a"}, *chat_rows[0]["messages"]]
    rows = [*chat_rows, {"messages": odd}]
    ((remark, number),) = count_remarks(rows, tokenizer).items()
    assert (repr(role) in remark, repr(known) in remark, number) == (True, True, 1)
    assert preview_rows(rows, tokenizer, num_rows=9)[8].remarks == (remark,)


@pytest.mark.parametrize("role", ["tool", "developer", "critic", "ipython", "function", "model"])
def test_roles_of_their_own_are_not_remarked_on(role: str, tokenizer: Any) -> None:
    turns = [("user", "a"), (role, "b"), ("assistant", "c")]
    assert not count_remarks(
        [{"messages": [{"role": r, "content": c} for r, c in turns]}], tokenizer
    )


def test_a_role_that_is_to_be_trained_is_meant(tokenizer: Any) -> None:
    row = {"messages": [{"role": r, "content": "a"} for r in ("user", "assistants")]}
    assert not count_remarks([row], tokenizer, train_roles=["assistants"])
