"""Models and tokenizers: found by name, fit for each other, able to pad and to stop."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_sft_plugin.models.loading import limit_length, load_model, load_tokenizer, stop_tokens


@pytest.fixture
def folder(model: Any, tokenizer: Any, tmp_path: Path) -> Path:
    """A saved model with its tokenizer."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("name", [str, Path])
@pytest.mark.parametrize("arguments", [None, {}, {"dtype": torch.float64}, '{"dtype": "float64"}'])
def test_a_model_is_loaded_from_its_path(
    name: Callable[[Path], Any], arguments: Any, folder: Path, model: Any
) -> None:
    loaded = load_model(name(folder), arguments)
    dtype = torch.float64 if arguments else torch.float32
    assert loaded.dtype == dtype
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor.to(dtype))


@pytest.mark.parametrize(
    ("arguments", "peft_config", "dtype"),
    [
        (None, None, torch.float32),
        ({"dtype": "bfloat16"}, None, torch.bfloat16),
        ({"dtype": "auto"}, None, torch.bfloat16),
        ({"torch_dtype": "bfloat16"}, None, torch.bfloat16),
        (None, LoraConfig(), torch.bfloat16),
        ({"dtype": "float32"}, LoraConfig(), torch.float32),
    ],
)
def test_weights_that_are_trained_are_float32_unless_asked_otherwise(
    arguments: Any, peft_config: Any, dtype: torch.dtype, model: Any, tmp_path: Path
) -> None:
    model.bfloat16().save_pretrained(tmp_path)
    assert load_model(str(tmp_path), arguments, peft_config).dtype == dtype


def test_a_model_that_is_there_is_taken_as_it_is(model: Any) -> None:
    assert load_model(model, None) is model
    assert load_model(model, {}) is model


@pytest.mark.parametrize("arguments", [{"dtype": "float64"}, '{"dtype": "float64"}'])
def test_arguments_for_a_model_that_is_there_are_refused(arguments: Any, model: Any) -> None:
    with pytest.raises(ValueError, match="model_init_kwargs was given together with a model"):
        load_model(model, arguments)


def test_the_tokenizer_of_a_loaded_model_is_found(folder: Path, tokenizer: Any) -> None:
    loaded = load_model(str(folder), None)
    for model in (loaded, get_peft_model(loaded, LoraConfig(task_type="CAUSAL_LM", r=2))):
        found = load_tokenizer(None, model, None)
        assert found.get_vocab() == tokenizer.get_vocab()
        assert found.chat_template == tokenizer.chat_template


def test_a_model_without_a_name_has_no_tokenizer(model: Any) -> None:
    with pytest.raises(ValueError, match=r"There is no tokenizer.*as processing_class\.$"):
        load_tokenizer(None, model, None)


def test_a_folder_without_a_tokenizer_is_no_empty_tokenizer(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"a model but no tokenizer.*as processing_class"):
        load_tokenizer(None, load_model(str(tmp_path), None), None)


def test_what_is_no_tokenizer_is_refused_by_its_type(model: Any) -> None:
    with pytest.raises(ValueError, match=r"is a dict, but text needs a tokenizer.*\.tokenizer"):
        load_tokenizer({}, model, None)  # type: ignore[arg-type]


def test_a_tokenizer_that_can_pad_and_stop_stays_as_it_is(model: Any, tokenizer: Any) -> None:
    assert load_tokenizer(tokenizer, model, None) is tokenizer
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)


@pytest.mark.parametrize(("stop_token", "pad_token_id"), [(None, 2), ("<|im_start|>", 1)])
def test_a_tokenizer_without_a_pad_token_pads_with_its_stop_token(
    stop_token: str | None, pad_token_id: int, model: Any, tokenizer_factory: Any
) -> None:
    tokenizer = load_tokenizer(tokenizer_factory(pad_token=None), model, stop_token)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == pad_token_id


def test_without_a_stop_token_nothing_can_be_trained(model: Any, tokenizer_factory: Any) -> None:
    with pytest.raises(ValueError, match=r"has no eos token.*tokenizer\.eos_token, or stop_token"):
        load_tokenizer(tokenizer_factory(eos_token=None), model, None)


@pytest.mark.parametrize("eos_token", [None, "<|endoftext|>"])
def test_the_stop_token_becomes_the_eos_token(
    eos_token: str | None, model: Any, tokenizer_factory: Any
) -> None:
    tokenizer = load_tokenizer(tokenizer_factory(eos_token=eos_token), model, "<|im_start|>")
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_start|>", 1)
    assert len(tokenizer) == 300


