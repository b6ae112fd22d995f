"""What users build on is frozen: a change to it has to change this file knowingly."""

import ast
import dataclasses
import importlib
import inspect
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import Trainer, TrainingArguments

import hf_sft_plugin
from hf_sft_plugin import MaskedLossMixin, MaskedSFTConfig, MaskedSFTTrainer, RowError

# Names and parameters; `name=value` where there is a default.
SIGNATURES = {
    "DataCollatorForPromptResponse": "tokenizer, *, pad_to_multiple_of=None, "
    "return_response_mask=True, stop_token_ids=None, **options",
    "GeneratedResponse": "prompt, response, reference, num_tokens=0, is_stopped=False",
    "MaskedLossMixin": "*args, **kwargs",
    "MaskedSFTTrainer": "model=None, args=None, data_collator=None, train_dataset=None, "
    "eval_dataset=None, processing_class=None, peft_config=None, compute_metrics=None, "
    "callbacks=(), optimizers=(None, None), optimizer_cls_and_kwargs=None, "
    "preprocess_logits_for_metrics=None, model_init=None, **others",
    "RowError": "row, problem, reason",
    "ShardDataset": "folder, split='train', block_size=None, use_loss_mask=True",
    "check_shard_destination": "folder, *, overwrite",
    "check_tokenizer": "folder, tokenizer",
    "compute_entropy": "logits",
    "diff_rows": "dataset, here, there, *, num_rows=5, containing=None, source=None",
    "get_response_log_probs": "model, input_ids, labels, return_token_entropy=False",
    "head_loss": "head, hidden_states, targets, weights, *, transform=None, objective=None, "
    "forward=None, weight=None",
    "make_tokenization_setup": "tokenizer, options, model",
    "mix_datasets": "datasets, weights=None, *, seed=0",
    "masked_normalize": "tensor, mask, dim=None, normalize_constant=1.0",
    "PackedDataset": "rows, lengths, max_length",
    "pack_dataset": "rows, max_length",
    "parse_prepare_arguments": "argv, prog=None",
    "keep_freed_memory": "",
    "prepare_files": "files, options",
    "read_chat_template": "path",
    "read_rows": "path, split, setting='train_split'",
    "prepare_dataset": "dataset, tokenizer, *, stop_token_ids=None, max_dropped_share=0.05, "
    "num_proc=None, eval_masks=(), **options",
    "prepare_stream": "dataset, tokenizer, *, stop_token_ids=None, max_dropped_share=0.05, "
    "name='train', eval_masks=(), **options",
    "preview_rows": "dataset, tokenizer, *, num_rows=5, only=None, containing=None, source=None, "
    "stop_token_ids=None, **options",
    "show_preview": "dataset, setup, arguments, *, against=None, console=None",
    "is_shard_set": "folder",
    "verify_shards": "folder",
    "verify_training": "trainer, *, stop_on_failure=True",
    "visible_lines": "text",
    "VerificationCheck": "name, value, bound, note, remedy=''",
    "VerificationError": "checks",
    "write_preview_page": "path, rows, *, diff=None, show_ids=False, title='What is trained'",
    "write_shards": "folder, splits, tokenizer, *, ledgers=None, certificates=None, "
    "max_tokens_per_shard=268435456, overwrite=False",
    "sft_microbatch_train_step": "policy_log_probs, response_mask, gradient_accumulation_steps, "
    "normalize_constant=1.0",
    "tokenize_example": "example, tokenizer, *, stop_token_ids=None, **options",
    "tokenize_prompt_and_output": "prompt_strs, output_strs, tokenizer",
}
# Names without a signature of their own.
OTHER_NAMES = {
    "DataOptions",
    "Diff",
    "ExactMatch",
    "HeadLoss",
    "IGNORE_INDEX",
    "Ledger",
    "LogitTransform",
    "LossNormalization",
    "LossObjective",
    "LossType",
    "MaskedSFTConfig",
    "PrepareArguments",
    "PreviewArguments",
    "PreviewedRow",
    "ShardSet",
    "TokenizationSetup",
}

