"""Hostile configurations, and secrets in arguments."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from renee_ray.cli.main import main
from renee_ray.errors import redacted

from .parts import tiny
from .place import SECRET, Case, Made, Place, refused


def config(content: str | bytes) -> Callable[[Place], Made]:
    def make(place: Place) -> Made:
        file = place.given / "recipe.yaml"
        raw = content.encode() if isinstance(content, str) else content
        file.write_bytes(raw.replace(b"COMMAND", place.command().encode()))
        return ["train", str(file)]

    return make


def override(*arguments: str) -> Callable[[Place], Made]:
    def make(place: Place) -> Made:
        filled = [each.replace("COMMAND", place.command()) for each in arguments]
        return ["train", *config("data: a\noutput: b\n")(place)[1:], *filled]  # type: ignore[index]

    return make


CONFIGS = [
    Case(
        "yaml-python-object",
        config("data: !!python/object/apply:os.system ['COMMAND']\n"),
        "line 1 is wrong: input should be a valid string",
    ),
    Case("yaml-not-utf-8", config(b"data: \xff\xfe\n"), "is not in UTF-8"),
    Case("yaml-nested", config("[" * 10**5), "is not valid YAML"),
    Case("yaml-key-twice", config("data: a\ndata: b\n"), "has the key 'data' twice"),
    Case("yaml-unknown-key", config('data: a\noutput: b\n"\\e[2J": 1\n'), "has no key"),
    Case("yaml-many-digits", config("seed: " + "9" * 10**5), "lacks 'data'|seed='999"),
    Case("yaml-not-a-number", config("data: a\noutput: b\nwarmup: .nan\n"), "warmup='.nan'"),
    Case(
        "yaml-infinite",
        config("data: a\noutput: b\nencoder: {learning_rate: .inf}\n"),
        "learning_rate='.inf'",
    ),
    Case(
        "yaml-value-long",
        config(f"data: a\noutput: b\nseed: {'x' * 10**5}\n"),
        "seed='xxx.* is wrong",
    ),
    Case("override-dunder", override("__class__.__init__.__globals__=1"), "has no key '__class__'"),
    Case(
        "override-python-object",
        override("num_workers=[!!python/object/apply:os.system ['COMMAND']]"),
        "is wrong",
    ),
]


KEYS = f"s3://AKIAXXXX:{SECRET}/+x@bucket/set"
QUERY = f"s3://bucket/set?secret_key={SECRET}"
SECRETS = [
    Case("url-keys-data", override(f"data={KEYS}"), "put credentials in the environment"),
    Case(
        "url-keys-output",
        lambda place: [
            "train",
            *config("seed: 1\n")(place)[1:],
            f"data={tiny(place)}",
            f"output={KEYS}",
        ],
        "put credentials in the environment",
    ),  # type: ignore[index]
    Case(
        "url-keys-source",
        lambda place: ["convert", KEYS, "dst"],
        "put credentials in the environment",
    ),
    Case(
        "url-keys-destination",
        lambda place: ["convert", "src", KEYS],
        "put credentials in the environment",
    ),
    Case(
        "url-keys-run",
        lambda place: ["evaluate", KEYS, "data"],
        "put credentials in the environment",
    ),
    Case(
        "url-keys-predictions",
        lambda place: ["predict", "run", "data", KEYS],
        "put credentials in the environment",
    ),
    Case("url-keys-export", lambda place: ["export", "run", KEYS], "put credentials|is not a run"),
    Case(
        "url-keys-inspect", lambda place: ["inspect", QUERY], "put credentials in the environment"
    ),
    Case(
        "url-keys-in-an-error",
        lambda place: ["quickstart", f"output={KEYS}"],
        r"s3://\*\*\*@bucket",
    ),
]


def test_usage_errors_show_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "a", KEYS]) == 2
    assert SECRET not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"{KEYS} is gone", "s3://***@bucket/set is gone"),
        (f"cannot read '{QUERY}&x=1'", "cannot read 's3://bucket/set?secret_key=***&x=1'"),
        ("abfs://container@account.net/x", "abfs://container@account.net/x"),
        ("a: b@c", "a: b@c"),
    ],
)
def test_redacted(text: str, shown: str) -> None:
    assert redacted(text) == shown


CASES = [*CONFIGS, *SECRETS]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_refused(case: Case, place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    refused(case, place, capsys)
