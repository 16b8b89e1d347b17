"""The top-k of a GPU against float64; without one, its kernel runs in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from renee_ray.benchmarks.topk import against_exact, rounding
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.topk import best, select
from renee_ray.xfc.topk.select import NONE, shard_topk
from renee_ray.xfc.weights.storages import STORAGES, Weights
from tests.pairwise import pairwise
from tests.xfc.interpreter import DEVICE, load_kernels

load_kernels()  # skips this module where triton is missing
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from renee_ray.xfc.topk import gpu  # noqa: E402

pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []

LABELS, DIM, BATCH, FIRST = 300, 72, 18, 7
ON_CPU = {"LABELS": 16, "ROWS": 16, "PLACES": 2}
"""Small tiles and little room: several rounds, of several tiles, in a few seconds."""


@pytest.fixture(autouse=True)
def certain(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Scans on a CPU too, in small tiles; collects which rows of each scan are certain."""
    found, scanned_topk = [], gpu.scanned_topk

    def scan(*given: Any) -> tuple[torch.Tensor, ...]:
        result = scanned_topk(*given)
        found.append(result[2])
        return result

    monkeypatch.setattr(gpu, "scanned_topk", scan)
    monkeypatch.setattr(select, "scans", lambda shard, k: True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # the interpreter knows no lanes
    if DEVICE.type == "cpu":
        for name, value in ON_CPU.items():
            monkeypatch.setattr(gpu, name, value)
    return found


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def shard_of(weight: torch.Tensor, precision: str = "bf16_sr") -> Shard:
    owned = LabelRange(FIRST, FIRST + len(weight), FIRST + len(weight) + 5)
    shard = Shard(owned, Weights(precision, len(weight), weight.shape[1], False, DEVICE), 50)
    shard.write(FIRST, weight)
    return shard


def excluded_of(pairs: torch.Tensor, shard: Shard) -> Pairs:
    """pairs: [m, 2], of rows and local labels."""
    return Pairs(pairs[:, 0].cpu(), pairs[:, 1].cpu() + FIRST, shard.owned, DEVICE)


def same(
    found: tuple[torch.Tensor, torch.Tensor],
    shard: Shard,
    inputs: torch.Tensor,
    banned: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> bool:
    """Whether labels and scores are those of exact products, but for the rounding of fp32."""
    weight = shard.weights.read(0, len(shard.owned))
    exact = inputs.double() @ weight.double().T
    allowed = rounding(inputs, weight)
    if offset is not None:
        exact += offset.double()
        allowed = allowed + 2.0**-24 * exact.abs().amax(dim=1)
    if banned is not None:
        exact[banned[:, 0], banned[:, 1]] = -torch.inf
    return against_exact(found, [(FIRST, exact)], allowed)[0]


@pytest.mark.parametrize(
    ("precision", "k", "beside"),
    pairwise(list(STORAGES), [1, 10, 40], ["nothing", "offset", "both"]),
)
def test_equals_exact_products(
    precision: str, k: int, beside: str, certain: list[torch.Tensor]
) -> None:
    """Excluded are the three best of each row, of row 2 all labels but five, and of row 3 all."""
    shard, inputs = shard_of(normal(LABELS, DIM) * 0.1, precision), normal(BATCH, DIM, seed=1)
    offset = normal(LABELS, seed=2) * 2 if beside != "nothing" else None
    banned, excluded = None, None
    if beside == "both":
        scores = inputs @ shard.weights.read(0, LABELS).T
        scores = scores if offset is None else scores + offset
        scores.scatter_(1, scores.topk(3, dim=1).indices, torch.inf)
        scores[2, 5:] = scores[3] = torch.inf
        banned = scores.isinf().nonzero()
        excluded = excluded_of(banned, shard)
    found = shard_topk(shard, inputs, k, excluded, offset)
    assert same(found, shard, inputs, banned, offset)
    assert not same((found[0].roll(1, 0), found[1].roll(1, 0)), shard, inputs, banned, offset)
    ordinary = certain[0] if banned is None else torch.cat([certain[0][:2], certain[0][4:]])
    assert bool(ordinary.all()), "no row of such weights should need a second look"


@pytest.mark.parametrize("precision", ["bf16_sr", "fp8_sr"])
def test_fewer_labels_than_asked_for(precision: str, certain: list[torch.Tensor]) -> None:
    shard, inputs = shard_of(normal(5, DIM), precision), normal(3, DIM, seed=1)
    banned = torch.tensor([[1, 0], [1, 3], [2, 0], [2, 1], [2, 2], [2, 3], [2, 4]], device=DEVICE)
    found = shard_topk(shard, inputs, 7, excluded_of(banned, shard))
    assert bool(certain[0].all())
    assert same(found, shard, inputs, banned)
    assert (found[1] != NONE).sum(dim=1).tolist() == [5, 3, 0]
    assert (found[0][found[1] == NONE] == -torch.inf).all()


def test_ties_go_to_the_smaller_id(certain: list[torch.Tensor]) -> None:
    """Also at the cut; the products are whole numbers. Row 0 has equal scores alone."""
    weight = normal(LABELS // 5, 16).round().repeat(5, 1)
    inputs = normal(BATCH, 16, seed=1).mul(3).round()
    inputs[0] = 0
    found = shard_topk(shard_of(weight), inputs, 10)
    best = (inputs @ weight.T).sort(dim=1, descending=True, stable=True)
    assert torch.equal(found[0], best.values[:, :10])
    assert torch.equal(found[1], best.indices[:, :10] + FIRST)
    assert not certain[0][0] and certain[0].any()


@pytest.mark.parametrize("value", [3e38, math.inf, math.nan])
def test_a_label_of_huge_or_no_value(value: float) -> None:
    weight, inputs = normal(LABELS, DIM) * 0.1, normal(BATCH, DIM, seed=1)
    weight[234, 5] = value
    found = shard_topk(shard_of(weight), inputs, 9)
    logits = inputs @ weight.bfloat16().float().T
    wanted = logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    wanted = wanted.sort(dim=1, descending=True, stable=True).indices[:, :9] + FIRST
    assert torch.equal(found[1], wanted)


def test_labels_that_narrow_products_cannot_tell_apart(certain: list[torch.Tensor]) -> None:
    """Half of the rows have 200 labels whose scores differ by less than a rounding to bf16."""
    weight = normal(LABELS, DIM) * 0.1
    weight[50:250] = 3 * normal(DIM, seed=3) / DIM**0.5
    weight[50:250, 0] += normal(200, seed=5) * 1e-4
    inputs = normal(BATCH, DIM, seed=1)
    inputs[::2] = weight[200] + 0.01 * normal(len(inputs[::2]), DIM, seed=4)
    shard = shard_of(weight, "fp32")
    assert same(shard_topk(shard, inputs, 10), shard, inputs)
    assert not certain[0][::2].any() and certain[0][1::2].any()


def test_places_that_overflow(certain: list[torch.Tensor]) -> None:
    """Every label of row 0 is better than all that are visited before, in any order of tiles."""
    tiles = triton.cdiv(LABELS, gpu.LABELS)
    turns = torch.arange(tiles) * gpu._stride(tiles) % tiles
    assert turns.sort().values.tolist() == list(range(tiles))
    weight = torch.zeros(tiles * gpu.LABELS, 16)
    weight[:, 0] = turns.argsort().repeat_interleave(gpu.LABELS) + 1.0
    weight[:, 1] = torch.arange(len(weight)) % 256
    inputs = torch.eye(2, 16).to(DEVICE)
    shard = shard_of(weight.to(DEVICE), "fp32")
    assert same(shard_topk(shard, inputs, 9), shard, inputs)
    assert certain[0].tolist() == [False, True]


class Waits(TorchDispatchMode):
    """Counts where a host would wait for a device: for a number, or for the size of a result."""

    NAMES = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2")

    def __init__(self) -> None:
        super().__init__()
        self.count, self.paused = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, indices = func.overloadpacket.__name__, ()
        if name in ("index", "index_put", "index_put_"):
            indices = [index for index in args[1] if index is not None]
        masked = any(index.dtype == torch.bool for index in indices)
        self.count += not self.paused and (masked or name in self.NAMES)
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts what reads the memory of a tensor, which no dispatch sees."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = getattr(func, "__name__", "") in ("tolist", "numpy", "cpu")
        self.waits.count += reads and not self.waits.paused
        return func(*args, **(kwargs or {}))


def waits_of(shard: Shard, with_excluded: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    inputs, waits = normal(3, DIM, seed=1), Waits()
    pairs = excluded_of(torch.tensor([[0, 3], [2, 5]]), shard)

    def unwatched(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            waits.paused = True
            result = call(*args, **options)
            waits.paused = False
            return result

        return run

    class Launch:
        def __getitem__(self, grid: tuple[int]) -> Any:
            return unwatched(kernel[grid])

    kernel = gpu._scan
    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_scan", Launch())
        patch.setattr(pairs, "by_chunk", unwatched(pairs.by_chunk))  # reads its copy on the host
        with Reads(waits), waits:
            shard_topk(shard, inputs, 1, pairs if with_excluded else None)
    return waits.count


@pytest.mark.parametrize("with_excluded", [False, True])
def test_the_host_waits_once(with_excluded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rounds there are. The plain path, which is counted too, waits in every chunk."""
    monkeypatch.setattr(best, "Best", best.PlainBest)
    sizes = (60, LABELS)
    shards = [shard_of(normal(n, DIM)) for n in sizes]
    tiles, width = [-(-n // gpu.LABELS) for n in sizes], triton.next_power_of_2(gpu.PLACES * 30)
    assert len({len(list(gpu.rounds(count, 30, width))) for count in tiles}) == len(sizes)
    assert [waits_of(shard, with_excluded, monkeypatch) for shard in shards] == [1, 1]
    monkeypatch.setattr(select, "scans", lambda shard, k: False)
    few, many = (waits_of(shard, with_excluded, monkeypatch) for shard in shards)
    assert 1 < few < many


@triton.jit
def _narrow_all(codes, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, gpu._narrow(tl.load(codes + at), tl.float16))


def test_every_code_of_e4m3_is_read_exactly() -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=DEVICE)
    out = torch.empty(256, dtype=torch.float16, device=DEVICE)
    _narrow_all[(1,)](codes, out, 256)
    wanted = codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(out.float().nan_to_num(nan=-1.0), wanted.nan_to_num(nan=-1.0))
    assert torch.equal(out.float().signbit()[~wanted.isnan()], wanted.signbit()[~wanted.isnan()])


@pytest.mark.parametrize(
    ("tiles", "k"), [(1, 1), (2, 10), (10_198, 100), (67_000, 100), (900, 1000)]
)
def test_rounds(tiles: int, k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile comes once; labels in random order fill half of the room; few rounds."""
    monkeypatch.setattr(gpu, "LABELS", 128)
    kept = 2 * k + 28
    width = triton.next_power_of_2(8 * kept)
    ends = list(gpu.rounds(tiles, kept, width))
    assert ends[0] == 0 and ends[-1] == tiles and ends == sorted(set(ends)) and len(ends) < 9
    assert ends[1] * 128 <= width - kept
    for first, last in itertools.pairwise(ends[1:]):
        assert kept * (last - first) / first <= (width - kept) / 2
    assert math.gcd(gpu._stride(tiles), tiles) == 1


COMPILE = """
import re, subprocess, sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from renee_ray.xfc.topk import gpu

TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
POINTERS = {"scores": "*fp32", "labels": "*i64", "used": "*i32", "size": "*i32", "offset": "*fp32"}

def compile(capability, weight, inputs, rows, depth):
    constants = {"SHIFTED": True, "DIM": 768, "ROWS": rows, "LABELS": gpu.LABELS, "K": depth}
    types = POINTERS | {"weight": weight, "inputs": inputs}
    names = gpu._scan.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [i for i, name in enumerate(names) if name in types and name != "offset"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(gpu._scan, signature, constants, attributes)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options=gpu.SETTINGS)
    Path(sys.argv[1]).write_bytes(built.asm["cubin"])
    usage = subprocess.run([TOOL, "-res-usage", sys.argv[1]], capture_output=True, text=True).stdout
    registers, stack = (int(re.search(name + ":([0-9]+)", usage)[1]) for name in ("REG", "STACK"))
    print(capability, weight, inputs, rows, registers, stack, built.metadata.shared)
    assert not stack and registers <= 255, usage
    assert built.metadata.shared <= SHARED[capability]

for capability in (80, 90, 100):
    for rows in (gpu.ROWS, gpu.TALL) if capability == 90 else (gpu.ROWS,):
        compile(capability, "*bf16", "*bf16", rows, 64)
        compile(capability, "*fp32", "*bf16", rows, 32)
        compile(capability, "*u8" if capability == 80 else "*fp8e4nv", "*fp16", rows, 64)
"""


@pytest.mark.slow
def test_the_kernel_compiles_without_spills(tmp_path: Path) -> None:
    """For three generations of GPUs, none of which is needed for it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-c", COMPILE, str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
