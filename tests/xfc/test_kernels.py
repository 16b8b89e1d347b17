"""The Triton kernels against float64 and against plain torch with the same noise.

Sizes are no multiples of a tile. On a GPU they run as compiled, elsewhere in Triton's interpreter.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from renee_ray.xfc.kernels.choose import Operations
from renee_ray.xfc.kernels.plain import Update, residual
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.weights.rounding import PERIOD, scaled_e4m3
from renee_ray.xfc.weights.storages import SGD, STORAGES, Weights
from tests.pairwise import pairwise
from tests.xfc.interpreter import DEVICE, load_kernels

kernels = load_kernels()
from renee_ray.xfc.kernels import tiles  # noqa: E402

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []

OPERATIONS = {
    True: Operations(kernels.residual, kernels.FusedUpdate, kernels.PADDING),
    False: Operations(residual, Update),
}
LABELS, BATCH, DIM = 150, 139, 40
SINGLE = 2.0**-21
"""Error of a few operations in fp32, relative to the largest number that they meet."""
E4M3_SUM = 2.0**-12 if DEVICE.type == "cuda" else SINGLE
"""Of a sum of e4m3 products, relative to its largest term: GPUs may keep no more digits."""
SMALLEST = 2.0**-126
"""Of the normal fp32 numbers."""
ROUNDING = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half the spacing of a dtype, relative to a number."""
POSITIVES = {
    "some": [(0, 0), (LABELS - 1, BATCH - 1), (127, 128), (128, 127), (7, 3), (7, 4), (60, 100)],
    "none": [],
    "a label of all rows": [(64, row) for row in range(BATCH)],
    "a row of all labels": [(label, 5) for label in range(LABELS)],
}

TILES = tiles.DESCRIBED + tiles.POINTED
CANDIDATES, PROGRAMS = tiles.candidates, tiles.Tiles.programs
OTHERS = [kind for kind in POSITIVES if kind != "some"]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter is not made for lanes; nothing is measured unless a test asks."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(tiles, "candidates", lambda *both: offered(*both)[:1])


def offered(left: torch.Tensor, right: torch.Tensor) -> tuple[tiles.Tiles, ...]:
    """The candidates, but small ones for fp32 on a GPU: large ones take minutes to compile."""
    small = left.is_cuda and left.dtype == torch.float32
    return TILES[-1:] if small else CANDIDATES(left, right)


