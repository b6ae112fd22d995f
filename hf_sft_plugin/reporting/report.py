"""The folder `report/` that a run leaves behind: curves of what was logged."""

import importlib
import importlib.util
import logging
from pathlib import Path

from hf_sft_plugin.reporting.run_log import read_log

logger = logging.getLogger(__name__)

REPORT_FOLDER = "report"
_CURVES = (
    ("loss", "Loss over response tokens", "nats per token"),
    ("token_entropy", "Token entropy over response tokens", "nats per token"),
    ("token_accuracy", "Token accuracy over response tokens", "share of tokens"),
)


def write_report(output_dir: Path) -> list[Path]:
    """Draws the curves of a run from its `metrics.jsonl`.

    Args:
        output_dir: Folder of the run.

    Returns:
        The PNG files, `loss.png`, `token_entropy.png` and `token_accuracy.png`, as far as there is
        something to draw. Empty where matplotlib is not installed, which is said in the log.
    """
    if importlib.util.find_spec("matplotlib") is None:
        logger.warning(
            "No curves are drawn, because matplotlib is not installed: "
            'pip install "hf_sft_plugin[report]"'
        )
        return []
    # Loaded here, so that people who only train do not wait for matplotlib at every import.
    plots = importlib.import_module("hf_sft_plugin.reporting.plots")
    records = read_log(output_dir)
    paths = []
    for key, title, unit in _CURVES:
        if all(record.get(key, record.get(f"eval_{key}")) is None for record in records):
            continue
        path = output_dir / REPORT_FOLDER / f"{key}.png"
        plots.plot_curve(path, records, key, title, unit)
        paths.append(path)
    return paths
