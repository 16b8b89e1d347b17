"""The documentation: it builds as a site, its links lead somewhere, and its commands exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag

import click
import pytest

from renee_ray.cli.common import ConfiguredCommand
from renee_ray.cli.main import cli
from renee_ray.config.overrides import make_config, parse_overrides, read_yaml
from renee_ray.config.recipes import recipe_names
from renee_ray.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
NOT_RUN = re.compile(r"<!-- not run: .+ -->\n$")


class Page(HTMLParser):
    """What a page of the site links to, and the places in it that can be linked to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.add(value)
            if name == "id" and value:
                self.places.add(value)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert built.returncode == 0, built.stderr
    assert not built.stderr, built.stderr
    return path


def test_every_link_of_the_site_leads_somewhere(site: Path) -> None:
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 20
    dead = []
    for path, page in pages.items():
        base = site if path.name == "404.html" else path.parent
        for link in page.links:
            target, place = urldefrag(link)
            if "://" in target or target.startswith(("data:", "mailto:")):
                continue
            found = site / target.lstrip("/") if target.startswith("/") else base / unquote(target)
            found = path if not target else found.resolve()
            found = found / "index.html" if found.is_dir() else found
            known = pages[found].places if found in pages else set()
            if not found.exists() or (place and place != "__top" and unquote(place) not in known):
                dead.append(f"{path.relative_to(site)}: {link}")
    assert not dead, dead


def test_the_site_asks_no_other_server_for_anything(site: Path) -> None:
    for path in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]* src="(https?:[^"]*)|<link[^>]* href="(https?:[^"]*)',
            path.read_text(encoding="utf-8"),
        )
        assert not loaded, (path, loaded)


def blocks(page: Path) -> Iterator[tuple[int, str, bool]]:
    """Yields (line, commands, whether it is marked as not run) of each block of shell commands."""
    text = page.read_text(encoding="utf-8")
    for found in re.finditer(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        marked = NOT_RUN.search(text[: found.start()]) is not None
        yield text.count("\n", 0, found.start()) + 2, found[1], marked


def commands(text: str) -> Iterator[list[str]]:
    """Yields the arguments of each `renee-ray` in shell commands."""
    text = re.sub(r"(^|\s)#.*", "", text.replace("\\\n", " "), flags=re.MULTILINE)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    for token in [*lexer, ";"]:
        if set(token) <= set(";&|\n"):
            if words and words[0].endswith("renee-ray"):
                yield words[1 : words.index(">") if ">" in words else None]
            words = []
        elif words or token not in ("do", "then"):
            words.append(token)


DOCUMENTED = [
    pytest.param(arguments, id=f"{page.name}:{line}:{' '.join(arguments)[:40]}")
    for page in PAGES
    for line, text, _ in blocks(page)
    for arguments in commands(text)
]


def test_there_are_commands_to_check() -> None:
    assert len(DOCUMENTED) > 20


@pytest.mark.parametrize("arguments", DOCUMENTED)
def test_a_documented_command_exists_with_its_options_and_keys(arguments: list[str]) -> None:
    command: click.Command = cli
    name, rest = "renee-ray", arguments
    while isinstance(command, click.Group):
        name, rest = rest[0], rest[1:]
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    context = command.make_context(name, list(rest))  # wrong options are an error
    overrides = context.params.get("overrides")
    if not isinstance(command, ConfiguredCommand) or overrides is None:
        return
    assert command.keys is not None
    config = context.params.get("config") or ""
    if "=" in config:  # `train data=...` without a configuration
        overrides = (config, *overrides)
    needed = {"data": "data", "output": "output"} if command.keys is RunConfig else {}
    recipe = read_yaml(config) if config in recipe_names() else {}
    given = parse_overrides([word for word in overrides if "$" not in word])
    make_config(command.keys, needed, recipe, given)


def test_a_block_of_commands_is_run_by_a_test_or_says_why_not() -> None:
    """tests/service/test_tutorial.py runs the tutorial and the emoji search."""
    silent = [
        f"{page.name}:{line}"
        for page in PAGES
        if page.name not in ("README.md", "tutorial.md", "emoji-search.md")
        for line, text, marked in blocks(page)
        if "renee-ray" in text and not marked
    ]
    assert not silent, silent
