"""What a CPU does with a chunk besides its matmuls: compiled loops that pass over memory once.

For c labels with weights w and velocities m [c, D] as stored, and the product P = G E [c, D] as
BLAS gave it, bf16 or fp32; whatever is in between is fp32:

    _update     m <- momentum * m + P + decay * w;  w <- w - lr * m      rounded as stored
    _expansion  e4m3 to the dtype of the matmuls
    _collection of each row of scores those above its threshold (`best`)
    _narrow     fp32 to bf16, and how much is lost (`screen`)

Plain torch takes a pass for every operation and for every change of dtype. Here a row is read,
computed and written while it is in the nearest cache, by loops short enough to be vectorised:
many arrays in one loop would be too many pairs that might overlap. The structure is that of
`kernels`, which does the same on a GPU.

Weights that lie in memory as fp32 (fp32, fp16) need none of this: BLAS accumulates the product
into them. The others are read and written as integers (see `buffers`).
Import this module only to use it: numba takes a second.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from renee_ray.xfc.topk.best import BLOCK, NONE
from renee_ray.xfc.weights.buffers import E4M3, BFloat16, Buffer, Split
from renee_ray.xfc.weights.rounding import (
    BF16_DROPPED,
    E4M3_DROPPED,
    E4M3_MAX,
    FACTORS,
    PERIOD,
    STRIDE,
    Noise,
)
from renee_ray.xfc.weights.storages import SGD, Update, Weights

KINDS: dict[type[Buffer], str] = {Split: "split", BFloat16: "bf16", E4M3: "e4m3"}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
INTEGERS = {torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}

_FACTORS = tuple(np.uint64(factor % 2**64) for factor in FACTORS)
_E4M3_LARGEST, _E4M3_SMALLEST = np.float32(E4M3_MAX), np.float32(2**-9)
_E4M3_NAN = np.uint32(0x7FF00000)
"""What torch reads such a code as."""

# No fast-math: NaN and the order of roundings are as written.
compiled = numba.njit(nogil=True, error_model="numpy")
# Lengths of rows may be summed in any order, which is what lets a sum be vectorised.
measuring = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})


class FusedUpdate(Update):
    """`storage.Update` on a CPU: everything after the product in one pass over the weights."""

    def __call__(
        self, start: int, stop: int, operand: Tensor, residual: Tensor, inputs: Tensor
    ) -> None:
        weights, sgd = self._weights, self._sgd
        weight, velocity = weights.weight, weights.velocity
        product = weights.scratch("product", stop - start, weights.dim, dtype=inputs.dtype)
        torch.mm(residual, inputs, out=product)
        over_rows(
            _update(
                DTYPES[inputs.dtype], KINDS[type(weight)], KINDS[type(velocity)] if velocity else ""
            ),
            (product, *_stored(weight, start, stop), *_stored(velocity or weight, start, stop)),
            self._first + start,
            *_drawn(self._noise[0]), *_drawn(self._noise[1]),
            *(np.float32(rate) for rate in (sgd.lr, sgd.momentum, sgd.weight_decay)),
        )  # fmt: skip


def compile_for(weights: Weights) -> None:
    """Compiles what steps on these weights will call, so that the first takes no longer."""
    operand = weights.operand(0, 0)
    update = FusedUpdate(weights, SGD(0.0), 0)
    update(0, 0, operand, operand.new_empty(0, 1), operand.new_empty(1, weights.dim))


def expand_e4m3(codes: Tensor, out: Tensor) -> None:
    """Numbers of float8_e4m3fn `codes` [c, D] into `out`, bf16 or fp32, exactly."""
    over_rows(_expansion(DTYPES[out.dtype]), (codes, out), 0)


def collect(
    logits: Tensor, threshold: Tensor, used: Tensor, scores: Tensor, labels: Tensor, k: int,
    first: int, offset: Tensor,
) -> None:  # fmt: skip
    """Puts what beats `threshold` [B, 1] into the places from `used` [B] on of scores and labels.

    A row without room is cut to its k best, in their order, and its threshold raised.

    Args:
        logits: float32 or bfloat16 [B, c], of labels from `first` on.
        offset: float32 [c], added to the logits; or [0].
    """
    loop = _collection(DTYPES[logits.dtype], bool(len(offset)))
    over_rows(loop, (logits, threshold, used, scores, labels), 0, k, first, offset.numpy())


def narrow(values: Tensor, out: Tensor, measures: Tensor) -> None:
    """bfloat16 `out` [c, D] nearest to float32 `values` [c, D].

    measures: float32 [c, 2], the lengths of each row of `out` and of `values` - `out`.
    """
    over_rows(_narrow, (values, out, measures), 0)


def measure(values: Tensor, measures: Tensor) -> None:
    """Puts the length of each row of bfloat16 `values` [c, D] into float32 `measures`[:, 0]."""
    over_rows(_measure, (values, measures), 0)


def _stored(buffer: Buffer, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """The one or two tensors of a buffer."""
    found = [t[start:stop] for t in buffer.tensors().values()]
    return found[0], found[-1]


def _drawn(noise: Noise | None) -> tuple[Any, Any]:
    """Base and key."""
    if noise is None:
        return np.zeros(0, dtype=np.int32), np.uint64(0)
    return noise.base.numpy(), np.uint64(noise.key % 2**64)


def over_rows(
    loop: Callable[..., None], tensors: tuple[Tensor, ...], first: int, *rest: Any
) -> None:
    """loop(*arrays, first, *rest); each of torch's threads takes a part of the rows."""
    arrays = [t.view(INTEGERS.get(t.dtype, t.dtype)).numpy() for t in tensors]
    threads = torch.get_num_threads()
    if threads == 1:
        loop(*arrays, first, *rest)
        return
    bounds = [len(arrays[0]) * i // threads for i in range(threads + 1)]
    pool = _pool(threads)
    parts = [
        pool.submit(loop, *(each[lo:hi] for each in arrays), first + lo, *rest)
        for lo, hi in itertools.pairwise(bounds)
    ]
    for part in parts:
        part.result()


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "classifier rows")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of these threads


