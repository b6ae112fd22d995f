"""Measures LM heads: from hidden states of response tokens to the loss and all its gradients.

Everyone gets the same hidden states, weight and targets in one process, and they take turns. Nobody
does less than the bare products, which are measured as well: logits, gradient of the hidden states,
gradient of the weight.
"""

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from measuring import device_name, peak_memory, reset_peak_memory, versions, wait_for_device
from results import Result, make_table, median_and_range, note_on_losses, ratios
from rich.progress import track
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.loss.loss_utils import ForCausalLMLoss
from workload import SHAPES

from hf_sft_plugin import head_loss

PRECISIONS = ("bf16", "autocast", "float32")
# Rows of the bare products at a time: as many as the device multiplies fastest.
_PRODUCT_ROWS = {"cpu": 256, "cuda": 8192}


@dataclass
class HeadSetup:
    """What is measured; the same for every contestant.

    Attributes:
        shape: Name of a model shape, which says V and D.
        num_rows: Response tokens.
        repetitions: Measured passes, after one that is not.
        precision: One of `PRECISIONS`.
        threads: CPU threads.
    """

    shape: str
    num_rows: int
    repetitions: int
    precision: str
    threads: int


@dataclass
class HeadInputs:
    """One head and what goes in, on the device."""

    head: nn.Linear
    rows: Tensor
    targets: Tensor
    autocast: Callable[[], AbstractContextManager[Any]]


@dataclass
class HeadRecord:
    """One pass of one contestant.

    Attributes:
        wall: Seconds.
        transient: Bytes at the highest point beyond inputs and gradients.
        loss: Mean over the rows.
    """

    wall: float
    transient: int
    loss: float


def make_inputs(setup: HeadSetup) -> HeadInputs:
    """Random hidden states for a random head."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if setup.precision == "bf16" else torch.float32
    vocab, hidden = (SHAPES[setup.shape][name] for name in ("vocab_size", "hidden_size"))
    head = nn.Linear(hidden, vocab, bias=False, device=device, dtype=dtype)
    rows = torch.randn(setup.num_rows, hidden, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, vocab, (setup.num_rows,), device=device)
    is_autocast = setup.precision == "autocast"
    return HeadInputs(
        head,
        rows,
        targets,
        lambda: torch.autocast(device, dtype=torch.bfloat16, enabled=is_autocast),
    )


def ours(inputs: HeadInputs) -> Callable[[], Tensor]:
    """This plugin: loss, log-probabilities, entropy and hits."""
    weights = torch.full((len(inputs.rows),), 1 / len(inputs.rows), device=inputs.rows.device)
    return lambda: head_loss(inputs.head, inputs.rows, inputs.targets, weights).loss


def logits(inputs: HeadInputs) -> Callable[[], Tensor]:
    """The loss of transformers on full logits; gives neither entropy nor hits."""

    def run() -> Tensor:
        scores = inputs.head(inputs.rows)
        size = inputs.head.out_features
        loss: Tensor = ForCausalLMLoss(scores, None, size, shift_labels=inputs.targets)
        return loss

    return run


def trl(inputs: HeadInputs) -> Callable[[], Tensor]:
    """The fused head that TRL's SFTTrainer puts on a model, with entropy and hits as there."""
    utils = importlib.import_module("trl.trainer.utils")
    model = Bodiless(inputs.head)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    labels = inputs.targets.unsqueeze(0)

    def run() -> Tensor:
        hidden = inputs.rows.unsqueeze(0)
        loss: Tensor = model(hidden, shift_labels=labels, labels=labels, fused_lm_head=True).loss
        return loss

    return run


def liger(inputs: HeadInputs) -> Callable[[], Tensor]:
    """Liger's fused head, on CUDA alone; gives neither entropy nor, unless asked, hits."""
    module = importlib.import_module("liger_kernel.transformers.fused_linear_cross_entropy")
    fused = module.LigerFusedLinearCrossEntropyLoss()

    def run() -> Tensor:
        loss: Tensor = fused(inputs.head.weight, inputs.rows, inputs.targets)
        return loss

    return run


