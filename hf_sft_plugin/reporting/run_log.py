"""`metrics.jsonl`: every log line of a run as one line of JSON."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"


def start_log(output_dir: Path, records: Iterable[Mapping[str, Any]] = ()) -> None:
    """Begins the log anew.

    Args:
        output_dir: Folder of the run.
        records: Log lines that a resumed run has already behind it.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    lines = "".join(_to_line(record) for record in records)
    (output_dir / METRICS_FILE).write_text(lines, encoding="utf-8")


def append_log(output_dir: Path, record: Mapping[str, Any]) -> None:
    """Adds one log line."""
    with (output_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
        file.write(_to_line(record))


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """All log lines of a run, in order; empty where there is no log."""
    path = output_dir / METRICS_FILE
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _to_line(record: Mapping[str, Any]) -> str:
    return json.dumps(_to_plain(record), default=str, allow_nan=False) + "\n"


def _to_plain(value: Any) -> Any:
    """Plain numbers for those of numpy and torch, null for what JSON cannot write."""
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if isinstance(value, float):
        # JSON has no NaN or infinity, and a log that some reader refuses is no log.
        return float(value) if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return _to_plain(value.tolist())
    return value
