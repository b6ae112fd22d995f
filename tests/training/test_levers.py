"""Every lever, on and off in every combination, leaves the gradient that of full logits."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from datasets import Dataset
from one_step import Gradients, gradient_of
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer

Make = Callable[..., Any]
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": EXPERTS,
}
NAMES = ("fused_head", "max_tokens_per_microbatch", "shared_prompts", "trained_positions_only")
WAYS = (("on", "off"), (None, 150), ("auto", "off"), ("auto", "off"))
# The last two need rows without padding.
PADDED = [
    {"padding_free": "off", **dict(zip(NAMES, ways, strict=False))} for ways in product(*WAYS[:2])
]
WITHOUT_PADDING = [
    {"padding_free": "on", **dict(zip(NAMES, ways, strict=True))} for ways in product(*WAYS)
]
PACKED = [
    {**each, "packing": True, "max_length": 100, "per_device_train_batch_size": 5}
    for each in WITHOUT_PADDING
    if each["max_tokens_per_microbatch"] is None
]
LEVERS = [*PADDED, *WITHOUT_PADDING, *PACKED]


def make_rows() -> list[dict[str, Any]]:
    """Eight rows of 1 to 60 trained tokens; three prompts with several responses."""
    generator = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 300, (count,), generator=generator).tolist()

    prompts = [tokens(20), tokens(30), tokens(4)]
    shapes = [(0, 12), (1, 1), (2, 60), (0, 5), (1, 40), (2, 7), (0, 25), (1, 3)]
    return [
        {
            "input_ids": prompts[prompt] + tokens(count),
            "response_mask": [0] * len(prompts[prompt]) + [1] * count,
            "loss_weights": [0.0] * len(prompts[prompt]) + [0.5**prompt] * count,
        }
        for prompt, count in shapes
    ]


def reference(model: Any) -> tuple[float, Tensor]:
    """Loss and gradient of the rows, one at a time on full logits."""
    total, weight = torch.zeros((), dtype=torch.float64), 0.0
    for row in make_rows():
        ids = torch.tensor([row["input_ids"]])
        weights = torch.tensor(row["loss_weights"][1:], dtype=torch.float64)
        log_p = torch.log_softmax(model(ids, use_cache=False).logits[0, :-1], dim=-1)
        total = total - (weights * log_p.gather(1, ids[0, 1:, None])[:, 0]).sum()
        weight += float(weights.sum())
    loss = total / weight
    model.zero_grad()
    loss.backward()
    return loss.item(), gradient_of(model)


@pytest.fixture(scope="module", params=FAMILIES)
def model_and_truth(
    request: Any, model_factory: Make, widen: Callable[[nn.Module], None]
) -> tuple[Any, float, Tensor]:
    model = model_factory(request.param, **FAMILIES[request.param]).double()
    widen(model)
    return model, *reference(model)


def train_one_step(
    model: nn.Module, make_config: Callable[..., MaskedSFTConfig], tokenizer: Any, **levers: Any
) -> tuple[MaskedSFTTrainer, Tensor]:
    """The trainer after a step that changes nothing, and the gradient of the step."""
    model.zero_grad()
    gradients = Gradients()
    args = make_config(
        **{
            "per_device_train_batch_size": 8,
            "max_steps": 1,
            "learning_rate": 0.0,
            "max_grad_norm": 0.0,
            **levers,
        }
    )
    trainer = MaskedSFTTrainer(
        model,
        args,
        train_dataset=Dataset.from_list(make_rows()),
        processing_class=tokenizer,
        callbacks=[gradients],
    )
    trainer.train()
    return trainer, gradients.values[-1]


@pytest.mark.parametrize("levers", LEVERS, ids=lambda levers: ", ".join(map(str, levers.values())))
def test_levers_in_any_combination_give_loss_and_gradient_of_full_logits(
    levers: dict[str, Any],
    model_and_truth: tuple[Any, float, Tensor],
    make_config: Callable[..., MaskedSFTConfig],
    tokenizer: Any,
) -> None:
    model, loss, gradient = model_and_truth
    trainer, found = train_one_step(model, make_config, tokenizer, **levers)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-12)
    assert (found - gradient).norm() < 1e-12 * gradient.norm()
    # What was asked for is what ran.
    assert trainer.attention_summary is not None
    shares = "shared prompts once" in trainer.attention_summary
    assert shares == (levers.get("shared_prompts") == "auto")
    assert ("padded" in trainer.attention_summary) == (levers["padding_free"] == "off")


CHECKPOINTED: dict[str, Any] = {
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {"every_n_layers": 2},
}


@pytest.mark.parametrize(
    "levers",
    [
        {},
        {"gradient_checkpointing": True},
        pytest.param(
            CHECKPOINTED,
            marks=pytest.mark.skipif(
                "activation_checkpointing" not in MaskedSFTConfig.__dataclass_fields__,
                reason="this transformers checkpoints every layer",
            ),
        ),
    ],
    ids=["all kept", "checkpointed", "every other layer"],
)
def test_activations_may_be_kept_elsewhere(
    levers: dict[str, Any],
    model_and_truth: tuple[Any, float, Tensor],
    make_config: Callable[..., MaskedSFTConfig],
    tokenizer: Any,
) -> None:
    model, _, gradient = model_and_truth
    moved: list[int] = []

    def move(tensor: Tensor) -> Tensor:
        moved.append(tensor.nbytes)
        return tensor.clone()

    # What moves activations to the host or to a disk is told of them in this way.
    with saved_tensors_hooks(move, lambda tensor: tensor.clone()):
        _, found = train_one_step(model, make_config, tokenizer, **levers)
    assert (found - gradient).norm() < 1e-12 * gradient.norm()
    assert sum(moved) > 10_000
