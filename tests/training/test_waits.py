"""How often the host of a training step would wait for a GPU, counted on a CPU.

To the counter on the GPU is what the model consists of, what `upload` returns, and whatever is
computed from these. It counts the operations whose result a host needs before it can go on: a
number, or a tensor whose shape depends on numbers.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel

from renee_ray.config.schema import EncoderConfig
from renee_ray.model.encoder import adamw, build_encoder, data_parallel
from renee_ray.model.loss_scale import LossScale
from renee_ray.model.token_gradient import TokenGradient
from renee_ray.rank.batch import Batch, Position, Ragged
from renee_ray.rank.collectives import Ranks
from renee_ray.training.step import Step
from renee_ray.xfc.kernels.choose import Operations
from renee_ray.xfc.kernels.plain import Update, residual
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import SGD, Weights
from tests.training.gloo import on_ranks
from tests.training.test_step import run_config

CPU = torch.device("cpu")
LABELS, DIM, VOCABULARY = 40, 8, 30
aten = torch.ops.aten
NEEDED = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.bincount, aten.equal,
    aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive, aten._coalesce,
    aten.repeat_interleave,
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Counts in `found`, by name, the operations on tensors of the GPU for which a host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._memory: dict[int, Any] = {}  # kept, so that no other tensor takes its place

    def put(self, tensor: Tensor) -> Tensor:
        if not tensor.is_sparse:
            storage = tensor.untyped_storage()
            self._memory[storage._cdata] = storage
        return tensor

    def there(self, given: object) -> bool:
        return any(
            each.is_sparse or each.untyped_storage()._cdata in self._memory
            for each in tree_leaves(given)
            if isinstance(each, Tensor)
        )

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.there((args, kwargs)):
            kind = func.overloadpacket
            by_truth = kind in (aten.index, aten.index_put, aten.index_put_) and any(
                each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1]
            )
            if kind in NEEDED or by_truth:
                self.found.append(str(func))
            for each in tree_leaves(out):
                if isinstance(each, Tensor):
                    self.put(each)
        return out


class Downloads(TorchFunctionMode):
    """Counts copies to the host, which are none on a CPU; the copy is no longer on the GPU."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (Tensor.cpu, Tensor.tolist, Tensor.numpy) and self._waits.there(args[0]):
            self._waits.found.append(func.__name__)
            host = torch.from_numpy(np.array(args[0].detach().numpy()))
            return host if func is Tensor.cpu else func(host)
        return func(*args, **(kwargs or {}))


def counted(work: Callable[[Waits], object]) -> list[str]:
    """Returns what the host waits for in `work`, which is told the counter."""
    waits = Waits()
    with pytest.MonkeyPatch.context() as patch:
        for name, module in list(sys.modules.items()):
            if name.startswith("renee_ray.") and hasattr(module, "upload"):
                patch.setattr(module, "upload", lambda host, device: waits.put(host.clone()))
        with waits, Downloads(waits):
            work(waits)
    return waits.found


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: bool(x.all()), lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.cpu(),
        lambda x: x.nonzero(), lambda x: x.tolist(), lambda x: x.unique(),
        lambda x: torch.sparse_coo_tensor(x.long()[None], x).coalesce(),
        lambda x: torch.nn.functional.embedding(
            x.long(), torch.ones(9, 2, requires_grad=True), padding_idx=0, sparse=True
        ).sum().backward(),
    ],
)  # fmt: skip
def test_the_counter_counts(wait: Callable[[Tensor], object]) -> None:
    assert counted(lambda waits: wait(waits.put(torch.ones(3)) + 1))
    assert not counted(lambda waits: waits.put(torch.ones(3)) + torch.ones(3).nonzero().sum())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            hidden_size=DIM, num_hidden_layers=2, num_attention_heads=2, intermediate_size=8,
            vocab_size=VOCABULARY, max_position_embeddings=16,
        )
    ).save_pretrained(path)  # fmt: skip
    return str(path)


