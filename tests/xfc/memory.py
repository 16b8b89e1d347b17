"""Watches the tensors that a computation makes: how large they are, and which are new."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import Self


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
