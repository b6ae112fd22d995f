"""The loss, the counts and the logs, for any `Trainer`: steps 6 to 9 of the walk."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_utils import TrainOutput

from hf_sft_plugin.batches.data_loaders import DataLoadersMixin
from hf_sft_plugin.batches.left_padding import move_padding_right
from hf_sft_plugin.batches.microbatches import remember_tensors
from hf_sft_plugin.batches.padding_rows import cut_repeats, without_repeats
from hf_sft_plugin.batches.response_batch import (
    ResponseBatch,
    count_step,
    split_batch,
    without_padding,
)
from hf_sft_plugin.checkpoints.checkpoint import (
    load_budget,
    load_switch,
    load_totals,
    save_budget,
    save_switch,
    save_totals,
)
from hf_sft_plugin.checkpoints.process_group import end_group_at_exit
from hf_sft_plugin.checkpoints.resume import ResumeMixin
from hf_sft_plugin.evaluation.masked_evaluation import MaskedEvaluationMixin
from hf_sft_plugin.evaluation.prediction import LogitReader
from hf_sft_plugin.loss.masked_loss import LossNormalization
from hf_sft_plugin.loss.objective import LossObjective
from hf_sft_plugin.loss.tile_choice import tile_bytes
from hf_sft_plugin.loss.totals import Totals, WindowedTotals, row_totals
from hf_sft_plugin.models.attention_choice import AttentionChoice, AttentionChooser
from hf_sft_plugin.models.embeddings import EmbeddingNoiseMixin
from hf_sft_plugin.models.fused_layers import FusedLayersMixin
from hf_sft_plugin.models.last_layer import LastLayerMixin
from hf_sft_plugin.models.lm_head import HeadChooser, ResponseResult, forward_full
from hf_sft_plugin.models.model_interface import (
    aux_loss_coefficient,
    compile_for_all_sizes,
    find_logits,
    has_router_loss,
)
from hf_sft_plugin.training.allocator import allocator_hint
from hf_sft_plugin.training.memory_plan import MemoryPlanMixin
from hf_sft_plugin.training.speed_options import check_switches
from hf_sft_plugin.training.trainer_arguments import (
    refuse_documents,
    refuse_inexact_settings,
    refuse_padded_documents,
)
from hf_sft_plugin.verification.verification_mixin import VerificationMixin


class MaskedLossMixin(
    MaskedEvaluationMixin,
    LastLayerMixin,
    FusedLayersMixin,
    EmbeddingNoiseMixin,
    MemoryPlanMixin,
    DataLoadersMixin,
    ResumeMixin,
    VerificationMixin,
):
    """Gives a `Trainer` the response-masked loss, divided by one global count, and exact logs.

    Put it in front: `class MyTrainer(MaskedLossMixin, Trainer)`. It works with every collator that
    gives labels, and uses `loss_weights` where the batch has them.

    The gradient depends on the rows of an optimizer step alone, not on how they were split into
    micro-batches or over processes. It is divided by a count of the labels as the collator made
    them: labels that are to change change there, because in a `compute_loss` of one's own the step
    has been counted already. Every `logging_steps` it logs `loss`, `token_entropy` and
    `token_accuracy`, each one sum over the window divided by one count, and the cumulative
    `num_response_tokens` and `num_tokens`. Evaluation gives the same with the prefix `eval_`, and
    `eval_perplexity`, whatever the evaluation batch size; where the rows have a `source`, also
    `eval_<source>_loss` and so on.

    Attributes:
        loss_normalization: What the loss is divided by; see `LossNormalization`.
        normalize_constant: The divisor for `LossNormalization.CONSTANT`.
        objective: The loss of a token in training, of which `loss` is the mean; evaluation reports
            the negative log-likelihood. `label_smoothing_factor` of the `Trainer` goes into it.
        fused_head: `auto`, `on` or `off`; see `MaskedSFTConfig`.
        padding_free: `auto`, `on` or `off`; see `MaskedSFTConfig`.
        shared_prompts: `auto` or `off`; see `MaskedSFTConfig`.
        group_by_prompt, verify_before_training, eval_masks: See `MaskedSFTConfig`.
        trained_mask: The one of these masks that the labels have.

    Raises:
        ValueError: From the constructor, if a setting would make the numbers inexact.
    """

    loss_is_scaled_for_ga: bool | None = True
    loss_normalization: LossNormalization = LossNormalization.TOKEN
    normalize_constant: float = 1.0
    objective: LossObjective = LossObjective()
    fused_head: str = "auto"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_inexact_settings(self)
        end_group_at_exit(self)
        # It would wait for the device each time. Losses that are not finite are counted instead.
        self.args.logging_nan_inf_filter = False
        compile_for_all_sizes(self.accelerator)
        # A subclass may give it as text, as the config does.
        self.loss_normalization = LossNormalization(self.loss_normalization)
        if self.args.label_smoothing_factor:
            smoothing = self.args.label_smoothing_factor
            self.objective = replace(self.objective, label_smoothing=smoothing)
        self._train_totals = WindowedTotals()
        self._num_microbatches = 1
        self._num_step_tokens: Tensor | None = None
        self._head = HeadChooser()
        self._attention = AttentionChooser()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `Trainer`; the counts begin at 0, or where the checkpoint stopped."""
        # A subclass has them as attributes, which nobody has looked at.
        check_switches(self)
        try:
            output = super().train(*args, **kwargs)
        finally:
            # A backward pass that was broken off has left it set.
            self._attention.give_back()
        if self.state.global_step == 0 and self.state.max_steps > 0:
            raise ValueError(
                "Nothing was trained: the training data gave no batch. A stream whose rows are all "
                "left out does so; the warnings before name the first of them. So do fewer (packed)"
                " rows than a batch has, with dataloader_drop_last."
            )
        # The Trainer's own figure is a mean over steps of means over tokens.
        exact = output.metrics.get("train_loss", output.training_loss)
        return output._replace(training_loss=exact)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Collects the micro-batches of one optimizer step and counts its global divisor.

        Returns:
            The micro-batches, and the response tokens (or weights, or rows) in them over all
            processes, a scalar; the constant for `LossNormalization.CONSTANT`.
        """
        came = islice(epoch_iterator, num_batches)
        batches = [cut_repeats(batch, self.accelerator) for batch in came]
        self.see_batches(num_batches - len(batches))
        counts = count_step(batches, self.loss_normalization, device)
        is_constant = self.loss_normalization == LossNormalization.CONSTANT
        is_shared = not is_constant or has_router_loss(self.model)
        if self.accelerator.num_processes > 1 and is_shared:
            counts = self.accelerator.reduce(counts, reduction="sum")
        count, self._num_step_tokens = counts.unbind()
        if is_constant:
            count = torch.full_like(count, self.normalize_constant)
        if self.max_tokens_per_microbatch is not None:
            batches = [move_padding_right(batch, self.length_multiple) for batch in batches]
            attention = self._choose_attention(self.model_wrapped)
            is_padded = not attention.is_padding_free
            # A process may have nothing but a repeat in the first step.
            self.plan_memory(without_repeats(batches) or batches, is_padded)
            batches = self.regroup_step(batches, is_padded, attention.shares_prompts)
            self.describe_memory(batches, is_padded)
        batches = self.fill_step(batches, num_batches)
        self._num_microbatches = max(remember_tensors(batches), 1)
        self.verify_first_step(batches, count)
        return batches, count

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The summed loss of a micro-batch, divided by the global count of its optimizer step.

        Args:
            model: The model as Accelerate prepared it.
            inputs: A collated batch.
            return_outputs: Also returns the model's outputs, for which the full logits are held.
            num_items_in_batch: The global divisor; None divides by that of this batch alone.

        Returns:
            The loss, a scalar; with `return_outputs` the loss and the outputs.
        """
        batch = split_batch(inputs, self.loss_normalization)
        scaled = batch._replace(weights=batch.weights * self._scale(batch, num_items_in_batch))
        result, outputs = self._forward(model, scaled, self.objective, return_outputs)
        loss = result.loss
        if result.aux_loss is not None:
            weight = self._router_weight(model, batch, num_items_in_batch is None)
            loss = loss + result.aux_loss.to(loss.device) * weight
        if model.training:
            self._train_totals.add(self._totals(batch, result))
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, with the exact means of the window in place of its loss."""
        if "loss" in logs:
            del logs["loss"]
            window = self._train_totals.close(self.accelerator)
            rest = dict(logs)
            logs.clear()
            logs.update({**self._figures(window), **rest, **self._train_totals.run.counts()})
        elif "train_loss" in logs:
            self._train_totals.close(self.accelerator)
            figures = self._figures(self._train_totals.run)
            logs.update({f"train_{name}": value for name, value in figures.items()})
        super().log(logs, start_time)

    def _figures(self, totals: Totals) -> dict[str, float]:
        means = totals.means(not self.objective.is_nll) | totals.aux_loss_mean()
        lost = round(totals.num_nonfinite_losses)
        return {**means, "num_nonfinite_losses": lost} if lost else means

    @property
    def attention_summary(self) -> str | None:
        """How rows are attended to, in a few words; None before the model was first run."""
        return None if self._attention.choice is None else self._attention.choice.summary

    def _forward(
        self,
        model: nn.Module,
        batch: ResponseBatch,
        objective: LossObjective,
        needs_outputs: bool,
        reader: LogitReader | None = None,
    ) -> tuple[ResponseResult, Any]:
        """Steps 6 and 7: the body and the head of the model."""
        if needs_outputs:
            # Outputs have a row for each row of the batch.
            refuse_documents(batch.model_inputs, None)
            with self._noise.on(batch.model_inputs):
                return forward_full(model, batch, objective)
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        head = self._head.choose(model, unwrapped, batch.model_inputs, self.fused_head)
        attention = self._choose_attention(model)
        shares_prompts = attention.shares_prompts
        # Predictions have a row for each row of the batch.
        is_flat = attention.is_padding_free and reader is None
        flat = without_padding(batch, shares_prompts) if is_flat else None
        flat = None if flat is None else self.fill_up(flat)
        if flat is None:
            refuse_documents(batch.model_inputs, attention if reader is None else None)
        batch = flat or batch
        last_layer = self.run_last_layer(unwrapped, flat)
        noise = self._noise.on(batch.model_inputs)
        with nullcontext() if flat is None else attention.running(), last_layer, noise:
            if head is None:
                result, full = forward_full(model, batch, objective)
                if reader is not None:
                    logits = find_logits(full, batch.model_inputs.get("input_ids"))
                    reader(logits, lambda some: some)
            else:
                result = head.forward(model, batch, objective, reader)
        if flat is not None:
            attention.keep_in_backward(result.loss, result.aux_loss)
        return result, None

    def probe_loss(self, model: nn.Module, rows: dict[str, Any]) -> Any:
        """Runs steps 6 and 7 on rows that are not counted, to see what memory they take."""
        batch = split_batch(rows, self.loss_normalization)
        return self._forward(model, batch, self.objective, needs_outputs=False)

    def has_router_loss(self) -> bool:
        """As in `FixedShapeMixin`."""
        return has_router_loss(self.model)

    def forward_limit(self) -> int | None:
        """As in `MemoryPlanMixin`: a fused head holds a tile of logits."""
        return None if self._head.choice is None else tile_bytes(self.args.device)

    def describe_speed(self) -> dict[str, str]:
        """What decides on speed and memory, by name, as far as it has been decided."""
        choice = self._attention.choice
        is_padded = choice is None or not choice.is_padding_free
        lines = {"attention": self.attention_summary, "head": self._head.summary}
        lines |= {"shape": self.describe_shape(is_padded, self.longest_row())}
        lines |= {"layers": self.layers_summary, "last layer": self.last_layer_summary}
        lines |= {"memory": self._memory_line}
        lines |= {"compiled": self.args.torch_compile_backend if self.args.torch_compile else None}
        lines |= {"allocator": allocator_hint(self.args.device.type)}
        return {name: line for name, line in lines.items() if line is not None}

    def _choose_attention(self, model: nn.Module) -> AttentionChoice:
        unwrapped = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        # What runs once would have the same noise in every row, of whichever length.
        shares_prompts = self.shared_prompts != "off" and self.neftune_noise_alpha is None
        return self._attention.choose(model, unwrapped, self.padding_free, shares_prompts)

    def _scale(self, batch: ResponseBatch, num_items: Tensor | int | None) -> Tensor:
        """What every weight is multiplied with: one over the divisor, times the processes.

        DDP, FSDP and DeepSpeed average gradients over the data-parallel processes; the sum is what
        is needed.
        """
        if num_items is None:
            is_constant = self.loss_normalization == LossNormalization.CONSTANT
            divisor = batch.divisors.sum()
            divisor = torch.full_like(divisor, self.normalize_constant) if is_constant else divisor
            num_averaged = 1
        else:
            divisor = torch.as_tensor(num_items, device=batch.divisors.device)
            num_averaged = self.accelerator.num_processes
        # Without a single response token the sum is 0, and so shall be the loss.
        return num_averaged / divisor.where(divisor > 0, 1).to(batch.weights.dtype)

    def _router_weight(self, model: nn.Module, batch: ResponseBatch, is_alone: bool) -> Any:
        """How much the router's loss of a micro-batch counts: as its share of the step's tokens."""
        coefficient = aux_loss_coefficient(self.accelerator.unwrap_model(model))
        if is_alone or self._num_step_tokens is None:
            return coefficient
        share = batch.num_tokens.sum() / self._num_step_tokens
        return coefficient * share * self.accelerator.num_processes

    def _totals(self, batch: ResponseBatch, result: ResponseResult) -> Tensor:
        """Step 9: the sums and counts of a micro-batch, `(10,)`."""
        divisors = batch.divisors
        if self.loss_normalization == LossNormalization.CONSTANT:
            parts = len(divisors) * self._num_microbatches * self.accelerator.num_processes
            divisors = torch.full_like(divisors, self.normalize_constant / parts)
        found = result.token_losses, result.stats, batch.positions, batch.weights, divisors
        more: dict[str, Any] = {"leaves_out_nonfinite": True, "aux_loss": result.aux_loss}
        return row_totals(*found, batch.num_tokens, **more).sum(0)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        trainer: Any = self
        own = ["response_mask", "loss_weights", "documents"]
        trainer._signature_columns = [*(trainer._signature_columns or []), *own]

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        # Before the run begins, so that what is said about it can say how rows are attended to.
        refuse_padded_documents(self.train_dataset, self._choose_attention(prepared[0]))
        return prepared

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        # Here a run begins, and begins anew where the Trainer looks for a batch size that fits.
        self._train_totals = WindowedTotals()
        self.forget_memory()
        return super()._init_training_state(*args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_totals(output_dir, self._train_totals, self.accelerator)
        save_budget(output_dir, self._budget, self.accelerator)
        if self.auto_gradient_checkpointing:
            save_switch(output_dir, self._is_switched_on, self.accelerator)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            load_totals(checkpoint, self._train_totals, self.accelerator)
            self._budget = load_budget(checkpoint)
            self._is_switched_on = load_switch(checkpoint, self.accelerator)
