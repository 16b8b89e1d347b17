"""Scoring a dataset with a trained run: metrics, or predictions as Parquet.

A Ray Train job like training: each worker loads its label range from the checkpoint,
whatever number of workers wrote it, and scores its own rows.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from renee_ray.config import EvalConfig, ReneeError, RunConfig, ScoreConfig
from renee_ray.data.dataset import Dataset, has_manifest
from renee_ray.data.storage import absolute, listing, make_directory, remove, write_file
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.job import decide_gpu, launch, quiet, worker_device
from renee_ray.service.run import RUN_FILE, RunDirectory
from renee_ray.service.texts import TEXT_SPLIT, check_texts, tokenise_texts
from renee_ray.service.train import scoring_feed
from renee_ray.training.checkpoint import Checkpoint
from renee_ray.training.collectives import Ranks
from renee_ray.training.encoder import Encoder
from renee_ray.training.model import build_model
from renee_ray.training.neighbours import Neighbours
from renee_ray.training.scoring import (
    Propensities,
    Scorer,
    evaluate,
    prior_offset,
    read_counts,
)
from renee_ray.xfc.topk import NONE

PART_ROWS = 16384
MANIFEST = "predictions.json"
SCRATCH = "_texts"
OURS = re.compile(rf"predictions\.json|part-\d+-\d+\.parquet|{SCRATCH}")


def evaluate_run(run: str, data: str, score: ScoreConfig) -> dict[str, Any]:
    """Metrics of a run's checkpoint on a split, in percent, with "points", "step" and "split".

    Raises:
        ReneeError: no run, no checkpoint, or a dataset of another kind.
    """
    return _score(run, data, score, None)


def predict_run(run: str, src: str, destination: str, score: ScoreConfig) -> dict[str, Any]:
    """Writes the k best labels of every point of a split to `destination`/part-*.parquet.

    Columns: point_id int64, label_ids list<int64> (best first), scores list<float>, with
    `texts` also label_texts list<string>. Filter labels are left out before the cut; a row is
    shorter than k where fewer labels remain. `predictions.json` is written last.

    Args:
        src: a dataset directory, or raw texts as service/texts.py reads them (then the
            labels are those of the dataset that the run was trained on).

    Raises:
        ReneeError: as `evaluate_run`, `src` is neither, or there are predictions at
            `destination` already.
    """
    destination = absolute(destination)
    found = _score(run, src, score, destination)
    write_file(f"{destination.rstrip('/')}/{MANIFEST}", json.dumps(found, indent=1).encode())
    return found


def _score(run: str, src: str, score: ScoreConfig, destination: str | None) -> dict[str, Any]:
    directory = RunDirectory(absolute(run))
    config = directory.config()
    raw = destination is not None and not has_manifest(src)
    if raw:
        check_texts(src)
        if "split" in score.model_fields_set:
            raise ReneeError(f"split={score.split} has no meaning for the texts of {src}; omit it")
    labels = directory.dataset() if raw else Dataset.open(src)
    check_labels(directory, labels)
    if destination is not None:
        _check_destination(destination, src, score.overwrite)
    workers = score.num_workers or config.max_workers
    ensure_ray(workers + 1)
    config = scoring_config(config, score, workers)
    voters = _voters(directory, labels, config.evaluation, score)
    checkpoint = directory.checkpoint(score.checkpoint)
    length = min(config.encoder.max_length, labels.manifest.max_length)
    with contextlib.ExitStack() as stack:
        points, split = labels, str(score.split)
        facts: dict[str, Any] = {"split": split}
        if raw:
            assert destination is not None
            scratch = stack.enter_context(_scratch(f"{destination.rstrip('/')}/{SCRATCH}"))
            points, replaced = tokenise_texts(src, scratch, labels, length)
            split, facts = TEXT_SPLIT, {"source": src, "replaced_lines": replaced}
        if not points.manifest.num_points(split):
            raise ReneeError(f"{points.path} has no points in split={split}; choose another")
        if destination is not None:
            _clear(destination, keep_scratch=raw)
        arguments = {
            "config": config.model_dump(),
            "score": score.model_dump(),
            "points": points,
            "split": split,
            "labels": labels,
            "voters": voters,
            "run": directory.path,
            # Named once for all workers: a training beside us may publish another meanwhile.
            "checkpoint": checkpoint.name,
            "destination": destination,
        }
        use_gpu = decide_gpu(score.use_gpu, workers)
        found = launch(score_worker, arguments, config, use_gpu)
    return {**facts, "step": checkpoint.state.step, **found}


def score_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What each worker of a scoring job runs."""
    quiet()
    config = RunConfig.model_validate(arguments["config"])
    score = ScoreConfig.model_validate(arguments["score"])
    points: Dataset = arguments["points"]
    labels: Dataset = arguments["labels"]
    ranks, device = Ranks.of_process_group(config.timeout_s), worker_device()
    voters: Dataset | None = arguments["voters"]
    checkpoint = RunDirectory(arguments["run"]).checkpoints().at(arguments["checkpoint"])
    scorer = _load(config, labels, voters, checkpoint, ranks, device)
    split, length = arguments["split"], config.encoder.max_length
    batches = scoring_feed(points, split, score.batch_size, length, ranks)
    facts = {"points": points.manifest.num_points(split)}
    if arguments["destination"] is None:
        propensities = Propensities.read(labels, scorer.shard.owned, ranks)
        return {**facts, "metrics": evaluate(scorer, batches, propensities)}
    writer = _Writer(arguments["destination"], ranks.rank, labels if score.texts else None)
    for batch, scores, best in scorer.predict(batches, score.k):
        writer.add(batch.points, best.numpy(), scores.numpy())
    writer.close()
    return {**facts, "k": score.k}


