"""What everyone in a benchmark trains: the same model on the same rows."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from measuring import device_name
from peft import LoraConfig, get_peft_model
from quickstart import CHAT_TEMPLATE, build_model, train_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_sft_plugin import prepare_dataset

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
    "small": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
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
    "qwen3-8b": {
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
    },
}

# Words of a question and of its answer in rows made up, before the length of each is drawn.
WORDS = {"3:1": (90, 30), "1:1": (60, 60), "1:4": (24, 96)}

_LORA_RANK = 16
# Other trainers train all that follows a prompt, so nothing may follow the stop token.
_TEMPLATE = CHAT_TEMPLATE.replace("<|im_end|>\n", "<|im_end|>")


@dataclass
class Setup:
    """What is measured; the same for every contestant.

    Attributes:
        shape: Name of a model shape.
        rows: Path of rows with the columns `question` and `answer`; None makes rows up.
        batch_size: Rows of one micro-batch.
        accumulation: Micro-batches of one optimizer step.
        repetitions: Measured turns.
        precision: `bf16` (autocast) or `float32`.
        threads: Threads of each process on a CPU.
        responses_per_prompt: Rows in a row that have the question of the first of them.
        prompt_to_response: How long questions are for their answers in rows made up.
        lora: Whether an adapter on all linear layers but the head is trained instead of the model.
        steps_per_turn: Optimizer steps of a turn.
        memory_limit: GiB that a process may take; None lets it take all there are.
        model: Folder or Hub name of a trained model; None makes an untrained one of this shape.
    """

    shape: str
    rows: str | None
    batch_size: int
    accumulation: int
    repetitions: int
    precision: str
    threads: int
    responses_per_prompt: int = 1
    prompt_to_response: str = "3:1"
    lora: bool = False
    steps_per_turn: int = 1
    memory_limit: float | None = None
    model: str | None = None

    @property
    def step_size(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size * self.accumulation


@dataclass
class Rows:
    """The same rows in two forms, and the tokenizer between them.

    Attributes:
        raw: With the columns `prompt` and `completion`, both lists of messages.
        tokenized: With the columns `input_ids` and `response_mask`.
        tokenizer: That of the trained model, or one that has learnt its merges from the rows.
    """

    raw: Dataset
    tokenized: Dataset
    tokenizer: PreTrainedTokenizerBase


def make_model(setup: Setup, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The model, with its adapter if there is one: the same weights for everyone."""
    set_seed(0)
    if setup.model is None:
        fields = {
            "model_type": "qwen3",
            "tie_word_embeddings": True,
            "max_position_embeddings": 4096,
        }
        model = build_model({**fields, **SHAPES[setup.shape]}, tokenizer)
    else:
        model = AutoModelForCausalLM.from_pretrained(setup.model, dtype=torch.float32)
    if not setup.lora:
        return model
    adapter = LoraConfig(
        task_type="CAUSAL_LM", r=_LORA_RANK, lora_alpha=_LORA_RANK, target_modules="all-linear"
    )
    return get_peft_model(model, adapter)


def make_rows(setup: Setup, num_rows: int, keeps_all: bool = False) -> Rows:
    """Rows of a file, or rows made up, as text and as tokens.

    Args:
        setup: Says which.
        num_rows: How many are needed; a file with fewer is read again and again.
        keeps_all: Whether a file with more rows is taken whole.
    """
    if setup.rows is None:
        found = invent_rows(num_rows, setup.prompt_to_response)
    else:
        found = load_dataset("json", data_files=setup.rows, split="train").to_list()
    count = max(num_rows, len(found)) if keeps_all else num_rows
    chosen = [found[row % len(found)] for row in range(count)]
    questions, answers = ([row[column] for row in chosen] for column in ("question", "answer"))
    questions = [questions[row - row % setup.responses_per_prompt] for row in range(count)]
    if setup.model is None:
        tokenizer = train_tokenizer([*questions, *answers], vocab_size=8192)
        tokenizer.chat_template = _TEMPLATE
    else:
        tokenizer = AutoTokenizer.from_pretrained(setup.model)
    raw = Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": text}] for text in questions],
            "completion": [[{"role": "assistant", "content": text}] for text in answers],
        }
    )
    return Rows(raw, prepare_dataset(raw, tokenizer)[0], tokenizer)


def invent_rows(count: int, prompt_to_response: str = "3:1") -> list[dict[str, str]]:
    """Questions and answers in a ratio of `WORDS`, with lengths that vary as real ones do."""
    rng = random.Random(0)  # noqa: S311  # nothing secret is drawn
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(500)]
    question, answer = WORDS[prompt_to_response]

    def text(mean: float) -> str:
        return " ".join(rng.choices(words, k=max(2, int(mean * rng.lognormvariate(0, 0.5)))))

    return [{"question": text(question), "answer": text(answer)} for _ in range(count)]


def row_lengths(rows: Rows) -> list[int]:
    """Tokens of each row."""
    return [len(tokens) for tokens in rows.tokenized["input_ids"]]


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """The share of padding, 0 to 1, where every row of a micro-batch is as long as the longest.

    Examples:
        >>> padding_share([4, 2, 1, 1], batch_size=2)
        0.2
    """
    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    padded = sum(len(batch) * max(batch) for batch in batches)
    return (padded - sum(lengths)) / padded


def describe(setup: Setup, lengths: Sequence[int]) -> str:
    """What is trained on rows of which lengths, for the title of a table."""
    made_up = f"made up at {setup.prompt_to_response}"
    source = made_up if setup.rows is None else Path(setup.rows).name
    padding = padding_share(lengths, setup.batch_size)
    trained = f"LoRA r={_LORA_RANK}" if setup.lora else "all weights"
    model = setup.shape if setup.model is None else Path(setup.model).name
    return (
        f"{setup.accumulation} x {setup.batch_size} rows ({source}, "
        f"{setup.responses_per_prompt} per prompt, {padding:.0%} padding), {model}, "
        f"{trained}, {setup.precision}, {device_name(setup.threads)}"
    )
