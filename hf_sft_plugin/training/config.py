"""The settings of a run: those of `TrainingArguments`, those of the data, and a few of our own."""

import argparse
import copy
import json
import math
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from transformers import TrainingArguments

from hf_sft_plugin.loss.masked_loss import LossNormalization
from hf_sft_plugin.loss.objective import LossObjective, LossType
from hf_sft_plugin.training.foreign_arguments import refuse_config_arguments
from hf_sft_plugin.training.speed_options import SpeedOptions
from hf_sft_plugin.types import DataOptions, TrainOn


@dataclass
class MaskedSFTConfig(DataOptions, SpeedOptions, TrainingArguments):
    """Settings of a `MaskedSFTTrainer`.

    Everything that `TrainingArguments` takes, everything in `DataOptions` (how rows become tokens)
    and `SpeedOptions`, and the fields below. The help text of each field is its documentation.

    Some defaults differ from `TrainingArguments`: `remove_unused_columns` is False, because the
    collator knows what it needs; `logging_nan_inf_filter` is False, because it makes every
    micro-batch wait for the device; `logging_steps` is 10; `dispatch_batches` of
    `accelerator_config` is False, and its `non_blocking` True where memory is pinned for a GPU; and
    on a CPU `dataloader_pin_memory` is False.

    Raises:
        ValueError: If a value is impossible; says what is possible.
    """

    loss_normalization: str = field(
        default=LossNormalization.TOKEN.value,
        metadata={
            "help": "What the loss of an optimizer step is divided by, over all micro-batches and "
            "processes: the number of response tokens ('token'), of examples ('example', each "
            "counts the same), or normalize_constant ('constant').",
            "choices": [choice.value for choice in LossNormalization],
        },
    )
    normalize_constant: float | None = field(
        default=None,
        metadata={"help": "The divisor of loss_normalization='constant', in tokens."},
    )
    loss_type: str = field(
        default=LossType.NLL.value,
        metadata={
            "help": "The loss of a token with probability p: -log p ('nll'), weighted with p as a "
            "constant ('dft', Dynamic Fine-Tuning), or with (1 - p)^focal_gamma ('focal'). "
            "label_smoothing_factor, z_loss_coef and entropy_coef go with each. The log's loss is "
            "what is optimized, and nll is then beside it; eval_loss is -log p always.",
            "choices": [choice.value for choice in LossType],
        },
    )
    focal_gamma: float | None = field(
        default=None, metadata={"help": "The exponent of loss_type='focal'. None: 2."}
    )
    z_loss_coef: float = field(
        default=0.0,
        metadata={"help": "Adds this times the squared log-normalizer of the logits; try 1e-4."},
    )
    entropy_coef: float = field(
        default=0.0,
        metadata={
            "help": "Subtracts this times the entropy of each prediction: above 0 rewards "
            "entropy, below 0 punishes it."
        },
    )
    packing: bool = field(
        default=False,
        metadata={
            "help": "Whether training rows share packed rows of up to max_length tokens: whole "
            "rows, each of which sees itself alone and counts as ever. "
            "per_device_train_batch_size counts packed rows."
        },
    )
    verify_before_training: bool = field(
        default=False,
        metadata={
            "help": "Whether the first optimizer step is run several times before it is taken, to "
            "prove its numbers: labels, stop tokens, documents apart, the fused head, the gradient "
            "in two splits, updates that the dtype can hold. Prints a table, and stops where a "
            "figure is above its bound. Costs a few steps, and changes nothing.",
            "aliases": ["--verify"],
        },
    )
    max_dropped_share: float = field(
        default=0.05,
        metadata={"help": "Largest share of rows, 0 to 1, that may be dropped before it stops."},
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenize the dataset. None: one."}
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "File with a chat template for the tokenizer. None: its own."},
    )
    model_tags: list[str] | None = field(
        default=None,
        metadata={"help": "Tags for the model card, beside those that the model brings."},
    )
    pad_to_multiple_of: int | None = field(
        default=None,
        metadata={
            "help": "Rounds the length of each batch up to a multiple of this: the longest row, or "
            "without padding all rows together, with tokens that nothing sees or counts. Batches "
            "run as they come then, unless max_tokens_per_microbatch is a number."
        },
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Arguments of from_pretrained, as JSON, when the model is a name."},
    )
    eval_masks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Masks over which evaluation reports figures beside those of what is trained, "
            "from the same forward pass: 'response', 'last_response' and 'all', as in "
            "eval_last_response_loss.",
            "choices": list(get_args(TrainOn)),
        },
    )
    predict_with_generate: bool = field(
        default=False,
        metadata={"help": "Whether evaluation also answers every prompt, and judges responses."},
    )
    generation_metrics: list[str] = field(
        default_factory=lambda: ["exact_match"],
        metadata={
            "help": "Metrics of generated responses: 'exact_match' is built in, any other name is "
            "loaded with evaluate.load."
        },
    )
    generation_max_new_tokens: int = field(
        default=256, metadata={"help": "Longest response in tokens, within the model's positions."}
    )
    generation_num_rows: int | None = field(
        default=None, metadata={"help": "Generates for the first rows only. None: for all."}
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Whether columns that the model's forward does not take are removed."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Has no effect: it would wait for the device at every micro-batch. Losses that "
            "are not finite are left out of logged means, and counted in num_nonfinite_losses."
        },
    )
    logging_steps: float = field(
        default=10,
        metadata={"help": "Log every this many steps; below 1, this share of all steps."},
    )
    # Before transformers 5.24 these have their old names alone, gradient_checkpointing(_kwargs).
    activation_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Whether activations are worked out again in the backward pass instead of "
            "kept, which takes less memory and more time. The older name is "
            "gradient_checkpointing.",
            "nargs": "?",
            "const": True,
        },
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "How: every_n_layers, offload (transformers 5.24), and arguments of "
            "torch.utils.checkpoint.checkpoint, as JSON."
        },
    )
    # A copy has it from the original, and so knows which of two names was changed.
    resolved_checkpointing: dict[str, Any] | None = field(
        default=None, metadata={"help": argparse.SUPPRESS}
    )

    # Strings that may be JSON on the command line, as `TrainingArguments` wants them listed.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    def __new__(cls, *args: Any, **kwargs: Any) -> "MaskedSFTConfig":
        """Answers those who bring the settings of another trainer."""
        owner = next(each for each in cls.__mro__ if "__init__" in vars(each))
        # A subclass may have a constructor with other arguments.
        if "__dataclass_params__" in vars(owner):
            refuse_config_arguments(kwargs, [each.name for each in fields(cls) if each.init])
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Checks our own settings, then lets both parents check theirs."""
        if self.loss_normalization not in list(LossNormalization):
            raise ValueError(
                f"loss_normalization is {self.loss_normalization!r}; choose one of "
                f"{', '.join(LossNormalization)}."
            )
        is_constant = self.loss_normalization == LossNormalization.CONSTANT
        if is_constant != (self.normalize_constant is not None):
            raise ValueError(
                "normalize_constant and loss_normalization='constant' go together: "
                f"normalize_constant is {self.normalize_constant} and loss_normalization is "
                f"{str(self.loss_normalization)!r}."
            )
        if self.normalize_constant is not None and not 0 < self.normalize_constant < math.inf:
            raise ValueError(
                f"normalize_constant is {self.normalize_constant}; a divisor is positive and "
                "finite."
            )
        if self.focal_gamma is not None and self.loss_type != LossType.FOCAL:
            raise ValueError(
                f"focal_gamma is {self.focal_gamma}, but loss_type is {str(self.loss_type)!r}, "
                "which has no such exponent. Set loss_type to 'focal', or leave focal_gamma out."
            )
        self.objective()
        SpeedOptions.__post_init__(self)
        if self.group_by_prompt and self.train_sampling_strategy != "random":
            raise ValueError(
                f"group_by_prompt is set, and train_sampling_strategy is "
                f"{str(self.train_sampling_strategy)!r}, but rows can only be in one order. Leave "
                "one of the two out."
            )
        self._check_packing()
        if not 0 <= self.max_dropped_share <= 1:
            raise ValueError(
                f"max_dropped_share is {self.max_dropped_share}; a share is between 0 and 1."
            )
        self._check_counts()
        self._check_model_init_kwargs()
        DataOptions.__post_init__(self)
        given = self.accelerator_config
        self._name_checkpointing_twice()
        TrainingArguments.__post_init__(self)
        # Now it is no longer JSON.
        self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs
        self.resolved_checkpointing = {
            "activation_checkpointing": self.activation_checkpointing,
            "activation_checkpointing_kwargs": self.activation_checkpointing_kwargs,
        }
        accelerator_config: Any = self.accelerator_config
        if accelerator_config.dispatch_batches is None:
            # Batches of a stream differ in length, so one process cannot cut them up for all.
            accelerator_config.dispatch_batches = False
        is_open = given is None or (isinstance(given, dict) and "non_blocking" not in given)
        if is_open and self.device.type == "cuda" and self.dataloader_pin_memory:
            # Else the host waits until a batch has arrived.
            accelerator_config.non_blocking = True
        if self.device.type == "cpu":
            # There is no device to copy to, and torch would warn at every data loader.
            self.dataloader_pin_memory = False

    # The one that a dataclass gets would show the Hub token, which `TrainingArguments` hides.
    __repr__ = TrainingArguments.__repr__

    def objective(self) -> LossObjective:
        """The loss of a token, as the functions of loss/ take it."""
        return LossObjective(
            loss_type=self.loss_type,
            focal_gamma=2.0 if self.focal_gamma is None else self.focal_gamma,
            label_smoothing=self.label_smoothing_factor,
            z_loss_coef=self.z_loss_coef,
            entropy_coef=self.entropy_coef,
        )

    def data_options(self) -> dict[str, Any]:
        """The fields of `DataOptions`, as the rooms below take them."""
        return {name: getattr(self, name) for name in DataOptions.__dataclass_fields__}

    def to_dict(self) -> dict[str, Any]:
        """As in `TrainingArguments`, which takes `stop_token` for a secret because of its name."""
        return {**super().to_dict(), "stop_token": self.stop_token}

    def __copy__(self) -> "MaskedSFTConfig":
        """Keeps the Hub token, unlike a pickle: a copy stays in memory."""
        duplicate = object.__new__(type(self))
        duplicate.__dict__.update(self.__dict__)
        return duplicate

    def __deepcopy__(self, memo: dict[int, Any]) -> "MaskedSFTConfig":
        """Keeps the Hub token, like `__copy__`."""
        duplicate = object.__new__(type(self))
        memo[id(self)] = duplicate
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return duplicate

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the Hub token out of every pickle: `training_args.bin` is pushed to the Hub."""
        return {**self.__dict__, "hub_token": None}

    def _name_checkpointing_twice(self) -> None:
        """Gives both names the same value, so that every transformers finds it and none warns.

        Raises:
            ValueError: If they say different things, and none of them is known from a copy.
        """
        for end in ("", "_kwargs"):
            names = f"activation_checkpointing{end}", f"gradient_checkpointing{end}"
            values = [getattr(self, name) for name in names]
            known = [getattr(type(self), name) for name in names]
            if self.resolved_checkpointing is not None:
                known = [self.resolved_checkpointing[names[0]]] * 2
            given = [value for value, old in zip(values, known, strict=True) if value != old]
            if len(given) == 2 and given[0] != given[1]:
                raise ValueError(
                    f"{names[0]} is {values[0]}, and {names[1]}, its older name, is {values[1]}. "
                    "Leave one of the two out."
                )
            value = next(iter(given or [each for each in known if each is not None]), None)
            for name in names:
                setattr(self, name, value if end else bool(value))

    def _check_packing(self) -> None:
        if not self.packing:
            return
        if self.max_length is None:
            raise ValueError(
                "packing is set, but not max_length, which says how long packed rows are. Set it "
                "to what the memory allows, such as 2048."
            )
        if self.padding_free == "off":
            raise ValueError(
                "packing is set, and padding_free is 'off', which would pad the rows inside packed "
                "rows again. Leave one of the two out."
            )
        strategy = str(self.train_sampling_strategy)
        if self.group_by_prompt or strategy not in ("random", "sequential"):
            other, remedy = f"train_sampling_strategy {strategy!r}", " or set that to 'random'"
            if self.group_by_prompt:
                other, remedy = "group_by_prompt", " or the other"
            raise ValueError(
                f"packing chooses rows that fit together, and so {other} cannot choose others. "
                f"Leave packing out,{remedy}."
            )

    def _check_counts(self) -> None:
        counts: tuple[str, ...] = ("dataset_num_proc", "pad_to_multiple_of")
        counts += ("max_tokens_per_microbatch", "generation_max_new_tokens", "generation_num_rows")
        counts += ("per_device_train_batch_size", "per_device_eval_batch_size")
        for name in (*counts, "gradient_accumulation_steps"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} is {value}; it counts from 1.")
            if value is not None and type(value) is not int and value != "auto":
                raise ValueError(f"{name} is {value!r}; give a whole number.")
        for name in ("generation_metrics", "eval_masks", "model_tags"):
            names = getattr(self, name)
            is_left_out = names is None and name == "model_tags"
            if not is_left_out and not isinstance(names, list | tuple):
                example = [names] if isinstance(names, str) else []
                raise ValueError(f"{name} is {names!r}; give a list of names, such as {example}.")
        unknown = [name for name in self.eval_masks if name not in get_args(TrainOn)]
        if unknown:
            raise ValueError(
                f"eval_masks names {unknown[0]!r}; choose some of {', '.join(get_args(TrainOn))}."
            )

    def _check_model_init_kwargs(self) -> None:
        arguments = self.model_init_kwargs
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except json.JSONDecodeError:
                arguments = None
            if not isinstance(arguments, dict):
                raise ValueError(
                    f"model_init_kwargs is {self.model_init_kwargs!r}; give a JSON object, such as "
                    '{"dtype": "bfloat16"}.'
                )
        if isinstance((arguments or {}).get("token"), str):
            raise ValueError(
                "model_init_kwargs holds a token, which would be saved and pushed with the "
                "settings of the run. Set the environment variable HF_TOKEN instead, or log in "
                "with `hf auth login`."
            )
