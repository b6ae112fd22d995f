"""What a benchmark reads of the machine is right."""

import os
import subprocess
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

import measuring
import pytest
import torch
from measuring import device_name, is_out_of_memory, version, versions

# In a process of its own: one that has trained on a CPU keeps the memory that it frees.
SEE_PEAK = """
from measuring import peak_memory, reset_peak_memory
reset_peak_memory()
before = peak_memory()
block = bytearray(2**28)
block[:: 2**12] = b"x" * len(block[:: 2**12])
with_block = peak_memory()
del block
assert with_block - before > 2**27
reset_peak_memory()
assert peak_memory() < with_block - 2**27
"""


def test_the_peak_of_memory_is_seen_and_forgotten() -> None:
    folder = Path(measuring.__file__).parent
    subprocess.run([sys.executable, "-c", SEE_PEAK], cwd=folder, check=True)


# 256 MiB more than there is now can be had, 1 GiB more cannot.
FAIL_AT_LIMIT = """
from measuring import is_out_of_memory, limit_memory, peak_memory, reset_peak_memory
import torch
reset_peak_memory()
limit_memory(peak_memory() / 2**30 + 0.5)
torch.ones(2**28, dtype=torch.uint8)
try:
    torch.ones(2**30, dtype=torch.uint8)
except RuntimeError as error:
    assert is_out_of_memory(error)
else:
    raise AssertionError("there was more than the limit")
"""


def test_memory_ends_at_the_limit() -> None:
    folder = Path(measuring.__file__).parent
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([sys.executable, "-c", FAIL_AT_LIMIT], cwd=folder, check=True, env=environment)


def test_libraries_and_devices_have_names() -> None:
    assert version("torch") == installed_version("torch")
    assert version("no-such-library") == "not installed"
    assert device_name(3)


def test_errors_that_lack_memory_are_told_from_others() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("can't allocate memory"))


def test_the_libraries_of_a_measurement_are_named() -> None:
    assert f"torch {version('torch')}" in versions()
    assert f"transformers {version('transformers')}" in versions()
