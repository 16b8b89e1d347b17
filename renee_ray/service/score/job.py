"""The part that `evaluate` and `predict` share: checks beforehand, and a scorer in every worker.

Scoring is a Ray Train job like training. Each worker loads its label range from the checkpoint,
whatever number of workers wrote it, and scores its own rows (`worker.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from renee_ray.config.schema import EvalConfig, Placed, RunConfig
from renee_ray.config.score import ScoreConfig, Searched
from renee_ray.data.dataset import Dataset, Extended, has_manifest
from renee_ray.data.storage import absolute
from renee_ray.errors import ConfigError, Progress, ReneeError
from renee_ray.model.encoder import check_positions
from renee_ray.scoring.index import check_search
from renee_ray.service.cluster.connect import ensure_ray
from renee_ray.service.cluster.launch import decide_gpu, launch
from renee_ray.service.observe.progress import Display
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.run.labels import check_labels, hidden_labels, labels_of
from renee_ray.service.score.predictions import Layout
from renee_ray.service.score.trained import TRAINED

MOST_HIDDEN = 0.1
"""Share of labels that lists may hide from an index, whose effort was measured with all."""
LARGE = 1 << 30
"""Bytes of a checkpoint; of a smaller one, any worker holds all labels."""


def refuse(score: ScoreConfig, keys: Iterable[str], command: str) -> None:
    """Raises ConfigError where one of `keys`, which `command` would not read, is given."""
    for key in keys:
        value, default = getattr(score, key), ScoreConfig.model_fields[key].default
        if value != default:
            raise ConfigError(
                f"{command} takes {key}={default} alone, not {value}; leave {key} out"
            )


@dataclass(frozen=True)
class ScoringJob:
    """A run that is about to score, with everything checked that can be before there is Ray.

    checkpoint: named once for all workers, since a training beside us may publish another; step:
    its step; labels: the dataset whose labels are predicted; counted: the one whose counts of
    training points the logit adjustment takes; voters: the one whose points vote; hidden: labels
    that are not found, bool [L], or None; index: `index.json` of the index to search by, empty
    where search is exact; large: whether labels may come in passes.
    """

    directory: RunDirectory
    config: RunConfig
    score: ScoreConfig
    checkpoint: str
    step: int
    labels: Dataset
    counted: Dataset
    voters: Dataset | None
    hidden: np.ndarray | None
    index: dict[str, Any]
    large: bool

    @classmethod
    def checked(cls, directory: RunDirectory, labels: Dataset, score: ScoreConfig) -> ScoringJob:
        """Makes a job.

        Raises:
            ReneeError: the labels are not the run's, the encoder cannot read so long texts, or
                there is no checkpoint.
        """
        config = directory.config()
        check_positions(config.encoder, labels.manifest.max_length)
        found = directory.checkpoint(score.checkpoint)
        known = (directory.read(RUN_FILE) or {})["dataset"]
        own = labels if labels.manifest.hash == known["manifest_hash"] else None
        labels = labels_of(directory, labels, found)
        placed = {key: getattr(score, key) for key in Placed.model_fields}
        workers = score.num_workers or config.max_workers
        config = scoring_config(config, score, workers, **placed)
        voters = _voters(directory, own, config.evaluation, score)
        counted, lists = labels, score.allow or score.deny
        # Of labels that were added, and that the dataset has itself, the run's alone has names.
        nameless = (
            not isinstance(labels, Extended) and known["num_labels"] != labels.manifest.num_labels
        )
        if own is None and (config.evaluation.tail or (lists and nameless)):
            counted = labels_of(directory, directory.dataset(), found)
        hidden = hidden_labels(counted, found, score.allow, score.deny)
        if score.index:
            score = score.model_copy(update={"index": absolute(score.index)})
        index = check_search(score, directory.path, found.hash, config.evaluation.tail)
        if index and lists and hidden is not None:
            share = (hidden.sum() - len(found.state.retired)) / len(hidden)
            if share > MOST_HIDDEN:
                raise ReneeError(
                    f"search=index finds too few labels where allow= and deny= hide {share:.0%} of "
                    f"them; leave search=index out"
                )
        large = bool(score.memory_gib_per_worker) or found.manifest.size > LARGE
        return cls(
            directory, config, score, found.name, found.state.step, labels, counted, voters, hidden,
            index, large,
        )  # fmt: skip

    def layout(self, points: Dataset, split: str, k: int) -> Layout:
        """Returns how the workers divide the k best labels of a split's rows."""
        rows = points.manifest.num_points(split)
        return Layout(rows, self.config.max_workers, self.score.batch_size, k)

    def run(
        self, worker: Callable[[dict[str, Any]], Any], points: Dataset, split: str,
        on_progress: Progress, source: str = "", **more: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Runs `worker` with "job", "points", "split", "channel" and `more` on every worker.

        Returns:
            "step", "points", and what rank 0 returned.
        """
        rows = points.manifest.num_points(split)
        if not rows:
            raise ReneeError(f"{points.path} has no points in split={split}; choose another")
        workers = self.config.max_workers
        ensure_ray(1, local_cpus=workers + 1)
        use_gpu = decide_gpu(self.config.use_gpu, workers)
        voters = self.voters.manifest.num_points("train") if self.voters else 0
        on_progress(
            f"scoring {rows:,} points of {source or points.path} by {workers} "
            f"{'GPU' if use_gpu else 'CPU'} worker{'s' * (workers > 1)}, with the checkpoint of "
            f"step {self.step}{f'; first, {voters:,} that vote are embedded' if voters else ''}"
        )
        arguments = {"job": self, "points": points, "split": split, **more}
        # Only a large model has anything to say, and a channel is one more process.
        with Display() if self.large else nullcontext() as display:
            arguments["channel"] = display and display.channel
            found = launch(worker, arguments, self.config, use_gpu)
        return {"step": self.step, "points": rows, **found}


def as_scored(config: RunConfig, score: Searched) -> RunConfig:
    """Returns a run's configuration with the settings of evaluation that `score` overrides."""
    keys = ("tail", "neighbours", "neighbour_weight")
    given = {key: value for key in keys if (value := getattr(score, key)) is not None}
    evaluation = config.evaluation.model_copy(update=given)
    return config.model_copy(update={"evaluation": evaluation})


def scoring_config(config: RunConfig, score: Searched, workers: int, **changes: Any) -> RunConfig:
    """Returns the configuration of a run, changed to score with so many workers.

    The encoder is not compiled: graphs of other shapes would each take a minute.
    """
    encoder = config.encoder.model_copy(update=TRAINED)
    return as_scored(config, score).model_copy(
        update={"num_workers": workers, "encoder": encoder, **changes}
        | {"batch_size": workers * config.feed.streams}  # of training: it bounds num_workers
    )


def _voters(
    directory: RunDirectory, own: Dataset | None, settings: EvalConfig, score: ScoreConfig
) -> Dataset | None:
    """Opens the dataset whose training points vote: the run's `own`, where that is not open yet."""
    if not settings.neighbours:
        return None
    if score.split == "train":
        raise ReneeError(
            f"split=train with neighbours={settings.neighbours} would let points vote on "
            f"themselves; add neighbours=0"
        )
    if own is None:
        own = directory.dataset()
        check_labels(directory, own)
    return own


def refuse_run(path: str, wanted: str) -> None:
    """Raises ReneeError where a run is at `path`, and no `wanted`."""
    if not has_manifest(path) and RunDirectory(absolute(path)).read(RUN_FILE) is not None:
        raise ReneeError(f"{path} is a run; give a {wanted} after the run")