def use(chosen: tiles.Tiles, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes kernels take these tiles, where descriptors can be had, and one program take all."""

    def candidates(*both: torch.Tensor) -> tuple[tiles.Tiles, ...]:
        found = offered(*both)
        able = found[0] != TILES[-1] and (found[0].resident or not chosen.resident)
        return (chosen,) if able else found[:1]

    monkeypatch.setattr(tiles, "candidates", candidates)
    monkeypatch.setattr(tiles.Tiles, "programs", lambda self, count, device: min(count, 1))


def normal(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE)


def columns(listed: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.tensor(listed, dtype=torch.int64, device=DEVICE).reshape(-1, 2)
    return both[:, 0].contiguous(), both[:, 1].contiguous()


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*(("some", dtype) for dtype in ROUNDING), *((kind, torch.bfloat16) for kind in OTHERS)],
)
def test_residual_and_loss(kind: str, dtype: torch.dtype) -> None:
    """Within the rounding of the result to its dtype, however small it is."""
    operand, inputs = (normal(n, DIM, seed=n).to(dtype) for n in (LABELS, BATCH))
    operand[POSITIVES["some"][0][0]] = inputs[POSITIVES["some"][0][1]] / 4  # a certain positive
    labels, rows = columns(POSITIVES[kind])
    found = operand.new_full((LABELS, BATCH), float("nan"))
    loss = torch.ones((), dtype=torch.float64, device=DEVICE)
    assert kernels.residual(operand, inputs, labels, rows, found, loss) is found

    logits = operand.double() @ inputs.double().T
    target = torch.zeros_like(logits)
    target[labels, rows] = 1
    # sigmoid(-z), not 1 - sigmoid(z): float64 too has only so many digits below 1.
    exact = logits.sigmoid() * (1 - target) - (-logits).sigmoid() * target
    error = (found.double() - exact).abs()
    terms = operand.double().abs() @ inputs.double().abs().T
    tolerance = (ROUNDING[dtype] + SINGLE * (1 + terms)) * exact.abs()
    smallest = 2.0**-24 if dtype == torch.float16 else 0.0
    assert (error <= tolerance + smallest).all()
    dense = binary_cross_entropy_with_logits(logits, target, reduction="sum")
    assert float(loss - 1) == pytest.approx(float(dense), rel=1e-5)

    if kind == "some" and dtype == torch.bfloat16:
        naive = logits.sigmoid().to(dtype) - target.to(dtype)
        assert ((naive.double() - exact).abs() > 4 * tolerance)[labels, rows].any()
    if kind != "none":
        assert ((logits.sigmoid() - exact).abs() > 4 * tolerance)[labels, rows].all()


def test_loss_of_improbable_labels_keeps_its_digits() -> None:
    """softplus(-17) is 4e-8: log(1 + x) in fp32 would give 0 or three times that."""
    operand, inputs = torch.full((3, 1), -17.0), torch.ones(5, 1)
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    none = columns([])
    out = torch.empty(3, 5, device=DEVICE)
    kernels.residual(operand.to(DEVICE), inputs.to(DEVICE), *none, out, loss)
    assert float(loss) == pytest.approx(15 * math.log1p(math.exp(-17)), rel=1e-5)


@pytest.mark.parametrize("kind", ["some", "a label of all rows"])
def test_residual_and_loss_of_e4m3_numbers(kind: str) -> None:
    """Exact products of these numbers, and no other rounding than that of the result."""
    operand = normal(LABELS, DIM, seed=1).to(torch.float8_e4m3fn)
    embeddings = (
        normal(BATCH, DIM, seed=2)
        * (10.0 ** torch.arange(-3, 2).to(DEVICE))[:, None][torch.arange(BATCH) % 5]
    )
    inputs, scales = scaled_e4m3(embeddings)
    labels, rows = columns(POSITIVES[kind])
    out = torch.empty(LABELS, BATCH, dtype=torch.bfloat16, device=DEVICE)
    loss = torch.ones((), dtype=torch.float64, device=DEVICE)
    found = kernels.residual(operand, inputs, labels, rows, out, loss, scales)
    assert found is out

    logits = operand.double() @ (inputs.double() * scales.double()[:, None]).T
    target = torch.zeros_like(logits)
    target[labels, rows] = 1
    exact = logits.sigmoid() * (1 - target) - (-logits).sigmoid() * target
    terms = operand.double().abs() @ (inputs.double().abs() * scales.double()[:, None]).T
    tolerance = (2.0**-8 + 2 * E4M3_SUM * (1 + terms)) * exact.abs() + SMALLEST
    assert ((found.double() - exact).abs() <= tolerance).all()
    dense = binary_cross_entropy_with_logits(logits, target, reduction="sum")
    assert float(loss - 1) == pytest.approx(float(dense), rel=1e-5 + E4M3_SUM)
    again = kernels.residual(operand, inputs, labels, rows, torch.empty_like(out), None, scales)
    assert torch.equal(again, out)


def hopper_logits(operand: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """inputs @ operand.T as a tensor core that keeps 14 binary digits adds products of e4m3.

    It adds 32 and the sum so far at a time. Of each it keeps the sign, two digits before the point
    (a product of two mantissas is below 4) and 11 behind it, of the largest one's point.
    """
    total = operand.new_zeros(len(inputs), len(operand))
    for k in range(0, operand.shape[1], 32):
        terms = inputs[:, None, k : k + 32] * operand[None, :, k : k + 32]
        terms = torch.cat([terms, total[..., None]], dim=2)
        largest = terms.abs().amax(dim=2, keepdim=True).clamp(min=SMALLEST)
        place = torch.exp2(largest.log2().floor() - 11)
        total = (terms / place).floor().sum(dim=2) * place[..., 0]
    return total


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_step_with_e4m3_logits(momentum: float) -> None:
    """Only the logits see E rounded; dE and the gradient of the weights take it whole."""
    weights = make_weights("fp8_sr", momentum, torch.float32, LABELS)
    operations = replace(OPERATIONS[True], scaled=True)
    shard = Shard(LabelRange(0, LABELS, LABELS), weights, 70, operations)
    stored, embeddings = weights.read(0, LABELS).double(), normal(BATCH, DIM, seed=4)
    step = 0.9 * weights.velocities(0, LABELS).double() if momentum else 0.0
    rows = torch.tensor([0, 0, 5, 138, 77])
    labels = torch.tensor([0, 149, 149, 3, 80])
    pairs = Pairs(rows, labels, shard.owned, DEVICE)
    seen: list[torch.Tensor] = []
    sgd = SGD(0.002, momentum)
    shard.step(embeddings, pairs, sgd, on_gradient=lambda found: seen.append(found.clone()))

    codes, scales = scaled_e4m3(embeddings)
    narrow = codes.double() * scales.double()[:, None]

    def gradients(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        residual = logits.sigmoid()
        residual[rows, labels] -= 1
        return residual @ stored, residual.T @ embeddings.double()

    (dE, dW), (whole, _) = (gradients(E @ stored.T) for E in (narrow, embeddings.double()))
    logits = hopper_logits(stored, codes.double()) * scales.double()[:, None]
    naive = [(a - b).norm() / b.norm() for a, b in zip(gradients(logits), (dE, dW), strict=True)]
    tolerance = [float(error) + 1e-5 for error in naive]
    assert (seen[0] - dE).norm() < tolerance[0] * dE.norm()
    assert (whole - dE).norm() > 10 * tolerance[0] * dE.norm(), "E is rounded for the logits"
    after = stored - 0.002 * (dW + step)
    # Rounded stochastically, to one of the two neighbours.
    error = (weights.read(0, LABELS) - after).abs()
    computed = 0.002 * tolerance[1] * dW.norm()
    assert (error <= 2.0**-3 * after.abs() + 2.0**-9 + computed).all()
    moved = weights.read(0, LABELS) - stored
    assert moved.norm() > 0.5 * (after - stored).norm()


def test_without_loss_the_residual_is_the_same() -> None:
    operand, inputs = (normal(n, DIM, seed=n) for n in (LABELS, BATCH))
    found = [operand.new_empty(LABELS, BATCH) for _ in range(2)]
    pairs = columns(POSITIVES["some"])
    kernels.residual(operand, inputs, *pairs, found[0], None)
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    kernels.residual(operand, inputs, *pairs, found[1], loss)
    assert torch.equal(*found)


def make_weights(precision: str, momentum: float, compute: torch.dtype, n: int) -> Weights:
    weights = Weights(precision, n, DIM, momentum > 0, DEVICE, compute)
    weights.weight.write(0, n, normal(n, DIM, seed=1))
    if weights.velocity is not None:
        weights.velocity.write(0, n, normal(n, DIM, seed=2))
    return weights


FIRSTS = [0, PERIOD - 50, 2**40 + PERIOD - 100]
CASES = [
    ((name, STORAGES[name].compute if own else torch.float32, momentum), first, chosen)
    for name, own, momentum, first, chosen in pairwise(
        STORAGES, (True, False), (0.0, 0.9), FIRSTS, TILES
    )
]
"""(storage, dtype of the matmuls, momentum), first label, tiles."""
SPACING = {"bf16_sr": 2.0**-7, "fp8_sr": 2.0**-3}
"""Of the stored numbers, relative to them."""


def updated(
    operation: type[Update], case: tuple[str, torch.dtype, float], first: int, seed: int = 5
) -> dict[str, torch.Tensor]:
    """float32 weights and velocities after one update in chunks of 70 and 80 labels."""
    precision, compute, momentum = case
    weights = make_weights(precision, momentum, compute, LABELS)
    update = operation(weights, SGD(0.3, momentum, 0.1, seed, step=3), first)
    # Sums of few multiples of 1/4 are exact in any order, and if rounded to bf16 in between.
    gradients = (normal(LABELS, BATCH, seed=3) * 2).round().clamp(-4, 4) / 4
    inputs = (normal(BATCH, DIM, seed=4) / 2).round().clamp(-1, 1).to(compute)
    for start, stop in ((0, 70), (70, LABELS)):
        part = torch.zeros(stop - start, 192, dtype=compute, device=DEVICE)[:, :BATCH]
        part.copy_(gradients[start:stop])
        update(start, stop, weights.operand(start, stop), part, inputs)
    found = {"weight": weights.read(0, LABELS).clone()}
    if weights.velocity is not None:
        found["velocity"] = weights.velocities(0, LABELS).clone()
    return found


@pytest.mark.parametrize(("case", "first", "chosen"), CASES, ids=str)
def test_update_is_that_of_plain_torch(
    case: tuple[str, torch.dtype, float],
    first: int,
    chosen: tiles.Tiles,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rounded with the same noise, so bit for bit, but where the last bit of fp32 decides."""
    use(chosen, monkeypatch)
    found, plain = (updated(each, case, first) for each in (kernels.FusedUpdate, Update))
    other = updated(Update, case, first, seed=6)
    assert found.keys() == plain.keys()
    for name, ours in found.items():
        rounded = case[0] in SPACING
        theirs, spacing = plain[name], SPACING.get(case[0], 0.0)
        apart = (ours - theirs).abs()
        if rounded:
            assert (apart > 0).double().mean() < 1e-3, name
        assert (apart <= 1.01 * spacing * theirs.abs() + 32 * SINGLE + spacing * 2.0**-6).all()
        if rounded:
            assert (other[name] != theirs).double().mean() > 0.1, "other noise is noticed"


@pytest.mark.parametrize(
    "case", [(precision, torch.float32, 0.9) for precision in STORAGES], ids=str
)
def test_update_is_the_exact_one_rounded_to_a_neighbour(
    case: tuple[str, torch.dtype, float],
) -> None:
    precision, _, momentum = case
    before = make_weights(*(case[0], case[2], case[1]), LABELS)
    weight = before.read(0, LABELS).double()
    gradients = ((normal(LABELS, BATCH, seed=3) * 2).round().clamp(-4, 4) / 4).double()
    inputs = (normal(BATCH, DIM, seed=4) / 2).round().clamp(-1, 1).double()
    step = gradients @ inputs + 0.1 * weight
    if momentum:
        step += momentum * before.velocities(0, LABELS).double()
    exact = {"weight": weight - 0.3 * step, "velocity": step}
    for name, ours in updated(kernels.FusedUpdate, case, 0).items():
        spacing = SPACING.get(precision, 0.0)
        if precision == "fp8_sr" and name == "velocity":
            spacing = SPACING["bf16_sr"]
        error = ours.double() - exact[name]
        # The spacing of e4m3 is nowhere below 2**-9; step and weight are below 32.
        least = 32 * SINGLE + (2.0**-9 if spacing == SPACING["fp8_sr"] else 0.0)
        assert (error.abs() <= spacing * exact[name].abs() + least).all(), name
        # Decay, momentum and the gradient are each far larger than the tolerance of the mean.
        assert abs(float(error.mean())) < 0.02, name


def shard_of(precision: str, fused: bool, owned: LabelRange, chunk: int) -> Shard:
    """Weights that depend on the label alone."""
    compute = torch.float32
    weights = Weights(precision, len(owned), DIM, True, DEVICE, compute)
    shard = Shard(owned, weights, chunk, OPERATIONS[fused])
    shard.write(owned.start, normal(owned.num_labels, DIM, seed=1)[owned.start : owned.stop] / 4)
    return shard


def trained(shard: Shard, steps: int = 3) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """(dE of each step, summed losses, float32 weights); some pairs repeated, some chunks bare."""
    owned = shard.owned
    rows = torch.tensor([0, 0, 5, 5, 138, 9, 9, 77])
    labels = torch.tensor([0, 149, 149, 149, 3, 80, 80, 81])
    inside = (labels >= owned.start) & (labels < owned.stop)
    pairs = Pairs(rows[inside], labels[inside], owned, DEVICE)
    gradients: list[torch.Tensor] = []
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for step in range(steps):
        inputs = normal(BATCH, DIM, seed=10 + step)
        rule = SGD(0.01, 0.9, 0.01, seed=2, step=step)
        loss += shard.step(inputs, pairs, rule, with_loss=True, on_gradient=gradients.append)
    return gradients, loss, shard.weights.read(0, len(owned)).clone()


@pytest.mark.parametrize(
    ("precision", "chunk"), list(zip(STORAGES, [150, 40, 0, 40, 0], strict=True))
)
def test_steps_are_those_of_plain_torch(precision: str, chunk: int) -> None:
    owned = LabelRange(0, LABELS, LABELS)
    ours, theirs = (trained(shard_of(precision, fused, owned, chunk)) for fused in (True, False))
    # A number on the edge of its two neighbours may go the other way, and one is far apart in fp8.
    tolerance = {"bf16_sr": 1e-3, "fp8_sr": 3e-2}.get(precision, 1e-5)
    for found, plain in zip(ours[0], theirs[0], strict=True):
        assert (found - plain).norm() < tolerance * plain.norm()
    assert float(ours[1]) == pytest.approx(float(theirs[1]), rel=tolerance)
    assert (ours[2] != theirs[2]).double().mean() < 1e-2 or precision not in SPACING
    assert (ours[2] - theirs[2]).norm() < tolerance * theirs[2].norm()
    start = shard_of(precision, False, owned, chunk).weights.read(0, LABELS)
    assert (ours[2] - start).norm() > 10 * tolerance * start.norm(), "the steps are larger"


@pytest.mark.parametrize("precision", ["bf16_sr", "fp8_sr"])
def test_weights_do_not_depend_on_who_owns_a_label(precision: str) -> None:
    whole = trained(shard_of(precision, True, LabelRange(0, LABELS, LABELS), 64))
    parts = [
        trained(shard_of(precision, True, LabelRange(a, b, LABELS), 50))[2]
        for a, b in ((0, 37), (37, LABELS))
    ]
    differ = (torch.cat(parts) != whole[2]).double().mean()
    assert differ < 1e-3


def test_an_empty_batch_and_an_empty_shard() -> None:
    shard = shard_of("bf16_sr", True, LabelRange(0, LABELS, LABELS), 64)
    before = shard.weights.read(0, LABELS).clone()
    seen: list[torch.Tensor] = []
    none = torch.zeros(0, dtype=torch.int64)
    inputs = torch.zeros(0, DIM, device=DEVICE)
    shard.step(inputs, Pairs(none, none, shard.owned, DEVICE), SGD(0.1), on_gradient=seen.append)
    assert seen[0].shape == (0, DIM)
    assert torch.equal(shard.weights.read(0, LABELS), before)
    empty = shard_of("bf16_sr", True, LabelRange(3, 3, LABELS), 64)
    inputs = normal(BATCH, DIM, seed=1)
    loss = empty.step(inputs, Pairs(none, none, empty.owned, DEVICE), SGD(0.1), with_loss=True)
    assert loss == 0


@pytest.mark.parametrize(
    ("batch", "compute"),
    [(1, torch.float32), (63, torch.bfloat16), (65, torch.float32), (1000, torch.bfloat16)],
)
def test_a_step_on_any_number_of_rows(compute: torch.dtype, batch: int) -> None:
    """Whatever was left behind the rows of G."""
    weights = make_weights("bf16_split", 0.0, compute, LABELS)
    shard = Shard(LabelRange(0, LABELS, LABELS), weights, 70, OPERATIONS[True])
    stored, inputs = weights.read(0, LABELS).double(), normal(batch, DIM, seed=4)
    weights.scratch("logits", 70, OPERATIONS[True].padded(batch), dtype=compute).fill_(torch.nan)
    rows = torch.arange(batch)
    pairs = Pairs(rows, rows * 37 % LABELS, shard.owned, DEVICE)
    seen: list[torch.Tensor] = []
    loss = shard.step(inputs, pairs, SGD(0.01), with_loss=True, on_gradient=seen.append)
    logits = inputs.double() @ stored.T
    target = torch.zeros_like(logits)
    target[rows, rows * 37 % LABELS] = 1
    residual = logits.sigmoid() - target
    unit = 32 * SINGLE if compute == torch.float32 else 2 * ROUNDING[compute]
    dense = binary_cross_entropy_with_logits(logits, target, reduction="sum")
    assert float(loss) == pytest.approx(float(dense), rel=unit)
    exact, step = residual @ stored, residual.T @ inputs.double()
    assert (seen[0] - exact).norm() < unit * exact.norm()
    moved = stored - weights.read(0, LABELS)
    assert (moved / 0.01 - step).norm() < 2 * unit * step.norm()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize(
    ("precision", "chosen", "dim"), pairwise(STORAGES, ["measured", "plain", *TILES], [768, 100])
)
def test_a_step_on_a_gpu_equals_float64_on_the_stored_weights(
    precision: str, chosen: tiles.Tiles | str, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the matmuls' own dtype and of a useful size; rows of 200 bytes take no descriptors."""
    if isinstance(chosen, str):
        monkeypatch.setattr(tiles, "candidates", CANDIDATES)
    else:
        use(chosen, monkeypatch)
        monkeypatch.setattr(tiles.Tiles, "programs", PROGRAMS)
    n, batch = 5000, 1000
    weights = Weights(precision, n, dim, False, DEVICE)
    operations = OPERATIONS[False] if chosen == "plain" else None
    shard = Shard(LabelRange(0, n, n), weights, 1500, operations)
    shard.write(0, normal(n, dim, seed=1) / 16)
    stored, inputs = weights.read(0, n).double(), normal(batch, dim, seed=2)
    rows = torch.arange(batch)
    pairs = Pairs(rows, rows * 37 % n, shard.owned, DEVICE)
    seen: list[torch.Tensor] = []
    shard.step(inputs, pairs, SGD(0.001), on_gradient=seen.append)
    residual = (inputs.double() @ stored.T).sigmoid()
    residual[rows, rows * 37 % n] -= 1
    unit = 2.0**-20 if weights.compute_dtype == torch.float32 else 2.0**-6
    exact = residual @ stored
    assert (seen[0] - exact).norm() < unit * exact.norm()
    after = stored - 0.001 * residual.T @ inputs.double()
    spacing = SPACING.get(precision, 0.0)
    moved = (after - stored).norm()
    assert (weights.read(0, n) - after).norm() < unit * moved + spacing * after.norm()
