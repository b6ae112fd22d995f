"""What a trainer is given: the rows it trains and evaluates on, and a model or what makes one."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import pyarrow as pa
import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from transformers.trainer_utils import number_of_arguments

from hf_sft_plugin.batches.packing import PackedDataset
from hf_sft_plugin.evaluation.generation import refuse_stream
from hf_sft_plugin.models.adapters import seed_weights
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
