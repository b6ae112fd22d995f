"""What a check is: a figure, a bound, and what to do."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from hf_sft_plugin.verification.checks import (
    VerificationCheck,
    checks_table,
    describe_failures,
    not_run,
    run_checks,
    working_dtype,
    worst_of_processes,
)

PASSED = VerificationCheck("split", 1.5e-7, 1e-6, "between two splits", "Divide once.")
FAILED = VerificationCheck("split", 0.25, 1e-6, "between two splits", "Divide once.")


@pytest.mark.parametrize(
    ("value", "has_failed"),
    [(None, False), (0.0, False), (0.1, False), (0.2, True), (math.inf, True), (math.nan, True)],
)
def test_a_figure_fails_above_its_bound_and_where_it_is_no_number(
    value: float | None, has_failed: bool
) -> None:
    assert VerificationCheck("", value, 0.1, "").has_failed is has_failed


def test_the_table_has_a_line_for_every_check_and_brackets_stay_text() -> None:
    console = Console(width=80)
    with console.capture() as capture:
        console.print(checks_table([PASSED, not_run("head", "none [here]")], "2 passes."))
    title, *lines, caption = (line.strip() for line in capture.get().splitlines())
    assert (title, caption) == ("Verified before step 1", "2 passes.")
    assert [line.split() for line in lines] == [
        ["found", "at", "most"],
        ["split", "1.5e-07", "1.0e-06", "between", "two", "splits"],
        ["head", "-", "-", "not", "run:", "none", "[here]"],
    ]


def test_an_error_says_what_was_found_what_is_allowed_and_what_to_do() -> None:
    assert describe_failures([PASSED, FAILED]) == (
        "split: 2.5e-01 between two splits; at most 1.0e-06 may be. Divide once."
    )
    assert describe_failures([PASSED]) == ""
    labels = VerificationCheck("labels", 6.0, 0.0, "of 9 differ", "Move none.")
    assert describe_failures([labels]) == "labels: 6 of 9 differ; at most 0 may be. Move none."


def test_what_a_model_raises_is_the_reason_why_a_check_was_not_run() -> None:
    def check() -> list[VerificationCheck]:
        raise KeyError("attention_mask")

    assert run_checks(["a", "b"], check) == [
        not_run("a", "KeyError: 'attention_mask'"),
        not_run("b", "KeyError: 'attention_mask'"),
    ]
    assert run_checks(["split"], lambda: [PASSED]) == [PASSED]


def test_of_several_processes_the_worst_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    larger = VerificationCheck("split", 2e-7, 1e-6, "")
    skipped = not_run("split", "one row")
    for others, worst in (([FAILED], FAILED), ([larger], larger), ([skipped], PASSED)):
        monkeypatch.setattr(
            "hf_sft_plugin.verification.checks.gather_object", lambda own, o=others: [*own, o]
        )
        assert worst_of_processes([PASSED]) == [worst]


def test_the_working_dtype_is_the_coarsest_that_multiplies(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain: Any = Accelerator(cpu=True)
    assert working_dtype(plain, model) == torch.float32
    assert working_dtype(SimpleNamespace(mixed_precision="bf16"), model) == torch.bfloat16
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", SimpleNamespace(fp32_precision="bf16"))
    assert working_dtype(plain, model) == torch.bfloat16
    assert working_dtype(plain, model.double()) == torch.float64
    model.lm_head = torch.nn.Linear(2, 2, dtype=torch.float16)
    assert working_dtype(plain, model) == torch.float16
