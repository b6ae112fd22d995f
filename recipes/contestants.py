"""Who takes part in a benchmark, and what all of them train: the same model on the same rows."""

import importlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, load_dataset
from quickstart import build_model, train_tokenizer
from transformers import (
    DataCollatorForSeq2Seq,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_sft_plugin import (
    IGNORE_INDEX,
    MaskedSFTConfig,
    MaskedSFTTrainer,
    keep_freed_memory,
    prepare_dataset,
)

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 8192,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "qwen3-0.6b": {
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}


@dataclass
class Setup:
    """What is measured; the same for every contestant.

    Attributes:
        shape: Name of a model shape.
        rows: Path of rows with the columns `question` and `answer`; None makes rows up.
        batch_size: Rows of one micro-batch.
        accumulation: Micro-batches of one optimizer step.
        repetitions: Measured optimizer steps, after one that is not.
        precision: `bf16` (autocast) or `float32`.
        threads: Threads of each process on a CPU.
        responses_per_prompt: Rows in a row that have the question of the first of them.
    """

    shape: str
    rows: str | None
    batch_size: int
    accumulation: int
    repetitions: int
    precision: str
    threads: int
    responses_per_prompt: int = 1


def make_model(setup: Setup, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The untrained model, with the same weights for everyone."""
    set_seed(0)
    fields = {"model_type": "qwen3", "tie_word_embeddings": True, "max_position_embeddings": 4096}
    return build_model({**fields, **SHAPES[setup.shape]}, tokenizer)


def make_rows(setup: Setup) -> tuple[Dataset, PreTrainedTokenizerBase]:
    """Tokenized rows, as many as will be needed, and the tokenizer that made them."""
    count = setup.batch_size * setup.accumulation * (setup.repetitions + 1)
    if setup.rows is not None:
        raw = load_dataset("json", data_files=setup.rows, split=f"train[:{count}]")
    else:
        raw = Dataset.from_list(invent_rows(count))
    questions = raw["question"]
    same = [questions[row - row % setup.responses_per_prompt] for row in range(len(raw))]
    raw = Dataset.from_dict({"question": same, "answer": raw["answer"]})
    texts = [text for column in ("question", "answer") for text in raw[column]]
    tokenizer = train_tokenizer(texts, vocab_size=8192)
    prepared, _ = prepare_dataset(
        raw,
        tokenizer,
        prompt_column="question",
        response_column="answer",
        prompt_format="chat",
    )
    return prepared, tokenizer


def invent_rows(count: int) -> list[dict[str, str]]:
    """Questions three times as long as their answers, with lengths that vary as real ones do."""
    rng = random.Random(0)  # noqa: S311  # nothing secret is drawn
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(500)]

    def text(mean: float) -> str:
        return " ".join(rng.choices(words, k=max(2, int(mean * rng.lognormvariate(0, 0.5)))))

    return [{"question": text(90), "answer": text(30)} for _ in range(count)]


def with_labels(rows: Dataset) -> Dataset:
    """The form that other trainers take: `labels` instead of `response_mask`."""

    def to_labels(row: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(row["input_ids"], row["response_mask"], strict=True)
        return {"labels": [token if trained else IGNORE_INDEX for token, trained in pairs]}

    return rows.map(to_labels, remove_columns=rows.column_names).add_column(
        "input_ids", rows["input_ids"]
    )


def ours(
    model: Any, rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> Trainer:
    """This plugin as it comes."""
    args = MaskedSFTConfig(**settings)
    return MaskedSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)


def plain(
    model: Any, rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> Trainer:
    """The Trainer of transformers with the model's own loss; it logs neither entropy nor hits."""
    return Trainer(
        model,
        TrainingArguments(**settings),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        train_dataset=with_labels(rows),
        processing_class=tokenizer,
    )


def trl_default(
    model: Any, rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> Trainer:
    """TRL's SFTTrainer as it comes; only its limit of 1024 tokens is lifted."""
    trl = importlib.import_module("trl")
    trainer: Trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(**{"max_length": None, **settings}),
        train_dataset=with_labels(rows),
        processing_class=tokenizer,
    )
    return trainer


def trl_best(
    model: Any, rows: Dataset, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any]
) -> Trainer:
    """TRL's SFTTrainer without gradient checkpointing and without padding."""
    best = {**settings, "gradient_checkpointing": False, "padding_free": True}
    return trl_default(model, rows, tokenizer, best)


def with_allocator(contestant: Callable[..., Trainer]) -> Callable[..., Trainer]:
    """A contestant whose process keeps the memory that it frees."""

    def take_part(*arguments: Any) -> Trainer:
        keep_freed_memory()
        return contestant(*arguments)

    return take_part


CONTESTANTS: dict[str, Callable[..., Trainer]] = {
    "ours": ours,
    "plain": plain,
    "trl-default": trl_default,
    "trl-best": trl_best,
    # The others with the allocator setting that we make ourselves.
    "plain+allocator": with_allocator(plain),
    "trl-default+allocator": with_allocator(trl_default),
    "trl-best+allocator": with_allocator(trl_best),
}
