"""Every example in a docstring of the package runs and prints what it says."""

import doctest
import importlib
import pkgutil
from typing import Any

import pytest

import hf_sft_plugin

MODULES = [
    module.name for module in pkgutil.walk_packages(hf_sft_plugin.__path__, prefix="hf_sft_plugin.")
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_are_true(name: str, tokenizer: Any) -> None:
    if name == "hf_sft_plugin.loss.triton_tile":
        pytest.importorskip("triton", reason="Triton, the extra `triton`, is not installed")
    module = importlib.import_module(name)
    results = doctest.testmod(module, extraglobs={"tokenizer": tokenizer})
    assert results.failed == 0


def test_the_public_functions_have_examples() -> None:
    finder = doctest.DocTestFinder()
    without = [
        name
        for name in ("masked_normalize", "compute_entropy", "sft_microbatch_train_step")
        if not any(test.examples for test in finder.find(getattr(hf_sft_plugin, name)))
    ]
    assert without == []
