"""The first step is run as training runs it, and leaves nothing behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import Tensor
from verified_trainers import first_step

from hf_sft_plugin import MaskedSFTConfig

Make = Callable[..., MaskedSFTConfig]


@pytest.fixture
def args(make_config: Make) -> MaskedSFTConfig:
    return make_config(per_device_train_batch_size=3, gradient_accumulation_steps=2)


def test_its_gradient_is_that_of_the_mean_over_the_trained_tokens(
    model_factory: Callable[..., Any], tokenizer: Any, args: MaskedSFTConfig
) -> None:
    step = first_step(model_factory().double(), args, tokenizer, max_tokens_per_microbatch=25)
    assert len(step.batches) == 2
    assert len(step.microbatches) == 3
    reference = model_factory().double()
    total, count = 0.0, 0
    for part in step.microbatches:
        for ids, labels, mask in zip(
            part["input_ids"], part["labels"], part["attention_mask"], strict=True
        ):
            ids, targets = ids[mask == 1], labels[mask == 1][1:]
            log_p = torch.log_softmax(reference(ids.unsqueeze(0)).logits[0, :-1], dim=-1)
            kept = targets != -100
            total = total - log_p[kept].gather(-1, targets[kept].unsqueeze(-1)).sum()
            count += int(kept.sum())
    assert isinstance(total, Tensor)
    (total / count).backward()
    with step.undone():
        found = step.gradients(step.batches)
    assert step.num_backward == 3
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("is_broken_off", [False, True])
def test_everything_is_put_back(
    is_broken_off: bool, model_factory: Callable[..., Any], tokenizer: Any, args: MaskedSFTConfig
) -> None:
    model = model_factory(attention_dropout=0.25)
    model.register_buffer("seen", torch.zeros(2))
    step = first_step(model, args, tokenizer)
    trainer = step.trainer
    model.eval()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    totals, attributes = trainer._train_totals, dict(vars(trainer))
    random_state = torch.get_rng_state()
    try:
        with step.undone():
            assert model.training
            assert model.model.layers[0].self_attn.attention_dropout == 0
            step.gradients(step.batches)
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            trainer.optimizer.step()
            torch.rand(3)
            model.seen += 1
            trainer.mark = True
            assert trainer._train_totals is not totals
            if is_broken_off:
                raise KeyError
    except KeyError:
        pass
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert [p.grad is None for p in model.parameters()].count(False) == 1
    assert float(model.lm_head.weight.grad.min()) == 1
    assert not any(module.training for module in model.modules())
    assert model.model.layers[0].self_attn.attention_dropout == 0.25
    assert not trainer.optimizer.state
    assert trainer.optimizer.param_groups[0]["lr"] == attributes["args"].learning_rate
    assert vars(trainer) == attributes
    assert totals.run.num_tokens == 0
    assert totals._window is None
    assert model.seen.tolist() == [0, 0]
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_loss_that_changes_its_batch_changes_a_copy(
    model: Any, tokenizer: Any, args: MaskedSFTConfig
) -> None:
    step = first_step(model, args, tokenizer)
    before = [part["labels"].clone() for part in step.microbatches]
    own = step.trainer.compute_loss

    def compute_loss(model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = own(model, dict(inputs), **kwargs)
        inputs.pop("labels")
        return loss

    with step.undone():
        step.trainer.compute_loss = compute_loss
        for _ in range(2):
            step.gradients(step.batches)
    assert all(map(torch.equal, before, (part["labels"] for part in step.microbatches)))


def test_engines_and_optimizers_that_allow_no_trial_are_told_apart(
    model: Any, tokenizer: Any, args: MaskedSFTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = first_step(model, args, tokenizer)
    assert step.backward_problem is None
    assert not step.is_sharded
    assert (step.on_processes(3), step.on_processes(False)) == ([3], [0])
    assert step.sum_of_shards(torch.ones(2)).tolist() == [1, 1]
    step.trainer.args.optim = "lomo"
    assert step.backward_problem == "the optimizer lomo changes weights in the backward pass"
    step.trainer.args.optim = "galore_adamw_layerwise"
    assert step.backward_problem is not None
    engines = {DistributedType.DEEPSPEED: (True, False), DistributedType.FSDP: (False, True)}
    step.trainer.args.optim = "adamw_torch"
    for engine, expected in engines.items():
        monkeypatch.setattr(step.trainer.accelerator.state, "distributed_type", engine)
        assert (step.backward_problem is not None, step.is_sharded) == expected
