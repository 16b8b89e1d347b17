"""Scoring a dataset with a trained run: metrics, or predictions as Parquet.

A Ray Train job like training: each worker loads its label range from the checkpoint,
whatever number of workers wrote it, and scores its own rows.
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import Any

import pyarrow.fs as pafs
import ray.train
import torch

from renee_ray.checkpoint.state import Checkpoint
from renee_ray.config.schema import EvalConfig, RunConfig, ScoreConfig
from renee_ray.data.dataset import Dataset, has_manifest
from renee_ray.data.destination import Destination, Kind, listed_files, refuse_overlap
from renee_ray.data.storage import absolute, filesystem_of, patiently
from renee_ray.errors import ReneeError
from renee_ray.machine import available_bytes
from renee_ray.model.encoder import Encoder, check_positions
from renee_ray.model.model import build_model
from renee_ray.parallel.collectives import Ranks, all_sum
from renee_ray.scoring.neighbours import RERANKED, Neighbours
from renee_ray.scoring.scorer import (
    Propensities,
    Scorer,
    metric_sums,
    prior_offset,
    read_counts,
    topk_bytes,
)
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.launch import decide_gpu, launch, quiet, worker_device
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.score.labels import check_labels
from renee_ray.service.score.predictions import Layout, Writer
from renee_ray.service.score.texts import TEXT_SPLIT, check_texts, tokenise_texts
from renee_ray.service.train.train import scoring_feed

log = logging.getLogger(__name__)

MAX_PAIRS = 1 << 31
"""Of rows and labels in a batch of a rank: Arrow's lists count them in 32 bits."""
PREDICTIONS = Kind(
    "predictions", "_predictions.json", "_claim.json", frozenset({"k", "step"}),
    re.compile(r"part-\d{12}\.parquet"), (), listed_files,
)  # fmt: skip
"""Files beside Parquet begin with `_`: readers of a directory pass over them."""


def evaluate_run(run: str, data: str, score: ScoreConfig) -> dict[str, Any]:
    """Metrics of a run's checkpoint on a split, in percent, with "points", "step" and "split".

    Raises:
        ReneeError: no run, no checkpoint, a dataset of another kind or with other labels, or
            no point of the split has a label.
    """
    directory = RunDirectory(absolute(run))
    directory.config()
    _check_source(data, "dataset")
    points, split = Dataset.open(data), str(score.split)
    nothing = ReneeError(f"no point of split={split} of {points.path} has a label; give another")
    counts = points.manifest.statistics.get(split)
    some = points.manifest.num_points(split) > 0
    if some and isinstance(counts, dict) and counts.get("label_pairs") == 0:
        raise nothing
    found = _Scoring.of(directory, points, score).run(points, split)
    if found["metrics"] is None:
        raise nothing
    return {"split": split, **found}


def predict_run(run: str, src: str, destination: str, score: ScoreConfig) -> dict[str, Any]:
    """Writes the k best labels of every point of a split to `destination`/part-*.parquet.

    Columns: point_id int64, label_ids list<int64> (best first), scores list<float>, with
    `texts` also label_texts list<string>. Rows, and the names of the parts, are in the order of
    the input. Filter labels are left out before the cut; a row is shorter than k where fewer
    labels remain. `_predictions.json` is written last.

    Args:
        src: a dataset directory, or raw texts as service/score/texts.py reads them (then the
            labels are those of the dataset that the run was trained on).

    Raises:
        ReneeError: as `evaluate_run`, `src` is neither, or there is something else, or there are
            predictions already, at `destination`.
    """
    destination = absolute(destination)
    output = Destination(destination, PREDICTIONS, score.overwrite)
    directory = RunDirectory(absolute(run))
    directory.config()
    _check_source(src, "dataset, or texts,")
    raw = not has_manifest(src)
    if raw:
        check_texts(src)
        if "split" in score.model_fields_set:
            raise ReneeError(f"split={score.split} has no meaning for the texts of {src}; omit it")
    refuse_overlap(src, destination)
    output.check()
    labels = directory.dataset() if raw else Dataset.open(src)
    num_labels = labels.manifest.num_labels
    if score.k > num_labels:
        if "k" in score.model_fields_set:
            log.warning("k=%d is cut to the %d labels that there are", score.k, num_labels)
        score = score.model_copy(update={"k": num_labels})
    scoring = _Scoring.of(directory, labels, score)
    points, split = labels, str(score.split)
    facts: dict[str, Any] = {"split": split}
    output.claim()
    try:
        if raw:
            ensure_ray(scoring.workers + 1)
            points, replaced = tokenise_texts(src, output.scratch(), labels, scoring.max_length)
            split, facts = TEXT_SPLIT, {"source": src, "replaced_lines": replaced}
        found = {**facts, **scoring.run(points, split, output)}
    except ReneeError:
        output.abandon()
        raise
    output.publish(found)
    return found


