"""How many tokens run at a time where memory decides, and what the user is told about it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn

from hf_sft_plugin.batches.host_facts import HOST_FACTS
from hf_sft_plugin.batches.microbatch_plan import TokenBudget, can_regroup, row_extents
from hf_sft_plugin.batches.microbatches import MicrobatchesMixin, in_one_list
from hf_sft_plugin.models.adapters import find_checkpointing_problem
from hf_sft_plugin.models.float64_run import MODEL_ERRORS
from hf_sft_plugin.training.available_memory import available_memory, held_memory
from hf_sft_plugin.training.memory import StepMemory, measure_step_memory
from hf_sft_plugin.types import IGNORE_INDEX

logger = logging.getLogger(__name__)

# More tokens at a time are hardly faster, and the same number in every run makes the same run.
_CPU_TOKENS, _TOKENS = 4096, 16384
_NUM_MOST = 2**20
# What a batch of rows may hold to be imitated.
_OF_ROWS = {"input_ids", "labels", "attention_mask", "response_mask", "loss_weights", HOST_FACTS}


class MemoryPlanMixin(MicrobatchesMixin):
    """Lets `max_tokens_per_microbatch` be `auto`: a budget made from memory at the first step.

    Attributes:
        auto_gradient_checkpointing: See `MaskedSFTConfig`.
        memory_estimate: Bytes that the first step was estimated to need; None where it was not.
    """

    auto_gradient_checkpointing: bool = False
    memory_estimate: float | None = None
    _budget: TokenBudget | None = None
    _step_memory: StepMemory | None = None
    _memory_line: str | None = None
    _is_memory_planned: bool = False
    # Whether gradient checkpointing is switched on; None: not decided yet, or not asked for.
    _is_switched_on: bool | None = None

    def plan_memory(self, batches: Sequence[Any], is_padded: bool) -> None:
        """Measures what a step needs and sets the budget; does something at the first step alone.

        Args:
            batches: What the data loader gave for the step.
            is_padded: Whether every row of a micro-batch costs as much as the longest.
        """
        if self.max_tokens_per_microbatch != "auto" or self._is_memory_planned:
            return
        self._is_memory_planned = True
        if not self.auto_gradient_checkpointing:
            self._is_switched_on = None
        # Sharded weights, and steps that others count, are not for an estimate made alone.
        is_sharded = self.accelerator.distributed_type in (
            DistributedType.FSDP,
            DistributedType.DEEPSPEED,
        )
        # Padding to a certain length, and a search for a batch size, need the batches as they are.
        is_fixed = self.length_multiple is not None
        if is_fixed:
            self._memory_line = "not estimated: pad_to_multiple_of has batches run as they come"
            if self.auto_gradient_checkpointing:
                logger.warning(
                    "auto_gradient_checkpointing has no effect with pad_to_multiple_of, which has "
                    "batches run as they come, so that nothing is estimated. Leave one of the two "
                    "out, or set activation_checkpointing to true."
                )
        if is_sharded or is_fixed or self.args.auto_find_batch_size:
            # Ignores a budget restored from a checkpoint, too.
            self._budget = None
            return
        possible = 0
        if batches and can_regroup(batches) and batches[0].keys() <= _OF_ROWS:
            lengths, extents = row_extents(batches)
            longest = self.longest_row() or max(lengths)
            try:
                possible = self._measure(batches, extents if is_padded else lengths, longest)
            except MODEL_ERRORS as error:
                # An estimate is no reason to stop a training.
                logger.warning(
                    "What a step needs could not be measured, so batches run as they come. Set "
                    "max_tokens_per_microbatch to a number to put rows together. The cause: %s: %s",
                    type(error).__name__,
                    error,
                )
        if self._step_memory is None:
            self._memory_line = "not estimated, so batches run as they come"
        if self.accelerator.num_processes > 1:
            # Processes see different rows and memory, and have to agree.
            found = torch.tensor([possible], device=self.accelerator.device)
            possible = int(self.accelerator.gather(found).min())
        if possible and self._budget is None:
            most = _CPU_TOKENS if self.args.device.type == "cpu" else _TOKENS
            self._budget = TokenBudget(min(most, possible), possible)

    def forget_memory(self) -> None:
        """Has the next step be the first."""
        self._budget = self._step_memory = self._memory_line = self._is_switched_on = None
        self.memory_estimate = None
        self._is_memory_planned = False

    def longest_row(self) -> int | None:
        """Tokens of the longest row of the training data, where that is known."""
        return None

    @property
    def token_budget(self) -> TokenBudget | None:
        """As in `MicrobatchesMixin`; `auto` takes that of memory, where there is one."""
        if self.max_tokens_per_microbatch == "auto":
            return self._budget
        return super().token_budget

    def describe_memory(self, batches: Sequence[Any], is_padded: bool) -> None:
        """Works out the line about memory once, for the step that is about to run."""
        memory = self._step_memory
        if memory is None or self._memory_line is not None:
            return
        parts = in_one_list(batches)
        rows = []
        for part in parts:
            lengths, extents = row_extents([part])
            rows.append([max(extents)] * len(extents) if is_padded else lengths)
        device = self.args.device
        whole = held_memory(device) + available_memory(device)
        self.memory_estimate = memory.peak(rows)
        num_trained = sum(int((part["labels"] != IGNORE_INDEX).sum()) for part in parts)
        self._memory_line = (
            f"{_gigabytes(self.memory_estimate)} of {_gigabytes(whole)} GB needed for "
            f"{sum(map(sum, rows)):,} tokens, {num_trained:,} of them trained, in {len(parts)} "
            f"micro-batch{'es' if len(parts) > 1 else ''}: weights {_gigabytes(memory.weights)}, "
            f"gradients and optimizer {_gigabytes(memory.gradients + memory.optimizer)}, "
            f"activations {_gigabytes(memory.of_passes(rows))}, "
            f"process {_gigabytes(memory.process)}; gradient "
            f"checkpointing {'on' if memory.is_checkpointed else 'off'}"
        )

    def _measure(
        self, batches: Sequence[Mapping[str, Any]], lengths: Sequence[int], longest: int
    ) -> int:
        """Tokens that there is memory for; also warns where there is too little for one row."""
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        share = sum(int((b["labels"] != IGNORE_INDEX).sum()) for b in batches) / sum(lengths)

        def run(num_rows: int, length: int) -> Tensor:
            rows = _imitate(batches[0], num_rows, length, share)
            with self.compute_loss_context_manager():
                result, _ = self.probe_loss(model, rows)
            loss: Tensor = result.loss
            # As in training, gradients go through the router's loss as well.
            return loss if result.aux_loss is None else loss + result.aux_loss.to(loss.device)

        memory = measure_step_memory(model, run, self.optimizer)
        # The weights are there already, and after a checkpoint was read so are the states.
        has_states = self.optimizer is not None and bool(self.optimizer.state)
        coming = memory.gradients + (0 if has_states else memory.optimizer)
        left = available_memory(self.args.device) - coming
        # Which head it is was found out by running it.
        limit = self.forward_limit()
        memory = replace(memory, forward_limit=limit)
        is_short = memory.of_pass([longest]) > left
        # The second is the name before transformers 5.24; a module of another kind has neither.
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
        enable: Any = next((getattr(model, name) for name in names if hasattr(model, name)), None)
        can_switch = (
            enable is not None
            and not memory.is_checkpointed
            and find_checkpointing_problem(model) is None
        )
        if self.auto_gradient_checkpointing and self._is_switched_on is None:
            self._is_switched_on = is_short and can_switch
        if self._is_switched_on and can_switch:
            enable({"use_reentrant": False})
            memory = replace(measure_step_memory(model, run, self.optimizer), forward_limit=limit)
        self._step_memory = memory
        needed = memory.of_pass([longest])
        if needed > left:
            logger.warning(
                "A step with one row of %s tokens, the longest, is estimated to need %s GB beyond "
                "weights, gradients and optimizer states, and %s GB are left. Set %smax_length "
                "lower.",
                f"{longest:,}",
                _gigabytes(needed),
                _gigabytes(max(0, left)),
                "auto_gradient_checkpointing to true, or " if can_switch else "",
            )
        return min(_NUM_MOST, memory.max_tokens(left / 2, longest))

    def probe_loss(self, model: nn.Module, rows: dict[str, Any]) -> Any:
        """What training works out for rows, with its graph, without counting them."""
        raise NotImplementedError

    def forward_limit(self) -> int | None:
        """Bytes beyond which a forward pass holds no more at a time; None where it does."""
        raise NotImplementedError


def _imitate(
    batch: Mapping[str, Any], num_rows: int, length: int, share: float
) -> dict[str, Tensor]:
    """Rows of the first tokens of a batch, over and over, of which a share is trained."""
    tokens = batch["input_ids"].flatten()
    ids = tokens.repeat(-(-num_rows * length // len(tokens)))[: num_rows * length]
    ids = ids.view(num_rows, length).clone()
    # Rows that begin with one token could run it once.
    ids[:, 0] = torch.arange(num_rows, device=ids.device)
    is_trained = torch.arange(length, device=ids.device) >= length - max(1, round(share * length))
    return {
        "input_ids": ids,
        "labels": ids.where(is_trained, IGNORE_INDEX),
        "attention_mask": torch.ones_like(ids),
    }


def _gigabytes(num_bytes: float) -> str:
    gigabytes = num_bytes / 1e9
    return f"{gigabytes:,.0f}" if gigabytes >= 10 else f"{gigabytes:.2g}"
