"""From raw data to a dataset directory, as Ray Data tasks, with bounded memory.

    pieces     tasks     text files of the repository, and own data (CSV, JSON lines, Arrow, PECOS,
                         Parquet with named columns), to Parquet in scratch (own_data.py)
    label ids  tasks     where labels are strings (label_ids.py)
    partition  tasks     records -> points in buckets: bad ones show before anything is written
    parts      tasks     buckets and ranges of labels -> parts (parts.py)
    publish    driver    dataset.json, last

A source is tables of records (data/sources/records.py), and each stage is the same for all kinds;
one that a source does not need has no tasks. A task holds a piece, a block, a bucket or a range,
never all rows or all labels: it is given places in files and returns counts. Three exceptions are
in the memory of one task: the filter pairs of a split of text files (24 bytes a pair), the pairs of
a text and a label of own data, and a matrix of PECOS. Each row is tokenised once, and written once
to scratch, or twice where it was in `pieces`, and once to its place. The driver holds some numbers
a block.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs

from renee_ray.config.schema import ConvertConfig
from renee_ray.data import dataset as layout
from renee_ray.data import storage, tokenizer
from renee_ray.data.dataset import DATASET, Dataset, Manifest
from renee_ray.data.destination import Destination, refuse_overlap
from renee_ray.data.sources.records import Source
from renee_ray.data.sources.source import find_source
from renee_ray.errors import Progress, ReneeError, silent
from renee_ray.service.cluster.connect import ensure_ray
from renee_ray.service.cluster.tasks import Interrupted
from renee_ray.service.convert.conversion import JOURNAL, begin
from renee_ray.service.convert.label_ids import with_label_ids
from renee_ray.service.convert.own_data import written
from renee_ray.service.convert.partition import partition
from renee_ray.service.convert.parts import write_parts

SCRATCH_FORMAT = "pieces with ids"
"""Names the format of scratch files and results: nothing goes on from those of another."""


def convert(src: str, dst: str, config: ConvertConfig, on_progress: Progress = silent) -> Manifest:
    """Converts raw data, a folder or a table, to a dataset; `src` and `dst` are local or URLs.

    Deterministic: the same source and configuration give the same parts.

    Raises:
        ReneeError: bad input (the sentence names file, line and value), a `dst` that is taken,
            no such tokenizer. No file of the conversion is left at `dst` then; a dataset to be
            overwritten is as it was, unless only a text of a label was bad. What was cut off
            goes on with the same command, where it was.
    """
    src, dst = storage.absolute(src), storage.absolute(dst)
    try:
        refuse_overlap(src, dst)
        destination = Destination(dst, DATASET, config.overwrite)
        destination.check()
        found = find_source(src, config.labels, config.text, config.separator)
        if os.path.isdir(config.tokenizer):  # workers have another working directory
            at = storage.absolute(config.tokenizer)
            config = config.model_copy(update={"tokenizer": at})
        vocabulary = tokenizer.load(config.tokenizer)
        signature = _signature(src, dst, vocabulary, config)
        if destination.is_published(signature):
            manifest = Dataset.without_check(dst).manifest
        else:
            on_progress(f"reading {src}")
            ensure_ray(1, local_cpus=3)  # its tasks wait for each other, in any cluster
            with _claimed(destination, signature, on_progress) as scratch:
                if not isinstance(found, Source):
                    for note in found.notes:  # before the hours that reading may take
                        on_progress(note)
                    found = written(found, config.labels, scratch, on_progress)
                for note in found.notes:
                    on_progress(note)
                if found.test is None and config.test:
                    on_progress(f"no test split: test={config.test:g} of the points are held out")
                conversion = begin(found, dst, scratch, vocabulary, config)
                conversion = with_label_ids(conversion, on_progress)
                conversion, partitioned = partition(conversion, on_progress)
                destination.declare(partitioned.paths)
                manifest = write_parts(conversion, partitioned, on_progress)
                destination.hold()
                layout.write_manifest(dst, manifest)
        destination.release()
    except OSError as error:
        what, remedy = (
            f"cannot convert {src} to {dst}",
            "check that both can be reached and written",
        )
        raise storage.storage_error(error, what, remedy) from error
    return manifest


def hints(manifest: Manifest, config: ConvertConfig) -> list[str]:
    """Returns sentences on what may be wrong with a source though it could be converted."""
    labels = manifest.statistics["labels"]
    least, greatest = labels["least_id"], labels["greatest_id"]
    unused = labels["share_of_labels_by_train_count"]["0"]
    # Label texts would have been one too few, and most labels of a source have a point.
    if (
        manifest.has_label_texts
        or config.labels == "multi-hot"
        or (least, greatest) != (1, manifest.num_labels - 1)
        or unused > 0.5
    ):
        return []
    return [
        f"no point has label 0, and labels 1 to {greatest} are there: ids count from 0, so if the "
        f"source counts from 1, subtract 1 from its labels and convert it again"
    ]


@contextmanager
def _claimed(destination: Destination, signature: str, on_progress: Progress) -> Iterator[str]:
    """Yields the directory of scratch files.

    It outlives a conversion that was cut off, and serves the next one of the same signature.
    """
    if destination.claim(signature):
        on_progress(f"going on with the conversion to {destination.path} that was cut off")
    scratch = destination.scratch()
    storage.make_directory(f"{scratch}/{JOURNAL}")
    try:
        yield scratch
    except (Interrupted, OSError):
        raise
    except ReneeError:
        destination.abandon()
        raise


def _signature(src: str, dst: str, vocabulary: tokenizer.Vocabulary, config: ConvertConfig) -> str:
    """Hashes what parts depend on: the source's files, the tokenizer, the configuration.

    Raises:
        ReneeError: a file of the source is one of `dst`.
    """
    filesystem, root = storage.filesystem_of(src)
    itself = filesystem.get_file_info(root)
    found = storage.listing(src, recursive=True) if itself.type != pafs.FileType.File else [itself]
    files = [
        (info.path, info.size, info.mtime_ns) for info in found if info.type == pafs.FileType.File
    ]
    if isinstance(filesystem, pafs.LocalFileSystem):
        for path, _, _ in files:
            refuse_overlap(path, dst)
    settings = config.model_dump(exclude={"overwrite"})
    content = [layout.FORMAT_VERSION, SCRATCH_FORMAT, vocabulary.hash, settings, sorted(files)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
