"""Buffers that are allocated once and reused by every chunk of every step."""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

import torch
from torch import Tensor


class Scratch:
    """Named working memory on one device; a buffer grows to the largest size asked for.

    Two calls of one thread with one name give the same memory: a name has one use at a time.
    Threads do not share buffers.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: WeakKeyDictionary[threading.Thread, dict[tuple[str, torch.dtype], Tensor]]
        self._flat = WeakKeyDictionary()

    def __call__(self, name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns a contiguous tensor of `shape` with whatever was last written there."""
        size = 1
        for extent in shape:
            size *= extent
        own = self._flat.setdefault(threading.current_thread(), {})
        flat = own.get((name, dtype))
        if flat is None or flat.numel() < size:
            # Scoring runs in inference mode, whose tensors no later training step could change.
            with torch.inference_mode(False):
                flat = torch.empty(size, dtype=dtype, device=self.device)
            own[name, dtype] = flat
        return flat[:size].view(shape)

    def nbytes(self) -> int:
        """Returns the bytes of all threads' buffers."""
        buffers = [flat for own in self._flat.values() for flat in own.values()]
        return sum(flat.numel() * flat.element_size() for flat in buffers)
