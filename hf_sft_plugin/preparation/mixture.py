"""Several datasets as one, in stated proportions, each row with its source."""

from collections.abc import Mapping

from datasets import Dataset, Value, interleave_datasets

from hf_sft_plugin.rows.arguments import stored_rows


def mix_datasets(
    datasets: Mapping[str, Dataset],
    weights: Mapping[str, float] | None = None,
    *,
    seed: int = 0,
) -> Dataset:
    """Mixes prepared datasets, and names in the column `source` where each row came from.

    Args:
        datasets: Datasets by name, as `prepare_dataset` made them.
        weights: How likely the next row is to come from each; None: each row of all datasets
            exactly once, in random order.
        seed: Of the order.

    Returns:
        With weights: rows until the first dataset is used up, so that no row comes twice and the
        proportions hold to the end. Without: all rows.

    Raises:
        ValueError: If there are no datasets, or names or weights do not fit.

    Examples:
        >>> rows = [{"input_ids": [5, 2], "response_mask": [0, 1]}] * 3
        >>> mixed = mix_datasets({"a": Dataset.from_list(rows), "b": Dataset.from_list(rows)})
        >>> sorted(mixed["source"])
        ['a', 'a', 'a', 'b', 'b', 'b']
    """
    _require_datasets(datasets)
    named = [_with_source(dataset, name) for name, dataset in datasets.items()]
    if weights is None:
        # Drawn by their lengths until all are used up, every row comes once.
        weights = {name: len(dataset) for name, dataset in datasets.items()}
        strategy = "all_exhausted_without_replacement"
    else:
        strategy = "first_exhausted"
    if set(weights) != set(datasets):
        raise ValueError(
            f"The datasets are {', '.join(datasets)}, but there are weights for "
            f"{', '.join(weights)}. Give every dataset exactly one weight."
        )
    total = sum(weights.values())
    if not total > 0 or min(weights.values()) < 0:
        raise ValueError(f"The weights are {dict(weights)}; use numbers of 0 or more, not all 0.")
    shares = [weights[name] / total for name in datasets]
    return interleave_datasets(named, probabilities=shares, seed=seed, stopping_strategy=strategy)


def _require_datasets(datasets: object) -> None:
    """Raises where there is nothing to mix, or something that cannot be."""
    if not datasets:
        raise ValueError("There are no datasets to mix: name at least one.")
    if not isinstance(datasets, Mapping):
        raise ValueError(
            f"datasets is a {type(datasets).__name__}, but a mapping is needed, whose names become "
            "the column `source`: {'name': dataset, ...}."
        )
    for name, dataset in datasets.items():
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"The dataset {name!r} is a {type(dataset).__name__}, but a datasets.Dataset is "
                "needed: of a DatasetDict one split; streams are mixed with "
                "datasets.interleave_datasets."
            )
    empty = [name for name, dataset in datasets.items() if len(dataset) == 0]
    if empty:
        raise ValueError(f"The dataset {empty[0]!r} is empty: it needs at least one row.")


def _with_source(dataset: Dataset, name: str) -> Dataset:
    dataset = stored_rows(dataset, f"The dataset {name!r}", is_trained=False)
    if "source" in dataset.column_names:
        dataset = dataset.remove_columns("source")
    return dataset.add_column("source", [name] * len(dataset), feature=Value("string"))
