"""Training on packed rows: what is packed, and where that would train something else."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hf_sft_plugin.batches.collator import DataCollatorForPromptResponse
from hf_sft_plugin.batches.packing import PackedDataset, pack_dataset
from hf_sft_plugin.models.attention_choice import AttentionChoice
from hf_sft_plugin.training.config import MaskedSFTConfig


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
