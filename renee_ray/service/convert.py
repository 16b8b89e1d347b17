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
from functools import partial

import pyarrow.fs as pafs

from renee_ray.config import ConvertConfig, ReneeError, reason
from renee_ray.data import dataset as layout
from renee_ray.data import storage, tokenizer, xmlrepo
from renee_ray.data.dataset import Manifest
from renee_ray.data.parquet_source import ParquetSource, index_parquet, is_parquet
from renee_ray.data.raw import Raw
from renee_ray.service.cluster import ensure_ray
from renee_ray.service.convert_parts import Converted, write_parts
from renee_ray.service.convert_plan import JOURNAL
from renee_ray.service.convert_text import index_text
from renee_ray.service.tasks import Interrupted

SCRATCH, SIGNATURE = "_scratch", "signature"


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
    found: xmlrepo.Source | Raw | ParquetSource
    found = index_parquet(src) if is_parquet(src) else xmlrepo.find(src)
    vocabulary = tokenizer.load(config.tokenizer)
    try:
        signature = _signature(src, vocabulary, config)
        with _scratch(dst, signature, on_progress) as scratch:
            on_progress(f"reading {src}")
            ensure_ray()
            if isinstance(found, xmlrepo.Source):
                found = index_text(found, scratch, on_progress)
            clear = partial(_clear_once, dst, f"{scratch}/{JOURNAL}")
            made = write_parts(found, dst, scratch, vocabulary, config, clear, on_progress)
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
        labels_hash=made.labels_hash,
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


def _clear_once(dst: str, journal: str) -> None:
    """Removes an earlier dataset, but not the parts of a conversion that is going on."""
    if storage.read_file(f"{journal}/cleared") is None:
        layout.clear(dst)
        storage.write_file(f"{journal}/cleared", b"yes")


@contextmanager
def _scratch(dst: str, signature: str, on_progress: Callable[[str], None]) -> Iterator[str]:
    """A directory beside the parts, which every node that writes can read.

    It outlives a conversion that was cut off, and serves the next one of the same signature.
    """
    path = f"{dst.rstrip('/')}/{SCRATCH}"
    if storage.read_file(f"{path}/{SIGNATURE}") == signature.encode():
        on_progress(f"going on with the conversion to {dst} that was cut off")
    else:
        storage.remove(path)
        storage.make_directory(f"{path}/{JOURNAL}")
        storage.write_file(f"{path}/{SIGNATURE}", signature.encode())
    try:
        yield path
    except (Interrupted, OSError):
        raise
    except ReneeError:
        storage.remove(path)
        raise
    storage.remove(path)


def _signature(src: str, vocabulary: tokenizer.Vocabulary, config: ConvertConfig) -> str:
    """What parts depend on: the source's files, the tokenizer, the configuration."""
    files = [
        (info.path, info.size, info.mtime_ns)
        for info in storage.listing(src, recursive=True)
        if info.type == pafs.FileType.File
    ]
    settings = config.model_dump(exclude={"overwrite"})
    content = [layout.FORMAT_VERSION, "labels_hash", vocabulary.hash, settings, sorted(files)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
