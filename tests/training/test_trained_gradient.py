"""The gradient of a trained model is as close to float64 as plain training's, or closer.

Random weights have small gradients of one size; in trained ones a few large features are what
rounds.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)

from hf_sft_plugin import (
    DataCollatorForPromptResponse,
    MaskedSFTConfig,
    MaskedSFTTrainer,
    prepare_dataset,
)

pytestmark = pytest.mark.trained

QUESTIONS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "Name a fruit.": "Apple",
}
STEP = {
    "per_device_train_batch_size": 2,
    "prompt_format": "chat",
    # Leaves the model as it is.
    "optim": "sgd",
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "max_steps": 1,
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
    # Nothing has to be measured first.
    "max_tokens_per_microbatch": 4096,
}
# A tenth more than plain training's error is within chance.
SLACK = 1.1


class Gradient(TrainerCallback):
    """Keeps the gradient of the optimizer step."""

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.value = flat_gradient(kwargs["model"])


def flat_gradient(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


class Case:
    """A trained model with all weights or an adapter, and its gradient in float64."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        has_adapter: bool,
        widen: Callable[[Any], None],
        output: Path,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        if has_adapter:
            lora = LoraConfig(r=16, target_modules="all-linear")
            torch.manual_seed(0)
            self.model = get_peft_model(self.model, lora)
            for name, weight in self.model.named_parameters():
                if "lora_B" in name:
                    # Zeros, as it comes, would leave the other factor without a gradient.
                    torch.nn.init.normal_(weight, std=0.01)
        self.rows = Dataset.from_list(
            [{"prompt": prompt, "response": response} for prompt, response in QUESTIONS.items()]
        )
        self.prepared, _ = prepare_dataset(self.rows, self.tokenizer, prompt_format="chat")
        self.output = str(output)
        self.truth = self._in_float64(widen)

    def _in_float64(self, widen: Callable[[Any], None]) -> Tensor:
        """Row by row, on full logits."""
        model = copy.deepcopy(self.model).double()
        widen(model)
        num_tokens = sum(sum(row["response_mask"]) for row in self.prepared)
        for row in self.prepared:
            ids, mask = torch.tensor(row["input_ids"]), torch.tensor(row["response_mask"])
            logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1]
            log_probs = logits.log_softmax(-1).gather(-1, ids[1:].unsqueeze(-1))[:, 0]
            (-(log_probs * mask[1:]).sum() / num_tokens).backward()
        return flat_gradient(model)

    def error(self, trainer_class: Any, **arguments: Any) -> float:
        """How far the gradient of a training is from float64."""
        gradient = Gradient()
        # A copy, because Accelerate prepares a model once, for one precision.
        model = copy.deepcopy(self.model)
        trainer_class(model=model, callbacks=[gradient], **arguments).train()
        difference = torch.linalg.vector_norm(gradient.value - self.truth)
        return float(difference / torch.linalg.vector_norm(self.truth))

    def of_plain(self, **settings: Any) -> float:
        """With the plain `Trainer`."""
        args = MaskedSFTConfig(self.output, **STEP, **settings)
        collator = DataCollatorForPromptResponse(self.tokenizer, return_response_mask=False)
        data = {"data_collator": collator, "train_dataset": self.prepared}
        return self.error(Trainer, args=args, **data)

    def of_ours(self, **settings: Any) -> float:
        """With ours."""
        args = MaskedSFTConfig(self.output, **STEP, **settings)
        data = {"processing_class": self.tokenizer, "train_dataset": self.rows}
        return self.error(MaskedSFTTrainer, args=args, **data)


@pytest.fixture(scope="module", params=["all weights", "LoRA"])
def case(
    request: pytest.FixtureRequest,
    load_trained_model: Callable[..., Any],
    trained_tokenizer: PreTrainedTokenizerBase,
    widen: Callable[[Any], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    output = tmp_path_factory.mktemp("run")
    has_adapter = request.param == "LoRA"
    return Case(load_trained_model(), trained_tokenizer, has_adapter, widen, output)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_it_errs_no_more_than_the_plain_trainers(precision: str, case: Case) -> None:
    settings = {"bf16": precision == "bfloat16"}
    allowed = SLACK * case.of_plain(**settings)
    found = {
        "without padding": case.of_ours(**settings),
        "packed": case.of_ours(packing=True, max_length=256, **settings),
    }
    print(f"{allowed / SLACK:.1e} is the plain Trainer's, {found}")
    assert all(error <= allowed for error in found.values()), (found, allowed)
