"""A compiled model trains as it does otherwise, and is compiled once for batches of all sizes."""

import logging
from collections import UserList
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend, TorchDynamoPlugin
from datasets import Dataset
from torch._dynamo.utils import counters
from transformers import Trainer, TrainerCallback

from hf_sft_plugin import DataCollatorForPromptResponse, MaskedLossMixin, MaskedSFTTrainer
from hf_sft_plugin.batches.shared_prompts import OpaqueList
from hf_sft_plugin.models.model_interface import compile_for_all_sizes, is_compiled

Make = Callable[..., Any]


class Rows(UserList[Any]):
    """Rows that the trainer leaves to the collator."""


class OwnTrainer(MaskedLossMixin, Trainer):
    """A Trainer of one's own."""


class Watch(TrainerCallback):
    """Keeps, after each step, the gradient and what was compiled so far."""

    def __init__(self) -> None:
        self.num_frames: list[int] = []
        self.gradients: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        grads = [p.grad.flatten() for p in kwargs["model"].parameters()]
        self.gradients.append(torch.cat(grads))

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.num_frames.append(counters["frames"]["total"])


def make_rows() -> list[dict[str, Any]]:
    """Rows of 5 to 47 tokens, of which two in three begin with the same 20."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, 300, (20,), generator=generator).tolist()
    rows = []
    for number in range(36):
        ids = torch.randint(3, 300, (5 + (number * 7) % 23,), generator=generator).tolist()
        ids = [*(prompt if number % 3 else []), *ids]
        rows.append({"input_ids": ids, "response_mask": [0, 0] + [1] * (len(ids) - 2)})
    return rows


@pytest.fixture
def fresh_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Accelerate keeps the settings of the compiler for as long as the process lives."""
    # What the compiler writes down would all be captured, which takes a third of the time.
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    for name in ("BACKEND", "MODE"):
        # The settings leave them in the environment, for Accelerate.
        monkeypatch.setenv(f"ACCELERATE_DYNAMO_{name}", "")
        monkeypatch.delenv(f"ACCELERATE_DYNAMO_{name}")
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    counters.clear()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()


@pytest.fixture
def train(model_factory: Make, tokenizer: Any, make_config: Make) -> Make:
    def run(shared_prompts: str = "auto", **settings: Any) -> tuple[OwnTrainer, Watch]:
        watch = Watch()
        trainer = OwnTrainer(
            model_factory("llama", num_hidden_layers=1).double(),
            make_config(max_steps=4, per_device_train_batch_size=6, max_grad_norm=0.0, **settings),
            data_collator=DataCollatorForPromptResponse(tokenizer),
            train_dataset=Rows(make_rows()),
            callbacks=[watch],
        )
        # Micro-batches of one row and of several.
        trainer.max_tokens_per_microbatch, trainer.shared_prompts = 60, shared_prompts
        trainer.train()
        return trainer, watch

    return run


@pytest.mark.usefixtures("fresh_state")
def test_losses_and_gradients_are_those_of_the_model_as_it_is_and_nothing_is_compiled_twice(
    train: Make,
) -> None:
    plain, expected = train()
    assert expected.num_frames == [0] * 4
    AcceleratorState._reset_state(reset_partial_state=True)
    compiled, found = train(torch_compile=True, torch_compile_backend="eager")
    assert compiled.attention_summary == plain.attention_summary
    assert "no padding, shared prompts once" in str(compiled.attention_summary)
    assert found.num_frames[0] > 10
    # Of the shapes of the first step, some are compiled with sharing and some without.
    assert found.num_frames[-1] == found.num_frames[1]
    for log, wanted in zip(compiled.state.log_history, plain.state.log_history, strict=True):
        for key in log.keys() & {"loss", "token_entropy", "token_accuracy", "num_tokens"}:
            assert log[key] == pytest.approx(wanted[key], rel=1e-12)
    for gradient, wanted in zip(found.gradients, expected.gradients, strict=True):
        assert (gradient - wanted).norm() < 1e-12 * wanted.norm()


@pytest.mark.usefixtures("fresh_state")
def test_the_summary_says_that_the_model_is_compiled(
    model: Any, tokenizer: Any, make_config: Make
) -> None:
    config = make_config(torch_compile=True, torch_compile_backend="eager")
    rows = Dataset.from_list(make_rows())
    trainer = MaskedSFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
    assert trainer.describe_speed()["compiled"] == "eager"


@pytest.mark.parametrize(
    ("plugin", "dynamic"),
    [
        (TorchDynamoPlugin(backend="eager"), True),
        (TorchDynamoPlugin(backend="eager", dynamic=False), False),
        (TorchDynamoPlugin(backend=DynamoBackend.NO), None),
    ],
)
@pytest.mark.usefixtures("fresh_state")
def test_what_the_user_chose_stays(plugin: TorchDynamoPlugin, dynamic: bool | None) -> None:
    accelerator = Accelerator(cpu=True, dynamo_plugin=plugin)
    compile_for_all_sizes(accelerator)
    assert accelerator.state.dynamo_plugin.dynamic is dynamic


@pytest.mark.usefixtures("fresh_state")
def test_the_compiler_does_not_look_into_an_opaque_list() -> None:
    lengths: list[int] = []

    @torch.compiler.disable
    def note(values: Any) -> None:
        lengths.append(sum(values))

    @torch.compile(backend="eager")
    def run(x: torch.Tensor, values: Any) -> torch.Tensor:
        note(values)
        return x + 1

    for make, more in ((OpaqueList, 0), (list, 1)):
        run(torch.ones(2), make([1, 2]))
        before = counters["frames"]["total"]
        run(torch.ones(2), make([1, 2, 3]))
        assert (counters["frames"]["total"] > before) == bool(more)
    assert lengths == [3, 6] * 2
    assert OpaqueList([4, 5, 6])[1:] == [5, 6]


@pytest.mark.usefixtures("fresh_state")
def test_batches_of_one_shape_are_compiled_once_for_that_shape(
    train: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many documents they have."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "false")
    settings = {"torch_compile": True, "torch_compile_backend": "eager"}
    trainer, found = train(shared_prompts="off", pad_to_multiple_of=60, **settings)
    assert trainer.accelerator.state.dynamo_plugin.dynamic is False
    assert found.num_frames[0] > 10
    assert found.num_frames == [found.num_frames[0]] * 4


def test_a_part_that_is_compiled_is_found() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    assert not is_compiled(model)
    model[1].compile(backend="eager")
    assert is_compiled(model)
    assert is_compiled(torch.nn.Sequential(torch.compile(torch.nn.Linear(2, 2), backend="eager")))
