"""The rows of an optimizer step over as few micro-batches as a budget of tokens allows.

Which rows share an optimizer step, and so the gradient, stays as it is; only what runs at a time
changes. A micro-batch has a cost of its own however short its rows are, so few are better.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import DistributedType
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import Trainer

from hf_sft_plugin.training.repeats import as_repeat, without_repeats
from hf_sft_plugin.training.response_batch import (
    FOUND_IN,
    OURS,
    ROW_LAYOUT,
    FoundIn,
    layout_of_rows,
)
from hf_sft_plugin.training.shared_prompts import bundle_rows
from hf_sft_plugin.training.trained_positions import TRAINED_POSITIONS, positions_of_rows
from hf_sft_plugin.types import IGNORE_INDEX

if TYPE_CHECKING:
    # A mixin stands in front of a Trainer, which type checkers cannot know from its bases.
    _TrainerBase = Trainer
else:
    _TrainerBase = object

# What stands where a row has no token. No model sees it: the attention mask is 0 there.
_FILL = {"labels": IGNORE_INDEX}


class Microbatches(list[dict[str, Any]]):
    """What runs in the place of one batch of the data loader: no micro-batch, one or several."""


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
    found = [batch.get(ROW_LAYOUT) for batch in batches]
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


def remember_tensors(batches: Sequence[Any]) -> int:
    """Has each micro-batch remember what its layout and its trained positions were found in.

    Returns:
        How many micro-batches run in the place of these batches.
    """
    parts = [p for b in batches for p in (b if isinstance(b, Microbatches) else [b])]
    for part in parts:
        if TRAINED_POSITIONS in part or ROW_LAYOUT in part:
            part[FOUND_IN] = FoundIn(part)
    return len(parts)


def can_regroup(batches: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the batches are made of rows and nothing else: tensors of one shape `(B, S)`."""
    names = batches[0].keys()
    for batch in batches:
        layout = batch.get(ROW_LAYOUT)
        if layout is not None and (not layout.are_rows or layout.shape != batch["labels"].shape):
            return False
        # It might have several documents in a row, which a mask would join.
        if layout is None and "position_ids" in batch and "attention_mask" not in batch:
            return False
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.dim() != 2 or not len(ids) or batch.keys() != names:
            return False
        rest = (value for name, value in batch.items() if name not in OURS)
        if any(not isinstance(it, Tensor) or it.shape != ids.shape for it in rest):
            return False
    return True


def regroup(
    batches: Sequence[Mapping[str, Any]], plan: Sequence[Sequence[int]], extents: Sequence[int]
) -> list[dict[str, Any]]:
    """Makes the planned micro-batches of the rows of batches, each as short as its rows allow.

    Args:
        batches: Of rows and nothing else; see `can_regroup`.
        plan: The rows of each micro-batch, counted over all batches.
        extents: The position after the last token of each row.
    """
    places = [(number, row) for number, b in enumerate(batches) for row in range(len(b["labels"]))]
    has_layout = ROW_LAYOUT in batches[0]
    documents, trained = _documents(batches), _trained_positions(batches)
    names = [name for name in batches[0] if name not in OURS]
    masks = [torch.ones_like(batch["input_ids"]) for batch in batches]
    if "attention_mask" not in names:
        # Rows of different lengths are about to meet.
        batches = [
            {**batch, "attention_mask": mask} for batch, mask in zip(batches, masks, strict=True)
        ]
        names.append("attention_mask")
    made = []
    for rows in plan:
        width = max(extents[row] for row in rows)
        microbatch: dict[str, Any] = {
            name: torch.stack([_cut_row(batches, places[row], name, width) for row in rows])
            for name in names
        }
        if has_layout:
            layout = layout_of_rows([extents[row] for row in rows])
            if documents is not None:
                layout = layout.with_documents([documents[row] for row in rows])
            microbatch[ROW_LAYOUT] = layout.to(microbatch["labels"].device, non_blocking=True)
        if trained is not None:
            positions = positions_of_rows([trained[row] for row in rows], width)
            device = microbatch["labels"].device
            microbatch[TRAINED_POSITIONS] = positions.to(device, non_blocking=True)
        made.append(microbatch)
    return made


def _documents(batches: Sequence[Mapping[str, Any]]) -> list[NDArray[np.int64]] | None:
    """The tokens of every row, where all batches came with them."""
    found = [getattr(batch.get(ROW_LAYOUT), "documents", None) for batch in batches]
    if any(documents is None for documents in found):
        return None
    return [document for documents in found for document in documents or ()]