@functools.cache
def _update(product: str, weight: str, velocity: str) -> Callable[..., None]:
    """The loop for these formats, of the names in `_READ`; velocity "": no momentum."""
    moving, velocity = bool(velocity), velocity or weight
    read_product, read_weight, read_velocity = _READ[product], _READ[weight], _READ[velocity]
    write_weight, write_velocity = _WRITE[weight], _WRITE[velocity]
    weight_bits, velocity_bits = _DROPPED[weight], _DROPPED[velocity]

    @compiled
    def update(
        product, weight, weight_rest, velocity, velocity_rest, first,
        weight_base, weight_key, velocity_base, velocity_key, lr, momentum, decay,
    ):  # fmt: skip
        c, dim = weight.shape
        step, w, m = np.empty(dim, np.float32), np.empty(dim, np.float32), np.empty(dim, np.float32)
        for i in range(c):
            read_product(product[i], product[i], step)
            read_weight(weight[i], weight_rest[i], w)
            _add(step, decay, w)
            if moving:
                read_velocity(velocity[i], velocity_rest[i], m)
                _add(step, momentum, m)
                noise, offset = _noise(velocity_base, velocity_key, first + i, dim, velocity_bits)
                write_velocity(velocity[i], velocity_rest[i], step, noise, offset)
            _add(w, -lr, step)
            noise, offset = _noise(weight_base, weight_key, first + i, dim, weight_bits)
            write_weight(weight[i], weight_rest[i], w, noise, offset)

    return update


@functools.cache
def _expansion(dtype: str) -> Callable[..., None]:
    """The loop that reads e4m3 and writes `dtype`."""
    write = _WRITE[dtype]

    @compiled
    def expand(codes, out, first):
        c, dim = codes.shape
        row, noise = np.empty(dim, np.float32), np.zeros(dim, np.int32)
        for i in range(c):
            _read_e4m3(codes[i], codes[i], row)
            write(out[i], out[i], row, noise, np.int32(0))

    return expand


