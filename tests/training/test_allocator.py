"""Freed memory is kept, which shows in the pages that the kernel has to clear."""

import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset

from hf_sft_plugin import MaskedSFTConfig, MaskedSFTTrainer
from hf_sft_plugin.training import allocator

# Pages of 4 KiB that a process touches for the first time while 64 MiB are taken ten times.
COUNT_FAULTS = """
import resource, runpy, sys
mode, path = sys.argv[1:]
if mode == "keep":
    assert runpy.run_path(path)["keep_freed_memory"]()
def fill():
    bytearray(b"x") * 2**26
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


# What is freed and kept before and after a block takes its place.
FREE = """
import runpy, sys
module = runpy.run_path(sys.argv[1])
share = module["heap_share"]()
assert module["keep_freed_memory"]()
assert module["heap_share"]() > share == 1.0
blocks = [bytearray(b"x") * 2**26, bytearray(b"x") * 2**20]
del blocks[0]
print(module["freed_memory"]())
blocks.append(bytearray(2**25))
print(module["freed_memory"]())
"""
ONLY_GLIBC = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="only glibc has this setting"
)


@ONLY_GLIBC
def test_memory_that_was_freed_and_kept_is_known() -> None:
    command = [sys.executable, "-c", FREE, str(allocator.__file__)]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    before, after = map(int, answer.stdout.split())
    assert 2**26 <= before < 2**27
    assert after < 2**26


@ONLY_GLIBC
def test_memory_is_taken_from_the_system_once() -> None:
    faults = {
        mode: int(
            subprocess.run(
                [sys.executable, "-c", COUNT_FAULTS, mode, str(allocator.__file__)],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for mode in ("keep", "stock")
    }
    # Pages may be 2 MiB at once, where the kernel gives out such.
    assert faults["stock"] >= 10 * 2**26 // 2**21
    assert faults["keep"] * 10 < faults["stock"]


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda name: pytest.fail("was loaded"))
    assert not allocator.keep_freed_memory()


@pytest.mark.parametrize("is_on", [True, False])
def test_training_on_a_cpu_sets_it_unless_told_not_to(
    is_on: bool,
    tokenizer: Any,
    model_factory: Callable[..., Any],
    make_config: Callable[..., MaskedSFTConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    monkeypatch.setattr(
        "hf_sft_plugin.training.trainer.keep_freed_memory", lambda: bool(calls.append(1))
    )
    rows = Dataset.from_list([{"prompt": "hello", "response": "world"}] * 4)
    trainer = MaskedSFTTrainer(
        model_factory(),
        make_config(keep_freed_memory=is_on, max_steps=1),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    assert not calls
    trainer.train()
    assert len(calls) == is_on


def test_a_gpu_gets_a_hint_unless_its_allocator_was_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    hint = allocator.allocator_hint("cuda")
    assert hint is not None
    assert "PYTORCH_ALLOC_CONF=expandable_segments:True" in hint
    assert allocator.allocator_hint("cpu") is None
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:128")
    assert allocator.allocator_hint("cuda") is None
