"""`renee-ray labels`: adds labels to a trained run, retires them, and lists them.

Each change publishes a revision of the run's best checkpoint (checkpoint/registry.py), under the
lease that a training of the run would need. From then on it is the run's newest and best.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from renee_ray.checkpoint.state import ADDED, Checkpoint, shard_name
from renee_ray.config.schema import RunConfig
from renee_ray.data import tokenizer
from renee_ray.data.dataset import MAX_LABELS, Dataset
from renee_ray.data.models import quiet
from renee_ray.data.sources.columns import kind_of, plain
from renee_ray.data.sources.own import label_columns, tables_of
from renee_ray.data.sources.records import decode_texts
from renee_ray.data.storage import absolute
from renee_ray.errors import ReneeError
from renee_ray.model.cold_start import ColdStart
from renee_ray.model.initialise import embed_texts
from renee_ray.rank.batch import ragged
from renee_ray.report.status import STATUS_FILE
from renee_ray.scoring.scorer import prior_offset
from renee_ray.service.run.directory import RunDirectory
from renee_ray.service.run.labels import ids_of, labels_of, named, opened, vocabulary_of
from renee_ray.service.run.lease import Lease
from renee_ray.service.score.trained import CPU, trained_encoder, trained_shard
from renee_ray.xfc.labels import LabelRange
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights

BLOCK = 4096
"""Labels whose texts and rows are read together."""
FITTED = 32768
"""Trained labels that the regression is fitted on, at most, in blocks spread over all."""
POINTS, LEAST_POINTS = 1000, 200
"""Validation points that new labels are compared on, at most; with fewer, training points."""


def list_labels(run: str) -> Iterator[dict[str, Any]]:
    """Yields the labels of a run in the order of their ids.

    Each has "id", "state" (active or retired), "points" (of the training set) and "text".

    Raises:
        ReneeError: no run, no checkpoint, or its dataset is gone.
    """
    _, checkpoint, labels = opened(run, "best")
    retired, total = checkpoint.state.retired, labels.manifest.num_labels
    for start in range(0, total, BLOCK):
        stop = min(start + BLOCK, total)
        table = labels.read_rows("labels", start, stop, ["train_count", "text"])
        states = np.where(np.isin(np.arange(start, stop), retired), "retired", "active").tolist()
        columns = range(start, stop), states, *(column.to_pylist() for column in table.columns)
        for row in zip(*columns, strict=True):
            yield dict(zip(("id", "state", "points", "text"), row, strict=True))


def retire_labels(
    run: str, labels: tuple[str, ...], file: str, say: Callable[[str], None], *, restore: bool
) -> dict[str, Any]:
    """Hides labels from every result of a run, or shows retired ones again.

    Args:
        labels: ids or names; file: more of them, one a line, or empty.

    Raises:
        ReneeError: no run, or none of its labels is named so.
    """
    with _changing(run, say) as (directory, lease):
        _, checkpoint, known = opened(directory.path, "best")
        ids = ids_of(known, labels, file)
        change = np.setdiff1d if restore else np.union1d
        retired = change(checkpoint.state.retired, ids).tolist()
        if retired != checkpoint.state.retired.tolist():  # else index and calibration stay valid
            lease.check()
            checkpoint = directory.checkpoints().revise(checkpoint, {"retired": retired}, {})
    return {"checkpoint": checkpoint.name, "labels": len(ids), "retired": len(retired)}


def add_labels(run: str, source: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Gives the labels of a file ids behind the run's last, and rows by their texts.

    Args:
        source: .txt, a label a line; or CSV, TSV, JSON lines or Parquet with columns `label`, the
            name, and `text`, or one of them.

    Returns:
        "checkpoint", "first" (id), "labels", and the figures of `ColdStart`.

    Raises:
        ReneeError: no run, its labels have no texts, or a line with no name or one that is known.
    """
    quiet()
    with _changing(run, say) as (directory, lease):
        config, checkpoint = directory.config(), directory.checkpoint("best")
        dataset = directory.dataset()
        labels = labels_of(directory, dataset, checkpoint)
        if not dataset.manifest.has_label_texts:
            raise ReneeError(
                f"the labels of {dataset.path} have no texts, which rows for new labels are made "
                f"from; convert it with the label texts, and train again"
            )
        added = _read(source, labels)
        rows, figures = _rows(config, checkpoint, dataset, [text for _, text in added], say)
        first, momentum = labels.manifest.num_labels, config.classifier.momentum > 0
        total = first + len(added)
        precision = checkpoint.state.facts["precision"]
        weights = Weights(precision, len(added), rows.shape[1], momentum, CPU)
        Shard(LabelRange(first, total, total), weights).write(first, rows)
        names = torch.frombuffer(bytearray(json.dumps(added).encode()), dtype=torch.uint8)
        new = {shard_name(first, total): {**weights.tensors(), ADDED: names}}
        lease.check()
        revised = directory.checkpoints().revise(checkpoint, {"num_labels": total}, new)
    return {"checkpoint": revised.name, "first": first, "labels": len(added), **figures}


