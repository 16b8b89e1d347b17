"""The time of a step by piece, and what it sends, for a worker of a plan.

A roofline: each piece takes the longer of its products at the device's rate and its bytes at the
bandwidth of its memory. For a classifier of n labels and dimension D, and B rows, in kernels:

    residual   2 n D B operations    reads W, writes G (which on a CPU stays in the cache)
    dE         2 n D B               reads W and G
    update     2 n D B               reads G, reads and writes weights and velocities

A softmax has a pass before, of 2 n D B operations, which reads W.
The encoder has 6 operations for each token and parameter, and 12 T H for each token and layer.
The backward takes 4 of the 6, 2 with adapters (LoRA), and none where the transformer is frozen,
whose forward the first epoch alone makes. AdamW moves 28 bytes a parameter. `Rates` that were
measured replace the roofline's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from renee_ray.plan.devices import BANDWIDTH_SHARE, MATMUL_SHARE
from renee_ray.plan.memory import COPIED, Worker
from renee_ray.xfc.weights.storages import stored_bytes

ADAMW_BYTES = 28
LAUNCH_S = {"cuda": 4e-3, "cpu": 1e-2}
"""Seconds of a step in which the host prepares and nothing else happens: an estimate, on a CPU what
a step takes with next to no model (`empty` of tests/plan/measure.py)."""
PLAIN_LOGITS, PLAIN_PASSES = 5 / 3, 2
"""How often plain torch on a GPU moves logits and weights, for each time that kernels do; more for
storages that it rounds itself."""
SOFTMAX_LOGITS = 28, 24
"""Bytes that a softmax moves on a GPU for each logit, fp32 in plain torch, in its two passes."""
STORAGE_RATE = 0.5e9
"""Bytes/s that a worker writes of a checkpoint, an assumption."""


@dataclass(frozen=True)
class Rates:
    """Measured seconds. classifier: of a label; encoder: of a row of tokens; adamw: of a step."""

    classifier: float
    encoder: float
    adamw: float


def step_seconds(worker: Worker, rates: Rates | None = None) -> dict[str, float]:
    """Returns the seconds of each piece of a step; they follow one another."""
    encoder = worker.config.encoder
    again = (worker.rows - encoder.micro_batch) / worker.rows if encoder.micro_batch else 0.0
    forwards = 2 + encoder.trains_transformer + encoder.gradient_checkpointing + max(0.0, again)
    if rates is None:
        classifier, adamw = _classifier(worker), _adamw(worker)
    else:
        classifier, adamw = rates.classifier * worker.labels, rates.adamw
    encoding = 0.0 if encoder.frozen else forwards * forward_seconds(worker, rates)
    sent = sum(network_bytes(worker).values())
    return {
        "encoder": encoding,
        "classifier": classifier,
        "AdamW": adamw,
        "network": sent / worker.device.network,
        "host": LAUNCH_S[worker.device.kind],
    }


def forward_seconds(worker: Worker, rates: Rates | None = None) -> float:
    """Returns the seconds that the encoder's forward of a step's rows takes."""
    return (rates.encoder * worker.rows if rates else _encoder(worker)) / 3


def network_bytes(worker: Worker) -> dict[str, float]:
    """Returns the bytes that a worker sends in a step: at most, since tokens and n-grams repeat.

    Ids, and pairs of row and label, are few and left out.
    """
    others = (worker.num_workers - 1) / worker.num_workers
    rows = 4.0 * worker.batch * worker.dim * others
    encoder, (vocabulary, width) = worker.config.encoder, worker.transformer.table
    dense, tokens = worker.parameters, 0.0
    if encoder.trains_transformer and not encoder.compile:
        dense -= vocabulary * width
        tokens = 4.0 * width * _token_rows(worker)
    return {
        "embeddings": rows,
        "gradient of embeddings": rows,
        "gradient of the encoder": 8.0 * dense * others,
        "gradient of token vectors": tokens,
        "gradient of the bag": 4.0 * encoder.bag.dim * worker.ngrams * (worker.num_workers - 1),
    }


def _token_rows(worker: Worker) -> float:
    """Returns the rows of the token vectors' gradient that a worker sends.

    A gather sends its own rows to all others, where that is less than to add up the whole table
    (model/token_gradient.py).
    """
    vocabulary, num_workers = worker.transformer.table[0], worker.num_workers
    own = min(vocabulary, worker.rows * round(worker.workload.tokens))
    if num_workers * own > vocabulary:
        return 2 * vocabulary * (num_workers - 1) / num_workers
    return own * (num_workers - 1)


def steps_of_epoch(worker: Worker) -> int | None:
    """Returns the steps of an epoch, or None where the number of points is unknown."""
    workload = worker.workload
    if workload.points is None:
        return None
    feed, labels = worker.config.feed, workload.labels
    if feed.filter_labels == "positive" and workload.other_texts is not None:
        labels = workload.other_texts
    share, parts = feed.augment, workload.label_parts
    if share and parts:
        share = max(1, round(share * parts)) / parts
    texts = share * labels * workload.has_label_texts
    return math.ceil((workload.points + texts) / worker.batch)


def checkpoint_bytes(worker: Worker) -> int:
    """Returns the bytes of a checkpoint, all workers' files together."""
    memory = worker.memory()
    sharded = memory["weights"] + memory["momentum"] + memory["averages"]
    return sum(memory[name] for name in COPIED) + (worker.num_workers - 1) * sharded


def _products(worker: Worker, operations: float, dtype: torch.dtype | None) -> float:
    device = worker.device
    rate = device.wide if dtype in (None, torch.float32) else device.narrow
    return operations / (rate * MATMUL_SHARE * _parallel(worker))


def _moves(worker: Worker, size: float) -> float:
    return size / (worker.device.bandwidth * BANDWIDTH_SHARE * _parallel(worker))


def _parallel(worker: Worker) -> int:
    """Returns the devices of a worker: a GPU, or its cores."""
    return worker.threads if worker.device.kind == "cpu" else 1


def _classifier(worker: Worker) -> float:
    dim, batch, item = worker.dim, worker.batch, worker.compute.itemsize
    weight, velocity = stored_bytes(worker.precision)
    state = weight + velocity * bool(worker.config.classifier.momentum)
    on_cpu = worker.device.kind == "cpu"
    fused = on_cpu or worker.kernels
    logits = 0 if on_cpu else item * batch * (1 if fused else PLAIN_LOGITS)
    passes = 2 * (1 if fused else PLAIN_PASSES)
    softmax = worker.config.classifier.objective == "softmax"
    first, residual = (0 if on_cpu else batch * each for each in SOFTMAX_LOGITS)
    products = _products(worker, 2.0 * dim * batch, worker.compute)
    moved = [item * dim + logits, item * dim + logits, logits + passes * state * dim]
    if softmax:
        moved = [item * dim + first, item * dim + residual + logits, *moved[1:]]
    return worker.labels * sum(max(products, _moves(worker, each)) for each in moved)


def _encoder(worker: Worker) -> float:
    transformer, tokens = worker.transformer, worker.workload.tokens
    each = 6.0 * transformer.multiplied + 12.0 * tokens * transformer.hidden * transformer.layers
    return _products(worker, worker.rows * tokens * each, worker.autocast)


def _adamw(worker: Worker) -> float:
    return _moves(worker, float(ADAMW_BYTES * worker.parameters))
