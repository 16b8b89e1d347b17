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
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from renee_ray.config.score import IndexConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.destination import Destination, Kind
from renee_ray.data.storage import absolute, read_file, replace_file
from renee_ray.data.untrusted import parse_json
from renee_ray.errors import ReneeError
from renee_ray.rank.batch import ragged
from renee_ray.report.index import write_sweep
from renee_ray.scoring.index import (
    FILES,
    FORMAT_VERSION,
    MANIFEST,
    Classifier,
    index_of,
    load_faiss,
    read_parts,
)
from renee_ray.scoring.index_building import (
    Survey,
    build,
    default_candidates,
    default_factory,
    empty_index,
    training_rows,
    width_of,
)
from renee_ray.scoring.index_quality import Truth, swept
from renee_ray.service.cluster.connect import ensure_ray
from renee_ray.service.cluster.tasks import Reporter, stream
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.run.labels import labels_of, opened
from renee_ray.service.score.loading import Model, exported_labels, files_of, load
from renee_ray.service.score.trained import CPU, trained_classifier
from renee_ray.xfc.labels import LabelRange, split_range

INDEX = Kind(
    "an index", MANIFEST, "_claim.json", frozenset({"format_version", "model", "ranges"}),
    FILES, (),
)  # fmt: skip
MOST_LABELS = 20_000_000
"""Labels of a range, unless fewer ranges are asked for."""
BLOCK_BYTES = 1 << 26
PIECES = 8
"""Places of a split that points are taken from."""


@dataclass(frozen=True)
class Plan:
    """What each task is given.

    checkpoint: its name; empty: `model` is an export. centre: mean embedding, float32 [D].
    """

    model: str
    checkpoint: str
    num_labels: int
    dim: int
    tail: float
    output: str
    factory: str
    ranges: int
    threads: int
    centre: Tensor

    def name(self, i: int) -> str:
        """Returns the name of the files of range i, without their endings."""
        start, stop = split_range(self.num_labels, self.ranges, i)
        return f"labels-{start:012d}-{stop:012d}"

    def rows(self, start: int, stop: int) -> Callable[[], Iterator[Tensor]]:
        """Opens the model: what is returned reads blocks of centred [w_l, b_l], float32 [m, D + 1].

        The mean is that of the range's first block.
        """
        part: Callable[[LabelRange], Classifier]
        if self.checkpoint:
            _, saved, labels = opened(self.model, self.checkpoint)
            part = lambda owned: trained_classifier(saved, labels, owned, self.tail, None, CPU)  # noqa: E731
        else:
            with files_of(self.model) as local:
                exported = exported_labels(local, CPU)[1]
            part = lambda owned: exported  # noqa: E731
        size = max(1, BLOCK_BYTES // (4 * self.dim))

        def read() -> Iterator[Tensor]:
            mean = None
            for at in range(start, stop, size):
                owned = LabelRange(at, min(at + size, stop), self.num_labels)
                rows = part(owned).rows(owned.start, owned.stop)
                # A retired label stays in the index; who searches leaves it out.
                rows[:, -1].masked_fill_(rows[:, -1] == -torch.inf, 0)
                rows[:, -1] += rows[:, :-1] @ self.centre
                mean = rows.mean(0) if mean is None else mean
                yield rows - mean

        return read


def build_range(plan: Plan, i: int) -> dict[str, Any]:
    """Builds the index of range i, unless it is there and was built from the same rows."""
    began, cpu = time.perf_counter(), time.process_time()
    start, stop = split_range(plan.num_labels, plan.ranges, i)
    load_faiss().omp_set_num_threads(plan.threads)
    index, rows = empty_index(plan.factory, plan.dim), plan.rows(start, stop)
    survey = Survey.of(rows, stop - start, training_rows(index))
    path, facts = (f"{plan.output}/{plan.name(i)}.{ending}" for ending in ("faiss", "json"))
    built_from = {"factory": plan.factory, "rows": survey.sha256, "start": start, "stop": stop}
    known = parse_json(read_file(facts) or b"{}")
    there = hashlib.sha256(read_file(path) or b"").hexdigest()
    if (known.get("built_from"), known.get("sha256")) == (built_from, there):
        return {**known, "built": False}
    build(index, rows, survey)
    content = load_faiss().serialize_index(index).tobytes()
    replace_file(path, content)
    found = {
        "start": start, "stop": stop, "file": f"{plan.name(i)}.faiss", "bytes": len(content),
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
        ReneeError: FAISS is not installed, there is no model, a factory string that FAISS does not
            take, more ranges than labels, an output that is taken, or a checkpoint that was
            published meanwhile.
    """
    load_faiss()
    model, directory, checkpoint, workers = absolute(model), RunDirectory(absolute(model)), None, 1
    points = Dataset.open(config.points) if config.points else None
    if directory.read(RUN_FILE) is not None:
        checkpoint = directory.checkpoint(config.checkpoint)
        workers, points = directory.config().max_workers, points or directory.dataset()
        labels_of(directory, points, checkpoint)  # recall on other labels says nothing
    if points is None:
        raise ReneeError(f"{model} is no run and has no points to measure on; give points=DATASET")
    loaded = load(model, checkpoint=config.checkpoint)
    if checkpoint and checkpoint.hash != loaded.facts["model"]:
        raise ReneeError(f"{model} has published another checkpoint meanwhile; run this again")
    number, dim, tail = loaded.num_labels, loaded.dim, loaded.facts["tail"]
    ranges = config.ranges or min(number, workers * -(-number // MOST_LABELS))
    if ranges > number:
        raise ReneeError(f"ranges={ranges} exceeds the {number} labels; lower ranges")
    factory = config.factory or default_factory(-(-number // ranges), width_of(dim))
    empty_index(factory, dim)
    output = Destination(absolute(config.output or index_of(model)), INDEX, config.overwrite)
    output.check()
    ensure_ray()
    threads = max(1, (os.cpu_count() or 1) // ranges)
    name = checkpoint.name if checkpoint else ""
    embeddings, truth = sample(loaded, points, config.sample)
    centre = embeddings.mean(0).half().float().cpu()  # the same again in a call that goes on
    plan = Plan(model, name, number, dim, tail, output.path, factory, ranges, threads, centre)
    output.claim()
    files = [f"{plan.name(i)}.{ending}" for i in range(ranges) for ending in ("faiss", "json")]
    output.declare([*files, "recall.html"], keep=True)
    reporter, built = Reporter("ranges", ranges, on_progress), []
    for each in stream(build_range, plan, ranges):
        built.append(each)
        reporter.one_more()
    on_progress("measuring recall and speed")
    built.sort(key=lambda each: each["start"])
    exact = loaded.classifier
    parts = read_parts(output.path, built, exact)
    candidates = config.candidates or default_candidates(factory)
    facts: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "model": loaded.facts["model"], "tail": tail,
        "num_labels": number, "dim": dim, "factory": factory,
        **swept(exact, parts, embeddings, truth, candidates, config.recall),
        "ranges": built,
    }  # fmt: skip
    write_sweep(f"{output.path}/recall.html", facts)
    output.publish(facts)
    return facts


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
