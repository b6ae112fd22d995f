"""Stopping and resuming: a resumed run is the run that was not stopped, to the last bit."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_sft_plugin.batches.data_loaders import SeededLengthSampler, data_seed
from hf_sft_plugin.batches.trainer_base import TrainerBase
from hf_sft_plugin.checkpoints.checkpoint import (
    find_checkpoint,
    load_order,
    require_resumable,
    save_order,
)
from hf_sft_plugin.checkpoints.data_order import describe_order, refuse_other_order
from hf_sft_plugin.checkpoints.jit_checkpoint import save_between_steps
from hf_sft_plugin.preparation.streaming import StreamPreparer

logger = logging.getLogger(__name__)

# A tensor where the optimizer is compiled or captured.
Rate: TypeAlias = float | torch.Tensor

# Passes over a stream that are done, and optimizer steps of the one that is not.
_POSITION = "position"
# What became of the rows of a stream so far, the same on every process.
_NUM_EXAMPLES = "examples of a stream"


class _SavePutOffError(Exception):
    """Leaves the end of a step before a checkpoint is written that has to wait.

    What the end of an epoch logs and finds belongs into the checkpoint of its last step: a run that
    is resumed there begins with the next epoch.
    """


class ResumeMixin(TrainerBase):
    """Has a `Trainer` go on exactly where a checkpoint was written, or say why it cannot."""

    _order: dict[str, Any] | None = None
    _steps_per_epoch: int = 0
    _epoch: int = 0
    _first_step_of_epoch: int = 0
    _last_step: int = 0
    _is_pass_over: bool = False
    _puts_off_saves: bool = False
    _is_save_due: bool = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        save_between_steps(self)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in `Trainer`; True takes the last checkpoint that was written to its end.

        Raises:
            ValueError: If there is no such checkpoint, or a run cannot go on from it.
        """
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = find_checkpoint(str(self.args.output_dir))
        if checkpoint is not None:
            require_resumable(str(checkpoint))
        return super().train(checkpoint, *args, **kwargs)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        *args: Any,
    ) -> tuple[int, int]:
        epoch, batches = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, *args
        )
        self._order, self._steps_per_epoch = None, num_update_steps_per_epoch
        order = None if resume_from_checkpoint is None else load_order(resume_from_checkpoint)
        if order is not None and not self.args.ignore_data_skip:
            passes, steps = order.pop(_POSITION)
            num_examples = order.pop(_NUM_EXAMPLES, [])
            rows_per_batch = self._train_batch_size * self.args.world_size
            refuse_other_order(
                str(resume_from_checkpoint), order, self._describe_order(), rows_per_batch
            )
            if num_train_epochs == sys.maxsize:
                # The Trainer takes every stream for one that outlasts the training.
                epoch, batches = passes, steps * self.args.gradient_accumulation_steps
                self._skip_stream(num_examples, batches)
        if self.state.global_step >= max_steps:
            # The Trainer would take one more step.
            epoch, batches = num_train_epochs, 0
        steps = batches // self.args.gradient_accumulation_steps
        self._first_step_of_epoch = self.state.global_step - steps
        return epoch, batches

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        loader, self._epoch = kwargs["train_dataloader"], kwargs["epoch"]
        if kwargs["epoch"] != kwargs["epochs_trained"]:
            self._first_step_of_epoch = self.state.global_step
        self._last_step, self._is_pass_over = self.state.global_step, False
        self._puts_off_saves = self._is_save_due = False
        _set_epoch(loader, self._epoch)
        super()._run_epoch(*args, **kwargs)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        base = getattr(loader, "base_dataloader", loader)
        if base.generator is None:
            # The seed of the workers is drawn from it whenever they start, which persistent ones
            # do more often in a resumed run; the random numbers of dropout must not depend on it.
            base.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if type(sampler) is not LengthGroupedSampler:
            return sampler
        return SeededLengthSampler(
            sampler.lengths, sampler.batch_size * self.args.world_size, data_seed(self.args)
        )

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        if skip_scheduler and self.state.global_step > 0:
            # The evaluation at the start has been logged before the run was stopped.
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # The Trainer calls this at the end of every step, and at the end of an epoch once more.
        is_end_of_epoch = self.state.global_step == self._last_step
        self._last_step = self.state.global_step
        self._puts_off_saves = not is_end_of_epoch and self._is_last_step()
        self.control.should_save |= self._is_save_due
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        except _SavePutOffError:
            self._is_save_due, self.control.should_save = True, False
        finally:
            self._puts_off_saves = False
        if is_end_of_epoch:
            self._is_save_due = False

    def see_batches(self, num_missing: int) -> None:
        """Notes whether the batches of a step are the last of a pass, which no stream says before.

        Args:
            num_missing: How many fewer came than were asked for.
        """
        self._is_pass_over = num_missing > 0 or self.accelerator.gradient_state.end_of_dataloader

    def _is_last_step(self) -> bool:
        """Whether a run that is resumed after this step does nothing more in this epoch."""
        is_end = self.state.epoch == self._epoch + 1 or self._is_pass_over
        is_broken_off = self.control.should_epoch_stop
        return is_end or is_broken_off or self.state.global_step >= self.state.max_steps

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        # A save that was put off is due, whatever another evaluation of the same weights says.
        return super()._determine_best_metric(*args, **kwargs) or self._is_save_due

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # A callback that calls this itself gets its checkpoint at once.
        if self._puts_off_saves and self.control.should_save:
            raise _SavePutOffError
        if self.args.should_save:
            # It is written last, so without it what is about to be overwritten is not complete.
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            path = Path(str(self._get_output_dir(trial=trial)), folder, TRAINER_STATE_NAME)
            path.unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        asked = list(getattr(self.lr_scheduler, "base_lrs", []))
        super()._load_optimizer_and_scheduler(checkpoint)
        # Other schedulers have a state of their own, or do not depend on the number of steps.
        if checkpoint is None or type(self.lr_scheduler) is not LambdaLR:
            return
        before, now = follow_schedule(self.lr_scheduler, asked)
        if before != now and self.accelerator.is_main_process:
            logger.warning(
                "%s: after step %s the learning rate is %.3g, as the settings of this run say; by "
                "those of the checkpoint it was %.3g. Another max_steps or num_train_epochs, "
                "warm-up, schedule or learning_rate makes such a difference.",
                checkpoint,
                f"{self.state.global_step:,}",
                max(now),
                max(before),
            )

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        position = self._epoch, self.state.global_step - self._first_step_of_epoch
        if self._is_pass_over:
            position = self._epoch + 1, 0
        order = {**self._describe_order(), _POSITION: position}
        if isinstance(preparer := getattr(self.train_dataset, "preparer", None), StreamPreparer):
            order[_NUM_EXAMPLES] = preparer.num_examples
        save_order(output_dir, order, self.accelerator)
        # Next comes the file that makes the checkpoint complete.
        self.accelerator.wait_for_everyone()

    def _skip_stream(self, num_examples: Sequence[int], num_batches: int) -> None:
        preparer = getattr(self.train_dataset, "preparer", None)
        if isinstance(preparer, StreamPreparer):
            # Every process reads the rows of all.
            num_rows = num_batches * self._train_batch_size * self.args.world_size
            preparer.skip(num_examples, num_rows)

    def _describe_order(self) -> dict[str, Any]:
        if self._order is None:
            self._order = describe_order(self, self._train_batch_size, self._steps_per_epoch)
        return self._order


