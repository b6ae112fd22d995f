"""The trainer: rows and a model in, a fine-tuned model and an exact account of it out."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Never, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import TrainOutput

from hf_sft_plugin.batches.collator import DataCollatorForPromptResponse
from hf_sft_plugin.batches.packing import PackedDataset
from hf_sft_plugin.evaluation.generation import (
    GeneratedResponse,
    examples_to_answer,
    generate_responses,
    generation_figures,
    judge,
    load_metric,
    with_whole_reference,
)
from hf_sft_plugin.loss.masked_loss import LossNormalization
from hf_sft_plugin.models.adapters import add_adapter
from hf_sft_plugin.models.loading import limit_length, load_tokenizer, stop_tokens
from hf_sft_plugin.preparation.ledger import Ledger
from hf_sft_plugin.preparation.prepare import name_in_errors, prepare_dataset
from hf_sft_plugin.preparation.streaming import prepare_stream
from hf_sft_plugin.shards.dataset import ShardDataset, check_lengths, check_tokenizer
from hf_sft_plugin.tokens.eval_masks import missing_column, needs_column
from hf_sft_plugin.training.allocator import keep_freed_memory
from hf_sft_plugin.training.callbacks import RunRecorder
from hf_sft_plugin.training.config import MaskedSFTConfig
from hf_sft_plugin.training.masked_loss_mixin import MaskedLossMixin
from hf_sft_plugin.training.trainer_arguments import (
    AnyDataset,
    AnyModel,
    as_dataset,
    check_packed_rows,
    check_settings,
    choose_split,
    load_a_model,
    pack_training_rows,
    settings_of,
)
from hf_sft_plugin.types import TokenizedExample

# Attributes of `MaskedLossMixin` that have the values of the settings of the same name.
_SETTINGS_OF_THE_MIXIN = (
    "fused_head",
    "padding_free",
    "shared_prompts",
    "trained_positions_only",
    "fused_layers",
    "group_by_prompt",
    "max_tokens_per_microbatch",
    "verify_before_training",
    "auto_gradient_checkpointing",
    "eval_masks",
    "trained_mask",
)


class MaskedSFTTrainer(MaskedLossMixin, Trainer):
    """Fine-tunes a causal language model on the responses of a dataset, and only on them.

    Raw rows are tokenized, checked and counted; prepared rows are checked and used as they are; a
    streaming dataset is tokenized as its rows come. The output folder gets `metrics.jsonl`,
    `report/` with curves, `data_ledger_*.json` and a model card.

    Args:
        model: A model, a `PeftModel`, or a name or path; None with `model_init`.
        args: Settings; None takes the defaults.
        data_collator: None takes `DataCollatorForPromptResponse`.
        train_dataset: Raw or prepared rows; see `prepare_dataset`. Of a `DatasetDict` the split
            called `train`, or its only one.
        eval_dataset: Raw or prepared rows, or several sets of them by name.
        processing_class: The tokenizer; None loads that of the model.
        peft_config: For example a `peft.LoraConfig`: trains an adapter and freezes the model.
        compute_metrics: As in `Trainer`; its predictions are the most probable tokens, `(B, S)`,
            unless `preprocess_logits_for_metrics` makes something else of the logits.
        callbacks: As in `Trainer`.
        optimizers: As in `Trainer`.
        optimizer_cls_and_kwargs: As in `Trainer`.
        preprocess_logits_for_metrics: As in `Trainer`.
        model_init: As in `Trainer`: makes the model anew, of the run's seed, for each training.
        others: Nothing; what other trainers take is refused with what does the same here.

    Attributes:
        ledgers: Accounts of the prepared datasets by name: `train`, `eval` or `eval_<name>`.
        generation_metrics: The `evaluate.Metric` objects that judge generated responses; a metric
            of your own can be appended.
        responses: What was generated in the last evaluation with `predict_with_generate`.

    Raises:
        ValueError: If model, tokenizer, data and settings do not fit each other; before any step.
        TypeError: If there is an argument that it does not take.
        RowError: If one row is the cause.
    """

    args: MaskedSFTConfig

    def __init__(
        self,
        model: str | AnyModel | None = None,
        args: MaskedSFTConfig | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: AnyDataset | Mapping[str, AnyDataset] | None = None,
        eval_dataset: AnyDataset | Mapping[str, AnyDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        model_init: Callable[..., str | AnyModel] | None = None,
        **others: Never,
    ) -> None:
        args = settings_of(args, others)
        train_dataset = choose_split(train_dataset)
        template = check_settings(args, eval_dataset)
        model = load_a_model(model, model_init, args, peft_config, optimizers)
        tokenizer = load_tokenizer(processing_class, model, args.stop_token, template)
        model = add_adapter(model, peft_config, is_trained=train_dataset is not None)
        self.stop_token_ids = stop_tokens(model, tokenizer, args.stop_token)
        self.ledgers: dict[str, Ledger] = {}
        self._prepared: list[AnyDataset] = []
        self.responses: list[GeneratedResponse] = []
        metrics = args.generation_metrics if args.predict_with_generate else []
        self.generation_metrics = [load_metric(name) for name in metrics]
        self._options = options = {**args.data_options(), "stop_token_ids": self.stop_token_ids}
        options["max_length"] = limit_length(tokenizer, model, args.max_length)
        prepare = partial(self._prepare, tokenizer=tokenizer, args=args, options=options)
        self._recorder = RunRecorder(self.ledgers, self.describe_speed)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator
            or DataCollatorForPromptResponse(
                tokenizer, pad_to_multiple_of=args.pad_to_multiple_of, **options
            ),
            train_dataset=pack_training_rows(prepare("train", train_dataset), args, data_collator),
            eval_dataset=prepare("eval", eval_dataset),
            processing_class=tokenizer,
            compute_metrics=compute_metrics,
            callbacks=[self._recorder, *callbacks],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if model_init is not None:
            self.model_init = cast(Any, partial(self._make_model, model_init, peft_config))
        self.loss_normalization = LossNormalization(args.loss_normalization)
        self.normalize_constant = args.normalize_constant or 1.0
        self.objective = args.objective()
        for name in _SETTINGS_OF_THE_MIXIN:
            setattr(self, name, getattr(args, name))

    def generate_responses(
        self, dataset: Dataset | None = None, num_rows: int | None = None
    ) -> list[GeneratedResponse]:
        """Answers the last prompt of each row greedily.

        Args:
            dataset: Raw or prepared rows; None takes the evaluation data.
            num_rows: Only the first rows; None takes all.

        Returns:
            Prompt, response and expected response of each row, as text, on every process. The
            expected response of a row that was cut to `max_length` is what is left of it.

        Raises:
            ValueError: If there is no dataset, if there are several, or if it is a stream.
        """
        rows = self.eval_dataset if dataset is None else dataset
        return self._answer(self._examples_to_answer(rows, num_rows))

    def longest_row(self) -> int | None:
        """As in `MemoryPlanMixin`: the ledger knows, unless the rows are a stream."""
        return self.ledgers["train"].longest if "train" in self.ledgers else None

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As in `MaskedLossMixin`; on a CPU the process keeps the memory that it frees."""
        if self.args.keep_freed_memory and self.args.device.type == "cpu":
            keep_freed_memory()
        return super().train(*args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in `Trainer`; rows that were not given to the constructor are prepared like those."""
        return super().evaluate(self._prepare_later("evaluate", eval_dataset), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; the rows are prepared like those of the constructor."""
        return super().predict(self._prepare_later("predict", test_dataset), *args, **kwargs)

    def evaluation_loop(self, dataloader: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        """As in `MaskedLossMixin`; with `predict_with_generate` also judges generated responses.

        Rows whose expected response was cut are not judged; see `with_whole_reference`.
        """
        if not self.args.predict_with_generate:
            return super().evaluation_loop(dataloader, description, *args, **kwargs)
        # First, so that rows which cannot be answered do not cost an evaluation.
        dataset = getattr(dataloader, "dataset", None)
        examples = self._examples_to_answer(dataset, self.args.generation_num_rows)
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        self.responses = self._answer(examples)
        prefix = kwargs.get("metric_key_prefix", "eval")
        judged = with_whole_reference(self.responses, examples, self.stop_token_ids, prefix)
        metrics = generation_figures(self.responses) | judge(judged, self.generation_metrics)
        generated = {f"{prefix}_{name}": value for name, value in metrics.items()}
        return output._replace(metrics={**output.metrics, **generated})

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,  # noqa: A002  # the name is that of Trainer
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Writes the model card with the figures of the run, as `push_to_hub` asks for it.

        The arguments are those of `Trainer`. The card has no place for `tasks`, `dataset` and
        `dataset_args`.
        """
        if not self.is_world_process_zero():
            return
        given = {
            "language": language,
            "license": license,
            "tags": [tags] if isinstance(tags, str) else tags,
            "model_name": model_name,
            "base_model": finetuned_from,
            "datasets": [dataset_tags] if isinstance(dataset_tags, str) else dataset_tags,
        }
        facts = {name: value for name, value in given.items() if value}
        self._recorder.write(
            self.args, self.state, self.accelerator.unwrap_model(self.model), **facts
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = self.args.output_dir if output_dir is None else output_dir
        card = Path(str(folder), "README.md")
        old_card = card.read_bytes() if card.is_file() else None
        super()._save(output_dir, state_dict)
        is_adapter = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
        if is_adapter and folder == self.args.output_dir:
            # PEFT has just put the base model's path and its own tags into our card.
            if old_card is not None:
                card.write_bytes(old_card)
            self.create_model_card()

    def describe_speed(self) -> dict[str, str]:
        """As in `MaskedLossMixin`, and how full packed rows are."""
        rows = self.train_dataset
        packing = {"packing": str(rows)} if isinstance(rows, PackedDataset) else {}
        return {**super().describe_speed(), **packing}

    def _make_model(
        self, model_init: Callable[..., Any], peft_config: PeftConfig | None, trial: Any
    ) -> AnyModel:
        """A new model for a new training, like the one of the constructor."""
        model = load_a_model(None, model_init, self.args, peft_config, trial=trial)
        return add_adapter(model, peft_config)

    def _examples_to_answer(self, rows: Any, num_rows: int | None) -> list[TokenizedExample]:
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        return examples_to_answer(rows, num_rows, tokenizer, **self._options)

    def _answer(self, examples: Sequence[TokenizedExample]) -> list[GeneratedResponse]:
        return generate_responses(
            self.accelerator.unwrap_model(self.model),
            examples,
            cast(PreTrainedTokenizerBase, self.processing_class),
            self.accelerator,
            stop_token_ids=self.stop_token_ids,
            max_new_tokens=self.args.generation_max_new_tokens,
            batch_size=self.args.per_device_eval_batch_size,
        )

    def _prepare_later(self, name: str, dataset: Any) -> Any:
        tokenizer = cast(PreTrainedTokenizerBase, self.processing_class)
        return self._prepare(
            name, dataset, tokenizer=tokenizer, args=self.args, options=self._options
        )

    def _prepare(
        self,
        name: str,
        dataset: AnyDataset | Mapping[str, AnyDataset] | None,
        *,
        tokenizer: PreTrainedTokenizerBase,
        args: MaskedSFTConfig,
        options: Mapping[str, Any],
    ) -> Any:
        """Tokenizes and counts a dataset; a stream is tokenized as its rows come."""
        if isinstance(dataset, Mapping):
            prepare = partial(self._prepare, tokenizer=tokenizer, args=args, options=options)
            return {part: prepare(f"{name}_{part}", rows) for part, rows in dataset.items()}
        if any(dataset is prepared for prepared in self._prepared):
            return dataset
        eval_masks = () if name == "train" else args.eval_masks
        if isinstance(dataset, IterableDataset):
            share = args.max_dropped_share
            more: dict[str, Any] = {**options, "eval_masks": eval_masks}
            stream = prepare_stream(dataset, tokenizer, max_dropped_share=share, name=name, **more)
            self._prepared.append(stream)
            return stream
        check_packed_rows(dataset, name, options["max_length"])
        if isinstance(dataset, ShardDataset):
            if needs_column(args, eval_masks):
                raise missing_column(eval_masks, f"The rows of the {name} data, which are shards,")
            self._check_shards(name, dataset, tokenizer, options)
        if isinstance(dataset, list):
            dataset = as_dataset(dataset, name)
        if not isinstance(dataset, Dataset):
            return dataset
        with args.main_process_first(desc=f"preparing the {name} data"), name_in_errors(name):
            prepared, self.ledgers[name] = prepare_dataset(
                dataset,
                tokenizer,
                max_dropped_share=args.max_dropped_share,
                num_proc=args.dataset_num_proc,
                eval_masks=eval_masks,
                **options,
            )
        self._prepared.append(prepared)
        return prepared

    def _check_shards(
        self,
        name: str,
        dataset: ShardDataset,
        tokenizer: PreTrainedTokenizerBase,
        options: Mapping[str, Any],
    ) -> None:
        """Checks that shards fit the run, and takes over the account of their documents."""
        check_tokenizer(dataset.folder, tokenizer)
        check_lengths(dataset, options["max_length"])
        if dataset.use_loss_mask and not options["use_loss_mask"]:
            raise ValueError(
                f"use_loss_mask is False, but the {name} data is a ShardDataset that was opened "
                "with its masks, so only what they mark would be trained. Open it with "
                "ShardDataset(..., use_loss_mask=False)."
            )
        if dataset.use_loss_mask and dataset.block_size is None:
            ledger = Ledger.from_record(dataset.ledger, dataset.certificate)
            if ledger is not None:
                self.ledgers[name] = ledger
