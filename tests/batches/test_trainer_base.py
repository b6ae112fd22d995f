"""The mixin goes in front of any `Trainer`, and so is none itself."""

from transformers import Trainer

from hf_sft_plugin import MaskedLossMixin
from hf_sft_plugin.batches.trainer_base import TrainerBase


def test_a_mixin_brings_no_trainer_of_its_own() -> None:
    assert TrainerBase is object
    assert not issubclass(MaskedLossMixin, Trainer)
