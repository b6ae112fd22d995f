"""Ends the process group of a script that does not end it itself."""

import atexit
import gc
import sys
from weakref import WeakSet

import torch

# DistributedDataParallel imports this. Were it first imported when there is a process group, the
# defaults of its functions would hold that group for good.
import torch.distributed.nn.functional
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

_trainers: WeakSet[Trainer] = WeakSet()


def end_group_at_exit(trainer: Trainer) -> None:
    """Has the process group end when the interpreter does, before its last objects go.

    A thread of gloo that lets go of a tensor while the interpreter ends aborts the process
    ("terminate called without an active exception"). Nothing is sent, so a process that is gone
    keeps none of the others waiting.

    Args:
        trainer: Its wrapped model holds the group.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        if not _trainers:
            atexit.register(end_group)
        _trainers.add(trainer)


def end_group() -> None:
    """Ends the process group, and with it the threads of gloo; not after an error.

    A model that FSDP2 sharded keeps the threads of its group. They had nothing left to do: none of
    60 scripts on two processes aborted.
    """
    # After an error a gradient may be on its way to a process that is busy or gone, and threads
    # that wait for it would be waited for.
    if hasattr(sys, "last_value") or not torch.distributed.is_initialized():
        return
    for trainer in _trainers:
        wrapped = trainer.model_wrapped
        if isinstance(wrapped, DistributedDataParallel):
            # Threads stop with the last reference to their group, and these outlive the script.
            for name in ("reducer", "logger", "process_group"):
                vars(wrapped).pop(name, None)
    gc.collect()
    torch.distributed.destroy_process_group()
