"""The estimate is what a real step takes, and making it changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from memory_worker import measure_all
from peft import LoraConfig, get_peft_model
from processes import run_alone
from torch import Tensor, nn

from hf_sft_plugin.training.available_memory import held_memory
from hf_sft_plugin.training.memory import Growth, StepMemory, measure_step_memory

QWEN = {
    "model_type": "qwen3",
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "tie_word_embeddings": True,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 384,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "tie_word_embeddings": False,
}
# What is freed is given back, so that the process holds what is in use.
ONE = {"per_device_train_batch_size": 12, "keep_freed_memory": False}
# More than the budget, so that gradients are there while the second part runs.
TWO = {**ONE, "gradient_accumulation_steps": 3}
CASES = {
    "full": {"model": QWEN, "settings": ONE, "is_lora": False},
    "adapter, checkpointed": {
        "model": QWEN,
        "settings": {**ONE, "gradient_checkpointing": True},
        "is_lora": True,
    },
    # Of few layers the last, which runs at trained positions alone, would be a large share.
    "autocast": {
        "model": {**QWEN, "num_hidden_layers": 8},
        "settings": {**ONE, "bf16": True},
        "is_lora": False,
    },
    "large vocabulary, two micro-batches": {"model": LLAMA, "settings": TWO, "is_lora": False},
    "padded, full logits": {
        "model": QWEN,
        "settings": {**ONE, "padding_free": "off", "fused_head": "off"},
        "is_lora": False,
    },
}
LARGE = {**LLAMA, "hidden_size": 768, "intermediate_size": 3072}
# As they come, and what is freed is kept.
FEW = {"per_device_train_batch_size": 4}
WHOLE_CASES = {"full": {"model": LARGE, "settings": FEW, "is_lora": False}}
# An adapter in autocast is measured with what is decided for it, in `recipes/test_decisions.py`.
TRAINED_CASES: dict[str, dict[str, Any]] = {
    "adapter, bf16 weights, padded": {
        "settings": {**FEW, "padding_free": "off"},
        "is_lora": True,
        "dtype": "bfloat16",
    },
    "full, checkpointed": {"settings": {**FEW, "gradient_checkpointing": True}, "is_lora": False},
}
ONLY_LINUX = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak"
)


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    """Estimate and peak of each case."""
    return dict(zip(CASES, run_alone(measure_all, [*CASES.values()], True), strict=True))


@ONLY_LINUX
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_a_quarter_of_what_the_model_takes(
    case: str, measured: dict[str, dict[str, float]]
) -> None:
    found = measured[case]
    estimate, peak = found["estimate"] - found["process"], found["peak"] - found["before"]
    assert estimate == pytest.approx(peak, rel=0.25), found


@ONLY_LINUX
@pytest.mark.parametrize("case", WHOLE_CASES)
def test_the_estimate_is_within_a_quarter_of_what_the_process_takes(case: str) -> None:
    (found,) = run_alone(measure_all, [WHOLE_CASES[case]])
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.25), found


@ONLY_LINUX
@pytest.mark.trained
@pytest.mark.parametrize("case", TRAINED_CASES)
def test_the_estimate_of_a_trained_model_is_within_a_quarter_of_what_the_process_takes(
    case: str, trained_model_path: str
) -> None:
    (found,) = run_alone(measure_all, [{"model": trained_model_path, **TRAINED_CASES[case]}])
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.25), found


def test_the_measurement_leaves_weights_gradients_mode_and_random_numbers_alone(
    model_factory: Callable[..., Any],
) -> None:
    model = model_factory(attention_dropout=0.5)
    model.gradient_checkpointing_enable()
    model.eval()
    modes = []

    def run(num_rows: int, length: int) -> Any:
        modes.append(model.training)
        return model(torch.ones(num_rows, length, dtype=torch.long), use_cache=False).logits.sum()

    before = [parameter.clone() for parameter in model.parameters()]
    torch.manual_seed(3)
    measure_step_memory(model, run, None)
    found = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(found, torch.rand(4))
    assert all(modes)
    assert not model.training
    assert model.is_gradient_checkpointing
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, before, model.parameters()))


def test_no_row_is_longer_than_the_model_has_positions(model_factory: Callable[..., Any]) -> None:
    model = model_factory("gpt2", max_position_embeddings=40)
    lengths = []

    def run(num_rows: int, length: int) -> Any:
        lengths.append(length)
        return model(torch.ones(num_rows, length, dtype=torch.long), use_cache=False).logits.sum()

    assert measure_step_memory(model, run, None).kept.per_token > 0
    assert lengths == [20, 20, 20, 40]


def test_a_model_that_runs_layers_again_in_the_reentrant_way_is_measured(
    model_factory: Callable[..., Any],
) -> None:
    """As the other way; `torch.autograd.grad` does not go through it."""

    def measure(use_reentrant: bool) -> StepMemory:
        model = model_factory(num_hidden_layers=3)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

        def run(num_rows: int, length: int) -> Any:
            ids = torch.ones(num_rows, length, dtype=torch.long)
            return model(ids, use_cache=False).logits.sum()

        found = measure_step_memory(model, run, None)
        run(1, 8).backward()
        return replace(found, process=0, gaps=1.0)

    assert measure(use_reentrant=True) == measure(use_reentrant=False)


class Config:
    """What is asked of a model's config."""

    def get_text_config(self) -> "Config":
        return self


