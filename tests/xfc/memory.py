"""Watches the tensors that a computation makes: how large they are, and which are new."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """Sees operations of its own thread, so inside torch has no other.

    numel: what was found.
    """

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.threads = 0, torch.get_num_threads()

    def __enter__(self) -> Self:
        torch.set_num_threads(1)
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch.set_num_threads(self.threads)


class Largest(Watch):
    """`numel` is that of the largest tensor that any operation inside gave."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.numel = max(self.numel, leaf.numel())
        return result


class Fresh(Watch):
    """`numel` is that of the largest tensor inside whose memory no argument had."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {_memory(leaf) for leaf in tree_leaves((args, kwargs))}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _memory(leaf) not in known:
                self.numel = max(self.numel, leaf.numel())
        return result


def _memory(leaf: Any) -> int | None:
    return leaf.untyped_storage().data_ptr() if isinstance(leaf, torch.Tensor) else None


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch's allocator gives out at once while `function` runs, at most.

    What operations allocate inside counts too, which no dispatch mode sees.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = profiled.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = peak = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        now += change
        peak = max(peak, now)
    return peak
