"""The k best labels on a GPU: a Triton kernel that keeps no logits, and a host that never waits.

Embeddings E [B, D] and weights W [n, D] are rounded to a narrow dtype (e', w'). The kernel computes
a tile of products a = e'.w' in registers, with fp32 sums, and appends those above the threshold of
their row. After each round of tiles a row is cut to its `kept` best, more than k:

    scores  [B, width]  fp32     of each row: the `kept` best so far, descending; then what was
    labels  [B, width]  int64    appended, or -inf; labels are local ids
    used    [B]         int32    places taken; if more than `width`, some of them were lost
    size    [1]         int32    the largest |w'|^2 so far, fp32 bits: integers that order alike

The threshold is the score in place `kept` - 1, so a label that is not kept has no greater product
a* than the last that is. The k best of the others are found by fp32 products. A row is certain if
a* + bound < k-th best score: then no label left out can be among the k best. By Cauchy and Schwarz
(twice), and the rounding of the sums of either product, in any order:

    |e.w - a|  <=  |e| |w - w'|  +  |e - e'| |w'|  +  D 2^-22 |e| |w'|

A tensor core adds 16 products to a sum at once, and cuts each addend 2^-23 below the largest. These
are D + D/16 errors of at most 2^-23 |e'| |w'|; the fp32 product of e and w adds D 2^-24 |e| |w|.

Of i labels in random order the next j - i append kept (j - i) / i, and a round ends where that
would fill half of the room: 6 rounds for a million labels and k = 100. Tiles come in an order that
is spread over the shard, since neighbours may be alike.
Import this module only to use it: it needs triton.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from renee_ray.xfc.device import GPU_CHUNK_BYTES, native_e4m3
from renee_ray.xfc.labels import NONE
from renee_ray.xfc.shard import Pairs, Shard
from renee_ray.xfc.weights.storages import Weights

LABELS, ROWS = 128, 128
"""Labels and rows of a tile."""
TALL = 256
"""Rows of a tile on Hopper: fewer operands are read for each product. Elsewhere registers spill."""
HALF_ULP = 2.0**-8
"""Relative rounding error of bf16 (half a unit in the last place)."""
PLACES, PLACE_BYTES = 8, 45
"""Places of a row for each label that is kept, at least; the memory of one while it is sorted."""
SETTINGS: dict[str, Any] = {"num_warps": 8, "num_stages": 3}
NARROW = {
    "fp32": (torch.bfloat16, HALF_ULP, 0.0),
    "split": (torch.bfloat16, HALF_ULP, 0.0),
    "bf16": (torch.bfloat16, 0.0, 0.0),
    "half": (torch.float16, 2.0**-11, 2.0**-25),
    "e4m3": (torch.float16, 0.0, 0.0),
}
"""By `Buffer.kind`: the dtype of the products, which holds every number of e4m3; and the error of
a weight rounded to it, relative to what it becomes, and absolute."""
FP32_ULP = 2.0**-23
"""Twice the error of a sum in fp32: an offset is added to either product."""
SCORED, PICKED_BYTES = 32, 24
"""Rows whose candidates' scores are one matmul, and the memory of one number of their weights, with
all that `Buffer.pick` takes in between."""


def scanned_topk(
    shard: Shard, embeddings: Tensor, k: int, excluded: Pairs | None, offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what `select.shard_topk` does, and returns which rows are certain too, bool [B]."""
    kept = 2 * k + 28
    width = triton.next_power_of_2(PLACES * kept)
    at_once = max(ROWS, GPU_CHUNK_BYTES // (PLACE_BYTES * width))
    if len(embeddings) <= at_once:
        return _scanned(shard, embeddings, k, kept, width, excluded, offset)
    found = []
    for rows in torch.arange(len(embeddings), device=embeddings.device).split(at_once):
        left = None if excluded is None else excluded.of_rows(rows)
        found.append(_scanned(shard, embeddings[rows], k, kept, width, left, offset))
    scores, labels, certain = zip(*found, strict=True)
    return torch.cat(scores), torch.cat(labels), torch.cat(certain)


def _scanned(
    shard: Shard, embeddings: Tensor, k: int, kept: int, width: int, excluded: Pairs | None,
    offset: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weights, rows = shard.weights, len(embeddings)
    dtype, relative, absolute = NARROW[weights.weight.kind]
    inputs = embeddings.to(dtype, memory_format=torch.contiguous_format)
    stored = weights.weight.data
    if stored.dtype == torch.float8_e4m3fn and not native_e4m3(stored.device):
        stored = stored.view(torch.uint8)
    scores = embeddings.new_full((rows, width), -torch.inf)
    labels = torch.zeros_like(scores, dtype=torch.int64)
    used = torch.full_like(labels[:, 0], kept, dtype=torch.int32)
    most, size = used.clone(), used.new_zeros(1)
    keys = None
    if excluded is not None:
        ((pair_rows, pair_labels, _),) = excluded.by_chunk([(0, weights.rows)])
        keys = pair_labels * rows + pair_rows  # ascending, as the pairs are
    tiles, tile_rows = triton.cdiv(weights.rows, LABELS), _tile_rows(rows, stored.device)
    depth, stride = min(64, 128 // stored.element_size()), _stride(tiles)
    for first, last in itertools.pairwise(rounds(tiles, kept, width)):
        _scan[(triton.cdiv(rows, tile_rows) * (last - first),)](
            stored, inputs, scores if offset is None else offset, scores, labels, used, size,
            weights.rows, rows, first, tiles, stride, kept, width,
            offset is not None, weights.dim, tile_rows, LABELS, depth, **SETTINGS,
        )  # fmt: skip
        torch.maximum(most, used, out=most)
        used.fill_(kept)
        if keys is not None and len(keys):
            scores.masked_fill_(_among(keys, labels), -torch.inf)
        best, places = scores.topk(kept, dim=1)
        labels[:, :kept] = labels.gather(1, places)
        scores[:, :kept], scores[:, kept:] = best, -torch.inf
    lengths, lost = (torch.linalg.vector_norm(e, dim=1) for e in (embeddings, embeddings - inputs))
    longest, dim = size.view(torch.float32).sqrt(), weights.dim
    error = relative * longest + absolute * dim**0.5 + dim * 2.0**-22 * longest
    bound = 1.01 * (lengths * error + lost * longest)
    bound.masked_fill_(most > width, torch.inf)  # such a row lost products of any size
    left_out, candidates = scores[:, kept - 1], labels[:, : kept - 1]
    candidates = candidates.masked_fill(scores[:, : kept - 1] == -torch.inf, NONE)
    # In the order of ids: of equal scores the smaller one then comes first.
    candidates = candidates.sort(dim=1).values
    exact = _exact_scores(weights, embeddings, offset, candidates)
    exact, order = exact.sort(dim=1, descending=True, stable=True)
    exact, found = exact[:, :k].contiguous(), candidates.gather(1, order)[:, :k]
    # NaN, of numbers that are not finite, is never certain; a row that lost no label always is.
    certain = left_out + bound + FP32_ULP * (left_out.abs() + bound) < exact[:, k - 1]
    certain |= (left_out == -torch.inf) & bound.isfinite()
    return exact, torch.where(found == NONE, NONE, found + shard.owned.start), certain


def _exact_scores(
    weights: Weights, embeddings: Tensor, offset: Tensor | None, labels: Tensor
) -> Tensor:
    """Computes fp32 scores [B, m] of each row's local labels int64 [B, m]; `NONE` gives -inf."""
    batch, m = labels.shape
    # Rows whose scores are one matmul, of which 1 / size is used.
    size = max(1, min(SCORED, batch, GPU_CHUNK_BYTES // (PICKED_BYTES * m * weights.dim)))
    scores = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
    own = torch.arange(size, device=labels.device)
    for start in range(0, batch, size):
        first = min(start, batch - size)
        rows = slice(first, first + size)
        picked = labels[rows].clamp(min=0)
        products = embeddings[rows] @ weights.weight.pick(picked.flatten()).T
        found = products.view(size, *picked.shape)[own, own]
        found = found if offset is None else found + offset[picked]
        scores[start : start + size] = found[start - first :]  # those before are here already
    return scores.masked_fill_(labels == NONE, -torch.inf)


def rounds(tiles: int, kept: int, width: int) -> Iterator[int]:
    """Yields the first tile of each round, and at last the number of tiles."""
    yield 0
    first = (width - kept) // LABELS  # without a threshold every label is appended
    while first < tiles:
        yield first
        first += first * (width - kept) // (2 * kept)
    yield tiles


def _tile_rows(rows: int, device: torch.device) -> int:
    tall = rows > ROWS and device.type == "cuda" and torch.version.hip is None
    return TALL if tall and torch.cuda.get_device_capability(device)[0] == 9 else ROWS


def _stride(tiles: int) -> int:
    """Returns a step that visits all tiles, modulo their number, each far from those before."""
    return next(s for s in itertools.count(int(0.618 * tiles) + 1) if math.gcd(s, tiles) == 1)


def _among(keys: Tensor, labels: Tensor) -> Tensor:
    """Returns whether label * B + row of labels [B, m] is one of the `keys`, bool [B, m]."""
    wanted = labels * len(labels) + torch.arange(len(labels), device=labels.device)[:, None]
    return keys[torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)] == wanted


@triton.jit
def _narrow(weight, dtype: tl.constexpr):
    """Rounds weights to a dtype; uint8 stands for the codes of e4m3, and is read exactly."""
    if weight.dtype == tl.uint8:  # read as bits of fp16, the exponent is too small by 8
        code = weight.to(tl.int16)
        weight = ((code & 128) << 8 | (code & 127) << 7).to(tl.float16, bitcast=True) * 256
        weight = tl.where((code & 127) == 127, float("nan"), weight)
    return weight.to(dtype)


@triton.jit
def _products(
    left, right, present, known, DIM: tl.constexpr, ROWS: tl.constexpr, LABELS: tl.constexpr,
    K: tl.constexpr, MEASURED: tl.constexpr,
):  # fmt: skip
    """Computes the products of a tile [rows, labels], and each label's |w'|^2 if `MEASURED`."""
    total, squares = tl.zeros((ROWS, LABELS), tl.float32), tl.zeros((LABELS,), tl.float32)
    for k in range(0, DIM, K):
        inside = k + tl.arange(0, K) < DIM
        inputs = tl.load(left + k, mask=present[:, None] & inside[None, :], other=0.0)
        weight = tl.load(right + k, mask=inside[:, None] & known[None, :], other=0.0)
        weight = _narrow(weight, inputs.dtype)
        total = tl.dot(inputs, weight, total)
        if MEASURED:
            wide = weight.to(tl.float32)
            squares += tl.sum(wide * wide, axis=0)
    return total, squares


@triton.jit(do_not_specialize=["n", "batch", "first", "tiles", "stride", "kept", "width"])
def _scan(
    weight, inputs, offset, scores, labels, used, size, n, batch, first, tiles, stride, kept, width,
    SHIFTED: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, LABELS: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    program, own, k = tl.program_id(0), tl.arange(0, LABELS), tl.arange(0, K)
    across = tl.cdiv(batch, ROWS)
    start = (first + program // across).to(tl.int64) * stride % tiles * LABELS
    label, row = start + own, (program % across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    known, present = label < n, row < batch
    left = inputs + row[:, None] * DIM + k[None, :]
    right = weight + label[None, :] * DIM + k[:, None]
    if program % across == 0:
        product, squares = _products(left, right, present, known, DIM, ROWS, LABELS, K, True)
        # A NaN has more bits than infinity has, and hides nothing: no row is certain then.
        tl.atomic_max(size, tl.max(squares.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=0))
    else:
        product, squares = _products(left, right, present, known, DIM, ROWS, LABELS, K, False)
    if SHIFTED:
        product += tl.load(offset + label, mask=known, other=0.0)[None, :]
    # NaN would make the turns endless: max ignores it, argmax does not.
    product = tl.where(known[None, :] & (product == product), product, float("-inf"))
    threshold = tl.load(scores + row * width + kept - 1, mask=present, other=float("inf"))
    # Few products of a tile beat their threshold: each turn appends the largest of every row.
    largest = tl.max(product, axis=1)
    while tl.max((largest > threshold).to(tl.int32), axis=0) > 0:
        which = tl.argmax(product, axis=1)
        better = largest > threshold
        place = tl.atomic_add(used + row, 1, mask=better, sem="relaxed")
        fits = better & (place < width)
        tl.store(scores + row * width + place, largest, mask=fits)
        tl.store(labels + row * width + place, start + which, mask=fits)
        product = tl.where(own[None, :] == which[:, None], float("-inf"), product)
        largest = tl.max(product, axis=1)
