"""The checkpoints of a run, for people and as JSON."""

from __future__ import annotations

import time
from typing import Any

from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from renee_ray.checkpoint.registry import Checkpoints, Found, place_of_best
from renee_ray.checkpoint.state import CheckpointError


def list_checkpoints(run: str, *, verify: bool) -> list[dict[str, Any]]:
    """Describes every committed checkpoint of `run`, the newest first.

    Args:
        verify: reads all of them and compares checksums; without it, files and their sizes.

    Returns:
        for each: name, revision (of the labels), step, bytes, files, workers (that wrote it),
        time_s (of its commit), metrics, problem (None: there is none).
    """
    return [_described(found, verify) for found in Checkpoints(run).found()]


def _described(found: Found, verify: bool) -> dict[str, Any]:
    described = {
        "name": found.name, "revision": found.revision, "step": found.step,
        "problem": found.problem,
    }  # fmt: skip
    if found.checkpoint is None:
        return described
    manifest = found.checkpoint.manifest
    if verify and found.problem is None:
        try:
            found.checkpoint.verify()
        except CheckpointError as error:
            described["problem"] = str(error)
    return described | {
        "bytes": manifest.size,
        "files": len(manifest.files),
        "workers": len(list(manifest.shards())),
        "time_s": manifest.time_s,
        "metrics": manifest.metrics,
    }


def checkpoint_table(rows: list[dict[str, Any]], metric: str, verified: bool) -> Table:
    """Shows the list for a terminal; the best by `metric` is marked."""
    place = place_of_best(
        [
            (row["revision"], row["step"], row.get("metrics", {}).get(metric), not row["problem"])
            for row in rows
        ]
    )
    best = None if place is None else rows[place]
    longest = max((len(row["name"]) for row in rows), default=0)
    numbers = (Column(name, justify="right") for name in ("size", "workers", "written", metric))
    table = Table(
        Column("checkpoint", no_wrap=True, min_width=longest),
        *numbers,
        "verified" if verified else "sizes",
    )
    for row in rows:
        score = row.get("metrics", {}).get(metric)
        words = ["" if score is None else f"{score:.2f}", "best" if row is best else ""]
        written = time.strftime("%Y-%m-%d %H:%M", time.localtime(row.get("time_s", 0)))
        table.add_row(
            row["name"],
            decimal(row["bytes"]) if "bytes" in row else "",
            str(row.get("workers", "")),
            written if "time_s" in row else "",
            " ".join(filter(None, words)),
            Text(row["problem"], style="red") if row["problem"] else "ok",
        )
    return table
