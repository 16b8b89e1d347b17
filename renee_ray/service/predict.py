"""Scoring a dataset with a trained run: metrics, or predictions as Parquet.

A Ray Train job like training: each worker loads its label range from the checkpoint,
whatever number of workers wrote it, and scores its own rows.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import torch

from renee_ray.config import ReneeError, RunConfig, ScoreConfig
from renee_ray.data.dataset import Dataset, absolute, filesystem_of
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.job import decide_gpu, launch, quiet, worker_device
from renee_ray.service.run import RUN_FILE, RunDirectory
from renee_ray.service.train import scoring_feed
from renee_ray.training.checkpoint import Checkpoint
from renee_ray.training.collectives import Ranks
from renee_ray.training.model import build_model
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
OURS = re.compile(r"predictions\.json|part-\d+-\d+\.parquet")


def evaluate_run(run: str, data: str, score: ScoreConfig) -> dict[str, Any]:
    """Metrics of a run's checkpoint on a split, in percent, with "points", "step" and "split".

    Raises:
        ReneeError: no run, no checkpoint, or a dataset of another kind.
    """
    return _score(run, data, score, None)


def predict_run(run: str, data: str, destination: str, score: ScoreConfig) -> dict[str, Any]:
    """Writes the k best labels of every point of a split to `destination`/part-*.parquet.

    Columns: point_id int64, label_ids list<int64> (best first), scores list<float>, with
    `texts` also label_texts list<string>. Filter labels are left out before the cut; a row is
    shorter than k where fewer labels remain. `predictions.json` is written last.

    Raises:
        ReneeError: as `evaluate_run`, or there are predictions at `destination` already.
    """
    found = _score(run, data, score, absolute(destination))
    filesystem, root = filesystem_of(destination)
    with filesystem.open_output_stream(f"{root}/{MANIFEST}") as sink:
        sink.write(json.dumps(found, indent=1).encode())
    return found


def _score(run: str, data: str, score: ScoreConfig, destination: str | None) -> dict[str, Any]:
    directory = RunDirectory(absolute(run))
    config = directory.config()
    dataset = Dataset.open(data)
    _check(directory, dataset, score)
    if destination is not None:
        _check_destination(destination, score.overwrite)
    workers = score.num_workers or config.num_workers
    ensure_ray(workers + 1)
    config = config.model_copy(update={"num_workers": workers})
    checkpoint, _ = directory.checkpoint(score.checkpoint, config.evaluation.metric)
    if destination is not None:
        _clear(destination)
    arguments = {
        "config": config.model_dump(),
        "score": score.model_dump(),
        "dataset": dataset,
        "run": directory.path,
        "destination": destination,
    }
    found = launch(
        score_worker, arguments, config, decide_gpu(score.use_gpu, workers), stored=False
    )
    return {"split": score.split, "step": checkpoint.state.step, **found}


def score_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What each worker of a scoring job runs."""
    quiet()
    config = RunConfig.model_validate(arguments["config"])
    score = ScoreConfig.model_validate(arguments["score"])
    dataset: Dataset = arguments["dataset"]
    ranks, device = Ranks.of_process_group(), worker_device()
    directory = RunDirectory(arguments["run"])
    checkpoint, _ = directory.checkpoint(score.checkpoint, config.evaluation.metric)
    tail = config.evaluation.tail if score.tail is None else score.tail
    scorer = _load(config, dataset, checkpoint, tail, ranks, device)
    batches = scoring_feed(dataset, score.split, score.batch_size, config.encoder.max_length, ranks)
    points = {"points": dataset.manifest.num_points(score.split)}
    if arguments["destination"] is None:
        propensities = Propensities.read(dataset, scorer.shard.owned, ranks)
        return {**points, "metrics": evaluate(scorer, batches, propensities)}
    writer = _Writer(arguments["destination"], ranks.rank, dataset if score.texts else None)
    for batch, scores, labels in scorer.predict(batches, score.k):
        writer.add(batch.points, labels.numpy(), scores.numpy())
    writer.close()
    return {**points, "k": score.k}


def _load(
    config: RunConfig,
    dataset: Dataset,
    checkpoint: Checkpoint,
    tail: float,
    ranks: Ranks,
    device: torch.device,
) -> Scorer:
    precision = checkpoint.state.facts.get("precision")
    model = build_model(
        config, dataset.manifest.num_labels, ranks, device, training=False, precision=precision
    )
    checkpoint.load_encoder(model.encoder)
    checkpoint.load_shard(model.shard, momentum=False)
    offset = prior_offset(read_counts(dataset, model.shard.owned), tail, device)
    return Scorer(model.encoder, model.shard, ranks, device, offset)


class _Writer:
    """One rank's predictions, as part files of `PART_ROWS` rows."""

    def __init__(self, destination: str, rank: int, texts: Dataset | None) -> None:
        self._filesystem, self._root = filesystem_of(destination)
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
        path = f"{self._root}/part-{self._rank:05d}-{self._parts:05d}.parquet"
        with self._filesystem.open_output_stream(path) as sink:
            pq.write_table(pa.concat_tables(self._tables), sink, compression="zstd")
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


def _check(directory: RunDirectory, dataset: Dataset, score: ScoreConfig) -> None:
    saved = directory.read(RUN_FILE) or {}
    trained = saved.get("dataset", {})
    for key in ("num_labels", "vocabulary_hash"):
        have = getattr(dataset.manifest, key)
        if trained.get(key) != have:
            raise ReneeError(
                f"{directory.path} was trained with {key}={trained.get(key)!r} and "
                f"{dataset.path} has {have!r}; convert it with the run's tokenizer and labels"
            )
    if not dataset.manifest.num_points(score.split):
        raise ReneeError(f"{dataset.path} has no points in split={score.split}; choose another")


def _check_destination(destination: str, overwrite: bool) -> None:
    names = [info.base_name for info in _listing(destination)]
    if MANIFEST in names and not overwrite:
        raise ReneeError(f"{destination} holds predictions already; add overwrite=true")
    if not all(OURS.fullmatch(name) for name in names):
        raise ReneeError(f"{destination} holds other files; give an empty directory")


def _clear(destination: str) -> None:
    """Removes earlier predictions, the file that declares them complete first."""
    filesystem, root = filesystem_of(destination)
    filesystem.create_dir(root, recursive=True)
    for info in sorted(_listing(destination), key=lambda info: info.base_name != MANIFEST):
        filesystem.delete_file(info.path)


def _listing(destination: str) -> list[pafs.FileInfo]:
    filesystem, root = filesystem_of(destination)
    return filesystem.get_file_info(pafs.FileSelector(root, allow_not_found=True))
