"""One, two and four processes give the numbers of plain arithmetic on the rows of each step.

The reference runs a model on one row at a time, takes its full logits, and sums over the rows of an
optimizer step in float64. It knows nothing of micro-batches, padding, packing or processes.
"""

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_on_processes
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM
from worker import PADDED_TO, make_dataset, run

PROCESSES = (1, 2, 4)
ROWS_PER_STEP = 8
NUM_STEPS = 5
# Of 23 rows the last step of an epoch has 7.
NUM_ROWS = 23
# Rows without a trained token: more than a micro-batch has, and the one that is repeated.
UNTRAINED = (0, 4, 5, 6, 17)
# A whole step without one, the second.
SILENT = tuple(range(8, 16))
LEARNING_RATE = 0.3
PACKED_PER_STEP = 4
LOADER_PROCESSES = {
    "dataloader_num_workers": 2,
    "dataloader_persistent_workers": True,
    # Others would import everything again.
    "dataloader_multiprocessing_context": "fork",
}
SPLITS = {1: [(1, 8), (8, 1), (2, 4)], 2: [(1, 4), (4, 1), (2, 2)], 4: [(1, 2), (2, 1)]}
Row = dict[str, Any]


def make_rows(num_rows: int, untrained: Sequence[int] = (), weighted: bool = False) -> list[Row]:
    """Rows with responses of 1 to 60 tokens, in an order that makes processes differ most."""
    generator = torch.Generator().manual_seed(5)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    rows = []
    for number in range(num_rows):
        num_prompt = draw(1, 6)
        num_response = draw(40, 60) if number % 4 == 1 else draw(1, 9)
        length = num_prompt + num_response
        # An untrained model with tied embeddings likes to repeat, so pairs give it some hits.
        ids = torch.randint(3, 300, (length,), generator=generator).repeat_interleave(2)[:length]
        mask = [0] * num_prompt + [int(number not in untrained)] * num_response
        row: Row = {"input_ids": ids.tolist(), "response_mask": mask, "source": f"part{number % 2}"}
        if weighted:
            row["loss_weights"] = (torch.rand(length, generator=generator) * 2).tolist()
        rows.append(row)
    return rows


ROWS = {
    "rows": make_rows(NUM_ROWS, UNTRAINED),
    "weighted": make_rows(NUM_ROWS, UNTRAINED, weighted=True),
    "silent": make_rows(NUM_ROWS, SILENT),
    "eval": make_rows(7),
}


def case(
    split: tuple[int, int],
    settings: dict[str, Any] | None = None,
    attributes: dict[str, Any] | None = None,
    **more: Any,
) -> dict[str, Any]:
    accumulation, size = split
    return {
        "settings": {
            "max_steps": NUM_STEPS,
            "optim": "sgd",
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "train_sampling_strategy": "sequential",
            "gradient_accumulation_steps": accumulation,
            "per_device_train_batch_size": size,
            "include_num_input_tokens_seen": "non_padding",
            **(settings or {}),
        },
        "attributes": attributes or {},
        **more,
    }


