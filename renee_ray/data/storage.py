"""Filesystems of paths and URLs, with retries while storage does not answer.

Endpoint, region and credentials of S3 come from the environment (AWS_ENDPOINT_URL, AWS_REGION,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, or other sources of the AWS SDK); none is ever logged.
"Patiently" below means: with retries of transient errors, as `patiently` does.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import quote, unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import tenacity

from renee_ray.errors import ReneeError, reason

T = TypeVar("T")

log = logging.getLogger(__name__)

PATIENCE = "RENEE_RAY_STORAGE_PATIENCE_S"
PATIENCE_S = 300.0
"""Seconds of retries before a run fails, unless the environment says otherwise."""
LONGEST_PAUSE_S = 5.0
SEEN_S = 120.0
"""Seconds within which what one node has written is seen by all: NFS keeps listings for a while."""
SDK_ATTEMPTS = 2
"""Attempts of the S3 client itself, below our own retries."""
TRANSIENT = (
    "NETWORK_CONNECTION",
    "SLOW_DOWN",
    "SERVICE_UNAVAILABLE",
    "INTERNAL_FAILURE",
    "REQUEST_TIMEOUT",
    "THROTTLING",
    "HTTP status 50",
)
"""Words in the S3 client's messages on transient errors."""
REFUSED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "HTTP status 403")


def absolute(path: str) -> str:
    """Makes `path` absolute, so that a process with another working directory finds it too.

    Raises:
        ReneeError: it is a URL with credentials or parameters in it, or of another host's file.
    """
    if "\0" in path:
        raise ReneeError(f"{path!r:.200} is no path: it holds a zero byte")
    if path.startswith("file:"):
        match = re.fullmatch(r"file:(?://(?:localhost)?)?(/(?!/).*)", path)
        if match is None:
            raise ReneeError(f"{path!r:.200} names no file of this machine; give its path alone")
        return os.path.abspath(unquote(match[1]))
    if "://" in path:
        _refuse_credentials(path)
        scheme, _, rest = path.partition("://")
        return f"{scheme}://{rest.rstrip('/') or rest}"
    return os.path.abspath(os.path.expanduser(path))


def _refuse_credentials(url: str) -> None:
    """Refuses credentials in a URL: they would be in `ps`, run.json, manifests and errors."""
    scheme = url.partition("://")[0]
    try:
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        # A slash in an unquoted secret ends the host's part early.
        plain = not host.partition(":")[2] or host.startswith("[") or parts.port is not None
        hidden = ":" in user or not plain or "?" in url
        hidden = hidden or (scheme in ("s3", "s3a") and bool(set("@:") & set(parts.netloc)))
    except ValueError:
        hidden = True
    if hidden:
        raise ReneeError(
            f"a path that begins with {scheme:.20}:// carries credentials or parameters; put "
            f"credentials in the environment, where no log and no manifest shows them, and "
            f"AWS_REGION and AWS_ENDPOINT_URL beside them"
        )


def filesystem_of(path: str) -> tuple[pafs.FileSystem, str]:
    """Returns the filesystem of a path or URL, and the path on it.

    pyarrow's own filesystem where there is one (local, s3://, gs://, hdfs://, abfs://),
    otherwise fsspec's.

    Raises:
        ReneeError: nothing installed knows the URL's scheme.
    """
    path = absolute(path)
    scheme, separator, rest = path.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), path
    host, slash, key = rest.partition("/")
    try:
        if scheme == "hf" or scheme.startswith("fsspec"):
            raise pa.ArrowInvalid("pyarrow would hand the quoted path to fsspec")
        # Unquoted, a # would end the path, and a % begin a character.
        filesystem, root = pafs.FileSystem.from_uri(f"{scheme}://{host}{slash}{quote(key)}")
        if isinstance(filesystem, pafs.S3FileSystem):
            filesystem = _s3(filesystem.region)
        return filesystem, root.rstrip("/")
    except pa.ArrowInvalid:
        pass
    import fsspec

    try:
        remote, root = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise ReneeError(
            f"no filesystem is installed for {path!r:.200} ({reason(error)}); use a local path, or "
            f"install the fsspec package of {scheme}://"
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(remote)), root.rstrip("/")


def overlap(one: str, other: str) -> bool:
    """Whether two paths or URLs are the same, or one is in the other; links are followed."""
    (kind, first), (other_kind, second) = _place(one), _place(other)
    return kind == other_kind and (first.startswith(second) or second.startswith(first))


def _place(path: str) -> tuple[str, str]:
    filesystem, root = filesystem_of(path)
    local = isinstance(filesystem, pafs.LocalFileSystem)
    real = os.path.realpath(root) if local else posixpath.normpath(root)
    return filesystem.type_name, f"{real.rstrip('/')}/"


def usual_patience() -> float:
    """Returns the seconds for which storage that does not answer is tried again."""
    return float(os.environ.get(PATIENCE, PATIENCE_S))


def awaited(look: Callable[[], T]) -> T:
    """Returns what `look` does, once that is true or after SEEN_S."""
    ends = time.monotonic() + SEEN_S
    while not (found := look()) and time.monotonic() < ends:
        time.sleep(SEEN_S / 60)
    return found


def patiently(operation: Callable[[], T], what: str, patience: float | None = None) -> T:
    """Calls `operation`, with retries while storage does not answer; logs the first retry.

    Args:
        operation: starts from the beginning each time it is called.
        what: for the log, as "reading FILE".
        patience: seconds; None: as the environment says, or PATIENCE_S.

    Raises:
        OSError: not transient, or the last one when the patience is at its end.
    """
    if patience is None:
        patience = usual_patience()

    def say(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            error = state.outcome.exception()
            assert error is not None
            log.warning("%s: %s; trying again for %.0f s", what, reason(error), patience)

    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE_S),
        stop=tenacity.stop_after_delay(patience),
        before_sleep=say,
        reraise=True,
    )
    return retrying(operation)


def write_file(path: str, content: bytes | pa.Buffer) -> None:
    """Writes a file whole, patiently."""
    filesystem, root = filesystem_of(path)

    def write() -> None:
        with filesystem.open_output_stream(root) as sink:
            sink.write(content)

    patiently(write, f"writing {path}")


def replace_file(path: str, content: bytes, patience: float | None = None) -> None:
    """Writes a file patiently; readers see all of it or what was there before."""
    filesystem, root = filesystem_of(path)
    patiently(lambda: replace_on(filesystem, root, content), f"writing {path}", patience)


def replace_on(
    filesystem: pafs.FileSystem, name: str, content: bytes, *, durable: bool = False
) -> None:
    """Writes a file in one attempt; readers see all of it or what was there before.

    durable: whether it reaches the disk before anybody sees it.
    """
    with filesystem.open_output_stream(f"{name}.tmp") as sink:
        sink.write(content)
    if durable:
        to_disk(filesystem, f"{name}.tmp")
    filesystem.move(f"{name}.tmp", name)


def to_disk(filesystem: pafs.FileSystem, name: str) -> None:
    """Waits until a local file is on the disk, so that it is not lost with the machine."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        descriptor = os.open(name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_file(path: str) -> bytes | None:
    """Reads a file patiently; None where there is none."""
    filesystem, root = filesystem_of(path)

    def read() -> bytes | None:
        if filesystem.get_file_info(root).type != pafs.FileType.File:
            return None
        with filesystem.open_input_file(root) as file:
            content: bytes = file.read()
        return content

    return patiently(read, f"reading {path}")


def read_json(path: str) -> dict[str, Any] | None:
    """Reads a JSON file patiently; None where there is none.

    Raises:
        ReneeError: it holds no object.
    """
    content = read_file(path)
    try:
        found = None if content is None else json.loads(content)
    except (ValueError, RecursionError):
        found = "no object"
    if isinstance(found, dict | None):
        return found
    raise ReneeError(f"{path} is damaged: it is no JSON object; delete it")


def listing(path: str, *, recursive: bool = False) -> list[pafs.FileInfo]:
    """Lists a directory patiently; nothing where there is none."""
    filesystem, root = filesystem_of(path)
    selector = pafs.FileSelector(root, allow_not_found=True, recursive=recursive)
    return patiently(lambda: filesystem.get_file_info(selector), f"listing {path}")


def make_directory(path: str, patience: float | None = None) -> None:
    """Makes a directory and its parents, patiently."""
    filesystem, root = filesystem_of(path)
    patiently(lambda: filesystem.create_dir(root, recursive=True), f"making {path}", patience)


def remove(path: str) -> None:
    """Removes a file, or a directory with all that is in it, patiently; it may be missing."""
    filesystem, root = filesystem_of(path)

    def delete() -> None:
        kind = filesystem.get_file_info(root).type
        if kind == pafs.FileType.Directory:
            filesystem.delete_dir(root)
        elif kind == pafs.FileType.File:
            filesystem.delete_file(root)

    patiently(delete, f"removing {path}")


def is_transient(error: BaseException) -> bool:
    """Whether an error of storage, or its cause, is transient."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if isinstance(error, OSError) and any(mark in str(error) for mark in TRANSIENT):
        return True
    return error.__cause__ is not None and is_transient(error.__cause__)


def storage_error(
    error: OSError,
    what: str = "storage failed",
    remedy: str = "check the path and the endpoint",
) -> ReneeError:
    """Makes a ReneeError of an error of storage: one sentence for people."""
    text = reason(error)
    if any(mark in text for mark in REFUSED):
        return ReneeError(
            f"the object store refuses the credentials in the environment, or they have no right "
            f"to this ({text}); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the path"
        )
    return ReneeError(f"{what} ({text}); {remedy}")


def _s3(region: str) -> pafs.S3FileSystem:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    scheme, separator, host = (endpoint or "").partition("://")
    return pafs.S3FileSystem(
        region=region,
        endpoint_override=host.rstrip("/") if separator else endpoint,
        scheme=scheme if separator else "https",
        connect_timeout=5,
        request_timeout=30,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=SDK_ATTEMPTS),
    )
