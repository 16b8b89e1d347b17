"""From raw text to a dataset directory, as Ray Data tasks.

    index    driver     one pass over each file: where its lines begin; gzip is unpacked
    scan     tasks      every label line once: bad input shows before anything is written, and
                        train_count, the one array over labels, is summed in the driver
    write    tasks      a task for some parts: their rows are read by their offsets wherever they
                        lie in the source, tokenised and written; nothing is shuffled between
    publish  driver     dataset.json, last

Texts and label lines never pass through the driver or the object store: tasks are given row
numbers and return counts.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from renee_ray.config import ConvertConfig, ReneeError, reason
from renee_ray.data import dataset as layout
from renee_ray.data import storage, tokenizer, xmlrepo
from renee_ray.data.dataset import Manifest, Part
from renee_ray.data.parquet_source import ParquetSource, index_parquet, is_parquet
from renee_ray.data.raw import Raw, index_source, pieces
from renee_ray.data.split import split_rows
from renee_ray.data.xmlrepo import Int64s, Pairs, SourceError
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.convert_parquet import Converted, clear_once, convert_parquet
from renee_ray.service.parquet_plan import JOURNAL
from renee_ray.service.tasks import Interrupted, Reporter, stream

SCRATCH, SIGNATURE = "_scratch", "signature"
TASK_ROWS = 1 << 14
"""Rows that a task writes, about: a task a part would cost Ray more than the part."""


def silent(message: str) -> None:
    """Progress nobody listens to."""


def convert(
    src: str, dst: str, config: ConvertConfig, on_progress: Callable[[str], None] = silent
) -> Manifest:
    """Converts the raw data in folder `src` to a dataset at `dst`; both local or URLs.

    Deterministic: the same source and configuration give the same parts.

    Raises:
        ReneeError: bad input (the sentence names file, line and value), a `dst` that is taken,
            no such tokenizer. Nothing that opens as a dataset is left at `dst` then, unless the
            source was refused before a dataset to be overwritten was touched. What was cut off
            goes on with the same command, where it was.
    """
    src, dst = storage.absolute(src), storage.absolute(dst)
    _check_destination(dst, config.overwrite)
    found = index_parquet(src) if is_parquet(src) else xmlrepo.find(src)
    vocabulary = tokenizer.load(config.tokenizer)
    try:
        signature = _signature(src, vocabulary, config)
        with _scratch(dst, signature, on_progress) as scratch:
            on_progress(f"reading {src}")
            if isinstance(found, ParquetSource):
                ensure_ray()
                made = convert_parquet(found, dst, scratch, vocabulary, config, on_progress)
            else:
                made = _convert_lines(found, dst, scratch, vocabulary, config, on_progress)
            manifest = _manifest(made, vocabulary, config)
            layout.write_manifest(dst, manifest)
    except OSError as error:
        raise ReneeError(
            f"cannot convert {src} to {dst}: {reason(error)}; "
            f"check that both can be reached and written"
        ) from error
    return manifest


def _manifest(made: Converted, vocabulary: tokenizer.Vocabulary, config: ConvertConfig) -> Manifest:
    return Manifest(
        format_version=layout.FORMAT_VERSION,
        tokenizer=config.tokenizer,
        vocabulary_hash=vocabulary.hash,
        max_length=config.max_length,
        pad_id=vocabulary.pad_id,
        num_labels=made.num_labels,
        has_label_texts=made.has_label_texts,
        propensity_a=config.propensity_a,
        propensity_b=config.propensity_b,
        splits=made.splits,
        other_texts=made.other_texts,
        statistics=made.statistics,
    )


def _convert_lines(
    found: xmlrepo.Source,
    dst: str,
    scratch: str,
    vocabulary: tokenizer.Vocabulary,
    config: ConvertConfig,
    on_progress: Callable[[str], None],
) -> Converted:
    """The parts of a folder of text files."""
    raw = index_source(found, scratch)
    ensure_ray()
    counts, scanned = _scan(raw, on_progress)
    raw = replace(raw, num_labels=len(counts))
    journal = f"{scratch}/{JOURNAL}"
    clear_once(dst, journal)
    plan = _plan(raw, dst, counts, vocabulary, config)
    splits, written = _write(plan, journal, on_progress)
    others = tuple(
        int((~plan.is_point[part.first : part.first + part.rows]).sum())
        for part in splits["labels"]
    )
    return Converted(
        len(counts),
        raw.label_texts is not None,
        splits,
        others,
        _statistics(scanned, written, counts),
    )


# -------------------------------------------------------------------------------- destination


def _check_destination(dst: str, overwrite: bool) -> None:
    filesystem, root = storage.filesystem_of(dst)
    kind = filesystem.get_file_info(root).type
    if kind == pafs.FileType.NotFound:
        return
    if kind == pafs.FileType.File:
        raise ReneeError(f"{dst} is a file; give a directory for the dataset")
    if overwrite:
        return
    if layout.has_manifest(dst):
        raise ReneeError(f"{dst} already holds a dataset; give another directory or overwrite=true")
    ours = {*layout.SPLITS, SCRATCH, f"{layout.MANIFEST}.tmp"}
    names = {info.base_name for info in filesystem.get_file_info(pafs.FileSelector(root))}
    if others := sorted(names - ours):
        raise ReneeError(
            f"{dst} exists already and holds other things ({others[0]!r}); give another "
            f"directory or overwrite=true, which leaves them alone"
        )


@contextmanager
def _scratch(dst: str, signature: str, on_progress: Callable[[str], None]) -> Iterator[str]:
    """A directory beside the parts, which every node that writes can read.

    It outlives a conversion that was cut off, and serves the next one of the same signature.
    """
    path = f"{dst.rstrip('/')}/{SCRATCH}"
    filesystem, root = storage.filesystem_of(path)
    if _signature_at(filesystem, root) == signature:
        on_progress(f"going on with the conversion to {dst} that was cut off")
    else:
        _remove(filesystem, root)
        filesystem.create_dir(f"{root}/{JOURNAL}", recursive=True)
        with filesystem.open_output_stream(f"{root}/{SIGNATURE}") as sink:
            sink.write(signature.encode())
    try:
        yield path
    except (Interrupted, OSError):
        raise
    except ReneeError:
        _remove(filesystem, root)
        raise
    _remove(filesystem, root)


def _signature(src: str, vocabulary: tokenizer.Vocabulary, config: ConvertConfig) -> str:
    """What parts depend on: the source's files, the tokenizer, the configuration."""
    filesystem, root = storage.filesystem_of(src)
    files = [
        (info.path, info.size, info.mtime_ns)
        for info in filesystem.get_file_info(pafs.FileSelector(root, recursive=True))
        if info.type == pafs.FileType.File
    ]
    settings = config.model_dump(exclude={"overwrite"})
    content = [layout.FORMAT_VERSION, vocabulary.hash, settings, sorted(files)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _signature_at(filesystem: pafs.FileSystem, root: str) -> str | None:
    if filesystem.get_file_info(f"{root}/{SIGNATURE}").type != pafs.FileType.File:
        return None
    with filesystem.open_input_file(f"{root}/{SIGNATURE}") as file:
        return file.read().decode()


def _remove(filesystem: pafs.FileSystem, root: str) -> None:
    if filesystem.get_file_info(root).type == pafs.FileType.Directory:
        filesystem.delete_dir(root)


# ---------------------------------------------------------------------------------------- scan


@dataclass(frozen=True)
class _ScanPlan:
    raw: Raw
    blocks: list[tuple[str, int, int]]
    """(split, first row, end row) of each task."""


def _scan(raw: Raw, on_progress: Callable[[str], None]) -> tuple[Int64s, dict[str, Counter[str]]]:
    """(train_count int64 [num_labels], counts of each split's label lines)."""
    blocks = [
        (name, start, stop)
        for name in ("train", "test")
        if name == "train" or raw.test is not None
        for start, stop in pieces(raw.split(name).labelled)
    ]
    counts = np.zeros(raw.num_labels or 0, dtype=np.int64)
    totals: dict[str, Counter[str]] = {"train": Counter(), "test": Counter()}
    reporter = Reporter("label lines checked, blocks", len(blocks), on_progress)
    for result in stream(_scan_piece, _ScanPlan(raw, blocks), len(blocks)):
        reporter.one_more()
        totals[result["split"]].update(result["totals"])
        if raw.num_labels is None:
            missing = result["greatest"] + 1 - len(counts)
            counts = np.pad(counts, (0, max(missing, 0)))
        counts[np.array(result["labels"], dtype=np.int64)] += np.array(
            result["counts"], dtype=np.int64
        )
    if not counts.any():
        raise SourceError(
            f"{raw.train.labelled.path} gives no training point a label; there is nothing to learn"
        )
    if raw.num_labels is None:
        greatest = max(
            int(split.filters.labels.max(initial=-1)) for split in (raw.train, raw.test) if split
        )
        counts = np.pad(counts, (0, max(greatest + 1 - len(counts), 0)))
    return counts, totals


def _scan_piece(plan: _ScanPlan, i: int) -> dict[str, Any]:
    """Checks the label lines of one piece; of training pieces, counts the points of labels."""
    name, start, stop = plan.blocks[i]
    block = xmlrepo.read(plan.raw.split(name).labelled, np.arange(start, stop))
    if plan.raw.is_json:
        found = xmlrepo.parse_objects(block, plan.raw.num_labels)[1]
    else:
        found = xmlrepo.parse_pairs(block, plan.raw.num_labels)
    labels, counts = np.unique(found.labels, return_counts=True)
    return {
        "split": name,
        "totals": {"duplicate_pairs": found.duplicates, "zero_values": found.zeros},
        "greatest": int(labels.max(initial=-1)),
        "labels": labels.tolist() if name == "train" else [],
        "counts": counts.tolist() if name == "train" else [],
    }


# --------------------------------------------------------------------------------------- write


@dataclass(frozen=True)
class _WritePlan:
    """What every task that writes a part needs: arrays are shared, not copied, on a node."""

    raw: Raw
    dst: str
    vocabulary: str
    max_length: int
    order: dict[str, Int64s]
    """Row numbers in the source in the order to write them; the other splits are in its order."""
    train_counts: Int64s
    is_point: np.ndarray
    """bool [num_labels]: labels that are a filter label of a point of train."""
    part_rows: int
    blocks: list[tuple[str, int, int]]
    """(split, start, stop within the split) of each task: whole parts."""


def _plan(
    raw: Raw,
    dst: str,
    train_counts: Int64s,
    vocabulary: tokenizer.Vocabulary,
    config: ConvertConfig,
) -> _WritePlan:
    train, validation = split_rows(raw.train.rows, config.validation, config.seed)
    if len(train) == 0:
        raise ReneeError(
            f"validation={config.validation} holds out all {raw.train.rows} training points of "
            f"{raw.train.texts.path}; lower validation"
        )
    sizes = {
        "train": len(train),
        "validation": len(validation),
        "test": raw.test.rows if raw.test else 0,
        "labels": len(train_counts),
    }
    order = {"train": train, "validation": validation}
    rows = config.part_rows * max(1, TASK_ROWS // config.part_rows)
    blocks = [
        (split, start, min(start + rows, sizes[split]))
        for split in layout.SPLITS
        for start in range(0, sizes[split], rows)
    ]
    return _WritePlan(
        raw,
        dst,
        vocabulary.serialised,
        config.max_length,
        order,
        train_counts,
        _is_point(raw, validation, len(train_counts)),
        config.part_rows,
        blocks,
    )


def _is_point(raw: Raw, held_out: Int64s, num_labels: int) -> np.ndarray:
    filters = raw.train.filters
    found = np.zeros(num_labels, dtype=bool)
    found[filters.labels[~np.isin(filters.rows, held_out)]] = True
    return found


def _write(
    plan: _WritePlan, journal: str, on_progress: Callable[[str], None]
) -> tuple[dict[str, tuple[Part, ...]], dict[str, Counter[str]]]:
    """Writes every part; returns the manifest's splits and the sums of the parts' counts."""
    reporter = Reporter("blocks written", len(plan.blocks), on_progress)
    totals: dict[str, Counter[str]] = {split: Counter() for split in layout.SPLITS}
    splits: dict[str, list[Part]] = {split: [] for split in layout.SPLITS}
    for result in stream(_write_parts, plan, len(plan.blocks), journal):
        reporter.one_more()
        splits[result["split"]] += [Part(**part) for part in result["parts"]]
        total = totals[result["split"]]
        for name, value in result["totals"].items():
            total[name] = max(total[name], value) if name.endswith("_max") else total[name] + value
    ordered = {
        split: tuple(sorted(parts, key=lambda part: part.first)) for split, parts in splits.items()
    }
    return ordered, totals


def _write_parts(plan: _WritePlan, i: int) -> dict[str, Any]:
    split, start, stop = plan.blocks[i]
    order = plan.order.get(split)
    rows = np.arange(start, stop) if order is None else order[start:stop]
    make = _label_table if split == "labels" else _point_table
    table, totals = make(plan, split, rows)
    parts = []
    for first in range(start, stop, plan.part_rows):
        path = layout.part_path(split, first // plan.part_rows)
        rows_of_part = table.slice(first - start, plan.part_rows)
        parts.append(asdict(layout.write_part(plan.dst, path, first, rows_of_part)))
    return {"split": split, "parts": parts, "totals": totals}


def _point_table(plan: _WritePlan, split: str, rows: Int64s) -> tuple[pa.Table, dict[str, int]]:
    source = plan.raw.split(split)
    block = xmlrepo.read(source.texts, rows)
    if source.labels is None:
        texts, found = xmlrepo.parse_objects(block, plan.raw.num_labels)
    else:
        texts = xmlrepo.texts_of(block)
        found = xmlrepo.parse_pairs(xmlrepo.read(source.labels, rows), plan.raw.num_labels)
    ids = tokenizer.encode(plan.vocabulary, texts.texts, plan.max_length)
    offsets = found.offsets(len(rows))
    filters, filter_offsets = _filters_of(source.filters, rows)
    columns = {
        "point_id": pa.array(rows),
        "input_ids": ids,
        "labels": _lists(offsets, found.labels),
        "filter_labels": _lists(filter_offsets, filters),
    }
    sizes = np.diff(offsets)
    totals = {
        **_text_totals(texts, ids, plan.max_length),
        "label_pairs": len(found.labels),
        "labels_max": int(sizes.max(initial=0)),
        "without_labels": int((sizes == 0).sum()),
        "filter_pairs": len(filters),
    }
    return pa.table(columns, schema=layout.POINTS), totals


def _label_table(plan: _WritePlan, split: str, rows: Int64s) -> tuple[pa.Table, dict[str, int]]:
    if plan.raw.label_texts is None:
        texts = xmlrepo.Texts([""] * len(rows), 0, 0)
    else:
        block = xmlrepo.read(plan.raw.label_texts, rows)
        if plan.raw.is_json:
            texts = xmlrepo.parse_objects(block, None, with_labels=False)[0]
        else:
            texts = xmlrepo.texts_of(block)
    ids = tokenizer.encode(plan.vocabulary, texts.texts, plan.max_length)
    columns = {
        "label_id": pa.array(rows),
        "text": pa.array(texts.texts, pa.string()),
        "input_ids": ids,
        "train_count": pa.array(plan.train_counts[rows]),
        "is_point": pa.array(plan.is_point[rows]),
    }
    totals = _text_totals(texts, ids, plan.max_length)
    return pa.table(columns, schema=layout.LABELS), totals


def _text_totals(texts: xmlrepo.Texts, ids: pa.ListArray, max_length: int) -> dict[str, int]:
    sizes = np.diff(ids.offsets.to_numpy())
    return {
        "rows": len(sizes),
        "tokens": int(sizes.sum()),
        "tokens_max": int(sizes.max(initial=0)),
        "at_max_length": int((sizes == max_length).sum()),
        "empty_texts": sum(not text.strip() for text in texts.texts),
        "replaced_lines": texts.replaced_lines,
        "replaced_bytes": texts.replaced_bytes,
    }


def _filters_of(filters: Pairs, rows: Int64s) -> tuple[Int64s, Int64s]:
    """(labels, offsets): row i of `rows` has the filter labels labels[offsets[i]:offsets[i+1]]."""
    firsts = np.searchsorted(filters.rows, rows, side="left")
    sizes = np.searchsorted(filters.rows, rows, side="right") - firsts
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    places = np.arange(offsets[-1]) + np.repeat(firsts - offsets[:-1], sizes)
    return filters.labels[places], offsets


def _lists(offsets: Int64s, values: Int64s) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(values))


# ---------------------------------------------------------------------------------- statistics


_COUNT_BANDS = {"0": 0, "1": 1, "2-5": 5, "6-20": 20, "21-100": 100}


def _statistics(
    scanned: dict[str, Counter[str]], written: dict[str, Counter[str]], counts: Int64s
) -> dict[str, Any]:
    """Counts for people. duplicate_pairs and zero_values of train are of its whole source file,
    the points held out for validation included."""
    statistics: dict[str, Any] = {}
    for split, totals in written.items():
        one: dict[str, float] = dict(totals)
        one["points"] = one.pop("rows", 0)
        rows = max(totals["rows"], 1)
        one["tokens_mean"] = round(one.pop("tokens", 0) / rows, 2)
        if split != "labels":
            one["labels_mean"] = round(one.get("label_pairs", 0) / rows, 3)
        statistics[split] = {**one, **scanned.get(split, {})}
    statistics["labels"].update(_bands(counts))
    return statistics


def _bands(counts: Int64s) -> dict[str, dict[str, float]]:
    """Shares of the labels, and of the training pairs, by the label's number of points."""
    band = np.searchsorted(np.array(list(_COUNT_BANDS.values())), counts)
    names = [*_COUNT_BANDS, ">100"]
    labels = np.bincount(band, minlength=len(names)) / max(len(counts), 1)
    weighted = np.bincount(band, weights=counts, minlength=len(names)) / max(counts.sum(), 1)
    return {
        "share_of_labels_by_train_count": dict(zip(names, labels.round(4).tolist(), strict=True)),
        "share_of_pairs_by_train_count": dict(zip(names, weighted.round(4).tolist(), strict=True)),
    }
