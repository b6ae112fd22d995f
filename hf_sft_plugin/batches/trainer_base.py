"""What the parts of `MaskedLossMixin` stand on."""

from typing import TYPE_CHECKING

from transformers import Trainer

if TYPE_CHECKING:
    # A mixin stands in front of a Trainer, which type checkers cannot know from its bases.
    TrainerBase = Trainer
else:
    TrainerBase = object
