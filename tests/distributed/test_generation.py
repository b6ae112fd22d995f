"""Two processes share the prompts of an evaluation, and answer them as one process does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import generation_worker
import pytest
import torch
from datasets import Dataset
from processes import run_on_processes

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
        hits = sum(p[:1] == r[:1] for p, r in zip(predictions, references))
        return {"first_letter": hits / len(predictions)}
"""
NUM_ROWS = 7


def save_rows(folder: Path, tokenizer: Any, references: list[str]) -> None:
    """Prompts of 1 to 19 tokens, with what should be answered."""
    generator = torch.Generator().manual_seed(2)
    rows = []
    for number, reference in enumerate(references):
        prompt = torch.randint(3, 300, (1 + 3 * number,), generator=generator).tolist()
        response = [*tokenizer(reference)["input_ids"], 2]
        ids, mask = prompt + response, [0] * len(prompt) + [1] * len(response)
        rows.append({"input_ids": ids, "response_mask": mask})
    Dataset.from_list(rows).save_to_disk(folder / "eval")


def test_two_processes_answer_seven_prompts_as_one_process_does_one_at_a_time(
    tmp_path: Path, tokenizer: Any, model_factory: Callable[..., Any]
) -> None:
    model = model_factory(initializer_range=0.4).double()
    # Inference stops at any of these.
    stops = [2, *range(40, 110)]
    model.generation_config.eos_token_id = stops
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "first_letter").mkdir()
    (tmp_path / "first_letter" / "first_letter.py").write_text(METRIC_SCRIPT)
    save_rows(tmp_path, tokenizer, ["?"] * NUM_ROWS)
    answers = [response for _, response, *_ in generation_worker.run(tmp_path, 2)["responses"]]
    # Two of three are what is expected, and of the last one the first letter.
    expected = [a if n % 3 else "?" for n, a in enumerate(answers)]
    expected[-1] = answers[-1] + "?"
    save_rows(tmp_path, tokenizer, expected)

    one = generation_worker.run(tmp_path, 1)
    both = run_on_processes(2, generation_worker.run, tmp_path, 3)
    responses = one["responses"]
    assert [reference for _, _, reference, *_ in responses] == expected
    assert one["stop_token_ids"] == stops
    stopped = [is_stopped for *_, is_stopped in responses]
    lengths = [num_tokens for *_, num_tokens, _ in responses]
    # Both kinds occur, or the figures would say nothing.
    assert 0 < sum(stopped) < NUM_ROWS
    assert len(set(lengths)) > 2
    figures = {
        "stop_rate": sum(stopped) / NUM_ROWS,
        "mean_generated_tokens": sum(lengths) / NUM_ROWS,
        "exact_match": 4 / NUM_ROWS,
        "first_letter": sum(a[:1] == r[:1] for _, a, r, *_ in responses) / NUM_ROWS,
    }
    assert figures["first_letter"] > figures["exact_match"]
    for found in (one, *both):
        assert found["responses"] == responses
        assert found["was_training"]
        assert found["is_training"]
        assert {name: found["metrics"][f"eval_{name}"] for name in figures} == figures
        for name in ("loss", "token_entropy", "token_accuracy", "perplexity", "num_tokens"):
            of_all = found["metrics"][f"eval_all_{name}"]
            assert of_all == pytest.approx(one["metrics"][f"eval_all_{name}"], rel=1e-12), name
    # Every token but the first of each row.
    assert one["metrics"]["eval_all_num_tokens"] == one["metrics"]["eval_num_tokens"] - NUM_ROWS
