"""`renee-ray index`: an approximate index of a model's labels, for search in milliseconds.

    index.json                  factory string, ranges with SHA-256, the sweep; written last
    labels-START-STOP.faiss     the index of a range of labels (scoring/index.py)
    labels-START-STOP.json      what that was built from, so that it is not built again
    recall.html                 the sweep of search effort as a page

A Ray task builds each range in bounded memory. The driver loads the model and measures; it maps an
export into memory, and holds the weights of a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from renee_ray.config.score import IndexConfig
from renee_ray.data.dataset import Dataset, hash_of_labels
from renee_ray.data.destination import Destination, Kind
from renee_ray.data.models import quiet
from renee_ray.data.storage import absolute, listing, read_file, replace_file
from renee_ray.data.untrusted import object_or_empty
from renee_ray.errors import ReneeError
from renee_ray.rank.batch import ragged
from renee_ray.report.index import write_sweep
from renee_ray.scoring.index import (
    FILES,
    FORMAT_VERSION,
    MANIFEST,
    index_of,
    load_faiss,
    read_parts,
)
from renee_ray.scoring.index_building import (
    FLAT_BELOW,
    Survey,
    build,
    check_size,
    default_candidates,
    default_factory,
    empty_index,
    training_rows,
    width_of,
)
from renee_ray.scoring.index_quality import Truth, swept
from renee_ray.service.cluster.connect import ensure_ray
from renee_ray.service.cluster.tasks import Reporter, stream
from renee_ray.service.run.labels import labels_of
from renee_ray.service.score.loading import Model
from renee_ray.service.score.saved import Saved, SavedRun, open_saved
from renee_ray.service.score.trained import CPU
from renee_ray.xfc.labels import LabelRange, split_range

INDEX = Kind(
    "an index", MANIFEST, "_claim.json", frozenset({"format_version", "model", "ranges"}),
    FILES, (),
)  # fmt: skip
NAMES = re.compile(r"labels-(\d{12})-(\d{12})\.json")
MOST_LABELS = 20_000_000
"""Labels of a range, unless fewer ranges are asked for."""
BLOCK_BYTES = 1 << 26
PIECES = 8
"""Places of a split that points are taken from."""


@dataclass(frozen=True)
class Piece:
    """A range of labels, and FAISS's factory string for it."""

    start: int
    stop: int
    factory: str

    @property
    def bounds(self) -> tuple[int, int]:
        return self.start, self.stop

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def name(self) -> str:
        """The name of its files, without their endings."""
        return f"labels-{self.start:012d}-{self.stop:012d}"


@dataclass(frozen=True)
class Plan:
    """What each task is given.

    model, checkpoint, sha256: as `open_saved` takes them; centre: mean embedding, float32 [D].
    """

    model: str
    checkpoint: str
    sha256: str
    num_labels: int
    dim: int
    tail: float
    output: str
    pieces: tuple[Piece, ...]
    threads: int
    centre: Tensor

    def rows(self, start: int, stop: int) -> Callable[[], Iterator[Tensor]]:
        """Opens the model: what is returned reads blocks of centred [w_l, b_l], float32 [m, D + 1].

        The mean is that of the range's first block.
        """
        saved = open_saved(self.model, self.checkpoint, self.sha256)
        size = max(1, BLOCK_BYTES // (4 * self.dim))

        def read() -> Iterator[Tensor]:
            mean = None
            for at in range(start, stop, size):
                owned = LabelRange(at, min(at + size, stop), self.num_labels)
                rows = saved.classifier(owned, self.tail, CPU).rows(at, owned.stop)
                # A retired label stays in the index; who searches leaves it out.
                rows[:, -1].masked_fill_(rows[:, -1] == -torch.inf, 0)
                rows[:, -1] += rows[:, :-1] @ self.centre
                mean = rows.mean(0) if mean is None else mean
                yield rows - mean

        return read


def build_range(plan: Plan, i: int) -> dict[str, Any]:
    """Builds the index of range i, unless it is there and was built from the same rows."""
    began, cpu = time.perf_counter(), time.process_time()
    piece = plan.pieces[i]
    start, stop = piece.start, piece.stop
    load_faiss().omp_set_num_threads(plan.threads)
    index, rows = empty_index(piece.factory, plan.dim), plan.rows(start, stop)
    survey = Survey.of(rows, stop - start, training_rows(index))
    path, facts = (f"{plan.output}/{piece.name}.{ending}" for ending in ("faiss", "json"))
    built_from = {"factory": piece.factory, "rows": survey.sha256, "start": start, "stop": stop}
    known = object_or_empty(read_file(facts) or b"")
    there = hashlib.sha256(read_file(path) or b"").hexdigest()
    if (known.get("built_from"), known.get("sha256")) == (built_from, there):
        return {**known, "built": False}
    build(index, rows, survey)
    content = load_faiss().serialize_index(index).tobytes()
    replace_file(path, content)
    found = {
        "start": start, "stop": stop, "file": f"{piece.name}.faiss", "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(), "greatest": survey.greatest,
        "centre": plan.centre.tolist(),
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2), "built_from": built_from,
    }  # fmt: skip
    replace_file(facts, json.dumps(found).encode())
    return {**found, "built": True}


