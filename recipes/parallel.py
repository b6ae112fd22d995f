"""What a recipe does as one of several processes: its share of the cores, its output, its end."""

import gc
import os

import torch

# DistributedDataParallel imports this. Were it first imported when there is a process group, the
# defaults of its functions would hold that group for good, and with it the threads of gloo.
import torch.distributed.nn.functional
from accelerate import PartialState
from cpu_threads import count_usable_cores
from datasets import disable_progress_bars

from hf_sft_plugin import MaskedSFTConfig


def use_all_cores(args: MaskedSFTConfig, num_threads: int | None) -> None:
    """Lets a machine without an accelerator use its cores."""
    if args.device.type == "cpu":
        available = count_usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        torch.set_num_threads(num_threads or max(available, 1))


def show_progress_once(args: MaskedSFTConfig) -> None:
    """Leaves the progress of preparing the data to the first process of a machine."""
    if args.disable_tqdm or args.local_process_index > 0:
        disable_progress_bars()


def end_together() -> None:
    """Waits until every process has come here, and ends their process group.

    A launcher ends all processes when one has gone wrong, be it at its very end, so nobody leaves
    before everything is on disk. Then the threads of gloo are stopped: one that lets go of a tensor
    while the interpreter ends aborts the process ("terminate called without an active exception").
    They stop with the last reference to the group. A wrapped model holds one, so the caller may
    hold no trainer any more. Not for the end after an error, to which the others would not come.
    """
    state = PartialState()
    state.wait_for_everyone()
    gc.collect()
    state.destroy_process_group()
