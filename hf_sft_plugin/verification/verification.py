"""The proof on a run of one's own: its first optimizer step, checked before it is taken.

Everything runs as training will run it: the model as Accelerate prepared it, in its precision, on
the first real rows, by the trainer's own methods. Afterwards all is as it was.
"""

import time
from collections.abc import Sequence
from typing import Any

from accelerate.utils import DistributedType
from rich.console import Console
from transformers import Trainer

from hf_sft_plugin.verification.batch_checks import BATCH_CHECKS, check_batches
from hf_sft_plugin.verification.checks import (
    VerificationCheck,
    checks_table,
    describe_failures,
    not_run,
    run_checks,
    worst_of_processes,
)
from hf_sft_plugin.verification.first_step import FirstStep
from hf_sft_plugin.verification.forward_checks import (
    DOCUMENT_CHECKS,
    HEAD_CHECKS,
    check_documents,
    check_head,
)
from hf_sft_plugin.verification.gradient_checks import GRADIENT_CHECKS, check_gradients
from hf_sft_plugin.verification.run_state import training_undone
from hf_sft_plugin.verification.verification_mixin import VerificationMixin

_ALL_CHECKS = (*BATCH_CHECKS, *DOCUMENT_CHECKS, *HEAD_CHECKS, *GRADIENT_CHECKS)


class VerificationError(ValueError):
    """A run was stopped before its first step, because its numbers would not be what they say.

    Attributes:
        checks: All checks, those that passed among them.
    """

    def __init__(self, checks: list[VerificationCheck]) -> None:
        super().__init__(f"Nothing was trained, because\n{describe_failures(checks)}")
        self.checks = checks


class _VerificationEnded(BaseException):
    """Leaves a training that was begun for its verification; no `except Exception` shall see it."""

    def __init__(self, checks: list[VerificationCheck]) -> None:
        super().__init__()
        self.checks = checks


def verify_step(trainer: VerificationMixin, batches: Sequence[Any], num_items: Any) -> None:
    """Verifies the step that these batches are for.

    Args:
        trainer: Is about to take it.
        batches: As `get_batch_samples` returns them.
        num_items: The same.

    Raises:
        VerificationError: If a figure is above its bound.
    """
    checks = _verify(FirstStep(trainer, batches, num_items))
    if trainer._ends_after_verification:
        raise _VerificationEnded(checks)
    _stop_on_failure(checks)


def verify_training(trainer: Trainer, *, stop_on_failure: bool = True) -> list[VerificationCheck]:
    """Begins the training of a trainer, verifies its first optimizer step, and undoes everything.

    Prints a table of figures with their bounds. What is checked: labels and stop tokens of the
    first batches; that no document moves the predictions of another, nor does padding; the fused
    head against float64; the gradient of the step in two splits; that every trained tensor has a
    gradient, and an update that its dtype can hold. All of it runs as training will run it, with
    dropout left out, in a few times what the step costs. The trained weights are held once more
    meanwhile, in the memory of the host. Callbacks are not called.

    Args:
        trainer: A `Trainer` with `MaskedLossMixin`, before its `train` is called. All processes
            call this. Under FSDP and DeepSpeed, which take the model apart for good, nothing is
            run: set `verify_before_training` to True on the trainer instead.
        stop_on_failure: False only reports what fails.

    Returns:
        All checks.

    Raises:
        VerificationError: If a figure is above its bound; says what it means and what to do.
        ValueError: If the trainer is without the mixin, or cannot begin a training.
    """
    if not isinstance(trainer, VerificationMixin):
        raise ValueError(
            f"A {type(trainer).__name__} has no masked loss that could be verified. Put "
            "MaskedLossMixin in front of its class: class MyTrainer(MaskedLossMixin, Trainer)."
        )
    engine = trainer.accelerator.distributed_type
    if engine in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        reason = f"{engine.value} takes the model apart for good; set verify_before_training"
        checks = [not_run(name, reason) for name in _ALL_CHECKS]
        _print(trainer, checks, "Nothing was run.")
        return checks
    checks = _verify_and_leave(trainer)
    if stop_on_failure:
        _stop_on_failure(checks)
    return checks


def _verify_and_leave(trainer: VerificationMixin) -> list[VerificationCheck]:
    with training_undone(trainer):
        trainer.verify_before_training = trainer._ends_after_verification = True
        try:
            trainer.train()
        except _VerificationEnded as ended:
            return ended.checks
    raise AssertionError("a training that takes no step raises an error of its own")


def _verify(step: FirstStep) -> list[VerificationCheck]:
    start = time.perf_counter()
    with step.undone():
        found = [
            *run_checks(BATCH_CHECKS, lambda: check_batches(step)),
            *run_checks(DOCUMENT_CHECKS, lambda: check_documents(step)),
            *run_checks(HEAD_CHECKS, lambda: check_head(step)),
            *run_checks(GRADIENT_CHECKS, lambda: check_gradients(step)),
        ]
    checks = worst_of_processes(found)
    seconds = time.perf_counter() - start
    caption = f"{step.num_forward} forward passes and {step.num_backward} with backward"
    caption += f" in {_in_seconds(seconds)}"
    if step.seconds is not None:
        caption += f"; those of the step itself, {len(step.microbatches)}, took "
        caption += _in_seconds(step.seconds)
    _print(step.trainer, checks, f"{caption}.")
    return checks


def _in_seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:,.0f} s"


def _print(trainer: Trainer, checks: Sequence[VerificationCheck], caption: str) -> None:
    if trainer.is_world_process_zero():
        Console(markup=False, emoji=False).print(checks_table(checks, caption))


def _stop_on_failure(checks: list[VerificationCheck]) -> None:
    if any(check.has_failed for check in checks):
        raise VerificationError(checks)
