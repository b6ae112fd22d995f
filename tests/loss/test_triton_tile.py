"""The kernels: run by an interpreter, compiled for a GPU that need not be there, and run on one."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sft_plugin.loss.logit_tile import LogitTransform, RowValues
from hf_sft_plugin.loss.objective import LossObjective

ROOT = Path(__file__).parents[2]
CASES = Path(__file__).with_name("triton_tile_cases.py")
# Half of the cases by time; the others are all the rest.
ERRORS = "errs_no_more"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton, the extra `triton`, is not installed",
)


def run_cases(device: str, chosen: str) -> None:
    """In a process of its own: Triton decides at its import whether it interprets."""
    environment = {
        **os.environ,
        "TRITON_CASES_DEVICE": device,
        "TRITON_INTERPRET": str(int(device == "cpu")),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, str(CASES)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.parametrize("chosen", [ERRORS, f"not {ERRORS}"])
def test_the_interpreter_finds_all_cases_fulfilled(chosen: str) -> None:
    run_cases("cpu", chosen)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("chosen", [ERRORS, f"not {ERRORS}"])
def test_a_gpu_finds_all_cases_fulfilled(chosen: str) -> None:
    run_cases("cuda", chosen)


class AbsentGpu:
    """Tells Triton what to compile for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The kernels by name, of calls that end where their kernel would be launched."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = importlib.import_module("triton.runtime.jit").JITFunction
    driver = importlib.import_module("triton.runtime").driver
    run = function.run
    kernels: dict[Any, Any] = {}

    def compile_only(self: Any, *args: Any, **options: Any) -> None:
        kernels[self] = run(self, *args, **{**options, "warmup": True})

    monkeypatch.setattr(function, "run", compile_only)
    monkeypatch.setattr(driver, "_active", AbsentGpu())
    yield kernels
    for kernel in kernels:
        kernel.device_caches.clear()


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [4096, 4099])
@pytest.mark.parametrize("is_changed", [False, True], ids=["plain", "everything"])
def test_the_kernels_compile_for_a_gpu(
    is_changed: bool, vocab_size: int, dtype: torch.dtype, compiled: dict[Any, Any]
) -> None:
    """Without one, because the interpreter takes much that the compiler refuses."""
    kind = importlib.import_module("hf_sft_plugin.loss.triton_tile").TritonTile
    logits = torch.zeros(3, vocab_size, dtype=dtype)
    values = RowValues.empty(3, like=logits, dtype=torch.float32)
    # What a config holds may be a whole number.
    transform, objective, bias = LogitTransform(), LossObjective(), None
    if is_changed:
        transform = LogitTransform(multiplier=2, divisor=1, softcap=30)
        objective = LossObjective(label_smoothing=0.1, z_loss_coef=0.1, entropy_coef=0.1)
        bias = torch.zeros(vocab_size)
    bias_gradient = None if bias is None else bias.double()
    work = kind(bias, transform, objective, torch.float32, True, bias_gradient)
    work.consume(logits, torch.zeros(3, dtype=torch.long), torch.ones(3), values)
    names = ["_row_sums_kernel", *(["_bias_gradient_kernel"] * is_changed), "_gradient_kernel"]
    assert [kernel.__name__ for kernel in compiled] == names
    for kernel in compiled.values():
        assert kernel.asm["cubin"]
        # Nothing is added up in an order that may change.
        assert not re.search(r"\b(atom|red)\.", kernel.asm["ptx"])
