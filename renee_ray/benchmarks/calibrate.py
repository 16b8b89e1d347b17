"""Measures the rates that a plan needs on this machine: some seconds of pieces of a step.

On a CPU these are seconds that its threads computed, so that other programs hardly change them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch

from renee_ray.benchmarks.problem import default_device, interleaved, make_problem
from renee_ray.model.dropout import draw_fast
from renee_ray.model.encoder import attention_of, training_attention
from renee_ray.plan.encoder import build
from renee_ray.plan.memory import Worker
from renee_ray.plan.time import Rates
from renee_ray.xfc.softmax import Reductions
from renee_ray.xfc.weights.storages import SGD

MOST_LABELS, MOST_ROWS, REPEATS = 1 << 16, 64, 3
"""Labels and rows that are measured, of which a step has as many as the plan says."""


def measure(worker: Worker) -> Rates:
    """Measures a classifier, an encoder and its AdamW of the plan's kind on this machine."""
    device, before = default_device(), torch.get_num_threads()
    torch.set_num_threads(worker.threads)
    try:
        classifier = worker.config.classifier
        labels = min(worker.labels, MOST_LABELS)
        problem = make_problem(labels, worker.dim, worker.batch, device)
        shard = problem.shard(worker.precision, classifier.momentum, classifier.chunk)
        sgd = SGD(1e-3, classifier.momentum, classifier.weight_decay)
        softmax = Reductions() if classifier.objective == "softmax" else None
        step = partial(shard.step, problem.embeddings, problem.positives(), sgd, softmax=softmax)
        clock = time.perf_counter
        if device.type == "cpu":
            clock = lambda: time.process_time() / worker.threads  # noqa: E731
        taken = interleaved({"classifier": step}, REPEATS, device, clock=clock)
        return Rates(taken["classifier"] / labels, *_encoder(worker, device, clock))
    finally:
        torch.set_num_threads(before)


def _encoder(
    worker: Worker, device: torch.device, clock: Callable[[], float]
) -> tuple[float, float]:
    """Returns the seconds of a row, forward and backward, and of a step of AdamW.

    All of the transformer is trained here, so AdamW's are those of the share that a run trains.
    """
    if worker.transformer.settings is None:
        return 0.0, 0.0
    attention = attention_of(worker.config.encoder.attention, device.type)
    model = build(worker.transformer.settings, attention).to(device)
    if device.type == "cpu":
        draw_fast(model)
    rows, tokens = min(worker.rows, MOST_ROWS), max(1, round(worker.workload.tokens))
    ids = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def train() -> None:
        optimizer.zero_grad(set_to_none=True)
        with (
            training_attention(device),
            torch.autocast(device.type, worker.autocast, enabled=worker.autocast is not None),
        ):
            hidden = model(input_ids=ids, attention_mask=None)[0]
        hidden.float().mean().backward()

    pieces = {"rows": train, "adamw": optimizer.step}
    taken = interleaved(pieces, REPEATS, device, clock=clock)
    share = worker.parameters / worker.transformer.parameters
    return taken["rows"] / rows, taken["adamw"] * share
