"""The collectives of a step, each beside its adjoint.

Ledger, for a global batch of B rows of which rank r of R holds b_r (they may differ, or be 0).
On the wire they are padded to b = max b_r, because torch has no uneven all-gather:

    embeddings   [b_r, D] on each rank  --gather_rows-->   E  [B, D] on all, rank-major
    gradient     dE [B, D] on each rank --scatter_rows-->  sum over ranks of dE's rows of r
    pairs        (row, label) of rank r's rows  --route--> those whose label a rank owns, with
                 their values where there are soft targets
    ids          of labels, any  --look_up--> a number of each, answered by its owner
    values       of (row, label) on each rank  --return_pairs-->  those of rank r's rows

`scatter_rows` is the gradient of `gather_rows`, summed over all ranks' losses. `return_rows` is
the transpose of the blocks that `gather_rows` puts together. Sums across ranks are in fp32.

`tensors` is the group that embeddings travel on (NCCL on GPUs); `host` is a gloo group for
pairs and counts, which originate on the host: no device synchronisation for them.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import reduce
from operator import or_
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from renee_ray.data.storage import usual_patience
from renee_ray.xfc.labels import owners


@dataclass(frozen=True)
class Ranks:
    """This process among the workers; `num_ranks` 1 needs no process group.

    wait_s: seconds for which a rank waits for what others may keep from it.
    """

    rank: int = 0
    num_ranks: int = 1
    tensors: dist.ProcessGroup | None = None
    host: dist.ProcessGroup | None = None
    wait_s: float = math.inf

    @classmethod
    def of_process_group(cls, timeout_s: float | None = None) -> Ranks:
        """Makes groups beside the default one, so that DDP's buckets cannot interleave with ours.

        Args:
            timeout_s: seconds for which a rank waits for the others inside a step; None: torch's
                half an hour, since a new group does not take the default group's timeout. The host
                group waits for storage as well, which may keep a rank (next batch, checkpoint).
        """
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls()
        step = None if timeout_s is None else timedelta(seconds=timeout_s)
        with_storage = step and step + timedelta(seconds=usual_patience())
        return cls(
            dist.get_rank(),
            dist.get_world_size(),
            dist.new_group(timeout=step),
            dist.new_group(backend="gloo", timeout=with_storage),
            with_storage.total_seconds() if with_storage else math.inf,
        )


def all_gather_single(everyone: Tensor, own: Tensor, group: dist.ProcessGroup | None) -> None:
    """Gathers equal tensors of all ranks.

    Torch 2.13 has renamed this and `reduce_scatter_single`, and warns of the former names.
    """
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everyone, own, group=group)


def reduce_scatter_single(
    own: Tensor, everyone: Tensor, group: dist.ProcessGroup | None
) -> dist.Work:
    """Starts to sum over the ranks, each of which receives its part."""
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(own, everyone, group=group, async_op=True)


def own_buffers(wrapper: type[DistributedDataParallel]) -> dict[str, Any]:
    """Returns the argument with which DDP does not send buffers around in every forward."""
    known, name = inspect.signature(wrapper).parameters, "forward_sync_buffers"
    return {name if name in known else "broadcast_buffers": False}


def row_counts(ranks: Ranks, rows: int) -> list[int]:
    """Returns how many rows each rank holds of the coming global batch."""
    return announce(ranks, rows, 0)[0]


def announce(ranks: Ranks, rows: int, request: int) -> tuple[list[int], int]:
    """Exchanges row counts, and bits that any rank may set for all.

    Returns:
        (rows that each rank holds of the coming global batch, the requests of all ranks or-ed)
    """
    counts, requests = zip(*gather_numbers(ranks, [rows, request]), strict=True)
    return [int(count) for count in counts], reduce(or_, map(int, requests))


def gather_rows(ranks: Ranks, own: Tensor, counts: list[int]) -> Tensor:
    """Gathers the rows of all ranks, in rank order: own [b_r, D] -> [B, D]."""
    if ranks.num_ranks == 1:
        return own
    padded = own.new_zeros(max(counts), own.shape[1])
    padded[: len(own)] = own
    everyone = own.new_empty(ranks.num_ranks * max(counts), own.shape[1])
    all_gather_single(everyone, padded, ranks.tensors)
    return torch.cat(
        [rows[:n] for rows, n in zip(everyone.chunk(ranks.num_ranks), counts, strict=True)]
    )


def scatter_rows(ranks: Ranks, everyone: Tensor, counts: list[int]) -> Callable[[], Tensor]:
    """Starts the adjoint of `gather_rows`: [B, D] float32 on each rank -> own rows of the sum.

    It runs beside whatever follows. Returns what waits for it and gives own rows, [b_r, D].
    """
    if ranks.num_ranks == 1:
        return lambda: everyone
    padded = everyone.new_zeros(ranks.num_ranks, max(counts), everyone.shape[1])
    for rank, rows in enumerate(everyone.split(counts)):
        padded[rank, : len(rows)] = rows
    own = everyone.new_empty(max(counts), everyone.shape[1])
    work = reduce_scatter_single(own, padded.flatten(0, 1), ranks.tensors)

    def wait() -> Tensor:
        work.wait()
        return own[: counts[ranks.rank]]

    return wait


def route(
    ranks: Ranks, rows: Tensor, labels: Tensor, num_labels: int, *more: Tensor
) -> tuple[Tensor, ...]:
    """Sends (row, label) pairs to the owners of the labels.

    Args:
        rows, labels: int64 [m], host memory; rows counted in the global batch.
        more: int64 [m] each, what else belongs to a pair; as many on every rank.

    Returns:
        rows, labels and more of the pairs of all ranks whose labels this rank owns.
    """
    if ranks.num_ranks == 1:
        return rows, labels, *more
    order, sent, received = _exchange_sizes(ranks, owners(labels, num_labels, ranks.num_ranks))
    return _all_to_all(ranks, torch.stack([rows, labels, *more], 1)[order], sent, received).unbind(
        1
    )


def look_up(
    ranks: Ranks, labels: Tensor, own_values: Tensor, first: int, num_labels: int
) -> Tensor:
    """Asks the rank that owns each label for a number of the label.

    Args:
        labels: int64 [m], any global ids, host memory.
        own_values: [n] numbers of the labels from `first` on that this rank owns.

    Returns:
        [m], of the dtype of `own_values`.
    """
    if ranks.num_ranks == 1:
        return own_values[labels - first]
    order, sent, received = _exchange_sizes(ranks, owners(labels, num_labels, ranks.num_ranks))
    asked = _all_to_all(ranks, labels[order], sent, received)
    answers = _all_to_all(ranks, own_values[asked - first], received, sent)
    values = torch.empty_like(answers)
    values[order] = answers
    return values


def return_rows(ranks: Ranks, everyone: Tensor, counts: list[int]) -> list[Tensor]:
    """Sends each rank's rows back to it: [B, k] on each rank -> own [b_r, k] of every rank."""
    if ranks.num_ranks == 1:
        return [everyone]
    own = counts[ranks.rank]
    received = _all_to_all(ranks, everyone, counts, [own] * ranks.num_ranks, ranks.tensors)
    return list(received.split(own)) if own else [received] * ranks.num_ranks


