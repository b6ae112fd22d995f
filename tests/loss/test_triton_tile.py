"""The kernels: run by an interpreter, compiled for a GPU that need not be there, and run on one."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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


TILE = {"logits": "*bf16", "row_stride": "i32", "targets": "*i64", "vocab_size": "i32"}
CHANGES = {"bias": "*fp32", "multiplier": "fp32", "divisor": "fp32", "softcap": "fp32"}
ROWS = dict.fromkeys(("tops", "exp_factors", "at_targets"), "*fp32")
MORE_ROWS = dict.fromkeys(("product_factors", "offsets", "spreads"), "*fp32")
KERNELS = {
    "_row_sums_kernel": {"sums": "*fp32", "num_rows": "i32", "is_top1": "*fp32"},
    "_gradient_kernel": ROWS,
    "_bias_gradient_kernel": {
        **ROWS,
        "num_rows": "i32",
        "coefficients": "*fp32",
        "bias_gradient": "*fp64",
    },
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled")
@pytest.mark.parametrize("more", [{}, {**CHANGES, **MORE_ROWS}], ids=["plain", "everything"])
@pytest.mark.parametrize("name", KERNELS)
def test_the_kernels_compile_for_a_gpu(
    name: str, more: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one, because the interpreter takes much that the compiler refuses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    compiler = importlib.import_module("triton.compiler")
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    module = importlib.import_module("hf_sft_plugin.loss.triton_tile")
    kernel = getattr(module, name)
    types = {**TILE, **KERNELS[name], **more}
    given: dict[str, Any] = {"block_size": module._BLOCK_SIZE}
    if name == "_bias_gradient_kernel":
        given = {"block_size": module._BIAS_BLOCK_SIZE}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    constants = {
        (position,): given.get(argument)
        for position, argument in enumerate(kernel.arg_names)
        if argument not in types
    }
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants)
    options = {"num_warps": 4 if name == "_bias_gradient_kernel" else module._NUM_WARPS}
    compiled = compiler.compile(source, target=target, options=options)
    assert compiled.asm["cubin"]
    # Nothing is added up in an order that may change.
    assert not re.search(r"\b(atom|red)\.", compiled.asm["ptx"])