class Bodiless(nn.Module):
    """A model whose body passes on what it is given."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.lm_head = head
        self.config = PretrainedConfig()

    def base_model(self, hidden_states: Tensor, **_: Any) -> SimpleNamespace:
        """The hidden states as they come."""
        return SimpleNamespace(last_hidden_state=hidden_states)

    def get_output_embeddings(self) -> nn.Linear:
        """The head."""
        return self.lm_head


HEADS: dict[str, Callable[[HeadInputs], Callable[[], Tensor]]] = {
    "ours": ours,
    "logits": logits,
    "trl": trl,
    "liger": liger,
}


def products(inputs: HeadInputs, dtype: torch.dtype) -> Callable[[], None]:
    """The three products that nobody can do without, a tile of rows at a time."""
    weight, rows = (t.detach().to(dtype) for t in (inputs.head.weight, inputs.rows))
    count = min(_PRODUCT_ROWS[rows.device.type], len(rows))
    tile, total = weight.new_empty(count, len(weight)), torch.empty_like(weight)
    back = torch.empty_like(rows[:count])

    def run() -> None:
        for part in rows.split(count):
            scores = torch.mm(part, weight.T, out=tile[: len(part)])
            torch.mm(scores, weight, out=back[: len(part)])
            torch.mm(scores.T, part, out=total)

    return run


def measure_heads(setup: HeadSetup, contestants: Sequence[str]) -> dict[str, list[HeadRecord]]:
    """Lets the contestants take turns.

    Returns:
        The passes by contestant, the first of which is for warming up; and those of the bare
        products, in the dtype in which this device does them fastest.
    """
    inputs = make_inputs(setup)
    passes: dict[str, Callable[[], HeadRecord]] = {
        name: partial(measure_pass, inputs, HEADS[name](inputs)) for name in contestants
    }
    bare = products(inputs, _fastest_dtype(inputs, setup))
    passes["products"] = lambda: HeadRecord(_seconds(bare), 0, 0.0)
    records: dict[str, list[HeadRecord]] = {name: [] for name in passes}
    for _ in track(range(setup.repetitions + 1), description="Measuring", transient=True):
        for name, run in passes.items():
            records[name].append(run())
    return records


def measure_pass(inputs: HeadInputs, forward: Callable[[], Tensor]) -> HeadRecord:
    """One forward and backward pass."""
    leaves: tuple[Tensor, ...] = (inputs.head.weight, inputs.rows)
    for leaf in leaves:
        leaf.grad = None
    reset_peak_memory()
    before = peak_memory()
    losses: list[Tensor] = []

    def run() -> None:
        with inputs.autocast():
            loss = forward()
        loss.backward()
        losses.append(loss.detach())

    wall = _seconds(run)
    kept = sum(leaf.grad.nbytes for leaf in leaves if leaf.grad is not None)
    return HeadRecord(wall, peak_memory() - before - kept, losses[0].item())


def _fastest_dtype(inputs: HeadInputs, setup: HeadSetup) -> torch.dtype:
    """Of bf16 and float32, where both are allowed, what this device multiplies faster."""
    if setup.precision == "float32":
        return torch.float32
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        part = HeadInputs(inputs.head, inputs.rows[:64], inputs.targets[:64], inputs.autocast)
        run = products(part, dtype)
        run()
        seconds[_seconds(run)] = dtype
    return seconds[min(seconds)]


def _seconds(run: Callable[[], None]) -> float:
    wait_for_device()
    start = time.perf_counter()
    run()
    wait_for_device()
    return time.perf_counter() - start


def head_result(setup: HeadSetup, records: dict[str, list[HeadRecord]]) -> Result:
    """Medians with their range, ratios over the first, and the share of the bare products."""
    sizes = SHAPES[setup.shape]
    losses = {name: steps[0].loss for name, steps in records.items() if name != "products"}
    table = make_table(
        f"Head of {setup.shape} (V {sizes['vocab_size']:,}, D {sizes['hidden_size']:,}) with "
        f"{setup.num_rows:,} response rows, {setup.precision}, {device_name(setup.threads)}, "
        f"medians of {setup.repetitions}",
        f"{versions()}; transient: beyond inputs and gradients"
        + note_on_losses(losses, "first losses"),
        ("", "ms", "ms/row", "(range)", "ratio", "(range)", "of products", "transient GB", "loss"),
    )
    first = [record.wall for record in next(iter(records.values()))[1:]]
    floor = [record.wall for record in records["products"][1:]]
    slower: dict[str, list[float]] = {}
    for name, (_, *passes) in records.items():
        walls = [record.wall for record in passes]
        is_bare = name == "products"
        label = "bare products" if is_bare else name
        slower[label] = ratios(walls, first)
        table.add_row(
            label,
            f"{1000 * statistics.median(walls):.1f}",
            *median_and_range([1000 * wall / setup.num_rows for wall in walls]),
            *median_and_range(slower[label]),
            f"{statistics.median(ratios(floor, walls)):.0%}",
            "" if is_bare else f"{max(record.transient for record in passes) / 1e9:.2f}",
            "" if is_bare else f"{passes[0].loss:.4f}",
        )
    unit = f"wall time over that of {next(iter(records))}"
    return Result(table, slower, unit, setup, records)
