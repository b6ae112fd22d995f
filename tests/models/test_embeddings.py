"""NEFTune's noise has the size of its document, however documents are put together."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.integrations.neftune import activate_neftune

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    MaskedLossMixin,
    MaskedSFTTrainer,
    verify_training,
)
from hf_sft_plugin.models.embeddings import DocumentNoise

ALPHA = 5.0
# Of 16 rows with no token in common, four are as long as each of these.
LENGTHS = (4, 9, 16, 36) * 4
STARTS = [3 + sum(LENGTHS[:number]) for number in range(len(LENGTHS) + 1)]
SIZE = 32
Make = Callable[..., Any]


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of a user."""


def make_rows() -> list[dict[str, Any]]:
    return [
        {"input_ids": list(range(start, end)), "response_mask": [0, 0, *[1] * (end - start - 2)]}
        for start, end in pairwise(STARTS)
    ]


class NoiseSeen(TrainerCallback):
    """Keeps how large the noise of every token was, by the length of its row."""

    def __init__(self, model: Any) -> None:
        self.in_training: dict[int, list[Tensor]] = {}
        self.in_evaluation: list[Tensor] = []
        self.num_read: list[int] = []
        self.num_steps, self.is_in_step = 0, False
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.embeddings = base.get_input_embeddings()
        self.embeddings.register_forward_pre_hook(self.keep_ids)
        base.model.layers[0].register_forward_pre_hook(self.look)

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.is_in_step = True

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.num_steps, self.is_in_step = self.num_steps + 1, False

    def keep_ids(self, _: nn.Module, args: Any) -> None:
        (self.ids,) = args

    def look(self, _: nn.Module, args: Any) -> None:
        noise = (args[0] - self.embeddings.weight[self.ids]).detach().abs().double()
        if self.is_in_step:
            self.num_read.append(self.ids.numel())
            for length, (start, end) in zip(LENGTHS, pairwise(STARTS), strict=True):
                is_own = (self.ids >= start) & (self.ids < end)
                self.in_training.setdefault(length, []).append(noise[is_own].flatten())
        elif self.num_steps:
            self.in_evaluation.append(noise)

    def largest(self, length: int) -> float:
        return float(torch.cat(self.in_training[length]).max())


@pytest.fixture
def train(model_factory: Make, tokenizer: Any, make_config: Make) -> Callable[..., NoiseSeen]:
    """Trains on all rows, and says what noise they had; weights stay as they are."""

    def run(model: Any = None, peft_config: Any = None, **settings: Any) -> NoiseSeen:
        trainer = MaskedSFTTrainer(
            model or model_factory(),
            make_config(
                **{
                    "neftune_noise_alpha": ALPHA,
                    "learning_rate": 0.0,
                    "max_steps": 1,
                    "per_device_train_batch_size": 16,
                    **settings,
                }
            ),
            train_dataset=Dataset.from_list(make_rows()),
            eval_dataset=Dataset.from_list(make_rows()),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        seen = NoiseSeen(trainer.model)
        trainer.add_callback(seen)
        trainer.train()
        return seen

    return run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
        {"max_tokens_per_microbatch": 64},
        {"max_tokens_per_microbatch": None, "per_device_train_batch_size": 1, "max_steps": 16},
        {"padding_free": "off"},
        {"padding_free": "off", "max_tokens_per_microbatch": 64},
        {"packing": True, "max_length": 65, "max_steps": 1},
        {"pad_to_multiple_of": 128},
        {"gradient_checkpointing": True, "bf16": True},
        {"num_train_epochs": 1.0, "max_steps": -1, "per_device_train_batch_size": 5},
    ],
    ids=str,
)
def test_its_size_is_that_of_the_document_however_rows_are_split(
    settings: dict[str, Any], train: Callable[..., NoiseSeen]
) -> None:
    """The largest of 512 or more uniform values is 0.98 of the bound, but for 1 in 30,000."""
    seen = train(**settings)
    for length in set(LENGTHS):
        bound = ALPHA / (length * SIZE) ** 0.5
        assert 0.98 * bound < seen.largest(length) <= bound * (1 + 1e-6)


def test_it_comes_with_an_adapter_too(train: Callable[..., NoiseSeen]) -> None:
    seen = train(peft_config=LoraConfig(target_modules=["q_proj"]))
    for length in set(LENGTHS):
        bound = ALPHA / (length * SIZE) ** 0.5
        assert 0.98 * bound < seen.largest(length) <= bound * (1 + 1e-6)


