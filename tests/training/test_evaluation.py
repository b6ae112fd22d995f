"""Generation stops where it should, in any batch, and metrics judge the right texts."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import evaluate
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, Value
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from hf_sft_plugin import ExactMatch, GeneratedResponse, RowError, prepare_dataset
from hf_sft_plugin.training import evaluation
from hf_sft_plugin.training.evaluation import (
    examples_to_answer,
    generate,
    generate_responses,
    generation_figures,
    judge,
    last_prompt,
    load_metric,
    with_whole_reference,
)


class ResponseLength(evaluate.Metric):
    """A metric of a user's own, which returns more than numbers."""

    def _info(self) -> evaluate.MetricInfo:
        text = Value("string")
        features = Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return {"length": sum(map(len, predictions)) / len(predictions), "note": "not a number"}


def greedy(model: Any, prompt: list[int], stops: set[int], limit: int) -> list[int]:
    """Greedy decoding written out: no cache, no batch, no padding."""
    ids = list(prompt)
    while len(ids) - len(prompt) < limit:
        ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[len(prompt) :]


# Absolute and relative positions, windows shorter than the rows, attention of another kind.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "gpt2": {"n_inner": 48},
    "mistral": {"sliding_window": 4},
    "gemma3_text": {
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.mark.parametrize(
    ("family", "batch_size"), [("qwen3", 1), ("qwen3", 2), *((family, 5) for family in FAMILIES)]
)
def test_generation_is_greedy_and_does_not_depend_on_the_batch(
    family: str, batch_size: int, model_factory: Callable[..., Any]
) -> None:
    model = model_factory(family, initializer_range=0.4, **FAMILIES[family]).double().eval()
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(3, 300, (length,), generator=generator).tolist() for length in (3, 9, 1, 5, 4)
    ]
    free = [greedy(model, prompt, set(), 12) for prompt in prompts]
    # A token that the model does produce, so that some responses stop early.
    stops = {free[0][4], 2}
    found = generate(
        model,
        prompts,
        stop_token_ids=stops,
        pad_token_id=0,
        max_new_tokens=12,
        batch_size=batch_size,
    )
    assert found == [greedy(model, prompt, stops, 12) for prompt in prompts]
    assert any(len(response) < 12 for response in found)
    assert {response[-1] for response in found if len(response) < 12} <= stops


def test_the_mode_of_the_model_is_restored(model: Any) -> None:
    for mode in (True, False):
        model.train(mode)
        generate(model, [[5]], stop_token_ids={2}, pad_token_id=0, max_new_tokens=1, batch_size=1)
        assert model.training == mode


def test_an_adapter_in_training_with_gradient_checkpointing_answers_as_in_evaluation(
    model_factory: Callable[..., Any],
) -> None:
    base = model_factory(initializer_range=0.4)
    torch.manual_seed(1)
    lora = LoraConfig(target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
    model: Any = get_peft_model(base, lora).double()
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14, 15]]
    model.eval()
    expected = [greedy(model, prompt, {2}, 6) for prompt in prompts]
    model.disable_adapter_layers()
    assert expected != [greedy(model, prompt, {2}, 6) for prompt in prompts]
    model.enable_adapter_layers()
    # As a Trainer leaves it in the middle of a training.
    base.gradient_checkpointing_enable({"use_reentrant": False})
    model.config.use_cache = False
    model.train()
    found = generate(
        model, prompts, stop_token_ids={2}, pad_token_id=0, max_new_tokens=6, batch_size=3
    )
    assert found == expected
    assert model.training
    assert base.is_gradient_checkpointing


