"""Writes the files of a dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from renee_ray.data.dataset.manifest import MANIFEST, Manifest, Part
from renee_ray.data.storage import make_directory, replace_file, write_file

ROW_GROUP_ROWS = 2048
"""Rows that are decoded together: reading a few rows decodes no more of a part than these."""


def write_part(path: str, relative: str, first: int, tables: pa.Table | Iterable[pa.Table]) -> Part:
    """Writes one part file under the dataset directory `path`, whose rows begin at `first`.

    Its pages carry checksums, which reading verifies.
    """
    table = tables if isinstance(tables, pa.Table) else pa.concat_tables(tables)
    buffer = pa.BufferOutputStream()
    pq.write_table(
        table, buffer, compression="zstd", row_group_size=ROW_GROUP_ROWS, write_page_checksum=True
    )
    content = buffer.getvalue()
    write_file(f"{path.rstrip('/')}/{relative}", content)
    return Part(relative, len(table), first, content.size, hashlib.sha256(content).hexdigest())


def write_manifest(path: str, manifest: Manifest) -> None:
    """Publishes `manifest` at `path`: readers see all of dataset.json or none."""
    make_directory(path)
    replace_file(f"{path.rstrip('/')}/{MANIFEST}", manifest.to_json().encode())
