"""What tests of training share: an old PEFT, float64 for norms, and weights like trained ones."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode


@pytest.fixture
def any_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets transformers add adapters by itself: 5.24 asks for a newer PEFT than there is."""
    monkeypatch.setattr(
        "transformers.integrations.peft.check_peft_version", lambda min_version: None
    )


class InFloat64(TorchFunctionMode):
    """Norms and routers work in float64 too.

    They cast to float32 whatever the dtype of the model, and so their gradients are rounded; that
    of a sum, as at tokens that are shared, is rounded otherwise than its parts.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = torch.Tensor.double if func is torch.Tensor.float else func
        wider = [torch.float64 if each is torch.float32 else each for each in args]
        named = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*wider, **named)


def widen_norms_and_routers(model: nn.Module) -> None:
    """Lets them compute in float64, in the forward pass and when it is run again."""

    def widen(module: nn.Module) -> None:
        own = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with InFloat64():
                return own(*args, **kwargs)

        module.forward = forward

    for module in model.modules():
        if type(module).__name__.endswith(("Norm", "Router")):
            widen(module)


@pytest.fixture(scope="session")
def widen() -> Callable[[nn.Module], None]:
    """See `widen_norms_and_routers`."""
    return widen_norms_and_routers


def like_trained(model: Any) -> Any:
    """Gives random weights what trained ones have: outlier features, large norms, peaked logits."""
    with torch.no_grad():
        embeddings = model.get_input_embeddings().weight
        for name, weight in model.named_parameters():
            is_matrix = weight.dim() > 1 and weight is not embeddings
            weight.mul_(6.0 if is_matrix else 3.0 if "norm" in name else 1.0)
        embeddings.mul_(5.0)
        embeddings[:, 3] *= 60.0
    return model


@pytest.fixture(scope="session")
def trained_like() -> Callable[[Any], Any]:
    """See `like_trained`."""
    return like_trained
