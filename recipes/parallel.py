"""What a recipe does as one of several processes: its share of the cores, and its output."""

import os

import torch
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
