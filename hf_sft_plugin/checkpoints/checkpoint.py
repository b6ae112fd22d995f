"""What a checkpoint has to hold beyond the Trainer's own, and whether it holds all of it.

These are the totals behind the logged means, the budget of micro-batches and whether gradient
checkpointing was switched on (memory may be another when a run is resumed, but its numbers shall be
the same to the last bit), and what decides on the rows of every step.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_sft_plugin.batches.microbatch_plan import TokenBudget
from hf_sft_plugin.loss.totals import Totals, WindowedTotals

logger = logging.getLogger(__name__)

_FILE = "response_totals.json"
_BUDGET_FILE = "microbatch_budget.json"
_SWITCH_FILE = "gradient_checkpointing.json"
_ORDER_FILE = "data_order.json"


def save_totals(folder: str, totals: WindowedTotals, accelerator: Accelerator) -> None:
    """Writes the totals of the run, and those of the open window for every process.

    Args:
        folder: The checkpoint.
        totals: Left as they are.
        accelerator: All processes call this; the main one writes.
    """
    windows = totals.windows(accelerator)
    if accelerator.is_main_process:
        open_windows = [window.to_list() for window in windows]
        state = {"run": totals.run.to_list(), "windows": open_windows}
        Path(folder, _FILE).write_text(json.dumps(state), encoding="utf-8")


def load_totals(folder: str, totals: WindowedTotals, accelerator: Accelerator) -> None:
    """Reads what `save_totals` wrote; a checkpoint without it starts the counts at 0."""
    path = Path(folder, _FILE)
    if path.is_file():
        state = json.loads(path.read_text(encoding="utf-8"))
        windows = [Totals(*window) for window in state["windows"]]
        totals.restore(Totals(*state["run"]), windows, accelerator)


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


def save_switch(folder: str, is_on: bool | None, accelerator: Accelerator) -> None:
    """Writes for every process whether gradient checkpointing was switched on.

    Args:
        folder: The checkpoint.
        is_on: None where it was not decided.
        accelerator: All processes call this; the main one writes.
    """
    found = gather_object([is_on])
    if accelerator.is_main_process:
        Path(folder, _SWITCH_FILE).write_text(json.dumps(found), encoding="utf-8")


def load_switch(folder: str, accelerator: Accelerator) -> bool | None:
    """Reads what `save_switch` wrote; None decides at the first step."""
    path = Path(folder, _SWITCH_FILE)
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    is_same = len(found) == accelerator.num_processes
    is_on: bool | None = found[accelerator.process_index] if is_same else any(found)
    return is_on


def save_order(folder: str, order: dict[str, Any], accelerator: Accelerator) -> None:
    """Writes what decides on the rows of every step, as `describe_order` says it."""
    if accelerator.is_main_process:
        Path(folder, _ORDER_FILE).write_text(json.dumps(order), encoding="utf-8")


def load_order(folder: str) -> dict[str, Any] | None:
    """Reads what `save_order` wrote; None where a checkpoint has nothing of the kind."""
    path = Path(folder, _ORDER_FILE)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def find_checkpoint(output_dir: str) -> str:
    """The last checkpoint in a folder that was written to its end.

    Raises:
        ValueError: If there is none.
    """
    paths = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = [path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in paths]
    folders = [
        str(Path(output_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}"))
        for step in sorted((step for step in steps if step.isdecimal()), key=int, reverse=True)
    ]
    for folder in folders:
        if is_complete(folder):
            return folder
        logger.warning("%s was not written to its end, and is passed over.", folder)
    found = f"holds {len(folders)}, none of them complete" if folders else "holds none"
    raise ValueError(
        f"resume_from_checkpoint is True, but the folder {output_dir!r} {found}. Leave it out to "
        "start anew, or set output_dir to the folder of the run to go on with."
    )


def is_complete(folder: str) -> bool:
    """Whether a checkpoint was written to its end: the state of the run comes last."""
    path = Path(folder, TRAINER_STATE_NAME)
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def require_resumable(folder: str) -> None:
    """Refuses what a run cannot go on from.

    Raises:
        ValueError: If the checkpoint is incomplete, or holds the model alone.
    """
    if not is_complete(folder):
        raise ValueError(
            f"{folder!r} is no complete checkpoint: it has no readable {TRAINER_STATE_NAME}, which "
            "is written last. It may have been cut short. Choose an earlier one, or set "
            "resume_from_checkpoint to True for the last that is complete."
        )
    if not any(Path(folder).glob("rng_state*.pth")):
        raise ValueError(
            f"{folder!r} was saved with save_only_model, so optimizer, schedule and random numbers "
            "are not in it, and the run cannot go on as if it had not stopped. Start a new run "
            "with this folder as its model, or resume from another checkpoint."
        )