def _load(
    config: RunConfig,
    dataset: Dataset,
    voters: Dataset | None,
    checkpoint: Checkpoint,
    ranks: Ranks,
    device: torch.device,
) -> Scorer:
    settings = config.evaluation
    precision = checkpoint.state.facts.get("precision")
    model = build_model(
        config, dataset.manifest.num_labels, ranks, device, training=False, precision=precision
    )
    checkpoint.load_encoder(model.encoder)
    checkpoint.load_shard(model.shard, momentum=False)
    offset = prior_offset(read_counts(dataset, model.shard.owned), settings.tail, device)
    neighbours = None
    if voters is not None:
        neighbours = embed_voters(config, voters, model.encoder, ranks, device)
    return Scorer(model.encoder, model.shard, ranks, device, offset, neighbours)


def embed_voters(
    config: RunConfig, voters: Dataset, encoder: Encoder, ranks: Ranks, device: torch.device
) -> Neighbours:
    """The training points of `voters`, embedded; every rank must ask at the same time."""
    settings, length = config.evaluation, config.encoder.max_length
    points = scoring_feed(voters, "train", settings.batch_size, length, ranks)
    count, weight = settings.neighbours, settings.neighbour_weight
    return Neighbours.embed(encoder, points, ranks, device, count, weight)


class _Writer:
    """One rank's predictions, as part files of `PART_ROWS` rows."""

    def __init__(self, destination: str, rank: int, texts: Dataset | None) -> None:
        self._destination = destination.rstrip("/")
        self._rank, self._texts = rank, texts
        self._tables: list[pa.Table] = []
        self._rows = self._parts = 0

    def add(self, points: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> None:
        """points int64 [b], labels int64 [b, k] and scores float32 [b, k], best first."""
        kept = labels != NONE
        offsets = pa.array(np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32))
        columns = {
            "point_id": pa.array(points),
            "label_ids": pa.ListArray.from_arrays(offsets, pa.array(labels[kept])),
            "scores": pa.ListArray.from_arrays(offsets, pa.array(scores[kept])),
        }
        if self._texts is not None:
            texts = label_texts(self._texts, labels[kept])
            columns["label_texts"] = pa.ListArray.from_arrays(offsets, texts)
        self._tables.append(pa.table(columns))
        self._rows += len(points)
        if self._rows >= PART_ROWS:
            self.close()

    def close(self) -> None:
        """Writes what has been added since the last part."""
        if not self._rows:
            return
        buffer = pa.BufferOutputStream()
        pq.write_table(pa.concat_tables(self._tables), buffer, compression="zstd")
        name = f"part-{self._rank:05d}-{self._parts:05d}.parquet"
        write_file(f"{self._destination}/{name}", buffer.getvalue())
        self._tables, self._rows, self._parts = [], 0, self._parts + 1


