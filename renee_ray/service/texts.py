"""Raw texts to predict for, tokenised by Ray Data tasks into a split of points without labels.

    SRC.txt, SRC.txt.gz     a text a line; its point_id is the line's number, from 0
    SRC.parquet, SRC/       one Parquet file, or all of a directory in the order of their names;
                            column `text`, and `point_id` int64 if the row number shall not do

The driver finds line ends (and unpacks gzip) and reads Parquet footers; it keeps no text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from renee_ray.config import ReneeError, reason
from renee_ray.data import tokenizer, xmlrepo
from renee_ray.data.dataset import (
    POINTS,
    SPLITS,
    Dataset,
    Part,
    part_path,
    write_part,
)
from renee_ray.data.storage import absolute, filesystem_of
from renee_ray.data.untrusted import check_row_groups, rows_of
from renee_ray.data.xmlrepo import Lines
from renee_ray.service.tasks import stream

TEXT_SPLIT = "test"
"""The split of the scratch dataset that the texts become."""
PIECE_ROWS = 16384


@dataclass(frozen=True)
class _Piece:
    """Rows of the source that one task turns into one part: lines, or a row group of `path`."""

    first: int
    rows: int
    path: str = ""
    group: int = 0


@dataclass(frozen=True)
class _Plan:
    pieces: list[_Piece]
    lines: Lines | None
    scratch: str
    vocabulary: str
    max_length: int


def tokenise_texts(src: str, scratch: str, like: Dataset, max_length: int) -> tuple[Dataset, int]:
    """Tokenises the texts of `src` into directory `scratch`, as dataset `like` was tokenised.

    Returns:
        (a dataset whose split `TEXT_SPLIT` they are; it has no manifest on disk,
        number of texts that were not UTF-8 and had bytes replaced)

    Raises:
        ReneeError: no such source, no column `text`, a text that is missing, no text at all.
    """
    src = absolute(src)
    lines, pieces = _pieces(src, scratch)
    if not pieces:
        raise ReneeError(f"{src} holds no texts; there is nothing to predict")
    vocabulary = tokenizer.load(like.manifest.tokenizer)
    if vocabulary.hash != like.manifest.vocabulary_hash:
        raise ReneeError(
            f"the tokenizer {like.manifest.tokenizer!r} is not the one that {like.path} was "
            f"converted with; make that one available"
        )
    filesystem, root = filesystem_of(scratch)
    filesystem.create_dir(f"{root}/{TEXT_SPLIT}", recursive=True)
    plan = _Plan(pieces, lines, scratch, vocabulary.serialised, max_length)
    results = list(stream(_write_piece, plan, len(pieces)))
    parts = sorted((Part(**each["part"]) for each in results), key=lambda part: part.first)
    splits = {name: tuple(parts) if name == TEXT_SPLIT else () for name in SPLITS}
    replaced = sum(each["replaced_lines"] for each in results)
    return Dataset(scratch, replace(like.manifest, splits=splits)), replaced


def check_texts(src: str) -> list[str]:
    """The Parquet files of a source of texts; none for a text file.

    Raises:
        ReneeError: it is neither.
    """
    src = absolute(src)
    filesystem, root = filesystem_of(src)
    kind = filesystem.get_file_info(root).type
    if kind == pafs.FileType.File and src.endswith((".txt", ".txt.gz")):
        return []
    if kind == pafs.FileType.File and src.endswith(".parquet"):
        return [src]
    if kind == pafs.FileType.Directory:
        found = filesystem.get_file_info(pafs.FileSelector(root))
        names = sorted(info.base_name for info in found if info.base_name.endswith(".parquet"))
        if names:
            return [f"{src.rstrip('/')}/{name}" for name in names]
    raise ReneeError(
        f"{src} is neither a dataset directory nor texts: give a .txt or .txt.gz file with a text "
        f"a line, or Parquet with a column 'text'"
    )


def _pieces(src: str, scratch: str) -> tuple[Lines | None, list[_Piece]]:
    files = check_texts(src)
    if files:
        return None, _row_groups(files)
    filesystem, root = filesystem_of(scratch)
    filesystem.create_dir(root, recursive=True)
    try:
        lines = xmlrepo.index(src, f"{scratch}/unpacked.txt")
    except OSError as error:
        raise ReneeError(f"{src} cannot be read ({reason(error)}); check its permissions") from None
    cuts = range(0, lines.rows, PIECE_ROWS)
    return lines, [_Piece(at, min(PIECE_ROWS, lines.rows - at)) for at in cuts]


def _row_groups(paths: list[str]) -> list[_Piece]:
    pieces: list[_Piece] = []
    first = 0
    with_ids: set[bool] = set()
    for path in paths:
        filesystem, root = filesystem_of(path)
        try:
            with filesystem.open_input_file(root) as file:
                footer = pq.ParquetFile(file)
                schema, metadata = footer.schema_arrow, footer.metadata
                rows_of(metadata)
        except (OSError, ValueError) as error:  # pa.ArrowInvalid is one
            raise ReneeError(f"{path} is not Parquet ({reason(error)}); replace it") from None
        _check_columns(path, schema)
        with_ids.add("point_id" in schema.names)
        if len(with_ids) > 1:
            raise ReneeError(
                f"{path} and {paths[0]} differ in having a column 'point_id'; all must or none"
            )
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if rows:
                pieces.append(_Piece(first, rows, path, group))
            first += rows
    return pieces


def _check_columns(path: str, schema: pa.Schema) -> None:
    if "text" not in schema.names:
        raise ReneeError(
            f"{path} has the columns {schema.names}; rename the one that holds the texts to 'text'"
        )
    kind = schema.field("text").type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise ReneeError(f"{path} has a column 'text' of type {kind}; it must be string")
    if "point_id" in schema.names and not pa.types.is_int64(schema.field("point_id").type):
        kind = schema.field("point_id").type
        raise ReneeError(f"{path} has a column 'point_id' of type {kind}; it must be int64")


def _write_piece(plan: _Plan, i: int) -> dict[str, Any]:
    piece, path, replaced = plan.pieces[i], part_path(TEXT_SPLIT, i), 0
    if plan.lines is not None:
        points = np.arange(piece.first, piece.first + piece.rows)
        texts = xmlrepo.texts_of(xmlrepo.read(plan.lines, points))
        tables, replaced = [_tokenised(plan, texts.texts, pa.array(points))], texts.replaced_lines
    else:
        tables = [_tokenised(plan, listed, ids) for listed, ids in _read_group(piece)]
    part = write_part(plan.scratch, path, piece.first, tables)
    return {"part": asdict(part), "replaced_lines": replaced}


def _tokenised(plan: _Plan, texts: list[str], ids: pa.Array) -> pa.Table:
    empty = pa.array([[]] * len(texts), type=pa.list_(pa.int64()))
    columns = {
        "point_id": ids,
        "input_ids": tokenizer.encode(plan.vocabulary, texts, plan.max_length),
        "labels": empty,
        "filter_labels": empty,
    }
    return pa.table(columns, schema=POINTS)


def _read_group(piece: _Piece) -> Iterator[tuple[list[str], pa.Array]]:
    """(texts, point ids) of the row group, some thousand rows at a time."""
    filesystem, root = filesystem_of(piece.path)
    done = 0
    with filesystem.open_input_file(root) as file:
        opened = partial(pq.ParquetFile, file)
        parquet = opened()
        names = [name for name in ("text", "point_id") if name in parquet.schema_arrow.names]
        try:
            check_row_groups(opened, [piece.group], names)
            batches = parquet.iter_batches(PIECE_ROWS, [piece.group], columns=names)
            for batch in batches:
                for name in names:
                    missing = batch[name].is_null().to_numpy(zero_copy_only=False)
                    if missing.any():
                        raise ReneeError(
                            f"{piece.path} has no {name} in row {done + missing.argmax()} of row "
                            f"group {piece.group}; fill it in or leave the row out"
                        )
                numbers = np.arange(piece.first + done, piece.first + done + len(batch))
                ids = batch["point_id"] if "point_id" in names else pa.array(numbers)
                yield batch["text"].to_pylist(), ids
                done += len(batch)
        except ValueError as error:
            raise ReneeError(
                f"{piece.path} cannot be read ({reason(error):.200}) in row group {piece.group}; "
                f"replace it"
            ) from error
    if done != piece.rows:
        raise ReneeError(
            f"{piece.path} has {done} rows in row group {piece.group} and its footer says "
            f"{piece.rows}; replace it"
        )
