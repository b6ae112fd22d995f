"""What the processes of a test find: a model and its tokenizer in a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def save_model(
    tmp_path_factory: pytest.TempPathFactory,
    tokenizer_factory: Callable[..., Any],
    model_factory: Callable[..., Any],
) -> Callable[..., Path]:
    """Saves them below a new folder, as `model` and `tokenizer`; weights are float64 if asked."""

    def save(name: str, is_double: bool = False, **fields: Any) -> Path:
        folder = tmp_path_factory.mktemp(name)
        model = model_factory(**fields)
        (model.double() if is_double else model).save_pretrained(folder / "model")
        tokenizer_factory().save_pretrained(folder / "tokenizer")
        return folder

    return save
