"""What a checkpoint has to hold beyond the Trainer's own.

These are the totals behind the logged means, and the budget of micro-batches: memory may be another
when a run is resumed, but its numbers shall be the same to the last bit.
"""

import json
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator

from hf_sft_plugin.training.metrics import Totals, WindowedTotals
from hf_sft_plugin.training.microbatches import TokenBudget

_FILE = "response_totals.json"
_BUDGET_FILE = "microbatch_budget.json"


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


def save_budget(folder: str, budget: TokenBudget | None, accelerator: Accelerator) -> None:
    """Writes the budget that was made from memory, if there is one; all processes have the same."""
    if budget is not None and accelerator.is_main_process:
        Path(folder, _BUDGET_FILE).write_text(json.dumps(asdict(budget)), encoding="utf-8")


def load_budget(folder: str) -> TokenBudget | None:
    """Reads what `save_budget` wrote; None makes a budget at the first step."""
    path = Path(folder, _BUDGET_FILE)
    if not path.is_file():
        return None
    return TokenBudget(**json.loads(path.read_text(encoding="utf-8")))
