"""The nearest limit decides: that of the machine, or that of a container."""

from pathlib import Path

import psutil
import pytest
import torch

from hf_sft_plugin.training import available_memory as module
from hf_sft_plugin.training.available_memory import available_memory, cgroup_memory


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_second_version_counts_all_groups_above(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("0::/pod/task\n")
    stat = "anon 5\ninactive_file 30\n"
    write(tmp_path / "pod", memory__max="1000\n", memory__current="700\n", memory__stat=stat)
    write(tmp_path / "pod/task", memory__max="max\n", memory__current="9\n", memory__stat=stat)
    assert cgroup_memory(tmp_path, membership) == 330


def test_the_first_version_has_other_names(tmp_path: Path) -> None:
    membership = tmp_path / "membership"
    membership.write_text("8:cpu:/task\n4:memory:/task\n0::/\n")
    files = {"memory__usage_in_bytes": "70", "memory__stat": "total_inactive_file 3"}
    write(tmp_path / "memory/task", memory__limit_in_bytes="100", **files)
    write(tmp_path / "memory", memory__limit_in_bytes=str(2**63 - 4096), **files)
    assert cgroup_memory(tmp_path, membership) == 33


def test_no_groups_no_limit(tmp_path: Path) -> None:
    assert cgroup_memory(tmp_path, tmp_path / "missing") is None
    (tmp_path / "membership").write_text("0::/\n")
    assert cgroup_memory(tmp_path, tmp_path / "membership") is None


@pytest.mark.parametrize(("limit", "expected"), [(None, 500), (600, 300)])
def test_processes_of_a_machine_share_it(
    limit: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Free:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Free)
    monkeypatch.setattr(module, "cgroup_memory", lambda: limit)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert available_memory(torch.device("cpu")) == expected


def test_the_memory_of_the_machine_is_not_that_of_an_accelerator() -> None:
    with pytest.raises(ValueError, match="left on a device of type xpu"):
        available_memory(torch.device("xpu"))
