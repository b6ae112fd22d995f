"""Kernels are chosen where they run, and the reason why not is said once."""

import importlib
import importlib.util
import logging
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_sft_plugin.loss import tile_choice
from hf_sft_plugin.loss.logit_tile import LogitTile
from hf_sft_plugin.loss.tile_choice import choose_tile, tile_bytes

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What was chosen is remembered for a whole process."""
    for cached in (tile_choice._fastest_tile, tile_choice._accelerator_bytes):
        cached.cache_clear()
    yield
    for cached in (tile_choice._fastest_tile, tile_choice._accelerator_bytes):
        cached.cache_clear()


class Kernels(LogitTile):
    """Stands for Triton's."""


class Wrong(LogitTile):
    """Forgets to work."""

    def consume(self, *_: Any) -> None:
        pass


class Broken(LogitTile):
    """As on a machine without a compiler."""

    def consume(self, *_: Any) -> None:
        raise RuntimeError("Failed to find C compiler.")


@pytest.fixture
def _installed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Triton is there, a module with a given tile, and the CUDA device is a CPU."""
    tile = getattr(request, "param", Kernels)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(TritonTile=tile))
    tried = tile_choice._try_tile
    monkeypatch.setattr(tile_choice, "_try_tile", lambda tile, _: tried(tile, CPU))


@pytest.mark.usefixtures("_installed")
def test_kernels_that_run_work_on_cuda_and_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert choose_tile(CUDA, dtype) is Kernels
    assert choose_tile(CUDA, torch.float64) is LogitTile
    for name in ("cpu", "mps", "xpu"):
        assert choose_tile(torch.device(name), torch.float32) is LogitTile
    assert caplog.text == ""


@pytest.mark.usefixtures("_installed")
@pytest.mark.parametrize(
    ("_installed", "reason"),
    [
        (Wrong, "of a tile that is known they made .* not "),
        (Broken, "RuntimeError: Failed to find C compiler."),
    ],
    indirect=["_installed"],
)
def test_kernels_that_do_not_run_are_left_out_with_the_reason_said_once(
    reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert choose_tile(CUDA, torch.bfloat16) is LogitTile
        assert choose_tile(CUDA, torch.bfloat16) is LogitTile
    (record,) = caplog.records
    assert record.getMessage().startswith("The statistics of the LM head on cuda:0 are worked out")
    assert re.search(reason, record.getMessage())


def test_without_triton_it_is_named_and_never_imported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(name))
    with caplog.at_level(logging.WARNING):
        assert choose_tile(CUDA, torch.float32) is LogitTile
    assert 'pip install "hf_sft_plugin[triton]"' in caplog.text


@pytest.mark.parametrize(
    ("free_mib", "unused_mib", "expected_mib"),
    [
        (80 * 1024, 0, 1024),
        (8 * 1024, 0, 1024),
        (8 * 1024 - 1, 0, 512),
        (1000, 1100, 256),
        (2048, 0, 256),
        (600, 0, 64),
        (0, 0, 64),
    ],
)
def test_a_tile_takes_a_share_of_the_free_memory_of_a_gpu_asked_for_once(
    free_mib: int, unused_mib: int, expected_mib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def mem_get_info(device: torch.device) -> tuple[int, int]:
        asked.append(device)
        return free_mib * 2**20, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: (3000 + unused_mib) * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3000 * 2**20)
    assert tile_bytes(CUDA) == tile_bytes(CUDA) == expected_mib * 2**20
    assert asked == [CUDA]


def test_other_accelerators_hold_a_tile_of_one_size() -> None:
    assert tile_bytes(torch.device("mps")) == 2**30
