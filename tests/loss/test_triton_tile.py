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

    capability = 90

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> Any:
        target = importlib.import_module("triton.backends.compiler").GPUTarget
        return target("cuda", self.capability, 32)


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


def local_bytes(cubin: bytes, folder: Path) -> int:
    """Bytes of each thread in local memory, where the compiler puts what has no register."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    backend = Path(importlib.import_module("triton.backends.nvidia.compiler").__file__ or "")
    tool = backend.with_name("bin") / "cuobjdump"
    done = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    ((stack, local),) = re.findall(r"\bSTACK:(\d+).*\bLOCAL:(\d+)", done.stdout)
    return int(stack) + int(local)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("vocab_size", "capability"), [(4096, 90), (4099, 80)])
@pytest.mark.parametrize("is_changed", [False, True], ids=["plain", "everything"])
def test_the_kernels_compile_for_a_gpu_and_keep_to_its_registers(
    is_changed: bool,
    vocab_size: int,
    capability: int,
    dtype: torch.dtype,
    compiled: dict[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without one, because the interpreter takes much that the compiler refuses."""
    monkeypatch.setattr(AbsentGpu, "capability", capability)
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
        # Some versions of the compiler keep a number or two there that the loop has no need of.
        assert local_bytes(kernel.asm["cubin"], tmp_path) <= 16
    if vocab_size % 16 == 0:
        # As much at once as a GPU reads and writes.
        sums, *_, gradient = (kernel.asm["ptx"] for kernel in compiled.values())
        assert "ld.global.v4" in sums
        assert "ld.global.v4" in gradient
        assert "st.global.v4" in gradient
