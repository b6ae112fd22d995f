"""What a trainer is given: rows, a model, settings; and which of them it refuses."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import number_of_arguments

from hf_sft_plugin.batches.collator import DataCollatorForPromptResponse
from hf_sft_plugin.batches.packing import PackedDataset, pack_dataset
from hf_sft_plugin.evaluation.generation import refuse_stream
from hf_sft_plugin.models.adapters import find_checkpointing_problem, seed_weights
from hf_sft_plugin.models.attention_choice import AttentionChoice
from hf_sft_plugin.models.loading import load_model
from hf_sft_plugin.preparation.prepare import name_in_errors
from hf_sft_plugin.rows.arguments import refuse_name, require_row
from hf_sft_plugin.rows.files import read_chat_template, rows_to_dataset
from hf_sft_plugin.shards.dataset import ShardDataset
from hf_sft_plugin.training.config import MaskedSFTConfig
from hf_sft_plugin.training.foreign_arguments import refuse_trainer_arguments

logger = logging.getLogger(__name__)

AnyModel: TypeAlias = PreTrainedModel | PeftModel
AnyDataset: TypeAlias = (
    Dataset
    | IterableDataset
    | ShardDataset
    | PackedDataset
    | torch.utils.data.Dataset[Any]
    | list[dict[str, Any]]
)


def settings_of(args: MaskedSFTConfig | None, others: Mapping[str, Any]) -> MaskedSFTConfig:
    """The settings, or the defaults.

    Args:
        args: As in `MaskedSFTTrainer`.
        others: Arguments by names that it does not take.

    Raises:
        TypeError: If there are others; says what does the same here.
        ValueError: If they are the settings of another trainer.
    """
    refuse_trainer_arguments(others, MaskedSFTConfig.__dataclass_fields__)
    args = MaskedSFTConfig() if args is None else args
    if not isinstance(args, MaskedSFTConfig):
        raise ValueError(
            f"args is a {type(args).__name__}; MaskedSFTTrainer needs a MaskedSFTConfig, which "
            "takes the same arguments and some more."
        )
    return args


def load_a_model(
    model: str | AnyModel | None,
    model_init: Callable[..., Any] | None,
    args: MaskedSFTConfig,
    peft_config: PeftConfig | None,
    optimizers: tuple[Any, Any] = (None, None),
    trial: Any = None,
) -> AnyModel:
    """The model that was given, or one that `model_init` makes with the seed of the run.

    Afterwards random numbers begin anew with that seed, for the weights of an adapter.

    Raises:
        ValueError: If there is neither or both, or an optimizer, which would be of another model.
    """
    if (model is None) == (model_init is None):
        raise ValueError(
            f"{'Neither model nor' if model is None else 'Both model and'} model_init were given. "
            "Give a model (loaded, or its name), or model_init, a function that makes a new one "
            "for each training."
        )
    if model_init is not None and optimizers != (None, None):
        raise ValueError(
            "optimizers were given together with model_init, which makes a new model for each "
            "training, whose weights they would not hold. Give optimizer_cls_and_kwargs instead."
        )
    seed_weights(args)
    if model_init is not None:
        # It may take the trial of a search for hyperparameters.
        model = model_init(trial) if number_of_arguments(model_init) == 1 else model_init()
    assert model is not None, "one of the two was given"
    loaded = load_model(model, args.model_init_kwargs, peft_config)
    seed_weights(args)
    return loaded


def as_dataset(rows: list[Any], name: str) -> Dataset:
    """A list of rows as a dataset, whose columns have one type each."""
    for index, row in enumerate(rows):
        require_row(row, f"Row {index} of the {name} data")
    try:
        return Dataset.from_list(rows)
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):
        # Arrow does not say which row it was.
        return rows_to_dataset(rows, f"The {name} data")


def choose_split(dataset: Any) -> Any:
    """The dataset to train on: of several the one called `train`, or the only one."""
    refuse_name(dataset, "train_dataset")
    if not isinstance(dataset, Mapping):
        return dataset
    names = list(dataset)
    if "train" not in dataset and len(dataset) != 1:
        raise ValueError(
            f"train_dataset holds {', '.join(map(str, names)) or 'no dataset'}, but one is trained "
            "on, and none of them is called 'train'. Take one split, such as "
            f"dataset[{next(iter(names), 'train')!r}], or join them with "
            "datasets.concatenate_datasets. Only eval_dataset takes several by name."
        )
    chosen = "train" if "train" in dataset else names[0]
    if len(names) > 1:
        logger.warning(
            "train_dataset holds %s. Only %r is trained on; what is to be evaluated on is given as "
            "eval_dataset.",
            ", ".join(map(str, names)),
            chosen,
        )
    return dataset[chosen]


def check_settings(args: MaskedSFTConfig, eval_dataset: object) -> str | None:
    """The chat template of a file, where one is named, before a model is loaded.

    Raises:
        ValueError: For the name of a dataset, for a stream to generate responses for in a run, or
            for a file that cannot be read.
    """
    refuse_name(eval_dataset, "eval_dataset")
    if args.predict_with_generate and eval_dataset is not None:
        sets = eval_dataset if isinstance(eval_dataset, Mapping) else {None: eval_dataset}
        for name, dataset in sets.items():
            with name_in_errors("eval" if name is None else f"eval_{name}"):
                refuse_stream(dataset)
    path = args.chat_template_path
    return None if path is None else read_chat_template(path)


def pack_training_rows(rows: Any, args: MaskedSFTConfig, collator: Any) -> Any:
    """Packs the training data of a run, where its settings ask for that.

    Args:
        rows: Prepared rows, or None; rows that are packed already stay as they are.
        args: The settings.
        collator: What makes the batches; None for that of the package.

    Raises:
        ValueError: If rows of this kind cannot be packed, or if the collator would not take packed
            rows apart.
    """
    if rows is None or not (args.packing or isinstance(rows, PackedDataset)):
        return rows
    if not isinstance(collator, DataCollatorForPromptResponse | None):
        raise ValueError(
            f"The training rows are packed, but the data_collator is a {type(collator).__name__}, "
            "which would not tell the rows inside a packed row apart. Leave it out, give a "
            "DataCollatorForPromptResponse, or do without packing."
        )
    if isinstance(rows, PackedDataset):
        return rows
    assert args.max_length is not None, "the config asks for it"
    return pack_dataset(rows, args.max_length)


def check_packed_rows(rows: Any, name: str, max_length: int | None) -> None:
    """Checks packed rows that a trainer was given.

    Raises:
        ValueError: If they are to be evaluated, or hold rows that would be cut.
    """
    if not isinstance(rows, PackedDataset):
        return
    if name != "train":
        raise ValueError(
            f"The {name} data is packed, but what is measured there are rows, and in every process "
            "as many. Give the rows as they were before pack_dataset."
        )
    longest = int(rows.lengths.max())
    if max_length is not None and longest > max_length:
        raise ValueError(
            f"The {name} data is packed and holds a row of {longest:,} tokens, longer than "
            f"max_length {max_length:,}. It would be cut without being counted: prepare the rows "
            f"with max_length={max_length}, or raise max_length as far as the model reaches."
        )


def refuse_padded_documents(rows: Any, attention: AttentionChoice) -> None:
    """Refuses to train packed rows with a model that cannot tell the rows in them apart.

    Raises:
        ValueError: With the reason why it cannot.
    """
    if isinstance(rows, PackedDataset) and not attention.is_padding_free:
        raise ValueError(
            "The training rows are packed, but they cannot stand one after another in this model: "
            f"they have to be {attention.summary}. Train without packing; "
            "max_tokens_per_microbatch puts rows of one length together."
        )


def refuse_documents(inputs: Mapping[str, Any], attention: AttentionChoice | None) -> None:
    """Refuses a batch with several documents in a row, where it would go to a model as it is.

    Some models tell them apart by their positions, others do not, and nothing would be seen of it.

    Args:
        inputs: What the model would read. Without an `attention_mask`, `position_ids` that do not
            go on begin a new document, as they do in transformers.
        attention: How the model attends; None where its own outputs are asked for.

    Raises:
        ValueError: With the reason why the documents are not laid out to be kept apart.
    """
    positions = inputs.get("position_ids")
    if not isinstance(positions, Tensor) or inputs.get("attention_mask") is not None:
        return
    if not (positions.diff(dim=-1) != 1).any():
        return
    if attention is None:
        reason = "the outputs of the model are asked for"
    elif attention.is_padding_free:
        reason = f"it does not hold tokens alone, but {', '.join(inputs)}"
    else:
        reason = f"rows are {attention.summary}"
    raise ValueError(
        "The batch has several documents in a row, as its position_ids say, and would go to the "
        f"model as it is, where they may see each other: {reason}. Use a collator that gives each "
        "document a row and the batch an attention_mask, such as DataCollatorForPromptResponse."
    )


def refuse_inexact_settings(trainer: Trainer) -> None:
    """Refuses settings under which the promised numbers could not hold.

    Raises:
        ValueError: If there is one; says what to use instead.
    """
    num_started = int(os.environ.get("WORLD_SIZE", "1"))
    # The second is the name before transformers 5.24.
    names = ("activation_checkpointing", "gradient_checkpointing")
    is_checkpointed = any(getattr(trainer.args, name, None) for name in names)
    adapter_problem = find_checkpointing_problem(trainer.model) if is_checkpointed else None
    conflicts: Sequence[tuple[bool, str]] = (
        (adapter_problem is not None, str(adapter_problem)),
        (
            trainer.args.n_gpu > 1,
            "Several GPUs are visible to one process, which DataParallel would split each batch "
            f"over. Start one process per GPU: accelerate launch --num_processes "
            f"{trainer.args.n_gpu} your_script.py",
        ),
        (
            isinstance(trainer.model, nn.DataParallel),
            "The model comes in a DataParallel, which splits each batch over the GPUs of one "
            "process. Hand over the model itself, and start one process per GPU: torchrun "
            "--nproc_per_node gpu your_script.py",
        ),
        (
            num_started > trainer.accelerator.num_processes,
            f"{num_started} processes were started, but Accelerate sees one in each, so every one "
            "of them would train on all rows by itself. On a CPU, set use_cpu to true.",
        ),
        (
            getattr(trainer.accelerator.state, "fsdp_plugin", None) is not None
            and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1,
            "FSDP1 cannot be run on a CPU, so nothing here has been proven on it. Use FSDP2: "
            "fsdp_version: 2, as in recipes/accelerate/fsdp2.yaml.",
        ),
        (
            trainer.compute_loss_func is not None,
            "compute_loss_func was given, but the masked loss would never call it. Leave it out, "
            "or use a Trainer without MaskedLossMixin.",
        ),
        (
            trainer.get_cp_size() * trainer.get_sp_size() > 1,
            "Context or sequence parallelism splits rows between processes, and the label of a "
            "split's last token would be lost. Use data or fully sharded parallelism.",
        ),
        (
            trainer.get_tp_size() > 1,
            "Under tensor parallelism several processes see the same rows, which would be counted "
            "several times. Use data or fully sharded parallelism.",
        ),
    )
    for is_conflict, message in conflicts:
        if is_conflict:
            raise ValueError(message)
