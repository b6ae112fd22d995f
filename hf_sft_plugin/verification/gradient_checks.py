"""Checks of a step's backward pass: its gradient does not know of the split, all weights move."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sft_plugin.batches.host_facts import tensors_of
from hf_sft_plugin.batches.microbatch_plan import can_regroup, row_extents
from hf_sft_plugin.batches.microbatches import regroup
from hf_sft_plugin.models.float64_run import in_float64
from hf_sft_plugin.models.model_interface import has_router_loss
from hf_sft_plugin.verification.checks import VerificationCheck, not_run
from hf_sft_plugin.verification.first_step import FirstStep
from hf_sft_plugin.verification.run_state import local_part

GRADIENT_CHECKS = ("gradient", "trained tensors", "updates")
# Largest relative difference between two gradients of the same rows.
_TOLERANCE = 1e-4
# Of a tensor's gradient, the share whose weights have to move.
_LEAST_SHARE = 0.5
_NUM_NAMED = 5

_ON_SPLITS = (
    "The gradient depends on how the rows of a step are put into micro-batches. Either a loss is "
    "divided by a count of its own micro-batch: divide its sum by num_items_in_batch, as "
    "MaskedLossMixin.compute_loss does. Or rows of a micro-batch reach each other: set "
    "padding_free to 'off'."
)
_ON_GRADIENTS = (
    "Nothing that the loss is made of depends on these tensors, so training would leave them as "
    "they are, weight decay aside. Freeze them with requires_grad_(False), or have the forward "
    "pass use them."
)
_ON_UPDATES = (
    "Most of their update is smaller than half the distance to the next number of their dtype, "
    "and rounded away. Load the model with dtype float32 and set bf16=True for speed, or raise "
    "the learning rate."
)


def check_gradients(step: FirstStep) -> list[VerificationCheck]:
    """Compares the gradients of two splits, and takes the step.

    Args:
        step: While it is `undone`.
    """
    problem = step.backward_problem
    if problem is not None:
        return [not_run(name, problem) for name in GRADIENT_CHECKS]
    before = step.random_state()
    gradients = step.gradients(step.batches)
    pairs = zip(before, step.random_state(), strict=True)
    is_random = not all(torch.equal(*states) for states in pairs)
    return [_compare_splits(step, gradients, is_random), *_check_update(step, gradients)]


def _compare_splits(
    step: FirstStep, gradients: Mapping[str, Tensor | None], is_random: bool
) -> VerificationCheck:
    name = GRADIENT_CHECKS[0]
    parts = step.microbatches
    if has_router_loss(step.unwrapped):
        return not_run(name, "the loss of the router is one of whole micro-batches")
    split = split_otherwise(parts)
    # Gradients are added up over the processes, so those that can split nothing run along.
    if not any(step.on_processes(len(split))):
        return not_run(name, "rows cannot be put into other micro-batches")
    split = split or parts
    # Each pass gathers weights, so all processes need as many.
    if step.is_sharded and len(set(step.on_processes(len(split)))) > 1:
        return not_run(name, "processes would need different numbers of passes")
    error = _relative(step, step.gradients(split), gradients)
    if step.trainer.accelerator.scaler is not None and not error < float("inf"):
        return not_run(name, "the scaled loss overflows, as float16 often does at first")
    bound = _TOLERANCE
    note = f"relative difference between the same rows in {len(parts)} and in {len(split)} "
    note += "micro-batches"
    if any(step.on_processes(not error <= bound)):
        # Rounding or not: in a wider dtype it makes no such difference, but for that of the
        # gradients themselves, which have the dtype of the weights.
        is_half = torch.finfo(step.dtype).bits < 32
        wider = torch.float32 if is_half else torch.float64
        with in_float64(step.unwrapped, wider):
            error = _relative(step, step.gradients(split), step.gradients(step.batches))
        bound = max([bound, *(2 * torch.finfo(p.dtype).eps for p in step.trained.values())])
        note += f", in {wider}".replace("torch.", "")
    if is_random and not error <= bound:
        return not_run(name, "the model draws random numbers that cannot be taken out of it")
    return VerificationCheck(name, error, bound, note, _ON_SPLITS)


def split_otherwise(parts: Sequence[Any]) -> list[Any]:
    """The rows of micro-batches in other micro-batches; none where they cannot be told apart."""
    split = [piece for part in parts for piece in _in_two(part)]
    if len(split) > len(parts):
        return split
    if len(parts) > 1 and can_regroup(parts) and all(len(part["labels"]) == 1 for part in parts):
        _, extents = row_extents(parts)
        rows = list(range(len(parts)))
        return regroup(parts, [rows[n : n + 2] for n in rows[::2]], extents)
    return []


def _in_two(part: Mapping[str, Any]) -> list[Any]:
    """The rows of a micro-batch in two of unequal size, where there are two rows or more."""
    rest = tensors_of(part)
    lengths = {len(v) if isinstance(v, Tensor) and v.dim() else 0 for v in rest.values()}
    if len(lengths) > 1 or max(lengths) < 2:
        return [part]
    edge = -(-max(lengths) // 3)
    return [{k: v[:edge] for k, v in rest.items()}, {k: v[edge:] for k, v in rest.items()}]


def _relative(
    step: FirstStep, found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]
) -> float:
    """The relative difference between two gradients, over all tensors."""
    sums = torch.zeros(2, dtype=torch.float64)
    for name, parameter in step.trained.items():
        zero = torch.zeros((), dtype=parameter.dtype, device=parameter.device)
        one, other = (zero if g is None else local_part(g) for g in (found[name], expected[name]))
        sums[0] += _norm(one - other) ** 2
        sums[1] += _norm(other) ** 2
    difference, size = step.sum_of_shards(sums).sqrt().tolist()
    # Without a trained token both are zero.
    return float(difference / size) if size else float(difference)


def _norm(tensor: Tensor) -> float:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=dtype))


def _check_update(
    step: FirstStep, gradients: Mapping[str, Tensor | None]
) -> list[VerificationCheck]:
    """Which tensors have a gradient, and move when the optimizer takes its step."""
    _, *names = GRADIENT_CHECKS
    trainer = step.trainer
    for name, parameter in step.trained.items():
        parameter.grad = gradients[name]
    for group in trainer.optimizer.param_groups:
        # Warm-up begins with 0, which moves nothing.
        group["lr"] = group.get("initial_lr", group["lr"])
    rates = [float(group["lr"]) for group in trainer.optimizer.param_groups]
    trainer.accelerator.gradient_state._set_sync_gradients(True)
    if trainer.args.max_grad_norm and trainer.args.max_grad_norm > 0:
        trainer._clip_grad_norm(step.model)
    trainer.optimizer.step()
    if trainer.accelerator.optimizer_step_was_skipped:
        return [
            not_run(n, "the step was skipped, as the loss scale of float16 asks") for n in names
        ]
    sizes, shares = _shares_that_moved(step)
    trained = _check_tensors(step, sizes)
    if not any(rates):
        return [trained, not_run(names[1], "the learning rate is 0")]
    has_gradient = {name: share for name, share in shares.items() if sizes[name] > 0}
    judged = {name: share for name, share in has_gradient.items() if _is_judged(step, name)}
    if has_gradient and not judged:
        kind = type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__
        reason = f"{kind} may keep more digits of weights of 16 bits than they show"
        return [trained, not_run(names[1], reason)]
    lost = [name for name, share in judged.items() if share < _LEAST_SHARE]
    least = min(judged, key=lambda name: judged[name], default="")
    note = f"of {len(judged)} lose most of their update, at a learning rate of {max(rates):.1g}"
    if least:
        note += f"; the least keeps {judged[least]:.1%}"
    remedy = f"These are {_list(lost)}. {_ON_UPDATES}"
    return [trained, VerificationCheck(names[1], len(lost), 0, note, remedy)]


def _check_tensors(step: FirstStep, sizes: Mapping[str, float]) -> VerificationCheck:
    """Which tensors have no gradient, and none after the step either."""
    missing = [name for name, size in sizes.items() if not size]
    note = f"of {len(sizes)} have no gradient"
    if missing:
        # Adapters begin with a product in which one factor is zero, so the other gets none yet.
        for parameter in step.trained.values():
            parameter.grad = None
        later = step.gradients(step.batches)
        found = step.sum_of_shards(_sizes([later[name] for name in missing])).tolist()
        still = [name for name, size in zip(missing, found, strict=True) if not size]
        num_late = len(missing) - len(still)
        missing = still
        if num_late:
            note += f"; {num_late} get theirs from step 2 on, as adapters that begin with zeros do"
    remedy = f"These are {_list(missing)}. {_ON_GRADIENTS}"
    return VerificationCheck(GRADIENT_CHECKS[1], len(missing), 0, note, remedy)


def _sizes(gradients: Sequence[Tensor | None]) -> Tensor:
    sizes = [0.0 if g is None else _norm(local_part(g)) for g in gradients]
    return torch.tensor(sizes, dtype=torch.float64)


@torch.no_grad()
def _shares_that_moved(step: FirstStep) -> tuple[dict[str, float], dict[str, float]]:
    """The size of each tensor's gradient, and the share of it whose weights are others now."""
    sums = torch.zeros(len(step.trained), 2, dtype=torch.float64)
    for row, (name, parameter) in enumerate(step.trained.items()):
        if parameter.grad is None:
            continue
        weight = local_part(parameter.detach())
        size = local_part(parameter.grad).abs()
        has_moved = weight != step.weights[name].to(weight.device)
        dtype = torch.promote_types(size.dtype, torch.float32)
        sums[row, 0] = size.sum(dtype=dtype)
        sums[row, 1] = (size * has_moved).sum(dtype=dtype)
    summed = step.sum_of_shards(sums).tolist()
    sizes = {name: size for name, (size, _) in zip(step.trained, summed, strict=True)}
    shares = {
        name: moved / size if size else 0.0
        for name, (size, moved) in zip(step.trained, summed, strict=True)
    }
    return sizes, shares


def _is_judged(step: FirstStep, name: str) -> bool:
    """Whether an update that rounding takes away is lost: other optimizers keep what is left."""
    optimizer = step.trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    is_of_torch = type(optimizer).__module__.startswith("torch.optim")
    return is_of_torch or torch.finfo(step.trained[name].dtype).bits >= 32


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more
