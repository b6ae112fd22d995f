"""`enable_jit_checkpoint`: what SIGTERM leaves behind is a checkpoint like any other.

The callback of transformers saves at once, also within an optimizer step: weights are then those
before the step, random numbers and totals those after its backward passes, and a log that is due
is never written. A run that goes on from there is another run. So the step is finished first, as
it would be anyway before that callback stops.
"""

import logging
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_jit_checkpoint import CheckpointManager, JITCheckpointCallback

logger = logging.getLogger(__name__)


class StepEndCheckpoint(TrainerCallback):
    """Saves and stops at the end of the optimizer step in which it was asked to.

    Args:
        trainer: Whose training it is.
        manager: Is told by SIGTERM.
    """

    def __init__(self, trainer: Trainer, manager: CheckpointManager) -> None:
        self.trainer = trainer
        self.manager = manager
        self._is_asked = False
        self._has_saved = False

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forgets what another training was asked to do."""
        self._is_asked = self._has_saved = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Has the Trainer save, once it has logged and evaluated what is due."""
        self._is_asked = self._is_asked or self._is_any_asked()
        if self._is_asked:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops after the checkpoint that was asked for."""
        if self._is_asked:
            self._has_saved = control.should_training_stop = True
            self.manager.is_checkpoint_requested = False
            if state.is_world_process_zero:
                logger.warning(
                    "SIGTERM stopped the run after step %s of %s, with a checkpoint. Go on with "
                    "resume_from_checkpoint set to true.",
                    f"{state.global_step:,}",
                    f"{state.max_steps:,}",
                )

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Does without what is due at the end of an epoch, where it was only broken off."""
        if self._has_saved:
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Leaves SIGTERM to who had it before."""
        given = JITCheckpointCallback()
        given.jit_manager = self.manager
        given.on_train_end(*args, **kwargs)

    def _is_any_asked(self) -> bool:
        """Whether this process or another was: the signal does not reach all in the same step."""
        accelerator, is_own = self.trainer.accelerator, self.manager.is_checkpoint_requested
        if accelerator.num_processes == 1:
            return is_own
        found = accelerator.gather(torch.tensor([is_own], device=accelerator.device))
        return bool(found.any())


def save_between_steps(trainer: Trainer) -> None:
    """Puts `StepEndCheckpoint` in the place of the callback of transformers, where there is one."""
    given = trainer.pop_callback(JITCheckpointCallback)
    if isinstance(given, JITCheckpointCallback) and given.jit_manager is not None:
        trainer.add_callback(StepEndCheckpoint(trainer, given.jit_manager))
