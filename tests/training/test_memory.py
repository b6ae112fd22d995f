"""The estimate is what a real step takes, and making it changes nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_sft_plugin.training.memory import Growth, StepMemory, measure_step_memory

WORKER = Path(__file__).parent / "memory_worker.py"
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
ONE = {"per_device_train_batch_size": 12}
# More than the budget, so that gradients are there while the second part runs.
TWO = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 3}
CASES = {
    "full": {"model": QWEN, "settings": ONE, "is_lora": False},
    "adapter, checkpointed": {
        "model": QWEN,
        "settings": {**ONE, "gradient_checkpointing": True},
        "is_lora": True,
    },
    "autocast": {"model": QWEN, "settings": {**ONE, "bf16": True}, "is_lora": False},
    "large vocabulary, two micro-batches": {"model": LLAMA, "settings": TWO, "is_lora": False},
    "padded, full logits": {
        "model": QWEN,
        "settings": {**ONE, "padding_free": "off", "fused_head": "off"},
        "is_lora": False,
    },
}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, float]]:
    """Estimate and peak of each case."""
    # Every tensor is a mapping of its own, so that the process holds what is in use and no gaps.
    surroundings = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        [sys.executable, str(WORKER), json.dumps([*CASES.values()])],
        capture_output=True,
        text=True,
        env={**os.environ, **surroundings},
    )
    assert answer.returncode == 0, answer.stderr
    lines = [line for line in answer.stdout.splitlines() if line.startswith('{"estimate"')]
    return dict(zip(CASES, map(json.loads, lines), strict=True))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells the peak")
@pytest.mark.parametrize("case", CASES)
def test_the_estimate_is_within_a_quarter_of_the_measured_peak(
    case: str, measured: dict[str, dict[str, float]]
) -> None:
    found = measured[case]
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


class Known(nn.Module):
    """Keeps what can be counted by hand: a constant, a share per token and one per square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5, 7))
        self.frozen = nn.Parameter(torch.ones(11), requires_grad=False)
        self.config = Config()


class Config:
    """What is asked of a model's config."""

    num_hidden_layers = 2

    def get_text_config(self) -> "Config":
        return self


def test_what_is_kept_is_counted_to_the_byte() -> None:
    model = Known()

    def run(num_rows: int, length: int) -> Any:
        constant = torch.zeros(100)
        rows = torch.zeros(num_rows, length, 3)
        squares = torch.zeros(num_rows, length, length)
        # Views are not counted twice, and what is dropped counts at the highest point alone.
        torch.zeros(num_rows, length, 10).sum()
        return constant, rows, rows[0], model.weight[1:], squares

    memory = measure_step_memory(model, run, torch.optim.Adam([model.weight]))
    assert memory.kept == Growth(400.0, 12.0, 4.0)
    assert (memory.weights, memory.gradients, memory.optimizer) == (46 * 4, 35 * 4, 2 * 35 * 4)
    assert memory.forward.per_token == pytest.approx(40.0)
    assert memory.layer == Growth(0.0, 6.0, 2.0)


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
    memory = measure_step_memory(model, lambda *_: None, optimizer([model.weight]))
    assert memory.optimizer == num_states * 35 * 4


def test_an_adapter_has_gradients_and_states_of_its_own_size(
    model_factory: Callable[..., Any],
) -> None:
    model = get_peft_model(model_factory(), LoraConfig(target_modules="all-linear"))
    memory = measure_step_memory(model, lambda *_: None, None)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < trained < sum(p.numel() for p in model.parameters()) / 2
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)


MEMORY = StepMemory(
    weights=1000,
    gradients=500,
    optimizer=800,
    kept=Growth(100.0, 2.0, 1.0),
    forward=Growth(10.0, 5.0, 0.0),
    layer=Growth(0.0, 10.0, 0.0),
    is_checkpointed=True,
    forward_limit=20,
)


def test_the_peak_of_a_step() -> None:
    # Kept 100 + 2 * 7 + 9 + 16; going forward 10 + 20 on top, going backward 13 per token.
    assert MEMORY.of_pass([3, 4]) == 139 + 91
    assert MEMORY.peak([[3, 4], [1]]) == 2300 + 230
    # One micro-batch: gradients come after its activations have gone.
    assert MEMORY.peak([[3, 4]]) == 1800 + 600


def test_the_tokens_that_fit() -> None:
    for num_bytes in (200, 1000, 5000, 100_000):
        tokens = MEMORY.max_tokens(num_bytes, longest=4)
        assert tokens & (tokens - 1) == 0
        fits = [MEMORY.of_pass([4] * (t // 4) or [t]) <= num_bytes for t in (tokens, 2 * tokens)]
        assert fits == [True, False]
    assert MEMORY.max_tokens(0, longest=4) == 1
