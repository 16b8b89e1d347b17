"""`renee-ray predict`: the k best labels of every point, as Parquet."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from dataclasses import replace
from typing import Any

import torch

from renee_ray import __version__
from renee_ray.config.score import ScoreConfig
from renee_ray.data.dataset import Dataset, has_manifest, hash_of_labels
from renee_ray.data.destination import Destination, refuse_overlap
from renee_ray.data.storage import absolute, filesystem_of, make_directory
from renee_ray.errors import Progress, ReneeError, silent
from renee_ray.rank.collectives import all_sum
from renee_ray.scoring.calibration import Calibration
from renee_ray.scoring.passes import Blocks
from renee_ray.service.cluster.connect import ensure_ray
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.score.calibrate import calibration_of
from renee_ray.service.score.job import ScoringJob, refuse, refuse_run
from renee_ray.service.score.predictions import (
    PREDICTIONS,
    Layout,
    check_parts,
    missing_parts,
    rows_of,
    write_rows,
)
from renee_ray.service.score.texts import TEXT_SPLIT, check_texts, tokenise_texts
from renee_ray.service.score.worker import Worker
from renee_ray.xfc.labels import NONE

log = logging.getLogger(__name__)


def predict_run(
    run: str, src: str, destination: str, score: ScoreConfig, on_progress: Progress = silent
) -> dict[str, Any]:
    """Writes the k best labels of every point of a split to `destination`/part-*.parquet.

    The columns are point_id int64, label_ids list<int64> (best first) and scores list<float>;
    with `texts` also label_texts list<string>, with `explain` list<float> columns of the parts of a
    score. Rows, and names of the files, are in the order of the input. Filter labels are removed
    before the cut; a row is shorter where fewer remain. `_predictions.json` is written last.

    Args:
        src: a dataset directory, or raw texts as service/score/texts.py reads them. The labels of
            raw texts are those of the dataset that the run was trained on.

    Raises:
        ReneeError: as `evaluate_run`; `src` is neither; or there is something else, or there are
            predictions already, at `destination`; or a part is missing there at the end.
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
    refuse(score, ("calibrate",), "predict")
    labels = directory.dataset() if raw else Dataset.open(src)
    job = ScoringJob.checked(directory, labels, score)
    job = replace(job, score=_bounded(job.score, job.labels.manifest.num_labels))
    calibration = _calibration(job, run)
    points, split = labels, str(score.split)
    facts = {"split": split, **_facts(job)}
    signature = _signature(job, src if raw else None, calibration)
    if output.claim(signature):
        log.warning("going on with the predictions in %s that were cut off", destination)
    scratch = output.scratch()
    try:
        if raw:
            ensure_ray(1, local_cpus=job.config.max_workers + 1)
            points, replaced = tokenise_texts(src, scratch, labels)
            split = TEXT_SPLIT
            facts = {"source": src, "replaced_lines": replaced, **_facts(job)}
        layout = job.layout(points, split, job.score.k)
        files = layout.parts()
        found = job.run(
            predict_worker, points, split, on_progress, src,
            layout=layout, output=output, files=files, scratch=f"{scratch}/passes",
            calibration=calibration,
        )  # fmt: skip
    except ReneeError:
        _clean_up(output)
        raise
    check_parts(destination, files)
    found = {**facts, **found}
    output.publish(found)
    return found


def _facts(job: ScoringJob) -> dict[str, Any]:
    """Returns what the manifest says of the scores and of the labels that they are for."""
    return {
        "scores": job.score.scores,
        "objective": job.config.classifier.objective,
        "num_labels": job.labels.manifest.num_labels,
        "labels_hash": hash_of_labels(job.labels),
    }


def _clean_up(output: Destination) -> None:
    """Removes what a command has left that failed before it wrote any part."""
    with contextlib.suppress(OSError):  # the error that is told is the first, and all stays
        if not output.is_writing():
            output.abandon()
            return
    log.warning("what is done stays in %s; the same command goes on from there", output.path)


