"""Trainings of a few rows draw no curves, which would take longer than the training."""

import pytest

# Here the curves are looked at.
WITH_CURVES = ("test_callbacks.py", "test_trainer.py")


@pytest.fixture(autouse=True)
def no_curves(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.path.name not in WITH_CURVES:
        monkeypatch.setattr("hf_sft_plugin.training.callbacks.write_report", lambda folder: [])
