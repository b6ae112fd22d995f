"""What a verification found: figures with their bounds, of all processes, as a table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from rich.table import Table
from rich.text import Text
from torch import nn

from hf_sft_plugin.models.float64_run import MODEL_ERRORS
from hf_sft_plugin.types import visible_lines

_OF_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


@dataclass(frozen=True)
class VerificationCheck:
    """One figure of a verification, and how large it may be.

    Attributes:
        name: What was checked.
        value: The figure; None where the check could not run.
        bound: The largest figure that passes.
        note: What the figure was made of, or why the check could not run.
        remedy: What a figure above the bound means, and what to do.
    """

    name: str
    value: float | None
    bound: float
    note: str
    remedy: str = ""

    @property
    def has_failed(self) -> bool:
        """Whether the figure is above its bound, or no number."""
        return self.value is not None and not self.value <= self.bound


def not_run(name: str, reason: str) -> VerificationCheck:
    """A check that could not run, and why."""
    return VerificationCheck(name, None, 0.0, f"not run: {reason}")


def run_checks(
    names: Sequence[str], check: Callable[[], list[VerificationCheck]]
) -> list[VerificationCheck]:
    """Runs checks; what a model raises that was not made for them is no reason to stop.

    Args:
        names: Those of the checks that come out.
        check: Makes them.
    """
    try:
        checks = check()
    except MODEL_ERRORS as error:
        return [not_run(name, visible_lines(f"{type(error).__name__}: {error}")) for name in names]
    assert [each.name for each in checks] == list(names), "processes compare them by name"
    return checks


def worst_of_processes(checks: list[VerificationCheck]) -> list[VerificationCheck]:
    """Each check as it came out on the process where it came out worst."""
    found: list[list[VerificationCheck]] = gather_object([checks])

    def badness(check: VerificationCheck) -> tuple[bool, bool, float]:
        return check.has_failed, check.value is not None, check.value or 0.0

    return [max(each, key=badness) for each in zip(*found, strict=True)]


def checks_table(checks: Sequence[VerificationCheck], caption: str) -> Table:
    """The checks as a table for the terminal."""
    table = Table(
        title="Verified before step 1",
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=None,
    )
    table.add_column("", style="bold")
    table.add_column("found", justify="right", no_wrap=True)
    table.add_column("at most", justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for check in checks:
        has_run = check.value is not None
        figures = (_figure(check.value or 0.0), _figure(check.bound)) if has_run else ("-", "-")
        # As text, or rich would take brackets in it for its markup.
        note = Text(check.note)
        table.add_row(check.name, *figures, note, style="red" if check.has_failed else None)
    return table


def _figure(value: float) -> str:
    return f"{value:.0f}" if float(value).is_integer() or value >= 10 else f"{value:.1e}"


def describe_failures(checks: Sequence[VerificationCheck]) -> str:
    """What is wrong and what to do, for an error; empty where nothing is."""
    return "\n".join(
        f"{check.name}: {_figure(check.value or 0.0)} {check.note}; at most "
        f"{_figure(check.bound)} may be. {check.remedy}"
        for check in checks
        if check.has_failed
    )


def working_dtype(accelerator: Accelerator, model: nn.Module) -> torch.dtype:
    """The least precise dtype in which a model multiplies."""
    half = _OF_AUTOCAST.get(accelerator.mixed_precision)
    if half is not None:
        return half
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtype = min(dtypes, key=lambda dtype: torch.finfo(dtype).bits)
    of_torch: Any = torch.backends
    backends = of_torch.cuda.matmul, of_torch.mkldnn.matmul
    if dtype == torch.float32 and any(b.fp32_precision in ("tf32", "bf16") for b in backends):
        return torch.bfloat16
    return dtype