def packed(split: tuple[int, int], **attributes: Any) -> dict[str, Any]:
    accumulation, size = split
    smaller = (accumulation, size // 2) if size > 1 else (accumulation // 2, size)
    return case(smaller, {"remove_unused_columns": False}, attributes, kind="packed")


def make_cases(num_processes: int) -> dict[str, dict[str, Any]]:
    """What is trained on so many processes: all of it, or on four what differs most."""
    cases = all_cases(num_processes)
    return cases if num_processes < 4 else {name: cases[name] for name in ON_FOUR}


def all_cases(num_processes: int) -> dict[str, dict[str, Any]]:
    wide, deep, *_ = splits = SPLITS[num_processes]
    both = splits[-1]
    example, constant = {"loss_normalization": "example"}, {"loss_normalization": "constant"}
    parts = {"accelerator_config": {"split_batches": True}}
    whole = {"accelerator_config": {"dispatch_batches": False}}
    return {
        "wide": case(wide),
        "deep": case(deep, attributes={"max_tokens_per_microbatch": 40}),
        "wide, few tokens at a time": case(wide, attributes={"max_tokens_per_microbatch": 1}),
        "wide, as memory allows": case(wide, attributes={"max_tokens_per_microbatch": "auto"}),
        "padded": case(deep, attributes={"padding_free": "off"}),
        "padded, both": case(
            both, attributes={"padding_free": "off", "max_tokens_per_microbatch": 90}
        ),
        "full logits": case(both, attributes={"fused_head": "off"}),
        "packed, wide": packed(wide),
        "packed, deep": {**packed(deep, max_tokens_per_microbatch=80), "pad_to": 80},
        "example": case(both, attributes=example),
        "constant": case(wide, attributes={**constant, "normalize_constant": 100.0}),
        "weighted": case(deep, rows="weighted"),
        "weighted, example": case(wide, attributes=example, rows="weighted"),
        "silent step": case(deep, rows="silent"),
        "float32": case(both, dtype="float32"),
        "adamw": case(wide, {"optim": "adamw_torch", "learning_rate": 1e-3}),
        "stream": case(deep, whole, kind="stream"),
        "dispatched": case(
            both,
            {"accelerator_config": {"dispatch_batches": True}},
            kind="dispatched",
            pad_to=PADDED_TO["dispatched"],
        ),
        "one batch for all": case((1, 8), parts),
        "loader processes": case(both, LOADER_PROCESSES),
        "resumed": case(both, resume_at=2),
        "shuffled": case(both, {"train_sampling_strategy": "random"}),
        "shuffled and resumed": case(both, {"train_sampling_strategy": "random"}, resume_at=2),
        "shuffled by cost": case(both, {"train_sampling_strategy": "batch_rebalance"}),
    }


ON_FOUR = (
    *("wide", "deep", "wide, few tokens at a time", "padded, both", "packed, wide"),
    *("packed, deep", "weighted, example", "silent step", "stream", "one batch for all"),
    "shuffled",
)
TRAINED = [(name, count) for count in PROCESSES for name in make_cases(count)]
# Nobody but the trainer knows their order, so only processes are compared.
SHUFFLED = [each for each in TRAINED if each[0].startswith("shuffled")]
EVALUATIONS = {
    "rows": ("eval", "map", (1, 2, 3)),
    "stream": ("eval", "stream", (2, 3)),
    "dispatched": ("eval", "dispatched", (3,)),
}


@pytest.fixture(scope="module")
def folder(save_model: Callable[..., Path]) -> Path:
    small = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    folder = save_model("parity", is_double=True, **small)
    for name, rows in ROWS.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


class Results(dict[int, list[dict[str, Any]]]):
    """What every process found, by their number; they run when they are first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, count: int) -> list[dict[str, Any]]:
        self[count] = run_on_processes(count, run, self.folder, make_cases(count), EVALUATIONS)
        return self[count]


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return Results(folder)


def row_sums(model: Any, row: Row, normalization: str) -> dict[str, Any]:
    """What one row adds to the loss and the counts of its step."""
    ids = torch.tensor([row["input_ids"]])
    logits = model(ids, use_cache=False).logits[0, :-1]
    targets = ids[0, 1:]
    mask = torch.tensor(row["response_mask"][1:], dtype=torch.float64)
    weights = mask * torch.tensor(row.get("loss_weights", [1.0] * ids.shape[1])[1:])
    if normalization == "example":
        weights = weights / weights.sum() if weights.sum() > 0 else weights
    losses = cross_entropy(logits, targets, reduction="none")
    log_p = logits.detach().log_softmax(-1)
    return {
        "loss": (losses * weights).sum(),
        "divisor": float(weights.sum()),
        "token_entropy": float((-(log_p.exp() * log_p).sum(-1) * mask).sum()),
        "token_accuracy": float(((logits.argmax(-1) == targets) * mask).sum()),
        "num_response_tokens": int(mask.sum()),
        "num_tokens": ids.shape[1],
    }


def groups(kind: str, rows: list[Row]) -> list[list[Row]]:
    """The rows of each optimizer step: one epoch after the other, in the order of the data."""
    units, size = [[row] for row in rows], ROWS_PER_STEP
    if kind == "packed":
        plan = make_dataset(rows, "packed").plan
        units, size = [[rows[number] for number in numbers] for numbers in plan], PACKED_PER_STEP
    epoch = [
        [row for unit in units[start : start + size] for row in unit]
        for start in range(0, len(units), size)
    ]
    return (epoch * NUM_STEPS)[:NUM_STEPS]


def train_by_hand(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Five optimizer steps of plain arithmetic."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    settings, attributes = case["settings"], case["attributes"]
    normalization = attributes.get("loss_normalization", "token")
    optimizer_class = torch.optim.SGD if settings["optim"] == "sgd" else torch.optim.AdamW
    optimizer = optimizer_class(model.parameters(), settings["learning_rate"], weight_decay=0.0)
    found: dict[str, Any] = {"logs": [], "gradients": [], "weights": []}
    totals = {"num_response_tokens": 0, "num_tokens": 0}
    for rows in groups(case.get("kind", "map"), ROWS[case.get("rows", "rows")]):
        parts = [row_sums(model, row, normalization) for row in rows]
        sums = {name: sum(part[name] for part in parts) for name in parts[0]}
        divisor = attributes.get("normalize_constant", sums["divisor"]) or 1.0
        loss = sums["loss"] / divisor
        optimizer.zero_grad()
        loss.backward()
        found["gradients"].append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        optimizer.step()
        found["weights"].append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        totals = {name: count + sums[name] for name, count in totals.items()}
        count = sums["num_response_tokens"]
        means = {name: sums[name] / max(count, 1) for name in ("token_entropy", "token_accuracy")}
        found["logs"].append({"loss": loss.item(), **means, **totals} if count else totals)
    return found


@pytest.fixture(scope="module")
def by_hand(folder: Path) -> Callable[[str], dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    def get(name: str) -> dict[str, Any]:
        case = copy.deepcopy(make_cases(1)[name])
        arguments = {key: case.get(key) for key in ("rows", "kind")} | {
            key: case["attributes"].get(key) for key in ("loss_normalization", "normalize_constant")
        }
        key = json.dumps([arguments, case["settings"]["optim"]])
        if key not in found:
            found[key] = train_by_hand(folder, case)
        return found[key]

    return get


def relative(found: Any, expected: Any) -> float:
    found, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (found, expected))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("name", "num_processes"), [each for each in TRAINED if each not in SHUFFLED]
)
def test_gradients_weights_and_logs_are_those_of_plain_arithmetic(
    name: str,
    num_processes: int,
    results: Results,
    by_hand: Callable[[str], dict[str, Any]],
) -> None:
    found, expected = results[num_processes][0]["train"][name], by_hand(name)
    assert found["num_processes"] == num_processes
    bound = 1e-6 if name == "float32" else 1e-12
    first = NUM_STEPS - len(found["gradients"])
    assert first == (2 if name == "resumed" else 0)
    for step in range(first, NUM_STEPS):
        gradient = expected["gradients"][step]
        if name == "silent step" and step in (1, 4):
            assert not found["gradients"][step].any()
            assert torch.equal(found["weights"][step], found["weights"][step - 1])
        else:
            assert relative(found["gradients"][step - first], gradient) < bound, step
    assert relative(found["weights"][-1], expected["weights"][-1]) < bound
    logged = found["logs"]
    by_step = {log["step"]: log for log in logged}
    for step, log in enumerate(expected["logs"], start=1):
        if "loss" not in log:
            assert step not in by_step
            continue
        for key in ("num_response_tokens", "num_tokens"):
            assert by_step[step][key] == log[key]
        for key in ("loss", "token_entropy", "token_accuracy"):
            assert abs(by_step[step][key] / log[key] - 1) < bound, key
    assert found["num_input_tokens"] == expected["logs"][-1]["num_tokens"]


@pytest.mark.parametrize(("name", "num_processes"), SHUFFLED)
def test_a_shuffled_run_sees_the_same_rows_on_any_number_of_processes(
    name: str, num_processes: int, results: Results
) -> None:
    whole = name.removesuffix(" and resumed")
    one, found = results[1][0]["train"][whole], results[num_processes][0]["train"][name]
    assert relative(found["weights"][-1], one["weights"][-1]) < 1e-12
    assert found["logs"][-1]["num_tokens"] == one["logs"][-1]["num_tokens"]


@pytest.mark.parametrize(("name", "num_processes"), [each for each in TRAINED if each[1] > 1])
def test_all_processes_end_with_the_same_weights(
    name: str, num_processes: int, results: Results
) -> None:
    weights = [found["train"][name]["weights"][-1] for found in results[num_processes]]
    assert all(torch.equal(each, weights[0]) for each in weights)


@pytest.mark.parametrize("name", ["wide", "packed, wide", "stream", "silent step"])
@pytest.mark.parametrize("num_processes", PROCESSES[1:])
def test_every_process_runs_forward_once_for_each_batch(
    num_processes: int, name: str, results: Results
) -> None:
    case = make_cases(num_processes)[name]
    units, per_step = NUM_ROWS, ROWS_PER_STEP
    if name.startswith("packed"):
        units, per_step = len(make_dataset(ROWS["rows"], "packed")), PACKED_PER_STEP
    at_a_time = num_processes * case["settings"]["per_device_train_batch_size"]
    starts = (list(range(0, units, per_step)) * NUM_STEPS)[:NUM_STEPS]
    expected = sum(-(-min(per_step, units - start) // at_a_time) for start in starts)
    assert {found["train"][name]["num_forwards"] for found in results[num_processes]} == {expected}


@pytest.mark.parametrize("kind", EVALUATIONS)
@pytest.mark.parametrize("num_processes", PROCESSES)
def test_seven_rows_are_evaluated_as_one_after_the_other(
    num_processes: int, kind: str, results: Results, folder: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    sums = []
    with torch.no_grad():
        sums = [row_sums(model, row, "token") for row in ROWS["eval"]]
    order = sum(
        place * next(t for t, m in zip(r["input_ids"], r["response_mask"], strict=True) if m)
        for place, r in enumerate(ROWS["eval"])
    )
    for found in results[num_processes]:
        for metrics in found["evaluate"][kind].values():
            for prefix, parts in (("", sums), ("part0_", sums[::2]), ("part1_", sums[1::2])):
                if prefix and kind != "rows":
                    continue
                count = sum(part["num_response_tokens"] for part in parts)
                for key in ("loss", "token_entropy", "token_accuracy"):
                    mean = sum(float(part[key]) for part in parts) / count
                    assert metrics[f"eval_{prefix}{key}"] == pytest.approx(mean, rel=1e-12)
            for key in ("num_response_tokens", "num_tokens"):
                assert metrics[f"eval_{key}"] == sum(part[key] for part in sums)
            assert metrics["alone"] == pytest.approx(metrics["eval_loss"], rel=1e-12)
            assert metrics["eval_rows"] == 7
            assert metrics["eval_order"] == order
            assert metrics["eval_hits"] == sum(part["token_accuracy"] for part in sums)


def test_processes_ask_each_other_once_a_step_and_once_a_log_however_many_micro_batches(
    results: Results,
) -> None:
    counts = {name: found["num_collectives"] for name, found in results[2][0]["train"].items()}
    # A step: its divisor; the totals of its log; and of the Trainer itself the loss of the log, the
    # operations, and the tokens read. At the end the totals and the operations.
    assert counts.pop("constant") == 4 * NUM_STEPS + 2
    assert {counts.pop(name) for name in ("resumed", "shuffled and resumed")} == {5 * 3 + 2}
    # There rows are sent around.
    assert counts.pop("dispatched") > 50
    # Whether memory suffices is asked once a run.
    assert counts.pop("wide, as memory allows") == 5 * NUM_STEPS + 3
    # An epoch of a stream is known to be at its end when it gives nothing: here in 2 steps.
    assert counts.pop("stream") == 5 * NUM_STEPS + 2 + 2
    assert set(counts.values()) == {5 * NUM_STEPS + 2}


@pytest.mark.parametrize("num_processes", PROCESSES)
def test_processes_share_the_generation_and_agree_on_it(
    num_processes: int, results: Results
) -> None:
    one = results[1][0]["generate"]
    assert len(one["responses"]) == 7
    for found in results[num_processes]:
        assert found["generate"]["responses"] == one["responses"]
        exact_match = found["generate"]["metrics"]["eval_exact_match"]
        assert exact_match == one["metrics"]["eval_exact_match"]
