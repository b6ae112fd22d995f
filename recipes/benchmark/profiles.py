"""Where the time of a step goes: matrix products, attention, the optimizer, and the rest."""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from measuring import device_name, versions, wait_for_device
from results import Result, make_table
from steps import TurnsOfOneStep, take_part
from torch.profiler import ProfilerActivity, profile
from turns import Stopwatch, take_turns
from workload import Rows, Setup, describe, row_lengths

# Kinds of work by the names of torch's operations. Products of single matrices are those of linear
# layers; those of batches of them belong to attention.
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_")
_ATTENTION = (
    *("aten::_scaled_dot_product", "aten::_flash_attention", "aten::_efficient_attention"),
    *("aten::bmm", "aten::baddbmm", "aten::_softmax"),
)
_OPTIMIZER = ("aten::_fused_adam", "aten::_foreach")
_KINDS = ("products", "attention", "optimizer", "rest")
# A product of this many rows and columns is as fast as products get.
_SIZE = 2048


@dataclass
class StepProfile:
    """One optimizer step of one contestant.

    Attributes:
        seconds: By kind of work: products, attention, optimizer, rest.
        operations: Of the products: two for each multiplication and addition.
        best_rate: Operations per second of one large product right after the step.
    """

    seconds: dict[str, float]
    operations: float
    best_rate: float


class ProfiledTurns(TurnsOfOneStep):
    """Watches every turn with torch's profiler, which makes it slower."""

    def __init__(self, stopwatch: Stopwatch, held: int) -> None:
        super().__init__(_ProfilingStopwatch(stopwatch.connection), held)


class _ProfilingStopwatch(Stopwatch):
    """Tells of a turn what its time was spent on."""

    def begin(self) -> None:
        """Waits for the turn, and begins to watch."""
        super().begin()
        activities = [ProfilerActivity.CPU]
        activities += [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        self._profile = profile(activities=activities, record_shapes=True)
        self._profile.__enter__()

    def end(self, record: Any) -> None:
        """Ends the turn with a `StepProfile`."""
        self._profile.__exit__(None, None, None)
        events = self._profile.key_averages(group_by_input_shape=True)
        super().end(sum_up(events, measure_best_rate()))


def sum_up(events: Iterable[Any], best_rate: float) -> StepProfile:
    """The events of a profile by kind of work."""
    seconds = dict.fromkeys(_KINDS, 0.0)
    operations = 0.0
    for event in events:
        on_device = getattr(event, "self_device_time_total", 0.0)
        spent = on_device if torch.cuda.is_available() else event.self_cpu_time_total
        kind = _kind_of(event.key)
        seconds[kind] += spent / 1e6
        if kind == "products":
            operations += event.count * count_operations(event.key, event.input_shapes)
    return StepProfile(seconds, operations, best_rate)


def count_operations(name: str, shapes: Sequence[Sequence[int]]) -> int:
    """Operations of a product, from the shapes of what it was called with.

    Examples:
        >>> count_operations("aten::mm", [[4, 2], [2, 3]])
        48

        What the product is added to comes first.

        >>> count_operations("aten::addmm", [[3], [4, 2], [2, 3], [], []])
        48
    """
    first, second = shapes[:2] if name == "aten::mm" else shapes[1:3]
    return 2 * first[0] * first[1] * second[1]


def _kind_of(name: str) -> str:
    if name in _PRODUCTS:
        return "products"
    if name.startswith(_ATTENTION):
        return "attention"
    return "optimizer" if name.startswith(_OPTIMIZER) else "rest"


def measure_best_rate() -> float:
    """Operations per second of a large product, in the precision of the weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(_SIZE, _SIZE, device=device)
    matrix @ matrix
    wait_for_device()
    before = time.perf_counter()
    matrix @ matrix
    wait_for_device()
    return 2 * _SIZE**3 / (time.perf_counter() - before)


def measure_profiles(
    setup: Setup, contestants: Sequence[str], rows: Rows
) -> dict[str, list[StepProfile]]:
    """Lets the contestants take their steps in turn, as `measure_steps` does."""
    return take_turns(contestants, setup.repetitions + 1, take_profiled_part, setup, rows)


def take_profiled_part(name: str, setup: Setup, rows: Rows, stopwatch: Stopwatch) -> None:
    """The process of one contestant."""
    take_part(name, setup, rows, stopwatch, ProfiledTurns)


def profile_result(setup: Setup, rows: Rows, records: dict[str, list[StepProfile]]) -> Result:
    """Medians by kind of work, and how close the products are to the best that the machine does."""
    steps = {name: profiles[1:] for name, profiles in records.items()}
    best = statistics.median(step.best_rate for each in steps.values() for step in each)
    table = make_table(
        f"Where an optimizer step of {describe(setup, row_lengths(rows))} spends its time, "
        f"medians of {setup.repetitions} profiled steps",
        f"{versions()}; a product of {_SIZE:,} x {_SIZE:,} matrices reached {best / 1e9:,.0f} "
        f"GFLOP/s meanwhile on {device_name(setup.threads)}",
        ("", *(f"{kind} s" for kind in _KINDS), "products", "TFLOP", "GFLOP/s"),
    )
    shares: dict[str, list[float]] = {}
    for name, each in steps.items():
        kinds = [statistics.median(step.seconds[kind] for step in each) for kind in _KINDS]
        shares[name] = [step.seconds["products"] / sum(step.seconds.values()) for step in each]
        operations = statistics.median(step.operations for step in each)
        rate = statistics.median(step.operations / step.seconds["products"] for step in each)
        table.add_row(
            name,
            *(f"{seconds:.2f}" for seconds in kinds),
            f"{statistics.median(shares[name]):.0%}",
            f"{operations / 1e12:.2f}",
            f"{rate / 1e9:,.0f}",
        )
    return Result(table, shares, "share of a step in matrix products", setup, records)
