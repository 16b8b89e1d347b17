"""The configuration of `renee-ray index`."""

from __future__ import annotations

from pydantic import Field

from renee_ray.config.score import Chosen


class IndexConfig(Chosen):
    """`renee-ray index MODEL`"""

    output: str = ""
    """Directory of the index; empty: MODEL-index, where `search=index` looks for it; symbolic links
    of MODEL are followed."""
    factory: str = ""
    """FAISS factory string of a range, as HNSW32,SQ8: a flat, HNSW or IVF index; empty: chosen by
    the number of labels of a range."""
    ranges: int = Field(0, ge=0)
    """Label ranges, each with a file of its own and built by a task of its own; 0: as many as a
    run has workers, or more so that none has more than 20,000,000 labels."""
    candidates: int = Field(10, ge=1)
    """Labels of each range that are scored again with the true weights, for each one asked for."""
    recall: float = Field(0.95, gt=0, le=1)
    """Share of the exact 10 best labels to find: the least search effort that does so is kept."""
    points: str = ""
    """Dataset whose validation points (training points where it has none) recall is measured on;
    empty: the one that a run was trained on. An export needs it."""
    sample: int = Field(1000, ge=1)
    """Points that recall is measured on."""
    overwrite: bool = False
    """Replace an index that is already at `output`; ranges whose labels are the same are kept."""