# Fields of MaskedSFTConfig that TrainingArguments does not have, or has with another default.
CONFIG_FIELDS = {
    "max_length": None,
    "overflow": "keep_start",
    "prompt_column": None,
    "response_column": None,
    "messages_column": None,
    "prompt_format": "plain",
    "data_format": "auto",
    "ignored_columns": None,
    "chat_template_kwargs": None,
    "train_on": "response",
    "train_roles": ["assistant"],
    "use_loss_mask": True,
    "multi_turn": "auto",
    "boundary": "split",
    "control_tokens": "text",
    "stop_token": None,
    "loss_normalization": "token",
    "normalize_constant": None,
    "loss_type": "nll",
    "focal_gamma": None,
    "z_loss_coef": 0.0,
    "entropy_coef": 0.0,
    "fused_head": "auto",
    "padding_free": "auto",
    "shared_prompts": "auto",
    "trained_positions_only": "auto",
    "fused_layers": "auto",
    "group_by_prompt": False,
    "max_tokens_per_microbatch": "auto",
    "auto_gradient_checkpointing": False,
    "packing": False,
    "verify_before_training": False,
    "keep_freed_memory": True,
    "max_dropped_share": 0.05,
    "dataset_num_proc": None,
    "chat_template_path": None,
    "model_tags": None,
    "pad_to_multiple_of": None,
    "model_init_kwargs": None,
    "eval_masks": [],
    "predict_with_generate": False,
    "generation_metrics": ["exact_match"],
    "generation_max_new_tokens": 256,
    "generation_num_rows": None,
    "remove_unused_columns": False,
    "logging_nan_inf_filter": False,
    "logging_steps": 10,
    "activation_checkpointing": None,
    "activation_checkpointing_kwargs": None,
}

TRAIN_KEYS = {"loss", "token_entropy", "token_accuracy", "num_response_tokens", "num_tokens"}


def parameters(function: Any) -> str:
    """The parameters without their types."""
    signature = inspect.signature(function)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(bare))[1:-1]