def follow_schedule(scheduler: LambdaLR, base_lrs: Sequence[Rate]) -> tuple[list[Rate], list[Rate]]:
    """Has a scheduler go on as it was made, and not as that was from which it is restored.

    PyTorch restores the learning rates and works out new ones only after the next step. So a run
    that goes on for more steps than it began with would take one at the end of the old schedule,
    where the learning rate often is 0.

    Args:
        scheduler: Restored from a checkpoint, like its optimizer.
        base_lrs: What it multiplied before it was restored, for each group of parameters.

    Returns:
        The learning rates as they were restored, and as they are now.
    """
    before = list(scheduler.get_last_lr())
    pairs = zip(base_lrs, scheduler.lr_lambdas, strict=True)
    now: list[Rate] = [base * multiplier(scheduler.last_epoch) for base, multiplier in pairs]
    scheduler.load_state_dict({**scheduler.state_dict(), "base_lrs": base_lrs, "_last_lr": now})
    groups = scheduler.optimizer.param_groups
    for group, base, rate, old in zip(groups, base_lrs, now, before, strict=True):
        group["initial_lr"] = base
        if rate == old:
            continue
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    return before, now


def _set_epoch(loader: Any, epoch: int) -> None:
    """Reaches the samplers inside samplers that no one else does once batches are skipped."""
    part = loader
    while part is not None:
        inner = getattr(part, "batch_sampler", None)
        part = getattr(part, "sampler", None) if inner is None else inner
        if part is not None and hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
