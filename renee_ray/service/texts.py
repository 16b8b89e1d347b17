"""Raw texts to predict for, tokenised by Ray Data tasks into a split of points without labels.

    SRC.txt, SRC.txt.gz     a text a line; its point_id is the line's number, from 0
    SRC.parquet, SRC/       one Parquet file, or all of a directory in the order of their names;
                            column `text`, and `point_id` int64 if the row number shall not do

Texts never pass through the driver: it reads line ends and Parquet footers only.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from renee_ray.config import ReneeError
from renee_ray.data import tokenizer, xmlrepo
from renee_ray.data.dataset import (
    POINTS,
    SPLITS,
    Dataset,
    Part,
    absolute,
    filesystem_of,
    part_path,
    write_part,
)
from renee_ray.data.xmlrepo import Lines
from renee_ray.service.tasks import stream

SPLIT = "test"
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
        (a dataset whose split `SPLIT` they are; it has no manifest on disk,
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
    filesystem.create_dir(f"{root}/{SPLIT}", recursive=True)
    plan = _Plan(pieces, lines, scratch, vocabulary.serialised, max_length)
    totals: Counter[str] = Counter()
    for result in stream(_write_piece, plan, len(pieces)):
        totals.update(result)
    parts = tuple(Part(part_path(SPLIT, i), p.rows, p.first) for i, p in enumerate(pieces))
    splits = {name: parts if name == SPLIT else () for name in SPLITS}
    return Dataset(scratch, replace(like.manifest, splits=splits)), totals["replaced_lines"]


def _pieces(src: str, scratch: str) -> tuple[Lines | None, list[_Piece]]:
    filesystem, root = filesystem_of(src)
    kind = filesystem.get_file_info(root).type
    if kind == pafs.FileType.File and src.endswith((".txt", ".txt.gz")):
        scratch_filesystem, scratch_root = filesystem_of(scratch)
        scratch_filesystem.create_dir(scratch_root, recursive=True)
        lines = xmlrepo.index(src, f"{scratch}/unpacked.txt")
        cuts = range(0, lines.rows, PIECE_ROWS)
        return lines, [_Piece(at, min(PIECE_ROWS, lines.rows - at)) for at in cuts]
    if kind == pafs.FileType.File and src.endswith(".parquet"):
        return None, _row_groups([src])
    if kind == pafs.FileType.Directory:
        found = filesystem.get_file_info(pafs.FileSelector(root))
        names = sorted(info.base_name for info in found if info.base_name.endswith(".parquet"))
        if names:
            return None, _row_groups([f"{src.rstrip('/')}/{name}" for name in names])
    raise ReneeError(
        f"{src} is neither a dataset directory nor texts: give a .txt or .txt.gz file with a text "
        f"a line, or Parquet with a column 'text'"
    )


def _row_groups(paths: list[str]) -> list[_Piece]:
    pieces: list[_Piece] = []
    first = 0
    for path in paths:
        filesystem, root = filesystem_of(path)
        try:
            with filesystem.open_input_file(root) as file:
                footer = pq.ParquetFile(file)
                schema, metadata = footer.schema_arrow, footer.metadata
        except pa.ArrowInvalid as error:
            raise ReneeError(f"{path} is not Parquet ({error}); replace it") from None
        _check_columns(path, schema)
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            if rows:
                pieces.append(_Piece(first, rows, path, group))
            first += rows
    return pieces


def _check_columns(path: str, schema: pa.Schema) -> None:
    wanted = {"text": (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)}
    if "point_id" in schema.names:
        wanted["point_id"] = (pa.types.is_int64,) * 3
    for name, kinds in wanted.items():
        if name not in schema.names:
            raise ReneeError(f"{path} has no column {name!r} but {schema.names}; rename the texts'")
        if not any(is_kind(schema.field(name).type) for is_kind in kinds):
            raise ReneeError(
                f"{path} has a column {name!r} of type {schema.field(name).type}; "
                f"it must be {'string' if name == 'text' else 'int64'}"
            )


def _write_piece(plan: _Plan, i: int) -> dict[str, Any]:
    piece = plan.pieces[i]
    points = np.arange(piece.first, piece.first + piece.rows)
    replaced = 0
    if plan.lines is not None:
        texts = xmlrepo.texts_of(xmlrepo.read(plan.lines, points))
        listed, replaced = texts.texts, texts.replaced_lines
        ids = pa.array(points)
    else:
        listed, ids = _read_group(piece, points)
    empty = pa.array([[]] * piece.rows, type=pa.list_(pa.int64()))
    columns = {
        "point_id": ids,
        "input_ids": tokenizer.encode(plan.vocabulary, listed, plan.max_length),
        "labels": empty,
        "filter_labels": empty,
    }
    write_part(plan.scratch, part_path(SPLIT, i), pa.table(columns, schema=POINTS))
    return {"replaced_lines": replaced}


def _read_group(piece: _Piece, points: np.ndarray) -> tuple[list[str], pa.Array]:
    filesystem, root = filesystem_of(piece.path)
    with filesystem.open_input_file(root) as file:
        parquet = pq.ParquetFile(file)
        names = [name for name in ("text", "point_id") if name in parquet.schema_arrow.names]
        table = parquet.read_row_group(piece.group, columns=names)
    for name in names:
        missing = table[name].combine_chunks().is_null().to_numpy(zero_copy_only=False)
        if missing.any():
            raise ReneeError(
                f"{piece.path} has no {name} in row {missing.argmax()} of row group {piece.group}; "
                f"fill it in or leave the row out"
            )
    ids = table["point_id"].combine_chunks() if "point_id" in names else pa.array(points)
    return table["text"].to_pylist(), ids
