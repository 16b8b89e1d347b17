"""Makes EmojiSearch-1.5K.tar.gz, an example dataset, from the emoji keywords of Unicode CLDR.

    python -m tests.make_emoji CLDR/common/annotations/en.xml DIRECTORY

EmojiSearch-1.5K.md, beside this file, describes queries, labels and the split. All choices that
look random are hashes of the texts, so the same input gives the same files.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import regex  # knows, unlike the standard library, which characters are emoji

import renee_ray.examples

NAME = "EmojiSearch-1.5K"
LICENCE = Path(renee_ray.examples.__path__[0], f"{NAME}.LICENSE")
MAX_LABELS = 50
"""A query that fits more emoji than these says too little: face, man, woman."""
MOST = {2: 4, 3: 2}
"""Queries that are made of so many keywords of an emoji, by the number of keywords."""
FOLDS, TEST_FOLD = 5, 0


@dataclass(frozen=True)
class Emoji:
    character: str
    name: str
    keywords: frozenset[str]


@dataclass(frozen=True)
class Query:
    """keywords: what must all fit an emoji; labels: the emoji that they fit, ascending."""

    text: str
    keywords: tuple[str, ...]
    labels: tuple[int, ...]


TYPED = str.maketrans("\N{RIGHT SINGLE QUOTATION MARK}", "'", "“”")


def typed(text: str) -> str:
    """Returns a keyword as people type it: in lower case, with plain apostrophes, unquoted."""
    return " ".join(text.lower().translate(TYPED).split())


def read_emoji(annotations: Path) -> list[Emoji]:
    """Reads the emoji of a CLDR file, in its order; its other symbols are left out.

    So are skin tones and hair as such (Emoji_Component). Keywords without a letter or digit of
    ASCII are dropped. An emoji's name is one of its keywords.
    """
    names: dict[str, str] = {}
    keywords: dict[str, str] = {}
    for each in ElementTree.parse(annotations).getroot().iter("annotation"):
        (names if each.get("type") == "tts" else keywords)[each.get("cp", "")] = each.text or ""
    found = []
    for character, name in names.items():
        if not regex.match(r"[\p{Emoji}--\p{Emoji_Component}]", character, regex.V1):
            continue
        words = {typed(word) for word in keywords.get(character, "").split("|")}
        kept = {word for word in words if regex.search("[a-z0-9]", word)}
        found.append(Emoji(character, typed(name), frozenset(kept | {typed(name)})))
    return found


def order(text: str) -> str:
    """Returns what texts are sorted by, and divided into folds, as if at random."""
    return hashlib.sha256(text.encode()).hexdigest()


def fold(keyword: str) -> int:
    return int(order(keyword), 16) % FOLDS


def make_queries(emoji: list[Emoji]) -> Iterator[Query]:
    """Yields the queries: names, single keywords, then pairs and triples of keywords of one emoji.

    Its name is not in these, as the rest of the query would add nothing. No two queries have the
    same set of words: the first one counts.
    """
    fitting: dict[str, set[int]] = {}
    for label, each in enumerate(emoji):
        for keyword in each.keywords:
            fitting.setdefault(keyword, set()).add(label)
    wanted: list[tuple[str, ...]] = [(each.name,) for each in emoji]
    wanted += [(keyword,) for keyword in sorted(fitting)]
    for count, most in MOST.items():
        for each in emoji:
            several = [
                tuple(sorted(chosen, key=order))
                for chosen in combinations(sorted(each.keywords - {each.name}), count)
                if len(set(words := " ".join(chosen).split())) == len(words)
            ]
            wanted += sorted(several, key=lambda chosen: order(" ".join(chosen)))[:most]
    seen = set()
    for keywords in wanted:
        text = " ".join(keywords)
        labels = set.intersection(*(fitting[keyword] for keyword in keywords))
        unordered = frozenset(text.split())
        if len(labels) <= MAX_LABELS and unordered not in seen:
            seen.add(unordered)
            yield Query(text, keywords, tuple(sorted(labels)))


def split(
    queries: list[Query], names: set[str], test_fold: int = TEST_FOLD
) -> tuple[list[Query], list[Query]]:
    """Splits the queries into (training, test), each in an order that looks random.

    The keywords of a fold, other than names of emoji, are new to whoever trains: every query with
    such a keyword is a test query. With a test fold other than TEST_FOLD, for choosing settings,
    all queries with a keyword of TEST_FOLD are dropped.
    """

    def folds(query: Query) -> set[int]:
        return {fold(keyword) for keyword in query.keywords if keyword not in names}

    left = [q for q in queries if test_fold == TEST_FOLD or TEST_FOLD not in folds(q)]
    left.sort(key=lambda query: order(query.text))
    test = [query for query in left if test_fold in folds(query)]
    return [query for query in left if test_fold not in folds(query)], test


def make_files(annotations: Path, test_fold: int = TEST_FOLD) -> dict[str, str]:
    """Returns the dataset's files: texts by name, in the form of the Extreme Classification
    Repository."""
    emoji = read_emoji(annotations)
    train, test = split(list(make_queries(emoji)), {each.name for each in emoji}, test_fold)
    files = {
        "Y.txt": lines(each.name for each in emoji),
        "Y.emoji.txt": lines(each.character for each in emoji),
    }
    for prefix, queries in ("trn", train), ("tst", test):
        rows = (" ".join(f"{label}:1.00000" for label in each.labels) for each in queries)
        files[f"{prefix}_X.txt"] = lines(each.text for each in queries)
        files[f"{prefix}_X_Y.txt"] = f"{len(queries)} {len(emoji)}\n{lines(rows)}"
    about = {
        "name": NAME,
        "source": "Unicode CLDR, common/annotations/en.xml",
        "source_sha256": hashlib.sha256(annotations.read_bytes()).hexdigest(),
        "max_labels": MAX_LABELS,
        "queries_of_several_keywords": MOST,
        "folds": FOLDS,
        "test_fold": test_fold,
        "sha256": {name: order(text) for name, text in sorted(files.items())},
    }
    return files | {
        "meta.json": json.dumps(about, indent=1) + "\n",
        "LICENSE": LICENCE.read_text(encoding="utf-8"),
    }


def lines(texts: Iterator[str]) -> str:
    return "".join(f"{text}\n" for text in texts)


def pack(files: Mapping[str, str]) -> bytes:
    """Packs the files as NAME/...; the same files give the same bytes."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for name, text in sorted(files.items()):
            member = tarfile.TarInfo(f"{NAME}/{name}")
            member.size = len(content := text.encode())
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


if __name__ == "__main__":
    made = pack(make_files(Path(sys.argv[1])))
    (Path(sys.argv[2]) / f"{NAME}.tar.gz").write_bytes(made)
