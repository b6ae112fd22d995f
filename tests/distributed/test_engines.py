"""Two processes under DDP, FSDP2 and DeepSpeed give the gradient of plain full logits.

The reference knows nothing of the trainer: the model's own forward on all rows of a step, the mean
of -log p over their trained tokens, autograd, and an optimizer of one line.
"""

from functools import cache
from typing import Any

import pytest
import torch
from engine_worker import LEARNING_RATE, build_model, collate, train_all
from processes import run_on_processes
from torch import Tensor

NUM_STEPS = 2


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
ONE_LAYER = {"num_hidden_layers": 1}
TIED = {"tie_word_embeddings": True}
OFF = {"fused_head": "off"}


def checkpointing(is_reentrant: bool) -> dict[str, Any]:
    return {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": is_reentrant},
    }


ROUTER = {"output_router_logits": True, "router_aux_loss_coef": 1.0, "num_experts_per_tok": 2}
EAGER = {**ROUTER, "experts_implementation": "eager"}
MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, **EAGER}
QWEN3_MOE = {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 8, **EAGER}
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
    "ddp, compiled": ("ddp", ONE_LAYER, COMPILED),
    "ddp, mixtral": ("ddp", MIXTRAL, {}),
    "ddp, qwen3_moe": ("ddp", QWEN3_MOE, {}),
    "fsdp2": ("fsdp2", {}, {}),
    "fsdp2, tied": ("fsdp2", TIED, {}),
    "fsdp2, full logits": ("fsdp2", {}, OFF),
    "fsdp2, tied, full logits": ("fsdp2", TIED, OFF),
    "fsdp2, checkpointing": ("fsdp2", {}, checkpointing(False)),
    "fsdp2, re-entrant checkpointing": ("fsdp2", {}, checkpointing(True)),
    "fsdp2, regrouped": ("fsdp2", {}, REGROUPED),
    "fsdp2, lora": ("fsdp2", LORA, {}),
    "fsdp2, mixtral": ("fsdp2", MIXTRAL, {}),
}
# Routers are worked out in float32 by transformers, whatever the model is in.
LIMITS = {"mixtral": 1e-6, "qwen3_moe": 1e-6}


def make_case(
    engine: str, model: dict[str, Any], settings: dict[str, Any], **more: Any
) -> dict[str, Any]:
    settings = {"gradient_accumulation_steps": 2, **settings}
    return {"engine": engine, "model": model, "settings": settings, "rows": make_rows(), **more}


CASES = {name: make_case(*parts) for name, parts in SETTINGS.items()}


def mean_loss(model: Any, batch: dict[str, Tensor], num_trained: int) -> tuple[Tensor, Any]:
    """The sum of -log p over the trained tokens of a batch over a number of them."""
    batch = dict(batch)
    targets = batch.pop("labels")[:, 1:]
    outputs = model(**batch)
    log_p = outputs.logits[:, :-1].log_softmax(-1)
    log_p = log_p.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return -log_p.where(targets != -100, 0).sum() / num_trained, outputs


def reference(case: dict[str, Any]) -> list[tuple[float, dict[str, Tensor], float]]:
    """Loss, gradient and the router's loss of each step."""
    model = build_model(case["model"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    num_rows = len(case["rows"]) // NUM_STEPS
    learning_rate = case.get("learning_rate", LEARNING_RATE)
    found = []
    for step in range(NUM_STEPS):
        rows = case["rows"][step * num_rows : (step + 1) * num_rows]
        num_trained = sum(len(row["input_ids"]) - row["num_prompt"] for row in rows)
        loss, _ = mean_loss(model, collate(rows), num_trained)
        of_router = router_loss(model, rows)
        gradients = torch.autograd.grad(loss + of_router, list(trained.values()))
        named = dict(zip(trained, gradients, strict=True))
        found.append((loss.item(), named, float(of_router)))
        with torch.no_grad():
            for parameter, gradient in zip(trained.values(), gradients, strict=True):
                parameter -= learning_rate * gradient
    return found


def router_loss(model: Any, rows: list[dict[str, Any]]) -> Tensor | float:
    """That of the model for each micro-batch of two rows, which counts by its tokens."""
    coefficient = getattr(model.config, "router_aux_loss_coef", None)
    if coefficient is None:
        return 0.0
    parts = [rows[start : start + 2] for start in range(0, len(rows), 2)]
    sizes = [sum(len(row["input_ids"]) for row in part) for part in parts]
    total: Tensor | float = 0.0
    for part, size in zip(parts, sizes, strict=True):
        _, outputs = mean_loss(model, collate(part), 1)
        total = total + outputs.aux_loss * (coefficient * size / sum(sizes))
    return total


def largest_difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Of the gradients of all parameters: the norm of the difference over that of the gradient."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - gradient).norm() / gradient.norm())
        for name, gradient in expected.items()
    )


@cache
def run_group(group: str) -> dict[str, list[dict[str, Any]]]:
    """What the cases of an engine gave on both processes, which run them one after the other."""
    cases = {name: case for name, case in CASES.items() if group_of(name) == group}
    ranks = run_on_processes(2, train_all, list(cases.values()), timeout=300)
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(cases)}


def group_of(name: str) -> str:
    # The compiler takes longer than all others.
    return name if CASES[name]["model"] == ONE_LAYER else CASES[name]["engine"]


