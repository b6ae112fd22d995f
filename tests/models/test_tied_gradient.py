"""A tied embedding adds its gradient to that of the head, and the sum is what it always was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sft_plugin.batches.response_batch import ResponseBatch
from hf_sft_plugin.loss.logit_tile import LogitTransform
from hf_sft_plugin.loss.objective import LossObjective
from hf_sft_plugin.models.embeddings import shared_gradient
from hf_sft_plugin.models.lm_head import FusedHead, forward_full

DTYPES = [(torch.float64, 1e-12), (torch.float32, 1e-6)]
Make = Callable[..., Any]


class DenseGradients(TorchDispatchMode):
    """Counts the gradients of embeddings that are as large as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.embedding_dense_backward.default
        return func(*args, **(kwargs or {}))


def microbatches(dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Three, with tokens that come again and padding tokens among them; one trains nothing."""
    generator = torch.Generator().manual_seed(3)
    parts = []
    for number in range(3):
        ids = torch.randint(0, 20, (2, 30), generator=generator)
        weights = torch.rand(2, 30, generator=generator, dtype=dtype)
        positions = torch.arange(60)[7 + number :: 4] if number < 2 else torch.arange(0)
        assert (ids == 0).any()
        targets = ids.roll(-1, 1)
        counts = weights.sum(-1), torch.full((2,), 30)
        batch = ResponseBatch({"input_ids": ids}, ids, targets, weights, *counts, positions)
        parts.append((batch, LossObjective()))
    return parts


def loss_of(model: Any, part: tuple[Any, ...], is_fused: bool = True) -> Tensor:
    if is_fused:
        return FusedHead(model, LogitTransform()).forward(model, *part).loss
    return forward_full(model, *part)[0].loss


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    assert (found - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize(("dtype", "bound"), DTYPES)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gpt2"])
def test_the_gradient_of_several_micro_batches_is_that_of_full_logits(
    model_type: str, set_to_none: bool, dtype: torch.dtype, bound: float, model_factory: Make
) -> None:
    model = model_factory(model_type).eval().to(dtype)
    grads, norms, counts = [], [], []
    for is_fused in (True, False):
        for _ in range(2):
            model.zero_grad(set_to_none)
            with DenseGradients() as dense:
                for part in microbatches(dtype):
                    # As the scaler of half precision does.
                    (loss_of(model, part, is_fused) * 1024).backward()
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        grads.append([p.grad.clone() for p in model.parameters()])
        counts.append(dense.count)
    for found, expected in zip(*grads, strict=True):
        assert_close(found, expected, bound)
    assert_close(torch.stack(norms[:2]), torch.stack(norms[2:]), bound)
    # GPT-2 has an embedding of positions too.
    assert counts == ([3, 6] if model_type == "gpt2" else [0, 3])


def test_gradients_are_the_same_however_they_are_asked_for(model: Any) -> None:
    model = model.double()
    part = microbatches(torch.float64)[0]
    weight = model.lm_head.weight
    (expected,) = torch.autograd.grad(loss_of(model, part, is_fused=False), weight)
    loss = loss_of(model, part)
    # Twice through the same graph: the head's own gradient must not have changed.
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, weight, retain_graph=True)
        assert_close(found, expected, 1e-12)
    hooked: list[Tensor] = []
    weight.register_hook(hooked.append)
    loss.backward()
    assert_close(weight.grad, expected, 1e-12)
    assert len(hooked) == 1
    assert_close(hooked[0], expected, 1e-12)


def test_an_embedding_whose_weight_no_head_uses_has_its_own_gradient(model: Any) -> None:
    ids = torch.tensor([[5, 0, 5, 7]])
    with shared_gradient(model, model, model.lm_head) as handed_on:
        embedded = model.get_input_embeddings()(ids)
        assert handed_on
        assert handed_on[0].data_ptr() == model.lm_head.weight.data_ptr()
    embedded.sum().backward()
    expected = torch.zeros(300, 32)
    # The padding token, 0, is not trained where it is read.
    expected[5], expected[7] = 2, 1
    assert torch.equal(model.lm_head.weight.grad, expected)


def test_a_second_derivative_is_refused(model: Any) -> None:
    loss = loss_of(model, microbatches(torch.float32)[0])
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(loss, model.lm_head.weight, create_graph=True)


class OwnEmbedding(nn.Embedding):
    """Does more than looking up rows."""


def untie(model: Any) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())


def limit(model: Any) -> None:
    model.get_input_embeddings().max_norm = 1.0


def scale(model: Any) -> None:
    model.get_input_embeddings().scale_grad_by_freq = True


def make_sparse(model: Any) -> None:
    model.get_input_embeddings().sparse = True


def replace_forward(model: Any) -> None:
    model.get_input_embeddings().forward = model.get_input_embeddings().forward


def replace_class(model: Any) -> None:
    model.get_input_embeddings().__class__ = OwnEmbedding


def freeze(model: Any) -> None:
    model.lm_head.weight.requires_grad_(False)


def halve(model: Any) -> None:
    model.bfloat16()


def compile_it(model: Any) -> None:
    model.compile(backend="eager")


@pytest.mark.parametrize(
    "change",
    [
        untie,
        limit,
        scale,
        make_sparse,
        replace_forward,
        replace_class,
        freeze,
        halve,
        compile_it,
    ],
)
def test_where_it_might_differ_or_gain_nothing_it_is_left_out(
    change: Callable[[Any], None], model: Any
) -> None:
    change(model)
    own = model.get_input_embeddings().forward
    with shared_gradient(model, model, model.lm_head) as handed_on:
        assert model.get_input_embeddings().forward == own
        model.get_input_embeddings()(torch.tensor([[5]]))
    assert handed_on == []


def test_a_model_in_an_engine_and_a_run_without_gradients_are_left_alone(model: Any) -> None:
    class Engine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, **inputs: Any) -> Any:
            return model(**inputs)

    part = microbatches(torch.float32)[0]
    with DenseGradients() as dense:
        FusedHead(model, LogitTransform()).forward(Engine(), *part).loss.backward()
    assert dense.count == 1
    with torch.no_grad(), shared_gradient(model, model, model.lm_head) as handed_on:
        model.get_input_embeddings()(torch.tensor([[5]]))
    assert handed_on == []
    assert "forward" not in vars(model.get_input_embeddings())
