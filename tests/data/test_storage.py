"""Where files are, and what is done while they cannot be had."""

from __future__ import annotations

import logging
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from renee_ray.data import storage
from renee_ray.errors import ReneeError

AWAY = (
    "When getting information for key 'd' in bucket 'b': AWS Error NETWORK_CONNECTION during "
    "HeadObject operation: curlCode: 7, Couldn't connect to server"
)
REFUSED = (
    "When getting information for key 'd' in bucket 'b': AWS Error ACCESS_DENIED during "
    "HeadObject operation: No response body."
)


class Flaky:
    """Fails `failures` times with `error`, then answers."""

    def __init__(self, failures: int, error: Exception) -> None:
        self.left, self.error, self.calls = failures, error, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return "answer"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LONGEST_PAUSE_S", 0.01)


def test_filesystems(tmp_path: Path) -> None:
    for path in (str(tmp_path), f"file://{tmp_path}"):
        filesystem, root = storage.filesystem_of(path)
        assert isinstance(filesystem, pafs.LocalFileSystem) and root == str(tmp_path)
    with pytest.raises(ReneeError, match="no filesystem is installed for 'nosuch://x'"):
        storage.filesystem_of("nosuch://x")


@pytest.mark.parametrize("key", ["run#2", "a%20b/part-00%3A00", "my data/é [1]", "a=b&c+d"])
def test_keys_are_what_the_path_says(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    assert storage.filesystem_of(f"s3://bucket/{key}")[1] == f"bucket/{key}"
    assert not storage.overlap("s3://bucket/run#1", "s3://bucket/run#2")
    with pytest.raises(ReneeError, match="carries credentials or parameters"):
        storage.filesystem_of(f"s3://bucket/{key}?region=us-east-1")


def test_urls_of_local_files() -> None:
    for url in ("file:///tmp/a%20b", "file://localhost/tmp/a b", "file:/tmp/a b/"):
        assert storage.absolute(url) == "/tmp/a b"
    with pytest.raises(ReneeError, match="names no file of this machine"):
        storage.absolute("file://elsewhere/tmp")


@pytest.mark.parametrize(
    "error", [OSError(AWAY), ConnectionResetError("reset"), TimeoutError("slow")]
)
def test_what_passes_is_waited_for_and_said_once(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    flaky = Flaky(4, error)
    with caplog.at_level(logging.WARNING):
        assert storage.patiently(flaky, "reading s3://b/d") == "answer"
    assert flaky.calls == 5
    (record,) = caplog.records
    assert record.getMessage() == f"reading s3://b/d: {error}; trying again for 300 s"


def test_an_error_that_a_passing_one_caused_is_waited_for() -> None:
    wrapped = ReneeError("part-00000 cannot be read")
    wrapped.__cause__ = OSError(AWAY)
    assert storage.patiently(Flaky(1, wrapped), "reading") == "answer"


@pytest.mark.parametrize("error", [OSError(REFUSED), FileNotFoundError("gone"), ReneeError("bad")])
def test_what_does_not_pass_is_raised_at_once(error: Exception) -> None:
    flaky = Flaky(1, error)
    with pytest.raises(type(error)):
        storage.patiently(flaky, "reading")
    assert flaky.calls == 1


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(storage.PATIENCE, "0.05")
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        storage.patiently(Flaky(10**6, OSError(AWAY)), "reading")


def test_sentences() -> None:
    refused = str(storage.storage_error(OSError(REFUSED)))
    assert "refuses the credentials" in refused and "AWS_SECRET_ACCESS_KEY" in refused
    assert "NETWORK_CONNECTION" in str(storage.storage_error(OSError(AWAY)))


def test_endpoint_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    filesystem, root = storage.filesystem_of("s3://bucket/some/where/")
    assert root == "bucket/some/where"
    with pytest.raises(OSError, match="NETWORK_CONNECTION") as caught:
        filesystem.get_file_info(root)
    assert storage.is_transient(caught.value)


def test_files_and_directories(tmp_path: Path) -> None:
    path = f"{tmp_path}/a/b"
    assert storage.read_file(f"{path}/c") is None
    assert storage.listing(path) == []
    storage.make_directory(path)
    storage.make_directory(path)
    storage.replace_file(f"{path}/c", b"one")
    storage.replace_file(f"{path}/c", b"two")
    storage.write_file(f"{path}/d", b"three")
    assert storage.read_file(f"{path}/c") == b"two"
    assert sorted(info.base_name for info in storage.listing(path)) == ["c", "d"]
    assert len(storage.listing(str(tmp_path), recursive=True)) == 4
    storage.remove(f"{path}/c")
    assert storage.read_file(f"{path}/c") is None
    for _ in range(2):
        storage.remove(f"{tmp_path}/a")
        assert not Path(tmp_path, "a").exists()
