"""Which rows a recipe trains and evaluates on, and how they are read exactly as written."""

from dataclasses import dataclass, field
from typing import Any

from bookings import make_bookings
from datasets import Dataset, load_dataset
from quickstart import make_tasks

from hf_sft_plugin import ShardDataset, is_shard_set, read_rows

TASKS = {"quickstart": make_tasks, "bookings": make_bookings}


@dataclass
class DataArguments:
    """Which rows it is trained on.

    Raises:
        ValueError: If one setting would leave another without effect, or a value is impossible.
    """

    _argument_group_name = "data (none named: the quickstart tasks)"

    tasks: str | None = field(
        default=None,
        metadata={
            "help": "Rows that are made on the spot, with held-out ones: 'quickstart' or "
            "'bookings'. None: those of the quickstart where no other rows are named."
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Rows as .json, .jsonl, .csv or .parquet, a folder of `datasets`, or one of "
            "shards that prepare_dataset.py wrote."
        },
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Held-out rows, in any of the same forms."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "Dataset on the Hub."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of it."})
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    eval_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on: of eval_file if there is one, else of the data."},
    )
    eval_share: float = field(
        default=0.0,
        metadata={"help": "Share of the training rows, 0 to 1, held out where none are named."},
    )
    block_size: int | None = field(
        default=None,
        metadata={
            "help": "Reads shards as one stream, in blocks of so many tokens. None: by documents."
        },
    )
    max_train_rows: int | None = field(
        default=None, metadata={"help": "Trains on the first rows only."}
    )
    max_eval_rows: int | None = field(
        default=None, metadata={"help": "Evaluates on the first rows only."}
    )
    num_samples: int = field(default=8, metadata={"help": "Generated answers to show at the end."})
    num_cpu_threads: int | None = field(
        default=None,
        metadata={
            "help": "Threads of each process on a machine without an accelerator. None: all cores, "
            "shared by the processes (accelerate launch would give each process one)."
        },
    )

    def __post_init__(self) -> None:
        """Refuses settings that would be ignored."""
        if self.tasks is not None and self.tasks not in TASKS:
            raise ValueError(f"tasks is '{self.tasks}', but there are {' and '.join(TASKS)}.")
        names = ("tasks", "train_file", "dataset_name")
        sources = [f"{name} is '{getattr(self, name)}'" for name in names if getattr(self, name)]
        if len(sources) > 1:
            raise ValueError(
                f"{' and '.join(sources)}, but training rows come from one place. Leave all but "
                "one out."
            )
        if self.dataset_config and not self.dataset_name:
            raise ValueError(
                f"dataset_config is '{self.dataset_config}', but there is no dataset_name that it "
                "could be a configuration of. Add dataset_name, or leave it out."
            )
        if not self.train_file and not self.dataset_name:
            for name, default in (
                ("eval_file", None),
                ("eval_split", None),
                ("train_split", "train"),
            ):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} is '{getattr(self, name)}', but no training rows are named, so "
                        f"the {self.tasks or 'quickstart'} tasks would be trained, which bring "
                        "held-out rows of their own. Add train_file or dataset_name."
                    )
        if not 0 <= self.eval_share < 1:
            raise ValueError(
                f"eval_share is {self.eval_share}, but it is a share of the training rows: at "
                "least 0, which holds none out, and below 1."
            )
        held_out = self.eval_file or self.eval_split or not (self.train_file or self.dataset_name)
        if self.eval_share > 0 and held_out:
            source = (
                f"'{held_out}'"
                if isinstance(held_out, str)
                else f"the {self.tasks or 'quickstart'} tasks"
            )
            raise ValueError(
                f"eval_share is {self.eval_share}, but the held-out rows come from {source} "
                "already, so it would have no effect. Leave one of the two out."
            )
        for name in ("max_train_rows", "max_eval_rows"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} is {count}, but it counts rows from 1. None takes all.")
        if self.num_cpu_threads is not None and self.num_cpu_threads < 1:
            raise ValueError(
                f"num_cpu_threads is {self.num_cpu_threads}, but it counts threads from 1. None "
                "takes all cores."
            )
        if self.max_eval_rows is not None and not held_out and self.eval_share == 0:
            raise ValueError(
                f"max_eval_rows is {self.max_eval_rows}, but there are no held-out rows. Name some "
                "with eval_file or eval_split, or hold out a share with eval_share."
            )


def load_rows(data_args: DataArguments, seed: int, use_loss_mask: bool = True) -> tuple[Any, Any]:
    """Loads the training rows and, where there are any, the held-out rows.

    Args:
        data_args: Which rows.
        seed: Decides which rows a share holds out.
        use_loss_mask: Whether shards are read with their masks.

    Returns:
        A `Dataset` each, or a `ShardDataset`; None where nothing is held out.

    Raises:
        ValueError: If a file, dataset or split is not there, or cannot be read.
    """
    files = (data_args.train_file, data_args.eval_file)
    if data_args.block_size and not any(path and is_shard_set(path) for path in files):
        raise ValueError(
            f"block_size is {data_args.block_size}, but no folder of shards is named, so it would "
            "have no effect. Write one with prepare_dataset.py, or leave it out."
        )

    def read(path: str, split: str | None, setting: str) -> Any:
        if is_shard_set(path):
            return ShardDataset(path, split or "val", data_args.block_size, use_loss_mask)
        return read_rows(path, split, setting)

    evaluation = None
    if data_args.train_file:
        train = read(data_args.train_file, data_args.train_split, "train_split")
    elif data_args.dataset_name:
        train = _load_named(data_args, data_args.train_split)
    else:
        train, evaluation = TASKS[data_args.tasks or "quickstart"]()
    if data_args.eval_file:
        evaluation = read(data_args.eval_file, data_args.eval_split, "eval_split")
    elif data_args.eval_split and data_args.train_file:
        evaluation = read(data_args.train_file, data_args.eval_split, "eval_split")
    elif data_args.eval_split:
        evaluation = _load_named(data_args, data_args.eval_split)
    elif data_args.eval_share > 0:
        _require_rows(train, "eval_share", "--val_share, and name them with eval_split: val")
        parts = train.train_test_split(test_size=data_args.eval_share, seed=seed)
        train, evaluation = parts["train"], parts["test"]
    for dataset, setting in ((train, "max_train_rows"), (evaluation, "max_eval_rows")):
        if getattr(data_args, setting) is not None:
            _require_rows(dataset, setting, "only the rows that are wanted")
    return first_rows(train, data_args.max_train_rows), first_rows(
        evaluation, data_args.max_eval_rows
    )


def _require_rows(dataset: Any, setting: str, cure: str) -> None:
    if isinstance(dataset, ShardDataset):
        raise ValueError(
            f"{setting} is set, but '{dataset.folder}' holds shards, which are read as they were "
            f"written. Leave it out, or write them again with {cure}."
        )


def first_rows(dataset: Dataset | None, count: int | None) -> Any:
    """The first rows of a dataset; None takes all."""
    if dataset is None or count is None:
        return dataset
    return dataset.select(range(min(count, len(dataset))))


def _load_named(data_args: DataArguments, split: str) -> Dataset:
    try:
        return load_dataset(data_args.dataset_name, data_args.dataset_config, split=split)
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        # An OSError without a number is how `datasets` says that it cannot reach or find something.
        raise ValueError(
            f"dataset_name '{data_args.dataset_name}' with the split '{split}' cannot be loaded: "
            f"{error}"
        ) from error