def _trained_positions(batches: Sequence[Mapping[str, Any]]) -> list[NDArray[np.int64]] | None:
    """Those of every row, where all batches came with them."""
    found = [batch.get(TRAINED_POSITIONS) for batch in batches]
    known = [each for each in found if each is not None]
    if [each.shape for each in known] != [batch["labels"].shape for batch in batches]:
        return None
    return [columns for each in known for columns in each.rows()]


def _cut_row(
    batches: Sequence[Mapping[str, Any]], place: tuple[int, int], name: str, width: int
) -> Tensor:
    number, row = place
    values: Tensor = batches[number][name][row, :width]
    return pad(values, (0, width - len(values)), value=_FILL.get(name, 0))


def rows_of(batches: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The rows of each batch, counted over all batches."""
    rows = iter(range(sum(len(batch["labels"]) for batch in batches)))
    return [[next(rows) for _ in batch["labels"]] for batch in batches]


def _cost(lengths: Sequence[int], is_padded: bool) -> int:
    return max(lengths) * len(lengths) if is_padded else sum(lengths)


def share_out(microbatches: Sequence[dict[str, Any]], num_slots: int) -> list[Microbatches]:
    """Puts micro-batches in the places of the batches that they replace, the last ones first.

    Examples:
        >>> share_out([{"a": 1}, {"a": 2}, {"a": 3}], 2)
        [[{'a': 1}, {'a': 2}], [{'a': 3}]]
        >>> share_out([{"a": 1}], 2)
        [[], [{'a': 1}]]
    """
    count = len(microbatches)
    edges = [count - min(count, slot) for slot in range(num_slots - 1, -1, -1)]
    return [
        Microbatches(microbatches[start:end])
        for start, end in zip([0, *edges], edges, strict=False)
    ]


def _keep_prompts_together(
    plan: list[list[int]], batches: Sequence[Mapping[str, Any]], max_tokens: int
) -> list[list[int]]:
    """A plan whose rows share prompts within micro-batches, unless that would need more of them."""
    documents = _documents(batches)
    if documents is None:
        return plan
    bundles, costs = bundle_rows(documents, max_tokens)
    bundled = plan_microbatches(costs, max_tokens)
    if len(bundled) > len(plan):
        return plan
    return [sorted(row for number in numbers for row in bundles[number]) for numbers in bundled]


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


class _StepPlan(NamedTuple):
    """The rows of each micro-batch of a step, the positions after their last tokens, the budget."""

    plan: list[list[int]]
    extents: list[int]
    max_tokens: int


def _plan_step(
    batches: Sequence[Mapping[str, Any]], budget: TokenBudget, is_padded: bool
) -> _StepPlan:
    """Plans the rows of some batches; plans nothing where those have to stay as they are."""
    if not batches or not can_regroup(batches):
        return _StepPlan([], [], 0)
    lengths, extents = row_extents(batches)
    sizes = extents if is_padded else lengths
    as_they_come = rows_of(batches)
    costs = [_cost([sizes[row] for row in rows], is_padded) for rows in as_they_come]
    max_tokens = budget.for_step(max(costs))
    plan = plan_microbatches(sizes, max_tokens, is_padded)
    if len(plan) > len(batches) and max(costs) <= max_tokens:
        plan = as_they_come
    return _StepPlan(plan, extents, max_tokens)


class MicrobatchesMixin(_TrainerBase):
    """Lets a `Trainer` run the rows of an optimizer step in other micro-batches than they came in.

    To the Trainer a step keeps its number of batches, so steps, epochs, logs and resuming are not
    touched; what runs in the place of each batch is decided here.

    Attributes:
        max_tokens_per_microbatch: Tokens that run at a time; None runs the batches as they come.
    """

    max_tokens_per_microbatch: int | str | None = None
    _first_synced: nn.Module | None = None
    _parts_of_step: Sequence[dict[str, Any]] = ()

    @property
    def token_budget(self) -> TokenBudget | None:
        """How many tokens run at a time; None: batches run as they come."""
        tokens = self.max_tokens_per_microbatch
        return TokenBudget(tokens, tokens) if isinstance(tokens, int) else None

    def regroup_step(
        self, batches: list[Any], is_padded: bool, shares_prompts: bool = False
    ) -> list[Any]:
        """Distributes the rows of one optimizer step anew, within the budget.

        Args:
            batches: What the data loader gave for it.
            is_padded: See `plan_microbatches`.
            shares_prompts: Whether what rows begin with in common runs once.

        Returns:
            As many as there were: the batches, or `Microbatches`.
        """
        budget = self.token_budget
        is_new = self._is_graph_new(self.model_wrapped)
        if budget is None or is_new or not self._takes_microbatches:
            return batches
        own = without_repeats(batches)
        rows = own or batches[:1]
        plan, extents, max_tokens = _plan_step(rows, budget, is_padded)
        most = len(plan)
        if self.accelerator.distributed_type == DistributedType.FSDP:
            # Each forward pass gathers weights, so all processes need as many.
            most = self._agree_on_number(len(plan))
            plan = split_up(plan, min(most, len(extents)))
        elif plan and shares_prompts:
            plan = _keep_prompts_together(plan, rows, max_tokens)
        if not most:
            return batches
        made = regroup(rows, plan, extents)
        if not own:
            made = [as_repeat(microbatch) for microbatch in made]
        made += [as_repeat(made[0])] * (most - len(made))
        return share_out(made, len(batches))

    def _agree_on_number(self, num_planned: int) -> int:
        """Micro-batches of every process; 0 where one cannot plan any."""
        counts = self.accelerator.gather(torch.tensor([num_planned], device=self.args.device))
        return int(counts.max()) if counts.min() > 0 else 0

    def fill_step(self, batches: list[Any], num_batches: int) -> list[Any]:
        """Makes the last batches of a stream a step of their own.

        The Trainer takes a step once it has seen as many batches as are accumulated. The gradient
        of fewer would go into the first step of the next pass, with a divisor of its own.
        """
        if not batches or not self._takes_microbatches:
            return batches
        return [Microbatches() for _ in range(num_batches - len(batches))] + batches

    @property
    def _takes_microbatches(self) -> bool:
        is_overridden = type(self).training_step is not MicrobatchesMixin.training_step
        # DeepSpeed counts the backward passes of a step itself.
        return not (is_overridden or self.accelerator.distributed_type == DistributedType.DEEPSPEED)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in `Trainer`, for every micro-batch that stands in the place of a batch."""
        if not isinstance(inputs, Microbatches):
            self._sync_first_pass(model)
            return super().training_step(model, inputs, num_items_in_batch)
        loss = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs):
            is_last = number == len(inputs) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                loss = loss + super().training_step(model, batch, num_items_in_batch)
        return loss

    def _is_graph_new(self, model: Any) -> bool:
        """Whether DDP is about to get to know a static graph, in its first pass.

        It counts then how often each parameter is used, and fails where gradients are only added:
        so it has to sync, in all processes.
        """
        return getattr(model, "static_graph", False) and self._first_synced is not model

    def _sync_first_pass(self, model: Any) -> None:
        if self._is_graph_new(model):
            self._first_synced = model
            # The context that gradients are added in sets it back.
            model.require_backward_grad_sync = True

    def _prepare_inputs(self, inputs: Any) -> Any:
        # With several processes on a CPU each tensor is copied, though it has not far to go.
        found_in = inputs.get(FOUND_IN)
        is_found = found_in is not None and found_in.is_still_in(inputs)
        prepared = super()._prepare_inputs(inputs)
        return {**prepared, FOUND_IN: FoundIn(prepared)} if is_found else prepared

    def floating_point_ops(self, inputs: Any) -> int:
        """As in `Trainer`, over all micro-batches."""
        parts: Iterator[Any] = iter(inputs if isinstance(inputs, Microbatches) else [inputs])
        return sum(super(MicrobatchesMixin, self).floating_point_ops(part) for part in parts)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if self.args.include_num_input_tokens_seen == "no":
            return
        parts = inputs if isinstance(inputs, Microbatches) else [inputs]
        self._parts_of_step = [*self._parts_of_step, *without_repeats(parts)]
        # Processes run different numbers of micro-batches, so they ask each other once a step.
        if not self.accelerator.sync_gradients:
            return
        parts, self._parts_of_step = self._parts_of_step, ()
        nothing = torch.zeros(0, dtype=torch.long, device=self.args.device)
        joined = {
            name: torch.cat([nothing, *(part[name].flatten() for part in parts)])
            for name in ("input_ids", "attention_mask")
            if all(name in part for part in parts)
        }
        super()._track_num_input_tokens(joined)
