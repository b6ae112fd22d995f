"""Settings of a `Trainer` under which the promised numbers could not hold."""

import os
from collections.abc import Sequence

from torch import nn
from transformers import Trainer

from hf_sft_plugin.models.adapters import find_checkpointing_problem


def refuse_inexact_settings(trainer: Trainer) -> None:
    """Refuses settings under which the promised numbers could not hold.

    Raises:
        ValueError: If there is one; says what to use instead.
    """
    num_started = int(os.environ.get("WORLD_SIZE", "1"))
    # The second is the name before transformers 5.24.
    names = ("activation_checkpointing", "gradient_checkpointing")
    is_checkpointed = any(getattr(trainer.args, name, None) for name in names)
    adapter_problem = find_checkpointing_problem(trainer.model) if is_checkpointed else None
    conflicts: Sequence[tuple[bool, str]] = (
        (adapter_problem is not None, str(adapter_problem)),
        (
            trainer.args.n_gpu > 1,
            "Several GPUs are visible to one process, which DataParallel would split each batch "
            f"over. Start one process per GPU: accelerate launch --num_processes "
            f"{trainer.args.n_gpu} your_script.py",
        ),
        (
            isinstance(trainer.model, nn.DataParallel),
            "The model comes in a DataParallel, which splits each batch over the GPUs of one "
            "process. Hand over the model itself, and start one process per GPU: torchrun "
            "--nproc_per_node gpu your_script.py",
        ),
        (
            num_started > trainer.accelerator.num_processes,
            f"{num_started} processes were started, but Accelerate sees one in each, so every one "
            "of them would train on all rows by itself. On a CPU, set use_cpu to true.",
        ),
        (
            getattr(trainer.accelerator.state, "fsdp_plugin", None) is not None
            and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1,
            "FSDP1 cannot be run on a CPU, so nothing here has been proven on it. Use FSDP2: "
            "fsdp_version: 2, as in recipes/accelerate/fsdp2.yaml.",
        ),
        (
            trainer.compute_loss_func is not None,
            "compute_loss_func was given, but the masked loss would never call it. Leave it out, "
            "or use a Trainer without MaskedLossMixin.",
        ),
        (
            trainer.get_cp_size() * trainer.get_sp_size() > 1,
            "Context or sequence parallelism splits rows between processes, and the label of a "
            "split's last token would be lost. Use data or fully sharded parallelism.",
        ),
        (
            trainer.get_tp_size() > 1,
            "Under tensor parallelism several processes see the same rows, which would be counted "
            "several times. Use data or fully sharded parallelism.",
        ),
    )
    for is_conflict, message in conflicts:
        if is_conflict:
            raise ValueError(message)