def _check_input(src: str, destination: str, score: ScoreConfig) -> bool:
    """Returns whether `src` is raw texts, and not a dataset.

    Raises:
        ReneeError: it is neither, or the destination is in it, or it in the destination.
    """
    refuse_run(src, "dataset, or texts,")
    raw = not has_manifest(src)
    if raw:
        check_texts(src)
        if "split" in score.model_fields_set:
            raise ReneeError(f"split={score.split} has no meaning for the texts of {src}; omit it")
    refuse_overlap(src, destination)
    return raw


def _signature(job: ScoringJob, texts: str | None, calibration: Calibration | None) -> str:
    """Hashes what predictions depend on; a command of the same goes on with what was cut off."""
    files = []
    if texts is not None:
        for path in check_texts(texts) or [texts]:
            filesystem, root = filesystem_of(path)
            info = filesystem.get_file_info(root)
            files.append((path, info.size, info.mtime_ns))
    settings = job.score.model_dump(exclude={"overwrite", "memory_gib_per_worker"})
    hidden = b"" if job.hidden is None else job.hidden.tobytes()
    content = [
        __version__, job.directory.path, job.checkpoint, job.labels.manifest.hash, files, settings,
        job.config.model_dump(), calibration and calibration.to_json(), job.index,
        hashlib.sha256(hidden).hexdigest(),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _calibration(job: ScoringJob, run: str) -> Calibration | None:
    """Returns what makes scores probabilities, if scores=calibrated.

    Raises:
        ReneeError: the run is not calibrated so, or the sigmoid of a score is to be a probability
            and is none.
    """
    settings, objective = job.config.evaluation, job.config.classifier.objective
    told = f"tail={settings.tail} and neighbours={settings.neighbours}"
    if job.score.scores == "calibrated":
        found = calibration_of(job.directory, job.checkpoint, settings)
        if found is None:
            raise ReneeError(
                f"{run} has no calibration of {job.checkpoint} with {told}; make one by `renee-ray "
                f"evaluate {run} DATASET split=validation calibrate=true` and these settings"
            )
        return found
    plain = objective == "bce" and not settings.tail and not settings.neighbours
    if job.score.scores == "probabilities" and not plain:
        raise ReneeError(
            f"the scores of {run} with classifier.objective={objective}, {told} give no "
            f"probabilities; take a run trained by bce, with tail=0 neighbours=0, or "
            f"scores=calibrated"
        )
    return None


def _bounded(score: ScoreConfig, num_labels: int) -> ScoreConfig:
    """Cuts k to the number of labels, with a warning where k was given."""
    if score.k <= num_labels:
        return score
    if "k" in score.model_fields_set:
        log.warning("k=%d is cut to the %d labels that there are", score.k, num_labels)
    return score.model_copy(update={"k": num_labels})


def predict_worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """Writes the predictions of this worker's rows, from the first part on that is not there."""
    job: ScoringJob = arguments["job"]
    layout: Layout = arguments["layout"]
    output: Destination = arguments["output"]
    calibration: Calibration | None = arguments["calibration"]
    worker, score = Worker.of(job), job.score
    passes = worker.passes(layout)
    if worker.ranks.rank == 0:  # only now, when nothing refuses, may earlier predictions go
        output.declare(arguments["files"])
    scratch = arguments["scratch"]
    make_directory(scratch)
    all_sum(worker.ranks, torch.zeros(1))  # nobody writes before they are declared
    own = layout.parts_of(worker.ranks.rank)
    if missing := missing_parts(output.path, own):
        blocks = Blocks(layout.blocks, layout.part_batches, worker.ranks, scratch)
        blocks.again_from(own.index(missing[0]))
    for block in worker.answers(arguments, layout, passes, scratch):
        tables = []
        for batch, scores, best, parts in block:
            told = [*parts, scores - sum(parts)] if parts else []
            shown = scores.sigmoid() if score.scores == "probabilities" else scores
            if calibration is not None:
                shown = torch.from_numpy(calibration(scores.numpy()))
            if score.threshold is not None:
                best = torch.where(shown >= score.threshold, best, NONE)
            columns = [part.numpy() for part in told]
            tables.append(rows_of(batch, best.numpy(), shown.numpy(), columns))
        output.hold()
        write_rows(output.path, tables, job.labels if score.texts else None)
    return {"k": layout.k, "passes": passes}
