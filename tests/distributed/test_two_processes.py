"""Two processes over gloo give the numbers of one."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from processes import run_on_processes
from worker import run_all

SETTINGS: dict[str, dict[str, Any]] = {
    "token": {},
    "token, full logits": {"fused_head": "off"},
    "example": {"loss_normalization": "example"},
    "constant": {"loss_normalization": "constant", "normalize_constant": 100.0},
    # The long rows of one process need more micro-batches than the short ones of the other.
    "regrouped": {"max_tokens_per_microbatch": 90},
    "regrouped, one row at a time": {"max_tokens_per_microbatch": 1},
    # Eight packed rows: as many for either.
    "packed": {"packing": True, "max_length": 50, "per_device_train_batch_size": 1},
    "generation": {
        "predict_with_generate": True,
        "generation_max_new_tokens": 5,
        "generation_metrics": ["exact_match"],
    },
}


def make_rows(num_rows: int) -> Dataset:
    """Rows with responses of 1 to 40 tokens, whose order makes the two processes differ most."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for number in range(num_rows):
        num_response = 40 - number * 39 // (num_rows - 1)
        # An untrained model with tied embeddings likes to repeat, so pairs give it some hits.
        pairs = torch.randint(3, 300, (4 + num_response,), generator=generator)
        ids = pairs.repeat_interleave(2)[: 4 + num_response].tolist()
        rows.append({"input_ids": ids, "response_mask": [0] * 4 + [1] * num_response})
    return Dataset.from_list(rows)


@pytest.fixture(scope="module")
def results(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_factory: Callable[..., Any],
    model_factory: Callable[..., Any],
) -> dict[int, dict[str, Any]]:
    """What 1 and 2 processes found: 16 rows in one optimizer step, 15 in the evaluation."""
    found = {}
    for num_processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes_{num_processes}")
        model_factory().double().save_pretrained(folder / "model")
        tokenizer_factory().save_pretrained(folder / "tokenizer")
        make_rows(16).save_to_disk(folder / "train")
        make_rows(15).save_to_disk(folder / "eval")
        split = {
            "max_steps": 1,
            "learning_rate": 0.0,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 8 // num_processes,
            "per_device_eval_batch_size": 2,
        }
        settings = [{**split, **each} for each in SETTINGS.values()]
        results = run_on_processes(num_processes, run_all, folder, settings)[0]
        found[num_processes] = dict(zip(SETTINGS, results, strict=True))
    return found


def relative(found: Any, expected: Any) -> float:
    found, expected = (torch.tensor(x, dtype=torch.float64) for x in (found, expected))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_give_the_loss_the_gradient_and_the_figures_of_one(
    name: str, results: dict[int, dict[str, Any]]
) -> None:
    one, two = results[1][name], results[2][name]
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    assert relative(two["gradient"], one["gradient"]) < 1e-12
    for key in ("loss", "token_entropy", "token_accuracy"):
        assert relative(two["log"][key], one["log"][key]) < 1e-12, key
        assert relative(two["metrics"][f"eval_{key}"], one["metrics"][f"eval_{key}"]) < 1e-12, key
    for key in ("num_response_tokens", "num_tokens"):
        assert two["log"][key] == one["log"][key]
        assert two["metrics"][f"eval_{key}"] == one["metrics"][f"eval_{key}"]
    assert two["metrics"]["eval_num_response_tokens"] == sum(
        sum(row["response_mask"]) for row in make_rows(15)
    )


def test_processes_ask_each_other_once_a_step_and_once_a_log_however_many_micro_batches(
    results: dict[int, dict[str, Any]],
) -> None:
    counts = {name: found["num_collectives"] for name, found in results[2].items()}
    # The divisor of the step; the totals of the log and of the run; the budget of memory, once a
    # run; and of the Trainer itself the loss of the log, and twice the operations.
    assert counts.pop("constant") == 6
    given = [name for name in counts if "max_tokens_per_microbatch" in SETTINGS[name]]
    assert {counts.pop(name) for name in given} == {6}
    assert set(counts.values()) == {7}


def test_two_processes_share_the_generation_and_agree_on_it(
    results: dict[int, dict[str, Any]],
) -> None:
    one, two = (results[count]["generation"] for count in (1, 2))
    assert len(one["responses"]) == 15
    assert two["responses"] == one["responses"]
    assert two["metrics"]["eval_exact_match"] == one["metrics"]["eval_exact_match"]