def test_rows_that_begin_alike_have_noise_of_their_own(
    model_factory: Make, tokenizer: Any, make_config: Make
) -> None:
    prompt = list(range(3, 23))
    rows = [
        {"input_ids": [*prompt, *ending], "response_mask": [0] * 20 + [1] * len(ending)}
        for ending in ([30, 31], list(range(40, 70)))
    ]
    num_read: dict[float | None, list[int]] = {}
    for alpha in (None, ALPHA):
        trainer = MaskedSFTTrainer(
            model_factory(),
            make_config(max_steps=1, neftune_noise_alpha=alpha),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
        seen = NoiseSeen(trainer.model)
        trainer.add_callback(seen)
        trainer.train()
        num_read[alpha] = seen.num_read
    assert num_read == {None: [20 + 2 + 30], ALPHA: [22 + 50]}


def test_evaluation_has_none(train: Callable[..., NoiseSeen]) -> None:
    seen = train(max_steps=2, eval_strategy="steps", eval_steps=1)
    assert len(seen.in_evaluation) == 2 * len(LENGTHS) // 2
    assert not any(noise.any() for noise in seen.in_evaluation)


@pytest.mark.parametrize("alpha", [5, 5.0])
@pytest.mark.parametrize("padding_free", ["auto", "off"])
def test_a_verified_run_is_the_one_that_was_not(
    alpha: float, padding_free: str, model_factory: Make, tokenizer: Any, make_config: Make
) -> None:
    def run(is_verified: bool) -> list[Tensor]:
        settings = {"neftune_noise_alpha": alpha, "padding_free": padding_free}
        trainer = MaskedSFTTrainer(
            model_factory(),
            make_config(**settings, per_device_train_batch_size=4, gradient_accumulation_steps=2),
            train_dataset=Dataset.from_list(make_rows()),
            processing_class=tokenizer,
        )
        if is_verified:
            assert not any(check.has_failed for check in verify_training(trainer))
        trainer.train()
        return [p.detach() for p in trainer.model.parameters()]

    pairs = zip(run(is_verified=True), run(is_verified=False), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_a_run_goes_on_with_the_same_noise(
    model_factory: Make, tokenizer: Any, make_config: Make
) -> None:
    def run(**settings: Any) -> list[Tensor]:
        checkpoint = settings.pop("checkpoint", None)
        trainer = MaskedSFTTrainer(
            model_factory(),
            make_config(
                neftune_noise_alpha=ALPHA, max_steps=4, save_strategy="steps", save_steps=2
            ),
            train_dataset=Dataset.from_list(make_rows()),
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return [p.detach() for p in trainer.model.parameters()]

    whole = run()
    folder = f"{make_config().output_dir}/checkpoint-2"
    assert all(torch.equal(*pair) for pair in zip(run(checkpoint=folder), whole, strict=True))


def test_a_run_that_breaks_off_leaves_none_behind(
    model_factory: Make, tokenizer: Any, make_config: Make
) -> None:
    class BrokenTrainer(MaskedSFTTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            raise KeyError

    model = model_factory()
    trainer = BrokenTrainer(
        model,
        make_config(neftune_noise_alpha=ALPHA),
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=tokenizer,
    )
    with pytest.raises(KeyError):
        trainer.train()
    embeddings, ids = model.get_input_embeddings(), torch.tensor([[3, 4]])
    assert torch.equal(embeddings.train()(ids), embeddings.weight[ids])


def test_a_trainer_of_a_user_has_it_too(
    model_factory: Make, tokenizer: Any, make_config: Make
) -> None:
    trainer = OwnTrainer(
        model_factory(),
        make_config(
            neftune_noise_alpha=ALPHA,
            max_steps=1,
            learning_rate=0.0,
            per_device_train_batch_size=16,
        ),
        data_collator=DataCollatorForPromptResponse(tokenizer),
        train_dataset=Dataset.from_list(make_rows()),
    )
    seen = NoiseSeen(trainer.model)
    trainer.add_callback(seen)
    trainer.train()
    for length in set(LENGTHS):
        bound = ALPHA / (length * SIZE) ** 0.5
        assert 0.98 * bound < seen.largest(length) <= bound * (1 + 1e-6)


def test_of_a_single_row_it_is_that_of_transformers(model_factory: Make) -> None:
    """The same random numbers, in the same place."""
    embeddings = model_factory().get_input_embeddings().train()
    ids = torch.arange(3, 40).unsqueeze(0)
    handle = activate_neftune(_Model(embeddings), ALPHA)
    torch.manual_seed(0)
    theirs = embeddings(ids)
    handle.remove()
    embeddings.register_forward_hook(DocumentNoise())
    torch.manual_seed(0)
    torch.testing.assert_close(embeddings(ids), theirs, rtol=0, atol=1e-6)


class _Model(nn.Module):
    def __init__(self, embeddings: nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings
