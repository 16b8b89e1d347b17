"""`renee-ray index`: an approximate index of a model's labels, for search in milliseconds.

    index.json                  factory string, ranges with SHA-256, the sweep; written last
    labels-START-STOP.faiss     the index of a range of labels (scoring/index.py)
    labels-START-STOP.json      what that was built from, so that it is not built again
    recall.png                  the sweep of search effort as a plot

A Ray task builds each range. The driver then measures.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch import Tensor

from renee_ray.config.index import IndexConfig
from renee_ray.data.dataset import Dataset
from renee_ray.data.destination import Destination, Kind, listed_files
from renee_ray.data.storage import (
    absolute,
    filesystem_of,
    patiently,
    read_file,
    replace_file,
    write_file,
)
from renee_ray.data.untrusted import parse_json
from renee_ray.errors import ReneeError, reason
from renee_ray.parallel.batch import ragged
from renee_ray.report.index import draw_sweep
from renee_ray.scoring.index import (
    FILES,
    FORMAT_VERSION,
    MANIFEST,
    ExactSearch,
    checksum,
    index_of,
    load_faiss,
    read_parts,
)
from renee_ray.scoring.index_building import (
    Survey,
    build,
    default_factory,
    empty_index,
    training_rows,
    width_of,
    write_index,
)
from renee_ray.scoring.index_quality import Truth, swept
from renee_ray.scoring.scorer import prior_offset, read_counts
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.run.directory import RUN_FILE, RunDirectory
from renee_ray.service.score.export import MANIFEST as EXPORT
from renee_ray.service.score.labels import check_labels
from renee_ray.service.score.loading import Model, load
from renee_ray.service.tasks import Reporter, stream
from renee_ray.xfc.labels import LabelRange, split_range
from renee_ray.xfc.shard import Shard
from renee_ray.xfc.weights.storages import Weights

INDEX = Kind(
    "an index", MANIFEST, "_claim.json", frozenset({"format_version", "model", "ranges"}),
    FILES, (), listed_files,
)  # fmt: skip
MOST_LABELS = 20_000_000
"""Labels of a range, unless more are asked for."""
BLOCK_BYTES = 1 << 26
PIECES = 8
"""Places of a split that points are taken from."""
CPU = torch.device("cpu")


@dataclass(frozen=True)
class RunRows:
    """The classifier of a run's checkpoint."""

    path: str
    checkpoint: str
    model: str
    tail: float
    num_labels: int
    dim: int
    workers: int

    @classmethod
    def of(cls, path: str, which: str) -> RunRows:
        directory = RunDirectory(path)
        config, dataset = directory.config(), directory.dataset()
        check_labels(directory, dataset)
        found = directory.checkpoint(which)
        number, tail = dataset.manifest.num_labels, config.evaluation.tail
        dim = found.state.facts["dim"]
        return cls(path, found.name, found.hash, tail, number, dim, config.max_workers)

    def read(self, start: int, stop: int) -> tuple[Tensor, np.ndarray]:
        """Returns weights float32 [n, D] and training counts int64 [n] of some labels."""
        directory, owned = RunDirectory(self.path), LabelRange(start, stop, self.num_labels)
        checkpoint = directory.checkpoints().at(self.checkpoint)
        weights = Weights(checkpoint.state.facts["precision"], len(owned), self.dim, False, CPU)
        checkpoint.load_shard(Shard(owned, weights), momentum=False)
        return weights.read(0, len(owned)), read_counts(directory.dataset(), owned)


@dataclass(frozen=True)
class ExportRows:
    """The classifier of an export."""

    path: str
    files: tuple[tuple[int, int, str, str], ...]
    model: str
    tail: float
    num_labels: int
    dim: int
    workers: int = 1

    @classmethod
    def of(cls, path: str) -> ExportRows:
        facts = parse_json(read_file(f"{path}/{EXPORT}") or b"{}")
        keys = ("start", "stop", "classifier", "labels")
        try:
            files = tuple(tuple(each[key] for key in keys) for each in facts["ranges"])
            return cls(path, files, *(facts[k] for k in ("model", "tail", "num_labels", "dim")))
        except (LookupError, TypeError) as error:
            raise ReneeError(
                f"{path} is neither a run nor an export that names its model "
                f"({reason(error):.80}); export the run again"
            ) from None

    def read(self, start: int, stop: int) -> tuple[Tensor, np.ndarray]:
        """Returns weights float32 [n, D] and training counts int64 [n] of some labels."""
        weights, counts = [], []
        for first, last, name, labels in self.files:
            low, high = max(start, first) - first, min(stop, last) - first
            if low < high:
                where = f"{self.path}/{name}"
                weights.append(patiently(partial(self._rows, where, low, high), f"reading {where}"))
                column = self._counts(f"{self.path}/{labels}") if self.tail else np.ones(last)
                counts.append(column[low:high])
        return torch.cat(weights), np.concatenate(counts)

    def _rows(self, path: str, low: int, high: int) -> Tensor:
        filesystem, name = filesystem_of(path)
        with filesystem.open_input_file(name) as file:
            size = int.from_bytes(file.read_at(8, 0), "little")
            begin = 8 + size + json.loads(file.read_at(size, 8))["weight"]["data_offsets"][0]
            row = 4 * self.dim
            raw = bytearray(file.read_at(row * (high - low), begin + row * low))
        return torch.frombuffer(raw, dtype=torch.float32).view(high - low, self.dim)

    def _counts(self, path: str) -> np.ndarray:
        filesystem, name = filesystem_of(path)
        table = pq.read_table(name, filesystem=filesystem, columns=["train_count"])
        return table["train_count"].to_numpy()


Source = RunRows | ExportRows


def blocks(source: Source, start: int, stop: int) -> Iterator[Tensor]:
    """Yields the rows [w_l, b_l] of labels [start, stop), float32 [m, D + 1]."""
    size = max(1, BLOCK_BYTES // (4 * source.dim))
    for first in range(start, stop, size):
        weights, counts = source.read(first, min(first + size, stop))
        offset = prior_offset(counts, source.tail, CPU)
        last = torch.zeros(len(weights)) if offset is None else offset
        yield torch.cat([weights, last[:, None]], dim=1)


@dataclass(frozen=True)
class Plan:
    """What each task is given."""

    source: Source
    output: str
    factory: str
    ranges: int
    threads: int


def names_of(num_labels: int, ranges: int) -> list[str]:
    """Returns the names of the ranges' files, without their endings."""
    bounds = (split_range(num_labels, ranges, i) for i in range(ranges))
    return [f"labels-{start:012d}-{stop:012d}" for start, stop in bounds]


def build_range(plan: Plan, i: int) -> dict[str, Any]:
    """Builds the index of range i, unless it is there and was built from the same rows."""
    source, began = plan.source, time.perf_counter()
    start, stop = split_range(source.num_labels, plan.ranges, i)
    name = names_of(source.num_labels, plan.ranges)[i]
    load_faiss().omp_set_num_threads(plan.threads)
    index = empty_index(plan.factory, source.dim)
    rows = partial(blocks, source, start, stop)
    survey = Survey.of(rows, stop - start, training_rows(index))
    built_from = {"factory": plan.factory, "rows": survey.sha256, "start": start, "stop": stop}
    known = parse_json(read_file(f"{plan.output}/{name}.json") or b"{}")
    path = f"{plan.output}/{name}.faiss"
    if known.get("built_from") == built_from and known.get("sha256") == checksum(path):
        return {**known, "built": False}
    cpu = time.process_time()
    build(index, rows, survey)
    write_index(path, index)
    filesystem, local = filesystem_of(path)
    found = {
        "start": start, "stop": stop, "file": f"{name}.faiss", "sha256": checksum(path),
        "bytes": filesystem.get_file_info(local).size, "greatest": survey.greatest,
        "seconds": round(time.perf_counter() - began, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2), "built_from": built_from,
    }  # fmt: skip
    replace_file(f"{plan.output}/{name}.json", json.dumps(found).encode())
    return {**found, "built": True}


def index_model(model: str, config: IndexConfig, on_progress: Any) -> dict[str, Any]:
    """Builds an index of a run or an export, measures it and returns `index.json`.

    Raises:
        ReneeError: FAISS is not installed, there is no model, a factory string that FAISS does not
            take, more ranges than labels, or an output that is taken.
    """
    load_faiss()
    model = absolute(model)
    is_run = RunDirectory(model).read(RUN_FILE) is not None
    source = RunRows.of(model, config.checkpoint) if is_run else ExportRows.of(model)
    ranges = config.ranges or source.workers * -(-source.num_labels // MOST_LABELS)
    if ranges > source.num_labels:
        raise ReneeError(f"ranges={ranges} exceeds the {source.num_labels} labels; lower it")
    size = -(-source.num_labels // ranges)
    factory = config.factory or default_factory(size, width_of(source.dim))
    empty_index(factory, source.dim)
    points = RunDirectory(model).dataset() if is_run else None
    if config.points:
        points = Dataset.open(config.points)
    output = Destination(absolute(config.output or index_of(model)), INDEX, config.overwrite)
    output.check()
    ensure_ray()
    cores = int(ray.cluster_resources()["CPU"])
    threads = max(1, min(cores, os.cpu_count() or 1) // ranges)
    plan = Plan(source, output.path, factory, ranges, threads)
    names = names_of(source.num_labels, ranges)
    output.claim()
    endings = (".faiss", ".json")
    output.declare([n + e for n in names for e in endings] + ["recall.png"], keep=True)
    reporter, built = Reporter("ranges", ranges, on_progress), []
    for each in stream(build_range, plan, ranges):
        built.append(each)
        reporter.one_more()
    facts: dict[str, Any] = {
        "format_version": FORMAT_VERSION, "model": source.model, "tail": source.tail,
        "num_labels": source.num_labels, "dim": source.dim, "factory": factory,
        "candidates": config.candidates, "ranges": sorted(built, key=lambda each: each["start"]),
    }  # fmt: skip
    on_progress("measuring recall and speed")
    loaded = load(model, checkpoint=config.checkpoint)
    parts = read_parts(output.path, facts["ranges"], loaded.classifier)
    facts |= swept(
        ExactSearch(loaded.classifier),
        parts,
        *sample(loaded, points, config.sample),
        config.candidates,
        config.recall,
    )
    write_file(f"{output.path}/recall.png", draw_sweep(facts))
    output.publish(facts)
    return facts


def sample(model: Model, points: Dataset | None, number: int) -> tuple[Tensor, Truth | None]:
    """Embeds some points of a dataset, or label texts where there is none; float32 [n, D].

    Points are those of the validation split, or of the training split where that is empty, in
    even pieces. With them come their labels.
    """
    if points is None:
        return torch.from_numpy(model.embed(model.some_texts(number))), None
    split = "validation" if points.manifest.num_points("validation") else "train"
    rows, columns = points.manifest.num_points(split), ["input_ids", "labels", "filter_labels"]
    pieces = min(PIECES, rows, number)
    each = min(number, rows) // pieces
    starts = (i * rows // pieces for i in range(pieces))
    tables = [points.read_rows(split, at, at + each, columns) for at in starts]
    table = pa.concat_tables(tables)
    lists = (table[name].to_pylist() for name in ("labels", "filter_labels"))
    truth = [(set(true), set(filtered)) for true, filtered in zip(*lists, strict=True)]
    return model.embed_tokens(ragged(table["input_ids"])), truth
