"""`renee-ray predict`: the k best labels of every point, as Parquet."""

from __future__ import annotations

import logging
from typing import Any

import ray.train
import torch

from renee_ray.config.schema import ScoreConfig
from renee_ray.data.dataset import Dataset, has_manifest
from renee_ray.data.destination import Destination, refuse_overlap
from renee_ray.data.storage import absolute
from renee_ray.errors import ReneeError
from renee_ray.machine import available_bytes
from renee_ray.parallel.collectives import Ranks, all_sum
from renee_ray.scoring.neighbours import RERANKED
from renee_ray.scoring.scorer import topk_bytes
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.score.job import ScoringJob, check_source
from renee_ray.service.score.predictions import PREDICTIONS, Layout, Writer
from renee_ray.service.score.texts import TEXT_SPLIT, check_texts, tokenise_texts

log = logging.getLogger(__name__)

MAX_PAIRS = 1 << 31
"""Pairs of a row and a label in a rank's batch: Arrow's lists count them in 32 bits."""


def predict_run(run: str, src: str, destination: str, score: ScoreConfig) -> dict[str, Any]:
    """Writes the k best labels of every point of a split to `destination`/part-*.parquet.

    The columns are point_id int64, label_ids list<int64> (best first) and scores list<float>;
    with `texts` also label_texts list<string>, with `explain` list<float> columns of what each
    part of a score is. Rows, and the names of the parts, are in the order
    of the input. Filter labels are removed before the cut; a row is shorter than k where fewer
    labels remain. `_predictions.json` is written last.

    Args:
        src: a dataset directory, or raw texts as service/score/texts.py reads them. The labels of
            raw texts are those of the dataset that the run was trained on.

    Raises:
        ReneeError: as `evaluate_run`; `src` is neither; or there is something else, or there are
            predictions already, at `destination`.
    """
    directory, destination = RunDirectory(absolute(run)), absolute(destination)
    if score.explain and not directory.config().encoder.bag.dim:
        raise ReneeError(
            f"{run} was trained without a bag, whose part explain=true would tell; omit it, or "
            f"train with encoder.bag.dim=512"
        )
    raw = _check_input(src, destination, score)
    output = Destination(destination, PREDICTIONS, score.overwrite)
    output.check()
    labels = directory.dataset() if raw else Dataset.open(src)
    job = ScoringJob.checked(directory, labels, _bounded(score, labels.manifest.num_labels))
    _check_scores(job, run)
    points, split = labels, str(score.split)
    facts: dict[str, Any] = {"split": split, "scores": score.scores}
    output.claim()
    try:
        if raw:
            ensure_ray(job.config.max_workers + 1)
            length = min(job.config.encoder.max_length, labels.manifest.max_length)
            points, replaced = tokenise_texts(src, output.scratch(), labels, length)
            split = TEXT_SPLIT
            facts = {"source": src, "replaced_lines": replaced, "scores": score.scores}
        rows = points.manifest.num_points(split)
        layout = Layout(rows, job.config.max_workers, job.score.batch_size, job.score.k)
        files = layout.parts()
        found = job.run(predict_worker, points, split, layout=layout, output=output, files=files)
        if "refused" in found:
            raise ReneeError(found["refused"])
    except ReneeError:
        output.abandon()
        raise
    found = {**facts, **found}
    output.publish(found)
    return found


def _check_input(src: str, destination: str, score: ScoreConfig) -> bool:
    """Returns whether `src` is raw texts, and not a dataset.

    Raises:
        ReneeError: it is neither, or the destination is in it, or it in the destination.
    """
    check_source(src, "dataset, or texts,")
    raw = not has_manifest(src)
    if raw:
        check_texts(src)
        if "split" in score.model_fields_set:
            raise ReneeError(f"split={score.split} has no meaning for the texts of {src}; omit it")
    refuse_overlap(src, destination)
    return raw


def _check_scores(job: ScoringJob, run: str) -> None:
    """Raises ReneeError where the sigmoid of a score is to be a probability and is none."""
    settings, objective = job.config.evaluation, job.config.classifier.objective
    plain = objective == "bce" and not settings.tail and not settings.neighbours
    if job.score.scores == "probabilities" and not plain:
        raise ReneeError(
            f"the scores of {run} with classifier.objective={objective}, tail={settings.tail} and "
            f"neighbours={settings.neighbours} give no probabilities; take a run trained by bce, "
            f"with tail=0 neighbours=0"
        )


def _bounded(score: ScoreConfig, num_labels: int) -> ScoreConfig:
    """Cuts k to the number of labels, with a warning where k was given."""
    if score.k <= num_labels:
        return score
    if "k" in score.model_fields_set:
        log.warning("k=%d is cut to the %d labels that there are", score.k, num_labels)
    return score.model_copy(update={"k": num_labels})


def predict_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Writes the predictions of this worker's rows; or returns why memory does not suffice."""
    job: ScoringJob = arguments["job"]
    layout: Layout = arguments["layout"]
    output: Destination = arguments["output"]
    scorer, k = job.load_scorer(), job.score.k
    ranks, free = scorer.ranks, _free_bytes(scorer.device)
    if refused := beyond_memory(layout, job.labels, job.voters, ranks, free):
        return {"refused": refused}
    if ranks.rank == 0:  # only now, when nothing refuses, may earlier predictions go
        output.declare(arguments["files"])
    points, split = arguments["points"], arguments["split"]
    batches = job.batches(points, split, ranks, window=layout.window)
    all_sum(ranks, torch.zeros(1))  # nobody writes before they are declared
    writer = Writer(output.path, layout.part_rows, job.labels if job.score.texts else None)
    for batch, scores, best in scorer.predict(batches, k):
        parts = scorer.parts(batch, best) if job.score.explain else []
        if parts:
            parts = [*parts, scores - sum(parts)]
        shown = scores.sigmoid() if job.score.scores == "probabilities" else scores
        writer.add(batch, best.numpy(), shown.numpy(), [part.numpy() for part in parts])
    writer.close()
    return {"k": k}


def _free_bytes(device: torch.device) -> int:
    """Returns the bytes that this worker may count on for its top-k."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes() // ray.train.get_context().get_local_world_size()


def beyond_memory(
    layout: Layout, labels: Dataset, voters: Dataset | None, ranks: Ranks, free: int
) -> str | None:
    """Returns the reason why some rank cannot hold the k best labels of a batch, or None.

    All ranks return the same. free: bytes that this rank may count on.
    """
    rows, k = min(layout.batch_size, layout.rows), layout.k
    wanted = k if voters is None else max(k, RERANKED)
    needed = topk_bytes(rows, wanted, labels.manifest.num_labels, ranks.num_ranks)
    # Ranks differ in what they need, which grows with a node's threads: compare what is left.
    left = torch.zeros(ranks.num_ranks, dtype=torch.int64)
    left[ranks.rank] = free - needed
    smallest_left = int(all_sum(ranks, left).min())
    if k * -(-rows // ranks.num_ranks) >= MAX_PAIRS:
        return f"k={k} for batches of {rows} points is more than a list can hold; lower k"
    if smallest_left >= 0:
        return None
    return (
        f"k={k} for batches of {rows} points takes about {needed / 2**30:.3g} GiB in each worker, "
        f"{max(0, -smallest_left) / 2**30:.3g} GiB more than some worker has; lower k or batch_size"
    )
