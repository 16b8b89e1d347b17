"""Micro-batches of the encoder under one global batch (gradient cache, Gao et al., RepL4NLP 2021).

    e_m  = encoder(tokens of micro-batch m)    all m, no graph but for the last, whose is kept
    dE   from the classifier, on the embeddings of the whole global batch
    last m: backward(dE_m), its graph freed;   every other m: forward again, backward(dE_m)

The activations of one micro-batch exist at a time. Its second forward draws the random numbers of
its first. DDP reduces once a step, in each rank's last backward, however many a rank has.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from renee_ray.rank.batch import Batch
from renee_ray.xfc.device import upload


class GradientCache:
    """The embeddings of a rank's rows, and their backward pass through the encoder.

    Args:
        encoder: [b, T] tokens -> [b, D] float32, possibly wrapped in DDP.
        micro_batch: rows of one forward with its graph; 0: all of them.

    embeddings: [b_r, D] float32, without graph, in the order of the batch.
    """

    def __init__(
        self, encoder: nn.Module, batch: Batch, micro_batch: int, device: torch.device
    ) -> None:
        self._encoder, self._batch, self._device = encoder, batch, device
        *again, kept = batch.micro_batches(micro_batch)
        # Uploaded before anything is queued, and not waited for.
        order = upload(torch.from_numpy(np.concatenate([*again, kept])), device)
        self._places = list(order.split([len(rows) for rows in (*again, kept)]))
        self._again: list[tuple[np.ndarray, list[Tensor]]] = []
        parts = []
        for rows in again:
            self._again.append((rows, _random_state(device)))
            with torch.no_grad():
                parts.append(self._forward(rows))
        with self._reduction(at_once=not again):
            self._kept = self._forward(kept)
        computed = torch.cat([*parts, self._kept.detach()])
        self.embeddings = torch.empty_like(computed).index_copy_(0, order, computed)

    def backward(self, gradient: Tensor) -> None:
        """Adds the encoder's gradient for d loss / d embeddings [b_r, D]; once only."""
        if not self._kept.requires_grad:  # a frozen transformer alone
            return
        with self._reduction(at_once=not self._again):
            self._kept.backward(gradient[self._places.pop()])
        del self._kept
        while self._again:
            rows, state = self._again.pop()
            with self._reduction(at_once=not self._again), _random_numbers(state, self._device):
                self._forward(rows).backward(gradient[self._places.pop()])

    def _forward(self, rows: np.ndarray) -> Tensor:
        # A rank without rows still joins DDP's reduction: with one blank row, cut off again.
        return self._encoder(*self._batch.tokens(self._device, rows))[: len(rows)]

    def _reduction(self, *, at_once: bool) -> contextlib.AbstractContextManager[None]:
        """Surrounds a forward and its backward; at_once: whether DDP reduces after the latter."""
        if at_once or not isinstance(self._encoder, DistributedDataParallel):
            return contextlib.nullcontext()
        return self._encoder.no_sync()


def _random_state(device: torch.device) -> list[Tensor]:
    on_gpu = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


@contextlib.contextmanager
def _random_numbers(state: list[Tensor], device: torch.device) -> Iterator[None]:
    """Draws the numbers that followed `state`; the generators go on afterwards as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(state[0])
        for on_gpu in state[1:]:
            torch.cuda.set_rng_state(on_gpu, device)
        yield