@functools.cache
def _collection(dtype: str, shifted: bool) -> Callable[..., None]:
    """The loop that collects from scores of `dtype`, with an offset or without."""
    read = _READ[dtype]

    @compiled
    def collect(logits, threshold, used, scores, labels, _, k, first, offset):
        columns, block = logits.shape[1], np.empty(BLOCK, np.float32)
        for i in range(len(logits)):
            least, count = threshold[i, 0], used[i]
            for at in range(0, columns, BLOCK):
                size = min(BLOCK, columns - at)
                found = logits[i, at : at + size]
                read(found, found, block[:size])
                if shifted:
                    _add(block[:size], np.float32(1), offset[at : at + size])
                # Most blocks hold nothing; to count takes vectors of comparisons and no branch.
                better = np.int32(0)
                for j in range(size):
                    better += np.int32(block[j] > least)
                if not better:
                    continue
                if count + better > scores.shape[1]:
                    count, least = _cut(scores[i], labels[i], k, count)
                for j in range(size):
                    if block[j] > least:
                        scores[i, count], labels[i, count] = block[j], first + at + j
                        count += 1
            # Another thread may have raised it meanwhile.
            threshold[i, 0], used[i] = max(least, threshold[i, 0]), count

    return collect


@compiled
def _cut(scores, labels, k, count):
    """Leaves the k best of `count` in their order; of those equal to the k-th, the first ones."""
    least = _largest(scores[:count], k)
    above = np.int64(0)
    for j in range(count):
        above += np.int64(scores[j] > least)
    equal, place = k - above, np.int64(0)
    for j in range(count):
        # Moved in any case, and overwritten if not taken: which it is no branch could predict.
        score, level = scores[j], np.int64(scores[j] == least)
        scores[place], labels[place] = score, labels[j]
        place += np.int64(score > least) | (level & np.int64(equal > 0))
        equal -= level
    for j in range(place, count):
        scores[j], labels[j] = -np.inf, NONE
    return place, least


