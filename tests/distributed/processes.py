"""Real processes over gloo for tests, forked from one that has imported everything."""

import gc
import multiprocessing
import os
import pickle
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import torch

from hf_sft_plugin.training import callbacks

# Importing them takes seconds, so it happens once and not in every process.
PRELOADED = [
    "hf_sft_plugin.training.trainer",
    "hf_sft_plugin.training.run_summary",
    "hf_sft_plugin.verification.verification",
    "transformers.models.llama.modeling_llama",
]


def forking() -> ForkServerContext:
    """Starts processes from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_on_processes(
    num_processes: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Calls a function on every process of a group, with the environment that torchrun would set.

    Args:
        num_processes: Ranks of the group; 1 is a group of one.
        function: A function at the top of a module that can be imported, such as
            `worker.run`; not of a test file.
        args: Its arguments; they are pickled, as are the results.
        timeout: Seconds that all of them may take together.

    Returns:
        The results of all ranks in order.

    Raises:
        AssertionError: If a process raised, died or hung; with its traceback.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    group |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(num_processes))
    environments = [
        {**group, **dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))}
        for rank in range(num_processes)
    ]
    return _run_all(environments, function, args, timeout)


def run_alone(function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> Any:
    """Calls a function in a process of its own, which belongs to no group; see above."""
    return _run_all([{}], function, args, timeout)[0]


def _run_all(
    environments: list[dict[str, str]],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    timeout: float,
) -> list[Any]:
    context = forking()
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{rank}.pickle") for rank in range(len(environments))]
        processes = [
            context.Process(target=_run, args=(environment, file, function, args))
            for environment, file in zip(environments, files, strict=True)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        try:
            while any(process.is_alive() for process in processes):
                failed = [process for process in processes if process.exitcode]
                # The others wait for one that is gone.
                if failed or time.monotonic() > deadline:
                    break
                time.sleep(0.02)
        finally:
            for process in processes:
                process.kill()
                process.join()
        found = [_read(file) for file in files]
    codes = [process.exitcode for process in processes]
    errors = [f"rank {rank}: {e}" for rank, (e, _) in enumerate(found) if e is not None]
    assert not errors, f"exit codes {codes}\n" + "\n".join(errors)
    return [result for _, result in found]


def _read(file: Path) -> tuple[str | None, Any]:
    if not file.exists():
        return "no result", None
    error, result = pickle.loads(file.read_bytes())  # noqa: S301  # written by `_run`
    return error, result


def _run(
    environment: dict[str, str], file: Path, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    # Every training looks for garbage; what was made by imports is none.
    gc.collect()
    gc.freeze()
    # They take longer than the training of a few rows.
    callbacks.write_report = lambda folder: []
    try:
        answer = (None, function(*args))
    except BaseException:
        answer = (traceback.format_exc(), None)
    # Written whole or not at all.
    partial = file.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(answer))
    partial.rename(file)
    if torch.distributed.is_initialized() and answer[0] is None:
        torch.distributed.destroy_process_group()
    sys.exit(answer[0] is not None)
