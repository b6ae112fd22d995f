"""Forward passes of one shape train what those of any shape train, in float64."""

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from one_step import Gradients

from hf_sft_plugin import MaskedSFTTrainer, pack_dataset
from hf_sft_plugin.batches.fixed_shape import fill_up
from hf_sft_plugin.batches.host_facts import find_layout, with_facts
from hf_sft_plugin.batches.response_batch import split_batch, without_padding
from hf_sft_plugin.loss.masked_loss import LossNormalization

Make = Callable[..., Any]
MAX_LENGTH = 48
FIGURES = ("loss", "token_entropy", "token_accuracy", "num_response_tokens", "num_tokens")
FIGURES += ("num_input_tokens_seen",)

GPT2 = {"max_position_embeddings": 48, "n_positions": 48}
GPT2 |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)


def make_rows() -> list[dict[str, Any]]:
    """Nine rows of 5 to 45 tokens, of which two in three begin with the same 18."""
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randint(3, 300, (18,), generator=generator).tolist()
    rows = []
    for number in range(9):
        own = torch.randint(3, 300, (5 + (number * 11) % 23,), generator=generator).tolist()
        ids = [*(prompt if number % 3 else []), *own]
        rows.append({"input_ids": ids, "response_mask": [0, 0] + [1] * (len(ids) - 2)})
    return rows


@pytest.fixture
def train(model_factory: Make, make_config: Make, tokenizer: Any, widen: Make) -> Make:
    """An epoch and an evaluation; gives the trainer, its gradients, and all shapes in training."""

    def run(model_type: str = "llama", **settings: Any) -> Any:
        fields = settings.pop("fields", {})
        model, gradients = model_factory(model_type, **fields).double(), Gradients()
        widen(model)
        shapes: dict[bool, set[tuple[int, ...]]] = {True: set(), False: set()}

        def note(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            ids = given[0] if given else named["input_ids"]
            shapes[model.training].add(tuple(ids.shape))

        trainer = MaskedSFTTrainer(
            model,
            make_config(
                max_length=MAX_LENGTH,
                max_steps=-1,
                num_train_epochs=1,
                max_grad_norm=0.0,
                # Adam would make much of what is rounded otherwise in small gradients.
                optim="sgd",
                per_device_eval_batch_size=settings.get("per_device_train_batch_size", 2),
                include_num_input_tokens_seen="non_padding",
                **settings,
            ),
            train_dataset=Dataset.from_list(make_rows()),
            eval_dataset=Dataset.from_list(make_rows()),
            processing_class=tokenizer,
            callbacks=[gradients],
        )
        model.base_model.register_forward_pre_hook(note, with_kwargs=True)
        trainer.train()
        # Of evaluation only; what was tried out before the first step is not training either.
        shapes[False].clear()
        trainer.evaluate()
        return trainer, gradients.values, shapes

    return run


def assert_trained_alike(found: Any, expected: Any) -> None:
    pairs = zip(found[0].state.log_history, expected[0].state.log_history, strict=True)
    for log, wanted in pairs:
        for key in {*FIGURES, *(f"eval_{name}" for name in FIGURES)} & wanted.keys():
            assert log[key] == pytest.approx(wanted[key], rel=1e-12), key
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        assert (gradient - wanted).norm() < 1e-12 * wanted.norm()


@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        # The last of the packed rows are fewer than a batch.
        ({"packing": True, "per_device_train_batch_size": 1}, (1, 48)),
        ({"packing": True, "per_device_train_batch_size": 2}, (1, 96)),
        ({"packing": True, "model_type": "mistral", "fields": {"sliding_window": 7}}, (1, 96)),
        # Positions end where the longest row does.
        (
            {"model_type": "gpt2", "fields": GPT2},
            (1, 96),
        ),
        # A step in as few micro-batches of this shape as its rows need.
        (
            {
                "gradient_accumulation_steps": 4,
                "max_tokens_per_microbatch": 100,
                "group_by_prompt": True,
            },
            (1, 96),
        ),
        (
            {"packing": True, "max_tokens_per_microbatch": 60, "gradient_checkpointing": True},
            (1, 96),
        ),
    ],
    ids=str,
)
def test_every_pass_without_padding_has_one_shape_and_trains_the_same(
    settings: dict[str, Any], shape: tuple[int, int], train: Make
) -> None:
    found = train(pad_to_multiple_of=shape[1], **settings)
    assert found[2] == {True: {shape}, False: {shape}}
    assert found[0].describe_speed()["shape"] == f"1 x {shape[1]} tokens, always"
    expected = train(**settings)
    assert len(expected[2][True]) > 1
    assert "shape" not in expected[0].describe_speed()
    assert_trained_alike(found, expected)


