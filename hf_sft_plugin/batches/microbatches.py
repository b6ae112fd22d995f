"""The rows of an optimizer step over as few micro-batches as a budget of tokens allows.

Which rows share an optimizer step, and so the gradient, stays as it is; only what runs at a time
changes. A micro-batch has a cost of its own however short its rows are, so few are better.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate.utils import DistributedType
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from hf_sft_plugin.batches.fixed_shape import FixedShapeMixin, round_up
from hf_sft_plugin.batches.host_facts import (
    HOST_FACTS,
    FoundIn,
    HostFacts,
    facts_of,
    layout_of_rows,
    positions_of_rows,
    tensors_of,
    with_facts,
)
from hf_sft_plugin.batches.microbatch_plan import (
    TokenBudget,
    documents_of,
    keep_prompts_together,
    plan_step,
    split_up,
)
from hf_sft_plugin.batches.padding_rows import as_repeat, without_repeats
from hf_sft_plugin.types import IGNORE_INDEX

# What stands where a row has no token. No model sees it: the attention mask is 0 there.
_FILL = {"labels": IGNORE_INDEX}


class Microbatches(list[dict[str, Any]]):
    """What runs in the place of one batch of the data loader: no micro-batch, one or several."""


def in_one_list(batches: Sequence[Any]) -> list[Any]:
    """What runs in the place of batches, micro-batch by micro-batch."""
    return [part for b in batches for part in (b if isinstance(b, Microbatches) else [b])]


def remember_tensors(batches: Sequence[Any]) -> int:
    """Has each micro-batch remember what its layout and its trained positions were found in.

    Returns:
        How many micro-batches run in the place of these batches.
    """
    parts = in_one_list(batches)
    for part in parts:
        if HOST_FACTS in part:
            part[HOST_FACTS] = replace(part[HOST_FACTS], found_in=FoundIn(part))
    return len(parts)


def regroup(
    batches: Sequence[Mapping[str, Any]],
    plan: Sequence[Sequence[int]],
    extents: Sequence[int],
    multiple: int | None = None,
) -> list[dict[str, Any]]:
    """Makes the planned micro-batches of the rows of batches, each as short as its rows allow.

    Args:
        batches: Of rows and nothing else; see `can_regroup`.
        plan: The rows of each micro-batch, counted over all batches.
        extents: The position after the last token of each row.
        multiple: What S is rounded up to.
    """
    places = [(number, row) for number, b in enumerate(batches) for row in range(len(b["labels"]))]
    has_layout = facts_of(batches[0]).layout is not None
    documents, trained = documents_of(batches), _trained_positions(batches)
    names = list(tensors_of(batches[0]))
    masks = [torch.ones_like(batch["input_ids"]) for batch in batches]
    if "attention_mask" not in names:
        # Rows of different lengths are about to meet.
        batches = [
            {**batch, "attention_mask": mask} for batch, mask in zip(batches, masks, strict=True)
        ]
        names.append("attention_mask")
    made = []
    for rows in plan:
        width = round_up(max(extents[row] for row in rows), multiple)
        microbatch: dict[str, Any] = {
            name: torch.stack([_cut_row(batches, places[row], name, width) for row in rows])
            for name in names
        }
        layout = positions = None
        if has_layout:
            layout = layout_of_rows([extents[row] for row in rows], width)
            if documents is not None:
                layout = layout.with_documents([documents[row] for row in rows])
        if trained is not None:
            positions = positions_of_rows([trained[row] for row in rows], width)
        facts = HostFacts(layout, positions)
        device = microbatch["labels"].device
        microbatch[HOST_FACTS] = facts.to(device, non_blocking=True)
        made.append(microbatch)
    return made


def _trained_positions(batches: Sequence[Mapping[str, Any]]) -> list[NDArray[np.int64]] | None:
    """Those of every row, where all batches came with them."""
    found = [facts_of(batch).trained for batch in batches]
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


class MicrobatchesMixin(FixedShapeMixin):
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
        if not isinstance(tokens, int):
            return None
        multiple = self.length_multiple or 1
        # What fills a micro-batch up runs too.
        tokens = max(tokens - tokens % multiple, multiple)
        return TokenBudget(tokens, tokens)

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
        plan, extents, max_tokens = plan_step(rows, budget, is_padded, self.length_multiple)
        if self.accelerator.distributed_type == DistributedType.FSDP:
            # Each forward pass gathers weights, so all processes need as many.
            most = self._agree_on_number(len(plan))
            plan = split_up(plan, min(most, len(extents)))
        else:
            plan = keep_prompts_together(plan, rows, max_tokens) if shares_prompts else plan
            most = len(plan)
        if not most:
            return batches
        made = regroup(rows, plan, extents, self.length_multiple)
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
        found_in = facts_of(inputs).found_in
        is_found = found_in is not None and found_in.is_still_in(inputs)
        prepared = super()._prepare_inputs(inputs)
        return with_facts(prepared, found_in=FoundIn(prepared)) if is_found else prepared

    def floating_point_ops(self, inputs: Any) -> int:
        """As in `Trainer`, over all micro-batches."""
        parts = in_one_list([inputs])
        return sum(super(MicrobatchesMixin, self).floating_point_ops(part) for part in parts)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if self.args.include_num_input_tokens_seen == "no":
            return
        own = without_repeats(in_one_list([inputs]))
        self._parts_of_step = [*self._parts_of_step, *own]
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
