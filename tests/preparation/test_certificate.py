"""Digests change with what they stand for, and with nothing else."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizer

from hf_sft_plugin.preparation import certificate
from hf_sft_plugin.preparation.certificate import certify_masks, preparation_key, tokenizer_digest
from hf_sft_plugin.types import DataOptions

ROWS = [
    {"input_ids": [5, 6, 7], "response_mask": [0, 0, 1]},
    {"input_ids": [8, 9], "response_mask": [0, 1]},
]
ROOM = Path(certificate.__file__).parents[2]


def certified(rows: list[dict[str, Any]], tokenizer: Any, **options: Any) -> dict[str, Any]:
    return certify_masks(Dataset.from_list(rows), tokenizer, DataOptions(**options))


def changed(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
    assert first.keys() == second.keys()
    return {name for name in first if first[name] != second[name]}


def run_python(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=ROOM
    ).stdout.strip()


def test_a_certificate_names_all_that_masks_come_from(tokenizer: Any) -> None:
    found = certified(ROWS, tokenizer, max_length=9)
    assert list(found) == [
        "num_examples",
        "tokens_sha256",
        "masks_sha256",
        "tokenizer_sha256",
        "chat_template_sha256",
        "options",
        "code_sha256",
        "versions",
    ]
    assert found["num_examples"] == 2
    assert found["options"]["max_length"] == 9
    assert sorted(found["versions"]) == ["jinja2", "tokenizers", "transformers"]
    assert {len(value) for name, value in found.items() if name.endswith("sha256")} == {64}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (ROWS, set()),
        ([{**ROWS[0], "source": "book"}, {**ROWS[1], "source": None}], set()),
        ([{**ROWS[0], "input_ids": [5, 6, 8]}, ROWS[1]], {"tokens_sha256"}),
        ([{**ROWS[0], "response_mask": [0, 1, 1]}, ROWS[1]], {"masks_sha256"}),
        (ROWS[::-1], {"tokens_sha256", "masks_sha256"}),
        (ROWS[:1], {"num_examples", "tokens_sha256", "masks_sha256"}),
        (
            [
                {"input_ids": [5, 6], "response_mask": [0, 0]},
                {"input_ids": [7, 8, 9], "response_mask": [1, 0, 1]},
            ],
            {"tokens_sha256", "masks_sha256"},
        ),
    ],
)
def test_tokens_and_masks_have_digests_of_their_own(
    rows: list[dict[str, Any]], expected: set[str], tokenizer: Any
) -> None:
    assert changed(certified(ROWS, tokenizer), certified(rows, tokenizer)) == expected


def test_how_rows_are_stored_does_not_matter(tokenizer: Any) -> None:
    whole = Dataset.from_list(ROWS * 4)
    halves = concatenate_datasets([Dataset.from_list(ROWS), Dataset.from_list(ROWS * 3)])
    picked = Dataset.from_list([ROWS[1], *ROWS * 4]).select(range(1, 9))
    options = DataOptions()
    expected = certify_masks(whole, tokenizer, options)
    assert certify_masks(halves, tokenizer, options) == expected
    assert certify_masks(picked, tokenizer, options) == expected
    assert certify_masks(whole.with_format("torch"), tokenizer, options) == expected


@settings(max_examples=50, deadline=None)
@given(
    one=st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=4),
    other=st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=1, max_size=4),
)
def test_two_digests_are_equal_just_when_the_tokens_are(
    one: list[list[int]], other: list[list[int]], tokenizer_factory: Callable[..., Any]
) -> None:
    tokenizer = tokenizer_factory()
    found = []
    for lists in (one, other):
        rows = [{"input_ids": ids, "response_mask": [1] * len(ids)} for ids in lists]
        # A row that is the same in both keeps the columns from being all empty.
        found.append(certified([*rows, ROWS[0]], tokenizer)["tokens_sha256"])
    assert (found[0] == found[1]) == (one == other)


def test_template_tokenizer_and_options_have_digests_of_their_own(
    tokenizer: Any, tokenizer_factory: Callable[..., Any]
) -> None:
    first = certified(ROWS, tokenizer)
    assert changed(first, certified(ROWS, tokenizer_factory())) == set()
    other_template = tokenizer_factory(chat_template="{{ messages[0].content }}")
    assert changed(first, certified(ROWS, other_template)) == {"chat_template_sha256"}
    without = certified(ROWS, tokenizer_factory(chat_template=None))
    assert without["chat_template_sha256"] is None
    other_eos = tokenizer_factory(eos_token="<|endoftext|>")
    assert changed(first, certified(ROWS, other_eos)) == {"tokenizer_sha256"}
    longer = tokenizer_factory()
    longer.add_tokens(["hello"])
    assert changed(first, certified(ROWS, longer)) == {"tokenizer_sha256"}
    assert changed(first, certified(ROWS, tokenizer, train_on="all")) == {"options"}


def test_other_code_has_another_digest(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = certified(ROWS, tokenizer)
    monkeypatch.setattr(certificate, "code_digest", lambda: "other")
    assert changed(first, certified(ROWS, tokenizer)) == {"code_sha256"}


@pytest.mark.parametrize(
    "settings_of_the_call",
    [
        {"padding": True},
        {"padding": "max_length", "max_length": 50},
        {"truncation": True, "max_length": 2},
        {"split_special_tokens": True},
    ],
    ids=str,
)
def test_a_call_leaves_no_trace_in_the_digest_of_a_tokenizer(
    settings_of_the_call: dict[str, Any], tokenizer: Any
) -> None:
    before = tokenizer_digest(tokenizer)
    tokenizer(["a", "hello world"], **settings_of_the_call)
    assert tokenizer_digest(tokenizer) == before


def test_a_slow_tokenizer_has_a_digest_too() -> None:
    first, same, other = ByT5Tokenizer(), ByT5Tokenizer(), ByT5Tokenizer(extra_ids=7)
    same(["a", "bb"], padding=True)
    assert tokenizer_digest(first) == tokenizer_digest(same)
    assert tokenizer_digest(first) != tokenizer_digest(other)


def test_another_process_finds_the_same_digests(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    code = (
        "import sys; from datasets import Dataset; from transformers import AutoTokenizer; "
        "from hf_sft_plugin.preparation.certificate import *; "
        "from hf_sft_plugin.types import DataOptions; "
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]); "
        f"rows = Dataset.from_list({ROWS!r}); options = DataOptions(max_length=9); "
        "print(certify_masks(rows, tokenizer, options)); "
        "print(preparation_key(rows, tokenizer, options, {3, 2}))"
    )
    rows, options = Dataset.from_list(ROWS), DataOptions(max_length=9)
    expected = [
        str(certify_masks(rows, loaded, options)),
        preparation_key(rows, loaded, options, {2, 3}),
    ]
    assert run_python(code, str(tmp_path)).splitlines() == expected


def test_a_preparation_has_another_key_whenever_its_result_may_differ(
    tokenizer_factory: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, tokenizer, options = Dataset.from_list(ROWS), tokenizer_factory(), DataOptions()
    longer = tokenizer_factory(model_max_length=77)
    keys = [
        preparation_key(rows, tokenizer, options, None),
        preparation_key(rows.select([0]), tokenizer, options, None),
        preparation_key(rows, tokenizer_factory(eos_token="<|endoftext|>"), options, None),
        preparation_key(rows, tokenizer_factory(chat_template="{{ 1 }}"), options, None),
        preparation_key(rows, longer, options, None),
        preparation_key(rows, tokenizer, DataOptions(max_length=9), None),
        preparation_key(rows, tokenizer, DataOptions(chat_template_kwargs={"a": 1}), None),
        preparation_key(rows, tokenizer, options, []),
        preparation_key(rows, tokenizer, options, [2]),
        preparation_key(rows, tokenizer, options, [2, 3]),
    ]
    monkeypatch.setattr(certificate, "code_digest", lambda: "other")
    keys.append(preparation_key(rows, tokenizer, options, None))
    monkeypatch.setattr(certificate, "_versions", lambda: {"tokenizers": "99"})
    keys.append(preparation_key(rows, tokenizer, options, None))
    assert len(set(keys)) == len(keys) == 12
    assert {len(key) for key in keys} == {16}


def test_a_preparation_keeps_its_key_whatever_was_called_before(tokenizer: Any) -> None:
    rows, options = Dataset.from_list(ROWS), DataOptions()
    before = preparation_key(rows, tokenizer, options, [3, 2])
    tokenizer(["a", "hello world"], padding=True, truncation=True, max_length=2)
    assert preparation_key(rows, tokenizer, options, {2, 3}) == before


class Letters(PreTrainedTokenizer):
    """A slow tokenizer whose setting decides about its tokens, with one vocabulary."""

    def __init__(self, lower: bool = False, **settings: Any) -> None:
        self.lower = lower
        super().__init__(lower=lower, **settings)

    @property
    def vocab_size(self) -> int:
        return 256

    def get_vocab(self) -> dict[str, int]:
        return {chr(number): number for number in range(256)}

    def save_vocabulary(self, save_directory: str, filename_prefix: Any = None) -> tuple[str, ...]:
        return ()


def test_the_digest_of_a_slow_tokenizer_takes_its_settings() -> None:
    assert tokenizer_digest(Letters()) == tokenizer_digest(Letters())
    assert tokenizer_digest(Letters(lower=True)) != tokenizer_digest(Letters())


def test_the_digest_of_a_slow_tokenizer_is_the_same_wherever_it_came_from(tmp_path: Path) -> None:
    first = ByT5Tokenizer()
    first.save_pretrained(tmp_path / "one")
    loaded = ByT5Tokenizer.from_pretrained(tmp_path / "one")
    loaded.chat_template = "{{ 1 }}"
    loaded.save_pretrained(tmp_path / "two")
    again = ByT5Tokenizer.from_pretrained(tmp_path / "two", model_max_length=7)
    digests = {tokenizer_digest(each) for each in (first, loaded, again)}
    assert len(digests) == 1


def test_the_digest_of_a_slow_tokenizer_takes_what_its_files_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def digest(rules: str) -> str:
        def save(self: Any, folder: str, filename_prefix: Any = None) -> tuple[str, ...]:
            Path(folder, "pieces.txt").write_text(rules)
            return (str(Path(folder, "pieces.txt")),)

        monkeypatch.setattr(Letters, "save_vocabulary", save)
        return tokenizer_digest(Letters())

    assert digest("a b") == digest("a b") != digest("ab")


@pytest.mark.parametrize(
    ("file", "is_another"),
    [
        ("masks/rendering.py", True),
        ("tokens/truncation.py", True),
        ("rows/conversation.py", True),
        ("encoding/texts.py", True),
        ("preparation/prepare.py", True),
        ("types.py", True),
        ("masks/deeper/new.py", True),
        ("preview/page.py", False),
        ("shards/writer.py", False),
        ("training/trainer.py", False),
    ],
)
def test_the_digest_of_the_code_is_that_of_what_decides_on_rows(
    file: str, is_another: bool, tmp_path: Path
) -> None:
    package = tmp_path / "package"
    shutil.copytree(ROOM / "hf_sft_plugin", package, ignore=shutil.ignore_patterns("__pycache__"))
    before = certificate.code_digest.__wrapped__(package)
    assert before == certificate.code_digest()
    (package / file).parent.mkdir(exist_ok=True)
    with (package / file).open("a") as source:
        source.write("# changed\n")
    assert (certificate.code_digest.__wrapped__(package) != before) == is_another
