"""Settings of a `Trainer` under which the promised numbers could not hold."""

from collections.abc import Sequence

from transformers import Trainer

from hf_sft_plugin.training.adapters import find_checkpointing_problem


def refuse_inexact_settings(trainer: Trainer) -> None:
    """Refuses settings under which the promised numbers could not hold.

    Raises:
        ValueError: If there is one; says what to use instead.
    """
    is_checkpointed = bool(trainer.args.gradient_checkpointing)
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
