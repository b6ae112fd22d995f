"""Processes share the cores, show their progress once, and end with nothing running."""

import json
from pathlib import Path
from typing import Any

import datasets
import parallel
import pytest
import recipe_worker
import torch
from processes import run_on_processes


def test_all_cores_are_used_on_a_cpu(monkeypatch: pytest.MonkeyPatch, make_config: Any) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)))
    for world_size, asked in ((1, None), (2, None), (9, None), (2, 5)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(world_size))
        parallel.use_all_cores(make_config(), asked)
    assert threads == [6, 3, 1, 5]


@pytest.mark.parametrize(
    ("disable_tqdm", "local_process_index", "shown"),
    [(False, 0, True), (False, 1, False), (True, 0, False)],
)
def test_only_the_first_process_of_a_machine_shows_progress(
    disable_tqdm: bool,
    local_process_index: int,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    make_config: Any,
) -> None:
    monkeypatch.setattr(
        type(make_config()), "local_process_index", property(lambda _: local_process_index)
    )
    datasets.enable_progress_bars()
    parallel.show_progress_once(make_config(disable_tqdm=disable_tqdm))
    assert datasets.are_progress_bars_disabled() is not shown
    datasets.enable_progress_bars()


def test_processes_end_with_the_model_saved_and_no_thread_of_their_group(tmp_path: Path) -> None:
    model = {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}
    model |= {"num_hidden_layers": 1, "intermediate_size": 32}
    flags = ["--output_dir", str(tmp_path), "--model_config", json.dumps(model), "--max_steps", "1"]
    flags += ["--use_cpu", "1", "--disable_tqdm", "1", "--max_train_rows", "8"]
    flags += ["--max_eval_rows", "4", "--generation_max_new_tokens", "2"]
    left = run_on_processes(2, recipe_worker.run, flags)
    assert (tmp_path / "model.safetensors").is_file()
    assert [name for names in left for name in names if "gloo" in name] == []
