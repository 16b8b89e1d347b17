"""Tokenises raw texts to predict for, by Ray Data tasks, into a split of points without labels.

    SRC.txt, SRC.txt.gz     a text a line; its point_id is the line's number, from 0
    SRC.parquet, SRC/       one Parquet file, or all of a directory in the order of their paths;
                            column `text`, and optionally `point_id`, integers, in place of the
                            row number

A blank line is an empty text, and so is a null.

Lines are first written as Parquet by a task (service/convert/own_data.py).
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs

from renee_ray.data import tokenizer
from renee_ray.data.dataset import POINTS, SPLITS, Dataset, Part, part_path, write_part
from renee_ray.data.sources.own import Own
from renee_ray.data.sources.parquet import files_below, table_of
from renee_ray.data.sources.records import Records, Table
from renee_ray.data.storage import absolute, filesystem_of, make_directory
from renee_ray.errors import ReneeError
from renee_ray.service.cluster.tasks import stream
from renee_ray.service.convert.own_data import write_pieces
from renee_ray.service.run.labels import vocabulary_of

log = logging.getLogger(__name__)

TEXT_SPLIT = "test"
"""The split of the scratch dataset that the texts become."""


@dataclass(frozen=True)
class _Texts:
    """What each task is given: it turns one block of the table into one part."""

    table: Table
    scratch: str
    vocabulary: str
    max_length: int


def tokenise_texts(src: str, scratch: str, like: Dataset) -> tuple[Dataset, int]:
    """Tokenises the texts of `src` into directory `scratch`, as dataset `like` was tokenised.

    Returns:
        (a dataset whose split `TEXT_SPLIT` they are; it has no manifest on disk,
        number of texts that were not UTF-8 and had bytes replaced)

    Raises:
        ReneeError: no such source, no column `text`, a missing id, or no text at all.
    """
    src = absolute(src)
    make_directory(f"{scratch}/{TEXT_SPLIT}")
    table = _indexed(src, scratch)
    if not table.blocks:
        raise ReneeError(f"{src} holds no texts; there is nothing to predict")
    texts = _Texts(table, scratch, vocabulary_of(like), like.manifest.max_length)
    results = list(stream(_write_block, texts, len(table.blocks)))
    parts = sorted((Part(**each["part"]) for each in results), key=lambda part: part.first)
    splits = {name: tuple(parts) if name == TEXT_SPLIT else () for name in SPLITS}
    replaced = sum(each["replaced_lines"] for each in results)
    returns = sum(each["returns"] for each in results)
    if returns and src.endswith((".txt", ".gz")):
        log.warning("%s: %d carriage returns end no line and stay in texts", src, returns)
    return Dataset(scratch, replace(like.manifest, splits=splits)), replaced


_KINDS = (
    "a dataset directory, a .txt or .txt.gz file with a text a line, or Parquet, a file or a "
    "directory, with a column 'text' (CSV and JSON lines are not read yet)"
)


def check_texts(src: str) -> list[str]:
    """Returns the Parquet files of a source of texts; none for a text file.

    Raises:
        ReneeError: it is neither.
    """
    src = absolute(src)
    filesystem, root = filesystem_of(src)
    kind = filesystem.get_file_info(root).type
    if kind == pafs.FileType.NotFound:
        raise ReneeError(f"{src} does not exist; give {_KINDS}")
    if kind == pafs.FileType.File and src.endswith((".txt", ".txt.gz")):
        return []
    if kind == pafs.FileType.File and src.endswith(".parquet"):
        return [src]
    if kind == pafs.FileType.Directory and (files := files_below(src)):
        return files
    raise ReneeError(f"{src} is neither a dataset directory nor texts; give {_KINDS}")


def _indexed(src: str, scratch: str) -> Table:
    """Makes a table of the texts, with a column point_id where rows have ids of their own."""
    if files := check_texts(src):
        return table_of(files, ("text",), ("point_id",))
    lines = Own({"lines": [src]}, None, ())
    (result,) = stream(_write_lines, (lines, scratch), 1)
    return table_of([path for path, *_ in result["pieces"]], ("text",))


def _write_lines(shared: tuple[Own, str], i: int) -> dict[str, Any]:
    return write_pieces(shared, (0, "lines", shared[0].splits["lines"]))


def _write_block(texts: _Texts, i: int) -> dict[str, Any]:
    table, block = texts.table, texts.table.blocks[i]
    rows, replaced, returns = [], 0, 0
    for records in table.read(block, table.columns):
        rows.append(_tokenised(texts, records))
        replaced += int((records.replaced > 0).sum())
        returns += pc.sum(pc.count_substring(records.columns["text"], "\r")).as_py() or 0
    part = write_part(texts.scratch, part_path(TEXT_SPLIT, i), block.first, rows)
    return {"part": asdict(part), "replaced_lines": replaced, "returns": returns}


def _tokenised(texts: _Texts, records: Records) -> pa.Table:
    given = records.columns["text"].to_pylist()
    empty = pa.array([[]] * len(records), type=pa.list_(pa.int64()))
    columns = {
        "point_id": records.columns.get("point_id", records.numbers()),
        "input_ids": tokenizer.encode(texts.vocabulary, given, texts.max_length),
        "labels": empty,
        "filter_labels": empty,
    }
    return pa.table(columns, schema=POINTS)