def test_the_public_names_are_these_and_no_others() -> None:
    assert set(hf_sft_plugin.__all__) == set(SIGNATURES) | OTHER_NAMES


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_as_it_was(name: str) -> None:
    assert parameters(getattr(hf_sft_plugin, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", sorted(set(SIGNATURES) | OTHER_NAMES - {"IGNORE_INDEX"}))
def test_every_public_name_says_what_it_is(name: str) -> None:
    documentation = inspect.getdoc(getattr(hf_sft_plugin, name)) or ""
    assert documentation.split("\n")[0].endswith((".", ":")), documentation


def test_the_own_fields_of_the_config_are_these() -> None:
    def default(field: Any) -> Any:
        has_factory = field.default_factory is not dataclasses.MISSING
        return field.default_factory() if has_factory else field.default

    inherited = {f.name: default(f) for f in dataclasses.fields(TrainingArguments)}
    own = {
        field.name: default(field)
        for field in dataclasses.fields(MaskedSFTConfig)
        if field.name not in inherited or inherited[field.name] != default(field)
    }
    # What a copy hands on is no setting.
    assert own.pop("resolved_checkpointing") is None
    # From transformers 5.24 on it has these as well.
    own |= {name: None for name in inherited if name.startswith("activation_checkpointing")}
    assert own == CONFIG_FIELDS


def test_every_field_of_the_config_has_a_help_text() -> None:
    own = set(CONFIG_FIELDS)
    fields = [field for field in dataclasses.fields(MaskedSFTConfig) if field.name in own]
    assert all(str(field.metadata["help"]).endswith((".", ")")) for field in fields)


def test_the_trainer_is_the_mixin_in_front_of_the_trainer() -> None:
    assert MaskedSFTTrainer.__bases__ == (MaskedLossMixin, Trainer)


def test_the_log_keys_are_these(
    chat_rows: list[dict[str, Any]],
    model: Any,
    tokenizer: Any,
    make_config: Callable[..., MaskedSFTConfig],
) -> None:
    trainer = MaskedSFTTrainer(
        model,
        make_config(max_steps=1),
        train_dataset=Dataset.from_list(chat_rows),
        eval_dataset=Dataset.from_list(chat_rows),
        processing_class=tokenizer,
    )
    trainer.train()
    log, summary = trainer.state.log_history
    assert set(log) == TRAIN_KEYS | {"grad_norm", "learning_rate", "epoch", "step"}
    assert {"train_loss", "train_token_entropy", "train_token_accuracy"} <= set(summary)
    speed = {"eval_runtime", "eval_samples_per_second", "eval_steps_per_second"}
    expected = {f"eval_{key}" for key in TRAIN_KEYS} | {"eval_perplexity"} | speed | {"epoch"}
    assert set(trainer.evaluate()) == expected


# What is imported, one after the other in one process; modules that have come by then, and modules
# that have not. What a run may never need waits for its first use.
IMPORTS = [
    ("import hf_sft_plugin", "hf_sft_plugin", "torch transformers hf_sft_plugin.types"),
    (
        "from hf_sft_plugin import compute_entropy, masked_normalize",
        "torch hf_sft_plugin.loss.masked_loss",
        "transformers datasets accelerate peft hf_sft_plugin.tokens hf_sft_plugin.training",
    ),
    (
        "from hf_sft_plugin import DataCollatorForPromptResponse",
        "transformers datasets hf_sft_plugin.batches.collator",
        "accelerate peft hf_sft_plugin.preparation.prepare hf_sft_plugin.training",
    ),
    (
        "from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer",
        "accelerate peft hf_sft_plugin.preparation.prepare "
        "hf_sft_plugin.verification.verification_mixin",
        "rich transformers.hf_argparser hf_sft_plugin.cli.main hf_sft_plugin.preview.preview "
        "hf_sft_plugin.cli.prepare_files hf_sft_plugin.shards.writer "
        "hf_sft_plugin.verification.first_step hf_sft_plugin.training.run_summary "
        "hf_sft_plugin.verification.verification",
    ),
    (
        "hf_sft_plugin.__getattr__('rows')",
        "rich hf_sft_plugin.preview.preview hf_sft_plugin.verification.verification",
        "evaluate matplotlib trl torch.nn.attention.varlen "
        "hf_sft_plugin.loss.triton_tile hf_sft_plugin.reporting.plots",
    ),
]


@pytest.fixture(scope="module")
def modules_by_import() -> dict[str, set[str]]:
    """The modules of a fresh process after each of the imports."""
    lines = [f"{line}; print(json.dumps([{line!r}, *sys.modules]))" for line, _, _ in IMPORTS]
    output = subprocess.run(
        [sys.executable, "-c", "\n".join(["import json, sys", *lines])],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = [json.loads(line) for line in output.splitlines() if line.startswith('["')]
    return {line: set(modules) for line, *modules in found}


@pytest.mark.parametrize(("line", "brought", "absent"), IMPORTS, ids=lambda text: text[:60])
def test_an_import_brings_what_it_needs_and_nothing_else_that_takes_long(
    line: str, brought: str, absent: str, modules_by_import: dict[str, set[str]]
) -> None:
    modules = modules_by_import[line]
    assert set(brought.split()) - modules == set()
    assert set(absent.split()) & modules == set()


def test_what_type_checkers_read_is_what_is_imported() -> None:
    tree = ast.parse(Path(str(hf_sft_plugin.__file__)).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    read = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(read) == sorted(hf_sft_plugin.__all__)
    for name, module in read.items():
        value = getattr(importlib.import_module(str(module)), name)
        assert hf_sft_plugin.__getattr__(name) is value
        assert vars(hf_sft_plugin)[name] is value
        # The module that defines it, and not another that imports it.
        assert getattr(value, "__module__", module) == module


def test_names_are_listed_before_they_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in hf_sft_plugin.__all__:
        monkeypatch.delitem(vars(hf_sft_plugin), name, raising=False)
    assert set(dir(hf_sft_plugin)) >= {*hf_sft_plugin.__all__, "__all__", "__doc__"}
    namespace: dict[str, Any] = {}
    exec("from hf_sft_plugin import *", namespace)  # noqa: S102  # as a user may write it
    assert set(hf_sft_plugin.__all__) <= set(namespace)
    assert namespace["RowError"] is RowError


@pytest.mark.parametrize("room", ["rows", "loss", "reporting", "training", "types"])
def test_a_room_is_an_attribute_of_the_package(room: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(hf_sft_plugin, room)
    assert getattr(hf_sft_plugin, room) is sys.modules[f"hf_sft_plugin.{room}"]


def test_a_name_that_does_not_exist_is_an_error_as_ever() -> None:
    with pytest.raises(AttributeError, match="'hf_sft_plugin' has no attribute 'prepare'"):
        _ = hf_sft_plugin.prepare
    with pytest.raises(ImportError, match="cannot import name 'prepare' from 'hf_sft_plugin'"):
        exec("from hf_sft_plugin import prepare", {})  # noqa: S102  # as a user may write it


def test_a_class_is_pickled_by_the_module_that_defines_it() -> None:
    assert pickle.loads(pickle.dumps(RowError)) is RowError  # noqa: S301  # pickled here
    assert RowError.__module__ == "hf_sft_plugin.types"