def label_texts(dataset: Dataset, labels: np.ndarray) -> pa.Array:
    """Texts of any labels int64 [m]; reads only the parts that hold one of them."""
    ids, inverse = np.unique(labels, return_inverse=True)
    pieces = []
    for part in dataset.manifest.splits["labels"]:
        inside = ids[(ids >= part.first) & (ids < part.first + part.rows)]
        if len(inside):
            texts = dataset.read_part(part, ["text"])["text"].combine_chunks()
            pieces.append(texts.take(pa.array(inside - part.first)))
    texts = pa.concat_arrays(pieces) if pieces else pa.array([], type=pa.string())
    return texts.take(pa.array(inverse))


def scoring_config(config: RunConfig, score: ScoreConfig, workers: int) -> RunConfig:
    """The configuration of a run, to score with so many workers.

    The checkpoint has all weights: the file that training began with is not looked at.
    """
    encoder = config.encoder.model_copy(update={"weights": ""})
    settings = _settings(config, score)
    placed = ("placement_strategy", "accelerator_type", "cpus_per_worker")
    return config.model_copy(
        update={"num_workers": workers, "evaluation": settings, "encoder": encoder}
        | {"batch_size": workers * config.feed.streams}  # of training: it bounds num_workers
        | {key: getattr(score, key) for key in placed}
    )


def _settings(config: RunConfig, score: ScoreConfig) -> EvalConfig:
    """How the run scores, with what the command sets anew."""
    keys = ("tail", "neighbours", "neighbour_weight")
    anew = {key: value for key in keys if (value := getattr(score, key)) is not None}
    return config.evaluation.model_copy(update=anew)


def _voters(
    directory: RunDirectory, labels: Dataset, settings: EvalConfig, score: ScoreConfig
) -> Dataset | None:
    """The dataset whose training points vote: the one that the run was trained on."""
    if not settings.neighbours:
        return None
    if score.split == "train":
        raise ReneeError(
            f"split=train with neighbours={settings.neighbours} would let points vote on "
            f"themselves; add neighbours=0"
        )
    trained_on = (directory.read(RUN_FILE) or {})["dataset"]["manifest_hash"]
    return labels if labels.manifest.hash == trained_on else directory.dataset()


def check_labels(directory: RunDirectory, dataset: Dataset) -> None:
    """Raises ReneeError where a run was trained with other labels or another vocabulary."""
    saved = directory.read(RUN_FILE) or {}
    trained = saved.get("dataset", {})
    for key in ("num_labels", "vocabulary_hash"):
        have = getattr(dataset.manifest, key)
        if trained.get(key) != have:
            raise ReneeError(
                f"{directory.path} was trained with {key}={trained.get(key)!r} and "
                f"{dataset.path} has {have!r}; convert it with the run's tokenizer and labels"
            )


@contextlib.contextmanager
def _scratch(path: str) -> Iterator[str]:
    """A directory for the tokenised texts: every node that can write predictions can read it."""
    remove(path)
    try:
        yield path
    finally:
        remove(path)


def _check_destination(destination: str, src: str, overwrite: bool) -> None:
    inside, outside = _real(absolute(src)), _real(destination)
    if inside.startswith(outside):
        raise ReneeError(f"{src} lies in {destination}, which is overwritten; give another one")
    if outside.startswith(inside):
        raise ReneeError(f"{destination} lies in {src}, which is only read; give another one")
    names = [info.base_name for info in listing(destination)]
    if MANIFEST in names and not overwrite:
        raise ReneeError(f"{destination} holds predictions already; add overwrite=true")
    if not all(OURS.fullmatch(name) for name in names):
        raise ReneeError(f"{destination} holds other files; give an empty directory")


def _real(path: str) -> str:
    """A directory so that those inside it begin with it, links followed."""
    return (path if "://" in path else os.path.realpath(path)).rstrip("/") + "/"


def _clear(destination: str, *, keep_scratch: bool) -> None:
    """Removes earlier predictions, the file that declares them complete first."""
    base = destination.rstrip("/")
    make_directory(base)
    for name in sorted(
        (info.base_name for info in listing(base)), key=lambda name: name != MANIFEST
    ):
        if name != SCRATCH or not keep_scratch:
            remove(f"{base}/{name}")
