"""Every head in the benchmark works out the same loss and the same gradients."""

from typing import Any

import pytest
import torch
from contestants import why_impossible
from heads import HEADS, PRECISIONS, HeadRecord, HeadSetup, head_result, make_inputs, measure_heads

SETUP = HeadSetup("tiny", 40, 2, "float32", 1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", HEADS)
def test_every_head_gives_the_loss_and_gradients_of_the_formula(name: str, precision: str) -> None:
    impossible = why_impossible([name])
    if impossible is not None:
        pytest.skip(impossible)
    inputs = make_inputs(HeadSetup("tiny", 40, 2, precision, 1))
    weight, rows = (t.detach().double().requires_grad_() for t in (inputs.head.weight, inputs.rows))
    log_p = torch.log_softmax(rows @ weight.T, dim=-1)
    true = -log_p.gather(1, inputs.targets.unsqueeze(1)).mean()
    expected = torch.autograd.grad(true, (weight, rows))
    forward = HEADS[name](inputs)
    with inputs.autocast():
        loss = forward()
    loss.backward()
    # Those that round logits to bf16 are that far from the truth.
    bound = 1e-5 if precision == "float32" else 2e-2
    assert loss.item() == pytest.approx(true.item(), rel=bound)
    for tensor, gradient in zip((inputs.head.weight, inputs.rows), expected, strict=True):
        assert tensor.grad is not None
        assert (tensor.grad.double() - gradient).norm() < bound * gradient.norm()


def test_heads_take_turns_and_the_bare_products_are_measured_with_them() -> None:
    records = measure_heads(SETUP, ["ours", "logits"])
    assert list(records) == ["ours", "logits", "products"]
    assert all(len(passes) == 3 for passes in records.values())
    assert all(record.wall > 0 for passes in records.values() for record in passes)
    assert records["ours"][0].loss == pytest.approx(records["logits"][0].loss, rel=1e-5)


def test_the_table_has_medians_ratios_and_the_share_of_the_products(cells_of: Any) -> None:
    def passes(*walls: float) -> list[HeadRecord]:
        return [HeadRecord(9.0, 0, 5.0), *(HeadRecord(w, 2 * 10**9, 5.0) for w in walls)]

    records = {
        "ours": passes(0.04, 0.08),
        "slow": passes(0.08, 0.24),
        "products": passes(0.02, 0.04),
    }
    result = head_result(SETUP, records)
    assert result.ratios["slow"] == pytest.approx([2.0, 3.0])
    assert cells_of(result.table) == [
        ["ours", "60.0", "1.50", "1.00-2.00", "1.00", "1.00-1.00", "50%", "2.00", "5.0000"],
        ["slow", "160.0", "4.00", "2.00-6.00", "2.50", "2.00-3.00", "21%", "2.00", "5.0000"],
        ["bare products", "30.0", "0.75", "0.50-1.00", "0.50", "0.50-0.50", "100%", "", ""],
    ]
