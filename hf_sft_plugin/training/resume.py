"""Stopping and resuming: a resumed run is the run that was not stopped, to the last bit."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_sft_plugin.data.streaming import StreamPreparer
from hf_sft_plugin.training.checkpoint import (
    find_checkpoint,
    load_order,
    require_resumable,
    save_order,
)
from hf_sft_plugin.training.data_order import data_seed, describe_order, refuse_other_order
from hf_sft_plugin.training.jit_checkpoint import save_between_steps
from hf_sft_plugin.training.prompt_sampler import SeededLengthSampler
from hf_sft_plugin.training.trainer_base import TrainerBase

# Passes over a stream that are done, and optimizer steps of the one that is not.
_POSITION = "position"
# What became of the rows of a stream so far, the same on every process.
_NUM_EXAMPLES = "examples of a stream"


class ResumeMixin(TrainerBase):
    """Has a `Trainer` go on exactly where a checkpoint was written, or say why it cannot."""

    _order: dict[str, Any] | None = None
    _steps_per_epoch: int = 0
    _epoch: int = 0
    _first_step_of_epoch: int = 0
    _is_save_put_off: bool = False

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
        # What is logged at the end of an epoch has to be in the checkpoint of its last step: a run
        # that is resumed there begins with the next epoch.
        is_last = self.control.should_training_stop or self.control.should_epoch_stop
        is_last = is_last or self.state.epoch == self._epoch + 1
        puts_off = self.control.should_save and is_last and not self._is_save_put_off
        self._is_save_put_off = puts_off
        if puts_off:
            self.control.should_save = False
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self.control.should_save |= puts_off

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.args.should_save:
            # It is written last, so without it what is about to be overwritten is not complete.
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            path = Path(str(self._get_output_dir(trial=trial)), folder, TRAINER_STATE_NAME)
            path.unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        position = self._epoch, self.state.global_step - self._first_step_of_epoch
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


def _set_epoch(loader: Any, epoch: int) -> None:
    """Reaches the samplers inside samplers that no one else does once batches are skipped."""
    part = loader
    while part is not None:
        inner = getattr(part, "batch_sampler", None)
        part = getattr(part, "sampler", None) if inner is None else inner
        if part is not None and hasattr(part, "set_epoch"):
            part.set_epoch(epoch)