@pytest.mark.parametrize("stop_token", ["<|eot|>", "hello world", ""])
def test_an_unknown_stop_token_is_refused_and_changes_nothing(
    stop_token: str, model: Any, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match="is not a token of the tokenizer's vocabulary"):
        load_tokenizer(tokenizer, model, stop_token)
    assert (tokenizer.eos_token, len(tokenizer)) == ("<|im_end|>", 300)


@pytest.mark.parametrize("vocab_size", [300, 320])
def test_an_embedding_may_be_larger_than_the_vocabulary(
    vocab_size: int, model_factory: Any, tokenizer: Any
) -> None:
    assert load_tokenizer(tokenizer, model_factory(vocab_size=vocab_size), None) is tokenizer


def test_a_vocabulary_larger_than_the_embedding_is_refused(model: Any, tokenizer: Any) -> None:
    tokenizer.add_tokens(["<|extra|>"])
    with pytest.raises(ValueError, match="301 tokens but the model embeds only 300,"):
        load_tokenizer(tokenizer, model, None)
    model.resize_token_embeddings(len(tokenizer))
    assert load_tokenizer(tokenizer, model, None) is tokenizer


@pytest.mark.parametrize(
    ("eos_token_id", "stop_token", "expected"),
    [
        (None, None, {2}),
        (2, None, {2}),
        (0, None, {0, 2}),
        ([0, 2], None, {0, 2}),
        ([0, 1], None, {0, 1, 2}),
        ([0, 1], "<|im_end|>", {2}),
    ],
)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_the_stop_tokens_are_those_of_tokenizer_and_generation_unless_one_is_named(
    eos_token_id: Any,
    stop_token: str | None,
    expected: set[int],
    with_adapter: bool,
    model: Any,
    tokenizer: Any,
) -> None:
    model.generation_config.eos_token_id = eos_token_id
    if with_adapter:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2))
    assert stop_tokens(model, tokenizer, stop_token) == expected


def test_stop_tokens_saved_with_a_model_are_found_again(folder: Path, tokenizer: Any) -> None:
    path = folder / "generation_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token_id": [1, 2]}))
    assert stop_tokens(load_model(str(folder), None), tokenizer, None) == {1, 2}


def test_a_model_that_cannot_generate_has_the_stop_token_of_its_tokenizer(
    model: Any, tokenizer: Any
) -> None:
    model.generation_config = None
    assert stop_tokens(model, tokenizer, None) == {2}


@pytest.mark.parametrize(
    ("of_tokenizer", "of_model", "max_length", "expected"),
    [
        (10**30, 256, None, 256),
        (100, 256, None, 100),
        (1000, 256, None, 256),
        (100, None, None, 100),
        (10**30, None, None, None),
        (100, 256, 50, 50),
        (100, 256, 150, 150),
        (10**30, None, 150, 150),
    ],
)
def test_rows_are_as_long_as_asked_else_as_tokenizer_and_model_allow(
    of_tokenizer: int,
    of_model: int | None,
    max_length: int | None,
    expected: int | None,
    model_factory: Any,
    tokenizer: Any,
) -> None:
    tokenizer.model_max_length = of_tokenizer
    if of_model is None:
        model = model_factory("bloom", hidden_size=32, n_layer=1, n_head=2)
        del model.config.max_position_embeddings
    else:
        model = model_factory(max_position_embeddings=of_model)
    assert limit_length(tokenizer, model, max_length) == expected


def test_a_config_with_another_name_for_its_length_is_understood(
    model_factory: Any, tokenizer: Any
) -> None:
    small = {"n_positions": 64, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_inner": 8}
    names = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = model_factory("gpt2", **small, **names, max_position_embeddings=64)
    assert limit_length(tokenizer, model, None) == 64


LEARNED = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize("max_length", [16, 17, 1024])
def test_learned_positions_are_a_limit(max_length: int, model_factory: Any, tokenizer: Any) -> None:
    model = model_factory("gpt2", **LEARNED, n_inner=8, max_position_embeddings=16)
    if max_length == 16:
        assert limit_length(tokenizer, model, max_length) == 16
        return
    with pytest.raises(ValueError, match=rf"max_length is {max_length:,}, .*16 positions"):
        limit_length(tokenizer, model, max_length)


def test_rotary_positions_go_on_with_a_warning(
    model_factory: Any, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_factory(max_position_embeddings=16)
    assert limit_length(tokenizer, model, 16) == 16
    assert caplog.text == ""
    assert limit_length(tokenizer, model, 64) == 64
    assert "max_length is 64, but the model was made for 16 positions" in caplog.text


def test_loading_leaves_the_folder_as_it_was(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "before")
    load_tokenizer(None, load_model(str(folder), None), "<|im_start|>")
    for path in (tmp_path / "before").iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