def batch_of(ranks: Ranks, step: int, *, padded: bool) -> Batch:
    rng = np.random.default_rng([step, ranks.rank])
    rows = [rng.integers(1, VOCABULARY, 4 + padded * row % 3).tolist() for row in range(5)]
    labels = [rng.integers(0, LABELS, 3).tolist() for _ in rows]
    columns = [Ragged.of_lists(each) for each in (rows, labels, [[]] * 5)]
    return Batch(Position(0, step), np.arange(5), *columns, pad_id=0)


def step_of(
    ranks: Ranks, device: torch.device, bert: str, attention: str, micro_batch: int, chunk: int,
    sparse: bool, objective: Any, operations: Operations | None,
) -> Step:  # fmt: skip
    settings = EncoderConfig(
        name=bert, attention=attention, autocast="bf16", dropout=0.2, micro_batch=micro_batch,
        clip_norm=1.0,
    )  # fmt: skip
    encoder = build_encoder(settings, device, 0).train()
    encoder.grouped = False  # as on a GPU
    owned = LabelRange.of_rank(LABELS, ranks.num_ranks, ranks.rank)
    weights = Weights("bf16_sr", len(owned), DIM, True, device)
    tokens = TokenGradient(encoder, ranks) if sparse else None
    return Step(
        run_config(settings, seed=1, classifier={"objective": objective}),
        data_parallel(encoder, ranks, "sum", tokens), Shard(owned, weights, chunk, operations),
        adamw(encoder, settings), ranks, device, LossScale(8.0, dynamic=True), tokens,
    )  # fmt: skip


def train(step: Step, number: int) -> None:
    """Makes a step; every other one has padded rows."""
    batch = batch_of(step.ranks, number, padded=number % 2 == 0)
    step(batch, number, SGD(0.1, 0.9, 0.01, seed=1, step=number))


def waits_of_steps(ranks: Ranks, *settings: Any) -> list[list[str]]:
    """Returns what each of four steps waits for."""
    step = step_of(ranks, CPU, *settings, Operations(residual, Update))

    def work(waits: Waits, number: int) -> None:
        weights = step.shard.weights.tensors().values()
        for each in (*step.encoder.parameters(), *step.encoder.buffers(), *weights):
            waits.put(each)
        train(step, number)

    return [counted(partial(work, number=number)) for number in range(4)]


@pytest.mark.parametrize(
    ("num_ranks", "attention", "micro_batch", "chunk", "sparse", "objective"),
    [
        (1, "sdpa", 0, 100, False, "bce"), (1, "sdpa", 2, 7, False, "softmax"),
        (1, "eager", 1, 7, True, "bce"), (2, "sdpa", 2, 7, True, "bce"),
        (2, "eager", 0, 7, False, "softmax"),
    ],
)  # fmt: skip
def test_a_step_waits_once(
    bert: str, num_ranks: int, attention: str, micro_batch: int, chunk: int, sparse: bool,
    objective: str,
) -> None:  # fmt: skip
    """Whatever the number of micro-batches and of chunks: for whether E is finite."""
    given = bert, attention, micro_batch, chunk, sparse, objective
    alone = num_ranks == 1
    ranks = [waits_of_steps(Ranks(), *given)] if alone else on_ranks(2, waits_of_steps, *given)
    for found in ranks:
        assert [len(step) for step in found] == [1] * 4, found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(("micro_batch", "objective"), [(0, "bce"), (2, "softmax")])
def test_on_a_gpu_torch_says_so_too(
    bert: str, micro_batch: int, objective: str, sparse: bool
) -> None:
    given = bert, "sdpa", micro_batch, 7, sparse, objective, None
    step = step_of(Ranks(), torch.device("cuda"), *given)
    train(step, 0)
    train(step, 1)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            train(step, 2)
            train(step, 3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [str(each.message) for each in said if "synchronizing" in str(each.message)]
    assert len(waits) == 2, waits