@contextlib.contextmanager
def _changing(run: str, say: Callable[[str], None]) -> Iterator[tuple[RunDirectory, Lease]]:
    """Opens a run, and holds its lease.

    Raises:
        ReneeError: there is none, or it would go on from its best checkpoint and lose the rest.
    """
    directory = RunDirectory(absolute(run))
    directory.checkpoint("best")  # else there is no run, and a lease would make its directory
    with Lease(directory.path, say) as lease:
        best, last = directory.checkpoint("best"), directory.checkpoint("last")
        status = directory.read(STATUS_FILE)  # a run that `from-renee` made has none
        if status and status.get("state") != "finished" and last.state.step > best.state.step:
            raise ReneeError(
                f"{run} has come to step {last.state.step} and is not finished; labels change at "
                f"its best checkpoint, of step {best.state.step}, where it would go on; finish it "
                f"first"
            )
        yield directory, lease


def _read(source: str, labels: Dataset) -> list[tuple[str, str]]:
    """Reads (name, text) of new labels; of a table with one column these are the same."""
    added, first_row = dict[str, tuple[str, str]](), 0
    for rows in tables_of(absolute(source)):
        table = rows if source.endswith((".txt", ".txt.gz")) else label_columns(source, rows)
        columns = [
            decode_texts(_as_text(column, source))[0].to_pylist() for column in table.columns
        ]
        pairs = zip(columns[0], columns[-1], strict=True)
        for row, (name, text) in enumerate(pairs, first_row + 1):
            if not (name or "").strip():
                raise ReneeError(f"{source}:{row} has a label without a name; give it one")
            if name in added:
                raise ReneeError(
                    f"{source}:{row} has the label {name!r:.80} of {added[name][0]} again; omit it"
                )
            added[name] = f"{source}:{row}", text or ""
        first_row += len(table)
    if not added:
        raise ReneeError(f"{source} has no label; give a file with at least one")
    if labels.manifest.num_labels + len(added) > MAX_LABELS:
        raise ReneeError(f"{source} has {len(added)} labels, too many for {MAX_LABELS} in all")
    for name, ids in named(labels, added).items():
        where = added[name][0]
        raise ReneeError(
            f"{where} has the label {name!r:.80}, which is the run's label {ids[0]}; rename it"
        )
    return [(name, text) for name, (_, text) in added.items()]


def _as_text(column: pa.ChunkedArray, source: str) -> pa.ChunkedArray:
    kind = kind_of(column.type)
    if kind in ("integer", "nothing"):
        column = column.cast(pa.string())
    elif kind != "string":
        raise ReneeError(f"{source} has labels or texts of type {column.type}; make them strings")
    return plain(column.combine_chunks())


@torch.inference_mode()
def _rows(
    config: RunConfig,
    checkpoint: Checkpoint,
    dataset: Dataset,
    texts: list[str],
    say: Callable[[str], None],
) -> tuple[Tensor, dict[str, float]]:
    """Makes rows float32 [n, D] for labels with these texts, and tells how good they are."""
    encoder, manifest = trained_encoder(config.encoder, checkpoint, CPU).eval(), dataset.manifest
    length = min(config.encoder.max_length, manifest.max_length)

    def embedded(tokens: pa.Array | pa.ChunkedArray) -> Tensor:
        return embed_texts(encoder, ragged(tokens), length, manifest.pad_id)

    starts = np.arange(0, manifest.num_labels, BLOCK)
    starts = starts[np.linspace(0, len(starts) - 1, min(len(starts), FITTED // BLOCK)).astype(int)]
    say(f"embedding the texts of at most {BLOCK * len(starts):,} trained labels")
    blocks = [np.arange(first, min(first + BLOCK, manifest.num_labels)) for first in starts]
    known, rows, counts = list[Tensor](), list[Tensor](), list[np.ndarray]()
    for block in blocks:
        owned = LabelRange(int(block[0]), int(block[-1]) + 1, manifest.num_labels)
        table = dataset.read_rows("labels", owned.start, owned.stop, ["input_ids", "train_count"])
        known.append(embedded(table["input_ids"]) - encoder.constant)
        counts.append(table["train_count"].to_numpy())
        rows.append(trained_shard(checkpoint, owned, CPU).weights.read(0, len(owned)))
    weights, numbers = torch.cat(rows), np.concatenate(counts)
    fitted = ColdStart.fit(torch.cat(known), weights, torch.from_numpy(numbers))
    split = "validation" if manifest.num_points("validation") >= LEAST_POINTS else "train"
    count = min(POINTS, manifest.num_points(split))
    table = dataset.read_rows(split, 0, count, ["input_ids", "labels"])
    points, (at, true) = embedded(table["input_ids"]), ragged(table["labels"]).pairs()
    scores, offset = points @ weights.T, prior_offset(numbers, config.evaluation.tail, CPU)
    scores += 0 if offset is None else offset
    labels = np.concatenate(blocks)
    places = np.searchsorted(labels, true).clip(max=len(labels) - 1)
    scores[:, np.isin(labels, checkpoint.state.retired)] = -torch.inf
    there = labels[places] == true
    scores[at[there], places[there]] = -torch.inf
    best = scores.amax(dim=1)
    if (seen := best.isfinite()).any():  # else all that it could be compared with are retired
        fitted = fitted.raised(points[seen], best[seen])
    tokens = tokenizer.encode(vocabulary_of(dataset), texts, manifest.max_length)
    return fitted.rows(embedded(tokens) - encoder.constant), fitted.figures
