"""Soft targets in the Triton kernels, and their update after a softmax's residual."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from renee_ray.xfc.kernels.choose import Operations
from renee_ray.xfc.kernels.plain import Update, residual
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.softmax import Reductions
from renee_ray.xfc.weights.rounding import scaled_e4m3
from renee_ray.xfc.weights.storages import SGD, Weights
from tests.xfc.interpreter import DEVICE, load_kernels

kernels = load_kernels()
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
LABELS, BATCH, DIM = 70, 39, 40


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def pairs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(labels, rows, values)"""
    places = torch.arange(0, LABELS * BATCH, 37, device=DEVICE)
    values = torch.rand(len(places), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    values[::3] = 1
    return places // BATCH, places % BATCH, values


@pytest.mark.parametrize("scaled", [False, True])
def test_residual_and_loss_of_soft_targets(scaled: bool) -> None:
    operand, inputs, scales = (
        normal(LABELS, DIM, seed=1).bfloat16(),
        normal(BATCH, DIM, seed=2),
        None,
    )
    if scaled:
        operand = operand.to(torch.float8_e4m3fn)
        inputs, scales = scaled_e4m3(inputs)
    else:
        inputs = inputs.bfloat16()
    labels, rows, values = pairs()
    out = torch.empty(LABELS, BATCH, dtype=torch.bfloat16, device=DEVICE)
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    kernels.residual(operand, inputs, labels, rows, out, loss, scales, values=values)
    wide = inputs.double() if scales is None else inputs.double() * scales.double()[:, None]
    logits, y = operand.double() @ wide.T, torch.zeros_like(out, dtype=torch.float64)
    y[labels, rows] = values.double()
    exact = logits.sigmoid() * (1 - y) - (-logits).sigmoid() * y
    # A difference may be smaller than its terms, which fp32 has to 2**-24 times their size.
    assert ((out.double() - exact).abs() <= 2.0**-8 * exact.abs() + 2.0**-12).all()
    dense = binary_cross_entropy_with_logits(logits, y, reduction="sum")
    assert float(loss) == pytest.approx(float(dense), rel=1e-4 if scaled else 1e-5)
    assert (exact - (logits.sigmoid() - (y > 0).double())).abs().max() > 0.1, "y is noticed"


def test_a_step_of_softmax_is_that_of_plain_torch() -> None:
    """Rows of G are padded to 64, and the kernel's matmul reads the padding."""
    found = []
    labels, rows, values = (each.cpu() for each in pairs())
    for operations in (
        Operations(kernels.residual, kernels.FusedUpdate, kernels.PADDING),
        Operations(residual, Update),
    ):
        owned = LabelRange(0, LABELS, LABELS)
        weights = Weights("bf16_sr", LABELS, DIM, True, DEVICE, torch.bfloat16)
        shard = Shard(owned, weights, 40, operations)
        shard.write(0, normal(LABELS, DIM, seed=1) / 4)
        weights.scratch("logits", 40, 64, dtype=torch.bfloat16).fill_(torch.nan)
        seen: list[torch.Tensor] = []
        loss = shard.step(
            normal(BATCH, DIM, seed=2), Pairs(rows, labels, owned, DEVICE, values),
            SGD(0.1, 0.9, 0.01), with_loss=True, on_gradient=seen.append, softmax=Reductions(),
        )  # fmt: skip
        found.append((loss, seen[0], weights.read(0, LABELS).clone()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[0][2], found[1][2], rtol=2.0**-7, atol=2.0**-8)
