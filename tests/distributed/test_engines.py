"""Two processes under DDP, FSDP2 and DeepSpeed give the gradient of plain full logits.

The reference knows nothing of the trainer: the model's own forward on all rows of a step, the mean
of -log p over their trained tokens, autograd, and an optimizer of one line.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from engine_worker import build_model, collate, train_all
from processes import run_on_processes
from torch import Tensor

LEARNING_RATE, NUM_STEPS = 0.5, 2


def make_rows(num_rows: int = 16) -> list[dict[str, Any]]:
    """Rows with responses of 1 to 23 tokens, or none.

    Two at a time, in turn, they go to the two processes: in the first of two steps none of those
    that the second process gets has a response.
    """
    generator = torch.Generator().manual_seed(3)
    rows = []
    for number in range(num_rows):
        num_response = 0 if number in (2, 3, 6, 7, 9) else 1 + (number * 7) % 23
        ids = torch.randint(3, 60, (3 + num_response,), generator=generator).tolist()
        rows.append({"input_ids": ids, "num_prompt": 3})
    return rows


LORA = {"lora": {"target_modules": "all-linear"}}
TIED = {"tie_word_embeddings": True}
OFF = {"fused_head": "off"}


def checkpointing(is_reentrant: bool) -> dict[str, Any]:
    return {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": is_reentrant},
    }


REGROUPED = {"max_tokens_per_microbatch": 30}
COMPILED = {"torch_compile": True, "torch_compile_backend": "eager"}
# Two micro-batches to a step, the first of which adds gradients without syncing them.
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "ddp": ("ddp", {}, {}),
    "ddp, looks for unused parameters": ("ddp", {}, {"ddp_find_unused_parameters": True}),
    "ddp, does not look for them": ("ddp", {}, {"ddp_find_unused_parameters": False}),
    "ddp, static graph": ("ddp", {}, {"ddp_static_graph": True}),
    "ddp, checkpointing": ("ddp", {}, checkpointing(False)),
    "ddp, re-entrant checkpointing": ("ddp", {}, checkpointing(True)),
    "ddp, regrouped": ("ddp", {}, REGROUPED),
    "ddp, static graph, regrouped": ("ddp", {}, {**REGROUPED, "ddp_static_graph": True}),
    "ddp, tied": ("ddp", TIED, {}),
    "ddp, full logits": ("ddp", {}, OFF),
    "ddp, lora": ("ddp", LORA, {}),
    "ddp, lora, regrouped": ("ddp", LORA, REGROUPED),
    "ddp, compiled": ("ddp", {"num_hidden_layers": 1}, COMPILED),
    "fsdp2": ("fsdp2", {}, {}),
    "fsdp2, tied": ("fsdp2", TIED, {}),
    "fsdp2, full logits": ("fsdp2", {}, OFF),
    "fsdp2, tied, full logits": ("fsdp2", TIED, OFF),
    "fsdp2, checkpointing": ("fsdp2", {}, checkpointing(False)),
    "fsdp2, re-entrant checkpointing": ("fsdp2", {}, checkpointing(True)),
    "fsdp2, regrouped": ("fsdp2", {}, REGROUPED),
    "fsdp2, lora": ("fsdp2", LORA, {}),
}


def make_case(engine: str, model: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    settings = {"gradient_accumulation_steps": 2, **settings}
    return {"engine": engine, "model": model, "settings": settings, "rows": make_rows()}


CASES = {name: make_case(*parts) for name, parts in SETTINGS.items()}


def reference(case: dict[str, Any]) -> list[tuple[float, dict[str, Tensor | None]]]:
    """Loss and gradient of each step."""
    model = build_model(case["model"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    num_rows = len(case["rows"]) // NUM_STEPS
    found = []
    for step in range(NUM_STEPS):
        batch = collate(case["rows"][step * num_rows : (step + 1) * num_rows])
        targets = batch.pop("labels")[:, 1:]
        is_trained = targets != -100
        log_p = model(**batch).logits[:, :-1].log_softmax(-1)
        log_p = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        loss = -log_p.where(is_trained, 0).sum() / is_trained.sum()
        gradients = torch.autograd.grad(loss, list(trained.values()))
        found.append((loss.item(), dict(zip(trained, gradients, strict=True))))
        with torch.no_grad():
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                parameter -= LEARNING_RATE * gradient
    return found


def largest_difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Of the gradients of all parameters: the norm of the difference over that of the gradient."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - gradient).norm() / gradient.norm())
        for name, gradient in expected.items()
    )


@pytest.fixture(scope="module")
def results() -> dict[str, list[dict[str, Any]]]:
    """What each case gave on both processes, which run them one after the other."""
    ranks = run_on_processes(2, train_all, list(CASES.values()), timeout=300)
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(CASES)}


@pytest.mark.parametrize("name", CASES)
def test_every_engine_has_the_gradient_of_plain_full_logits(
    name: str, results: dict[str, list[dict[str, Any]]]
) -> None:
    is_ddp = CASES[name]["engine"] == "ddp"
    for found in results[name]:
        assert found["engine"] == ("MULTI_CPU" if is_ddp else "FSDP")
        for number, (loss, gradients) in enumerate(reference(CASES[name])):
            assert largest_difference(found["gradients"][number], gradients) < 1e-12
            assert found["logs"][number]["loss"] == pytest.approx(loss, rel=1e-12)
        num_trained = sum(len(row["input_ids"]) - 3 for row in CASES[name]["rows"])
        assert found["logs"][-1]["num_response_tokens"] == num_trained