@compiled
def _largest(values, k):
    """The k-th largest, by bisection of the integers that order as fp32 does; no NaN among them.

    Each half costs a vectorised count, in place of the branches of a selection by exchanges.
    """
    keys = np.empty(len(values), np.int32)
    low, high = np.int64(2**31 - 1), np.int64(-(2**31))
    for j in range(len(values)):
        bits = np.int32(_bits(values[j]))
        keys[j] = bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))
    for j in range(len(values)):
        low, high = min(low, np.int64(keys[j])), max(high, np.int64(keys[j]))
    while low < high:
        middle = np.int32((low + high + 1) >> 1)
        reached = np.int32(0)
        for j in range(len(keys)):
            reached += np.int32(keys[j] >= middle)
        if reached >= k:
            low = np.int64(middle)
        else:
            high = np.int64(middle) - 1
    key = np.int32(low)
    return _float(np.uint32(key ^ ((key >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@measuring
def _narrow(values, out, measures, first):
    dim = values.shape[1]
    for i in range(len(values)):
        size, error = np.float32(0), np.float32(0)
        for j in range(dim):
            bits = _bits(values[i, j])
            high = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
            high = high >> np.uint32(16)
            out[i, j] = np.uint16(high)
            near = _float(high << np.uint32(16))
            lost = values[i, j] - near
            size += near * near
            error += lost * lost
        measures[i, 0], measures[i, 1] = np.sqrt(size), np.sqrt(error)


@measuring
def _measure(values, measures, first):
    for i in range(len(values)):
        size = np.float32(0)
        for j in range(values.shape[1]):
            near = _float(np.uint32(values[i, j]) << np.uint32(16))
            size += near * near
        measures[i, 0] = np.sqrt(size)


@compiled
def _add(total, factor, values):
    for j in range(len(total)):
        total[j] += factor * values[j]


@compiled
def _noise(base, key, label, dim, bits):
    """`rounding.Noise.rows` of one label: the exclusive or of what is returned."""
    hashed = np.uint64(label)
    for factor in _FACTORS:
        hashed = ((hashed ^ (hashed >> np.uint64(32))) + key) * factor
    at = label % PERIOD * STRIDE
    return base[at : at + dim], np.int32(hashed >> np.uint64(64 - bits))


@compiled
def _flipped(value, noise, bits):
    """The noise of a value of these fp32 bits: see `rounding._flip_below_zero`."""
    negative = np.uint32(0) - (value >> np.uint32(31))
    return np.uint32(np.uint32(noise) ^ (negative & np.uint32((1 << bits) - 1)))


@compiled
def _float(bits):
    return np.uint32(bits).view(np.float32)


@compiled
def _bits(value):
    return np.float32(value).view(np.uint32)


@compiled
def _read_fp32(stored, rest, out):
    for j in range(len(out)):
        out[j] = stored[j]


@compiled
def _read_bf16(stored, rest, out):
    for j in range(len(out)):
        out[j] = _float(np.uint32(stored[j]) << np.uint32(16))


@compiled
def _read_split(stored, rest, out):
    for j in range(len(out)):
        out[j] = _float((np.int32(stored[j]) << np.int32(16)) + np.int32(rest[j]))


@compiled
def _read_e4m3(stored, rest, out):
    for j in range(len(out)):
        size = np.int32(stored[j] & 127)
        bits = np.uint32((size << 20) + (120 << 23))
        bits = bits if size >= 8 else _bits(np.float32(size) * _E4M3_SMALLEST)
        bits = _E4M3_NAN if size == 127 else bits
        out[j] = _float(bits | (np.uint32(stored[j] & 128) << 24))


@compiled
def _write_fp32(stored, rest, values, noise, offset):
    for j in range(len(values)):
        stored[j] = values[j]


@compiled
def _write_bf16(stored, rest, values, noise, offset):
    for j in range(len(values)):
        bits = _bits(values[j])
        bits = np.uint32(bits + _flipped(bits, noise[j] ^ offset, BF16_DROPPED))
        stored[j] = np.uint16(bits >> np.uint32(16))


@compiled
def _write_split(stored, rest, values, noise, offset):
    for j in range(len(values)):
        bits = _bits(values[j])
        rest[j] = np.int16(bits)
        stored[j] = np.uint16(np.uint32(bits + np.uint32(0x8000)) >> np.uint32(16))


@compiled
def _write_e4m3(stored, rest, values, noise, offset):
    """As rounding.round_to_e4m3; the leading bits of the mantissa are then the code's last."""
    for j in range(len(values)):
        value = values[j]
        size = np.float32(abs(value))
        size = _E4M3_LARGEST if size > _E4M3_LARGEST else size
        exponent = np.int32(max(np.int32(_bits(size) >> np.uint32(23)), np.int32(121)))
        shifted = np.float32(size + np.float32(2) * _float(exponent << 23))
        added = _flipped(_bits(value), noise[j] ^ offset, E4M3_DROPPED)
        leading = np.int32(np.uint32(_bits(shifted) + added) >> np.uint32(E4M3_DROPPED))
        code = ((exponent - 120) << 3) + leading - ((exponent + 1) << 4) - 8
        code = code if value == value else np.int32(127)
        stored[j] = np.uint8(code | ((_bits(value) >> np.uint32(24)) & np.uint32(128)))


_READ = {"fp32": _read_fp32, "bf16": _read_bf16, "split": _read_split, "e4m3": _read_e4m3}
"""(stored, rest, out): a row of a buffer whose tensors are `stored` and `rest`, as fp32."""
_WRITE = {"fp32": _write_fp32, "bf16": _write_bf16, "split": _write_split, "e4m3": _write_e4m3}
"""(stored, rest, values, noise, offset): `Buffer.store` of a row, by `_noise`."""
_DROPPED = {"bf16": BF16_DROPPED, "split": 1, "e4m3": E4M3_DROPPED}