@dataclass(frozen=True)
class _Scoring:
    """A run that is about to score, with everything checked that can be before there is Ray."""

    directory: RunDirectory
    config: RunConfig
    score: ScoreConfig
    checkpoint: Checkpoint
    labels: Dataset
    voters: Dataset | None

    @classmethod
    def of(cls, directory: RunDirectory, labels: Dataset, score: ScoreConfig) -> _Scoring:
        """labels: the dataset whose labels are predicted.

        Raises:
            ReneeError: they are not the run's, the encoder cannot read so long texts, or there
                is no checkpoint.
        """
        config = directory.config()
        check_labels(directory, labels)
        check_positions(config.encoder, labels.manifest.max_length)
        config = scoring_config(config, score, score.num_workers or config.max_workers)
        voters = _voters(directory, labels, config.evaluation, score)
        checkpoint = directory.checkpoint(score.checkpoint)
        return cls(directory, config, score, checkpoint, labels, voters)

    @property
    def workers(self) -> int:
        return self.config.max_workers

    @property
    def max_length(self) -> int:
        return min(self.config.encoder.max_length, self.labels.manifest.max_length)

    def layout(self, points: Dataset, split: str) -> Layout:
        """How predictions for the points are written."""
        rows = points.manifest.num_points(split)
        return Layout(rows, self.workers, self.score.batch_size, self.score.k)

    def run(self, points: Dataset, split: str, output: Destination | None = None) -> dict[str, Any]:
        """Scores: "step", "points", and "metrics", or "k" where `output` takes predictions.

        Their files have then been declared by the workers, and are not yet published.
        """
        rows = points.manifest.num_points(split)
        if not rows:
            raise ReneeError(f"{points.path} has no points in split={split}; choose another")
        ensure_ray(self.workers + 1)
        use_gpu = decide_gpu(self.score.use_gpu, self.workers)
        layout = None if output is None else self.layout(points, split)
        arguments = {
            "config": self.config.model_dump(),
            "score": self.score.model_dump(),
            "points": points,
            "split": split,
            "labels": self.labels,
            "voters": self.voters,
            "run": self.directory.path,
            # Named once for all workers: a training beside us may publish another meanwhile.
            "checkpoint": self.checkpoint.name,
            "layout": layout,
            "output": output,
            "files": None if layout is None else layout.parts(),
        }
        found = launch(score_worker, arguments, self.config, use_gpu)
        if "refused" in found:
            raise ReneeError(found["refused"])
        return {"step": self.checkpoint.state.step, "points": rows, **found}


def score_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What each worker of a scoring job runs."""
    quiet()
    config = RunConfig.model_validate(arguments["config"])
    score = ScoreConfig.model_validate(arguments["score"])
    points: Dataset = arguments["points"]
    labels: Dataset = arguments["labels"]
    ranks, device = Ranks.of_process_group(config.timeout_s), worker_device()
    voters: Dataset | None = arguments["voters"]
    layout: Layout | None = arguments["layout"]
    checkpoint = RunDirectory(arguments["run"]).checkpoints().at(arguments["checkpoint"])
    scorer = _load(config, labels, voters, checkpoint, ranks, device)
    if layout and (refused := beyond_memory(layout, labels, voters, ranks, _free_bytes(device))):
        return {"refused": refused}
    output: Destination | None = arguments["output"]
    if output and ranks.rank == 0:  # now that nothing refuses what earlier ones make way for
        output.declare(arguments["files"])
    window = {"window": layout.window} if layout else {}
    split, length = arguments["split"], config.encoder.max_length
    batches = scoring_feed(points, split, score.batch_size, length, ranks, **window)
    if layout is None or output is None:
        sums = metric_sums(scorer, batches, Propensities.read(labels, scorer.shard.owned, ranks))
        return {"metrics": sums.metrics() if sums.any_label else None}
    texts = labels if score.texts else None
    all_sum(ranks, torch.zeros(1))  # nobody writes before the files are declared
    writer = Writer(output.path, layout.part_rows, texts)
    for batch, scores, best in scorer.predict(batches, score.k):
        writer.add(batch, best.numpy(), scores.numpy())
    writer.close()
    return {"k": score.k}


def _free_bytes(device: torch.device) -> int:
    """Of the memory that top-k takes, what this worker may count on."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return available_bytes() // ray.train.get_context().get_local_world_size()


def beyond_memory(
    layout: Layout, labels: Dataset, voters: Dataset | None, ranks: Ranks, free: int
) -> str | None:
    """Why some rank cannot hold the k best labels of a batch; all ranks come to the same.

    free: bytes of this rank.
    """
    rows, k = min(layout.batch_size, layout.rows), layout.k
    wanted = k if voters is None else max(k, RERANKED)
    needed = topk_bytes(rows, wanted, labels.manifest.num_labels, ranks.num_ranks)
    # What a rank needs goes with its node's threads, so what is left is compared.
    left = torch.zeros(ranks.num_ranks, dtype=torch.int64)
    left[ranks.rank] = free - needed
    least = int(all_sum(ranks, left).min())
    if k * -(-rows // ranks.num_ranks) >= MAX_PAIRS:
        return f"k={k} for batches of {rows} points is more than a list can hold; lower k"
    if least >= 0:
        return None
    return (
        f"k={k} for batches of {rows} points takes about {needed / 2**30:.3g} GiB in each worker, "
        f"{max(0, -least) / 2**30:.3g} GiB more than some worker has; lower k or batch_size"
    )


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
    if labels.manifest.hash == trained_on:
        return labels
    voters = directory.dataset()
    check_labels(directory, voters)
    return voters


def _check_source(path: str, wanted: str) -> None:
    """Raises ReneeError where nothing is at `path`, or what is no `wanted`."""
    filesystem, root = filesystem_of(path)
    kind = patiently(lambda: filesystem.get_file_info(root), f"reading {path}").type
    if kind == pafs.FileType.NotFound and wanted == "dataset":
        raise ReneeError(f"{path} does not exist; give a dataset that does")
    if kind == pafs.FileType.File and wanted == "dataset":
        raise ReneeError(
            f"{path} is a file; give the directory of a dataset, made by `renee-ray convert`"
        )
    if not has_manifest(path) and RunDirectory(absolute(path)).read(RUN_FILE) is not None:
        raise ReneeError(f"{path} is a run; give a {wanted} after the run")
