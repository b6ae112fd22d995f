"""The mask certificate: what was proven of which masks, small enough to travel with the model."""

import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Collection
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_sft_plugin.types import DataOptions

_CONFIG = "tokenizer_config.json"
# The rooms whose code decides what a row becomes; how rows are shown or stored is not among it.
_ROOMS = ("encoding", "masks", "preparation", "rows", "tokens")
_PACKAGE = Path(__file__).parents[1]
# Where a tokenizer came from, and what is done with its tokens.
_NOT_OF_TOKENS = {
    *("name_or_path", "is_local", "local_files_only", "chat_template"),
    *("model_max_length", "padding_side", "truncation_side"),
}


def certify_masks(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, options: DataOptions
) -> dict[str, Any]:
    """Names the masks of a prepared dataset, and everything that they came from, by digests.

    Two datasets with the same `masks_sha256` and `tokens_sha256` train the same tokens.

    Args:
        dataset: With `input_ids` and `response_mask`; every mask of it has been proven.
        tokenizer: Made it.
        options: Made it.

    Returns:
        Plain values for a JSON file.
    """
    template = tokenizer.chat_template
    return {
        "num_examples": len(dataset),
        "tokens_sha256": _digest_column(dataset, "input_ids"),
        "masks_sha256": _digest_column(dataset, "response_mask"),
        "tokenizer_sha256": tokenizer_digest(tokenizer),
        "chat_template_sha256": _digest(json.dumps(template)) if template else None,
        "options": asdict(options),
        "code_sha256": code_digest(),
        "versions": _versions(),
    }


def preparation_key(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    options: DataOptions,
    stop_token_ids: Collection[int] | None,
    has_eval_masks: bool = False,
) -> str:
    """Names a preparation: the same key means the same result, whichever process made it."""
    parts = [
        dataset._fingerprint,
        tokenizer_digest(tokenizer),
        tokenizer.chat_template,
        tokenizer.model_max_length,
        asdict(options),
        None if stop_token_ids is None else sorted(stop_token_ids),
        code_digest(),
        _versions(),
        has_eval_masks,
    ]
    # As long as the fingerprints of datasets itself are.
    return _digest(json.dumps(parts, default=str))[:16]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of everything that makes a tokenizer's tokens, whatever it was called for last."""
    if tokenizer.is_fast:
        text = tokenizer.backend_tokenizer.to_str()
        # Before this come padding and truncation, which a call leaves behind.
        text = text[text.index('"added_tokens"') :]
    else:
        text = json.dumps([sorted(tokenizer.get_vocab().items()), _digest_files(tokenizer)])
    return _digest(f"{type(tokenizer).__name__} {tokenizer.special_tokens_map} {text}")


def _digest_files(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """The files in which a tokenizer is saved, but for what in them makes no tokens."""
    digests = []
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        # Chat templates have a digest of their own.
        paths = (path for path in Path(folder).rglob("*") if path.suffix != ".jinja")
        for path in sorted(path for path in paths if path.is_file()):
            content = path.read_bytes()
            if path.name == _CONFIG:
                # Loading adds names without a value to those that were saved.
                kept = {
                    name: value
                    for name, value in json.loads(content).items()
                    if name not in _NOT_OF_TOKENS and value is not None
                }
                content = json.dumps(kept, sort_keys=True).encode()
            name = path.relative_to(folder).as_posix()
            digests.append((name, hashlib.sha256(content).hexdigest()))
    return digests


@lru_cache
def code_digest(package: Path = _PACKAGE) -> str:
    """SHA-256 of the code that decides what a row becomes: a changed one meets no old cache."""
    sources = [path for room in _ROOMS for path in sorted((package / room).rglob("*.py"))]
    sources.append(package / "types.py")
    return _digest("\n".join(path.read_text(encoding="utf-8") for path in sources))


def _versions() -> dict[str, str]:
    """Of the libraries that write and cut texts."""
    names = ("transformers", "tokenizers", "jinja2")
    return {name: importlib.metadata.version(name) for name in names}


def _digest_column(dataset: Dataset, column: str) -> str:
    digest = hashlib.sha256()
    table = dataset.with_format("arrow")
    for batch in table.iter(10_000):
        values = batch.column(column).combine_chunks()
        lengths = values.value_lengths().to_numpy()
        digest.update(lengths.astype(np.int64).tobytes())
        digest.update(values.flatten().cast(pa.int32()).to_numpy().tobytes())
    return digest.hexdigest()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