def return_pairs(
    ranks: Ranks, rows: Tensor, labels: Tensor, values: Tensor, counts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Sends values of (row, label) pairs of the global batch to the holders of the rows.

    Args:
        rows, labels: int64 [m]; values: float32 [m]; all in host memory, in any order.
        counts: rows of each rank in the global batch.

    Returns:
        (row among this rank's own, label, value) of all ranks
    """
    if ranks.num_ranks == 1:
        return rows, labels, values
    ends = torch.tensor(counts).cumsum(0)
    order, sent, received = _exchange_sizes(ranks, torch.bucketize(rows, ends, right=True))
    pairs = _all_to_all(ranks, torch.stack([rows, labels], 1)[order], sent, received)
    found = _all_to_all(ranks, values[order], sent, received)
    return pairs[:, 0] - sum(counts[: ranks.rank]), pairs[:, 1], found


def all_sum(ranks: Ranks, values: Tensor) -> Tensor:
    """Sums over the ranks, in place."""
    if ranks.num_ranks > 1:
        dist.all_reduce(values, group=ranks.host if values.device.type == "cpu" else ranks.tensors)
    return values


def all_max(ranks: Ranks, values: Tensor) -> Tensor:
    """Takes the maximum over the ranks, in place."""
    if ranks.num_ranks > 1:
        group = ranks.host if values.device.type == "cpu" else ranks.tensors
        dist.all_reduce(values, dist.ReduceOp.MAX, group=group)
    return values


def gather_bytes(ranks: Ranks, own: bytes, group: dist.ProcessGroup | None = None) -> list[bytes]:
    """Gathers the bytes of every rank, in rank order; group: None: the ranks' host group."""
    if ranks.num_ranks == 1:
        return [own]
    group = ranks.host if group is None else group
    sizes = torch.empty(ranks.num_ranks, dtype=torch.int64)
    all_gather_single(sizes, torch.tensor([len(own)]), group)
    padded = torch.tensor(list(own.ljust(int(sizes.max()), b"\0")), dtype=torch.uint8)
    everyone = padded.repeat(ranks.num_ranks)
    all_gather_single(everyone, padded, group)
    rows = everyone.view(ranks.num_ranks, -1).tolist()
    return [bytes(row[:size]) for row, size in zip(rows, sizes.tolist(), strict=True)]


def gather_numbers(ranks: Ranks, own: list[float]) -> list[list[float]]:
    """Gathers equally many numbers of every rank, in rank order."""
    if ranks.num_ranks == 1:
        return [own]
    everyone = torch.empty(ranks.num_ranks * len(own), dtype=torch.float64)
    all_gather_single(everyone, torch.tensor(own, dtype=torch.float64), ranks.host)
    return everyone.view(ranks.num_ranks, -1).tolist()


def sum_gradients(
    encoder: DistributedDataParallel, on_last: Callable[[], None] = lambda: None
) -> None:
    """Makes DDP sum the encoder's gradient over the ranks, where it would take the mean.

    A rank's backward starts from the rows of dE that belong to it, summed over all labels:
    the gradient of the whole loss is then the sum over ranks. DDP's mean would divide it by
    num_ranks and so change the trajectory with the number of workers.

    Args:
        on_last: called when this rank has its gradient and only the sum is outstanding.
    """

    def hook(_, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations as objects
        if bucket.is_last():
            on_last()
        work = dist.all_reduce(bucket.buffer(), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    encoder.register_comm_hook(None, hook)


def _exchange_sizes(ranks: Ranks, holders: Tensor) -> tuple[Tensor, list[int], list[int]]:
    """Prepares to send items to their `holders`, int64 [m], ranks.

    Returns:
        (the order that sorts items by holder; how many are sent to each rank, and received)
    """
    sent = torch.bincount(holders, minlength=ranks.num_ranks)
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=ranks.host)
    return torch.argsort(holders, stable=True), sent.tolist(), received.tolist()


def _all_to_all(
    ranks: Ranks,
    items: Tensor,
    sent: list[int],
    received: list[int],
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    out = items.new_empty(sum(received), *items.shape[1:])
    dist.all_to_all_single(
        out, items.contiguous(), received, sent, group=group if group is not None else ranks.host
    )
    return out
