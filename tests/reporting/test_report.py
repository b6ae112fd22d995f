"""The report folder of a run, with and without matplotlib."""

import importlib.util
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from hf_sft_plugin.reporting.report import write_report
from hf_sft_plugin.reporting.run_log import start_log

NAMES = ["loss.png", "token_entropy.png", "token_accuracy.png"]
RECORDS = [
    {"loss": 3.0 - step, "token_entropy": 2.0, "token_accuracy": 0.1 * step, "step": step}
    for step in range(3)
]


def has_curve(path: Path) -> bool:
    pixels = np.rint(image.imread(path)[..., :3] * 255).astype(int)
    return bool((pixels == (0x00, 0x72, 0xB2)).all(-1).any())


@pytest.mark.parametrize(
    ("records", "names"),
    [
        (RECORDS, NAMES),
        ([{"loss": r["loss"], "step": r["step"]} for r in RECORDS], NAMES[:1]),
        ([{"train_runtime": 1.0, "step": 3}], []),
        ([], []),
        (None, []),
    ],
    ids=["all", "only the loss", "no curve", "an empty log", "no log"],
)
def test_what_was_logged_is_drawn_and_nothing_else(
    records: list[dict[str, Any]] | None, names: list[str], tmp_path: Path
) -> None:
    if records is not None:
        start_log(tmp_path, records)
    paths = write_report(tmp_path)
    assert paths == [tmp_path / "report" / name for name in names]
    assert all(image.imread(path).shape == (480, 840, 4) for path in paths)
    assert all(has_curve(path) for path in paths)


def test_an_evaluation_alone_is_drawn_too(tmp_path: Path) -> None:
    start_log(tmp_path, [{"eval_loss": 3.0, "step": 0}])
    assert write_report(tmp_path) == [tmp_path / "report" / "loss.png"]


def test_without_matplotlib_a_warning_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "matplotlib" else find_spec(name, *args),
    )
    start_log(tmp_path, RECORDS)
    with caplog.at_level(logging.WARNING, logger="hf_sft_plugin.reporting.report"):
        assert write_report(tmp_path) == []
    (record,) = caplog.records
    assert record.getMessage() == (
        "No curves are drawn, because matplotlib is not installed: "
        'pip install "hf_sft_plugin[report]"'
    )
    assert not (tmp_path / "report").exists()
