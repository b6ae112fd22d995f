"""The curves: read back from the pixels that were drawn."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from hf_sft_plugin.reporting.plots import plot_curve

TRAIN = (0x00, 0x72, 0xB2)
EVALUATION = (0xD5, 0x5E, 0x00)
RISING = [{"loss": float(step), "step": step} for step in range(11)]
FALLING = [{"eval_loss": 10.0 - step, "step": step} for step in range(11)]


def colors_in_the_middle(path: Path) -> set[tuple[int, ...]]:
    """Which of both colours are in the middle of the picture, where no legend is."""
    pixels = np.rint(image.imread(path)[150:330, 280:560, :3] * 255).astype(int)
    return {color for color in (TRAIN, EVALUATION) if (pixels == color).all(-1).any()}


@pytest.mark.parametrize(
    ("records", "colors"),
    [
        (RISING, {TRAIN}),
        (FALLING, {EVALUATION}),
        ([*RISING, *FALLING], {TRAIN, EVALUATION}),
        (RISING[4:5], {TRAIN}),
        (FALLING[4:5], {EVALUATION}),
        ([*RISING, {"loss": None, "step": 11}, {"train_loss": 5.0, "step": 11}], {TRAIN}),
        ([{"loss": None, "step": 1}], set()),
        ([{"token_entropy": 1.0, "step": 1}], set()),
        ([], set()),
    ],
    ids=[
        "training",
        "evaluation",
        "both",
        "one step",
        "one evaluation",
        "a loss that was not finite",
        "no finite loss",
        "another key",
        "nothing",
    ],
)
def test_each_curve_is_drawn_in_its_colour(
    records: list[dict[str, Any]], colors: set[tuple[int, ...]], tmp_path: Path
) -> None:
    path = tmp_path / "new folder" / "loss.png"
    plot_curve(path, records, "loss", "Loss", "nats per token")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert image.imread(path).shape == (480, 840, 4)
    assert colors_in_the_middle(path) == colors


def test_the_curve_rises_where_the_values_rise(tmp_path: Path) -> None:
    plot_curve(tmp_path / "loss.png", RISING, "loss", "Loss", "nats per token")
    pixels = np.rint(image.imread(tmp_path / "loss.png")[..., :3] * 255).astype(int)
    height, width = (pixels[:, 280:560] == TRAIN).all(-1).nonzero()
    assert np.corrcoef(height, width)[0, 1] < -0.99
