"""Hostile sources and destinations."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial

import pytest

from renee_ray.data.dataset import MAX_LABELS
from renee_ray.data.destination import Destination
from renee_ray.data.sources import xmlrepo
from renee_ray.data.sources.lines import MAX_LINE_BYTES, REQUEST_BYTES, Lines
from renee_ray.data.sources.repository import find_repository, header_of

from .parts import run_directory, tiny
from .place import Case, Made, Place, refused


def source_file(
    name: str, content: bytes, read: Callable[[str], object]
) -> Callable[[Place], Made]:
    def make(place: Place) -> Made:
        (place.given / name).write_bytes(content)
        return lambda: read(str(place.given / name))

    return make


def long_line(place: Place) -> Made:
    path = place.given / "trn_X.txt"
    with open(path, "wb") as file:
        file.write(b"first\n")
        file.truncate(MAX_LINE_BYTES + REQUEST_BYTES)
    return lambda: Lines(str(path)).drain()


def lines(parse: Callable[..., object]) -> Callable[[str], object]:
    return lambda path: parse(list(Lines(path)), lambda i: f"{path}:{i + 1}")


def filtered(place: Place) -> Made:
    files = {
        "trn_X": "a\n", "trn_X_Y": "0:1\n", "trn_filter_labels": "1000000000000000000 1\n"
    }  # fmt: skip
    for name, line in files.items():
        (place.given / f"{name}.txt").write_text(line)
    return lambda: list(find_repository(str(place.given)).pieces("train", []))  # type: ignore[union-attr]


def header(path: str) -> object:
    return header_of(path, path)


PAIR = partial(xmlrepo.parse_pairs, limit=MAX_LABELS)
OBJECT = partial(xmlrepo.parse_objects, limit=3)
SOURCES = [
    Case("line-long", long_line, "trn_X.txt:2: the line is longer than"),
    Case(
        "label-id-huge",
        source_file("y.txt", b"1000000000000000000:1\n", lines(PAIR)),
        "is out of range",
    ),
    Case(
        "label-id-of-many-digits",
        source_file("y.txt", b"9" * 10**5 + b":1\n", lines(PAIR)),
        "is out of range",
    ),
    Case(
        "label-header-huge",
        source_file("y.txt", b"1 4611686018427387904\n0:1\n", header),
        "above the limit",
    ),
    Case(
        "label-header-of-many-digits",
        source_file("y.txt", b"1 " + b"9" * 10**5 + b"\n", lines(PAIR)),
        "is out of range",
    ),
    Case(
        "filter-row-huge",
        filtered,
        "is out of range",
    ),
    Case(
        "json-nested",
        source_file("j.json", b'{"title": ' + b"[" * 10**5, lines(OBJECT)),
        "bad JSON",
    ),
    Case(
        "json-target-huge",
        source_file(
            "j.json", b'{"title": "a", "target_ind": [' + b"9" * 5000 + b"]}", lines(OBJECT)
        ),
        "bad JSON|out of range",
    ),
]


def predicted_into(destination: str) -> Callable[[Place], Made]:
    def make(place: Place) -> Made:
        dataset = tiny(place)
        run = run_directory(place, dataset)
        (place.given / "link").symlink_to(dataset)
        return ["predict", str(run), str(dataset), str(place.given / destination)]

    return make


def claimed(place: Place) -> Made:
    from renee_ray.service.score.export import EXPORT

    path = place.given / "home"
    (path / "thesis").mkdir(parents=True)
    (path / "thesis" / "thesis.tex").write_text("years of work")
    manifest = {"format_version": 1, "step": 1, "ranges": []}
    (path / "export.json").write_text(json.dumps(manifest))
    return lambda: Destination(str(path), EXPORT, overwrite=True).check()


DESTINATIONS = [
    Case("predictions-in-the-source", predicted_into("set/predictions"), "one is in the other"),
    Case(
        "predictions-in-the-source-by-a-link",
        predicted_into("link/predictions"),
        "one is in the other",
    ),
    Case("predictions-over-the-source", predicted_into("."), "one is in the other"),
    Case("export-over-other-files", claimed, r"home holds other files \('thesis'\)"),
]

CASES = [*SOURCES, *DESTINATIONS]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    refused(case, place, capsys)
