"""The tiles of the Triton kernels: each gives the same results, and measuring them changes none."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from renee_ray.xfc.weights.rounding import scaled_e4m3
from renee_ray.xfc.weights.storages import SGD, Weights
from tests.pairwise import pairwise
from tests.xfc.interpreter import DEVICE, load_kernels

kernels = load_kernels()
from triton.runtime.errors import OutOfResources  # noqa: E402

from renee_ray.xfc.kernels import tiles  # noqa: E402
from renee_ray.xfc.weights import gpu_rows  # noqa: E402
from tests.xfc.test_kernels import (  # noqa: E402, F401
    E4M3_SUM,
    OPERATIONS,
    ROUNDING,
    SINGLE,
    TILES,
    columns,
    normal,
    one_thread,
    updated,
    use,
)

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []


@pytest.mark.parametrize(
    ("chosen", "dtype", "shape", "with_loss"),
    pairwise(
        TILES,
        [torch.bfloat16, torch.float16, torch.float8_e4m3fn],
        [(300, 139, 40), (70, 300, 144), (257, 65, 20)],
        [True, False],
    ),
    ids=str,
)
def test_residual_in_every_tiling(
    chosen: tiles.Tiles,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    with_loss: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows of 40 bytes are no multiple of 16, so descriptors give way to pointers."""
    use(chosen, monkeypatch)
    (c, batch, dim), scales = shape, None
    operand, inputs = (normal(c, dim, seed=1) / 4).to(dtype), normal(batch, dim, seed=2).to(dtype)
    if dtype == torch.float8_e4m3fn:
        inputs, scales = scaled_e4m3(normal(batch, dim, seed=2))
    factors = torch.ones(batch, device=DEVICE) if scales is None else scales
    labels, rows = columns([(i * 7 % c, i) for i in range(batch)])
    narrow = torch.bfloat16 if scales is not None else dtype
    out = torch.full((c, OPERATIONS[True].padded(batch)), math.nan, dtype=narrow, device=DEVICE)
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE) if with_loss else None
    kernels.residual(operand, inputs, labels, rows, out[:, :batch], loss, scales)

    both = operand.double(), inputs.double() * factors.double()[:, None]
    logits = both[0] @ both[1].T
    exact, target = logits.sigmoid(), torch.zeros_like(logits)
    exact[labels, rows] = -(-logits).sigmoid()[labels, rows]
    target[labels, rows] = 1
    sums = E4M3_SUM if scales is not None else SINGLE
    terms = both[0].abs() @ both[1].abs().T
    tolerance = (ROUNDING[narrow] + 2 * sums * (1 + terms)) * exact.abs() + 2.0**-24
    assert ((out[:, :batch].double() - exact).abs() <= tolerance).all()
    assert (out[:, batch:] == 0).all(), "the rest of a row of G"
    if loss is not None:
        dense = binary_cross_entropy_with_logits(logits, target, reduction="sum")
        assert float(loss) == pytest.approx(float(dense), rel=1e-5 + sums)


@pytest.mark.parametrize("chosen", TILES, ids=str)
def test_update_of_more_columns_than_a_tile_has(
    chosen: tiles.Tiles, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(chosen, monkeypatch)
    n, batch, dim = 150, 70, 296
    weights = Weights("bf16_split", n, dim, False, DEVICE, torch.bfloat16)
    weights.weight.write(0, n, normal(n, dim, seed=1))
    before = weights.read(0, n).double()
    residual = torch.zeros(n, 128, dtype=torch.bfloat16, device=DEVICE)[:, :batch]
    residual.copy_(normal(n, batch, seed=2))
    inputs = normal(batch, dim, seed=3).bfloat16()
    update = kernels.FusedUpdate(weights, SGD(0.1, 0.0, 0.01), 0)
    update(0, n, weights.operand(0, n), residual, inputs)
    exact = before - 0.1 * (residual.double() @ inputs.double() + 0.01 * before)
    error = (weights.read(0, n) - exact).abs()
    assert (
        error <= SINGLE * (before.abs() + residual.double().abs() @ inputs.double().abs())
    ).all()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_measurement_changes_no_weight(momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It launches updates on copies; tiles that need too much of a GPU are left out."""
    case = "bf16_sr", torch.bfloat16, momentum
    expected = updated(kernels.FusedUpdate, case, 0)
    times = iter([0.0, 3.0, 1.0, 2.0])
    measured: list[float] = []

    def milliseconds(call: Callable[[], None]) -> float:
        for _ in range(2):
            call()
        measured.append(next(times))
        if len(measured) == 1:
            raise OutOfResources(1, 0, "shared memory")
        return measured[-1]

    monkeypatch.setattr(tiles, "candidates", lambda *both: TILES[:4])
    monkeypatch.setattr(tiles, "milliseconds", milliseconds)
    monkeypatch.setattr(tiles, "_fastest", {})
    found = updated(kernels.FusedUpdate, case, 0)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert measured == [0.0, 3.0, 1.0, 2.0], "once, for two chunks"
    assert list(tiles._fastest.values()) == [TILES[2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_e4m3_is_expanded_exactly(dtype: torch.dtype) -> None:
    codes = torch.arange(5000, device=DEVICE).to(torch.uint8).view(torch.float8_e4m3fn)
    out = torch.full((5000,), 7.0, dtype=dtype, device=DEVICE)
    gpu_rows.expand_e4m3(codes, out)
    assert torch.equal(out.float().nan_to_num(1000), codes.float().nan_to_num(1000))


def test_every_code_of_e4m3_is_read_and_written_as_it_is() -> None:
    weights = Weights("fp8_sr", 32, 8, False, DEVICE, torch.float32)
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(32, 8).to(DEVICE)
    stored = weights.weight.tensors()[""].view(torch.uint8)
    stored.copy_(codes)
    update = kernels.FusedUpdate(weights, SGD(0.0, 0.0), 0)
    update(
        0, 32, weights.operand(0, 32), *(torch.zeros(n, device=DEVICE) for n in ((32, 1), (1, 8)))
    )
    assert torch.equal(stored, codes)


def test_e4m3_saturates() -> None:
    weights = Weights("fp8_sr", 3, 8, False, DEVICE, torch.float32)
    values = torch.tensor([[1e6, -1e6, math.inf, -math.inf, 460.0, -460.0, 448.0, 0.0]])
    residual, inputs = torch.ones(3, 1, device=DEVICE), values.to(DEVICE)
    kernels.FusedUpdate(weights, SGD(-1.0, 0.0), 0)(0, 3, weights.operand(0, 3), residual, inputs)
    assert torch.equal(weights.read(0, 3).cpu(), values.clamp(-448, 448).expand(3, 8))
