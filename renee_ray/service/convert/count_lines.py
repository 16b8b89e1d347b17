"""The lines of text files, counted by tasks, so that any rows can be read from them."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from renee_ray.data.sources.lines import Counted, Lines, Range, count, lines_of, ranges
from renee_ray.service.convert.conversion import Progress, run


def count_lines(paths: list[str], scratch: str, on_progress: Progress) -> dict[str, Lines]:
    """Counts the lines of each file, a task a range of bytes; gzip is unpacked into `scratch`.

    Raises:
        SourceError: as `renee_ray.data.sources.lines.count`.
    """
    by_path = {path: ranges(path, scratch) for path in paths}
    tasks = [each for parts in by_path.values() for each in parts]
    found: dict[tuple[str, int], Counted] = {}
    for result in run(_count, None, tasks, scratch, "files counted, ranges", on_progress):
        found[result["path"], result["start"]] = Counted(**result["counted"])
    return {
        path: lines_of(parts, [found[path, part.start] for part in parts])
        for path, parts in by_path.items()
    }


def _count(shared: None, part: Range) -> dict[str, Any]:
    return {"path": part.path, "start": part.start, "counted": asdict(count(part))}
