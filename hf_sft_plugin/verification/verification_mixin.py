"""The switch that has a `Trainer` verify its first optimizer step."""

import importlib
from collections.abc import Sequence
from typing import Any

from hf_sft_plugin.batches.trainer_base import TrainerBase


class VerificationMixin(TrainerBase):
    """Lets a `Trainer` verify its first optimizer step before it takes it.

    Attributes:
        verify_before_training: See `MaskedSFTConfig`.
    """

    verify_before_training: bool = False
    _ends_after_verification: bool = False

    def verify_first_step(self, batches: Sequence[Any], num_items: Any) -> None:
        """Verifies the step that these batches are for, where it is the first of a run.

        Args:
            batches: As `get_batch_samples` returns them.
            num_items: The same.

        Raises:
            VerificationError: If a figure is above its bound.
        """
        if not self.verify_before_training or not batches:
            return
        if self.state.global_step != self._initial_global_step:
            return
        # Imported here, because most runs do without.
        verification = importlib.import_module("hf_sft_plugin.verification.verification")
        verification.verify_step(self, batches, num_items)
