"""Which rows of an optimizer step run together, within a budget of tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_sft_plugin.batches.fixed_shape import round_up
from hf_sft_plugin.batches.host_facts import facts_of, tensors_of
from hf_sft_plugin.batches.shared_prompts import bundle_rows


@dataclass(frozen=True)
class TokenBudget:
    """Tokens of a micro-batch.

    Attributes:
        wanted: As many as are worth it.
        possible: As many as there is memory for; a batch of the user's own size may go up to it.
    """

    wanted: int
    possible: int

    def for_step(self, largest: int) -> int:
        """The budget of an optimizer step whose largest batch has so many tokens."""
        return min(self.possible, max(self.wanted, largest))


def plan_microbatches(
    lengths: Sequence[int], max_tokens: int, is_padded: bool = False
) -> list[list[int]]:
    """Distributes rows over as few micro-batches as a budget allows, as evenly as it can.

    Args:
        lengths: Tokens of each row.
        max_tokens: Tokens of a micro-batch, or as many as the longest row has, if that is more.
        is_padded: Whether every row of a micro-batch costs as much as the longest.

    Returns:
        The rows of each micro-batch, in order.

    Examples:
        >>> plan_microbatches([3, 9, 4, 2], max_tokens=9)
        [[1], [0, 2, 3]]
        >>> plan_microbatches([3, 9, 4, 2], max_tokens=9, is_padded=True)
        [[1], [0, 2], [3]]
    """
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    limit = max(max_tokens, max(lengths, default=0))
    plan: list[list[int]] = []
    if is_padded:
        for row in longest_first:
            width = lengths[plan[-1][0]] if plan else 0
            if not plan or width * (len(plan[-1]) + 1) > limit:
                plan.append([])
            plan[-1].append(row)
        return [sorted(rows) for rows in plan]
    for count in range(max(1, -(-sum(lengths) // limit)), len(lengths) + 1):
        # Evenly, and where that does not fit, as tightly as can be.
        for is_even in (True, False):
            plan, loads = [[] for _ in range(count)], [0] * count
            for row in longest_first:
                fitting = (n for n, load in enumerate(loads) if load + lengths[row] <= limit)
                least = loads.index(min(loads))
                chosen = least if is_even else next(fitting, least)
                plan[chosen].append(row)
                loads[chosen] += lengths[row]
            if max(loads) <= limit and all(plan):
                return [sorted(rows) for rows in plan]
    return []


def split_up(plan: list[list[int]], num_microbatches: int) -> list[list[int]]:
    """Splits micro-batches in two, those of most rows first, until there are so many.

    Examples:
        >>> split_up([[1], [0, 2, 3]], 3)
        [[1], [0], [2, 3]]
    """
    plan = list(plan)
    while len(plan) < num_microbatches:
        widest = max(range(len(plan)), key=lambda number: len(plan[number]))
        rows = plan[widest]
        plan[widest : widest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    return plan


def row_extents(batches: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Tokens of every row, and the position after its last one.

    They are known where the batches come with their layout; else this waits for the device once.
    """
    found = [facts_of(batch).layout for batch in batches]
    layouts = [layout for layout in found if layout is not None and layout.are_rows]
    if len(layouts) == len(batches):
        lengths = [length for layout in layouts for length in layout.document_lengths]
        return lengths, lengths
    counts = []
    for batch in batches:
        mask = batch.get("attention_mask")
        if mask is None:
            mask = torch.ones_like(batch["input_ids"])
        positions = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        counts.append(torch.stack([mask.sum(-1), (mask * positions).amax(-1)]))
    lengths, extents = torch.cat(counts, dim=1).tolist()
    return lengths, extents


def can_regroup(batches: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the batches are made of rows and nothing else: tensors of one shape `(B, S)`."""
    names, has_layout = batches[0].keys(), facts_of(batches[0]).layout is not None
    for batch in batches:
        layout = facts_of(batch).layout
        if (layout is not None) != has_layout:
            return False
        if layout is not None and (not layout.are_rows or layout.shape != batch["labels"].shape):
            return False
        # It might have several documents in a row, which a mask would join.
        if layout is None and "position_ids" in batch and "attention_mask" not in batch:
            return False
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not len(ids) or batch.keys() != names:
            return False
        rest = tensors_of(batch).values()
        if any(not isinstance(it, Tensor) or it.shape != ids.shape for it in rest):
            return False
    return True


def rows_of(batches: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The rows of each batch, counted over all batches."""
    rows = iter(range(sum(len(batch["labels"]) for batch in batches)))
    return [[next(rows) for _ in batch["labels"]] for batch in batches]


def _cost(lengths: Sequence[int], is_padded: bool) -> int:
    return max(lengths) * len(lengths) if is_padded else sum(lengths)


class StepPlan(NamedTuple):
    """The rows of each micro-batch of a step, the positions after their last tokens, the budget."""

    plan: list[list[int]]
    extents: list[int]
    max_tokens: int


def plan_step(
    batches: Sequence[Mapping[str, Any]],
    budget: TokenBudget,
    is_padded: bool,
    multiple: int | None = None,
) -> StepPlan:
    """Plans the rows of some batches; plans nothing where those have to stay as they are.

    Where rows are padded, then to a multiple of so many tokens.
    """
    if not batches or not can_regroup(batches):
        return StepPlan([], [], 0)
    lengths, extents = row_extents(batches)
    sizes = [round_up(extent, multiple) for extent in extents] if is_padded else lengths
    as_they_come = rows_of(batches)
    costs = [_cost([sizes[row] for row in rows], is_padded) for rows in as_they_come]
    max_tokens = budget.for_step(max(costs))
    plan = plan_microbatches(sizes, max_tokens, is_padded)
    if len(plan) > len(batches) and max(costs) <= max_tokens:
        plan = as_they_come
    return StepPlan(plan, extents, max_tokens)


def keep_prompts_together(
    plan: list[list[int]], batches: Sequence[Mapping[str, Any]], max_tokens: int
) -> list[list[int]]:
    """A plan whose rows share prompts within micro-batches, unless that would need more of them."""
    documents = documents_of(batches)
    if not plan or documents is None:
        return plan
    bundles, costs = bundle_rows(documents, max_tokens)
    bundled = plan_microbatches(costs, max_tokens)
    if len(bundled) > len(plan):
        return plan
    return [sorted(row for number in numbers for row in bundles[number]) for numbers in bundled]


def documents_of(batches: Sequence[Mapping[str, Any]]) -> list[NDArray[np.int64]] | None:
    """The tokens of every row, where all batches came with them."""
    found = [getattr(facts_of(batch).layout, "documents", None) for batch in batches]
    if any(documents is None for documents in found):
        return None
    return [document for documents in found for document in documents or ()]
