"""From raw data to a dataset directory, as Ray Data tasks.

    index    tasks     text files: line ends counted by ranges of bytes, gzip unpacked
             driver    Parquet: footers
    parts    tasks     convert_parts.py: bad points show before anything is written
    publish  driver    dataset.json, last

Texts and label lines never pass through the driver or the object store: tasks are given places
in files and return counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pyarrow.fs as pafs

from renee_ray.config.schema import ConvertConfig
from renee_ray.data import dataset as layout
from renee_ray.data import storage, tokenizer
from renee_ray.data.dataset import DATASET, Dataset, Manifest
from renee_ray.data.destination import Destination, refuse_overlap
from renee_ray.data.sources.parquet import ParquetSource
from renee_ray.data.sources.raw import Raw
from renee_ray.data.sources.source import Source, find_source
from renee_ray.errors import ReneeError
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.convert.parts import Converted, write_parts
from renee_ray.service.convert.plan import JOURNAL
from renee_ray.service.convert.text import index_text
from renee_ray.service.tasks import Interrupted


def silent(message: str) -> None:
    """Progress nobody listens to."""


def convert(
    src: str, dst: str, config: ConvertConfig, on_progress: Callable[[str], None] = silent
) -> Manifest:
    """Converts the raw data in folder `src` to a dataset at `dst`; both local or URLs.

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
        found: Source | Raw | ParquetSource = find_source(src, config.labels)
        vocabulary = tokenizer.load(config.tokenizer)
        signature = _signature(src, dst, vocabulary, config)
        if destination.is_published(signature):
            manifest = Dataset.without_check(dst).manifest
        else:
            on_progress(f"reading {src}")
            ensure_ray()
            with _claimed(destination, signature, on_progress) as scratch:
                if isinstance(found, Source):
                    found = index_text(found, scratch, on_progress)
                elif isinstance(found, ParquetSource):
                    for note in found.notes:
                        on_progress(note)
                declare = destination.declare
                made = write_parts(found, dst, scratch, vocabulary, config, declare, on_progress)
                manifest = _manifest(made, vocabulary, config)
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
    """Sentences on what may be wrong with a source though it could be converted."""
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
        labels_hash=made.labels_hash,
    )


@contextmanager
def _claimed(
    destination: Destination, signature: str, on_progress: Callable[[str], None]
) -> Iterator[str]:
    """The directory of scratch files.

    It outlives a conversion that was cut off, and serves the next one of the same signature.
    """
    if destination.claim(signature):
        on_progress(f"going on with the conversion to {destination.path} that was cut off")
    scratch = destination.scratch(signature)
    storage.make_directory(f"{scratch}/{JOURNAL}")
    try:
        yield scratch
    except (Interrupted, OSError):
        raise
    except ReneeError:
        destination.abandon()
        raise


def _signature(src: str, dst: str, vocabulary: tokenizer.Vocabulary, config: ConvertConfig) -> str:
    """What parts depend on: the source's files, the tokenizer, the configuration.

    Raises:
        ReneeError: a file of the source is one of `dst`.
    """
    files = [
        (info.path, info.size, info.mtime_ns)
        for info in storage.listing(src, recursive=True)
        if info.type == pafs.FileType.File
    ]
    if isinstance(storage.filesystem_of(src)[0], pafs.LocalFileSystem):
        for path, _, _ in files:
            refuse_overlap(path, dst)
    settings = config.model_dump(exclude={"overwrite"})
    content = [layout.FORMAT_VERSION, "labels_hash", vocabulary.hash, settings, sorted(files)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
