"""What a checkpoint has to hold beyond the Trainer's own: the totals behind the logged means."""

import json
from pathlib import Path

from accelerate import Accelerator

from hf_sft_plugin.training.metrics import Totals, WindowedTotals

_FILE = "response_totals.json"


def save_totals(folder: str, totals: WindowedTotals, accelerator: Accelerator) -> None:
    """Writes the totals of the run and of the open window, over all processes.

    Args:
        folder: The checkpoint.
        totals: Left as they are.
        accelerator: All processes call this; the main one writes.
    """
    window = totals.peek(accelerator)
    if accelerator.is_main_process:
        state = {"run": totals.run.to_list(), "window": window.to_list()}
        Path(folder, _FILE).write_text(json.dumps(state), encoding="utf-8")


def load_totals(folder: str, totals: WindowedTotals, accelerator: Accelerator) -> None:
    """Reads what `save_totals` wrote; a checkpoint without it starts the counts at 0."""
    path = Path(folder, _FILE)
    if path.is_file():
        state = json.loads(path.read_text(encoding="utf-8"))
        totals.restore(Totals(*state["run"]), Totals(*state["window"]), accelerator)
