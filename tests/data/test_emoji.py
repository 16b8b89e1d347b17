"""The example dataset EmojiSearch-1.5K: the script that makes it, and the shipped archive."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import pytest

from tests import make_emoji as emoji

ARCHIVE = emoji.LICENCE.with_name(f"{emoji.NAME}.tar.gz")
SYMBOLS = {
    "{": ("open curly bracket", "brace | bracket"),
    "🏿": ("dark skin tone", "skin tone | type 6"),
    "🎂": ("birthday cake", "birthday | cake | celebration | dessert"),
    "🎉": ("party popper", "celebration | party | popper | tada | !"),
    "🍰": ("shortcake", "Cake | dessert | pastry | slice | sweet"),
    "🈺": ("Japanese “open for business” button", "“open for business” | 営"),
    "🐭": ("mouse face", "face | mouse"),
    "🐁": ("mouse", "mouse | rodent\N{RIGHT SINGLE QUOTATION MARK}s"),
}


@pytest.fixture
def english(tmp_path: Path) -> Path:
    rows = "".join(
        f'<annotation cp="{symbol}">{keywords}</annotation>'
        f'<annotation cp="{symbol}" type="tts">{name}</annotation>'
        for symbol, (name, keywords) in SYMBOLS.items()
    )
    path = tmp_path / "en.xml"
    path.write_text(f"<ldml><annotations>{rows}</annotations></ldml>", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def shipped() -> dict[str, str]:
    return unpacked(ARCHIVE.read_bytes())


def unpacked(archive: bytes) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {
            member.name.removeprefix(f"{emoji.NAME}/"): file.read().decode()
            for member in tar.getmembers()
            if (file := tar.extractfile(member)) is not None
        }


def points(files: Mapping[str, str], prefix: str) -> list[tuple[str, set[int]]]:
    """The queries of a split and their labels."""
    texts = files[f"{prefix}_X.txt"].splitlines()
    header, *rows = files[f"{prefix}_X_Y.txt"].splitlines()
    assert header == f"{len(texts)} {len(files['Y.txt'].splitlines())}"
    labels = [{int(pair.split(":")[0]) for pair in row.split()} for row in rows]
    return list(zip(texts, labels, strict=True))


def test_only_emoji_are_labels_and_keywords_are_as_people_type_them(english: Path) -> None:
    found = {each.character: each for each in emoji.read_emoji(english)}
    assert list(found) == ["🎂", "🎉", "🍰", "🈺", "🐭", "🐁"]
    assert found["🈺"].name == "japanese open for business button"
    assert found["🈺"].keywords == {"open for business", found["🈺"].name}
    assert found["🐁"].keywords == {"mouse", "rodent's"}
    assert "cake" in found["🍰"].keywords and "!" not in found["🎉"].keywords


def test_a_query_fits_all_emoji_with_its_keywords(english: Path) -> None:
    known = emoji.read_emoji(english)
    queries = list(emoji.make_queries(known))
    for query in queries:
        fits = [i for i, each in enumerate(known) if set(query.keywords) <= each.keywords]
        assert query.labels == tuple(fits) and query.text == " ".join(query.keywords)
    words = [frozenset(query.text.split()) for query in queries]
    assert len(set(words)) == len(words)
    texts = {query.text for query in queries}
    assert {each.name for each in known} <= texts
    assert "mouse face" in texts and "face mouse" not in texts, "a name in another order"
    cake = {frozenset(q.keywords) for q in queries if 0 in q.labels and len(q.keywords) > 1}
    pairs = combinations(["birthday", "cake", "celebration", "dessert"], 2)
    assert len(cake & set(map(frozenset, pairs))) >= emoji.MOST[2]


def test_what_fits_too_many_emoji_is_no_query() -> None:
    many = [
        emoji.Emoji(chr(0x1F600 + i), f"name {i}", frozenset({"face", f"kind{i}", f"name {i}"}))
        for i in range(emoji.MAX_LABELS + 1)
    ]
    assert "face" in {query.text for query in emoji.make_queries(many[1:])}
    found = list(emoji.make_queries(many))
    assert "face" not in {query.text for query in found}
    assert {"face", "kind3"} in [set(query.keywords) for query in found]


def test_test_keywords_are_in_no_training_query(english: Path) -> None:
    known = emoji.read_emoji(english)
    names = {each.name for each in known}
    queries = list(emoji.make_queries(known))
    for test_fold in range(emoji.FOLDS):
        train, test = emoji.split(queries, names, test_fold)
        trained = {keyword for query in train for keyword in query.keywords}
        for query in test:
            assert any(k not in trained and emoji.fold(k) == test_fold for k in query.keywords)
        assert names <= {query.text for query in train}
        if test_fold == emoji.TEST_FOLD:
            assert len(train) + len(test) == len(queries)
        else:  # for choosing settings: what the test set knows is in neither
            used = {k for query in (*train, *test) for k in query.keywords} - names
            assert emoji.TEST_FOLD not in {emoji.fold(keyword) for keyword in used}


def test_the_same_source_gives_the_same_bytes(english: Path) -> None:
    files = emoji.make_files(english)
    assert emoji.pack(files) == emoji.pack(emoji.make_files(english))
    assert unpacked(emoji.pack(files)) == files
    assert emoji.make_files(english, 1)["tst_X.txt"] != files["tst_X.txt"]


def test_the_shipped_archive_is_whole_and_has_its_licence(shipped: dict[str, str]) -> None:
    about = json.loads(shipped["meta.json"])
    for name, digest in about["sha256"].items():
        assert emoji.order(shipped[name]) == digest
    assert set(shipped) == {*about["sha256"], "meta.json", "LICENSE"}
    assert shipped["LICENSE"] == emoji.LICENCE.read_text(encoding="utf-8")
    assert "Copyright © 1991-2022 Unicode, Inc." in shipped["LICENSE"]
    assert about["test_fold"] == emoji.TEST_FOLD


def test_no_query_is_in_two_splits_in_whatever_order(shipped: dict[str, str]) -> None:
    train, test = points(shipped, "trn"), points(shipped, "tst")
    assert (len(train), len(test)) == (5188, 1692), "as the data card says"
    words = [frozenset(text.split()) for text, _ in (*train, *test)]
    assert len(set(words)) == len(words)
    names = shipped["Y.txt"].splitlines()
    assert len(names) == len(shipped["Y.emoji.txt"].splitlines()) == 1532
    trained = {label for _, labels in train for label in labels}
    assert trained == set(range(len(names)))
    assert not {frozenset(name.split()) for name in names} & set(words[len(train) :])
    found = dict(test)
    assert [names[label] for label in found["birthday"]] == ["birthday cake"]
