"""A script that just ends leaves no thread of gloo behind that could abort it."""

from pathlib import Path

import exit_worker
from processes import run_on_processes


def test_the_process_group_ends_with_the_interpreter(tmp_path: Path) -> None:
    for has_group, before, after in run_on_processes(2, exit_worker.run, str(tmp_path)):
        assert any("gloo" in name for name in before)
        assert not has_group
        assert not any("gloo" in name for name in after)