@pytest.mark.parametrize("name", CASES)
def test_every_engine_has_the_gradient_of_plain_full_logits(name: str) -> None:
    case = CASES[name]
    is_ddp = case["engine"] == "ddp"
    limit = LIMITS.get(case["model"].get("model_type"), 1e-12)
    expected = reference(case)
    for found in run_group(group_of(name))[name]:
        assert found["engine"] == ("MULTI_CPU" if is_ddp else "FSDP")
        assert found["are_sharded"] == [not is_ddp] * NUM_STEPS
        for number, (loss, gradients, aux_loss) in enumerate(expected):
            assert largest_difference(found["gradients"][number], gradients) < limit
            log = found["logs"][number]
            assert log["loss"] == pytest.approx(loss, rel=limit)
            # With its coefficient, which is 1 here, it is part of what is differentiated.
            assert log.get("aux_loss", 0.0) == pytest.approx(aux_loss, rel=limit)
        num_trained = sum(len(row["input_ids"]) - row["num_prompt"] for row in case["rows"])
        assert found["logs"][-1]["num_response_tokens"] == num_trained


@pytest.mark.parametrize("name", CASES)
def test_the_head_goes_the_same_way_on_every_engine(name: str) -> None:
    found = run_group(group_of(name))[name][0]["speed"]["head"]
    if "full logits" in name:
        assert found == "full logits"
    else:
        assert found == f"{2 if 'lora' in name else 3} products over response rows"


def test_processes_that_gather_weights_run_as_many_forward_passes() -> None:
    ddp, fsdp2 = (
        [found["num_forward_passes"] for found in run_group(engine)[f"{engine}, regrouped"]]
        for engine in ("ddp", "fsdp2")
    )
    # By itself the process with the short rows needs fewer.
    assert (ddp, fsdp2) == ([5, 3], [5, 5])


# So wide that what rounding does hardly depends on rows and kernels: over eight choices of rows the
# ratio of the error with our head to that with full logits spread by 2%. Weights stay as they are,
# since their last digits may become other ones in bfloat16.
WIDE = {**TIED, "hidden_size": 128, "intermediate_size": 192, "head_dim": 64}
BF16 = {"precision": "bf16", "dtype": torch.float32, "learning_rate": 0.0}
# One process runs the same micro-batches as two.
ROUNDED = {
    f"{engine} {num_processes} {head}": make_case(
        engine,
        WIDE,
        {"gradient_accumulation_steps": 4 // num_processes, "fused_head": head},
        **BF16,
    )
    for engine, num_processes in (("ddp", 1), ("ddp", 2), ("fsdp2", 2))
    for head in ("on", "off")
}


@pytest.fixture(scope="module")
def rounded() -> dict[str, dict[str, Any]]:
    """What each case in bfloat16 gave on its first process."""
    found = {}
    for num_processes in (1, 2):
        cases = {name: case for name, case in ROUNDED.items() if f" {num_processes} " in name}
        results = run_on_processes(num_processes, train_all, list(cases.values()))[0]
        found |= dict(zip(cases, results, strict=True))
    return found


def flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("engine", ["ddp 1", "ddp 2", "fsdp2 2"])
def test_in_bfloat16_no_engine_errs_more_than_with_full_logits(
    engine: str, rounded: dict[str, dict[str, Any]]
) -> None:
    """In root mean square over both steps, with a tenth, five times that spread, as slack."""
    ours, full = rounded[f"{engine} on"], rounded[f"{engine} off"]
    errors = torch.zeros(2, dtype=torch.float64)
    for number, (loss, gradients, _) in enumerate(reference(ROUNDED[f"{engine} on"])):
        truth = flat(gradients)
        for index, found in enumerate((ours, full)):
            error = flat(found["gradients"][number]) - truth
            errors[index] += error.square().sum() / truth.square().sum()
        # Rounded to bfloat16, statistics would be off by up to 4e-3.
        assert ours["logs"][number]["loss"] == pytest.approx(loss, rel=1e-4)
    assert errors[0].sqrt() <= 1.1 * errors[1].sqrt()


def test_in_bfloat16_two_processes_train_as_one(rounded: dict[str, dict[str, Any]]) -> None:
    one, two = rounded["ddp 1 on"], rounded["ddp 2 on"]
    for step in range(NUM_STEPS):
        expected = flat(one["gradients"][step])
        assert (flat(two["gradients"][step]) - expected).norm() < 1e-6 * expected.norm()
        assert two["logs"][step]["loss"] == pytest.approx(one["logs"][step]["loss"], rel=1e-6)


# DeepSpeed keeps its weights in float32, and with larger steps their rounding would be seen.
FLOAT32 = {"dtype": torch.float32, "learning_rate": 1e-3}
SHARDED = {
    f"zero{stage}, {name}": make_case(f"zero{stage}", model, settings, **FLOAT32)
    for stage in (2, 3)
    for name, (model, settings) in {
        "separate": ({}, {}),
        "tied": (TIED, {}),
        "full logits": ({}, OFF),
        "checkpointing": ({}, checkpointing(False)),
        "lora": (LORA, {}),
    }.items()
}


@pytest.fixture(scope="module")
def sharded() -> dict[str, list[dict[str, Any]]]:
    """What each case gave under DeepSpeed on both processes."""
    pytest.importorskip("deepspeed", reason="DeepSpeed, the extra `deepspeed`, is not installed")
    ranks = run_on_processes(2, train_all, list(SHARDED.values()), timeout=400)
    return {name: [rank[number] for rank in ranks] for number, name in enumerate(SHARDED)}


@pytest.mark.parametrize("name", SHARDED)
def test_deepspeed_has_the_gradient_of_plain_full_logits(
    name: str, sharded: dict[str, list[dict[str, Any]]]
) -> None:
    for found in sharded[name]:
        assert found["engine"] == "DEEPSPEED"
        for number, (loss, gradients, _) in enumerate(reference(SHARDED[name])):
            truth = flat(gradients)
            assert (flat(found["gradients"][number]) - truth).norm() < 1e-6 * truth.norm()
            assert found["logs"][number]["loss"] == pytest.approx(loss, rel=1e-6)