def test_batches_hold_prompts_of_similar_length(model: Any, monkeypatch: Any) -> None:
    widths = []
    own = type(model).generate

    def watched(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        widths.append(tuple(input_ids.shape))
        return own(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(type(model), "generate", watched)
    prompts = [[5] * length for length in (9, 1, 8, 2, 3)]
    generate(model, prompts, stop_token_ids={2}, pad_token_id=0, max_new_tokens=1, batch_size=2)
    assert widths == [(2, 9), (2, 3), (1, 1)]


@pytest.mark.parametrize(
    "saved",
    [
        {"do_sample": True, "temperature": 5.0},
        {"repetition_penalty": 50.0},
        {"num_beams": 3},
        {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(3, 300, 2))},
        {"min_new_tokens": 8},
    ],
    ids=lambda saved: next(iter(saved)),
)
def test_the_settings_saved_with_a_model_play_no_part(saved: dict[str, Any], model: Any) -> None:
    settings: Any = {"stop_token_ids": {2}, "pad_token_id": 0, "max_new_tokens": 8, "batch_size": 1}
    model.eval()
    expected = [greedy(model, [5, 6], {2}, 8)]
    before = model.generation_config = GenerationConfig(**saved)
    assert generate(model, [[5, 6]], **settings) == expected
    assert model.generation_config is before


def test_a_failed_generation_leaves_the_model_as_it_was(model: Any) -> None:
    before = model.generation_config
    model.train()
    with pytest.raises(IndexError):
        generate(model, [[999]], stop_token_ids={2}, pad_token_id=0, max_new_tokens=2, batch_size=1)
    assert model.generation_config is before
    assert model.training


def test_the_last_response_is_asked_for_with_everything_before_it(tokenizer: Any) -> None:
    example: Any = {
        "input_ids": [5, 6, 7, 2, 9, 5, 6, 8, 8, 2, 9],
        "response_mask": [0, 0, 1, 1, 0, 0, 0, 1, 1, 1, 0],
    }
    assert last_prompt(example) == ([5, 6, 7, 2, 9, 5, 6], [8, 8, 2])


def test_responses_are_text_in_the_order_of_the_rows(tokenizer: Any, model: Any) -> None:
    examples: Any = []
    for prompt, response in (("hello", " world"), ("what is", " this")):
        ids, trained = tokenizer(prompt)["input_ids"], [*tokenizer(response)["input_ids"], 2]
        examples.append(
            {"input_ids": ids + trained, "response_mask": [0] * len(ids) + [1] * len(trained)}
        )
    responses = generate_responses(
        model,
        examples,
        tokenizer,
        Accelerator(cpu=True),
        stop_token_ids={2},
        max_new_tokens=3,
        batch_size=2,
    )
    assert [response.prompt for response in responses] == ["hello", "what is"]
    assert [response.reference for response in responses] == [" world", " this"]


@pytest.mark.parametrize(("num_rows", "num_processes"), [(7, 2), (3, 4), (6, 3)])
def test_every_process_answers_as_many_prompts(
    num_rows: int, num_processes: int, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[int]] = []

    def answer(_: Any, prompts: list[list[int]], **__: Any) -> list[list[int]]:
        asked.append([prompt[0] for prompt in prompts])
        return prompts

    monkeypatch.setattr(evaluation, "generate", answer)
    examples: Any = [{"input_ids": [40 + n, 2], "response_mask": [0, 1]} for n in range(num_rows)]
    answered = [
        generate_responses(
            model=model,
            examples=examples,
            tokenizer=tokenizer,
            accelerator=SimpleNamespace(  # type: ignore[arg-type]
                process_index=rank, num_processes=num_processes, is_main_process=False
            ),
            stop_token_ids={2},
            max_new_tokens=1,
            batch_size=1,
        )
        for rank in range(num_processes)
    ]
    # Where weights are sharded, a process that ran the model less often would keep others waiting.
    assert {len(prompts) for prompts in asked} == {-(-num_rows // num_processes)}
    texts = [response.response for responses in answered for response in responses]
    assert sorted(texts) == sorted(tokenizer.decode([40 + n]) for n in range(num_rows))


def answer_prompts(
    model: Any,
    prompts: list[list[int]],
    tokenizer: Any,
    stops: set[int],
    max_new_tokens: int,
    batch_size: int,
) -> list[GeneratedResponse]:
    examples: Any = [
        {"input_ids": [*prompt, 2], "response_mask": [0] * len(prompt) + [1]} for prompt in prompts
    ]
    return generate_responses(
        model,
        examples,
        tokenizer,
        Accelerator(cpu=True),
        stop_token_ids=stops,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
    )


@pytest.mark.parametrize("batch_size", [1, 4])
def test_responses_end_with_the_positions_of_a_model_and_the_log_says_so(
    batch_size: int, tokenizer: Any, model_factory: Callable[..., Any], caplog: Any
) -> None:
    """Each at its own place, whatever prompts it shares a batch with."""
    sizes = {"max_position_embeddings": 16, "n_positions": 16}
    model = model_factory("gpt2", initializer_range=0.4, **sizes).double().eval()
    prompts = [[*range(5, 5 + length)] for length in (14, 3, 9, 15)]
    responses = answer_prompts(model, prompts, tokenizer, {2}, 8, batch_size)
    room = [2, 8, 7, 1]
    expected = [greedy(model, *each) for each in zip(prompts, [{2}] * 4, room, strict=True)]
    assert [each.num_tokens for each in responses] == [len(tokens) for tokens in expected]
    assert [each.response for each in responses] == [
        tokenizer.decode(tokens, skip_special_tokens=True) for tokens in expected
    ]
    assert (
        "3 of 4 prompts leave less room than generation_max_new_tokens, 8, in the 16" in caplog.text
    )


def test_all_processes_run_as_many_batches_whatever_room_there_is(
    model_factory: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_factory("gpt2", max_position_embeddings=16, n_positions=16)
    calls: list[int] = []
    own = type(model).generate

    def counted(self: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(self, **kwargs)

    monkeypatch.setattr(type(model), "generate", counted)
    shares = [[[5] * 14, [5] * 13], [[5] * 3, [5] * 2]]
    settings: dict[str, Any] = {"stop_token_ids": {2}, "pad_token_id": 0, "max_new_tokens": 8}
    for prompts in shares:
        found = generate(model, prompts, batch_size=2, of_processes=shares, **settings)
        assert all(0 < len(tokens) <= 8 for tokens in found)
        assert len(found) == 2
    assert len(calls) == 4


def test_a_response_tells_how_long_it_is_and_whether_it_stopped(
    tokenizer: Any, model_factory: Callable[..., Any]
) -> None:
    model = model_factory(initializer_range=0.4).eval()
    prompts = [[5, 6, 7], [40], [11, 12, 13, 14]]
    free = [greedy(model, prompt, set(), 6) for prompt in prompts]
    # One response stops at its third token, and one at its fifth, if not before.
    stops = {free[0][2], free[1][4]}
    expected = [greedy(model, prompt, stops, 6) for prompt in prompts]
    responses = answer_prompts(model, prompts, tokenizer, stops, 6, batch_size=2)
    is_stopped = [tokens[-1] in stops for tokens in expected]
    assert 0 < sum(is_stopped) < 3
    assert [response.is_stopped for response in responses] == is_stopped
    assert [response.num_tokens for response in responses] == [len(t) for t in expected]
    texts = [
        tokenizer.decode(tokens[: len(tokens) - stopped], skip_special_tokens=True)
        for tokens, stopped in zip(expected, is_stopped, strict=True)
    ]
    assert [response.response for response in responses] == texts
    assert generation_figures(responses) == {
        "stop_rate": sum(is_stopped) / 3,
        "mean_generated_tokens": sum(map(len, expected)) / 3,
    }


def test_prepared_rows_are_answered_as_they_are_and_raw_rows_are_tokenized(tokenizer: Any) -> None:
    raw = [{"prompt": "hello", "response": " world"}, {"prompt": "what is", "response": " this"}]
    prepared, _ = prepare_dataset(Dataset.from_list(raw), tokenizer)
    for rows in (raw, Dataset.from_list(raw), prepared):
        examples = examples_to_answer(rows, None, tokenizer, stop_token_ids={2})
        assert examples == prepared.to_list()
        assert examples_to_answer(rows, 1, tokenizer) == examples[:1]
        assert examples_to_answer(rows, 9, tokenizer) == examples


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", None])
def test_rows_are_answered_as_they_are_stored_whatever_their_format(
    kind: Any, tokenizer: Any
) -> None:
    raw = Dataset.from_list([{"prompt": "hello", "response": " world", "weight": 0.5}])
    prepared, _ = prepare_dataset(raw, tokenizer)
    for rows in (raw, prepared):
        examples = examples_to_answer(rows.with_format(kind), None, tokenizer)
        assert examples == prepared.to_list()
    shout = raw.with_transform(lambda rows: {**rows, "response": [" WORLD"] * len(rows["prompt"])})
    (example,) = examples_to_answer(shout, None, tokenizer)
    assert tokenizer.decode(last_prompt(example)[1]) == " WORLD<|im_end|>"


def test_raw_rows_are_tokenized_with_the_options_of_the_run(tokenizer: Any) -> None:
    rows = [{"q": "hello", "a": "0 1 2 3 4"}]
    options: Any = {"prompt_column": "q", "response_column": "a", "max_length": 5}
    (example,) = examples_to_answer(rows, None, tokenizer, **options)
    assert len(example["input_ids"]) == 5


def test_a_raw_row_that_cannot_be_answered_is_named(tokenizer: Any) -> None:
    rows = [{"prompt": "p", "response": "r"}, {"prompt": "p", "response": ""}]
    with pytest.raises(RowError, match="Row 1: the response is empty"):
        examples_to_answer(rows, None, tokenizer)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (None, "There are no rows to answer.*eval_dataset"),
        ({"short": [], "long": []}, r"short, long, but.*eval_dataset\['short'\]"),
        (Dataset.from_list([{"prompt": "p"}]).to_iterable_dataset(), "a streaming dataset.*take"),
    ],
)
def test_what_is_no_dataset_of_rows_is_refused_with_the_cure(
    dataset: Any, message: str, tokenizer: Any
) -> None:
    with pytest.raises(ValueError, match=message):
        examples_to_answer(dataset, None, tokenizer)


def test_responses_are_judged_where_the_expected_one_ends_with_a_stop_token(
    caplog: pytest.LogCaptureFixture,
) -> None:
    responses = [GeneratedResponse("p", "r", name) for name in ("whole", "cut", "context after")]
    examples: Any = [
        {"input_ids": [5, 6, 2], "response_mask": [0, 1, 1]},
        {"input_ids": [5, 6, 7], "response_mask": [0, 1, 1]},
        {"input_ids": [5, 6, 2, 9], "response_mask": [0, 1, 1, 0]},
    ]
    Accelerator(cpu=True)
    assert with_whole_reference(responses[::2], examples[::2], {2}) == responses[::2]
    assert caplog.text == ""
    assert with_whole_reference(responses, examples, {2}) == responses[::2]
    assert "eval: 1 of 3 expected responses do not end with a stop token" in caplog.text
    assert "They are not judged." in caplog.text
    caplog.clear()
    assert with_whole_reference(responses, examples, {8}, "eval_web") == responses
    assert "eval_web: 3 of 3 expected responses" in caplog.text
    assert "says little" in caplog.text


def test_exact_match_ignores_space_around_but_not_inside() -> None:
    result = ExactMatch().compute(
        predictions=["a b", " a b\n", "a  b", "A b"], references=["a b"] * 4
    )
    assert result == {"exact_match": 0.5}


def test_of_what_a_metric_returns_the_numbers_are_kept() -> None:
    responses = [GeneratedResponse("p", "ab", "ab"), GeneratedResponse("p", "abcd", "x")]
    metrics = [load_metric("exact_match"), ResponseLength()]
    assert judge(responses, metrics) == {"exact_match": 0.5, "length": 3.0}


METRIC_SCRIPT = """
import datasets
import evaluate


class FirstLetter(evaluate.Metric):
    def _info(self):
        text = datasets.Value("string")
        features = datasets.Features({"predictions": text, "references": text})
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="", features=features
        )

    def _compute(self, predictions, references):
        hits = sum(p[0] == r[0] for p, r in zip(predictions, references))
        return {"first_letter": hits / len(predictions)}
"""


def test_a_metric_is_loaded_by_name_through_evaluate(tmp_path: Path) -> None:
    folder = tmp_path / "first_letter"
    folder.mkdir()
    (folder / "first_letter.py").write_text(METRIC_SCRIPT)
    responses = [GeneratedResponse("p", "ab", "ac"), GeneratedResponse("p", "d", "x")]
    assert judge(responses, [load_metric(str(folder))]) == {"first_letter": 0.5}
