"""Pages of HTML for people, each a file of its own that loads nothing, and their tables."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from renee_ray.data.storage import absolute, read_file, replace_file
from renee_ray.errors import ReneeError

GENERATOR = "renee_ray report"
NOT_KNOWN = "n/a"


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


@dataclass(frozen=True)
class Cells:
    """A table as text, whose first column names the rows."""

    header: Sequence[str]
    rows: list[list[Cell]]

    @classmethod
    def of(cls, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Cells:
        return cls(header, [[Cell(text) for text in row] for row in rows])

    @classmethod
    def percent(cls, rows: Sequence[Mapping[str, Any]]) -> Cells:
        """Formats rows whose first key names them; columns in order of first appearance."""
        header = list(dict.fromkeys(key for row in rows for key in row))
        if not header:
            return cls([], [])
        # Rounded first: figures that read the same are equally good.
        texts = {
            name: [f"{row[name]:.1f}" if row.get(name) is not None else NOT_KNOWN for row in rows]
            for name in header[1:]
        }
        best = {
            name: max((text for text in column if text != NOT_KNOWN), key=float, default="")
            for name, column in texts.items()
        }
        return cls(
            header,
            [
                [Cell(str(row[header[0]]))]
                + [Cell(texts[name][i], texts[name][i] == best[name]) for name in header[1:]]
                for i, row in enumerate(rows)
            ],
        )


def write_page(path: str, template: str, **values: Any) -> None:
    """Fills in a template of report/templates/ and writes it to `path`, a file or a URL.

    Raises:
        ReneeError: it cannot be written, or a file is there that is no page of ours.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("renee_ray.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = environment.get_template("hover.js.j2").render()
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template(template).render(
        script=Markup(script), script_hash=script_hash, generator=GENERATOR, **values
    )
    path = absolute(path)
    try:
        if GENERATOR.encode() not in (read_file(path) or GENERATOR.encode()):
            raise ReneeError(f"{path} is there and is no report of renee_ray; give another path")
        replace_file(path, page.encode(errors="replace"))
    except OSError as error:
        raise ReneeError(
            f"{path}: the report cannot be written ({error.strerror}); give a writable path"
        ) from error
