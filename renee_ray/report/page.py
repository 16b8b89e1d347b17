"""Pages of HTML for people, each a file of its own that loads nothing, and their tables."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from renee_ray.data.storage import absolute, read_file, replace_file
from renee_ray.errors import ReneeError

GENERATOR = '<meta name="generator" content="renee_ray report">'
NOT_KNOWN = "n/a"


def percentages(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Formats rows whose first key names them; columns in order of first appearance.

    Returns:
        "header" and "rows", lists of texts, and "best", the (row, column) of each best figure.
    """
    header = list(dict.fromkeys(key for row in rows for key in row))
    texts = [
        [f"{row[key]:.1f}" if row.get(key) is not None else NOT_KNOWN for key in header[1:]]
        for row in rows
    ]
    best = set()
    for column, found in enumerate(zip(*texts, strict=True), start=1):
        # Rounded first: figures that read the same are equally good.
        top = max((text for text in found if text != NOT_KNOWN), key=float, default=None)
        best |= {(i, column) for i, text in enumerate(found) if text == top}
    names = [[str(row[header[0]])] for row in rows]
    named = [[*a, *b] for a, b in zip(names, texts, strict=True)]
    return {"header": header, "rows": named, "best": best}


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
        script=Markup(script), script_hash=script_hash, generator=Markup(GENERATOR), **values
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