class Known(nn.Module):
    """Holds what can be counted by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 7))
        self.frozen = nn.Parameter(torch.ones(11), requires_grad=False)
        self.config = Config()

    def run(self, num_rows: int, length: int) -> Tensor:
        return Holding.apply(self.weight, num_rows, length)


class Holding(torch.autograd.Function):
    """Keeps a constant, a share per token and one per square, and more for a moment."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, num_rows: int, length: int) -> Tensor:
        rows = torch.zeros(num_rows, length, 3)
        # Views are not counted twice, and what is dropped counts at the highest point alone.
        ctx.save_for_backward(torch.zeros(99), rows[0], rows)
        ctx.squares = torch.zeros(num_rows, length, length)
        ctx.like = weight
        torch.zeros(num_rows, length, 10).fill_(1.0)
        return torch.zeros(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        num_rows, length, _ = ctx.squares.shape
        torch.zeros(num_rows, length, 20).fill_(1.0)
        return torch.zeros_like(ctx.like), None, None


def test_what_is_held_is_counted_to_the_byte() -> None:
    model = Known()
    memory = measure_step_memory(model, model.run, torch.optim.Adam([model.weight]))
    assert memory.kept == Growth(400.0, 12.0, 4.0)
    assert (memory.weights, memory.gradients, memory.optimizer) == (46 * 4, 35 * 4, 2 * 35 * 4)
    assert memory.forward == Growth(-4.0, 40.0, 0.0)
    # The gradient that it begins with.
    assert memory.backward == Growth(4.0, 80.0, 0.0)


def test_gradients_that_are_ready_are_not_counted_twice() -> None:
    """They have a figure of their own."""
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(20)))
    setattr(model, "config", Config())  # noqa: B010
    memory = measure_step_memory(
        model, lambda num_rows, length: model(torch.zeros(num_rows * length, 64)).sum(), None
    )
    assert memory.gradients == 20 * 64 * 64 * 4
    assert memory.backward([]) < memory.gradients / 4


def test_the_process_is_what_is_there_beside_the_model() -> None:
    model = Known()
    model.frozen = nn.Parameter(torch.ones(2**24), requires_grad=False)
    optimizer = torch.optim.Adam([model.weight])
    memory = measure_step_memory(model, model.run, optimizer)
    held = held_memory(torch.device("cpu"))
    assert memory.process == pytest.approx(held - 2**26, abs=2**24)


@pytest.mark.parametrize(
    ("optimizer", "num_states"),
    [
        (torch.optim.AdamW, 2.0),
        (torch.optim.SGD, 0.0),
        (lambda p: torch.optim.SGD(p, momentum=0.9), 1.0),
        (torch.optim.RMSprop, 1.0),
    ],
)
def test_optimizers_keep_what_they_keep(optimizer: Any, num_states: float) -> None:
    model = Known()
    memory = measure_step_memory(model, model.run, optimizer([model.weight]))
    assert memory.optimizer == num_states * 35 * 4


def test_an_adapter_has_gradients_and_states_of_its_own_size(
    model_factory: Callable[..., Any],
) -> None:
    model = get_peft_model(model_factory(), LoraConfig(target_modules="all-linear"))

    def run(num_rows: int, length: int) -> Tensor:
        return model(input_ids=torch.ones(num_rows, length, dtype=torch.long)).logits.sum()

    memory = measure_step_memory(model, run, None)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trained < sum(p.numel() for p in model.parameters()) / 2
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)


MEMORY = StepMemory(
    weights=1000,
    gradients=500,
    optimizer=800,
    kept=Growth(100.0, 2.0, 1.0),
    forward=Growth(10.0, 5.0, 0.0),
    backward=Growth(1.0, 13.0, 0.0),
    is_checkpointed=True,
    forward_limit=20,
    process=4000,
)


def test_the_peak_of_a_step() -> None:
    # Kept 100 + 2 * 7 + 9 + 16; going forward 10 + 20 on top, going backward 1 + 13 per token.
    assert MEMORY.of_pass([3, 4]) == 139 + 92
    assert MEMORY.of_pass([1]) == 103 + 15
    assert MEMORY.peak([[3, 4], [1]]) == 6300 + 231
    assert replace(MEMORY, gaps=2.0).peak([[3, 4]]) == 6300 + 462


def test_the_tokens_that_fit() -> None:
    for num_bytes in (200, 1000, 5000, 100_000):
        tokens = MEMORY.max_tokens(num_bytes, longest=4)
        assert tokens & (tokens - 1) == 0
        fits = [MEMORY.of_pass([4] * (t // 4) or [t]) <= num_bytes for t in (tokens, 2 * tokens)]
        assert fits == [True, False]
    assert MEMORY.max_tokens(0, longest=4) == 1
