"""Threads wait without a loop, and as many are used as there are cores to use."""

import os
import subprocess
import sys
from pathlib import Path

import cpu_threads
import pytest

SECOND = "0::/pod/task\n"
FIRST = "8:memory:/\n4:cpu,cpuacct:/pod/task\n0::/\n"


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        (SECOND, {"pod/task/cpu.max": "max 100000\n"}, 6),
        (SECOND, {"pod/task/cpu.max": "200000 100000\n"}, 2),
        (SECOND, {"pod/task/cpu.max": "150000 100000\n"}, 2),
        (SECOND, {"pod/task/cpu.max": "10000 100000\n"}, 1),
        (SECOND, {"pod/task/cpu.max": "900000 100000\n"}, 6),
        (SECOND, {"pod/task/cpu.max": "max 100000\n", "pod/cpu.max": "300000 100000\n"}, 3),
        # In a container its own group may be mounted as the root of all.
        (SECOND, {"cpu.max": "200000 100000\n"}, 2),
        (
            FIRST,
            {
                "cpu/pod/task/cpu.cfs_quota_us": "-1\n",
                "cpu/pod/task/cpu.cfs_period_us": "100000\n",
                "cpu/pod/cpu.cfs_quota_us": "400000\n",
                "cpu/pod/cpu.cfs_period_us": "100000\n",
            },
            4,
        ),
        (SECOND, {}, 6),
        (None, {"cpu.max": "200000 100000\n"}, 6),
    ],
)
def test_a_container_uses_no_more_cores_than_its_quota(
    membership: str | None,
    files: dict[str, str],
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    if membership is not None:
        (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = cpu_threads.count_usable_cores(tmp_path / "groups", tmp_path / "membership")
    assert found == expected


@pytest.mark.parametrize(("given", "found"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_passively_unless_the_user_says_otherwise(
    given: str | None, found: str, recipes: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    environment |= {} if given is None else {"OMP_WAIT_POLICY": given}
    code = "import cpu_threads, os; print(os.environ['OMP_WAIT_POLICY'])"
    output = subprocess.check_output(
        [sys.executable, "-c", code], cwd=recipes, env=environment, text=True
    )
    assert output.strip() == found


def test_the_recipe_says_so_before_torch_is_loaded(recipes: Path) -> None:
    lines = (recipes / "sft.py").read_text(encoding="utf-8").splitlines()
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    standard = sys.stdlib_module_names
    others = [line for line in imports if line.split()[1].split(".")[0] not in standard]
    assert others[0].split("#")[0].strip() == "import cpu_threads"
