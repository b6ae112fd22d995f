"""Generation stops where it should, in any batch, and metrics judge the right texts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import pytest
import torch
from accelerate import Accelerator

from hf_sft_plugin import ExactMatch, GeneratedResponse
from hf_sft_plugin.training.evaluation import (
    generate,
    generate_responses,
    judge,
    last_prompt,
    load_metric,
)


class ResponseLength(evaluate.Metric):
    """A metric of a user's own, which returns more than numbers."""

    def _info(self) -> evaluate.MetricInfo:
        info: evaluate.MetricInfo = ExactMatch()._info()
        return info

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:
        return {"length": sum(map(len, predictions)) / len(predictions), "note": "not a number"}


def greedy(model: Any, prompt: list[int], stops: set[int], limit: int) -> list[int]:
    """Greedy decoding written out: no cache, no batch, no padding."""
    ids = list(prompt)
    while len(ids) - len(prompt) < limit:
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_generation_is_greedy_and_does_not_depend_on_the_batch(
    batch_size: int, model_factory: Callable[..., Any]
) -> None:
    model = model_factory(initializer_range=0.4).double().eval()
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


def test_the_mode_of_the_model_is_restored(model: Any) -> None:
    for mode in (True, False):
        model.train(mode)
        generate(model, [[5]], stop_token_ids={2}, pad_token_id=0, max_new_tokens=1, batch_size=1)
        assert model.training == mode


def test_the_settings_saved_with_a_model_do_not_make_generation_random(model: Any) -> None:
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    settings: Any = {"stop_token_ids": {2}, "pad_token_id": 0, "max_new_tokens": 8, "batch_size": 1}
    model.eval()
    assert generate(model, [[5, 6]], **settings) == [greedy(model, [5, 6], {2}, 8)]


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