def index_model(
    model: str, config: IndexConfig, on_progress: Callable[[str], None]
) -> dict[str, Any]:
    """Builds an index of a run or an export, measures it and returns `index.json`.

    Raises:
        ReneeError: FAISS is not installed, there is no model, points of other labels, a factory
            string that FAISS does not take, more ranges than labels, or an output that is taken.
    """
    load_faiss()
    quiet()
    model = absolute(model)
    saved = open_saved(model, config.checkpoint)
    points, workers = _points(saved, config.points), saved.config.max_workers
    loaded = Model(saved, CPU)
    number, dim, tail = loaded.num_labels, loaded.dim, loaded.facts["tail"]
    output = Destination(absolute(config.output or index_of(model)), INDEX, config.overwrite)
    output.check()
    pieces = _pieces(output.path, number, dim, config, workers)
    for piece in pieces:
        check_size(empty_index(piece.factory, dim), piece.factory, piece.size)
    ensure_ray()
    threads = max(1, (os.cpu_count() or 1) // len(pieces))
    embeddings, truth = sample(loaded, points, config.sample)
    centre = embeddings.mean(0).half().float().cpu()  # the same again in a call that goes on
    plan = Plan(
        model, saved.name, saved.facts["model"], number, dim, tail, output.path, tuple(pieces),
        threads, centre,
    )  # fmt: skip
    output.claim()
    files = [f"{piece.name}.{ending}" for piece in pieces for ending in ("faiss", "json")]
    output.declare([*files, "recall.html"], keep=True)
    reporter, built = Reporter("ranges", len(pieces), on_progress), []
    for each in stream(build_range, plan, len(pieces)):
        built.append(each)
        reporter.one_more()
    on_progress("measuring recall and speed")
    built.sort(key=lambda each: each["start"])
    exact = loaded.classifier
    parts = read_parts(output.path, built, exact)
    candidates = config.candidates or max(default_candidates(each.factory) for each in pieces)
    largest = max(pieces, key=lambda piece: piece.size)
    facts: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "model": loaded.facts["model"], "tail": tail,
        "num_labels": number, "dim": dim, "factory": largest.factory,
        **swept(exact, parts, embeddings, truth, candidates, config.recall),
        "ranges": built,
    }  # fmt: skip
    write_sweep(f"{output.path}/recall.html", facts)
    output.publish(facts)
    return facts


def _pieces(path: str, number: int, dim: int, config: IndexConfig, workers: int) -> list[Piece]:
    """Cuts the labels into ranges.

    Those of an index that is there stay as they are, unless `ranges` is given, and labels that were
    added since make one more range, with the last one if that is small. An index of fewer than half
    of the labels is not added to.
    """
    ranges, width = config.ranges or min(number, workers * -(-number // MOST_LABELS)), width_of(dim)
    if ranges > number:
        raise ReneeError(f"ranges={ranges} exceeds the {number} labels; lower ranges")
    factory = default_factory(-(-number // ranges), width)
    cuts = (split_range(number, ranges, i) for i in range(ranges))
    pieces, there = [Piece(*cut, factory) for cut in cuts], _there(path, number)
    begun = {each.bounds for each in there} <= {each.bounds for each in pieces}  # and cut off
    if there and not (config.ranges or begun or 2 * there[-1].stop < number):
        pieces, last = there, there[-1]
        if last.stop < number:
            start = pieces.pop().start if last.size < FLAT_BELOW else last.stop
            factory = default_factory(number - start, width)
            if "Flat" not in (factory, last.factory):
                factory = last.factory
            pieces.append(Piece(start, number, factory))
    return [replace(each, factory=config.factory or each.factory) for each in pieces]


def _there(path: str, number: int) -> list[Piece]:
    """Returns the ranges that files in a directory belong to; none if they do not fit together."""
    found: list[Piece] = []
    for info in listing(path):
        if matched := NAMES.fullmatch(info.base_name):
            facts = object_or_empty(read_file(f"{path}/{info.base_name}") or b"")
            built_from = facts.get("built_from")
            factory = built_from.get("factory") if isinstance(built_from, dict) else None
            found.append(Piece(int(matched[1]), int(matched[2]), str(factory or "")))
    found.sort(key=lambda piece: piece.start)
    starts, stops = [each.start for each in found], [0, *(each.stop for each in found)]
    fit = starts == stops[:-1] and stops[-1] <= number and all(each.factory for each in found)
    return found if fit else []


def _points(saved: Saved, path: str) -> Dataset:
    """Opens the dataset to measure on; recall on other labels or tokens says nothing."""
    if isinstance(saved, SavedRun):
        points = Dataset.open(path) if path else saved.directory.dataset()
        labels_of(saved.directory, points, saved.checkpoint)
        return points
    if not path:
        raise ReneeError(
            f"{saved.path} is no run and has no points to measure on; give points=DATASET"
        )
    points = Dataset.open(path)
    manifest, number = points.manifest, saved.facts["num_labels"]
    own = {"vocabulary_hash": manifest.vocabulary_hash}
    if manifest.num_labels == number:  # else the export's last ones were added to its dataset's
        own["labels_hash"] = hash_of_labels(points) or ""
    if manifest.num_labels > number or any(
        value and (saved.facts.get(key) or value) != value for key, value in own.items()
    ):
        raise ReneeError(
            f"{path} has {manifest.num_labels} labels and the tokenizer {manifest.tokenizer!r}; "
            f"these or their texts are not those of {saved.path} with its {number} labels; give "
            f"points= its own dataset"
        )
    return points


def sample(model: Model, points: Dataset, number: int) -> tuple[Tensor, Truth]:
    """Embeds some validation points, or training points where there are none; float32 [n, D].

    They come in even pieces of the split, with their labels.
    """
    split = "validation" if points.manifest.num_points("validation") else "train"
    rows, columns = points.manifest.num_points(split), ["input_ids", "labels", "filter_labels"]
    pieces = min(PIECES, rows, number)
    each = min(number, rows) // pieces
    starts = (i * rows // pieces for i in range(pieces))
    table = pa.concat_tables(points.read_rows(split, at, at + each, columns) for at in starts)
    truth = ragged(table["labels"]), ragged(table["filter_labels"])
    return model.embed_tokens(ragged(table["input_ids"])), truth
