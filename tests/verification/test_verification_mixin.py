"""Only the first step of a run is verified, and only where that was asked for."""

from typing import Any

import pytest
from transformers import TrainerState

from hf_sft_plugin.verification import verification
from hf_sft_plugin.verification.verification_mixin import VerificationMixin


@pytest.mark.parametrize(
    ("is_on", "step", "batches", "is_verified"),
    [
        (True, 3, ["rows"], True),
        (True, 4, ["rows"], False),
        (True, 3, [], False),
        (False, 3, ["rows"], False),
    ],
    ids=["the first step", "a later one", "no batch", "switched off"],
)
def test_what_is_verified(
    is_on: bool, step: int, batches: list[Any], is_verified: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    verified: list[Any] = []
    monkeypatch.setattr(verification, "verify_step", lambda *given: verified.append(given))
    trainer = VerificationMixin()
    trainer.verify_before_training = is_on
    trainer.state = TrainerState(global_step=step)
    trainer._initial_global_step = 3
    trainer.verify_first_step(batches, 7)
    assert verified == ([(trainer, batches, 7)] if is_verified else [])