@pytest.mark.parametrize("size", [1, 2])
def test_padded_rows_have_one_shape_but_for_the_last_batch_of_an_epoch(
    size: int, train: Make
) -> None:
    settings = {"padding_free": "off", "per_device_train_batch_size": size}
    expected = train(**settings)
    found = train(pad_to_multiple_of=MAX_LENGTH, **settings)
    shapes = {(size, MAX_LENGTH), (1, MAX_LENGTH)}
    assert found[2] == {True: shapes, False: shapes}
    assert found[0].describe_speed()["shape"] == f"rows of {MAX_LENGTH} tokens"
    assert_trained_alike(found, expected)
    dropped = train(pad_to_multiple_of=MAX_LENGTH, dataloader_drop_last=True, **settings)
    assert dropped[2][True] == {(size, MAX_LENGTH)}


def test_what_a_budget_puts_together_is_rounded_up_too(train: Make) -> None:
    """Micro-batches of another number of rows, none of them over the budget."""
    settings = {"gradient_accumulation_steps": 4, "max_tokens_per_microbatch": 110}
    expected = train(**settings)
    flat = train(pad_to_multiple_of=25, **settings)
    assert flat[2][True] <= {(1, 25), (1, 50), (1, 75), (1, 100)}
    assert flat[0].describe_speed()["shape"] == "1 x a multiple of 25 tokens"
    assert_trained_alike(flat, expected)
    padded = train(pad_to_multiple_of=25, padding_free="off", **settings)
    assert padded[2][True] <= {(rows, 25) for rows in range(1, 5)} | {(1, 50), (2, 50)}
    assert padded[0].describe_speed()["shape"] == "rows of a multiple of 25 tokens"
    assert_trained_alike(padded, expected)


def test_a_router_whose_loss_would_count_the_filler_goes_without(train: Make) -> None:
    fields = {"num_local_experts": 4, "output_router_logits": True}
    fields["experts_implementation"] = "eager"
    settings = {"model_type": "mixtral", "fields": fields, "packing": True}
    settings["max_tokens_per_microbatch"] = None
    found, expected = train(pad_to_multiple_of=96, **settings), train(**settings)
    assert found[2] == expected[2]
    assert_trained_alike(found, expected)
    assert found[0].describe_speed()["shape"].startswith("as it comes: the router's loss would")


def test_levers_that_would_change_the_shape_are_off_and_say_so(
    train: Make, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"packing": True, "pad_to_multiple_of": 96, "auto_gradient_checkpointing": True}
    with caplog.at_level(logging.WARNING):
        trainer = train(**settings)[0]
    # Also before the first step, when nothing has run.
    assert "everywhere, because pad_to_multiple_of" in capsys.readouterr().out
    speed = trainer.describe_speed()
    assert speed["last layer"] == "everywhere, because pad_to_multiple_of asks for one shape"
    assert speed["memory"] == "not estimated: pad_to_multiple_of has batches run as they come"
    assert speed["packing"] == str(pack_dataset(make_rows(), MAX_LENGTH))
    (warning,) = [r.getMessage() for r in caplog.records if "no effect" in r.getMessage()]
    assert "auto_gradient_checkpointing has no effect with pad_to_multiple_of" in warning


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("multiple", [1, 7, 512])
def test_filler_is_documents_of_its_own_behind_all_tokens(shares: bool, multiple: int) -> None:
    rows = [row["input_ids"] for row in make_rows()[:6]]
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.where(mask == 1, -100)}
    batch = with_facts(batch, layout=find_layout(batch, shares))
    flat = without_padding(split_batch(batch, LossNormalization.TOKEN), shares)
    assert flat is not None
    filled = fill_up(flat, multiple)
    before, after = flat.model_inputs, filled.model_inputs
    num_tokens, size = before["input_ids"].shape[1], after["input_ids"].shape[1]
    assert ("key_index" in before) == shares
    assert size == -(-num_tokens // multiple) * multiple
    assert torch.equal(after["input_ids"][:, :num_tokens], before["input_ids"])
    assert torch.equal(after["position_ids"][:, :num_tokens], before["position_ids"])
    lengths = list(before["document_lengths"])
    own = list(after["document_lengths"])[len(lengths) :]
    assert sum(own) == size - num_tokens
    assert max(own, default=0) <= max(lengths)
    positions = [position for length in own for position in range(length)]
    assert after["position_ids"][0, num_tokens:].tolist() == positions
    ends = np.cumsum([0, *after["document_lengths"]])
    assert after["cu_seq_lens_q"].tolist() == ends.tolist()
    assert after["cu_seq_lens_q"].dtype == torch.int32
    keys = np.split(
        after.get("key_index", torch.arange(size)).numpy(), after["cu_seq_lens_k"].tolist()[1:-1]
    )
    for seen, (start, end) in zip(
        keys[len(lengths) :], pairwise(ends[len(lengths) :]), strict=True
    ):
        assert seen.tolist() == list(range(start, end))
    assert len(keys) == len(after["document_lengths"])
    assert not filled.weights[0, flat.weights.shape[1] :].any()
    assert torch.equal(filled.positions, flat.positions)
