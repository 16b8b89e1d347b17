"""A dataset directory: schemas, manifest, reading rows by position, writing.

    dataset.json            the manifest; written last, so a directory without it is no dataset
    train/part-*.parquet    POINTS, in the order of a seeded hash of point_id
    validation/, test/      POINTS, ascending point_id
    labels/part-*.parquet   LABELS, ascending label_id, so that a row's position is its label_id

A part is one Parquet file, the unit of shuffling; a large split has about a thousand. Row groups
are small, so that reading a few rows decodes little more than these.
"""

from renee_ray.data.dataset.extended import Extended, hash_of_labels
from renee_ray.data.dataset.manifest import (
    DATASET,
    FORMAT_VERSION,
    MANIFEST,
    DatasetError,
    Manifest,
    Part,
    add_hashes,
    has_manifest,
    hash_labels,
    part_path,
)
from renee_ray.data.dataset.reader import Dataset
from renee_ray.data.dataset.schema import LABELS, MAX_LABELS, POINTS, SPLITS
from renee_ray.data.dataset.writer import write_manifest, write_part
